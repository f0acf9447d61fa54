"""benchmarks/read_me.py: the table, and that a second run finds everything done."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import corpus
from families import BY_NAME

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("read_me", ROOT / "benchmarks" / "read_me.py")
assert SPEC is not None and SPEC.loader is not None
read_me = sys.modules["read_me"] = importlib.util.module_from_spec(
    SPEC
)  # its folder's kernels.py is not transformers' `kernels`
SPEC.loader.exec_module(read_me)


def row(variant: str, tokens: int, *values: float) -> dict[str, Any]:
    perplexity = dict(zip(("a", "b"), values, strict=True))
    return {"variant": variant, "tuned": tokens > 0, "tokens": tokens, "seed": 0, "calibration_tokens": 96,
            "perplexity": perplexity, "computed": 0.5238, "wikitext2": 40.0}  # fmt: skip


def test_the_table() -> None:
    rows = [row("aligned", 64, 2.0, 8.0), row("static", 0, 9.0, 4.0), row("aligned", 0, 3.0, 12.0)]
    lines = read_me.markdown(
        {"rows": rows, "domains": ["a.txt", "b.txt"], "windows": 6, "text": "t", "model": "m"}
    ).splitlines()
    assert lines[4:] == [
        "| static | 96 | - | 0 | 52.4% | 9.00 | 4.00 | 6.00 | 40.00 |",
        "| read-me, aligned, ranked as in the paper | 96 | - | 0 | 52.4% | 3.00 | 12.00 | 6.00 | 40.00 |",
        "| read-me, aligned, ranked as in the paper | 96 | 64 | 0 | 52.4% | 2.00 | 8.00 | 4.00 | 40.00 |",
    ]


def test_every_start_is_converted_before_it_is_taken() -> None:
    names = list(read_me.VARIANTS)
    for name, variant in read_me.VARIANTS.items():
        if variant.start:
            assert names.index(variant.start) < names.index(name)
            assert variant.convert == read_me.VARIANTS[variant.start].convert


@pytest.mark.slow
def test_what_is_done_is_not_done_again(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    BY_NAME["llama"].build(vocab_size=len(tokenizer), max_position_embeddings=1024).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    for seed in range(2):
        (tmp_path / f"d{seed}.txt").write_text(corpus(6000, seed), encoding="utf-8")
    (tmp_path / "test.txt").write_text(corpus(1100, 7), encoding="utf-8")
    texts = [str(tmp_path / f"d{seed}.txt") for seed in range(2)]
    output = tmp_path / "rows.json"
    given = ["--model", str(tmp_path / "dense"), "--domains", *texts, "--text", str(tmp_path / "test.txt"), "--windows", "1"]
    given += ["--tokens", "2048", "--only", "static", "--work", str(tmp_path / "work"), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["read_me.py", *given])
    read_me.main()
    rows = json.loads(output.read_text())["rows"]
    assert [one["tuned"] for one in rows] == [False, True] and rows[1]["tokens"] == 2048
    assert all(set(one["perplexity"]) == {"d0", "d1"} and one["wikitext2"] > 1 for one in rows)
    assert "moecompile convert" in capsys.readouterr().err
    for seed in range(2):  # what calibrates is the text without its last tenth
        whole, part = ((folder / f"d{seed}.txt").read_text().split() for folder in (tmp_path, tmp_path / "work" / "texts"))
        assert part == whole[: round(0.9 * len(whole))]
    read_me.main()
    assert json.loads(output.read_text())["rows"] == rows and "moecompile" not in capsys.readouterr().err
