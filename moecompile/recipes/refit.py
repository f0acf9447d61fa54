"""The least-squares refit of a down projection for a routing mask, in closed form.

    min over W', b'   sum_t w_t | y_t - b - W mu - b' - W' (m_t * (h_t - mu)) |^2  +  ridge * sum_j E_jj |W'_j - W_j|^2

with h the hidden activations, m the mask of active neurons, mu_j the mean of h_j over the tokens on which neuron j is idle
(0 for neurons that never are), E_jj the second moment of feature j. The prior is the dense down projection with the idle
neurons' means as constants. A mask of ones and y = W h + b give W' = W and b' = 0; a sparse mask moves what the idle neurons
carried onto the active ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..precision import product

CHUNK = 2048  # tokens at a time: what they need stays in the caches (4096: refit and output take 1.3 times as long)
# Held-out relative error of a layer by ridge: .1551 at .003, .1430 at .5, .1434 at 1.
RIDGE = 0.5
_FLOOR = 1e-5  # of the mean second moment, for neurons that are never active

Mask = Callable[[int, int], Tensor]


def in_chunks(function: Callable[[Tensor], Tensor], x: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """``function``, (tokens, D) -> (tokens, width), of x (T, D) cast to ``dtype``; float32."""
    found = torch.empty(len(x), width, device=x.device)
    for start in range(0, len(x), CHUNK):
        found[start : start + CHUNK] = function(x[start : start + CHUNK].to(dtype))
    return found


def neuron_mask(chosen: Tensor, experts: Sequence[Sequence[int]], width: int) -> Mask:
    """From the (T, N) bool choice of experts to (tokens, F) float masks of active neurons, a chunk at a time."""
    owner = torch.full((width,), len(experts), dtype=torch.long, device=chosen.device)  # the extra column is always on
    for number, neurons in enumerate(experts):
        owner[list(neurons)] = number

    def mask(start: int, stop: int) -> Tensor:
        part = chosen[start:stop]
        return torch.cat([part, torch.ones_like(part[:, :1])], dim=1).float().index_select(1, owner)

    return mask


def idle_means(hidden: Tensor, mask: Mask, weights: Tensor) -> Tensor:
    """(F,) weighted mean of each neuron over the tokens on which it is idle; 0 where it never is.

    Args:
        hidden: (T, F), float32.
        mask: ``mask(start, stop)`` gives the (tokens, F) float mask of active neurons.
        weights: (T,).
    """
    total = torch.zeros(hidden.shape[1], device=hidden.device)
    count = torch.zeros_like(total)
    for start in range(0, len(hidden), CHUNK):
        stop = min(start + CHUNK, len(hidden))
        idle = (1.0 - mask(start, stop)) * weights[start:stop, None]
        total += (idle * hidden[start:stop]).sum(0)
        count += idle.sum(0)
    return torch.where(count > 0, total / count.clamp_min(1e-12), torch.zeros_like(total))


def refit_down(
    hidden: Tensor,
    mask: Mask,
    means: Tensor,
    down: Tensor,
    bias: Tensor | None,
    target: Tensor,
    weights: Tensor,
    ridge: float = RIDGE,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The refitted down projection and the constant that goes with it.

    Args:
        hidden: (T, F), float32.
        mask: as for :func:`idle_means`.
        means: (F,) from :func:`idle_means`.
        down: (D, F), float32.
        bias: (D,) or None.
        target: (T, D) the wanted output, bias included.
        weights: (T,).
        ridge: weight of the prior.
        dtype: what products over tokens are multiplied in; their sums, and the solution, are not.

    Returns:
        W' (D, F), and the (D,) constant b' to add to the dense bias and to the idle means' part W' mu.
    """
    width, hidden_size = hidden.shape[1], down.shape[0]
    size = width + 1  # the last feature is the constant 1
    gram = torch.zeros(size, size, device=hidden.device)
    cross = torch.zeros(size, hidden_size, device=hidden.device)
    base = down @ means if bias is None else down @ means + bias
    step = -(-size // 4)
    for start in range(0, len(hidden), CHUNK):
        stop = min(start + CHUNK, len(hidden))
        features = torch.ones(stop - start, size, device=hidden.device)
        torch.sub(hidden[start:stop], means, out=features[:, :width])
        features[:, :width] *= mask(start, stop)
        root = weights[start:stop].sqrt()[:, None]
        gap = ((target[start:stop] - product(features[:, :width], down.t(), dtype) - base) * root).to(dtype)
        weighted = features.mul_(root).to(dtype)
        cross += weighted.t() @ gap
        for low in range(0, size, step):  # the upper blocks alone: the matrix is symmetric
            gram[low : low + step, low:] += weighted[:, low : low + step].t() @ weighted[:, low:]
    gram = torch.triu(gram) + torch.triu(gram, 1).t()
    second = gram.diagonal().clone()
    floor = _FLOOR * second[:width].mean().clamp_min(1e-12)
    penalty = ridge * second + floor
    penalty[-1] = floor  # the constant is free
    gram.diagonal().add_(penalty)
    delta = torch.cholesky_solve(cross.double(), torch.linalg.cholesky(gram.double())).t().float()
    refitted = down + delta[:, :width]
    constant = base + delta[:, -1] - refitted @ means
    return refitted, constant if bias is None else constant - bias
