"""Share dispatch:  equal routes -> one;  several moe_ffn with the same ids -> one dispatch(ids) that all of them read."""

from __future__ import annotations

import operator
from collections import defaultdict

import torch
from torch.fx import GraphModule, Node

from .. import lowered
from .base import PassResult, clone
from .match_experts import moe_nodes, operands_of, set_operands
from .nodes import inherit, record_value, tensor_of, written


class ShareDispatch:
    """Routing metadata is computed once for all layers that agree on it.

    Layers agree where a graph has one routing decision for several of them (a hoisted router); a model with a router of its
    own in each layer is left as it is.
    """

    name = "share_dispatch"
    requires = frozenset({"moe_ffn", "route"})
    ensures = frozenset({"dispatch"})

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """The graph without repeated routes, and with a dispatch where at least two layers share the choice."""
        if not _anything_shared(graph_module):
            return PassResult(graph_module, 0)
        result = clone(graph_module)
        changed = _merge_routes(result)
        groups: dict[tuple[Node, int], list[Node]] = defaultdict(list)
        for node in moe_nodes(result):
            operands = operands_of(node)
            ids, up = operands["ids"], tensor_of(operands["up"])
            if isinstance(ids, Node) and operands["order"] is None and up is not None:
                groups[ids, int(up.shape[0])].append(node)
        for (ids, experts), nodes in groups.items():
            if len(nodes) < 2:
                continue
            with result.graph.inserting_after(ids):
                dispatch = result.graph.call_function(lowered.dispatch_op, (ids, experts))
            with result.graph.inserting_after(dispatch):
                offsets = result.graph.call_function(operator.getitem, (dispatch, 1))
                order = result.graph.call_function(operator.getitem, (dispatch, 0))
            chosen = tensor_of(ids)
            if chosen is not None:
                flat = chosen.new_empty(chosen.shape[0] * chosen.shape[1], dtype=torch.long)
                values = (flat, chosen.new_empty(experts + 1, dtype=torch.long))
                for new, value in ((dispatch, values), (order, values[0]), (offsets, values[1])):
                    record_value(new, value)
            for new in (dispatch, order, offsets):
                inherit(new, ids, self.name, *nodes)
            for node in nodes:
                set_operands(node, self.name, order=order, offsets=offsets)
            changed += len(nodes)
        result.recompile()
        return PassResult(result, changed)


def _anything_shared(graph_module: GraphModule) -> bool:
    choices = [ids for node in moe_nodes(graph_module) if (ids := operands_of(node)["ids"]) is not None]
    routes = [node.args for node in graph_module.graph.nodes if node.op == "call_function" and node.target is lowered.route]
    return len(set(choices)) < len(choices) or len(set(routes)) < len(routes)


def _merge_routes(result: GraphModule) -> int:
    """Routes with the same operands are one; returns how many went."""
    first: dict[tuple[object, ...], Node] = {}
    merged, changed = 0, written(result.graph)
    for node in list(result.graph.nodes):
        if node.op != "call_function" or node.target is not lowered.route:
            continue
        if changed & set(node.all_input_nodes):
            continue
        same = first.setdefault(node.args, node)
        if same is node:
            continue
        own = {item.args[1]: item for item in same.users}
        for item in list(node.users):
            if item.args[1] in own:
                item.replace_all_uses_with(own[item.args[1]])
                result.graph.erase_node(item)
            else:
                item.args = (same, item.args[1])
        result.graph.erase_node(node)
        merged += 1
    return merged
