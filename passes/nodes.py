"""Reading graphs of either origin: what a node computes, whether TorchDynamo (torch functions, methods) or torch.export (ATen)
wrote it. Passes ask for a meaning (``linear``) and never for a spelling."""

from __future__ import annotations

import functools
import inspect
import operator
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

aten = torch.ops.aten
functional = torch.nn.functional

_SPELLINGS: dict[str, tuple[object, ...]] = {
    "linear": (functional.linear, torch._C._nn.linear, aten.linear.default),
    "topk": (torch.topk, "topk", aten.topk.default),
    "softmax": (functional.softmax, torch.softmax, "softmax", aten.softmax.int, aten._softmax.default),
    "sigmoid": (torch.sigmoid, functional.sigmoid, "sigmoid", aten.sigmoid.default),
    "add": (operator.add, torch.add, "add", aten.add.Tensor),
    "iadd": (operator.iadd, "add_", aten.add_.Tensor),
    "mul": (operator.mul, torch.mul, "mul", aten.mul.Tensor),
    "div": (operator.truediv, torch.div, "div", aten.div.Tensor),
    "idiv": (operator.itruediv, "div_", aten.div_.Tensor),
    "sum": (torch.sum, "sum", aten.sum.dim_IntList),
    "item": (operator.getitem,),
    "ones": (torch.ones_like, torch.ones, "new_ones", aten.ones_like.default, aten.ones.default, aten.new_ones.default),
    "cast": ("to", "type", "float", "half", "bfloat16", "double", aten.to.dtype, aten._to_copy.default),
    "dropout": (functional.dropout, torch.dropout, aten.dropout.default),
    "expand": ("expand", aten.expand.default),
    "attention": (functional.scaled_dot_product_attention, aten.scaled_dot_product_attention.default),
    "reshape": (
        "reshape",
        "view",
        "flatten",
        torch.reshape,
        torch.flatten,
        aten.view.default,
        aten.reshape.default,
    ),
}
_MEANING = {spelling: meaning for meaning, spellings in _SPELLINGS.items() for spelling in spellings}


def meaning(node: object) -> str:
    """What a node computes, a key of the table above; empty when it is something else."""
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return ""
    return _MEANING.get(node.target, "")


def value_of(node: object) -> Any:
    """The fake tensor (or other value) that the tracer recorded for a node, or None."""
    return (node.meta.get("example_value", node.meta.get("val"))) if isinstance(node, Node) else None


def tensor_of(node: object) -> Tensor | None:
    """As :func:`value_of`, where it is a tensor."""
    value = value_of(node)
    return value if isinstance(value, Tensor) else None


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument that may be given by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def through_casts(node: Any) -> Any:
    """The node below any casts that lose nothing; one to a narrower type rounds, and is kept."""
    while meaning(node) == "cast":
        before, after = tensor_of(node.args[0]), tensor_of(node)
        if before is None or after is None or torch.promote_types(before.dtype, after.dtype) != after.dtype:
            return node
        node = node.args[0]
    return node


def through_reshapes(node: Any) -> Any:
    """The node below reshapes that keep the last dimension, so that rows stay tokens."""
    while meaning(node) == "reshape":
        source, before, after = node.args[0], tensor_of(node.args[0]), tensor_of(node)
        if before is None or after is None or before.dim() == 0 or after.dim() == 0:
            return node
        if before.shape[-1] != after.shape[-1] or before.dtype != after.dtype:
            return node
        node = source
    return node


def site_of(node: Node) -> str:
    """The module path that a node was traced in, as users know it; its own name where the tracer recorded none."""
    if "moecompile_site" in node.meta:
        return str(node.meta["moecompile_site"])
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(entry[0] if isinstance(entry, tuple) else entry) for entry in stack.values()]
    for path in reversed(paths):
        clean = readable(path)
        if clean:
            return clean.removesuffix(".experts")
    return node.name


def readable(path: str) -> str:
    """``L['self']._modules['model'].layers.0.mlp`` -> ``model.layers.0.mlp``."""
    for old, new in (("L['", ""), ("']._modules['", "."), ("._modules['", "."), ("']", ""), ("['", ".")):
        path = path.replace(old, new)
    path = re.sub(r"getattr\((.+), '(\w+)'\)", r"\1.\2", path)
    parts = path.split(".")
    while parts and parts[0] in ("self", "target", "module", "fn", "_orig_mod", ""):
        parts = parts[1:]
    return ".".join(parts)


def inherit(new: Node, old: Node, step: str, *also: Node) -> Node:
    """Give a new node the metadata of the one that it replaces, and note which pass made it of what."""
    for key in ("example_value", "val", "tensor_meta", "nn_module_stack", "source_fn_stack", "stack_trace", "moecompile_site"):
        if key in old.meta and key not in new.meta:
            new.meta[key] = old.meta[key]
    new.meta["moecompile"] = {"pass": step, "from": tuple(node.name for node in (old, *also))}
    return new


def record_value(node: Node, value: Any) -> None:
    """Say what a node makes, where that is not what the node that it replaces made."""
    node.meta["example_value"] = node.meta["val"] = value
    node.meta.pop("tensor_meta", None)


class Refusals:
    """Why a pass left nodes alone: the first place and the number of the others, for each reason.

    Args:
        what: what becomes of them.
    """

    def __init__(self, what: str = "stays torch's") -> None:
        self._what = what
        self._count, self._first = Counter[str](), dict[str, str]()

    def add(self, node: Node, reason: str) -> None:
        """One more node that is left alone."""
        self._count[reason] += 1
        self._first.setdefault(reason, f"{site_of(node)}: node {node.name}")

    def notes(self) -> tuple[str, ...]:
        """A line for each reason."""
        return tuple(
            f"{self._first[reason]}{f' and {count - 1} more' if count > 1 else ''}: {self._what}: {reason}"
            for reason, count in self._count.items()
        )


# Methods whose result may share memory with what they are called on.
_VIEWS = frozenset(
    [
        "slice",
        "alias",
        "diagonal",
        "unfold",
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "transpose",
        "permute",
        "t",
        "T",
        "squeeze",
        "unsqueeze",
        "expand",
        "detach",
        "contiguous",
        "narrow",
        "select",
        "chunk",
        "split",
        "unbind",
        "view_as",
        "to",
        "type",
        "float",
        "half",
        "bfloat16",
        "double",
        "__getitem__",
        "as_strided",
        "movedim",
        "swapaxes",
        "mT",
    ]
)


def _name(target: Any) -> str:
    if isinstance(target, str):
        return target
    packet = getattr(target, "overloadpacket", None)
    return str(getattr(packet or target, "__name__", ""))


def writes(node: Node) -> bool:
    """Whether an operator changes what it is given: ``mul_``, ``+=``, ``x[i] = y``, ``inplace=True``, ``out=``, or a custom
    operator whose schema says so."""
    return bool(overwritten(node))


def overwritten(node: Node) -> list[Node]:
    """The operands that an operator changes."""
    if node.op not in ("call_function", "call_method"):
        return []
    first, place, marked = _habits(node.target)
    found: list[Any] = [node.kwargs["out"]] if "out" in node.kwargs else []
    asked = node.kwargs.get("inplace", place is not None and len(node.args) > place and node.args[place])
    if first or asked is not False:
        found += [node.args[0] if node.args else next(iter(node.kwargs.values()), None)]
    found += [argument(node, position, name) for position, name in marked]
    flat = [each for value in found for each in (value if isinstance(value, (list, tuple)) else (value,))]
    return [each for each in flat if isinstance(each, Node)]


@functools.lru_cache(maxsize=4096)
def _habits(target: Any) -> tuple[bool, int | None, tuple[tuple[int, str], ...]]:
    """What an operator writes to: always its first operand, by its spelling; that one where the argument at a position,
    ``inplace``, says so; and the arguments, positions and names, that its schemas mark."""
    name = _name(target)
    first = (name.endswith("_") and not name.endswith("__")) or target in _IN_PLACE
    if isinstance(target, torch._ops.OpOverloadPacket):
        schemas = [getattr(target, each)._schema for each in target.overloads()]
    else:
        schemas = [target._schema] if isinstance(target, torch._ops.OpOverload) else []
    marked = dict.fromkeys(
        (sys.maxsize if each.kwarg_only else position, each.name)
        for schema in schemas
        for position, each in enumerate(schema.arguments)
        if each.alias_info is not None and each.alias_info.is_write
    )
    try:
        names = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # built in, or a method's name
        names = []
    return first, names.index("inplace") if "inplace" in names else None, tuple(marked)


_IN_PLACE: frozenset[object] = frozenset(
    getattr(operator, name)
    for name in ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior")
)


def written(graph: Graph, allowed: Iterable[Node] = ()) -> frozenset[Node]:
    """The nodes whose memory some operator writes to, those that share it included. Passes do not move what reads them.

    Args:
        allowed: writing nodes that do not count, because the caller knows what they do.
    """
    known = set(allowed)
    found: set[Node] = set()
    for node in graph.nodes:
        pending = [] if node in known else [shared_base(each) for each in overwritten(node)]
        while pending:
            each = pending.pop()
            if each in found:
                continue
            found.add(each)
            pending += [user for user in each.users if each in _below(user)]
    return frozenset(found)


def shared_base(node: Any, known: Collection[Node] = ()) -> Any:
    """The first of the nodes whose memory a node may share, or the first ``known`` one on the way to it."""
    while isinstance(node, Node) and node not in known and (below := _below(node)):
        node = below[0]
    return node


def _below(node: Node) -> list[Node]:
    """The operands whose memory a node's result may be."""
    if _shares(node):
        return [node.args[0]] if isinstance(node.args[0], Node) else []
    return overwritten(node)


def _shares(node: Node) -> bool:
    """Whether a node's result may be a view of its first operand."""
    return node.op in ("call_function", "call_method") and bool(node.args) and _name(node.target) in _VIEWS | {"getitem"}


# Removed when nothing reads them. In-place spellings and unknown operators are not in it: they may write somewhere.
_PURE = frozenset(_SPELLINGS) - {"iadd", "idiv"}


def is_unread(node: Node) -> bool:
    """Whether nothing reads a node, and it is known to write nowhere."""
    return not node.users and meaning(node) in _PURE and not writes(node)


def erase_unread(graph: Graph, nodes: Iterable[Any]) -> int:
    """Erase nodes that nothing reads, and in turn what only they read; returns how many."""
    pending, erased = [n for n in nodes if isinstance(n, Node)], 0
    while pending:
        node = pending.pop()
        if node._erased or not is_unread(node):
            continue
        sources = node.all_input_nodes
        graph.erase_node(node)
        erased += 1
        pending += sources
    return erased
