"""Lower attention:  scaled_dot_product_attention(q, k, v, mask)  ->  attend(q, k, v, mask, scale, causal)  on the CPU.

Decoding asks one query of every key. Torch's attention is made for many: 110 us a layer for 9 heads and 129 keys, which
should take 5. The operator's kernel reads keys and values once for all heads that share them, so keys that were repeated for
their heads are taken as they were. Many queries are torch's, but for bfloat16 where the CPU multiplies pairs of such numbers.
Graphs without a MoE layer are Inductor's alone.
"""

from __future__ import annotations

import math

import torch
from torch.fx import GraphModule, Node

from .. import attention
from ..codegen import operators
from .base import PassResult, clone
from .match_experts import moe_nodes
from .nodes import Refusals, argument, inherit, meaning, record_value, tensor_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class LowerAttention:
    """Choose the generated kernels for attention of few queries, and of many in bfloat16."""

    name = "lower_attention"
    requires = frozenset({"block"})
    ensures = frozenset({"attention"})

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """The graph with attention lowered; the reasons for what is left are counted in the notes."""
        if not moe_nodes(graph_module):
            return PassResult(graph_module, 0)
        result, changed, refused = clone(graph_module), 0, Refusals()
        for node in [each for each in result.graph.nodes if meaning(each) == "attention"]:
            reason = _objection(node)
            if reason is None:
                try:
                    operators.load()
                except operators.Unavailable as error:
                    return PassResult(graph_module, 0, (f"attention stays torch's: {error}",))
                _replace(node, self.name)
                changed += 1
            elif reason:
                refused.add(node, reason)
        result.recompile()
        return PassResult(result, changed, refused.notes())


def _objection(node: Node) -> str | None:
    """Why an attention is left alone ('' where it is none for this pass), or None."""
    values = [tensor_of(argument(node, place, name)) for place, name in enumerate(("query", "key", "value"))]
    if values[0] is None or values[1] is None or values[2] is None:
        return "what it reads was not recorded"
    query, key, value = values
    if not query.is_cpu:
        return ""
    queries = query.shape[-2] if query.dim() == 4 else 0
    mask, causal = argument(node, 3, "attn_mask"), argument(node, 5, "is_causal", False)
    few = isinstance(queries, int) and queries <= operators.MOST_QUERIES and causal is False
    if query.dim() == 4 and not few and (query.dtype != torch.bfloat16 or mask is not None or not operators.pairs()):
        return ""  # a prompt
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        return "its operands do not have four dimensions"
    if query.dtype not in _DTYPES:
        return f"there is no CPU kernel for {str(query.dtype).removeprefix('torch.')}"
    if {query.dtype, key.dtype, value.dtype} != {query.dtype}:
        return "its operands are of several types"
    if argument(node, 4, "dropout_p", 0.0) != 0.0:
        return "it has dropout"
    if not isinstance(causal, bool):
        return "whether it is causal is computed in the graph"
    heads, groups = query.shape[1], key.shape[1]
    if not isinstance(heads, int) or not isinstance(groups, int) or heads % groups or str(value.shape[1]) != str(groups):
        return "its heads are not known to fit"
    if str(query.shape[0]) != str(key.shape[0]) or str(value.shape[0]) != str(key.shape[0]):
        return "its batch is broadcast"
    if not isinstance(query.shape[3], int) or query.shape[3] != key.shape[3]:
        return "its head sizes are not known to fit"
    allowed = tensor_of(mask)
    if mask is not None and (allowed is None or allowed.dtype not in (torch.bool, torch.float32, query.dtype)):
        return "its mask is of another type"
    scale = argument(node, 6, "scale")
    if scale is not None and not isinstance(scale, (int, float)):
        return "its scale is computed in the graph"
    return None


def _replace(node: Node, step: str) -> None:
    query, key, value = (argument(node, place, name) for place, name in enumerate(("query", "key", "value")))
    mask, causal, scale = argument(node, 3, "attn_mask"), argument(node, 5, "is_causal", False), argument(node, 6, "scale")
    own, graph = _meta(node), node.graph
    if scale is None:
        scale = 1 / math.sqrt(_meta(query).shape[-1])
    plain = [_unrepeated(each) for each in (key, value)]
    if plain[0] is not None and plain[1] is not None:
        key, value = plain[0], plain[1]
    with graph.inserting_before(node):
        call = inherit(graph.call_function(attention.attend, (query, key, value, mask, float(scale), causal)), node, step)
        record_value(call, own.new_empty([own.shape[at] for at in (0, 2, 1, 3)]))
        turned = inherit(graph.call_function(torch.transpose, (call, 1, 2)), node, step)
        record_value(turned, _meta(call).transpose(1, 2))
    node.replace_all_uses_with(turned)
    graph.erase_node(node)


def _meta(node: Node) -> torch.Tensor:
    found = tensor_of(node)
    assert found is not None  # checked by _objection
    return found


def _unrepeated(node: object) -> Node | None:
    """x (B, G, S, E) where the node is  x[:, :, None].expand(B, G, n, S, E).reshape(B, G n, S, E),  as models write it."""
    if meaning(node) != "reshape":
        return None
    assert isinstance(node, Node)
    expanded = node.args[0]
    if meaning(expanded) != "expand":
        return None
    assert isinstance(expanded, Node)
    inserted = expanded.args[0]
    if not (isinstance(inserted, Node) and meaning(inserted) == "item" and isinstance(inserted.args[0], Node)):
        return None
    everything = slice(None)
    if inserted.args[1] not in ((everything, everything, None), (everything, everything, None, everything, everything)):
        return None
    x = inserted.args[0]
    values = [tensor_of(each) for each in (x, expanded, node)]
    if values[0] is None or values[1] is None or values[2] is None:
        return None
    batch, groups, keys, size = map(str, values[0].shape)
    wide, flat = list(map(str, values[1].shape)), list(map(str, values[2].shape))
    repeats = values[1].shape[2] if len(wide) == 5 else None
    if not isinstance(repeats, int) or wide != [batch, groups, str(repeats), keys, size]:
        return None
    return x if flat == [batch, str(int(values[0].shape[1]) * repeats), keys, size] else None
