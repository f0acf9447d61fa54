"""Per layer: how far a block is from the dense FFN, and how often each expert is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .block import MoEFFN
from .capture import Captured
from .match import Match
from .parity import all_experts_on, evaluating
from .sites import DenseFFN
from .stream import Stream


@torch.no_grad()
def layer_rows(
    captured: Captured,
    matches: Sequence[Match],
    block_of: Callable[[int, Match], MoEFFN | None],
    batches: Sequence[Any],
    bare_block_of: Callable[[int, Match], MoEFFN | None] | None = None,
) -> list[dict[str, Any]]:
    """Each block on the inputs that the *dense* model gives it.

    Args:
        captured: the dense model.
        matches: its FFNs.
        block_of: the block of an FFN, by number and match, or None to leave it out.
        batches: model inputs to measure on.
        bare_block_of: the same block without compensation, for comparison.

    Returns:
        For each FFN ``site``; ``all`` and ``top_k``, the relative error |y - y_dense| / |y_dense| with all experts on and as
        the block is set; ``uncompensated``, the bare block's; ``usage``, the share of tokens that choose each expert.
    """
    rows: list[dict[str, Any]] = []
    stream = Stream(captured, matches, batches)
    for number, (match, inputs) in enumerate(stream):
        dense = DenseFFN.read(match.site, captured.module)
        block = block_of(number, match)
        if block is not None:
            x = stream.tokens(number, inputs)
            target = dense.output(dense.hidden(x))
            scale = float(target.float().norm()) or 1.0
            with evaluating(block):
                row: dict[str, Any] = {"site": match.site.name, "top_k": _distance(block(x), target) / scale}
                with all_experts_on(block):
                    row["all"] = _distance(block(x), target) / scale
                row["usage"] = _usage(block, x)
            bare = bare_block_of(number, match) if bare_block_of else None
            if bare is not None:
                with evaluating(bare):
                    routed = bare(x)
                    row["uncompensated"] = _distance(routed, target) / scale
                    row["routed"] = _distance(routed, _masked(dense, bare, x)) / scale
            rows.append(row)
        stream.feed(lambda value, dense=dense: dense.output(dense.hidden(value)))  # type: ignore[misc]
    return rows


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).norm())  # the norm of a whole text is beyond float16


def _masked(dense: DenseFFN, block: MoEFFN, x: torch.Tensor) -> torch.Tensor:
    """The dense FFN (T, D) -> (T, D) with only the neurons that the block chooses for each token."""
    ids, _ = block.choose(x)
    return dense.output(dense.hidden(x) * block.neurons_on(ids))


def _usage(block: MoEFFN, x: torch.Tensor) -> list[float]:
    """Share of tokens that choose each expert; empty where nothing is chosen."""
    if not block.chooses:
        return []
    ids, _ = block.choose(x)
    counts = torch.bincount(ids.reshape(-1), minlength=block.spec.choosable)
    return [round(float(count) / len(x), 5) for count in counts]
