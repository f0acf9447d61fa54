"""Split FFNs into experts:  W_down (act(W_gate x) * (W_up x))  ->  moe_block(x), the block of the plan."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Graph, GraphModule, Node

from ..block import MoEFFN
from ..match import Match
from ..match.nodes import ASSERTS
from .base import PassError, PassResult, clone


class SplitFFN:
    """Replace each matched FFN by a call of its MoE block.

    Args:
        matches: the FFNs; their nodes are found again by name.
        blocks: a block for each.
    """

    name = "split_ffn"
    requires: frozenset[str] = frozenset()
    ensures = frozenset({"moe"})

    def __init__(self, matches: Sequence[Match], blocks: Sequence[MoEFFN]) -> None:
        self.matches, self.blocks = tuple(matches), tuple(blocks)

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """The graph with a ``call_module`` node for each FFN; the block carries its own parameters.

        Raises:
            PassError: a matched node is not in this graph.
        """
        result = clone(graph_module)
        nodes = {node.name: node for node in result.graph.nodes}
        for number, (match, block) in enumerate(zip(self.matches, self.blocks, strict=True)):
            x, out = nodes.get(match.x.name), nodes.get(match.out.name)
            if x is None or out is None:
                raise PassError(f"pass {self.name}: {match.site.name} is not in this graph")
            target = block_path(match, number)
            with result.graph.inserting_before(out):
                call = result.graph.create_node("call_module", target, (x,))
            call.meta = {
                key: out.meta[key] for key in ("val", "tensor_meta", "nn_module_stack", "stack_trace") if key in out.meta
            }
            call.meta["moecompile_site"] = match.site.name
            out.replace_all_uses_with(call)
            _erase(result.graph, out, {node.name for node in match.region})
            if not result.add_submodule(target, block):
                raise PassError(f"pass {self.name}: '{target}' cannot hold a module")
        result.graph.eliminate_dead_code()
        result.delete_all_unused_submodules()
        result.recompile()
        return PassResult(result, len(self.matches))


def _erase(graph: Graph, out: Node, region: set[str]) -> None:
    """Remove what computed ``out``. Dead-code elimination would keep it: inactive dropouts and assertions count as impure."""
    pending = [out]
    while pending:
        node = pending.pop()
        if not all(user.target in ASSERTS for user in node.users):
            continue
        for user in list(node.users):
            graph.erase_node(user)
        sources = node.all_input_nodes
        graph.erase_node(node)
        pending += [s for s in sources if (s.name in region or s.op == "get_attr") and s not in pending]


def block_path(match: Match, number: int) -> str:
    """Where a block sits in the rewritten module tree: where the live module has it, or a path of its own."""
    if match.site.placement is not None:
        return match.site.placement.block
    return f"moe_blocks.{number}"
