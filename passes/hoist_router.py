"""Hoist routers:  ids_l = topk(s_l(front), k) in each layer l  ->  ids = topk(stack(s_1 .. s_L), k) above the first layer,
ids_l = ids[:, l].

A router may stand at the front when what it reads is known there: neither the tokens x of any expert FFN nor the output of one
is among what its choice depends on, so that placeholders and parameters alone decide. Equal routers become one; different ones
keep their scores, are stacked, and share one top-k. A router of a layer's own hidden state can only be replaced, by a trained
one that reads token ids (Read-ME, arXiv 2410.19123).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from .. import lowered
from ..ops import expert_ffn
from ..pregate import PreGatingRouter
from .base import PassResult, clone
from .match_experts import operands_of
from .motion import ancestors, is_random, node_key, to_the_front
from .nodes import (
    argument,
    aten,
    erase_unread,
    inherit,
    meaning,
    record_value,
    site_of,
    tensor_of,
    through_reshapes,
    writes,
    written,
)

_EXPERTS = (expert_ffn._opoverload, expert_ffn._opoverload.overloadpacket)
_EMBEDDINGS = (torch.nn.functional.embedding, aten.embedding.default)
MODULE = "pregating_router"


@dataclass(frozen=True)
class Reader:
    """A layer that reads a routing decision: its expert FFN, the tokens, the choice, and the weights of the chosen."""

    node: Node
    x: Node
    ids: Node
    weights: Any
    experts: Any


class HoistRouter:
    """One routing plan above the first layer, which every layer reads.

    Args:
        router: a trained pre-gating router, to take the place of routers that read hidden states; None to hoist only what can
            be proved to be known at the front.
    """

    name = "hoist_router"
    requires: frozenset[str] = frozenset()
    ensures = frozenset({"hoisted"})

    def __init__(self, router: PreGatingRouter | None = None) -> None:
        self.router = router

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """The graph with one top-k for all layers whose routers could be hoisted or replaced; for the others the reason."""
        if not readers_of(graph_module.graph):
            return PassResult(graph_module, 0)
        result = clone(graph_module)
        readers = readers_of(result.graph)
        kept: list[tuple[Node, list[Reader]]] = []
        reasons: dict[str, tuple[str, list[str]]] = {}
        changed = written(result.graph)
        for topk, group in _by_choice(readers):
            kind, reason = ("choice", "the choice is not the indices of a top-k")
            if topk is not None:
                kind, reason = _refusal(topk, readers, changed)
            if kind:
                reasons.setdefault(kind, (reason, []))[1].extend(site_of(reader.node) for reader in group)
            elif topk is not None:
                kept.append((topk, group))
        if self.router is not None and reasons:
            return self._replaced(result, readers, graph_module)
        notes = [f"{_listed(sites)}: {reason}; it needs a trained pre-gating router" for reason, sites in reasons.values()]
        count = to_the_front(result.graph, [topk for topk, _ in kept])
        count += _merge_equal(result.graph, [topk for topk, _ in kept])
        left = dict.fromkeys(topk for topk, _ in _by_choice(readers_of(result.graph)) if topk is not None)
        merged, more = _one_topk(result.graph, [topk for topk in left if topk in {each for each, _ in kept}], self.name)
        if count + merged == 0:
            return PassResult(graph_module, 0, tuple(notes + more))
        result.recompile()
        return PassResult(result, count + merged, tuple(notes + more))

    def _replaced(self, result: GraphModule, readers: list[Reader], original: GraphModule) -> PassResult:
        """Every layer reads the trained router's plan; or the graph as it was, with the reason."""
        assert self.router is not None
        found = _front(result.graph, self.router, readers)
        if isinstance(found, str):
            return PassResult(original, 0, (found,))
        tokens, mask, k = found
        graph, spec = result.graph, self.router.spec
        result.add_submodule(MODULE, self.router)
        to_the_front(graph, [node for node in (tokens, mask) if node is not None])
        with graph.inserting_after(tokens):
            scores = graph.call_module(MODULE, (tokens,) if mask is None else (tokens, mask))
        _value(scores, lambda: self._fake_scores(tensor_of(tokens)))
        with graph.inserting_after(scores):
            topk = graph.call_function(aten.topk.default, (scores, k, -1))
        with graph.inserting_after(topk):
            ids = graph.call_function(operator.getitem, (topk, 1))
        _value(topk, lambda: torch.topk(tensor_of(scores), k, dim=-1))  # type: ignore[arg-type]
        _value(ids, lambda: topk.meta["val"][1])
        old: list[Node] = []
        for number, reader in enumerate(readers):
            own = int(tensor_of(reader.ids).shape[-1])  # type: ignore[union-attr]
            view = _view(graph, ids, number if spec.groups > 1 else None, own, k, self.name, reader.node)
            old += [reader.ids, *([reader.weights] if isinstance(reader.weights, Node) else [])]
            weights = reader.weights
            if isinstance(weights, Node):
                before = tensor_of(weights)
                with graph.inserting_before(reader.node):
                    weights = graph.call_function(aten.ones_like.default, (view,), {"dtype": before.dtype})  # type: ignore[union-attr]
                record_value(weights, before)
                inherit(weights, reader.node, self.name)
            _read(reader.node, view, weights)
        for new in (scores, topk, ids):
            new.meta["moecompile"] = {"pass": self.name, "from": tuple(reader.node.name for reader in readers)}
        choices = [topk for topk, _ in _by_choice(readers) if topk is not None]
        erase_unread(graph, old)
        erase_unread(graph, [item for choice in choices if not choice._erased for item in choice.users])
        result.recompile()
        return PassResult(result, len(readers))

    def _fake_scores(self, tokens: Tensor | None) -> Tensor:
        assert tokens is not None and self.router is not None
        spec = self.router.spec
        shape = (tokens.shape[0] * tokens.shape[1], *((spec.groups,) if spec.groups > 1 else ()), spec.experts)
        return tokens.new_empty(shape, dtype=torch.float32)


def readers_of(graph: Graph) -> list[Reader]:
    """The routed FFNs of a graph in order, in either form; those with a router inside have nothing to hoist."""
    found = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in _EXPERTS:
            x, ids, weights, up = node.args[:4]
        elif node.target is lowered.moe_ffn:
            operands = operands_of(node)
            x, ids, weights, up = (operands[name] for name in ("x", "ids", "weights", "up"))
        else:
            continue
        if isinstance(ids, Node) and isinstance(x, Node):
            found.append(Reader(node, x, ids, weights, up))
    return found


def _read(node: Node, ids: Node, weights: Any) -> None:
    """Make a routed FFN read another decision."""
    if node.target is lowered.moe_ffn:
        operands = operands_of(node) | {"ids": ids, "weights": weights}
        node.args = tuple(operands.values())  # type: ignore[assignment]
    else:
        node.args = (node.args[0], ids, weights, *node.args[3:])


def choice_of(ids: Node) -> Node | None:
    """The top-k that a layer's ids are the indices of, seen through views; None where they are something else."""
    node: Any = ids
    while isinstance(node, Node):
        if meaning(node) == "item" and isinstance(node.args[0], Node) and meaning(node.args[0]) == "topk":
            return node.args[0] if node.args[1] == 1 else None
        if meaning(node) not in ("item", "reshape", "cast") and node.target not in _VIEWS:
            return None
        node = node.args[0]
    return None


_VIEWS: tuple[object, ...] = (aten.select.int, aten.slice.Tensor, "select", "contiguous")


def _by_choice(readers: Iterable[Reader]) -> list[tuple[Node | None, list[Reader]]]:
    groups: dict[Node | None, list[Reader]] = {}
    for reader in readers:
        groups.setdefault(choice_of(reader.ids), []).append(reader)
    return list(groups.items())


def _refusal(topk: Node, readers: list[Reader], changed: frozenset[Node]) -> tuple[str, str]:
    """(kind, reason) why a choice cannot be known at the front; empty where it is proved that it can."""
    depends = ancestors([topk])
    for reader in readers:
        if reader.node in depends:
            return "hidden", f"the router reads a hidden state, behind {site_of(reader.node)} (node {reader.node.name})"
        for x in (reader.x, through_reshapes(reader.x)):
            if x in depends and x.op != "placeholder":
                return "hidden", f"the router reads a hidden state, node {x.name}, the input of its own layer"
    region = next((n for n in topk.graph.nodes if getattr(n.target, "__name__", "") == "_enter_autocast"), None)
    if region is not None:
        return "moved", f"node {region.name}: an autocast region, out of which nothing may be moved"
    if depends & changed:
        return "written", f"node {min(n.name for n in depends & changed)}: what the router reads is changed in place"
    for node in depends:
        if writes(node) or is_random(node):
            return "moved", f"node {node.name}: what the router computes may not be moved"
    return "", ""


def _merge_equal(graph: Graph, topks: list[Node]) -> int:
    """Among what top-ks depend on, nodes that compute the same from the same become one; returns how many went."""
    wanted, first, merged = ancestors(topks), {}, 0
    for node in list(graph.nodes):
        if node not in wanted or node.op not in ("call_function", "call_method", "get_attr"):
            continue
        key = node_key(node)
        if key is None:
            continue
        same = first.setdefault(key, node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
            merged += node.op != "get_attr"
    for topk in [n for n in graph.nodes if meaning(n) == "topk"]:  # its parts are read behind the slice
        for item in list(topk.users):
            same = first.setdefault(node_key(item), item)
            if same is not item and meaning(item) == "item":
                item.replace_all_uses_with(same)
                graph.erase_node(item)
    for node in [n for n in graph.nodes if n.op == "call_function" and n.target in _VIEWS and choice_of(n) is not None]:
        same = first.setdefault(node_key(node), node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
    return merged


def _one_topk(graph: Graph, topks: list[Node], step: str) -> tuple[int, list[str]]:
    """Different top-ks over as many experts: their scores stacked, one top-k, a view for each; (how many went, notes)."""
    if len(topks) < 2:
        return 0, []
    shapes = [tensor_of(topk.args[0]) for topk in topks]
    first = shapes[0]
    for topk, shape in zip(topks, shapes, strict=True):
        same = shape is not None and first is not None and shape.dim() == 2 and shape.shape == first.shape
        last = argument(topk, 2, "dim", -1) in (-1, 1) and argument(topk, 3, "largest", True)
        if not same or not last or not isinstance(argument(topk, 1, "k"), int) or shape.dtype != first.dtype:  # type: ignore[union-attr]
            return 0, [f"node {topk.name}: {len(topks)} routers at the front do not choose among as many experts"]
    scores = [topk.args[0] for topk in topks]
    k = max(argument(topk, 1, "k") for topk in topks)
    order = {node: position for position, node in enumerate(graph.nodes)}
    last_score = max(scores, key=lambda n: order[n])  # type: ignore[index]
    with graph.inserting_after(last_score):  # type: ignore[arg-type]
        stacked = graph.call_function(aten.stack.default, (scores, 1))  # [T, L, N]
    with graph.inserting_after(stacked):
        chosen = graph.call_function(aten.topk.default, (stacked, k, -1))
    _value(stacked, lambda: torch.stack([tensor_of(s) for s in scores], dim=1))  # type: ignore[misc]
    _value(chosen, lambda: torch.topk(tensor_of(stacked), k, dim=-1))  # type: ignore[arg-type]
    parts: dict[int, Node] = {}
    for part in (1, 0):
        with graph.inserting_after(chosen):
            parts[part] = graph.call_function(operator.getitem, (chosen, part))
        _value(parts[part], lambda part=part: chosen.meta["val"][part])  # type: ignore[misc]
    for number, topk in enumerate(topks):
        for item in list(topk.users):
            own = argument(topk, 1, "k")
            view = _view(graph, parts[item.args[1]], number, own, k, step, item)  # type: ignore[index]
            item.replace_all_uses_with(view)
            graph.erase_node(item)
        graph.erase_node(topk)
    for node in (stacked, chosen, *parts.values()):
        inherit(node, chosen, step, *(s for s in scores if isinstance(s, Node)))
    erase_unread(graph, list(parts.values()))
    return len(topks), []


def _view(graph: Graph, source: Node, layer: int | None, own: int, k: int, step: str, old: Node) -> Node:
    """One layer's part of a plan: source[:, layer], or source for aligned ids, cut to its own number of experts."""
    node = source
    steps: list[tuple[Any, tuple[Any, ...]]] = [] if layer is None else [(aten.select.int, (1, layer))]
    steps += [] if own == k else [(aten.slice.Tensor, (1, 0, own))]
    for target, args in steps:
        with graph.inserting_after(node):
            view = graph.call_function(target, (node, *args))
        _value(view, lambda target=target, args=args, node=node: target(tensor_of(node), *args))  # type: ignore[misc]
        view.meta["moecompile"] = {"pass": step, "from": (old.name,)}
        node = view
    return node


def _value(node: Node, compute: Any) -> None:
    """The fake value of a new node, where those of its operands are known."""
    try:
        record_value(node, compute())
    except (TypeError, AttributeError, KeyError):  # an operand was traced without values
        return


def _front(graph: Graph, router: PreGatingRouter, readers: list[Reader]) -> tuple[Node, Node | None, int] | str:
    """What a trained router reads (embedded tokens or ids, mask) and how many experts it must choose; or why it cannot."""
    spec = router.spec
    if spec.groups not in (1, len(readers)):
        return f"the router decides for {spec.groups} layers; the graph has {len(readers)}"
    ks = []
    for reader in readers:
        experts, ids = tensor_of(reader.experts), tensor_of(reader.ids)
        if experts is None or int(experts.shape[0]) != spec.experts:
            return f"{site_of(reader.node)}: the router scores {spec.experts} experts, and the layer has others"
        if ids is None or not isinstance(ids.shape[-1], int):
            return f"{site_of(reader.node)}: how many experts are chosen is not known"
        if reader.weights is not None and meaning(reader.weights) != "ones":
            return f"{site_of(reader.node)}: its weights are its own router's scores, which nothing at the front knows"
        ks.append(ids.shape[-1])
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    if any((t := tensor_of(node)) is not None and t.dim() == 4 and t.is_floating_point() for node in placeholders):
        return "the graph takes a KV cache, and has no place for the router's: convert the live module instead"
    reads = [
        n
        for n in graph.nodes
        if n.op == "call_function" and n.target in _EMBEDDINGS and argument(n, 1, "input").op == "placeholder"
    ]
    reads = [n for n in reads if (v := tensor_of(n)) is not None and v.dim() == 3]
    if not reads:
        return "no embedding of a placeholder was found: there are no token ids to read"
    tokens = reads[0]
    ids_node = argument(tokens, 1, "input")
    mask = next((n for n in placeholders if str(n.target).endswith("attention_mask") and _rows(n) == 2), None)
    if spec.vocabulary:
        return ids_node, mask, max(ks)
    if int(tensor_of(tokens).shape[-1]) != spec.input_width:  # type: ignore[union-attr]
        return f"node {tokens.name}: the embeddings are not {spec.input_width} wide"
    return tokens, mask, max(ks)


def _rows(node: Node) -> int:
    value = tensor_of(node)
    return -1 if value is None else value.dim()


def _listed(sites: list[str]) -> str:
    return sites[0] if len(sites) == 1 else f"{len(sites)} layers, first {sites[0]}"


def hoisted(graph_module: GraphModule) -> bool:
    """Whether one top-k decides for every routed FFN of a graph."""
    choices = {choice_of(reader.ids) for reader in readers_of(graph_module.graph)}
    return len(choices) == 1 and None not in choices


__all__ = ["MODULE", "HoistRouter", "choice_of", "hoisted", "readers_of"]
