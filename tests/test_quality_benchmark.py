"""benchmarks/quality.py: what is left to run, the table, the chart, and the baselines that cannot be deployed."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import corpus
from families import BY_NAME, batch_of
from torch import Tensor, nn

import moecompile
from moecompile.recipes import Calibrated, CMoE
from moecompile.recipes.neurons import token_weights
from moecompile.sites import DenseFFN

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import quality  # noqa: E402
import quality_baselines  # noqa: E402
import quality_table  # noqa: E402
from quality_variants import FRACTIONS, VARIANTS  # noqa: E402


def options(*arguments: str) -> argparse.Namespace:
    parsed = quality.parser().parse_args(["--model", "m", *arguments])
    parsed.examples = parsed.examples if parsed.lambada else 0
    return parsed


def row(variant: str, fraction: float | None = 0.5, seed: int | None = 0, value: float = 50.0, **more: Any) -> dict[str, Any]:
    return {
        "variant": variant, "fraction": fraction, "seed": seed, "active_fraction": fraction or 1.0,
        "compute_fraction": fraction, "perplexity": {"test": value, "books": value / 2}, **more,
    }  # fmt: skip


DENSE = row("dense", None, None, 25.0)


def jobs(rows: list[dict[str, Any]], *arguments: str) -> list[dict[str, Any]]:
    return list(quality.jobs_of(options(*arguments), rows, {}, Path("work")))


def test_every_variant_has_its_share_active() -> None:
    """By the recipes' own numbers, at each fraction."""
    for fraction in FRACTIONS:
        for name, variant in VARIANTS.items():
            if variant.recipe is None:
                continue
            settings = variant.recipe(fraction).settings()
            share = settings.get("active_fraction")
            if share is None:
                share = (settings["shared"] + settings["top_k"]) / (settings["shared"] + settings["experts"])
            if name.endswith("router counted"):
                assert fraction - 0.01 < share + settings["experts"] / (3 * 1536) <= fraction, name
            else:
                assert share == fraction, name


def test_variants_of_one_conversion_share_it() -> None:
    found = jobs([DENSE], "--only", "cmoe", "cmoe, oracle", "flap", "wina", "teal", "--fractions", "0.5", "--seeds", "0")
    assert [list(job["variants"]) for job in found] == [["cmoe", "cmoe, oracle"], ["flap"], ["wina", "teal"]]
    assert found[0]["recipe"] == "cmoe" and found[0]["settings"]["experts"] == 6 and found[2]["recipe"] is None
    assert len(jobs([DENSE], "--only", "calibrated", "calibrated, oracle", "--fractions", "0.5", "--seeds", "0")) == 2


def test_only_what_is_missing_is_run() -> None:
    asked = ("--only", "flap", "static", "--fractions", "0.5", "0.75", "--seeds", "0", "1")
    everything = jobs([], *asked)
    assert len(everything) == 1 + 2 * 2 * 2 and list(everything[0]["variants"]) == ["dense"]
    left = jobs([DENSE, row("flap"), row("static", 0.75, 1)], *asked)
    assert len(left) == 6
    keys = [(next(iter(job["variants"])), job["fraction"], job["seed"]) for job in left]
    assert ("flap", 0.5, 0) not in keys and ("static", 0.75, 1) not in keys and ("static", 0.5, 0) in keys


def test_a_row_without_a_measurement_is_measured_again() -> None:
    asked = ("--only", "calibrated", "flap", "--fractions", "0.5", "--seeds", "0")
    there = [DENSE, row("calibrated"), row("flap")]
    assert not jobs(there, *asked)
    assert len(jobs(there, *asked, "--lambada", "l.jsonl", "--examples", "9")) == 3
    assert [list(job["variants"]) for job in jobs(there, *asked, "--prefix", "8")] == [["dense"], ["calibrated"]]


def test_tuning_adds_a_row_for_what_could_be_deployed() -> None:
    asked = ("--only", "cmoe", "cmoe, oracle", "teal", "flap", "--fractions", "0.5", "--seeds", "0", "--tune", "5000")
    found = jobs([DENSE], *asked)
    assert [list(job["variants"]) for job in found] == [
        ["cmoe", "cmoe, oracle", "cmoe, tuned"],
        ["teal"],
        ["flap", "flap, tuned"],
    ]
    run = {"tokens": 4096, "weights": None}  # whole steps
    there = [DENSE, *(row(name) for name in ("cmoe", "cmoe, oracle", "teal", "flap")), row("cmoe, tuned", tuning=[run])]
    assert [list(job["variants"]) for job in jobs(there, *asked)] == [["flap, tuned"]]
    other = (*asked, "--tune-weights", "1", "2", "3", "4", "5")
    assert [list(job["variants"]) for job in jobs(there, *other)] == [["cmoe, tuned"], ["flap, tuned"]]
    for wrong, why in ((("--tune", "2000"), "a step takes 2048"), ((*other, "6"), "--tune-weights")):
        with pytest.raises(SystemExit, match=why):
            quality.check_tuning(options(*wrong))


def test_a_folder_has_a_name_of_its_own() -> None:
    asked = ("--only", "--fractions", "0.5", "--seeds", "0", "--folders", "mine=out/moe", "longer=out/more")
    there = [DENSE, row("mine", folder="moe"), row("longer", folder="another")]
    assert [(list(job["variants"]), job["folder"]) for job in jobs(there, *asked)] == [(["longer"], "out/more")]
    quality.check_folders(options(*asked).folders)
    for pairs, why in (
        (["mine"], "write NAME=FOLDER"),
        (["=out/moe"], "write NAME=FOLDER"),
        (["dense=out/moe"], "'dense' is a row of this benchmark"),
        (["cmoe, tuned=out/moe"], "'cmoe, tuned' is a row of this benchmark"),
        (["mine=a", "mine=b"], "two folders are called 'mine'"),
    ):
        with pytest.raises(SystemExit, match=why):
            quality.check_folders(pairs)


def test_no_more_passages_are_wanted_than_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passages, out = tmp_path / "l.jsonl", tmp_path / "out.json"
    passages.write_text('{"text": "the router sends"}\n' * 3, encoding="utf-8")
    for name in ("test", "a"):
        (tmp_path / f"{name}.txt").write_text(corpus(60, 0), encoding="utf-8")
    texts = ["--text", str(tmp_path / "test.txt"), "--domains", str(tmp_path / "a.txt"), "--held-windows", "0"]
    arguments = ["--model", "m", *texts, "--lambada", str(passages), "--only", "static", "--fractions", "0.5", "--seeds", "0"]
    corpora = {"test": {"path": "", "windows": 8}}
    record = quality.started(options(*arguments), None, corpora)
    rows = [row("dense", None, None, examples=3, lambada=0.5), row("static", examples=3, lambada=0.5)]
    for one in rows:
        one["perplexity"] = {"test": 30.0}
    out.write_text(json.dumps({**record, "rows": rows}), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["quality.py", *arguments, "--quiet", "--output", str(out)])
    monkeypatch.setattr(quality, "row_process", lambda job: pytest.fail(f"{job} was measured already"))
    quality.main()


def test_other_settings_are_refused() -> None:
    corpora = {"test": {"path": "t", "windows": 2}}
    record = quality.started(options(), None, corpora)
    assert quality.started(options(), record, corpora) is record
    with pytest.raises(SystemExit, match="another 'calibration_tokens'"):
        quality.started(options("--calibration-tokens", "99"), record, corpora)
    weighted = options("--domains", "a.txt", "b.txt", "--calibration-weights", "1", "4")
    theirs = quality.started(weighted, None, corpora)
    assert quality.started(weighted, theirs, corpora) is theirs
    for other in ((), ("--calibration-weights", "1", "3")):
        with pytest.raises(SystemExit, match="another 'calibration_weights'"):
            quality.started(options("--domains", "a.txt", "b.txt", *other), theirs, corpora)
    assert "of a.txt, b.txt (1 : 4), without" in quality_table.markdown({**theirs, "rows": [DENSE]}, {})


def test_the_last_tenth_is_held_out(tmp_path: Path) -> None:
    text = tmp_path / "books.txt"
    text.write_text("\n".join(f"line {n}" for n in range(1000)))
    found = quality.texts(options("--domains", str(text), "--text", str(tmp_path / "test.txt")), tmp_path)
    calibration, held = ((tmp_path / part / "books.txt").read_text() for part in ("calibration", "held"))
    assert calibration + held == text.read_text()
    assert 0.09 < len(held) / len(calibration + held) < 0.11 and held.startswith("line ")
    assert list(found) == ["test", "books"] and found["books"]["windows"] == 2


def record_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    made = quality.started(options(), None, {name: {"path": name, "windows": 2} for name in ("test", "books")})
    return {**made, "rows": rows}


def test_table_joins_seeds() -> None:
    rows = [DENSE, row("flap", value=40.0), row("flap", seed=1, value=90.0), row("cmoe, oracle", compute_fraction=None)]
    text = quality_table.markdown(record_of(rows), {"flap": "what FLAP is"})
    line = next(line for line in text.splitlines() if line.startswith("| flap"))
    assert "60.00 (40.00 to 90.00)" in line and "| 2.40 |" in line and "| 0, 1 |" in line
    oracle = next(line for line in text.splitlines() if line.startswith("| cmoe, oracle"))
    assert "| 50.0% | - |" in oracle
    assert "- **flap**: what FLAP is" in text


def test_chart_is_a_drawing_with_every_variant() -> None:
    rows = [DENSE, row("flap"), row("flap", 0.75, value=30.0), row("static <&>", value=60.0), row("broken", value=float("inf"))]
    drawing = quality_table.chart(record_of(rows))
    texts = ["".join(node.itertext()) for node in ElementTree.fromstring(drawing).iter("{http://www.w3.org/2000/svg}text")]
    assert {"dense", "flap", "static <&>"} <= set(texts) and "broken" not in texts
    far = quality_table.chart(record_of([DENSE, row("flap"), row("random", value=9e5)]))
    assert "Above 1000: random at 50%" in far and "flap" in far and "9e" not in far and "900000" not in far


def test_dial_is_shown_beside_dense() -> None:
    dense = {**DENSE, "dial": {"prefix": 8, "dense": 20.0}}
    ours = row("calibrated", dial={"prefix": 8, "sparse": 44.0, "dense_prefix": 33.0})
    assert "| calibrated | 50.0% | 0 | 44.00 | 33.00 | 20.00 |" in quality_table.markdown(record_of([dense, ours]), {})


def test_oracle_chooses_what_changes_the_output_most() -> None:
    """Against the same from the dense weights, with experts' own means taken off."""
    family = BY_NAME["llama"]
    dense, batch = family.build(), batch_of(family, 24, 4)
    moe = quality_baselines.with_oracle(moecompile.convert(dense, CMoE(6, 2, 2), [batch]))
    block = next(iter(moecompile.moe_blocks(moe).values()))
    site = moe.moecompile_plan.sites[0]  # type: ignore[union-attr]
    ffn, x = DenseFFN.read(site.site, dense), torch.randn(700, 32, generator=torch.Generator().manual_seed(0))
    hidden = ffn.hidden(x)
    size = torch.stack([(hidden[:, list(e)] @ ffn.down[:, list(e)].t()).norm(dim=1) for e in site.experts], 1)
    with torch.no_grad():
        chosen = block.choose(x)[0].sort().values
    assert torch.equal(chosen, size.topk(2).indices.sort().values)


def test_what_is_fitted_to_an_oracle_is_run_with_it() -> None:
    """Each layer's error when running is the one that it was fitted to; without the oracle, `calibrated` is as it was."""
    family = BY_NAME["llama"]
    dense, batch = family.build(), batch_of(family, 40, 8)
    recipe = Calibrated(6, 2, 2, drift=0.0, precision="float32")  # the target is the dense model's own output
    plain = moecompile.plan(dense, recipe, [batch])
    with quality_baselines.fitted_to_oracle() as changes:
        fitted = moecompile.plan(dense, recipe, [batch])
    moe = quality_baselines.with_changes(moecompile.convert(dense, fitted), changes)
    assert moecompile.plan(dense, recipe, [batch]).to_dict() == plain.to_dict()
    outputs: dict[str, list[Tensor]] = {}
    for model in (dense, moe):
        for planned in fitted.sites:
            path = planned.site.name if model is dense else planned.site.placement.block  # type: ignore[union-attr]
            own = outputs.setdefault(planned.site.name, [])
            model.get_submodule(path).register_forward_hook(
                lambda _, args, out, own=own: own.append(out.detach().flatten(0, -2))
            )
        with torch.no_grad():
            model(**batch)
    for planned, routed in zip(fitted.sites, plain.sites, strict=True):
        y, converted = outputs[planned.site.name]
        weights = token_weights(y.norm(dim=1))
        error = (weights @ (converted - y).square().sum(1)) / (weights @ y.square().sum(1))
        assert float(error.sqrt()) == pytest.approx(planned.metrics["calibration_error"], rel=1e-3)
        assert planned.experts == routed.experts
        assert planned.metrics["calibration_error"] < 0.97 * routed.metrics["calibration_error"]


@pytest.mark.parametrize("weighted", [False, True])
def test_thresholds_leave_the_share_asked_for(weighted: bool) -> None:
    family = BY_NAME["llama"]
    dense, batch = family.build(), batch_of(family, 60, 8)
    with torch.no_grad():
        before = dense(**batch).logits
        everything = quality_baselines.with_thresholds(family.build(), [batch], 1.0, weighted)
        torch.testing.assert_close(everything(**batch).logits, before)
        some = quality_baselines.with_thresholds(family.build(), [batch], 0.25, weighted)
        assert not torch.equal(some(**batch).logits, before)
    assert quality_baselines.kept_fraction(some) == pytest.approx(0.25, abs=0.03)
    strongest = next(module for module in some.modules() if isinstance(module, quality_baselines.ThresholdFFN))
    hidden = torch.randn(5, 32)
    strength = (strongest.dense.hidden(hidden).abs() * strongest.scale).flatten()
    kept = strength >= strongest.threshold
    assert float(strength[kept].min()) > float(strength[~kept].max())


@pytest.mark.slow
def test_stopped_and_taken_up_again(dense_folder: Path, tmp_path: Path) -> None:
    """The whole script on a tiny model: what was measured stays, what is missing is added, a folder is one row more."""
    for number, name in enumerate(("test", "a", "b")):
        lines = [corpus(60, 100 * number + line).strip() for line in range(30)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    passages = [json.dumps({"text": corpus(12, number).strip()}) for number in range(10)]
    (tmp_path / "l.jsonl").write_text("\n".join(passages), encoding="utf-8")
    common = [
        "--model", str(dense_folder), "--text", "test.txt", "--window", "32", "--windows", "2", "--domains", "a.txt", "b.txt",
        "--held-windows", "1", "--lambada", "l.jsonl", "--examples", "4", "--calibration-tokens", "256",
        "--calibration-window", "32", "--seeds", "0", "--fractions", "0.5", "--quiet", "--output", "out.json",
    ]  # fmt: skip

    def run(*more: str) -> dict[str, Any]:
        script = str(ROOT / "benchmarks" / "quality.py")
        subprocess.run([sys.executable, script, *common, *more], cwd=tmp_path, check=True, capture_output=True)
        return json.loads((tmp_path / "out.json").read_text())

    first = run("--only", "static")
    assert [r["variant"] for r in first["rows"]] == ["dense", "static"]
    moe = moecompile.convert(BY_NAME["llama"].build(), CMoE(6, 2, 2), [batch_of(BY_NAME["llama"], 40, 4)])
    assert isinstance(moe, nn.Module)
    moe.save_pretrained(tmp_path / "moe")  # type: ignore[operator]
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(dense_folder).save_pretrained(tmp_path / "moe")
    second = run("--only", "static", "cmoe", "cmoe, oracle", "wina", "--folders", f"tuned={tmp_path / 'moe'}")
    assert [r["variant"] for r in second["rows"]] == ["dense", "static", "cmoe", "cmoe, oracle", "wina", "tuned"]
    assert second["rows"][:2] == first["rows"]
    for measured in second["rows"]:
        assert set(measured["perplexity"]) == {"test", "a", "b"} and 0 <= measured["lambada"] <= 1
    assert second["rows"][2]["compute_fraction"] > second["rows"][2]["active_fraction"] == 0.5
    assert (tmp_path / "out.md").read_text().count("| cmoe, oracle |") == 1
    third = run("--only", "static", "cmoe", "cmoe, oracle", "--tune", "4096", "--tune-weights", "1", "3")
    named = {r["variant"]: r for r in third["rows"]}
    assert list(named) == ["dense", "static", "cmoe", "cmoe, oracle", "wina", "static, tuned", "cmoe, tuned", "tuned"]
    for name, stages in (("static", ["experts", "norms", "attention"]), ("cmoe", ["router", "experts", "norms", "attention"])):
        before, after = named[name], named[f"{name}, tuned"]
        assert after["perplexity"]["a"] < before["perplexity"]["a"] and after["active_fraction"] == before["active_fraction"]
        assert after["tuning"][0]["stage"] == stages and after["tuning"][0]["tokens"] == 4096
    ElementTree.fromstring((tmp_path / "out.svg").read_text())
