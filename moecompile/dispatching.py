"""transformers' own experts implementations, lowered where TorchDynamo traces for this project's backend.

``moecompile.compile(model)`` sets the implementation of a model's experts for each call. A function that has a model somewhere,
and ``torch.compile(model, backend="moecompile")``, set nothing: so the registry that transformers' experts ask for their
implementation answers differently while such a trace runs. Otherwise it answers as it did.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import logs, stock
from .errors import CompileError
from .lowered import warn_once

_USUAL = ("eager", "batched_mm", "grouped_mm")  # any other name was chosen for what it is


def offer_experts() -> None:
    """Let transformers' registry of experts implementations ask; nothing where it has none."""
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as REGISTRY
    except ImportError:  # register_experts has said why
        return
    answer = REGISTRY.get_interface
    if not hasattr(answer, "__func__"):  # done already
        return

    def get_interface(experts_implementation: str, default: Callable[..., Tensor]) -> Callable[..., Tensor]:
        found = answer(experts_implementation, default)
        if torch.compiler.is_dynamo_compiling() and experts_implementation in _USUAL and _is_ours():
            return _asking(found)
        return found

    REGISTRY.get_interface = get_interface  # type: ignore[method-assign]


def _asking(usual: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def experts(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if _lowered_here(self):
            return stock.experts_forward(self, *args, **kwargs)
        return usual(self, *args, **kwargs)

    return experts


@torch.compiler.assume_constant_result
def _is_ours() -> bool:
    """Whether the present trace is for this project's backend; a constant to tracing, and no guard on anything."""
    trace = present_trace()
    compiler = None if trace is None else trace.output.compiler_fn
    while compiler is not None:  # TorchDynamo wraps it, perhaps several times
        if getattr(compiler, "lowers_experts", False):
            return "all" not in logs.disabled()
        compiler = getattr(compiler, "_torchdynamo_orig_backend", None) or getattr(compiler, "compiler_fn", None)
    return False


@torch.compiler.assume_constant_result
def _lowered_here(module: nn.Module) -> bool:
    """Whether these experts can be lowered; a constant to tracing, which guards on the module.

    Raises:
        CompileError: they cannot, and the trace may not fall back (``fullgraph``).
    """
    reason = stock.refusal(module)
    if reason is None:
        return True
    kind = type(module)
    if getattr(present_trace(), "one_graph", False):
        raise CompileError(f"{kind.__name__}: the experts cannot be lowered: {reason}")
    if (kind, reason) not in stock.told:
        stock.told.add((kind, reason))
        warn_once(f"{kind.__name__}: the experts run their own forward: {reason}")
    return False


def present_trace() -> Any:
    """TorchDynamo's translator of the frame that this thread traces, or None."""
    from torch._dynamo import symbolic_convert

    return getattr(getattr(symbolic_convert, "tls", None), "current_tx", None)
