"""Layer-wise -> hoisted -> compiled: a pre-gated model through moecompile.compile gives its own numbers and tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiling import calibrated, dense_model, tokens, without_inductor
from moecompile.passes.nodes import meaning
from pregating import pregated_model, pregated_plan

import moecompile
from moecompile import lowered


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    """Each test traces anew."""
    torch._dynamo.reset()


@pytest.mark.parametrize("aligned", [True, False])
@torch.no_grad()
def test_the_same_numbers_all_the_way_down(aligned: bool) -> None:
    """A layer-wise block with the plan put in by hand, the pre-gated model, its graph, and the lowered graph: to 1e-5."""
    model, ids = pregated_model(aligned=aligned), tokens(2, 11)
    fast = without_inductor(moecompile.compile(model, fullgraph=True))
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
