"""Lower linear layers:  x W_1^T + b_1, x W_2^T + b_2, ...  ->  linears(x, [W_1, W_2, ...], [b_1, b_2, ...])  on the CPU.

Decoding is a chain of matrix-vector products that read every weight once, and torch's reads a third of what memory gives. The
operator's kernel takes a few tokens and leaves many to torch, at run time; where a graph's tokens are known to be many, its
linear layers stay as they are. Layers that read one x are one launch. Graphs without a MoE layer are Inductor's alone.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .. import linears
from ..codegen import operators
from .base import PassResult, clone
from .match_experts import moe_nodes
from .nodes import Refusals, argument, inherit, meaning, record_value, tensor_of, written

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Layer:
    """One linear layer: its node and operands."""

    node: Node
    x: Node
    weight: Node
    bias: Node | None


class LowerLinear:
    """Choose the generated kernel for linear layers of few tokens; those that read one x become one operator.

    Args:
        weight_format: ``same`` as the weights are stored, or ``int8``.
    """

    name = "lower_linear"
    requires = frozenset({"block"})
    ensures = frozenset({"linears"})

    def __init__(self, weight_format: str = "same") -> None:
        self.weight_format = weight_format

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """The graph with linear layers lowered; the reasons for the others are counted in the notes."""
        if not moe_nodes(graph_module):
            return PassResult(graph_module, 0)
        result, refused, others = clone(graph_module), Refusals(), Refusals()
        changed = written(result.graph)
        groups: dict[Node, list[Layer]] = {}
        for node in result.graph.nodes:
            if meaning(node) != "linear":
                continue
            found = self._layer(node, changed)
            if isinstance(found, Layer):
                groups.setdefault(found.x, []).append(found)
            elif found:
                (refused if self.weight_format == "same" or _scores(node) else others).add(node, found)
        if groups and (reason := self._unavailable()):
            return PassResult(graph_module, 0, (f"linear layers stay torch's: {reason}",))
        for layers in groups.values():
            for together in _launches(layers):
                _replace(result, together, self.weight_format, self.name)
        result.recompile()
        return PassResult(result, sum(map(len, groups.values())), refused.notes(), others.notes())

    def _layer(self, node: Node, changed: frozenset[Node]) -> Layer | str:
        """The layer that a node is, or why it is left alone; '' where it is none for this pass."""
        x, weight, bias = argument(node, 0, "input"), argument(node, 1, "weight"), argument(node, 2, "bias")
        values = [tensor_of(each) for each in (x, weight, node)]
        if values[0] is None or values[1] is None or values[2] is None:
            return "what it reads was not recorded"
        given, rows, out = values
        if not (given.is_cpu and rows.is_cpu):
            return ""
        if given.dtype not in _DTYPES:
            return f"there is no CPU kernel for {str(given.dtype).removeprefix('torch.')}"
        offset = tensor_of(bias)
        kinds = {given.dtype, rows.dtype, out.dtype} | ({offset.dtype} if offset is not None else set())
        if len(kinds) > 1:
            return "its operands are of several types, or it is cast by autocast"
        if self.weight_format != "same" and _scores(node):
            return "its outputs are scores, which are not rounded"
        if rows.dim() != 2 or given.dim() < 1 or not rows.is_contiguous():
            return "its weight is not a matrix of contiguous rows"
        operands = (weight, bias) if isinstance(bias, Node) else (weight,)
        if any(each.op not in ("placeholder", "get_attr") for each in operands):
            return "its weight is computed in the graph"
        if changed & {x, *operands}:
            return "what it reads is changed in place"
        tokens = 1
        for size in given.shape[:-1]:
            tokens *= size if isinstance(size, int) else 1  # a symbolic size may be small: the operator looks
        if self.weight_format == "same" and tokens > operators.MOST_TOKENS:
            return f"{tokens} tokens are a matrix product"
        return Layer(node, x, weight, bias if isinstance(bias, Node) else None)

    def _unavailable(self) -> str | None:
        """Why there is no kernel; int8 is asked for, so it is had in torch operators as well."""
        try:
            operators.load()
        except operators.Unavailable as error:
            return str(error) if self.weight_format == "same" else None
        return None


def _scores(node: Node) -> bool:
    """Whether a layer's outputs are scores, a router's for one: nobody asks for those to be rounded."""
    users = [user for each in node.users for user in (each.users if meaning(each) == "cast" else (each,))]
    return any(meaning(user) in ("softmax", "sigmoid", "topk") for user in users)


def _launches(layers: list[Layer]) -> list[list[Layer]]:
    """Layers that read one x, by what can be launched together: the operands must be there where the first layer stands."""
    order = {node: position for position, node in enumerate(layers[0].node.graph.nodes)}
    together, alone, start = layers[:1], [], order[layers[0].node]
    for layer in layers[1:]:
        operands = [each for each in (layer.weight, layer.bias) if each is not None]
        if all(each.op == "get_attr" or order[each] < start for each in operands):
            together.append(layer)
        else:
            alone.append([layer])
    return [together, *alone]


def _replace(result: GraphModule, layers: list[Layer], weight_format: str, step: str) -> None:
    graph, start = result.graph, layers[0].node
    order = {node: position for position, node in enumerate(graph.nodes)}
    for layer in layers:  # torch.export puts an attribute before its reader
        for each in (layer.weight, layer.bias):
            if each is not None and order[each] > order[start]:
                start.prepend(each)
    with graph.inserting_before(start):
        operands = ([layer.weight for layer in layers], [layer.bias for layer in layers])
        call: Any = graph.call_function(linears.linears, (layers[0].x, *operands, weight_format))
        inherit(call, start, step, *(layer.node for layer in layers[1:]))
        record_value(call, [tensor_of(layer.node) for layer in layers])
        for index, layer in enumerate(layers):
            item = inherit(graph.call_function(operator.getitem, (call, index)), layer.node, step)
            layer.node.replace_all_uses_with(item)
    for layer in layers:
        graph.erase_node(layer.node)
