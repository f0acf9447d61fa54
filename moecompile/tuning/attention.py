"""Causal attention on the CPU in plain matrix products, a block of queries against the keys up to its end.

    O_b = softmax(Q_b K_{<=b}^T scale + causal mask) V_{<=b}

torch's flash kernel for the CPU does not use bfloat16's instructions in its backward pass. SmolLM2-135M (9 heads of
64), one layer, 2,048 tokens, forward and backward, bfloat16, one thread (minima of 4, a shared machine): windows of 512, 375 ms
there and 184 ms here; windows of 256, 210 ms there and 66 ms here. In float32 the two differ little, so it is used in bfloat16
alone.

Letters: B windows, H heads, G heads of keys and values, L positions, d a head's width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "moecompile_blocked"
_BLOCK = 128  # queries at a time; 64 and 256 were 1.1 and 1.2 to 1.5 times slower at windows of 256


def blocked(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """(B, H, L, d), (B, G, L, d), (B, G, L, d) -> (B, H, L, d), each position attending to itself and what is before it."""
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
        parts.append(out.view(batch, groups, -1, end - start, width))
    return torch.cat(parts, dim=3).view(batch, heads, length, width)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: plain causal attention by blocks, everything else as its ``sdpa``."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    reduced = torch.is_autocast_enabled(query.device.type) and query.device.type == "cpu"
    special = [attention_mask, *(kwargs.get(name) for name in ("position_bias", "s_aux", "cache", "softcap"))]
    plain = causal and not dropout and query.shape[2] == key.shape[2] and all(one is None for one in special)
    if not (reduced and plain):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    dtype = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", enabled=False):
        out = blocked(query.to(dtype), key.to(dtype), value.to(dtype), scale)
    return out.transpose(1, 2).contiguous(), None


def use_blocks(*models: nn.Module) -> Callable[[], None]:
    """Let models that compute attention by ``sdpa`` do it here; returns what undoes it."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    changed = [model for model in models if getattr(getattr(model, "config", None), "_attn_implementation", None) == "sdpa"]
    for model in changed:
        model.set_attn_implementation(NAME)  # type: ignore[operator]

    def undo() -> None:
        for model in changed:
            model.set_attn_implementation("sdpa")  # type: ignore[operator]

    return undo
