"""Fuse the block:  moe_ffn(x, *route(x, W, b, k))  ->  moe_ffn(x, W, b, k): the kernel decides by itself."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from .. import lowered
from .base import PassResult, clone
from .match_experts import moe_nodes, operands_of, set_operands
from .nodes import erase_unread, meaning, site_of


class FuseBlock:
    """A router that one layer alone reads goes into that layer's kernel."""

    name = "fuse_block"
    requires = frozenset({"route", "merged", "dispatch"})
    ensures = frozenset({"block"})

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """The graph with routers inside ``moe_ffn``; a shared or foreign routing decision stays outside, with a note."""
        if not moe_nodes(graph_module):
            return PassResult(graph_module, 0)
        result, fused, notes = clone(graph_module), 0, []
        for node in moe_nodes(result):
            operands = operands_of(node)
            ids, weights = operands["ids"], operands["weights"]
            route = ids.args[0] if isinstance(ids, Node) and meaning(ids) == "item" else None
            if not isinstance(route, Node) or route.target is not lowered.route:
                continue
            x, weight, bias, top_k, score, normalise = route.args
            readers = {reader for item in route.users for reader in item.users}
            if weights is not None and not (
                isinstance(weights, Node) and meaning(weights) == "item" and weights.args[0] is route
            ):
                notes.append(f"{site_of(node)}: node {weights}: the weights are changed on their way")
                continue
            if x is not operands["x"] or readers != {node}:
                notes.append(f"{site_of(node)}: node {route.name}: other layers or nodes read this router too")
                continue
            set_operands(
                node, self.name, router_weight=weight, router_bias=bias, ids=None, weights=None, top_k=top_k,
                score=score if weights is not None else "none", normalise=normalise and weights is not None,
            )  # fmt: skip
            for item in list(route.users):
                erase_unread(result.graph, [item])
            if not route.users:
                result.graph.erase_node(route)
            fused += 1
        result.recompile()
        return PassResult(result, fused, tuple(notes))
