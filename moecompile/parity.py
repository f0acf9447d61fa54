"""Exactness: is the split model, all experts on, the dense one."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .apply import moe_blocks, using_top_k
from .capture import normalise_inputs, without_cache
from .errors import InputError, ParityError

# Largest absolute difference that float32 may show where outputs reach up to 40, as the logits of small language models do; it
# grows in proportion with larger outputs. (A real 135 M model's own float32 rounding error is 7e-5 to 9e-5 at logits up to 37.)
# Coarser types get 64 of their own epsilons, relative to the largest output: the sums are the same, in another order.
TOLERANCE = 1e-4
_SCALE = 40.0


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Models in eval mode; each module's own mode comes back afterwards."""
    modes = [[(module, module.training) for module in model.modules()] for model in models]
    try:
        for model in models:
            for module in model.modules():
                module.training = False
        yield
    finally:
        for mode in modes:
            for module, training in mode:
                module.training = training


@contextlib.contextmanager
def all_experts_on(model: nn.Module) -> Iterator[None]:
    """Every block with all of its experts; each block's dial comes back afterwards."""
    if not moe_blocks(model):
        yield
        return
    with using_top_k(model, None):
        yield


def main_output(outputs: Any) -> list[Tensor]:
    """The tensors to compare: the logits where the model has some, else every floating-point output."""
    logits = getattr(outputs, "logits", None)
    if isinstance(logits, Tensor):
        return [logits]
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: Any) -> list[Tensor]:
    """A model's outputs on inputs as :func:`moecompile.capture.capture` takes them."""
    args, kwargs = normalise_inputs(model, inputs)
    with without_cache(model):
        return main_output(model(*args, **kwargs))


def tolerance_for(reference: Sequence[Tensor]) -> float:
    """How far outputs may differ from the reference ones, by their type and size."""
    largest = max((_size(t) for t in reference if t.numel()), default=1.0)
    epsilon = max((torch.finfo(t.dtype).eps for t in reference), default=0.0)
    if epsilon <= torch.finfo(torch.float32).eps:
        return TOLERANCE * max(1.0, largest / _SCALE)
    return 64 * epsilon * max(1.0, largest)


def _size(tensor: Tensor) -> float:
    """The largest absolute value. What stands for infinity, as masks do, is no size: anything would be allowed beside it."""
    bound = torch.finfo(tensor.dtype).max / 2
    sizes = tensor.abs()
    largest = float(sizes.max())
    return largest if largest < bound else float(sizes.masked_fill_(~(sizes < bound), 0.0).max())


def max_abs_error(model: nn.Module, dense: nn.Module, batches: Sequence[Any]) -> tuple[float, float]:
    """(largest difference of the two models' outputs, its tolerance) over batches, both in eval mode.

    The same infinity on both sides, as masked logits are, is no difference; NaN on either side is an infinite one.

    Raises:
        InputError: the models' outputs cannot be compared.
    """
    worst, allowed = 0.0, TOLERANCE
    with evaluating(model, dense):
        for batch in batches:
            ours, theirs = outputs_of(model, batch), outputs_of(dense, batch)
            if not ours or len(ours) != len(theirs):
                raise InputError("the two models' outputs cannot be compared: they do not hold the same tensors")
            allowed = max(allowed, tolerance_for(theirs))
            for a, b in zip(ours, theirs, strict=True):
                worst = max(worst, _difference(a, b))
    return worst, allowed


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference of two outputs of one shape, infinite where it is not a number."""
    if not a.numel():
        return 0.0
    difference = a.sub(b).abs_()  # logits are large: no second copy
    largest = float(difference.max())
    if not math.isfinite(largest):
        largest = float(difference.masked_fill_(a == b, 0.0).max())
    return largest if math.isfinite(largest) else math.inf


def check_routing(layers: Sequence[dict[str, Any]], dtype: torch.dtype) -> float:
    """The largest relative error of a block's chosen experts against the same neurons of the dense FFN.

    Raises:
        ParityError: it is beyond 64 epsilons of the type.
    """
    errors = [float(row.get("routed", 0.0)) for row in layers]
    worst = max((error if math.isfinite(error) else math.inf for error in errors), default=0.0)
    allowed = 64 * torch.finfo(dtype).eps
    if not worst <= allowed:
        site = next(row["site"] for row, error in zip(layers, errors, strict=True) if not error < worst)
        raise ParityError(
            f"{site}: the chosen experts differ from the same neurons of the dense FFN by {worst:.1e} (relative); "
            f"{allowed:.1e} is allowed: not converted"
        )
    return worst


def check_parity(split: nn.Module, dense: nn.Module, batches: Sequence[Any]) -> tuple[float, float]:
    """(error, tolerance) of a split model with all experts on against the dense one.

    Raises:
        ParityError: the error is beyond the tolerance.
    """
    with all_experts_on(split), all_experts_on(dense):  # some of its layers may be converted already
        error, allowed = max_abs_error(split, dense, batches)
    if not error <= allowed:
        raise ParityError(
            f"all experts on, the split model differs from the dense one by {error:.3e}; "
            f"{allowed:.1e} is allowed: not converted"
        )
    return error, allowed
