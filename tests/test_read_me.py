"""The recipe read-me: which neurons go where, that nothing is lost, that the router learns, and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import VOCABULARY, dense_model
from conftest import corpus

import moecompile
from moecompile import InputError, PlanError
from moecompile.capture import capture
from moecompile.cli import main
from moecompile.distil import Distillation
from moecompile.front import decide
from moecompile.match import match
from moecompile.progress import Progress
from moecompile.recipes import ReadMe
from moecompile.recipes import domains as recipe_domains
from moecompile.recipes.base import Context
from moecompile.recipes.domains import domain_experts, survey_domains
from moecompile.recipes.neurons import token_weights
from moecompile.sites import DenseFFN
from moecompile.targets import membership

SMALL: dict[str, Any] = {"router_width": 32, "router_heads": 2, "router_mlp": 32}
QUICK = Distillation(steps=60, batch=4, lr=3e-3)


def domains(count: int = 3, windows: int = 6, seed: int = 0) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Texts of tokens that other domains do not have."""
    generator = torch.Generator().manual_seed(seed)
    share = (VOCABULARY - 1) // count
    return {
        f"d{number}": [
            {"input_ids": torch.randint(1 + number * share, 1 + (number + 1) * share, (2, 16), generator=generator)}
            for _ in range(windows // 2)
        ]
        for number in range(count)
    }


def taught(**changes: Any) -> Any:
    """A small model and its read-me plan."""
    dense = dense_model()
    recipe = ReadMe(distillation=QUICK, **{**SMALL, **changes})
    return dense, moecompile.plan(dense, recipe, domains())


# Experts


def test_every_neuron_has_a_place() -> None:
    strength = torch.rand(4, 40, generator=torch.Generator().manual_seed(0))
    shared, experts, spare = domain_experts(strength, 20, torch.zeros(40, dtype=torch.bool))
    named, rest = experts[:4], experts[4:]
    assert len(rest) == spare and {len(e) for e in named} == {20 - len(shared)}
    for number, expert in enumerate(named):
        assert set(expert) | set(shared) == set(strength[number].topk(20).indices.tolist())
    union = {n for e in named for n in e} | set(shared)
    assert sorted(union | {n for e in rest for n in e}) == list(range(40))
    assert not union & {n for e in rest for n in e} and all(len(e) <= len(named[0]) for e in rest)


def test_equal_domains_still_have_experts() -> None:
    strength = torch.arange(10.0).expand(3, -1)
    shared, experts, _ = domain_experts(strength, 4, torch.zeros(10, dtype=torch.bool))
    assert shared == [7, 8, 9] and experts[:3] == [[6]] * 3


def test_neurons_that_are_always_on() -> None:
    strength = torch.rand(3, 20)
    always = torch.zeros(20, dtype=torch.bool)
    always[[3, 11]] = True
    shared, _, _ = domain_experts(strength, 8, always)
    assert {3, 11} <= set(shared)


def test_membership() -> None:
    assert membership([[0, 2], [2]], 3).tolist() == [[1, 0], [0, 0], [1, 1]]


@pytest.mark.parametrize("ranking", ["activation", "output", "variance"])
def test_rankings_are_the_statistics_of_each_domain(ranking: str) -> None:
    """Against the hidden activations of the live model's first FFN."""
    dense, data = dense_model(), domains()
    captured = capture(dense)
    matches = match(captured).matches
    batches = [batch for part in data.values() for batch in part]
    whose = tuple(number for number, part in enumerate(data.values()) for _ in part)
    with torch.no_grad():
        context = Context(captured, matches, batches, Progress(), 0, tuple(data), whose)
        found = survey_domains(context, ranking, 0.5, True, "effect")
        ffn = DenseFFN.read(matches[0].site, dense)
        inputs: list[torch.Tensor] = []
        hook = dense.model.layers[0].mlp.register_forward_pre_hook(lambda _m, args: inputs.append(args[0].flatten(0, 1)))
        for batch in data["d1"]:
            dense(**batch)
        hook.remove()
        hidden = [ffn.hidden(x) for x in inputs]
        size = ffn.down.norm(dim=0)
        h = torch.cat(hidden)
        expected = {"activation": h.abs().mean(0), "output": h.abs().mean(0) * size}
        weights = torch.cat([token_weights(ffn.output(part).norm(dim=1)) for part in hidden])
        expected["variance"] = ((weights @ (h - weights @ h / weights.sum()).square()) / weights.sum()) * size.square()
    torch.testing.assert_close(found[0].strength[1], expected[ranking], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("effects", [[1.0, 0.01], [0.01, 1.0]])
def test_layers_that_matter_get_more_neurons(effects: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two equal fractions the layer with the larger effect takes from the other; both keep what attention sinks need."""
    dense, left = dense_model(), iter(effects)
    monkeypatch.setattr(recipe_domains._Effects, "next", lambda *_: next(left))
    even, budget = (
        moecompile.plan(dense, ReadMe(distillation=QUICK, budget=kind, **SMALL), domains()) for kind in ("even", "effect")
    )
    width = dense.config.intermediate_size
    working = [[len(site.shared) + len(site.experts[0]) for site in plan.sites] for plan in (even, budget)]
    assert working[0] == [width // 2] * 2 and sum(working[1]) <= width
    more, fewer = working[1] if effects[0] > effects[1] else working[1][::-1]
    assert more > width // 2 > fewer
    for plan in (even, budget):
        assert moecompile.verify(moecompile.convert(dense, plan, keep_exact=True), dense, domains()["d0"][0]).exact


def test_the_effect_of_a_layer_is_what_its_missing_neurons_do_to_the_output() -> None:
    """Nothing where all neurons stay; the model's own divergence where they do not."""
    dense, data = dense_model(), domains()
    captured = capture(dense)
    batches = [part[0] for part in data.values()]
    context = Context(captured, match(captured).matches, batches, Progress(), 0, tuple(data), (0, 1, 2))
    ffn = DenseFFN.read(context.matches[0].site, dense)
    width = ffn.up.shape[0]
    sums = recipe_domains._Sums(3, width)  # means of 0
    with torch.no_grad():
        everything = recipe_domains._Effects(context).next(ffn, torch.ones(3, width, dtype=torch.bool), sums)
        nothing = recipe_domains._Effects(context).next(ffn, torch.zeros(3, width, dtype=torch.bool), sums)
        windows = [batch["input_ids"][:1] for batch in batches]
        reference = [dense(input_ids=ids).logits.log_softmax(-1) for ids in windows]
        hook = dense.model.layers[0].mlp.register_forward_hook(lambda _m, _a, out: torch.zeros_like(out))
        without = [dense(input_ids=ids).logits.log_softmax(-1) for ids in windows]
        hook.remove()
    expected = sum(float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(reference, without, strict=True)) / 3
    assert everything == pytest.approx(0.0, abs=1e-7) and nothing == pytest.approx(expected, rel=1e-4)


# The plan


@pytest.mark.parametrize("compensation", ["none", "means", "refit"])
def test_aligned_plan(compensation: str) -> None:
    dense, plan = taught(compensation=compensation)
    assert plan.router == "pregate" and plan.pregate.groups == 1 and plan.pregate.experts == 3
    assert plan.active_fraction == pytest.approx(0.5) and plan.config["domains"] == ["d0", "d1", "d2"]
    moe = moecompile.convert(dense, plan, keep_exact=True).eval()
    report = moecompile.verify(moe, dense, {"input_ids": domains()["d0"][0]["input_ids"]})
    assert report.exact
    moecompile.set_top_k(moe, 1)
    with pytest.raises(PlanError, match="overlap"):
        moecompile.set_top_k(moe, 2)


@pytest.mark.parametrize("compensation", ["none", "means"])
def test_all_experts_on_is_the_dense_model_without_a_copy(compensation: str) -> None:
    dense, plan = taught(compensation=compensation)
    moe = moecompile.convert(dense, plan).eval()
    moecompile.set_top_k(moe, None)
    ids = domains()["d1"][0]["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(moe(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_a_chosen_expert_is_its_mask_of_the_dense_ffn() -> None:
    """Overlapping experts, no compensation: the block gives the dense FFN with the mask of shared and chosen neurons."""
    dense, plan = taught(compensation="none")
    moe = moecompile.convert(dense, plan).eval()
    ids = domains()["d2"][0]["input_ids"]
    scores, _ = decide(moe, {"input_ids": ids})
    seen: list[Any] = []
    block = next(iter(moecompile.moe_blocks(moe).values()))
    hook = block.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        moe(input_ids=ids)
        hook.remove()
        site = plan.sites[0]
        ffn = DenseFFN.read(site.site, dense)
        x, out = (value.reshape(-1, value.shape[-1]) for value in seen[0])
        mask = membership(site.experts, ffn.up.shape[0]).t()[scores.argmax(-1)]
        mask[:, list(site.shared)] = 1.0
        torch.testing.assert_close(out, ffn.output(ffn.hidden(x) * mask), rtol=1e-5, atol=1e-5)
        assert torch.equal(block.neurons_on(scores.argmax(-1, keepdim=True)), mask.bool())


def test_router_learns_the_domains() -> None:
    """Token sets are disjoint, so the oracle can be told from the tokens: far above a constant choice."""
    dense = dense_model()
    plan = moecompile.plan(dense, ReadMe(distillation=Distillation(steps=150, batch=4, lr=3e-3), **SMALL), domains(windows=24))
    learnt = plan.config["router_training"]
    assert learnt["loss_last"] < 0.7 * learnt["loss_first"]
    assert learnt["agreement"] > learnt["constant_agreement"] + 0.1


def test_disjoint_plan() -> None:
    dense, plan = taught(disjoint=True, experts=6, shared=2, top_k=2)
    assert plan.pregate.groups == 2 and plan.pregate.experts == 6 and plan.active_fraction == pytest.approx(0.5)
    moe = moecompile.convert(dense, plan).eval()
    assert all(0 <= row["top_k"] < 2 for row in moecompile.verify(moe, dense).layers)
    moecompile.set_top_k(moe, 4)


def test_same_seed_same_plan() -> None:
    (_, first), (_, second) = taught(), taught()
    assert first.to_dict() == second.to_dict()
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"experts": 4}, "one expert per"),
        ({"disjoint": True, "active_fraction": 0.5}, "--experts"),
        ({"disjoint": True, "experts": 4, "top_k": 4}, "choose"),
        ({"ranking": "size"}, "ranking"),
        ({"budget": "odd"}, "budget"),
        ({"router_target": "amplitude"}, "--disjoint"),
        ({"compensation": "all"}, "compensation"),
        ({"router_width": 30, "router_heads": 4}, "multiple"),
        ({"active_fraction": 1.5}, "--active-fraction"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(PlanError, match=why):
        ReadMe(**changes).check()


def test_one_domain_and_padding_are_refused() -> None:
    dense, data = dense_model(), domains()
    recipe = ReadMe(distillation=QUICK, **SMALL)
    with pytest.raises(InputError, match="two or more"):
        moecompile.plan(dense, recipe, {"one": data["d0"]})
    ids = data["d0"][0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    padded = {name: [{"input_ids": ids, "attention_mask": mask}] for name in ("a", "b")}
    with pytest.raises(InputError, match="without padding"):
        moecompile.plan(dense, recipe, padded)


# The command


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three files of known words."""
    folder = tmp_path_factory.mktemp("domains")
    paths = []
    for number in range(3):
        paths.append(folder / f"domain{number}.txt")
        paths[-1].write_text(corpus(400, number), encoding="utf-8")
    return paths


def test_command(dense_folder: Path, texts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "moe"
    arguments = ["convert", str(dense_folder), str(out), "--recipe", "read-me", "--router", "pregate", "--router-steps", "5"]
    arguments += ["--calibration", *map(str, texts), "--calibration-tokens", "384", "--calibration-window", "32"]
    assert main([*arguments, "--json", "--quiet"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["router"] == "pregate" and record["domains"] == ["domain0", "domain1", "domain2"]
    assert record["experts"] == 3 and all(len(row["fraction"]) == 3 for row in record["usage"])
    assert record["active_fraction"] == pytest.approx(0.5) and 0 <= record["router_training"]["agreement"] <= 1
    assert main(["eval", str(out), "--text", str(texts[0]), "--window", "32", "--max-windows", "2", "--json", "--quiet"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["perplexity"] > 1 and evaluated["active_fraction"] == pytest.approx(0.5)
    assert main(["generate", str(out), "--prompt", "the router", "--max-new-tokens", "4", "--json", "--quiet"]) == 0
    assert main(["report", str(out), "--quiet"]) == 0


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--recipe", "read-me", "--experts", "4"], "one expert per"),
        (["--recipe", "read-me", "--router", "layerwise"], "no layerwise router"),
        (["--recipe", "calibrated", "--router", "pregate"], "pregate is that of read-me"),
        (["--recipe", "calibrated", "--disjoint"], "--disjoint has no meaning"),
        (["--recipe", "static", "--router-steps", "3"], "--router-steps has no meaning"),
    ],
)
def test_bad_use(more: list[str], why: str, dense_folder: Path, texts: list[Path], tmp_path: Path, capsys: Any) -> None:
    assert main(["convert", str(dense_folder), str(tmp_path / "moe"), "--calibration", *map(str, texts), *more]) == 2
    err = capsys.readouterr().err
    assert why in err and err.count("\n") == 1


def test_two_files_of_one_name(dense_folder: Path, texts: list[Path], tmp_path: Path, capsys: Any) -> None:
    command = ["convert", str(dense_folder), str(tmp_path / "moe"), "--recipe", "read-me", "--quiet"]
    command += ["--calibration", str(texts[0]), str(texts[0]), "--calibration-tokens", "128", "--calibration-window", "32"]
    assert main(command) == 2 and "domain0" in capsys.readouterr().err


def test_held_out_windows_are_not_calibrated_on(dense_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moecompile.cli import convert

    seen: dict[str, Any] = {}

    def stop(model: Any, recipe: Any, batches: Any, *, held_out: Any, **_: Any) -> Any:
        seen.update(batches=batches, held=held_out)
        raise InputError("far enough")

    monkeypatch.setattr(convert, "convert_with_record", stop)
    texts = []
    for number in range(2):
        texts.append(tmp_path / f"t{number}.txt")
        texts[-1].write_text(corpus(1300, number), encoding="utf-8")
    options = ["--recipe", "read-me", "--calibration-window", "16", "--calibration-tokens", "4096", "--quiet"]
    assert main(["convert", str(dense_folder), str(tmp_path / "out"), *options, "--calibration", *map(str, texts)]) == 2
    held = {tuple(row) for part in seen["held"] for row in part["input_ids"].tolist()}
    used = {tuple(row) for part in seen["batches"].values() for one in part for row in one["input_ids"].tolist()}
    assert held and used and not held & used
