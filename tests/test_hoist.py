"""Hoisting routers: what is proved, merged and stacked, what is refused and why; the numbers stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiling import plain, tokens
from moecompile.passes import run_passes
from moecompile.passes.fold_constants import FoldConstants
from moecompile.passes.hoist_router import HoistRouter, choice_of, hoisted
from moecompile.passes.match_experts import MatchExperts, moe_nodes, operands_of
from moecompile.passes.nodes import meaning
from moecompile.passes.pipeline import inference_passes
from pregating import SMALL, pregated_model, random_router
from torch import Tensor, nn
from torch.fx import GraphModule

from moecompile import lowered
from moecompile.capture import capture
from moecompile.ops import expert_ffn
from moecompile.pregate import PreGateSpec, PreGatingRouter

D, F, N, K, LAYERS, VOCABULARY = 16, 8, 5, 2, 3, 32
IDS = torch.randint(0, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    """Each test traces anew."""
    torch._dynamo.reset()


class Layered(nn.Module):
    """A residual stack whose every layer asks a router; ``reads`` says what the router of a layer sees."""

    def __init__(self, reads: str = "the same router", last: int = K) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def random(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) * 0.3)

        self.reads, self.last = reads, last
        self.embed = nn.Embedding(VOCABULARY, D)
        nn.init.normal_(self.embed.weight, generator=generator)
        self.router = random_router(PreGateSpec(N, D, **SMALL))
        self.heads, self.mix = random(LAYERS, N, D), random(LAYERS, D, D)
        self.up, self.down = random(LAYERS, N, 2 * F, D), random(LAYERS, N, D, F)

    def choose(self, layer: int, front: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(T, K) ids and weights."""
        rows = front.reshape(-1, D)
        if self.reads == "the same router":
            scores = self.router(front)
        elif self.reads == "heads at the front":
            scores = nn.functional.linear(rows, self.heads[layer])
        elif self.reads == "hidden states":
            scores = nn.functional.linear(x, self.heads[layer])
        elif self.reads == "hidden states of the first layer":
            scores = nn.functional.linear(x if layer == 0 else rows, self.heads[layer])
        elif self.reads == "noise":
            scores = nn.functional.linear(nn.functional.dropout(rows, 0.5, True), self.heads[layer])
        elif self.reads == "something written":
            scores = nn.functional.linear(rows.clone().mul_(layer + 1.0), self.heads[layer])
        elif self.reads == "softmax at the front":
            best, ids = torch.topk(nn.functional.linear(rows, self.heads[layer]).softmax(-1), K, dim=-1)
            return ids, best / best.sum(-1, keepdim=True)
        else:
            scores = nn.functional.linear(rows, self.heads[layer][: N - layer])
        ids = torch.topk(scores, self.last if layer == LAYERS - 1 else K, dim=-1).indices
        return ids, torch.ones_like(ids, dtype=x.dtype)

    def forward(self, input_ids: Tensor) -> Tensor:
        front = self.embed(input_ids)
        h = front
        for layer in range(LAYERS):
            h = h + torch.tanh(h @ self.mix[layer])  # a layer's attention: behind the front
            x = nn.functional.rms_norm(h, (D,)).reshape(-1, D)
            ids, weights = self.choose(layer, front, x)
            h = h + expert_ffn(x, ids, weights, self.up[layer], self.down[layer], None, None, "silu", True).view_as(h)
        return h


def traced(module: nn.Module, how: str) -> tuple[GraphModule, Callable[[GraphModule], Tensor]]:
    """A graph by torch.export or TorchDynamo, and how to run one with its inputs."""
    if how == "export":
        graph_module = capture(module, {"input_ids": IDS}).graph_module
        return graph_module, lambda g: g(input_ids=IDS)
    found: list[tuple[GraphModule, list[Any]]] = []

    def backend(graph_module: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        found.append((graph_module, list(example_inputs)))
        return graph_module.forward

    with torch.no_grad():
        torch.compile(module, backend=backend, fullgraph=True)(IDS)
    return found[0][0], lambda g: g(*found[0][1])[0]


def choices(graph_module: GraphModule) -> list[Any]:
    """The top-ks of a graph."""
    return [node for node in graph_module.graph.nodes if meaning(node) == "topk"]


@pytest.mark.parametrize("how", ["export", "dynamo"])
@pytest.mark.parametrize("reads", ["the same router", "heads at the front", "softmax at the front"])
@pytest.mark.parametrize("form", ["expert_ffn", "moe_ffn"])
@torch.no_grad()
def test_one_choice_above_the_first_layer(how: str, reads: str, form: str) -> None:
    module = Layered(reads).eval()
    graph_module, run = traced(module, how)
    passes = [FoldConstants(), MatchExperts(), HoistRouter()] if form == "moe_ffn" else [HoistRouter()]
    before = len(choices(graph_module))
    result = run_passes(graph_module, passes)
    assert before == LAYERS == len(choices(graph_module)) and result.notes == ()
    after = result.graph_module
    assert len(choices(after)) == 1 and hoisted(after)
    order = [node.name for node in after.graph.nodes]
    tanh = next(n for n in after.graph.nodes if "tanh" in n.name)
    assert order.index(choices(after)[0].name) < order.index(tanh.name)
    torch.testing.assert_close(run(after), module(IDS), rtol=1e-5, atol=1e-5)
    again = HoistRouter()(after)
    assert again.modified == 0 and again.graph_module is after


@torch.no_grad()
def test_equal_routers_share_their_dispatch() -> None:
    """Behind the whole pipeline the aligned ids are one value: one route, one dispatch."""
    graph_module, run = traced(module := Layered().eval(), "dynamo")
    after = run_passes(graph_module, inference_passes()).graph_module
    targets = [node.target for node in after.graph.nodes]
    assert targets.count(lowered.route) == 1 and targets.count(lowered.dispatch_op) == 1 and not choices(after)
    assert len({operands_of(node)["ids"] for node in moe_nodes(after)}) == 1
    torch.testing.assert_close(run(after), module(IDS), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_layers_may_choose_differently_many() -> None:
    graph_module, run = traced(module := Layered("heads at the front", last=1).eval(), "export")
    after = HoistRouter()(graph_module).graph_module
    assert len(choices(after)) == 1
    torch.testing.assert_close(run(after), module(IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("reads", "why"),
    [
        ("hidden states", "reads a hidden state"),
        ("noise", "may not be moved"),
        ("something written", "changed in place"),
    ],
)
def test_what_is_not_known_at_the_front_is_refused(reads: str, why: str) -> None:
    graph_module, _ = traced(Layered(reads).eval(), "dynamo")
    result = HoistRouter()(graph_module)
    assert result.modified == 0 and result.graph_module is graph_module
    assert len(result.notes) == 1 and why in result.notes[0] and "trained pre-gating router" in result.notes[0]


def test_nothing_leaves_an_autocast_region() -> None:
    class Autocast(Layered):
        def forward(self, input_ids: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(input_ids)

    graph_module, _ = traced(Autocast("heads at the front").eval(), "dynamo")
    result = HoistRouter()(graph_module)
    assert result.graph_module is graph_module and "autocast" in result.notes[0]


@torch.no_grad()
def test_what_can_be_hoisted_is() -> None:
    """The first layer's own router stays; the other two become one top-k."""
    graph_module, run = traced(module := Layered("hidden states of the first layer").eval(), "export")
    result = HoistRouter()(graph_module)
    assert len(choices(result.graph_module)) == 2 and "reads a hidden state" in result.notes[0]
    torch.testing.assert_close(run(result.graph_module), module(IDS), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_routers_over_different_experts_are_not_stacked() -> None:
    graph_module, run = traced(module := Layered("fewer experts in each layer").eval(), "export")
    result = HoistRouter()(graph_module)
    assert len(choices(result.graph_module)) == LAYERS and "as many experts" in result.notes[0]
    torch.testing.assert_close(run(result.graph_module), module(IDS), rtol=1e-5, atol=1e-5)


# With a trained router


@pytest.mark.parametrize("aligned", [True, False])
@torch.no_grad()
def test_a_trained_router_takes_the_place_of_layerwise_ones(aligned: bool) -> None:
    """The rewritten graph of the layer-wise model is the pre-gated model of the same plan."""
    pregated, layerwise = pregated_model(aligned=aligned), plain()
    graph_module = capture(layerwise).graph_module
    assert len(choices(graph_module)) == 2
    result = HoistRouter(pregated.pregate.router)(graph_module)
    assert result.modified == 2 and len(choices(result.graph_module)) == 1 and hoisted(result.graph_module)
    ids = tokens(2, 12)
    out = result.graph_module(input_ids=ids)
    torch.testing.assert_close(getattr(out, "logits", out), pregated(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_a_router_that_does_not_fit_is_refused() -> None:
    graph_module = capture(plain()).graph_module
    for router, why in (
        (PreGatingRouter(PreGateSpec(5, 32, **SMALL)), "scores 5 experts"),
        (PreGatingRouter(PreGateSpec(6, 32, groups=3, **SMALL)), "decides for 3 layers"),
        (PreGatingRouter(PreGateSpec(6, 31, **SMALL)), "31 wide"),
    ):
        result = HoistRouter(router)(graph_module)
        assert result.graph_module is graph_module and why in result.notes[0]


def test_weighted_gates_are_refused() -> None:
    class Weighted(Layered):
        def choose(self, layer: int, front: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            best, ids = torch.topk(nn.functional.linear(x, self.heads[layer]).softmax(-1), K, dim=-1)
            return ids, best

    graph_module, _ = traced(Weighted().eval(), "export")
    result = HoistRouter(random_router(PreGateSpec(N, D, **SMALL)))(graph_module)
    assert result.modified == 0 and "its own router's scores" in result.notes[0]


def test_choice_is_seen_through_views() -> None:
    graph_module = capture(pregated_model(aligned=False)).graph_module
    found = {choice_of(node.args[1]) for node in graph_module.graph.nodes if "expert_ffn" in str(node.target)}
    assert len(found) == 1 and None not in found
