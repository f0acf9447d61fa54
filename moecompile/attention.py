"""The operator of attention: what ``passes/lower_attention.py`` lowers to. Inference only.

    attend:  y[b, l, h] = sum_s softmax_s(scale q[b, h, l] . k[b, g, s] + mask[b, h, l, s]) v[b, g, s],   g = h / (H / G)

Letters: B batch, H query heads, G key heads, L queries, S keys, E head size. On the CPU generated kernels compute it
for few queries, and for prompts in bfloat16 where the CPU multiplies pairs of such numbers
(:mod:`moecompile.codegen.operators`); torch's own attention is the specification and the fallback.
"""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("moecompile", "FRAGMENT")
_library.define("attend(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, bool causal) -> Tensor")


def attend_reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """Attention in torch's operators.

    Args:
        query: (B, H, L, E) float32, bfloat16 or float16.
        key: (B, G, S, E), H a multiple of G, dtype of query.
        value: (B, G, S, E'), dtype of query.
        mask: broadcasts to (B, H, L, S): bool, True may be read, or numbers that are added; None: every key may be read.
        scale: what scores are multiplied with.
        causal: query l reads keys 0 to l alone; without a mask.

    Returns:
        (B, L, H, E'), contiguous, dtype of query; 0 where a query may read nothing.
    """
    groups = key.shape[1] != query.shape[1]
    y = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, 0.0, causal, scale=scale, enable_gqa=groups)
    return y.transpose(1, 2).contiguous()


def _fake(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    batch, heads, queries, _ = query.shape
    return query.new_empty((batch, queries, heads, value.shape[-1]))


_library.impl("attend", attend_reference, "CompositeExplicitAutograd")
torch.library.register_fake("moecompile::attend", _fake, lib=_library)

attend = torch.ops.moecompile.attend.default
