"""Outline equal layers:  thirty times the same stretch of operators  ->  one subgraph, called thirty times.

Layers of a transformer differ in their weights alone. Behind TorchDynamo everything that a compiler does to a graph then takes
thirty times as long as it need; a subgraph is traced, lowered and compiled once. What is lost is fusion across the border
between two layers, one row of hidden_size numbers per token.
"""

from __future__ import annotations

import operator
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from .base import PassResult, clone
from .nodes import overwritten, readable, shared_base, value_of

invoke_subgraph = torch.ops.higher_order.invoke_subgraph

# Fewer equal layers than this are left inline.
LEAST = 3
# Operators that change how what follows them is run: they may not be moved into a subgraph.
_MODES = ("_enter_autocast", "_exit_autocast", "_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode")


@dataclass
class _Stretch:
    """The operators of one layer, in order, and what they read from outside, in order of first use."""

    place: str
    nodes: list[Node]
    operands: list[Node] = field(default_factory=list)
    results: list[Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        own, seen = set(self.nodes), dict[Node, None]()
        for node in self.nodes:
            seen.update(dict.fromkeys(source for source in _sources(node) if source not in own))
        self.operands = list(seen)
        self.results = [node for node in self.nodes if any(user not in own for user in node.users)]


class OutlineLayers:
    """Equal layers become calls of one subgraph (the ``invoke_subgraph`` operator of torch).

    Layers are found by the module paths that the tracer recorded (``model.layers.3``) and are equal when their operators,
    constants, shapes, strides and dtypes are. Layers that write into what they are given (a static KV cache), return views
    of it or switch autocast on or off stay as they are.
    """

    name = "outline_layers"
    requires: frozenset[str] = frozenset()
    ensures = frozenset({"outlined"})

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """The graph with equal layers outlined."""
        prefix, stretches, between = _layers(graph_module.graph)
        groups = [group for group in _equal(stretches) if len(group) >= LEAST]
        if not groups:
            return PassResult(graph_module, 0)
        if mode := next((node for node in between if _changes_mode(node)), None):
            return PassResult(
                graph_module, 0, (f"{prefix}: layers stay inline: {mode.name} changes how what follows it is run",)
            )
        objections = [_objection(group[0]) for group in groups]
        notes = [f"{prefix}: layers stay inline: {reason}" for reason in objections if reason]
        chosen = [group for group, reason in zip(groups, objections, strict=True) if not reason]
        if not chosen:
            return PassResult(graph_module, 0, tuple(notes))
        result = clone(graph_module)
        places = {node.name: node for node in result.graph.nodes}
        changed = 0
        for number, group in enumerate(chosen):
            copies = [(s.place, [places[node.name] for node in s.nodes]) for s in group]
            changed += _outline(result, copies, f"{self.name}_{number}", self.name)
        result.recompile()
        return PassResult(result, changed, tuple(notes))


def _sources(node: Node) -> Iterator[Node]:
    """The nodes that a node reads, in the order of its arguments, repeats included."""
    found: list[Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return iter(found)


# find


def _changes_mode(node: Node) -> bool:
    return getattr(node.target, "__name__", "") in _MODES


def _layers(graph: Graph) -> tuple[str, list[_Stretch], list[Node]]:
    """The numbered modules with the most operators below them, the stretch of each, all nodes from first to last."""
    numbered: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    order = list(graph.nodes)
    for position, node in enumerate(order):
        if node.op in ("call_function", "call_method", "call_module") and (found := _numbered(node)):
            numbered[found[0]][found[1]].append(position)
    if not numbered:
        return "", [], []
    prefix = max(numbered, key=lambda each: sum(map(len, numbered[each].values())))
    spans = sorted((min(at), max(at), number) for number, at in numbered[prefix].items())
    stretches = []
    for index, (first, last, number) in enumerate(spans):
        if index and spans[index - 1][1] >= first:
            return prefix, [], []  # interleaved
        inside = [node for node in order[first : last + 1] if node.op not in ("placeholder", "get_attr", "output")]
        stretches.append(_Stretch(f"{prefix}.{number}", inside))
    return prefix, stretches, order[spans[0][0] : spans[-1][1] + 1]


def _numbered(node: Node) -> tuple[str, int] | None:
    """(``model.layers``, 3) for an operator below ``model.layers.3``; the outermost number counts."""
    for entry in (node.meta.get("nn_module_stack") or {}).values():
        path = readable(str(entry[0] if isinstance(entry, tuple) else entry))
        if match := re.match(r"(.+?)\.(\d+)(\.|$)", path):
            return match[1], int(match[2])
    return None


# compare


def _equal(stretches: list[_Stretch]) -> list[list[_Stretch]]:
    """Groups of equal stretches."""
    groups: list[list[_Stretch]] = []
    for stretch in stretches:
        group = next((group for group in groups if _same(group[0], stretch)), None)
        if group is None:
            groups.append([stretch])
        else:
            group.append(stretch)
    return groups


def _same(first: _Stretch, second: _Stretch) -> bool:
    """Whether one subgraph can stand for both."""
    counts = [(len(s.nodes), len(s.operands)) for s in (first, second)]
    if counts[0] != counts[1]:
        return False
    numbers = [{node: number for number, node in enumerate([*s.operands, *s.nodes])} for s in (first, second)]
    if [numbers[0][node] for node in first.results] != [numbers[1][node] for node in second.results]:
        return False
    if any(_facts(a) != _facts(b) for a, b in zip(first.operands, second.operands, strict=True)):
        return False
    for a, b in zip(first.nodes, second.nodes, strict=True):
        if a.op != b.op or a.target != b.target:
            return False
        left, right = (
            map_arg((n.args, n.kwargs), lambda s, of=of: _Number(of[s])) for n, of in zip((a, b), numbers, strict=True)
        )
        if not _alike(left, right) or _facts(a) != _facts(b):
            return False
    return True


@dataclass(frozen=True)
class _Number:
    """A node in an argument, by its number within a stretch."""

    value: int


def _alike(a: Any, b: Any) -> bool:
    """Equality of arguments that does not take True for 1 or -0.0 for 0.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_alike(a[key], b[key]) for key in a)
    if isinstance(a, slice):
        return _alike((a.start, a.stop, a.step), (b.start, b.stop, b.step))
    if isinstance(a, float):
        return repr(a) == repr(b)
    return a is b or bool(a == b)


def _facts(node: Node) -> Any:
    """What must be equal of the values of two nodes; symbolic sizes by their expressions."""

    def facts(value: Any) -> Any:
        if isinstance(value, Tensor):
            strides = value.stride() if value.layout == torch.strided else ()
            sizes = (*map(str, value.shape), "|", *map(str, strides), "|", str(value.storage_offset() if strides else 0))
            return type(value), value.dtype, value.device, value.layout, value.requires_grad, sizes
        if isinstance(value, (tuple, list)):
            return tuple(map(facts, value))
        return type(value), str(value)

    return facts(value_of(node))


def _objection(stretch: _Stretch) -> str | None:
    """Why a stretch cannot be a subgraph, or None."""
    own = set(stretch.nodes)
    for node in stretch.nodes:
        if node.op == "call_module":
            return f"{node.name} calls a module"
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return f"{node.name} has a graph of its own"
        mutable = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        if mutable or any(shared_base(each) not in own for each in overwritten(node)):
            return f"{node.name} writes into what the layer is given"
    bases = [shared_base(node) for node in stretch.results]
    if any(base not in own for base in bases) or len(set(bases)) < len(bases):
        return "it returns a view of what it is given, or one thing twice"
    for node in (*stretch.operands, *stretch.results):
        if not isinstance(value_of(node), (Tensor, torch.SymInt)):
            return f"{node.name}, which it reads or makes, is neither a tensor nor a size"
    if not all(isinstance(value_of(node), Tensor) for node in stretch.results):
        return "it makes a size that is read outside"
    return None


# rewrite


def _outline(result: GraphModule, group: list[tuple[str, list[Node]]], name: str, step: str) -> int:
    """Replace equal stretches, (place, operators) each, by calls of the first one's operators; returns how many."""
    body = _body(_Stretch(*group[0]))
    while hasattr(result, name):
        name += "_"
    result.add_module(name, body)
    graph = result.graph
    for place, nodes in group:
        stretch = _Stretch(place, nodes)  # what it reads may have become the result of a call
        following = stretch.nodes[-1].next
        with graph.inserting_before(following):
            subgraph = graph.get_attr(name)
            call = graph.call_function(invoke_subgraph, (subgraph, name, *stretch.operands))
            values, inside = tuple(value_of(node) for node in stretch.results), set(stretch.nodes)
            call.meta["example_value"] = values
            call.meta["moecompile"] = {"pass": step, "from": (stretch.place,)}
            if "nn_module_stack" in stretch.nodes[0].meta:
                call.meta["nn_module_stack"] = stretch.nodes[0].meta["nn_module_stack"]
            for index, (node, value) in enumerate(zip(stretch.results, values, strict=True)):
                item = graph.call_function(operator.getitem, (call, index))
                item.meta.update(node.meta)
                item.meta["example_value"] = value
                node.replace_all_uses_with(item, delete_user_cb=lambda user, inside=inside: user not in inside)
        for node in reversed(stretch.nodes):
            graph.erase_node(node)
    return len(group)


def _body(stretch: _Stretch) -> GraphModule:
    """The subgraph: operands -> a tuple of results."""
    graph, new = Graph(), dict[Node, Node]()
    for number, operand in enumerate(stretch.operands):
        new[operand] = graph.placeholder(f"operand_{number}")
        new[operand].meta["example_value"] = value_of(operand)
    for node in stretch.nodes:
        new[node] = graph.node_copy(node, new.__getitem__)
    graph.output(tuple(new[node] for node in stretch.results))
    return GraphModule({}, graph)
