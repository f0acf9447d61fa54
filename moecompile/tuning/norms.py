"""RMSNorm in training, with its gradient in closed form.

    n = x / sqrt(mean(x^2) + eps),   y = n (w + b)        (b: 1 where a model keeps w - 1, as Gemma does, else 0)
    dL/dx = (g (w + b) - n mean(g n (w + b))) / sqrt(mean(x^2) + eps),   dL/dw = sum over tokens of g n

The modules' own formula is half a dozen operators, whose gradients are a dozen passes over (T, D): 8 x 256 tokens of width 576,
forward and backward, take 2.8 ms there and 1.0 ms here (two threads of a Zen 4 CPU).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offset: float, eps: float) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = x * scale
        ctx.save_for_backward(normed, scale, weight)
        ctx.offset = offset
        return normed * (weight + offset if offset else weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        normed, scale, weight = ctx.saved_tensors
        whole = weight + ctx.offset if ctx.offset else weight
        along = grads[0] * normed
        gx = gw = None
        if ctx.needs_input_grad[1]:
            gw = along.flatten(0, -2).sum(0)
        if ctx.needs_input_grad[0]:
            mean = (along @ whole).div_(-whole.shape[0]).unsqueeze(-1)
            gx = (grads[0] * whole).addcmul_(normed, mean).mul_(scale)
        return gx, gw, None, None


@torch.no_grad()
def closed_form(module: nn.Module) -> Callable[..., Tensor] | None:
    """What computes an RMSNorm with the gradient above; None for a module that is none, which is found by trying it.

    The module's own code goes on to compute whatever is not float32.
    """
    weight: Tensor = getattr(module, "weight", None)  # type: ignore[assignment]
    eps = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)
    if not isinstance(eps, float) or [name for name, _ in module.named_parameters()] != ["weight"]:
        return None
    if weight.dim() != 1 or weight.dtype != torch.float32:
        return None
    probe = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device) + 0.5
    try:
        expected = module(probe)
    except Exception:  # whatever it is: the module reads something else than hidden states
        return None
    for offset in (0.0, 1.0):
        own = _RMSNorm.apply(probe, weight, offset, eps)
        if isinstance(expected, Tensor) and expected.shape == own.shape and torch.allclose(own, expected, rtol=1e-5, atol=1e-6):
            return functools.partial(_normalise, module, offset, eps)
    return None


def _normalise(module: nn.Module, offset: float, eps: float, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if x.dtype != torch.float32 or not torch.is_grad_enabled() or args or kwargs:  # a gate, as Mamba's norms take
        return type(module).forward(module, x, *args, **kwargs)  # type: ignore[no-any-return]
    return _RMSNorm.apply(x, module.weight, offset, eps)  # type: ignore[no-any-return]
