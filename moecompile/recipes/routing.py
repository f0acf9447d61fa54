"""A linear router in closed form: ridge regression of the experts' amplitudes on the FFN's input."""

from __future__ import annotations

import torch
from torch import Tensor

from .neurons import ridge_weight, weighted_moments
from .refit import CHUNK


def fit_router(x: Tensor, hidden: Tensor, down: Tensor, experts: list[list[int]], weights: Tensor) -> tuple[Tensor, Tensor]:
    """Fit scores = x W^T + b to the amplitude sqrt(sum_{j in e} (h_j - mean_j)^2 |w_j|^2) of each expert.

    Args:
        x: (T, D) inputs, float32.
        hidden: (T, F), float32.
        down: (D, F), float32.
        experts: the neurons of each expert.
        weights: (T,).

    Returns:
        W (N, D) and b (N,).
    """
    mean = (weights @ hidden) / weights.sum()
    belongs = torch.zeros(hidden.shape[1], len(experts), device=hidden.device)
    for number, neurons in enumerate(experts):
        belongs[neurons, number] = 1.0
    belongs *= down.square().sum(0)[:, None]
    target = torch.cat([((part - mean).square_() @ belongs).sqrt_() for part in hidden.split(CHUNK)])
    gram, cross, mean_x, mean_y = weighted_moments(x, target, weights)
    weight = ridge_weight(gram, cross).t()
    return weight, mean_y - weight @ mean_x


def route(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> Tensor:
    """(T, N) bool, the k experts of the highest score of each token."""
    scores = torch.nn.functional.linear(x, weight, bias)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(1, scores.topk(k, dim=1).indices, True) if k else mask
