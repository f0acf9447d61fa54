"""Layer-wise -> hoisted -> compiled: a pre-gated model through moecompile.compile gives its own numbers and tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from compiling import calibrated, dense_model, plain, tokens, without_inductor
from moecompile.passes.hoist_router import HoistRouter
from moecompile.passes.nodes import meaning
from pregating import pregated_model, pregated_plan
from torch import Tensor

import moecompile
from moecompile import lowered
from moecompile.capture import capture
from moecompile.front import decide


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    """Each test traces anew."""
    torch._dynamo.reset()


def by_hand(ids: Tensor, x: Tensor, top_k: int | None = None) -> tuple[Tensor, Tensor]:
    """A block's choice that was made before."""
    return ids, torch.ones_like(ids, dtype=x.dtype)


@pytest.mark.parametrize("aligned", [True, False])
@torch.no_grad()
def test_the_same_numbers_all_the_way_down(aligned: bool) -> None:
    """Layer-wise with the plan put in by hand, pre-gated, the layer-wise graph hoisted, and lowered: to 1e-5 in float32."""
    model, ids = pregated_model(aligned=aligned), tokens(2, 11)
    chosen = decide(model, {"input_ids": ids})[0].topk(2, dim=-1).indices  # [T, K] or [T, L, K]
    layerwise = plain()
    own = layerwise(input_ids=ids).logits
    for number, block in enumerate(moecompile.moe_blocks(layerwise).values()):
        block.choose = partial(by_hand, chosen if aligned else chosen[:, number])
    expected = layerwise(input_ids=ids).logits
    assert float((expected - own).abs().max()) > 1e-3  # the plan is another choice than the layers' own
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    hoisted = HoistRouter(model.pregate.router)(capture(plain()).graph_module).graph_module
    out = hoisted(input_ids=ids)
    torch.testing.assert_close(getattr(out, "logits", out), expected, rtol=1e-5, atol=1e-5)
    fast = without_inductor(moecompile.compile(model, fullgraph=True))
    torch.testing.assert_close(fast(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fast(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    (record,) = moecompile.last_graphs(fast)
    assert all(layer["backend"] == "cpu" and layer["router"] == "outside" for layer in record.layers)
    assert not any("hidden state" in note for note in record.notes)
    graph = record.graph_module.graph
    decisions = [n for n in graph.nodes if meaning(n) == "topk" or n.target is lowered.route]
    assert len(decisions) == 1
    assert sum(n.target is lowered.dispatch_op for n in graph.nodes) == (1 if aligned else 0)


@pytest.mark.slow
@pytest.mark.parametrize("aligned", [True, False])
def test_compiled_generation(aligned: bool) -> None:
    """Through Inductor, with both caches: the same tokens."""
    model, ids = pregated_model(aligned=aligned), tokens(2, 9)
    fast = moecompile.compile(model, fullgraph=True, verify=True)
    options: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": 12,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(ids),
    }
    assert torch.equal(fast.generate(ids, **options), model.generate(ids, **options))
    assert len(moecompile.last_graphs(fast)) == 2


@torch.no_grad()
def test_compiled_generation_without_inductor() -> None:
    model, ids = pregated_model(aligned=False), tokens(2, 9)
    fast = without_inductor(moecompile.compile(model, fullgraph=True))
    options: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": 6,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(ids),
    }
    assert torch.equal(fast.generate(ids, **options), model.generate(ids, **options))
    assert len(moecompile.last_graphs(fast)) == 2


@torch.no_grad()
def test_layerwise_models_keep_their_routers() -> None:
    model, ids = calibrated(), tokens(1, 8)
    fast = without_inductor(moecompile.compile(model, fullgraph=True))
    torch.testing.assert_close(fast(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    (record,) = moecompile.last_graphs(fast)
    assert all(layer["router"] == "fused" for layer in record.layers)
    assert sum("hoist_router" in note for note in record.notes) == 1


def test_plans_of_dense_models() -> None:
    """moecompile.compile(dense, plan=...) with a router at the front leaves the dense model alone."""
    dense, ids = dense_model(), tokens(1, 6)
    fast = without_inductor(moecompile.compile(dense, plan=pregated_plan(dense)))
    with torch.no_grad():
        torch.testing.assert_close(fast(input_ids=ids).logits, pregated_model()(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    assert not hasattr(dense, "pregate")
