"""Plans: readable, whole, refused when they contradict themselves."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from families import BY_NAME, batch_of

import moecompile
from moecompile.errors import InputError, PlanError
from moecompile.parity import outputs_of
from moecompile.plans import MEANS, MoEPlan, SitePlan, dump_plan
from moecompile.recipes import Calibrated, Contiguous, Static
from moecompile.recipes.base import slice_sizes

LLAMA = BY_NAME["llama"]


@pytest.fixture(scope="module")
def plan() -> MoEPlan:
    """A plan with fitted tensors of every kind."""
    return moecompile.plan(LLAMA.build(), Calibrated(experts=4, shared=2, top_k=2), [batch_of(LLAMA, 30, 8)])


def test_saved_plan_converts_to_the_same_model(plan: MoEPlan, tmp_path: Path) -> None:
    dense, batch = LLAMA.build(), batch_of(LLAMA)
    plan.save(tmp_path / "plan.json")
    again = MoEPlan.load(tmp_path / "plan.json")
    assert again.to_dict() == plan.to_dict()
    ours, theirs = (moecompile.convert(dense, p) for p in (plan, again))
    assert all(torch.equal(a, b) for a, b in zip(outputs_of(ours, batch), outputs_of(theirs, batch), strict=True))


def test_file_is_readable(plan: MoEPlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text(encoding="utf-8")
    assert json.loads(text)["recipe"] == "calibrated"
    shared = next(line for line in text.splitlines() if '"shared": [' in line)
    assert shared.strip().endswith("],"), "a list of neurons is one line"
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("data", [{"a": [1, 2], "b": {"c": [[1], [2, 3]]}, "d": [], "e": {}}, [1, [2, {"x": None}]], "text\n"])
def test_dump_is_json(data: object) -> None:
    assert json.loads(dump_plan(data)) == data


def site_plan(**changes) -> SitePlan:  # type: ignore[no-untyped-def]
    whole = moecompile.plan(LLAMA.build(), Contiguous(experts=4, shared=2)).sites[0]
    return dataclasses.replace(whole, **changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"shared": ()}, "neuron 0 has no place"),
        ({"shared": tuple(range(17))}, "two places"),
        ({"experts": ()}, "has no place"),
        ({"top_k": 5}, "top_k is 5"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 2}, "no router"),
        ({"router": "oracle"}, "no router 'oracle'"),
    ],
)
def test_contradictions_are_refused(changes: dict, reason: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(PlanError, match=reason):
        site_plan(**changes).validate()


def test_fitted_tensors_must_fit(plan: MoEPlan) -> None:
    name = f"{plan.sites[0].site.name}/{MEANS}"
    for tensor, reason in ((torch.zeros(3), "not \\(48,\\)"), (torch.full((48,), float("nan")), "NaN")):
        with pytest.raises(PlanError, match=reason):
            dataclasses.replace(plan, tensors={**plan.tensors, name: tensor}).validate()
    with pytest.raises(PlanError, match="named or given"):
        dataclasses.replace(plan, tensors={k: v for k, v in plan.tensors.items() if k != name}).validate()


def test_damaged_files_are_refused(plan: MoEPlan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    whole = json.loads(path.read_text(encoding="utf-8"))
    for damage in ({"format": 2}, {"sites": 3}, {"sites": [{}]}):
        path.write_text(json.dumps({**whole, **damage}), encoding="utf-8")
        with pytest.raises(PlanError):
            MoEPlan.load(path)
    path.write_text(json.dumps(whole), encoding="utf-8")
    path.with_suffix(".safetensors").unlink()
    with pytest.raises(PlanError, match="cannot be read"):
        MoEPlan.load(path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="JSON"):
        MoEPlan.load(path)
    with pytest.raises(InputError, match="there is no file"):
        MoEPlan.load(tmp_path / "none.json")


@pytest.mark.parametrize(("width", "parts", "sizes"), [(10, 4, [3, 3, 2, 2]), (8, 8, [1] * 8), (9, 3, [3, 3, 3])])
def test_slices_lose_nothing(width: int, parts: int, sizes: list[int]) -> None:
    assert slice_sizes(width, parts, "x") == sizes
    with pytest.raises(PlanError, match="cannot be cut"):
        slice_sizes(parts - 1, parts, "x")


def test_active_fraction_counts_neurons() -> None:
    plan = moecompile.plan(LLAMA.build(), Static(0.25), [batch_of(LLAMA)])
    assert plan.active_fraction == pytest.approx(0.25)
    assert plan.router == "none"
    plan = moecompile.plan(LLAMA.build(), Contiguous(experts=6, shared=2, top_k=1))
    assert plan.active_fraction == pytest.approx((2 + 1) / 8)
    assert plan.router == "layerwise"
