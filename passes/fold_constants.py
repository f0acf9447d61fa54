"""Fold what is constant:  x.to(x.dtype) -> x,  x.reshape(x.shape) -> x,  dropout(x, p, training=False) -> x."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from .base import PassResult, clone
from .nodes import argument, meaning, tensor_of, written


class FoldConstants:
    """Remove casts, reshapes and dropouts that change nothing, so that the passes behind see the algebra alone."""

    name = "fold_constants"
    requires: frozenset[str] = frozenset()
    ensures = frozenset({"folded"})

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """The graph without them; unchanged values are used directly."""
        result, folded = clone(graph_module), 0
        changed = written(result.graph)
        for node in list(result.graph.nodes):
            if _changes_nothing(node) and node not in changed and node.args[0] not in changed:
                node.replace_all_uses_with(node.args[0])
                result.graph.erase_node(node)
                folded += 1
        result.recompile()
        return PassResult(result, folded)


def _changes_nothing(node: Node) -> bool:
    if not node.args or not isinstance(node.args[0], Node):
        return False
    if meaning(node) == "cast":
        before, after = tensor_of(node.args[0]), tensor_of(node)
        return (
            before is not None
            and after is not None
            and before.dtype == after.dtype
            and before.device == after.device
            and len(node.args) <= 2  # neither a copy nor a memory format is asked for
            and set(node.kwargs) <= {"dtype"}
            and node.target is not torch.ops.aten._to_copy.default
        )
    if meaning(node) == "reshape":
        before, after = tensor_of(node.args[0]), tensor_of(node)
        return (
            before is not None
            and after is not None
            and before.dtype == after.dtype
            and before.dim() == after.dim()
            and all(_same(a, b) for a, b in zip(before.shape, after.shape, strict=True))
        )
    if meaning(node) == "dropout":
        return argument(node, 1, "p", 0.5) == 0 or argument(node, 2, "training", True) is False
    return False


def _same(a: Any, b: Any) -> bool:
    """Whether two sizes are equal as written: asking the solver took a minute on a graph of 30 layers."""
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return bool(a.node.expr == b.node.expr)
    return isinstance(a, int) and isinstance(b, int) and a == b
