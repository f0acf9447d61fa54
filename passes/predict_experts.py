"""Predict experts:  beside moe(x_i) of each layer  ->  p_{i+1} = route(x_i, W_{i+1}, b_{i+1}, k), one more output of the graph.

A cross-layer gate (Fate, arXiv 2502.12224): residual streams change slowly, so the input of one layer's gate, put through the
next layer's gate, mostly chooses what that gate will choose. The prediction is known one layer early, for a prefetch; no result
of the model depends on it. It is the way between a router in each layer and one at the front (hoist_router.py).
"""

from __future__ import annotations

import operator
from itertools import pairwise
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from .. import lowered
from .base import PassResult, clone
from .fuse_router import Router, find_router
from .hoist_router import readers_of
from .nodes import inherit, record_value, site_of, tensor_of, through_casts


class PredictExperts:
    """Each layer but the first gets a prediction of its choice, made from the tokens of the layer before.

    The graph's outputs become ``(outputs, predictions)`` where it has a tree of outputs, as from torch.export; a flat tuple, as
    from TorchDynamo, is continued. ``predictions`` holds (T, K) int64 for each layer named in :attr:`predicted`, in order. Not
    in the pipeline: a graph with more outputs is for a runtime that wants them.
    """

    name = "predict_experts"
    requires: frozenset[str] = frozenset()
    ensures = frozenset({"predictions"})

    def __init__(self) -> None:
        self.predicted: tuple[str, ...] = ()

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """The graph with predictions; a layer whose router is not one of its tokens alone gets none, with the reason."""
        self.predicted = ()
        if len(readers_of(graph_module.graph)) < 2:
            return PassResult(graph_module, 0)
        result, notes = clone(graph_module), []
        readers = readers_of(result.graph)
        predictions: list[Node] = []
        names: list[str] = []
        for before, after in pairwise(readers):
            found = find_router(after.ids)
            reason = found if isinstance(found, str) else _refusal(found, before.x, after.x)
            if isinstance(found, str) or reason:
                notes.append(f"{site_of(after.node)}: node {after.ids.name}: no prediction: {reason}")
                continue
            predictions.append(_predict(result, found, before.x, before.node, self.name))
            names.append(site_of(after.node))
        if not predictions:
            return PassResult(graph_module, 0, tuple(notes))
        _give(result, predictions)
        self.predicted = tuple(names)
        result.recompile()
        return PassResult(result, len(predictions), tuple(notes))


def _refusal(router: Router, x: Node, own: Node) -> str:
    """Why a router cannot be asked about other tokens; empty where it can."""
    if router.x is not through_casts(own) and router.x is not own:
        return "the router does not read the tokens of its own experts"
    for tensor in (router.weight, router.bias):
        if tensor is not None and tensor.op not in ("placeholder", "get_attr"):
            return f"node {tensor.name}: the router's weights are computed in the graph"
    width, value = tensor_of(router.weight), tensor_of(x)
    if width is None or value is None or width.shape[-1] != value.shape[-1]:
        return "the layer before has tokens of another width"
    return ""


def _predict(result: GraphModule, router: Router, x: Node, reader: Node, step: str) -> Node:
    graph = result.graph
    position = {node: number for number, node in enumerate(graph.nodes)}
    for tensor in (router.weight, router.bias):
        if tensor is not None and tensor.op == "get_attr" and position[tensor] > position[reader]:
            reader.prepend(tensor)
    with graph.inserting_before(reader):
        # the choice alone is wanted, and a softmax or sigmoid keeps the order of the scores
        route = graph.call_function(lowered.route, (x, router.weight, router.bias, router.top_k, "none", False))
        ids = graph.call_function(operator.getitem, (route, 0))
    chosen, value = tensor_of(router.ids), tensor_of(x)
    if chosen is not None and value is not None:
        fake = chosen.new_empty(chosen.shape, dtype=torch.long)
        record_value(route, (fake, value.new_empty(chosen.shape, dtype=torch.float32)))
        record_value(ids, fake)
    for node in (route, ids):
        inherit(node, node, step, router.topk)
    return ids


def _give(result: GraphModule, predictions: list[Node]) -> None:
    """Add outputs, and tell a tree of outputs about them."""
    output = next(node for node in result.graph.nodes if node.op == "output")
    values: Any = output.args[0]
    flat = list(values) if isinstance(values, (list, tuple)) else [values]
    output.args = ((*flat, *predictions),)
    codegen: Any = result.graph._codegen
    info = getattr(codegen, "pytree_info", None)
    if info is not None and info.out_spec is not None:
        inner = pytree.tree_structure([0] * len(predictions))
        codegen.pytree_info = info._replace(out_spec=pytree.TreeSpec(tuple, None, [info.out_spec, inner]))
