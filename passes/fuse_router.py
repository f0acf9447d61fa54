"""Fuse routers:  topk(score(x W^T + b), k) [/ sum]  ->  route(x, W, b, k), with score softmax, sigmoid or none."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from .. import lowered
from .base import PassResult, clone
from .match_experts import moe_nodes, operands_of
from .nodes import argument, erase_unread, inherit, meaning, record_value, site_of, tensor_of, through_casts, written


@dataclass(frozen=True)
class Router:
    """One router as found: the operands of ``route``, and the nodes whose values it replaces."""

    x: Node
    weight: Node
    bias: Node | None
    top_k: int
    score: str
    normalise: bool
    topk: Node
    ids: Node
    weights: Node | None


class FuseRouter:
    """One operator for what decides: its scores never leave it, and a backend may compute it inside the experts' kernel."""

    name = "fuse_router"
    requires = frozenset({"folded", "moe_ffn"})
    ensures = frozenset({"route"})

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """The graph with a ``route`` for each router of a ``moe_ffn``; one that cannot be fused is left, with the reason."""
        if not moe_nodes(graph_module):
            return PassResult(graph_module, 0)
        result, fused, notes = clone(graph_module), 0, []
        done: set[Node] = set()
        for node in moe_nodes(result):
            ids = operands_of(node)["ids"]
            if not isinstance(ids, Node) or ids in done or _fused(ids):
                continue
            done.add(ids)
            found = find_router(ids)
            if isinstance(found, str):
                notes.append(f"{site_of(node)}: node {ids.name}: {found}")
                continue
            _replace(result, found, self.name)
            fused += 1
        result.recompile()
        return PassResult(result, fused, tuple(notes))


def _fused(ids: Node) -> bool:
    """Whether another layer that reads the same choice had its router fused already."""
    route = ids.args[0] if meaning(ids) == "item" else None
    return isinstance(route, Node) and route.target is lowered.route


def find_router(ids: Node) -> Router | str:
    """The router whose choice a node holds, or why it is not one that can be fused."""
    topk = ids.args[0] if meaning(ids) == "item" else None
    if not isinstance(topk, Node) or meaning(topk) != "topk" or ids.args[1] != 1:
        return "the choice is not the indices of a top-k"
    k, last = argument(topk, 1, "k"), argument(topk, 2, "dim", -1)
    scores = topk.args[0]
    shape = tensor_of(scores)
    if (
        not isinstance(k, int)
        or shape is None
        or shape.dim() != 2
        or last not in (-1, 1)
        or not argument(topk, 3, "largest", True)
    ):
        return "the top-k is not over the experts of each token"
    score, below = "none", through_casts(scores)
    if meaning(below) in ("softmax", "sigmoid"):
        if meaning(below) == "softmax" and argument(below, 1, "dim") not in (-1, 1):
            return "the softmax is not over the experts"
        score, below = meaning(below), through_casts(below.args[0])
    if meaning(below) != "linear":
        return "the scores are not those of a linear layer"
    logits = tensor_of(below)
    if logits is None or logits.dtype not in (torch.float32, torch.float64):
        return "the scores are rounded before the choice, and a fused router would not round"
    bias = argument(below, 2, "bias")
    x, weight, bias = through_casts(below.args[0]), through_casts(below.args[1]), through_casts(bias)
    values = [user for user in topk.users if meaning(user) == "item" and user.args[1] == 0]
    readers = [reader for value in values for reader in value.users]
    divided = [reader for reader in readers if meaning(reader) in ("div", "idiv")]
    changed = written(ids.graph, allowed=divided)
    if changed & {x, weight, bias, below, scores, topk, ids, *values, *topk.users}:
        return "what the router reads or gives is changed in place"
    if not readers:  # (unit weights are gone by now)
        return Router(x, weight, bias, k, score, False, topk, ids, None)
    if score == "none":
        return "raw scores are used as weights"
    if len(values) == 1 and len(divided) == 1 and _is_normalising(values[0], divided[0], readers):
        return Router(x, weight, bias, k, score, True, topk, ids, divided[0])
    if len(values) > 1 or divided:
        return "the weights are changed in a way that is not known"
    return Router(x, weight, bias, k, score, False, topk, ids, values[0])


def _is_normalising(value: Node, divide: Node, readers: list[Node]) -> bool:
    """value / value.sum(-1, keepdim=True), and nothing else reads the value."""
    total = divide.args[1]
    return (
        divide.args[0] is value
        and len(divide.args) == 2
        and not divide.kwargs
        and meaning(total) == "sum"
        and isinstance(total, Node)
        and total.args[0] is value
        and argument(total, 1, "dim") in (-1, 1, [-1], (-1,))
        and argument(total, 2, "keepdim", False) is True
        and set(readers) == {divide, total}
        and set(total.users) == {divide}
    )


def _replace(result: GraphModule, found: Router, step: str) -> None:
    graph = result.graph
    with graph.inserting_before(found.topk):
        route = graph.call_function(
            lowered.route, (found.x, found.weight, found.bias, found.top_k, found.score, found.normalise)
        )
        inherit(route, found.topk, step)
        values = tensor_of(found.weights) if found.weights is not None else None
        chosen = tensor_of(found.ids)
        record_value(route, (chosen, values))
        ids = inherit(graph.call_function(operator.getitem, (route, 0)), found.ids, step)
        found.ids.replace_all_uses_with(ids)
        if found.weights is not None:
            weights = inherit(graph.call_function(operator.getitem, (route, 1)), found.weights, step)
            found.weights.replace_all_uses_with(weights)
    if found.weights is not None and meaning(found.weights) == "idiv":
        total = found.weights.args[1]
        graph.erase_node(found.weights)
        erase_unread(graph, [total])
    erase_unread(graph, [found.weights, found.ids])
