"""Weights as the Triton kernels read them: fp8, int8 or int4 along the rows of a matrix, a float32 scale for each group.

    w[r, j]  ~  q[r, j] * s[r, j // group]

A format has a name, as ``moe_ffn`` carries it: ``int4/64`` are four bits with a scale for every 64 elements of a row (the last
group of a row may be shorter), ``fp8/0`` is float8_e4m3fn with a scale for the whole row. The packed weights are kept once per
version of a tensor (:mod:`.packing`), beside the stored ones.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import packing
from .triton_spec import Target

# What `moecompile.compile(weights=...)` means for GPUs: the usual groups of weight-only formats, fp8 per output channel.
FORMATS = {"int8": "int8/128", "int4": "int4/64", "fp8": "fp8/0"}
_LARGEST = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}


def parsed(name: str) -> tuple[str, int]:
    """(kind, group) of a format's name."""
    kind, _, group = name.partition("/")
    return kind, int(group)


def refusal(kind: str, target: Target, hidden: int, width: int) -> str | None:
    """Why rows of ``hidden`` and ``width`` elements cannot be stored so for a target, as one line; None if they can."""
    if kind == "fp8" and (target.backend != "cuda" or int(target.arch) < 89):
        return f"float8_e4m3fn needs an NVIDIA device of compute capability 8.9 or later, not {target}"
    if kind == "int4" and (hidden % 2 or width % 2):
        return f"int4 puts two elements in a byte, and rows have {hidden} and {width}"
    return None


def quantise(weight: Tensor, kind: str, group: int) -> tuple[Tensor, Tensor]:
    """Symmetric, rounded to nearest.

    Args:
        weight: (..., C) floating point.
        kind: ``int8``, ``int4`` or ``fp8``.
        group: elements of a row that share a scale; 0 for all.

    Returns:
        int8 (..., C); uint8 (..., C / 2), element 2j in the low half, value + 8; or float8_e4m3fn (..., C). And float32 scales
        (..., ceil(C / group)); a group of zeros has scale 0.

    Raises:
        ValueError: a number is infinite or NaN, or a row of int4 has an odd number of elements.
    """
    columns = weight.shape[-1]
    size = group or columns
    wide = torch.nn.functional.pad(weight.detach().float(), (0, -columns % size)).unflatten(-1, (-1, size))
    scale = wide.abs().amax(-1) / _LARGEST[kind]
    if not bool(torch.isfinite(scale).all()):
        raise ValueError(f"weights that are infinite or NaN have no {kind} form")
    if kind == "int4" and columns % 2:
        raise ValueError(f"int4 puts two elements in a byte, and rows have {columns}")
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 0.0, scale)
    whole = wide * torch.where(scale > 0, 1.0 / scale, 0.0).unsqueeze(-1)
    if kind == "fp8":
        return whole.clamp_(-448, 448).flatten(-2)[..., :columns].to(torch.float8_e4m3fn).contiguous(), scale
    whole = whole.round_().clamp_(-_LARGEST[kind], _LARGEST[kind]).flatten(-2)[..., :columns]
    if kind == "int8":
        return whole.to(torch.int8).contiguous(), scale
    halves = (whole + 8).to(torch.uint8)
    return halves[..., 0::2] | (halves[..., 1::2] << 4), scale


def values(stored: Tensor, scale: Tensor, kind: str, group: int) -> Tensor:
    """What stored weights stand for, float32 (..., C): the inverse of :func:`quantise` up to its rounding."""
    if kind == "int4":
        stored = torch.stack([stored & 15, stored >> 4], dim=-1).flatten(-2).to(torch.int8) - 8
    columns = stored.shape[-1]
    return stored.float() * scale.repeat_interleave(group or columns, dim=-1)[..., :columns]


def rounded(weight: Tensor, name: str) -> Tensor:
    """What a format makes of a weight: quantised and back, same shape and dtype."""
    kind, group = parsed(name)
    return values(*quantise(weight, kind, group), kind, group).to(weight.dtype)


def packed(weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """:func:`quantise` of a parameter, made once per version of it.

    Raises:
        ValueError: as :func:`quantise`; or ``weight`` is an inference tensor, whose changes cannot be seen.
    """
    if weight.is_inference():
        raise ValueError("a weight has to be packed, but is an inference tensor, whose changes cannot be seen")
    stored, scale = packing.cache.get(weight, form(name))
    return stored, scale


def form(name: str) -> str:
    """A format's name as a key of :data:`packing.FORMS`."""
    packing.FORMS.setdefault(name, functools.partial(_form, name=name))
    return name


def _form(weight: Tensor, name: str) -> tuple[Tensor, ...]:
    return quantise(weight, *parsed(name))
