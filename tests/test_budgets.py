"""Budgets: which layer gets how many experts, and what that rests on."""

from __future__ import annotations

import math

import pytest
import torch
from families import BY_NAME, batch_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BatchEncoding

import moecompile
from moecompile.cli.convert import batched
from moecompile.errors import PlanError
from moecompile.recipes import Calibrated, Static
from moecompile.recipes.budgets import Curve, Divergence, allocate, levels
from moecompile.sites import DenseFFN
from moecompile.stream import Stream


def curve(effect: float, k: int = 32, experts: int = 96, width: float = 4.0) -> Curve:
    return Curve(width, {n: (1 - n / experts) ** 2 for n in levels(experts, k)}, effect, k)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.0, 5.0), min_size=1, max_size=12), st.sampled_from([16, 24, 32, 40, 64]))
def test_the_mean_is_kept(effects: list[float], k: int) -> None:
    counts = allocate([curve(e, k) for e in effects])
    assert sum(counts) <= k * len(counts)
    assert all(n in levels(96, k) for n in counts)
    if len(set(effects)) == 1 and effects[0] > 0:
        assert sum(counts) == k * len(counts) and max(counts) - min(counts) <= 96 // 12


def test_effects_count_relative_to_each_other() -> None:
    counts = allocate([curve(e) for e in (4.0, 1.0, 0.1)])
    assert (
        allocate([curve(e * 1e-320) for e in (4.0, 1.0, 0.1)])
        == counts
        == allocate([curve(e * 1e300) for e in (4.0, 1.0, 0.1)])
    )
    assert allocate([curve(5e-324)] * 4) == allocate([curve(1.0)] * 4)


def test_layers_that_matter_get_more() -> None:
    counts = allocate([curve(4.0), curve(1.0), curve(0.1)])
    assert counts[0] > counts[1] > counts[2] and sum(counts) == 96


def test_wide_layers_pay_more() -> None:
    """At the same gain per expert, what is cheap in neurons comes first; the total of neurons is kept."""
    counts = allocate([curve(1.0, width=8.0), curve(1.0, width=2.0)])
    assert counts[1] > counts[0] and 8 * counts[0] + 2 * counts[1] <= 10 * 32


def test_no_other_choice_on_the_grid_is_better() -> None:
    curves = [curve(e) for e in (0.7, 0.2, 1.9)]
    counts = allocate(curves)
    best = min(
        sum(c.loss(k) for c, k in zip(curves, (a, b, d), strict=True))
        for a in levels(96, 32)
        for b in levels(96, 32)
        for d in levels(96, 32)
        if a + b + d <= 96
    )
    assert math.isclose(sum(c.loss(k) for c, k in zip(curves, counts, strict=True)), best)


def test_few_experts_and_ends_of_the_dial_are_even() -> None:
    assert levels(16, 4) == [4] and levels(96, 96) == [96] and levels(96, 0) == [0] and levels(96, 2) == [2]
    assert levels(96, 32) == list(range(8, 96, 8))
    assert 13 in levels(40, 13) and max(levels(40, 13)) < 40


@given(st.integers(32, 300), st.data())
def test_every_layer_has_something_to_give(experts: int, data: st.DataObject) -> None:
    """Below K as above it; without the first nobody could be given more."""
    k = data.draw(st.integers(4, experts - experts // 12 - 1))
    found = levels(experts, k)
    assert found[0] < k < found[-1] and k in found and found[0] > 0 and found[-1] < experts
    assert len(found) <= 22


def test_a_small_share_is_spread_too() -> None:
    counts = allocate([curve(e, 24, 216) for e in (4.0, 1.0, 0.1, 0.1)])
    assert counts[0] > 24 > counts[2] and sum(counts) == 96


def test_divergence_is_the_mean_kl_of_logits() -> None:
    torch.manual_seed(0)
    logits, other = torch.randn(2, 7, 11), torch.randn(2, 7, 11)
    p, q = logits.log_softmax(-1), other.log_softmax(-1)
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    measured = Divergence([logits, torch.ones(3)], 11)
    assert measured([logits, torch.zeros(3)]) == 0.0
    assert measured([other, torch.zeros(3)]) == pytest.approx(expected, rel=1e-5)
    plain = Divergence([logits], None)
    assert plain([other]) == pytest.approx(float((logits - other).square().sum() / logits.square().sum()), rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "vit"])
def test_outputs_behind_a_changed_layer(name: str) -> None:
    """What the stream computes behind a layer is what the model computes when that layer alone is changed."""
    family = BY_NAME[name]
    dense, batch = family.build().eval(), batch_of(family)
    captured, matched = moecompile.conversion.find_ffns(dense)
    stream = Stream(captured, matched.matches, [batch])
    for number, match in enumerate(matched.matches):
        x = stream.inputs(number)[0]
        ffn = DenseFFN.read(match.site, dense)
        changed = (ffn.output(ffn.hidden(x.reshape(-1, x.shape[-1]))) * 0.5).reshape(x.shape)
        tensors = stream.outputs(0, changed)
        handle = dense.get_submodule(match.site.placement.block).register_forward_hook(lambda _, __, out: out * 0.5)
        with torch.no_grad(), moecompile.capture.without_cache(dense):
            expected = moecompile.parity.main_output(dense(**batch))
        handle.remove()
        assert any(t.shape == expected[0].shape and torch.allclose(t, expected[0], atol=1e-5) for t in tensors), match.site.name
        stream.feed(lambda rows, ffn=ffn: ffn.output(ffn.hidden(rows)))


def test_a_model_gets_budgets_of_its_own() -> None:
    family = BY_NAME["llama"]
    dense, batches = family.build(), [batch_of(family, 40, 8)]
    plan = moecompile.plan(dense, Calibrated(40, 8, 12), batches, seed=1)
    even = moecompile.plan(dense, Calibrated(40, 8, 12, budget="even"), batches, seed=1)
    assert {site.top_k for site in even.sites} == {12}
    assert sum(site.top_k for site in plan.sites) <= 12 * len(plan.sites)
    assert all(site.metrics["output_divergence"] > 0 for site in plan.sites) and plan.top_k == 12
    moe = moecompile.convert(dense, plan)
    assert [block.top_k for block in moecompile.apply.moe_blocks(moe).values()] == [site.top_k for site in plan.sites]
    with pytest.raises(PlanError, match="no budget 'magic'"):
        moecompile.plan(dense, Calibrated(budget="magic"), batches)


def test_budgets_are_measured_on_many_texts() -> None:
    """`convert` gives `calibrated` a first batch of many windows' beginnings; other recipes get the windows alone."""
    rows = torch.arange(20 * 512).reshape(20, 512)
    first, *others = batched(rows, Calibrated())
    assert torch.equal(first, rows[:16, :128]) and torch.equal(torch.cat(others), rows)
    assert torch.equal(torch.cat(batched(rows, Static())), rows)
    assert {len(part) for part in batched(rows[:8], Calibrated())} == {4}  # too few to choose from
    assert [tuple(part.shape) for part in batched(rows.reshape(10, 1024), None)] == [(2, 1024)] * 5


class Residual(nn.Module):
    """Layers that add their FFN in place, or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.in_place, self.norm = in_place, nn.LayerNorm(16)
        self.up = nn.ModuleList(nn.Linear(16, 48) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(48, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        for up, down in zip(self.up, self.down, strict=True):
            y = down(nn.functional.gelu(up(self.norm(x))))
            if self.in_place:
                x += y
            else:
                x = x + y
        return x


def test_a_residual_in_place_changes_nothing() -> None:
    batches = [torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    given = [batch.clone() for batch in batches]
    ours, theirs = (
        moecompile.plan(Residual(form), Calibrated(32, 8, 8), batches, example_inputs=(batches[0],)) for form in (True, False)
    )
    assert all(torch.equal(a, b) for a, b in zip(batches, given, strict=True))
    assert [site.experts for site in ours.sites] == [site.experts for site in theirs.sites]
    for name, tensor in theirs.tensors.items():
        torch.testing.assert_close(ours.tensors[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_padding_is_left_out_of_what_a_tokenizer_gives() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    given = Stream._token_mask(BatchEncoding({"attention_mask": mask}))
    assert given is not None and torch.equal(given, mask.bool())
