"""Routers: which experts each token uses.

A router is a module whose ``forward(x, k)`` takes tokens (T, D) and returns expert numbers (T, k) int64 and their weights
(T, k) in the dtype of x. To add one, subclass :class:`Router` and register its kind in :data:`ROUTERS`; a recipe then names
the kind in the plan and stores its tensors under the router's parameter names.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn


def straight_through(ids: Tensor, best: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(T, K) weights that are 1; with the chosen experts' scores (T, K), their gradient is that of the sigmoid."""
    weights = torch.ones_like(ids, dtype=dtype)
    if best is None:
        return weights
    p = torch.sigmoid(best).to(dtype)
    return weights + (p - p.detach())


class Router(nn.Module):
    """Base of all routers: scores the experts, keeps the k best, binary gates.

    The FFN was split by neurons, so a chosen expert's output is added as it is (weight 1). While training, the weight is
    1 + p - stop_gradient(p) with p the sigmoid of the expert's score: the value stays 1, the router still gets a gradient
    (straight-through, Bengio et al. 2013, arXiv 1308.3432).
    """

    def scores(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, N), the higher the likelier chosen."""
        raise NotImplementedError

    def forward(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(T, D) -> expert numbers (T, k) and weights (T, k)."""
        scores = self.scores(x)
        best, ids = torch.topk(scores, k, dim=-1, sorted=False)
        learning = self.training and torch.is_grad_enabled()
        return ids, straight_through(ids, best if learning else None, x.dtype)


class LinearRouter(Router):
    """scores = x W^T + b, computed in float32 at least.

    Parameters: weight (N, D), bias (N,).
    """

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_experts))

    def scores(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, N)."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        kind = x.device.type  # a region of its own only where it does something: export makes a subgraph of it
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext():
            return nn.functional.linear(x.to(wide), self.weight.to(wide), self.bias.to(wide))


# kind, as the plan names it -> class; "none" is for plans that choose nothing (no routed expert, or all of them).
ROUTERS: dict[str, type[LinearRouter]] = {"linear": LinearRouter}
