"""Moving and comparing nodes: what a node depends on, whether it may be moved, and when two nodes compute the same."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Graph, Node

from .nodes import argument, aten, meaning

_RANDOM = ("dropout", "rand", "rand_like", "randn", "randn_like", "randint", "bernoulli", "multinomial", "normal")
_ATTENTION = (torch.nn.functional.scaled_dot_product_attention, aten.scaled_dot_product_attention.default)


def ancestors(nodes: Iterable[Node]) -> set[Node]:
    """Everything that nodes depend on, themselves included."""
    found: set[Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def is_random(node: Node) -> bool:
    """Whether an operator draws random numbers; a dropout that is off does not."""
    if meaning(node) == "dropout":
        return bool(argument(node, 2, "training", True)) and argument(node, 1, "p", 0.5) != 0.0
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target in _ATTENTION:
        return argument(node, 4, "dropout_p", 0.0) != 0.0
    tags = getattr(node.target, "tags", ())
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return torch.Tag.nondeterministic_seeded in tags or str(name).split(".")[0] in _RANDOM


def to_the_front(graph: Graph, nodes: list[Node]) -> int:
    """Move nodes and all that they depend on above everything else; returns how many changed places with another node."""
    wanted = ancestors(nodes)
    anchor = next((n for n in graph.nodes if n.op not in ("placeholder", "get_attr") and n not in wanted), None)
    if anchor is None:
        return 0
    moved, behind = 0, False
    for node in list(graph.nodes):
        behind = behind or node is anchor
        if behind and node in wanted and node.op != "placeholder":
            anchor.prepend(node)
            moved += node.op != "get_attr"
    return moved


def node_key(node: Node) -> Any:
    """Equal for nodes that compute the same; None where an argument cannot be compared."""

    def frozen(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return tuple(frozen(item) for item in value)
        if isinstance(value, slice):  # (not hashable before Python 3.12)
            return slice, frozen(value.start), frozen(value.stop), frozen(value.step)
        if isinstance(value, dict):
            return tuple(sorted((name, frozen(item)) for name, item in value.items()))
        return (type(value), value) if not isinstance(value, Node) else value

    key = (node.op, node.target, frozen(node.args), frozen(node.kwargs))
    try:
        hash(key)
    except TypeError:
        return None
    return key
