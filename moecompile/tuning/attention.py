"""Training's attention on the CPU: plain causal attention in bfloat16 goes through :func:`moecompile.products.blocked`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..products import blocked

NAME = "moecompile_blocked"


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
