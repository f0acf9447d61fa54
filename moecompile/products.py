"""Attention in plain matrix products, for bfloat16 on a CPU, where torch's flash kernel is slow. SmolLM2-135M, 9 heads of 64:

    forward      4 windows of 512, two threads     19 to 31 ms there, 13.5 ms by :func:`attention`
    and backward 4 windows of 512, one thread      375 ms there, 184 ms by :func:`blocked`
                 8 windows of 256, one thread      210 ms there,  66 ms by :func:`blocked`

(a machine with AVX-512 BF16; minima). In float32 nothing is gained.

Letters: B windows, H heads, G heads of keys and values, L positions, M positions of keys, d a head's width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_BLOCK = 128  # queries at a time; 64 and 256 were 1.1 and 1.2 to 1.5 times slower at windows of 256
_QUERIES = 256  # at a time in :func:`attention`
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
    mask = torch.ones((), dtype=torch.bool, device=q.device) if mask is None else mask
    mask = mask.view(*([1] * (4 - mask.dim())), *mask.shape)
    mask = mask.expand(*mask.shape[:2], q.shape[2], k.shape[2])
    found = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
    for start in range(0, q.shape[2], _QUERIES):  # a few queries of a window at a time stay in the caches
        end = min(start + _QUERIES, q.shape[2])
        seen = mask[:, :, start:end].flatten(0, 2).any(0).nonzero()
        first, last = int(seen[0]), int(seen[-1]) + 1  # the keys that any of them looks at
        part = mask[:, :, start:end, first:last]
        added = torch.zeros_like(part, dtype=q.dtype).masked_fill_(~part, float("-inf")).expand(len(q), -1, -1, -1)
        for row in range(len(q)):
            scores = (q[row, :, start:end] @ k[row, :, first:last].transpose(-1, -2)).add_(added[row])
            torch.matmul(scores.softmax(-1), v[row, :, first:last], out=found[row, :, start:end])
    return found


def blocked(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """(B, H, L, d), (B, G, L, d), (B, G, L, e) -> (B, H, L, e), each position attending to itself and what is before it.

    A block of queries against the keys up to its end, O_b = softmax(Q_b K_{<=b}^T scale + causal mask) V_{<=b}; differentiable.
    """
    (batch, heads, length, width), groups = query.shape, key.shape[1]
    query = (query * scale).view(batch, groups, heads // groups, length, width)
    parts = []
    for start in range(0, length, _BLOCK):
        end = min(length, start + _BLOCK)
        q = query[:, :, :, start:end].reshape(batch, groups, -1, width)  # [B, G, H/G rows, d]
        scores = q @ key[:, :, :end].transpose(-1, -2)
        ahead = torch.full((end - start, end), float("-inf"), dtype=scores.dtype, device=scores.device).triu_(start + 1)
        weights = (scores.view(batch, groups, -1, end - start, end) + ahead).softmax(-1)
        out = weights.view(batch, groups, -1, end) @ value[:, :, :end]
        parts.append(out.view(batch, groups, -1, end - start, value.shape[-1]))
    return torch.cat(parts, dim=3).view(batch, heads, length, value.shape[-1])


def replacement(target: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """What to call for a graph's operator where products are of ``dtype``: the operator, or :func:`attention` above."""
    wanted = target is torch.ops.aten.scaled_dot_product_attention.default
    return attention if wanted and dtype == torch.bfloat16 and device.type == "cpu" else target
