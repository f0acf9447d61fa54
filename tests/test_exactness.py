"""All experts on is the dense model: every family, any N, S, K and width; compensation vanishes or is recorded."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from families import BY_NAME, FAMILIES, Family, batch_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import moecompile
from moecompile.apply import build_block, moe_blocks
from moecompile.capture import capture
from moecompile.conversion import convert_with_record
from moecompile.errors import ParityError
from moecompile.match import match
from moecompile.parity import TOLERANCE, all_experts_on, max_abs_error, outputs_of
from moecompile.plans import BIAS, DOWN, MEANS, SitePlan
from moecompile.recipes import Contiguous, Flap, Static
from moecompile.sites import DenseFFN


@pytest.mark.parametrize("form", ["module", "graph"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_family_is_exact(family: Family, form: str) -> None:
    dense = family.build()
    batches = [batch_of(family), batch_of(family, tokens=12, rows=2)]
    done = convert_with_record(dense, Contiguous(experts=5, shared=2), [batches[0]], form=form)
    assert done.parity_max_abs_error <= TOLERANCE
    assert len(moe_blocks(done.module)) == family.ffns
    error, _ = max_abs_error(done.module, dense, batches)
    assert error <= TOLERANCE
    blocks = moe_blocks(done.module).values()
    for block in blocks:  # the same through the operator, summed by expert
        x = torch.randn(7, block.spec.hidden_size)
        with torch.no_grad():
            torch.testing.assert_close(block._chosen(x, block.top_k), block(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_chosen_experts_are_the_same_dense_neurons(family: Family) -> None:
    done = convert_with_record(family.build(), Contiguous(experts=5, shared=2, top_k=2), [batch_of(family)])
    assert 0 < done.routing_error < 1e-6


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_graph_and_module_agree_at_real_top_k(family: Family) -> None:
    dense = family.build()
    recipe = Contiguous(experts=6, shared=1, top_k=2)
    batch = batch_of(family)
    live, graph = (moecompile.convert(dense, recipe, form=form) for form in ("module", "graph"))
    for a, b in zip(outputs_of(live, batch), outputs_of(graph, batch), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(outputs_of(live, batch)[0], outputs_of(dense, batch)[0])


class FFN(nn.Module):
    """A plain or gated FFN of any width."""

    def __init__(self, d: int, f: int, gated: bool, bias: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(d, f, bias) if gated else None
        self.up, self.down = nn.Linear(d, f, bias), nn.Linear(f, d, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = nn.functional.gelu(self.up(x)) if self.gate is None else nn.functional.silu(self.gate(x)) * self.up(x)
        return self.down(h)


def dense_of(module: FFN, d: int) -> DenseFFN:
    """The matched FFN of a module."""
    matched = match(capture(module, (torch.randn(2, 3, d),)))
    return DenseFFN.read(matched.sites[0], module)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(2, 6), st.integers(1, 23), st.booleans(), st.booleans(), st.integers(0, 2**16), st.data())
def test_any_partition_is_exact(d: int, f: int, gated: bool, bias: bool, seed: int, data) -> None:  # type: ignore[no-untyped-def]
    """Neurons dealt to shared and N experts at random, sizes uneven; all on is the dense FFN, K of them the sum of those."""
    torch.manual_seed(seed)
    module = FFN(d, f, gated, bias)
    dense = dense_of(module, d)
    n = data.draw(st.integers(1, f))
    s = data.draw(st.integers(0, f - n))
    k = data.draw(st.integers(0, n))
    order = torch.randperm(f).tolist()
    shared, rest = order[:s], order[s:]
    cuts = sorted(data.draw(st.permutations(range(1, len(rest))))[: n - 1]) if n > 1 else []
    experts = tuple(tuple(rest[a:b]) for a, b in zip([0, *cuts], [*cuts, len(rest)], strict=True))
    plan = SitePlan(dense.site, tuple(shared), experts, k, "linear")
    plan.validate()
    block = build_block(plan, {}, dense)
    assert block.router is not None
    nn.init.normal_(block.router.weight)
    x = torch.randn(4, 2, d)
    with torch.no_grad(), all_experts_on(block):
        torch.testing.assert_close(block(x), module(x), rtol=1e-4, atol=1e-5)
    assert block.top_k == k
    with torch.no_grad():  # K of them: the hidden activations of everything idle are zero
        rows = x.reshape(-1, d)
        ids, _ = block.choose(rows)
        mask = torch.zeros(len(rows), f)
        mask[:, shared] = 1
        for token, chosen in enumerate(ids.tolist()):
            for e in chosen:
                mask[token, list(experts[e])] = 1
        torch.testing.assert_close(block(rows), dense.output(dense.hidden(rows) * mask), rtol=1e-4, atol=1e-5)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 9), st.integers(0, 9), st.data(), st.sampled_from([47, 48, 53]))
def test_recipe_numbers_on_a_whole_model(n: int, s: int, data, width: int) -> None:  # type: ignore[no-untyped-def]
    k = data.draw(st.integers(0 if s else 1, n))
    dense = BY_NAME["llama"].build(intermediate_size=width, num_hidden_layers=1)
    done = convert_with_record(dense, Contiguous(experts=n, shared=s, top_k=k))
    assert done.parity_max_abs_error <= TOLERANCE
    planned = done.plan.sites[0]
    sizes = {len(expert) for expert in planned.experts}
    assert max(sizes) - min(sizes) <= 1
    assert abs(done.plan.active_fraction - (s + k) / (n + s)) < 0.08


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "t5", "bert"])
def test_means_vanish_when_all_experts_are_on(family: str) -> None:
    family = BY_NAME[family]
    dense = family.build()
    for recipe in (Flap(0.5), Static(0.5, "means")):
        moe = moecompile.convert(dense, recipe, [batch_of(family)])
        report = moecompile.verify(moe, dense, batch_of(family, seed=7))
        assert report.exact, report
        assert max(row["top_k"] for row in report.layers) > 0.05


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_refit_is_recorded_and_keep_exact_undoes_it(family: str) -> None:
    family = BY_NAME[family]
    dense, batch = family.build(), batch_of(family, tokens=30, rows=6)
    recipe = Static(0.5, "refit")
    changed = convert_with_record(dense, recipe, [batch])
    assert all(DOWN in site.fitted and MEANS in site.fitted for site in changed.plan.sites)
    assert changed.parity_max_abs_error <= TOLERANCE, "the check comes before the refit"
    assert not moecompile.verify(changed.module, dense, batch).exact
    kept = moecompile.convert(dense, recipe, [batch], keep_exact=True)
    report = moecompile.verify(kept, dense, batch)
    assert report.exact
    plain = moecompile.verify(changed.module, dense, batch)
    for a, b in zip(report.layers, plain.layers, strict=True):
        assert a["top_k"] == pytest.approx(b["top_k"], rel=1e-5), "at its own top_k the block is the refitted one all the same"


def test_fitted_bias_reaches_the_output() -> None:
    module = FFN(4, 6, True, False)
    dense = dense_of(module, 4)
    plan = SitePlan(dense.site, (0, 1, 2), ((3, 4), (5,)), 2, "none", (BIAS,))
    shift = torch.tensor([1.0, 2.0, 3.0, 4.0])
    block = build_block(plan, {BIAS: shift}, dense)
    x = torch.randn(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(block(x), module(x) + shift)


def test_a_split_that_is_not_exact_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: spoil one weight of the split and the conversion stops."""
    import moecompile.conversion as convert_module

    honest = convert_module.build_blocks

    def spoiled(model, plan):  # type: ignore[no-untyped-def]
        blocks = honest(model, plan)
        with torch.no_grad():
            blocks[0].experts.down_proj[0, 0, 0] += 1.0
        return blocks

    monkeypatch.setattr(convert_module, "build_blocks", spoiled)
    with pytest.raises(ParityError, match="not converted"):
        moecompile.convert(BY_NAME["llama"].build(), Contiguous(4))


class _Outputs(nn.Module):
    """Its input plus the outputs that it is to have: infinities and NaN among them."""

    def __init__(self, outputs: list[float]) -> None:
        super().__init__()
        self.outputs = nn.Parameter(torch.tensor(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.outputs


@pytest.mark.parametrize(
    ("ours", "theirs", "difference"),
    [
        ([1.0, -math.inf], [1.5, -math.inf], 0.5),  # a masked logit on both sides
        ([1.0, math.inf], [1.0, -math.inf], math.inf),
        ([1.0, -math.inf], [1.0, 2.0], math.inf),
        ([1.0, math.nan], [1.0, math.nan], math.inf),
        ([], [], 0.0),
    ],
)
def test_only_the_same_infinity_is_no_difference(ours: list[float], theirs: list[float], difference: float) -> None:
    found, allowed = max_abs_error(_Outputs(ours), _Outputs(theirs), [(torch.zeros(1, len(ours)),)])
    assert found == difference and allowed == TOLERANCE


def test_routing_that_is_not_exact_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """All experts on may be right and the routed path wrong; that is caught too."""
    import moecompile.block as block_module

    honest = block_module.expert_ffn
    monkeypatch.setattr(block_module, "expert_ffn", lambda x, ids, *rest: honest(x, ids.flip(0).contiguous(), *rest))
    with pytest.raises(ParityError, match="same neurons"):
        moecompile.convert(BY_NAME["llama"].build(), Contiguous(5, 1, 2))


def test_a_plan_of_another_model_is_refused() -> None:
    plan = moecompile.plan(BY_NAME["llama"].build(), Contiguous(4))
    with pytest.raises(moecompile.PlanError, match="do not belong together"):
        moecompile.convert(BY_NAME["qwen2"].build(intermediate_size=64), plan)


def test_dense_model_is_left_alone_and_inplace_is_not() -> None:
    dense = BY_NAME["llama"].build()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    batch = batch_of(BY_NAME["llama"])
    moe = moecompile.convert(dense, Static(0.5, "refit"), [batch])
    assert before.keys() == dense.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())
    assert not moe_blocks(dense) and len(moe_blocks(moe)) == 2
    assert moecompile.convert(dense, Contiguous(3), inplace=True) is dense
    assert len(moe_blocks(dense)) == 2


def test_training_mode_comes_back() -> None:
    dense = BY_NAME["gpt2"].build().train()
    moe = moecompile.convert(dense, Contiguous(3))
    assert dense.training and all(module.training for module in dense.modules())
    assert all(block.training for block in moe_blocks(moe).values())
    assert all(dataclasses.asdict(block.spec)["dropout"] == 0.1 for block in moe_blocks(moe).values())
