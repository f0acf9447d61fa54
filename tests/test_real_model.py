"""The figures that are promised for a real language model; downloads 93 MB and takes some ten minutes (-m real_model)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.real_model
ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "examples" / "data"
DOMAINS = [str(DATA / f"{name}.txt") for name in ("books", "code", "docs", "math", "wiki")]
TEST = str(DATA / "wikitext2_test_head.txt")


@pytest.fixture(scope="module")
def gguf() -> str:
    """SmolLM2-135M-Instruct in the user cache."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "fetch_model.py")], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def command(*arguments: str) -> dict:  # type: ignore[type-arg]
    """A command's JSON, from a process of its own, so that its peak memory is its own."""
    code = "import sys; from moecompile.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--json", "--quiet"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_dense_perplexity(gguf: str) -> None:
    measured = command("eval", gguf, "--text", TEST, "--max-windows", "16")
    assert measured["perplexity"] == pytest.approx(22.55, abs=0.1)


def test_every_ffn_is_found(gguf: str) -> None:
    explained = command("explain", gguf)
    assert [site["name"] for site in explained["sites"]] == [f"model.layers.{i}.mlp" for i in range(30)]
    assert not explained["skipped"]


def test_conversion_at_half_the_neurons(gguf: str, tmp_path: Path) -> None:
    out = str(tmp_path / "moe")
    done = command(
        "convert", gguf, out, "--experts", "48", "--shared", "16", "--top-k", "16", "--calibration", *DOMAINS, "--keep-exact"
    )
    assert done["active_fraction"] == pytest.approx(0.5)
    assert done["parity_max_abs_error"] <= 1e-4
    assert done["routing_relative_error"] <= 1e-5
    assert done["peak_rss_bytes"] < 4 * 2**30
    moe = command("eval", out, "--text", TEST, "--max-windows", "8")
    assert moe["perplexity"] <= 80
    exact = command("eval", out, "--text", TEST, "--max-windows", "8", "--top-k", "48")
    assert exact["perplexity"] == pytest.approx(29.185, abs=0.01)
