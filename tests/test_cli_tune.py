"""``moecompile tune`` on a tiny model: what it prints, writes and refuses, and that it goes on after a kill."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import corpus
from families import BY_NAME
from safetensors.torch import load_file

import moecompile
from moecompile.cli import main
from moecompile.cli.tune import thinned

WINDOW = 16
SHORT = ["--window", str(WINDOW), "--batch", "2", "--learning-rate", "3e-3", "--quiet"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two files of known words."""
    folder = tmp_path_factory.mktemp("texts")
    paths = [folder / "a.txt", folder / "b.txt"]
    for seed, path in enumerate(paths):
        path.write_text(corpus(900, seed), encoding="utf-8")
    return paths


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, texts: list[Path]) -> Path:
    """A folder with ``dense`` and its conversion ``moe``."""
    folder = tmp_path_factory.mktemp("tune")
    model = BY_NAME["llama"].build(vocab_size=len(tokenizer))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    model.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    options = ["--experts", "6", "--shared", "2", "--top-k", "2", "--calibration-window", "16", "--calibration-tokens", "256"]
    assert (
        main(["convert", str(folder / "dense"), str(folder / "moe"), *options, "--quiet", "--calibration", *map(str, texts)])
        == 0
    )
    return folder


@pytest.fixture
def moe(original: Path, tmp_path: Path) -> Path:
    """The converted folder, to spoil."""
    return Path(shutil.copytree(original / "moe", tmp_path / "moe"))


def tune(moe: Path, texts: list[Path], *more: object, tokens: int = 640) -> int:
    return main(["tune", str(moe), "--text", *map(str, texts), "--tokens", str(tokens), *SHORT, *map(str, more)])


def test_the_dense_model_is_not_replaced(original: Path, texts: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted((original / "dense").iterdir())
    for target in (original / "dense", original / "dense" / "inside", original):
        assert tune(original / "moe", texts, "--output", target, "--overwrite") == 2
        assert "the dense model" in capsys.readouterr().err
    assert sorted((original / "dense").iterdir()) == before


def test_the_folder_that_one_stands_in(moe: Path, texts: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(moe)
    assert tune(Path("."), texts, tokens=64) == 0
    assert not list(moe.parent.glob(".moe.*"))


def test_tune_replaces_the_folder_and_says_what_it_did(
    moe: Path, texts: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before = load_file(moe / "model.safetensors")
    capsys.readouterr()
    assert tune(moe, texts, "--json", "--stage", "router,experts,norms") == 0
    out, _ = capsys.readouterr()
    result = json.loads(out)
    assert {"perplexity_before", "perplexity_after", "perplexity_dense", "tokens", "seconds"} <= set(result)
    assert result["tokens"] == 640 and result["steps"] == 20 and result["active_fraction"] == 0.5
    assert abs(math.log(result["perplexity_after"] / result["perplexity_dense"])) < abs(
        math.log(result["perplexity_before"] / result["perplexity_dense"])
    )
    after = load_file(moe / "model.safetensors")
    assert set(after) == set(before)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert all("mlp" in name or "norm" in name for name in changed) and any("router" in name for name in changed)
    record = json.loads((moe / "moecompile.json").read_text())
    assert record["tuning"][0]["perplexity_after"] == result["perplexity_after"] and len(record["tuning"][0]["curve"]) == 20
    assert len(record["diagnosis"]["layers"]) == 2
    assert [one["fraction"] for one in record["usage"]] == [one["usage"] for one in record["diagnosis"]["layers"]]
    assert "640 tokens of a.txt, b.txt" in (moe / "README.md").read_text()
    assert not list(moe.parent.glob(".moe.*")), "the checkpoint and what was written aside are gone"
    assert moecompile.load(moe)(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.isfinite().all()
    assert main(["report", str(moe)]) == 0
    page = (moe / "report.html").read_text()
    assert "Loss of run 1" in page and "What the error is made of" in page


def test_progress_has_rate_loss_and_time_left(
    moe: Path, texts: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from moecompile import progress

    bar = progress.tqdm
    monkeypatch.setattr(progress, "tqdm", lambda *a, **k: bar(*a, **{**k, "delay": 0, "mininterval": 0}))
    loud = [option for option in SHORT if option != "--quiet"]
    assert main(["tune", str(moe), "--text", *map(str, texts), "--tokens", "640", *loud]) == 0
    shown = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if line.startswith("tuning") and "10/20" in line]
    assert re.search(r"\[\d\d:\d\d<\d\d:\d\d, .*loss \d+\.\d{3}, \d+ tokens/s\]", shown[0]), shown


def test_a_prefix_by_refitted_experts_is_not_called_dense(
    moe: Path, texts: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--text", str(texts[0]), "--window", "32", "--max-windows", "2", "--dense-prefix", "8", "--json"]
    assert main(["eval", str(moe), *asked]) == 0
    out, err = capsys.readouterr()
    assert not json.loads(out)["dense_prefix_exact"] and "not the dense model" in err


def test_all_experts_are_the_dense_model_until_more_than_routers_is_tuned(moe: Path) -> None:
    from moecompile import checkpoint

    model, record = moecompile.load(moe), checkpoint.record_of(moe)
    assert not checkpoint.exact(model, record)
    model.moecompile_plan = model.moecompile_plan.with_exact(True)
    assert checkpoint.exact(model, {**record, "tuning": [{"stage": ["router"]}]})
    assert not checkpoint.exact(model, {**record, "tuning": [{"stage": ["router"]}, {"stage": ["router", "experts"]}]})


def test_a_killed_command_goes_on(moe: Path, texts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, given = tmp_path / "whole", ("--save-every", 4, "--text-weights", 3, 1)
    assert tune(moe, texts, "--output", whole, *given) == 0
    script = (
        "import os, signal, sys\n"
        "import moecompile.tuning.loop as loop\n"
        "write = loop.write_state\n"
        "def dying(*a, **k):\n"
        "    write(*a, **k)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "loop.write_state = dying\n"
        "from moecompile.cli import main\n"
        "import torch; torch.set_num_threads(1)\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    out = tmp_path / "out"
    arguments = ["tune", moe, "--text", *texts, "--tokens", 640, *SHORT, "--output", out, *given]
    command = [sys.executable, "-c", script, *map(str, arguments)]
    killed = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL and not out.exists()
    assert (tmp_path / ".out.tuning" / "step-00000004").is_dir()
    for other in (("--learning-rate", 1e-3), ("--text-weights", 1, 3)):  # not that run
        assert tune(moe, texts, "--output", out, *given, *other) == 2
        assert "--restart" in capsys.readouterr().err
    assert tune(moe, texts, "--output", out, *given) == 0
    first, second = load_file(whole / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    records = [json.loads((folder / "moecompile.json").read_text())["tuning"][0] for folder in (whole, out)]
    assert records[0]["curve"] == records[1]["curve"] and records[1]["resumed_from"] == 4
    assert records[0]["weights"] == [3, 1] and "in shares of 3 : 1" in (out / "README.md").read_text()
    assert not (tmp_path / ".out.tuning").exists()


def test_a_command_killed_behind_its_result_does_not_tune_twice(
    moe: Path, texts: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from moecompile.cli import tune as command

    with monkeypatch.context() as patched:
        patched.setattr(command, "throw_away", lambda folder: None)
        assert tune(moe, texts, "--json") == 0
    first = json.loads(capsys.readouterr().out)
    left, weights = moe.parent / ".moe.tuning", (moe / "model.safetensors").read_bytes()
    kept = shutil.copytree(left, moe.parent / "kept")
    assert tune(moe, texts, "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert again == first and (moe / "model.safetensors").read_bytes() == weights and not left.exists()
    shutil.copytree(kept, left)  # another run on the tuned model is another run
    assert tune(moe, texts, "--seed", 1) == 0
    assert (moe / "model.safetensors").read_bytes() != weights and not left.exists()
    assert [run["resumed_from"] for run in json.loads((moe / "moecompile.json").read_text())["tuning"]] == [0, 0]


def test_an_interrupted_command_says_how_to_go_on(
    moe: Path, texts: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from moecompile.tuning import loop

    write = loop.write_state

    def interrupted(*arguments: Any) -> None:
        write(*arguments)
        raise KeyboardInterrupt

    before = (moe / "model.safetensors").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(loop, "write_state", interrupted)
        assert tune(moe, texts, "--save-every", 4) == 2
    assert "step-00000004" in capsys.readouterr().err
    assert (moe / "model.safetensors").read_bytes() == before
    assert tune(moe, texts, "--save-every", 4, "--restart") == 0
    assert json.loads((moe / "moecompile.json").read_text())["tuning"][0]["resumed_from"] == 0


def test_where_the_dense_model_is(original: Path, moe: Path, texts: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((moe / "moecompile.json").read_text())
    assert record["source_path"] == str((original / "dense").resolve())
    record["source_path"] = "/nowhere/dense"
    (moe / "moecompile.json").write_text(json.dumps(record))
    assert tune(moe, texts) == 2 and "--dense" in capsys.readouterr().err
    del record["source_path"]
    (moe / "moecompile.json").write_text(json.dumps(record))
    assert tune(moe, texts) == 2 and "--dense" in capsys.readouterr().err
    assert tune(moe, texts, "--dense", original / "dense", tokens=64) == 0


def test_another_dense_model_is_refused(
    moe: Path, texts: list[Path], tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    BY_NAME["llama"].build(seed=7, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "other")
    assert tune(moe, texts, "--dense", tmp_path / "other") == 2
    assert "not the one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "tokens", "says"),
    [
        (["--stage", "heads"], 640, "--stage"),
        ([], 8, "--tokens"),
        (["--batch", "0"], 640, "--batch"),
        (["--window", "1"], 640, "--window"),
        (["--window", "600"], 6400, "600"),
        (["--held-out", "0"], 640, "--held-out"),
        (["--text-weights", "1", "2", "3", "4"], 640, "--text-weights has 4 numbers"),
        (["--warmup", "3"], 640, "--warmup"),
    ],
)
def test_bad_input_is_one_line(
    moe: Path, texts: list[Path], more: list[str], tokens: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert tune(moe, texts, *more, tokens=tokens) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and len(err.strip().splitlines()) == 1


def test_a_dense_folder_is_refused(original: Path, texts: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert tune(original / "dense", texts) == 2
    assert "not a converted model" in capsys.readouterr().err


def test_a_long_curve_is_thinned_to_means() -> None:
    curve = [{"step": i + 1, "tokens": 10 * (i + 1), "loss": float(i % 2)} for i in range(1001)]
    rows = thinned(curve)
    assert len(rows) <= 400 and rows[-1]["tokens"] == 10010 and rows[0]["loss"] == pytest.approx(1 / 3, abs=1e-5)
    assert thinned(curve[:5])[3] == curve[3]
    assert thinned([{"step": 1, "tokens": 2, "loss": 1.0}, {"step": 2, "tokens": 4, "loss": 3.0, "kl": 2.0}])[1]["kl"] == 2.0


def test_rounds_of_a_read_me_folder(
    original: Path, texts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--recipe", "read-me", "--active-fraction", "0.6", "--router-steps", "2", "--calibration-window", "16"]
    convert = ["convert", str(original / "dense"), str(tmp_path / "moe"), *options, "--calibration-tokens", "256", "--quiet"]
    assert main([*convert, "--calibration", *map(str, texts)]) == 0
    capsys.readouterr()
    more = ("--json", "--rounds", 2, "--router-share", 0.3, "--front-rate", 1e-3, "--stage", "router,experts")
    assert tune(tmp_path / "moe", texts, *more) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["config"]["rounds"] == 2 and result["perplexity_after"] != result["perplexity_before"]
    record = json.loads((tmp_path / "moe" / "moecompile.json").read_text())
    curve = record["tuning"][0]["curve"]
    assert [number for number, row in enumerate(curve) if "kl" not in row] == [0, 1, 2, 10, 11, 12]
    layers = record["diagnosis"]["layers"]  # the router at the front decides for all of them
    assert len(layers) == len(record["usage"]) == len(moecompile.moe_blocks(moecompile.load(tmp_path / "moe")))
    assert all(sum(layer["usage"]) == pytest.approx(1.0, abs=1e-3) and layer["top_k"] == 1 for layer in layers)
    assert main(["report", str(tmp_path / "moe"), "--quiet"]) == 0
    assert tune(tmp_path / "moe", texts, "--rounds", 11, "--quiet") == 2
    assert "--rounds" in capsys.readouterr().err
