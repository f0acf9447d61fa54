"""Dead code:  remove what nothing reads, where it is known to write nowhere."""

from __future__ import annotations

from torch.fx import GraphModule

from .base import PassResult, clone
from .nodes import erase_unread, is_unread


class DeadCode:
    """Only operators known to be pure go: a KV cache is written by operators whose result nobody reads."""

    name = "dead_code"
    requires: frozenset[str] = frozenset()
    ensures = frozenset({"live"})

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """The graph without unread pure nodes; placeholders stay, they are the calling convention."""
        if not any(is_unread(node) for node in graph_module.graph.nodes):
            return PassResult(graph_module, 0)
        result = clone(graph_module)
        erased = erase_unread(result.graph, reversed(list(result.graph.nodes)))
        result.recompile()
        return PassResult(result, erased)
