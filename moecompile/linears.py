"""The operator of the linear layers that remain around expert FFNs: what ``passes/lower_linear.py`` lowers to. Inference only.

    linears:    y_i = x W_i^T + b_i  for several W_i that read the same x
    int8_rows:  W -> int8 rows and their scales, made once per version of W

For CPU tensors a generated kernel takes few tokens, and torch's matrix product many (:mod:`moecompile.codegen.operators`);
torch operators are the specification and the fallback.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .codegen import packing

_library = torch.library.Library("moecompile", "FRAGMENT")

FORMATS = ("same", "int8")

_library.define("linears(Tensor x, Tensor[] weights, Tensor?[] biases, str weight_format) -> Tensor[]")
_library.define("int8_rows(Tensor weight) -> (Tensor whole, Tensor scale)")


def linears_reference(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], weight_format: str
) -> list[Tensor]:
    """Linear layers in plain torch operators.

    Args:
        x: (..., D).
        weights: (O_i, D) each, dtype of x.
        biases: (O_i,) each, or None.
        weight_format: ``same``, or ``int8``: weights are rounded to int8 with a scale per row.

    Returns:
        (..., O_i) each, dtype of x.
    """
    if weight_format == "int8":
        weights = [packing.rounded(weight) for weight in weights]
    return [torch.nn.functional.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (O, D) as int8 (O, D) and float32 scales (O,), kept while the weight lives and does not change.

    Raises:
        ValueError: a number is infinite or NaN.
    """
    if weight.is_inference():  # counts no versions: changes could not be seen, so nothing is kept
        return packing.quantise(weight)
    whole, scale = packing.cache.get(weight, "int8 rows")
    return whole, scale


def _fake(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], weight_format: str) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]


def _int8_rows_fake(weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight, dtype=torch.int8), weight.new_empty(weight.shape[0], dtype=torch.float32)


_library.impl("linears", linears_reference, "CompositeExplicitAutograd")
_library.impl("int8_rows", int8_rows, "CompositeExplicitAutograd")
torch.library.register_fake("moecompile::linears", _fake, lib=_library)
torch.library.register_fake("moecompile::int8_rows", _int8_rows_fake, lib=_library)

linears = torch.ops.moecompile.linears.default
