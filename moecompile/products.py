"""Attention in plain matrix products, for bfloat16 on a CPU.

torch's flash kernel for the CPU takes 19 to 31 ms for 4 windows of 512 (9 heads of 64, bfloat16, two threads of a machine with
AVX-512 BF16), these products 13.5 ms; in float32 they are three times slower than the kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LIMIT_BYTES = 256 << 20  # of the scores of one window; torch's kernel, which holds none, takes longer ones


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What ``scaled_dot_product_attention`` gives, in bfloat16: (B, H, L, d), (B, H, M, d), (B, H, M, d) -> (B, H, L, d)."""
    mask = attn_mask
    if is_causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    plain = query.dim() == 4 and 2 * query.shape[1] * query.shape[2] * key.shape[2] <= _LIMIT_BYTES
    boolean = mask is None or (mask.dtype == torch.bool and bool(mask.any(-1).all()))  # a row of nothing would give nan
    if dropout_p or enable_gqa or not plain or not boolean:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (tensor.to(torch.bfloat16) for tensor in (query * scale, key, value))
    added = None
    if mask is not None:
        added = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
        added = added.expand(len(q), *added.shape[-3:]) if added.dim() == 4 else added.expand(len(q), 1, *added.shape[-2:])
    parts = []
    for row in range(len(q)):  # a window at a time stays in the caches
        scores = q[row] @ k[row].transpose(-1, -2)
        parts.append((scores if added is None else scores.add_(added[row])).softmax(-1) @ v[row])
    return torch.stack(parts)


def replacement(target: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """What to call for a graph's operator where products are of ``dtype``: the operator, or :func:`attention` above."""
    wanted = target is torch.ops.aten.scaled_dot_product_attention.default
    return attention if wanted and dtype == torch.bfloat16 and device.type == "cpu" else target
