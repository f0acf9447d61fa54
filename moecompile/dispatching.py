"""transformers' own experts implementations, lowered where TorchDynamo traces for this project's backend.

``moecompile.compile(model)`` sets the implementation of a model's experts for each call. A function that has a model somewhere,
and ``torch.compile(model, backend="moecompile")``, set nothing: so what the registry gives under the usual names asks, while it
is traced, for whom. Outside of such a trace it is transformers' function, as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import stock
from .errors import CompileError
from .lowered import warn_once


def offer_experts() -> None:
    """Put the asking functions into transformers' registry; nothing where it has none, or another entry of that name."""
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as REGISTRY
        from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward
    except ImportError:  # register_experts has said why
        return
    for name, usual in (
        ("eager", _own_forward),
        ("batched_mm", batched_mm_experts_forward),
        ("grouped_mm", grouped_mm_experts_forward),
    ):
        if REGISTRY.get(name, usual) is usual:
            REGISTRY[name] = _asking(usual)  # of this registry alone: the class keeps its own


def _own_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    return type(self).forward.__wrapped__(self, *args, **kwargs)  # type: ignore[attr-defined]


def _asking(usual: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def experts(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling() and _lowered_here(self):
            return stock.experts_forward(self, *args, **kwargs)
        return usual(self, *args, **kwargs)

    return experts


@torch.compiler.assume_constant_result
def _lowered_here(module: nn.Module) -> bool:
    """Whether the present trace is for this project's backend, and it can lower this module; a constant to tracing.

    Raises:
        CompileError: it cannot, and the trace may not fall back (``fullgraph``).
    """
    from torch._dynamo import symbolic_convert

    trace = getattr(symbolic_convert.tls, "current_tx", None)
    if trace is None or not _is_ours(trace.output.compiler_fn):
        return False
    reason = stock.refusal(module)
    if reason is None:
        return True
    kind = type(module)
    if getattr(trace, "one_graph", False):
        raise CompileError(f"{kind.__name__}: the experts cannot be lowered: {reason}")
    if (kind, reason) not in stock.told:
        stock.told.add((kind, reason))
        warn_once(f"{kind.__name__}: the experts run their own forward: {reason}")
    return False


def _is_ours(compiler: Any) -> bool:
    """Whether a compiler that TorchDynamo wrapped, perhaps several times, lowers experts."""
    while compiler is not None:
        if getattr(compiler, "lowers_experts", False):
            return True
        compiler = getattr(compiler, "_torchdynamo_orig_backend", None) or getattr(compiler, "compiler_fn", None)
    return False
