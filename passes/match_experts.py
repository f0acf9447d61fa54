"""Match experts:  expert_ffn(x, ids, w, ...) -> moe_ffn(x, ids, w, ...), with unit weights left out."""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from .. import lowered
from ..ops import expert_ffn
from .base import PassResult, clone
from .nodes import Refusals, erase_unread, inherit, meaning, site_of, tensor_of, written

EXPERT_FFN = expert_ffn._opoverload


class MatchExperts:
    """Put each routed FFN into the one form that the later passes complete and lower."""

    name = "match_experts"
    requires: frozenset[str] = frozenset({"folded"})
    ensures = frozenset({"moe_ffn"})

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """The graph with a ``moe_ffn`` for each ``expert_ffn``; one whose K is not known is left, with the reason."""
        result, found, refused = clone(graph_module), 0, Refusals("stays expert_ffn")
        changed = written(result.graph)
        for node in list(result.graph.nodes):
            if node.op != "call_function" or node.target not in (EXPERT_FFN, EXPERT_FFN.overloadpacket):
                continue
            x, ids, weights, up, down, up_bias, down_bias, activation, gated = node.args
            top_k = _known(tensor_of(ids))
            if top_k is None:
                refused.add(node, "how many experts are chosen is not known at compile time")
                continue
            operands = dict.fromkeys(lowered.OPERANDS)
            operands.update(
                x=x, ids=ids,
                weights=None if weights not in changed and _unit(weights) else weights,
                up=up, down=down, up_bias=up_bias,
                down_bias=down_bias, top_k=top_k, score="none", normalise=False, activation=activation,
                gated=gated, weight_format="same", backend="torch",
            )  # fmt: skip
            with result.graph.inserting_before(node):
                new = result.graph.call_function(lowered.moe_ffn, tuple(operands.values()))
            inherit(new, node, self.name)
            new.meta["moecompile_site"] = site_of(node)
            node.replace_all_uses_with(new)
            result.graph.erase_node(node)
            erase_unread(result.graph, [weights])
            found += 1
        result.recompile()
        return PassResult(result, found, refused=refused.notes())


def _known(ids: Tensor | None) -> int | None:
    """K of (T, K) ids. Where it is symbolic (FSDP's modules: their numbers are) it is fixed, and TorchDynamo guards on it."""
    if ids is None:
        return None
    try:
        return int(ids.shape[-1])
    except GuardOnDataDependentSymNode:
        return None


def computed_weights(node: Node) -> str | None:
    """Why no packed copy of a block's weights may be kept, or None: one is computed in the graph, anew in each call."""
    operands = operands_of(node)
    for name in ("up", "down", "shared_gate", "shared_up", "shared_down"):
        weight = operands[name]
        if isinstance(weight, Node) and weight.op not in ("placeholder", "get_attr"):
            return f"{name} is computed in the graph (node {weight.name}), by autocast for one"
    return None


def _unit(weights: object) -> bool:
    """Whether every routing weight is one: a split FFN's gates are binary."""
    while meaning(weights) == "cast":
        weights = weights.args[0]  # type: ignore[attr-defined]
    return meaning(weights) == "ones"


def moe_nodes(graph_module: GraphModule) -> list[Node]:
    """The ``moe_ffn`` nodes of a graph, in order."""
    return [n for n in graph_module.graph.nodes if n.op == "call_function" and n.target is lowered.moe_ffn]


def operands_of(node: Node) -> dict[str, object]:
    """A ``moe_ffn`` node's operands by name."""
    return dict(zip(lowered.OPERANDS, node.args, strict=True))


def set_operands(node: Node, step: str, **values: object) -> None:
    """Change some of a ``moe_ffn`` node's operands, and note which pass did."""
    operands = operands_of(node)
    operands.update(values)
    node.args = tuple(operands.values())  # type: ignore[assignment]
    node.meta["moecompile"] = {"pass": step, "from": (node.name,)}
