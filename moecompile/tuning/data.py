"""The text of a run: windows in an order that the seed fixes, and a held-out tenth of each file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..text import read_text, start_of, token_ids, windows

HELD_OUT = 0.1  # the last share of each file, never trained on


class Windows(Sequence[Tensor]):
    """Batches (B, L) of windows, drawn from the files in turn, each file's in a random order of its own.

    A file that has been read to its end is shuffled and read again.

    Args:
        parts: (W, L) windows of each file.
        batches: how many batches.
        batch: B.
        seed: of the order.
        weights: each file's share, in any unit; None: equal shares. The files alternate as evenly as the weights allow.
    """

    def __init__(
        self, parts: Sequence[Tensor], batches: int, batch: int, seed: int, weights: Sequence[float] | None = None
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows, self.batch = torch.cat(list(parts)), batch
        each = [weight / max(weights) for weight in weights] if weights else [1.0] * len(parts)
        wanted, whole = batches * batch, math.fsum(each)
        offset, orders, turns = 0, [], []
        for part, weight in zip(parts, each, strict=True):
            share = math.ceil(wanted * weight / whole) + (weights is not None)  # rounding may ask for one more
            rounds = [torch.randperm(len(part), generator=generator) for _ in range(-(-share // len(part)))]
            orders.append(torch.cat(rounds)[:share] + offset)
            turns.append((torch.arange(share, dtype=torch.float64) + 0.5) / weight)
            offset += len(part)
        turn = torch.cat(turns).argsort(stable=True)
        self.order = torch.cat(orders)[turn[:wanted]]

    def __len__(self) -> int:
        return len(self.order) // self.batch

    def __getitem__(self, index: Any) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        start = index % len(self) * self.batch
        return self.rows[self.order[start : start + self.batch]]


def split(tokenizer: Any, paths: Sequence[Path], length: int, held: int) -> tuple[list[Tensor], Tensor]:
    """(windows to train on (W, L) of each file, held-out windows (H, L)): ``held`` of each file, spread over its last tenth.

    Raises:
        InputError: a file cannot be read, or its last tenth is shorter than a window.
    """
    if length < 2:
        raise InputError(f"--window is {length}; a window needs at least 2 tokens")
    if held < 1:
        raise InputError(f"--held-out is {held}; it must be at least 1 window of each file")
    train, kept = [], []
    start = start_of(tokenizer)
    for path in paths:
        ids = token_ids(tokenizer, read_text(path))
        cut = len(ids) - max(length, round(HELD_OUT * len(ids)))
        part, rest = (windows(some, length, start=start) for some in (ids[: max(cut, 0)], ids[max(cut, 0) :]))
        if len(part) == 0 or len(rest) == 0:
            raise InputError(f"{path} has {len(ids)} tokens; tuning needs two windows of {length} (--window) at least")
        train.append(part)
        kept.append(rest[torch.linspace(0, len(rest) - 1, min(held, len(rest))).round().long()])
    return train, torch.cat(kept)
