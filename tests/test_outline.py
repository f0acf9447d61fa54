"""Outlining of equal layers: what becomes one subgraph, what stays inline and why; the numbers stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiling import dense_model, plain, tokens
from moecompile.passes import run_passes
from moecompile.passes.outline_layers import OutlineLayers, invoke_subgraph
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import DynamicCache, StaticCache

import moecompile

D = 8


class Layer(nn.Module):
    """A residual layer; ``form`` says what is special about it."""

    def __init__(self, form: str = "plain") -> None:
        super().__init__()
        self.linear, self.form = nn.Linear(D, D), form
        self.register_buffer("seen", torch.zeros(D))

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        if self.form == "writes":
            self.seen.add_(1)
            return x + self.linear(x) * self.seen
        if self.form == "view":
            return x.narrow(0, 0, D)
        if self.form == "constant":
            return x + 2 * torch.tanh(self.linear(x)) + shift
        if self.form == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return x + self.linear(x).float()
        return x + torch.tanh(self.linear(x)) + shift


class Net(nn.Module):
    """Layers one after another."""

    def __init__(self, forms: list[str]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(form) for form in forms)

    def forward(self, x: Tensor) -> Tensor:
        shift = x.mean(0)
        for layer in self.layers:
            x = layer(x, shift)
        return x * 2


def outlined(module: nn.Module, *inputs: Any, dynamic: bool | None = None, **named: Any) -> tuple[GraphModule, tuple[str, ...]]:
    """The graph behind the pass, whose numbers are those before it, and the notes."""
    torch._dynamo.reset()
    found: list[tuple[GraphModule, tuple[str, ...]]] = []

    def backend(graph_module: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        result = run_passes(graph_module, [OutlineLayers()])
        found.append((result.graph_module, result.notes))

        def run(*values: Any) -> Any:
            copies = [value.clone() if isinstance(value, Tensor) else value for value in values]
            wanted, got = graph_module(*copies), result.graph_module(*values)
            for a, b in zip(wanted, got, strict=True):
                assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
            return got

        return run

    with torch.no_grad(), torch._dynamo.config.patch(specialize_float=True):  # as moecompile.compile does
        torch.compile(module, backend=backend, fullgraph=True, dynamic=dynamic)(*inputs, **named)
    return found[0]


def calls(graph_module: GraphModule) -> list[str]:
    """The subgraph of each call, in order."""
    return [str(n.args[0].target) for n in graph_module.graph.nodes if n.target is invoke_subgraph]


def test_equal_layers_are_calls_of_one_subgraph() -> None:
    found, notes = outlined(Net(["plain"] * 5), torch.randn(3, D))
    assert calls(found) == ["outline_layers_0"] * 5 and not notes
    body = found.get_submodule("outline_layers_0")
    assert sum(node.op == "call_function" for node in body.graph.nodes) == 4  # linear, tanh and two additions
    assert [node.meta["moecompile"]["from"] for node in found.graph.nodes if node.target is invoke_subgraph][3] == ("layers.3",)


def test_layers_that_differ_stay_where_they_are() -> None:
    found, _ = outlined(Net(["plain", "constant", "plain", "plain"]), torch.randn(3, D))
    assert len(calls(found)) == 3
    assert any(node.name.startswith("mul") or node.name.startswith("tanh") for node in found.graph.nodes)
    assert not calls(outlined(Net(["plain", "plain"]), torch.randn(3, D))[0])  # too few to be worth it


def test_two_kinds_of_layer_are_two_subgraphs() -> None:
    found, _ = outlined(Net(["plain", "constant"] * 3), torch.randn(3, D))
    assert calls(found) == ["outline_layers_0", "outline_layers_1"] * 3


@pytest.mark.parametrize(("form", "reason"), [("writes", "writes into"), ("view", "view"), ("autocast", "changes how")])
def test_what_may_not_move_stays_inline_with_the_reason(form: str, reason: str) -> None:
    found, notes = outlined(Net([form] * 4), torch.randn(D, D))
    assert not calls(found)
    assert len(notes) == 1 and reason in notes[0] and "layers" in notes[0]


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_language_model_with_its_cache(dynamic: bool | None) -> None:
    model = plain(dense_model(num_hidden_layers=4))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=tokens(1, 7), past_key_values=cache, use_cache=True)
    found, notes = outlined(model, input_ids=tokens(1, 1), past_key_values=cache, use_cache=True, dynamic=dynamic)
    assert calls(found) == ["outline_layers_0"] * 4 and not notes


def test_a_static_cache_is_written_to_and_stays_inline() -> None:
    model = plain(dense_model(num_hidden_layers=4))
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(input_ids=tokens(1, 7), past_key_values=cache, use_cache=True)
    found, notes = outlined(model, input_ids=tokens(1, 1), past_key_values=cache, use_cache=True)
    assert not calls(found)
    assert len(notes) == 1 and "writes into what the layer is given" in notes[0]


def test_compiled_code_is_that_of_one_layer() -> None:
    model = plain(dense_model(num_hidden_layers=4))
    ids = tokens(1, 9)
    fast = moecompile.compile(model)
    with torch.no_grad():
        torch.testing.assert_close(fast(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    (record,) = moecompile.last_graphs(fast)
    assert record.passes[-1].name == "outline_layers" and record.passes[-1].modified == 4
    (code,) = record.output_code
    assert code.count("moecompile.moe_ffn.default(") == 1
    assert len(record.layers) == 4  # what is said of the graph is said of all layers
