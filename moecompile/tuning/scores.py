"""A linear router's scores in training: chosen by in float32, as everywhere, with gradients multiplied in autocast's type.

The scores' gradient is a stand-in for that of a choice (:mod:`moecompile.tuning.student`); its rounding does not matter, and
bfloat16 takes half the time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..routers import LinearRouter, Router


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dtype = dtype
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted, low = ctx.needs_input_grad, grads[0].to(ctx.dtype)
        gx = (low @ weight.to(ctx.dtype)).to(x.dtype) if wanted[0] else None
        gw = (low.t() @ x.to(ctx.dtype)).to(weight.dtype) if wanted[1] else None
        return gx, gw, grads[0].sum(0) if wanted[2] else None, None


def training_scores(router: Router, x: Tensor) -> Tensor:
    """(T, D) -> (T, N): what ``router.scores(x)`` computes."""
    kind = x.device.type
    plain = isinstance(router, LinearRouter) and x.dtype == router.weight.dtype == torch.float32
    if not plain or not torch.is_autocast_enabled(kind):
        return router.scores(x)
    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        return _Scores.apply(x, router.weight, router.bias, dtype)  # type: ignore[no-any-return]
