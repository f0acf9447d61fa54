"""What a pre-gating router is to learn: counted once on the dense model, kept as 16-bit numbers.

overlap(t, e)   = |M0(t) ∩ M_e|      M0(t): the neurons most active on token t; aligned ids: summed over the layers
amplitude(t, e) = sqrt(sum_{j in e} (h_j - mean_j)^2 |w_j|^2)      in units of the largest of the token and layer
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .capture import Captured
from .errors import InputError
from .match import Match
from .progress import Progress
from .reading import ids_and_mask
from .sites import DenseFFN
from .stream import Stream

_CHUNK = 4096
_MOST_BYTES = 2 << 30
_AMPLITUDE = 30_000  # of the largest of a token and layer, in 16 bits
TARGETS = ("overlap", "amplitude")


@dataclass(frozen=True)
class Targets:
    """What a router is to learn.

    Attributes:
        ids: (W, S) token ids, windows without padding.
        overlap: (W, S, N) int32 for aligned ids, or (W, S, L, N) int16: neurons that each expert has in common with the
            active ones, or the experts' amplitudes.
    """

    ids: Tensor
    overlap: Tensor

    def split(self, share: float, seed: int) -> tuple[Targets, Targets]:
        """(kept, held out): a random share of the windows is held out, at least one where the share is above 0."""
        count = min(len(self.ids) - 1, max(1, round(share * len(self.ids)))) if share and len(self.ids) > 1 else 0
        order = torch.randperm(len(self.ids), generator=torch.Generator().manual_seed(seed))
        held, kept = order[:count].sort().values, order[count:].sort().values
        return Targets(self.ids[kept], self.overlap[kept]), Targets(self.ids[held], self.overlap[held])


@torch.no_grad()
def collect_targets(
    captured: Captured,
    matches: Sequence[Match],
    batches: Sequence[Any],
    members: Sequence[Tensor],
    *,
    aligned: bool,
    active: float = 0.5,
    target: str = "overlap",
    argument: str = "input_ids",
    progress: Progress | None = None,
) -> Targets:
    """Run the dense model over batches, a few at a time, and count.

    Args:
        captured: the dense model.
        matches: its FFNs.
        batches: model inputs with token ids (B, S), all of one length, without padding.
        members: for each FFN (F, N), 1 where a neuron belongs to an expert.
        aligned: sum over the layers.
        active: share of the neurons that counts as activated.
        argument: the model's name for its token ids.
        target: ``overlap``, or ``amplitude`` (not of aligned ids).

    Raises:
        InputError: the batches are padded or of several lengths, the counts would not fit into 2 GiB, or aligned ids are to
            learn amplitudes.
    """
    if aligned and target == "amplitude":
        raise InputError("amplitudes are a target for a decision per layer; aligned ids learn overlaps")
    windows = [_windows(captured, batch, argument) for batch in batches]
    lengths = {rows.shape[1] for rows in windows}
    if len(lengths) != 1:
        raise InputError(f"the router's training windows must have one length, not {sorted(lengths)}")
    ids = torch.cat([rows.cpu() for rows in windows])
    experts = members[0].shape[1]
    shape = (len(ids), ids.shape[1], *(() if aligned else (len(members),)), experts)
    kind = torch.int32 if aligned else torch.int16  # one layer's counts are at most half of F, a sum of many is more
    if kind.itemsize * math.prod(shape) > _MOST_BYTES:
        raise InputError(f"the router's targets for {ids.numel()} tokens would take more than 2 GiB; give fewer tokens")
    overlap = torch.zeros(shape, dtype=kind)
    start = 0
    progress = progress or Progress()
    for group in progress.over(_grouped(batches, windows), "router targets"):
        stream = Stream(captured, matches, group)
        count = sum(len(_windows(captured, batch, argument)) for batch in group)
        for number, (match, inputs) in enumerate(stream):
            dense = DenseFFN.read(match.site, captured.module)
            hidden = dense.hidden(stream.tokens(number, inputs))
            member = members[number].to(hidden.device)
            if target == "amplitude":
                found = amplitudes(hidden, dense.down, member)
                found = (found / found.amax(1, keepdim=True).clamp_min(1e-12) * _AMPLITUDE).round()
            else:
                found = overlaps(hidden, member, active)
            counts = found.cpu().view(count, ids.shape[1], experts)
            into = overlap[start : start + count] if aligned else overlap[start : start + count, :, number]
            into += counts.to(kind)
            if number + 1 < len(matches):
                stream.feed(lambda rows, dense=dense: dense.output(dense.hidden(rows)), dense.output(hidden))  # type: ignore[misc]
        start += count
    return Targets(ids, overlap)


def overlaps(hidden: Tensor, member: Tensor, active: float) -> Tensor:
    """(T, F) activations and (F, N) membership -> (T, N) counts of the most active neurons in each expert."""
    k = max(1, round(active * hidden.shape[1]))
    parts = []
    for part in hidden.split(_CHUNK):
        strength = part.abs().float()
        least = strength.kthvalue(strength.shape[1] - k + 1, dim=1, keepdim=True).values
        parts.append(((strength >= least) & (strength > 0)).float() @ member.float())  # a ReLU leaves many at 0
    return torch.cat(parts)


def amplitudes(hidden: Tensor, down: Tensor, member: Tensor, mean: Tensor | None = None) -> Tensor:
    """(T, F) activations, the down projection (D, F), (F, N) membership -> (T, N) float32, how much each expert matters.

    ``mean`` (F,) of the activations is that of all T tokens unless given.
    """
    size = down.float().square().sum(0)
    mean = hidden.float().mean(0) if mean is None else mean
    return torch.cat([((part.float() - mean).square_() * size @ member.float()).sqrt() for part in hidden.split(_CHUNK)])


def membership(experts: Sequence[Sequence[int]], width: int) -> Tensor:
    """(F, N) float, 1 where a neuron belongs to an expert."""
    member = torch.zeros(width, len(experts))
    for number, neurons in enumerate(experts):
        member[list(neurons), number] = 1.0
    return member


def _windows(captured: Captured, batch: Any, argument: str) -> Tensor:
    ids, mask, _ = ids_and_mask(captured.module, batch, argument)
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise InputError(f"the router reads token ids: calibration batches must hold {argument} (batch, length)")
    if isinstance(mask, Tensor) and not bool(mask.all()):
        raise InputError("the router is trained on windows without padding")
    return ids


def _grouped(batches: Sequence[Any], windows: Sequence[Tensor]) -> list[list[Any]]:
    """Batches in groups of about :data:`_CHUNK` tokens: what one pass over the model holds."""
    groups: list[list[Any]] = [[]]
    tokens = 0
    for batch, rows in zip(batches, windows, strict=True):
        if groups[-1] and tokens + rows.numel() > _CHUNK:
            groups.append([])
            tokens = 0
        groups[-1].append(batch)
        tokens += rows.numel()
    return groups
