"""Cross-layer prediction: what is predicted, that results stay, what gets none and why."""

from __future__ import annotations

import pytest
import torch
from compiling import calibrated, plain, tokens
from moecompile.passes.predict_experts import PredictExperts
from pregating import pregated_model

import moecompile
from moecompile.capture import capture
from moecompile.lowered import route_reference


@torch.no_grad()
def test_the_next_gate_on_these_tokens() -> None:
    """The prediction of layer 1 is its own router's choice on the tokens of layer 0; the logits stay bit for bit."""
    model, ids = calibrated(), tokens(2, 11)
    graph_module = capture(model).graph_module
    step = PredictExperts()
    result = step(graph_module)
    assert result.modified == 1 and step.predicted == ("model.layers.1.mlp",) and result.notes == ()
    outputs, predictions = result.graph_module(input_ids=ids)
    assert torch.equal(outputs.logits, graph_module(input_ids=ids).logits)
    first, second = moecompile.moe_blocks(model).values()
    seen: list[torch.Tensor] = []
    hook = first.register_forward_pre_hook(lambda module, args: seen.append(args[0].reshape(-1, 32)))
    model(input_ids=ids)
    hook.remove()
    expected, _ = route_reference(seen[0], second.router.weight, second.router.bias, 2, "none", False)
    assert torch.equal(predictions[0].sort(-1).values, expected.sort(-1).values)


@torch.no_grad()
def test_flat_outputs_are_continued() -> None:
    """A graph of TorchDynamo has no tree of outputs."""
    found = []

    def backend(graph_module, example_inputs):  # type: ignore[no-untyped-def]
        found.append((graph_module, list(example_inputs)))
        return graph_module.forward

    torch._dynamo.reset()
    model = plain()
    torch.compile(lambda ids: model(ids, use_cache=False).logits, backend=backend, fullgraph=True)(tokens(1, 7))
    graph_module, inputs = found[0]
    before = graph_module(*inputs)
    after = PredictExperts()(graph_module).graph_module(*inputs)
    assert len(after) == len(before) + 1 and after[-1].shape == (7, 2)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=False))


@pytest.mark.parametrize("aligned", [True, False])
def test_a_hoisted_router_needs_no_prediction(aligned: bool) -> None:
    graph_module = capture(pregated_model(aligned=aligned)).graph_module
    result = PredictExperts()(graph_module)
    assert result.graph_module is graph_module and result.modified == 0 and len(result.notes) == 1
