"""The least-squares refit of a down projection for a routing mask, in closed form.

    h~ = where(mask, h, mu)      W' = W + R (H~^T H~ + lambda I)^-1,   R = (Y - H~ W^T)^T H~

With h the hidden activations, mu_j the mean of h_j over the tokens on which neuron j is idle and Y the wanted output (bias left
out). A mask of ones and Y = H W^T give W' = W; a sparse mask moves what the idle neurons carried onto the active ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 4096  # tokens at a time: (4096, F) in float32 is all that is held besides the moments


@dataclass(frozen=True)
class Moments:
    """Second moments for one refit: gram (F, F) = H~^T H~, residual (D, F) = (Y - H~ W^T)^T H~, both float32."""

    gram: Tensor
    residual: Tensor


def masked_moments(hidden: Tensor, mask: Tensor, means: Tensor, target: Tensor, down: Tensor, weights: Tensor | None = None) -> Moments:
    """Accumulate the moments.

    Args:
        hidden: (T, F) activations.
        mask: (T, F) bool, which neurons are active for each token.
        means: (F,) what stands in for an idle neuron.
        target: (T, D) the wanted output, bias left out.
        down: (D, F) the present down projection.
        weights: (T,) weight of each token, or None for 1.
    """
    width = hidden.shape[1]
    gram = torch.zeros(width, width, device=hidden.device)
    residual = torch.zeros(down.shape[0], width, device=hidden.device)
    for start in range(0, len(hidden), _CHUNK):
        rows = slice(start, start + _CHUNK)
        seen = torch.where(mask[rows], hidden[rows].float(), means.float())
        gap = target[rows].float() - seen @ down.float().t()
        if weights is not None:
            root = weights[rows].sqrt().unsqueeze(-1)
            seen, gap = seen * root, gap * root
        gram.addmm_(seen.t(), seen)
        residual.addmm_(gap.t(), seen)
    return Moments(gram, residual)


def refit_down(moments: Moments, down: Tensor, ridge: float = 0.02) -> Tensor:
    """The refitted down projection (D, F), float32.

    Args:
        moments: from :func:`masked_moments`.
        down: (D, F) the present down projection.
        ridge: lambda over the mean diagonal of the gram matrix.
    """
    gram = moments.gram.clone()
    scale = gram.diagonal().mean().clamp_min(1e-12)
    gram.diagonal().add_(ridge * scale)
    factor = torch.linalg.cholesky(gram)
    return down.float() + torch.cholesky_solve(moments.residual.t(), factor).t()
