"""The choice of the k largest scores as something to learn.

    z = (s - c) / d,    chosen: z > 0
    L = mean over tokens and experts of |m_e| / mean(a) * logistic(z_e; m_e > 0),    m = a - its own threshold

s are scores, c the middle between the k-th and the (k+1)-th, d their standard deviation; a is how much each expert matters
(its amplitude), the threshold the middle between the k-th and the (k+1)-th of these.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def centred_scores(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """((..., k) chosen experts, (..., N) scores minus the threshold over the spread); 0 < k < N."""
    best, ids = torch.topk(scores, k + 1, dim=-1)
    threshold = 0.5 * (best[..., k - 1 : k] + best[..., k : k + 1]).detach()
    return ids[..., :k], (scores - threshold) / scores.detach().std(-1, keepdim=True).clamp_min(1e-6)


def oracle_loss(centred: Tensor, amplitudes: Tensor, k: int) -> Tensor:
    """Logistic loss of centred scores (..., N) against the k experts of largest amplitude (..., N).

    Each expert is weighted by how far its amplitude is from the threshold: a choice that is nearly a tie costs nearly nothing.
    """
    best = amplitudes.topk(k + 1, dim=-1).values
    margin = amplitudes - 0.5 * (best[..., k - 1 : k] + best[..., k : k + 1])
    weight = margin.abs() / amplitudes.mean(-1, keepdim=True).clamp_min(1e-12)
    each = nn.functional.binary_cross_entropy_with_logits(centred.float(), (margin > 0).float(), reduction="none")
    return (weight * each).mean()


def captured_share(chosen: Tensor, amplitudes: Tensor) -> tuple[Tensor, Tensor]:
    """What a choice (..., k) of experts gets of the amplitudes' (..., N) energy, and what the best choice of k gets; sums."""
    energy = amplitudes.float().square()
    total = energy.sum(-1).clamp_min(1e-12)
    own = energy.gather(-1, chosen).sum(-1) / total
    return own.sum(), (energy.topk(chosen.shape[-1], dim=-1).values.sum(-1) / total).sum()
