"""Graph passes: what each rewrites, commuted forms, near misses; the numbers stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiling import calibrated, tokens
from moecompile.codegen import cpu, packing
from moecompile.codegen.triton_spec import Target
from moecompile.passes import PassError, PassResult, run_passes
from moecompile.passes.dead_code import DeadCode
from moecompile.passes.fold_constants import FoldConstants
from moecompile.passes.fuse_router import FuseRouter
from moecompile.passes.lower_cpu import LowerCPU
from moecompile.passes.lower_triton import LowerTriton
from moecompile.passes.match_experts import EXPERT_FFN, MatchExperts, moe_nodes, operands_of
from moecompile.passes.merge_shared import MergeShared
from moecompile.passes.nodes import meaning, overwritten, written
from moecompile.passes.pipeline import inference_passes
from moecompile.passes.share_dispatch import ShareDispatch
from torch import Tensor, nn
from torch.fx import GraphModule

import moecompile
from moecompile import lowered
from moecompile.ops import expert_ffn
from moecompile.records import graph_text

D, F, N, K = 16, 8, 5, 2


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    """Each test traces anew."""
    torch._dynamo.reset()


def traced(function: Callable[..., Any], *inputs: Any) -> tuple[GraphModule, list[Any]]:
    """The graph that TorchDynamo makes of a function, and the inputs of that graph."""
    found: list[tuple[GraphModule, list[Any]]] = []

    def backend(graph_module: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        found.append((graph_module, list(example_inputs)))
        return graph_module.forward

    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    return found[0]


def through(graph_module: GraphModule, inputs: list[Any], *passes: Any) -> PassResult:
    """Run passes; the numbers behind them are those before, and the given graph is left alone."""
    text = graph_text(graph_module)
    with torch.no_grad():
        before = graph_module(*inputs)
        result = run_passes(graph_module, passes)
        after = result.graph_module(*inputs)
    assert graph_text(graph_module) == text
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
    return result


class Layer(nn.Module):
    """A router, routed experts and a shared one, written as the test asks."""

    def __init__(self, score: str = "softmax", shared: str = "after", bias: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def random(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) * 0.3)

        self.score, self.order = score, shared
        self.gate, self.router_bias = random(N, D), random(N) if bias else None
        self.up, self.down = random(N, 2 * F, D), random(N, D, F)
        self.shared_gate, self.shared_up, self.shared_down = random(12, D), random(12, D), random(D, 12)

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = nn.functional.linear(x, self.gate, self.router_bias)
        if self.score == "softmax":
            best, ids = torch.topk(nn.functional.softmax(logits, dim=-1, dtype=torch.float32), K, dim=-1)
            best = best / best.sum(-1, keepdim=True)
        elif self.score == "softmax in place":
            best, ids = logits.softmax(-1).topk(K)
            best /= best.sum(dim=-1, keepdim=True)
        elif self.score == "sigmoid":
            best, ids = torch.topk(torch.sigmoid(logits), K)
        elif self.score == "raw scores":
            best, ids = torch.topk(logits, K)
        elif self.score == "other division":
            best, ids = torch.topk(logits.softmax(-1), K)
            best = best / (best.sum(-1, keepdim=True) + 1.0)
        elif self.score == "smallest":
            best, ids = torch.topk(logits.softmax(-1), K, largest=False)
        elif self.score == "grouped":
            best, ids = torch.topk(logits.softmax(-1) + 0.1, K)
        else:
            ids = torch.topk(logits, K).indices
            return ids, torch.ones_like(ids, dtype=x.dtype)
        return ids, best

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.weights(x)
        routed = expert_ffn(x, ids, weights, self.up, self.down, None, None, "silu", True)
        gate, up = nn.functional.linear(x, self.shared_gate), nn.functional.linear(x, self.shared_up)
        if self.order == "none":
            return routed
        act = nn.functional.gelu if self.order == "other activation" else nn.functional.silu
        h = up * act(gate) if self.order == "commuted" else act(gate) * up
        if self.order == "other tokens":
            h = act(nn.functional.linear(x * 2, self.shared_gate)) * up
        y = nn.functional.linear(h, self.shared_down)
        return routed + y if self.order == "commuted" else y + routed


X = torch.randn(9, D, generator=torch.Generator().manual_seed(5))
FRONT = (FoldConstants(), MatchExperts(), FuseRouter())


def test_casts_reshapes_and_dropouts_that_change_nothing_go() -> None:
    def function(x: Tensor) -> Tensor:
        y = nn.functional.dropout(x.to(torch.float32).reshape(9, D), 0.5, training=False)
        return y.to(torch.float64).reshape(D, 9) + 1

    result = through(*traced(function, X), FoldConstants())
    assert result.modified == 3
    assert [meaning(n) for n in result.graph_module.graph.nodes if meaning(n)] == ["cast", "reshape", "add"]


def test_an_active_dropout_stays() -> None:
    graph_module, _ = traced(lambda x: nn.functional.dropout(x, 0.5, training=True), X)
    assert run_passes(graph_module, [FoldConstants()]).modified == 0


@pytest.mark.parametrize("score", ["softmax", "softmax in place", "sigmoid", "binary"])
@pytest.mark.parametrize("bias", [False, True])
def test_routers_are_fused(score: str, bias: bool) -> None:
    result = through(*traced(Layer(score, "none", bias), X), *FRONT)
    routes = [n for n in result.graph_module.graph.nodes if n.target is lowered.route]
    assert len(routes) == 1 and not result.notes
    kind = "softmax" if score.startswith("softmax") else "sigmoid" if score == "sigmoid" else "none"
    assert routes[0].args[4:] == (kind, kind == "softmax")
    assert (operands_of(moe_nodes(result.graph_module)[0])["weights"] is None) == (score == "binary")


@pytest.mark.parametrize(
    ("score", "reason"),
    [
        ("raw scores", "raw scores"),
        ("other division", "not known"),
        ("smallest", "not over the experts"),
        ("grouped", "not those of a linear layer"),
    ],
)
def test_other_routers_are_left_with_the_reason(score: str, reason: str) -> None:
    result = through(*traced(Layer(score, "none"), X), *FRONT)
    assert not [n for n in result.graph_module.graph.nodes if n.target is lowered.route]
    assert len(result.notes) == 1 and reason in result.notes[0] and "node" in result.notes[0]


def test_scores_rounded_before_the_choice_are_left() -> None:
    layer = Layer("softmax", "none").to(torch.bfloat16)
    graph_module, _ = traced(layer, X.to(torch.bfloat16))
    result = run_passes(graph_module, FRONT)
    assert "rounded" in result.notes[0]


@pytest.mark.parametrize("order", ["after", "commuted"])
def test_shared_experts_are_merged(order: str) -> None:
    result = through(*traced(Layer("softmax", order), X), *FRONT, MergeShared())
    (node,) = moe_nodes(result.graph_module)
    assert operands_of(node)["shared_up"] is not None
    assert not [n for n in result.graph_module.graph.nodes if meaning(n) in ("linear", "add")]


@pytest.mark.parametrize(("order", "reason"), [("other activation", "activation is not silu"), ("other tokens", "")])
def test_what_is_no_shared_expert_is_left(order: str, reason: str) -> None:
    result = through(*traced(Layer("softmax", order), X), *FRONT, MergeShared())
    assert operands_of(moe_nodes(result.graph_module)[0])["shared_up"] is None
    assert reason in " ".join(result.notes)


def test_the_whole_pipeline_on_graphs_of_both_origins() -> None:
    moe, ids = calibrated(), tokens(2, 11)
    graphs = [traced(lambda: moe(input_ids=ids, use_cache=False).logits)]
    exported = moecompile.capture.capture(moe, {"input_ids": ids}, dynamic=False).graph_module
    with torch.no_grad():
        reference = exported(input_ids=ids).logits
        result = run_passes(exported, inference_passes())
        torch.testing.assert_close(result.graph_module(input_ids=ids).logits, reference, rtol=1e-4, atol=1e-5)
    results = [through(*graph, *inference_passes()) for graph in graphs] + [result]
    for result in results:
        nodes = moe_nodes(result.graph_module)
        assert len(nodes) == 2
        for node in nodes:
            operands = operands_of(node)
            assert operands["router_weight"] is not None and operands["shared_up"] is not None and operands["bias"] is not None
            assert operands["top_k"] == 2 and node.meta["moecompile"]["pass"] == "lower_cpu"
            assert "example_value" in node.meta or "val" in node.meta
            assert "layers" in node.meta["moecompile_site"]
        assert not [n for n in result.graph_module.graph.nodes if meaning(n) == "topk"]


class Agreeing(nn.Module):
    """Two expert layers that read one decision."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Layer("softmax", "none"), Layer("softmax", "none")

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.first.weights(x)
        y = expert_ffn(x, ids, weights, self.first.up, self.first.down, None, None, "silu", True)
        return expert_ffn(y, ids, weights, self.second.up, self.second.down, None, None, "silu", True)


def test_layers_that_share_a_decision_share_its_dispatch() -> None:
    graph_module, inputs = traced(Agreeing(), X)
    result = through(graph_module, inputs, *FRONT, ShareDispatch())
    dispatches = [n for n in result.graph_module.graph.nodes if n.target is lowered.dispatch_op]
    assert len(dispatches) == 1
    assert {operands_of(node)["order"] for node in moe_nodes(result.graph_module)} != {None}
    whole = through(graph_module, inputs, *inference_passes())
    assert all(operands_of(node)["ids"] is not None for node in moe_nodes(whole.graph_module))


def test_layers_with_routers_of_their_own_share_nothing() -> None:
    first, second = Layer("softmax", "none"), Layer("sigmoid", "none")

    def function(x: Tensor) -> Tensor:
        return second(first(x))

    result = through(*traced(function, X), *FRONT, ShareDispatch())
    assert not [n for n in result.graph_module.graph.nodes if n.target is lowered.dispatch_op]


def test_dispatch_orders_pairs_by_expert_then_token() -> None:
    ids = torch.tensor([[2, 0], [0, 1], [2, 1]])
    order, offsets = lowered.dispatch(ids, 4)
    assert order.tolist() == [1, 2, 3, 5, 0, 4] and offsets.tolist() == [0, 2, 4, 6, 6]


def test_dead_code_keeps_writes() -> None:
    cache = torch.zeros(4, D)

    def function(x: Tensor, cache: Tensor) -> Tensor:
        unread = x * 3  # noqa: F841
        cache.index_copy_(0, torch.tensor([1]), x[:1])
        return x + 1

    graph_module, _ = traced(function, X, cache.clone())
    result = run_passes(graph_module, [DeadCode()])
    own = cache.clone()
    placeholders = [n for n in result.graph_module.graph.nodes if n.op == "placeholder"]
    values = {"x": X, "cache": own}
    inputs = [next(v for k, v in values.items() if k in str(p.target)) for p in placeholders]
    result.graph_module(*inputs)
    assert torch.equal(own[1], X[0])
    assert not [n for n in result.graph_module.graph.nodes if meaning(n) == "mul"]


def test_lowering_names_what_it_cannot_compute() -> None:
    graph_module, _ = traced(Layer("softmax", "none").double(), X.double())
    result = run_passes(graph_module, [*FRONT, LowerTriton(), LowerCPU()])
    assert operands_of(moe_nodes(result.graph_module)[0])["backend"] == "torch"
    assert any("float64" in reason and "node" in reason for reason in result.refused)


def test_an_unknown_number_of_experts_is_named() -> None:
    graph_module, _ = traced(Layer("softmax", "none"), X)
    for node in graph_module.graph.nodes:
        if node.target in (EXPERT_FFN, EXPERT_FFN.overloadpacket):
            node.args[1].meta.clear()
    result = run_passes(graph_module, FRONT)
    assert not moe_nodes(result.graph_module)
    assert any("stays expert_ffn: how many experts" in reason and "node" in reason for reason in result.refused)


@pytest.mark.parametrize(
    ("kind", "target", "form"),
    [("int4", "cuda:80", "int4/64"), ("int8", "hip:gfx942", "int8/128"), ("fp8", "cuda:90", "fp8/0"), ("fp8", "cuda:80", None)],
)
def test_stored_weights_for_a_device(kind: str, target: str, form: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moecompile.passes.lower_triton._off_cpu", lambda node: True)
    monkeypatch.setattr("moecompile.codegen.triton_backend.device_target", lambda device: Target.parse(target))
    graph_module, _ = traced(Layer(), X)
    result = run_passes(graph_module, [*FRONT, LowerTriton(kind)])
    assert operands_of(moe_nodes(result.graph_module)[0])["weight_format"] == (form or "same")
    assert len([reason for reason in result.refused if "compute capability 8.9" in reason]) == (form is None)


def test_weights_are_packed_while_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """By neuron, or rounded; and at a call nothing is made any more."""
    if cpu.available() is not None:
        pytest.skip(cpu.available() or "")
    for form, count in (("same", 1), ("int8", 2)):  # the down projection; up and down
        layer = Layer("softmax", "none")
        graph_module, inputs = traced(layer, X)
        result = run_passes(graph_module, inference_passes(form, inputs))
        packed = next(note for note in result.notes if note.startswith("pack_weights"))
        assert f": {count} copies of weights" in packed and "MiB" in packed
        with monkeypatch.context() as patched, torch.no_grad():
            patched.setattr(packing, "FORMS", {})
            found = result.graph_module(*inputs)[0]
        if form == "same":
            torch.testing.assert_close(found, graph_module(*inputs)[0], rtol=1e-4, atol=1e-5)
    assert not any("pack_weights" in note for note in run_passes(graph_module, inference_passes()).notes)


def test_order_is_checked_and_passes_can_be_left_out() -> None:
    graph_module, inputs = traced(Layer(), X)
    with pytest.raises(PassError, match="match_experts needs"):
        run_passes(graph_module, [MatchExperts()])
    seen: list[str] = []
    result = run_passes(
        graph_module, inference_passes(), skip={"fuse_router"}, observe=lambda step, before, done: seen.append(step.name)
    )
    assert "fuse_router" not in seen and "lower_cpu" in seen
    assert operands_of(moe_nodes(result.graph_module)[0])["ids"] is not None
    with torch.no_grad():
        torch.testing.assert_close(result.graph_module(*inputs)[0], graph_module(*inputs)[0], rtol=1e-5, atol=1e-6)


def test_a_failing_pass_is_left_out_when_asked() -> None:
    class Failing:
        name, requires, ensures = "failing", frozenset[str](), frozenset({"folded"})

        def __call__(self, graph_module: GraphModule) -> PassResult:
            raise ValueError("no")

    graph_module, _ = traced(Layer(), X)
    errors: list[str] = []
    result = run_passes(graph_module, [Failing(), MatchExperts()], on_error=lambda step, error: errors.append(step.name))
    assert errors == ["failing"] and len(moe_nodes(result.graph_module)) == 1
    with pytest.raises(ValueError, match="no"):
        run_passes(graph_module, [Failing()])


@torch.library.custom_op("moecompile_tests::bump", mutates_args=("second",))
def bump(first: Tensor, second: Tensor) -> Tensor:
    """Adds one to what it is given second."""
    second.add_(1)
    return first + 0


def test_every_way_to_write_is_seen() -> None:
    graph = torch.fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    f = nn.functional
    view = graph.call_method("view", (y, -1))
    writing = {
        graph.call_function(f.relu, (x, True)): x,
        graph.call_function(f.silu, (x,), {"inplace": True}): x,
        graph.call_function(f.dropout, (x, 0.0, False, True)): x,
        graph.call_function(torch.add, (x, x), {"out": view}): view,
        graph.call_function(torch.ops.moecompile_tests.bump.default, (x, view)): view,
        graph.call_function(torch.ops.moecompile_tests.bump, (x,), {"second": view}): view,
        graph.call_function(torch._foreach_add_, ([y], 1)): y,
        graph.call_method("mul_", (x, 2)): x,
    }
    for node, target in writing.items():
        assert overwritten(node) == [target]
    innocent = [
        graph.call_function(f.relu, (x, False)), graph.call_function(f.silu, (x,), {"inplace": False}),
        graph.call_function(f.dropout, (x, 0.0, False)), graph.call_function(torch.ops.aten.add, (x, y)),
        graph.call_function(torch.ops.aten.mean, (x, [1], True)),
    ]  # fmt: skip
    assert not any(overwritten(node) for node in innocent)
    assert written(graph) >= {x, y, view} and not written(graph) & set(innocent)


def test_int8_is_refused_for_weights_that_a_graph_computes() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(3, 8, 6)), nn.Parameter(torch.randn(3, 6, 4))

        def forward(self, x: Tensor) -> Tensor:
            ids = torch.zeros(x.shape[0], 1, dtype=torch.long)
            return expert_ffn(x, ids, torch.ones_like(ids, dtype=x.dtype), self.up * 2, self.down, None, None, "silu", True)

    graph_module, inputs = traced(Scaled(), torch.randn(4, 6))
    result = run_passes(graph_module, inference_passes("int8"))
    assert "up is computed in the graph" in result.refused[0]
    (node,) = moe_nodes(result.graph_module)
    assert operands_of(node)["weight_format"] == "same"
    with torch.no_grad():
        torch.testing.assert_close(result.graph_module(*inputs)[0], graph_module(*inputs)[0], rtol=1e-4, atol=1e-5)
