"""Verify: a converted model beside the dense one it came from, as a whole and layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .apply import moe_blocks
from .block import MoEFFN
from .capture import capture, normalise_inputs
from .diagnose import layer_rows
from .errors import InputError
from .front import deciding
from .match import Match, match
from .parity import all_experts_on, evaluating, max_abs_error
from .passes.split_ffn import block_path


@dataclass(frozen=True)
class VerifyReport:
    """What :func:`verify` measured.

    Attributes:
        parity_max_abs_error: largest difference of outputs with all experts on.
        tolerance: how large it may be.
        layers: relative error ``|y - y_dense| / |y_dense|`` of each block on the dense model's own inputs, all experts on
            (``all``) and at its top_k (``top_k``).
    """

    parity_max_abs_error: float
    tolerance: float
    layers: tuple[dict[str, Any], ...]

    @property
    def exact(self) -> bool:
        """Whether all experts on is the dense model."""
        return self.parity_max_abs_error <= self.tolerance

    def __str__(self) -> str:
        verdict = "exact" if self.exact else "NOT the dense model"
        lines = [f"all experts on: max abs error {self.parity_max_abs_error:.2e} ({verdict})"]
        lines += [f"  {row['site']}: all on {row['all']:.2e}, at top_k {row['top_k']:.3f}" for row in self.layers]
        return "\n".join(lines)


def verify(moe: nn.Module, dense: nn.Module, inputs: Any = None) -> VerifyReport:
    """Compare a converted model with the dense one it came from.

    Args:
        moe: the converted model, live or as a graph.
        dense: the dense model.
        inputs: one batch, as :func:`moecompile.capture.capture` takes it; guessed for transformers models.

    Raises:
        InputError: the two do not belong together.
    """
    args, kwargs = normalise_inputs(dense, inputs)
    batch: Any = kwargs or args
    with all_experts_on(moe):
        error, allowed = max_abs_error(moe, dense, [batch])
    blocks, plan = moe_blocks(moe), getattr(moe, "moecompile_plan", None)
    # Blocks of a graph are numbered as the plan's sites are.
    places = {} if plan is None else {site.site.name: number for number, site in enumerate(plan.sites)}

    def block_of(number: int, found: Match) -> MoEFFN | None:
        return blocks.get(block_path(found, places.get(found.site.name, number)))

    with evaluating(dense), deciding(moe, [batch]):
        captured = capture(dense, batch)
        matches = tuple(found for found in match(captured).matches if not places or found.site.name in places)
        rows = layer_rows(captured, matches, block_of, [batch])
    if not rows:
        raise InputError("none of the dense model's FFNs is an MoE block in the other model")
    return VerifyReport(error, allowed, tuple(rows))
