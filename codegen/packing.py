"""Weight layouts of the CPU kernel: down projections by neuron, and int8 with a scale per row.

A kernel reads the rows of one neuron together. Gate and up rows are D-vectors as they are; the down projection (N, D, I) must
be stored as (N, I, D), which :func:`relayout_` does in place. Whatever cannot be laid out in place is copied, once per
version of the tensor.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor


def by_neuron(tensor: Tensor) -> bool:
    """Whether a down projection (..., D, I) is stored as (..., I, D), without gaps."""
    return tensor.transpose(-1, -2).is_contiguous()


def relayout_(param: Tensor) -> None:
    """Store a down projection by neuron. Its shape stays, its strides change; there is no second copy afterwards.

    Args:
        param: (..., D, I), a parameter or a tensor that is no view of another. Other tensors that share its memory keep the
            old one.
    """
    if not by_neuron(param):
        param.data = param.data.transpose(-1, -2).contiguous().transpose(-1, -2)


def quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with a scale for each row.

    Args:
        rows: (..., D), any float type.

    Returns:
        int8 (..., D) in -127..127, rounded to nearest, and float32 scales (...): ``rows`` is about ``int8 * scale``.

    Raises:
        ValueError: a number is infinite or NaN; int8 has neither.
    """
    wide = rows.detach().float()
    top = wide.abs().amax(-1)
    if not bool(torch.isfinite(top).all()):
        raise ValueError("weights that are infinite or NaN have no int8 form")
    scale = top / 127.0
    # A row of zeros has scale 0; numbers so small that the scale is denormal are as good as zeros.
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.zeros_like(scale), scale)
    inverse = torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale))
    whole = (wide * inverse.unsqueeze(-1)).round_().clamp_(-127, 127)
    return whole.to(torch.int8), scale


def rounded(weight: Tensor, columns: bool = False) -> Tensor:
    """What int8 makes of a weight: quantised and back, same shape and dtype.

    Args:
        weight: (..., rows, D); or with ``columns`` (..., D, columns), a down projection, whose columns are the rows of neurons.
    """
    if columns:
        return rounded(weight.transpose(-1, -2)).transpose(-1, -2)
    whole, scale = quantise(weight)
    return (whole.float() * scale.unsqueeze(-1)).to(weight.dtype)


def _rows(weight: Tensor) -> Tensor:
    return weight.detach().contiguous()


def _neurons(weight: Tensor) -> Tensor:
    return weight.detach().transpose(-1, -2).contiguous()


# What may be kept of a tensor: name -> how it is made.
FORMS: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "rows": lambda weight: (_rows(weight),),
    "neurons": lambda weight: (_neurons(weight),),
    "int8 rows": lambda weight: quantise(_rows(weight)),
    "int8 neurons": lambda weight: quantise(_neurons(weight)),
    "float32": lambda weight: (weight.detach().float().contiguous(),),
}


def lasts(tensor: Tensor) -> bool:
    """Whether a copy of a tensor may be used again. The memory of what a graph computes, a cast weight for one, is used again
    for other numbers, by the same object and at the same version: those are copied each time."""
    return isinstance(tensor, torch.nn.Parameter)


class PackedCache:
    """Copies of tensors in another form, made once per version of a tensor and dropped with it.

    A tensor is known by its identity, its memory and autograd's version counter, which every in-place operation raises.
    A change in place through ``.data`` raises nothing and is not seen; :meth:`forget` is for that. Only what :func:`lasts` is
    kept.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a tensor may die, and its callback run, while this thread holds it
        self._kept: dict[tuple[int, str], tuple[weakref.ref[Tensor], int, int, tuple[Tensor, ...]]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, tensor: Tensor, form: str) -> tuple[Tensor, ...]:
        """``tensor`` in a form of :data:`FORMS`, as it is now.

        Raises:
            ValueError: the form does not exist for these numbers.
            RuntimeError: the tensor is an inference tensor, which counts no versions.
        """
        if not lasts(tensor):
            with torch.no_grad():
                return FORMS[form](tensor)
        key = (id(tensor), form)
        kept = self._kept.get(key)
        if kept is not None and kept[1] == tensor._version and kept[2] == tensor.data_ptr() and kept[0]() is tensor:
            return kept[3]
        with self._lock, torch.no_grad():
            version = (
                tensor._version
            )  # before the numbers are read: a change meanwhile makes the copy stale, not wrong for ever
            packed = FORMS[form](tensor)
            reference = weakref.ref(tensor, lambda gone, key=key: self._drop(key, gone))  # type: ignore[misc]
            self._kept[key] = (reference, version, tensor.data_ptr(), packed)
            return packed

    def forget(self) -> None:
        """Drop all copies."""
        with self._lock:
            self._kept.clear()

    def _drop(self, key: tuple[int, str], gone: weakref.ref[Tensor]) -> None:
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None and kept[0] is gone:
                del self._kept[key]


cache = PackedCache()
