"""The spectral router: |P_e x| |Q_e x| with low-rank stand-ins for an expert's gate and up projections.

With p_i = E[(act(g_i x) / (g_i x))^2] (the squared sigmoid of a SiLU), M = E[x x^T] = C C^T, G_e the expert's gate rows scaled
by sqrt(p_i) and U_e its up rows: P_e = A^T G_e with A the r leading left singular vectors of G_e C, so that P_e x keeps most of
the energy of G_e x over the calibration tokens; Q_e likewise from U_e.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import PlanError
from ..sites import DenseFFN

_CHUNK = 8192
_SMALL = 1e-3  # act(z) / z is taken at this |z| where z is smaller


def fit_spectral(ffn: DenseFFN, x: Tensor, experts: tuple[tuple[int, ...], ...], rank: int) -> dict[str, Tensor]:
    """The parameters of a :class:`moecompile.routers.SpectralRouter`.

    Args:
        ffn: a gated FFN without biases in its gate and up projections.
        x: (T, D) its inputs.
        experts: the neurons of each expert.
        rank: R, at most the size of the smallest expert.

    Raises:
        PlanError: the FFN is plain or has biases: the score is a product of two linear maps of x.
    """
    if ffn.gate is None or ffn.gate_bias is not None or ffn.up_bias is not None:
        raise PlanError(f"site {ffn.site.name}: a spectral router needs a gated FFN without biases; take another router")
    gate, up = ffn.gate.float(), ffn.up.float()
    share = torch.zeros(len(gate), device=x.device)
    moment = torch.zeros(x.shape[1], x.shape[1], device=x.device, dtype=torch.float64)
    for part in x.float().split(_CHUNK):
        z = part @ gate.t()
        z = torch.where(z.abs() < _SMALL, _SMALL, z)
        share += (ffn.site.act(z) / z).square_().sum(0)
        moment += (part.t() @ part).double()
    values, vectors = torch.linalg.eigh(moment / len(x))  # not a Cholesky root: tokens may span fewer than D directions
    root = vectors * values.clamp_min(0).sqrt()
    scaled = gate * (share / len(x)).sqrt()[:, None]
    return {
        "gate": torch.stack([_leading(scaled[list(expert)], root, rank) for expert in experts]),
        "up": torch.stack([_leading(up[list(expert)], root, rank) for expert in experts]),
    }


def _leading(rows: Tensor, root: Tensor, rank: int) -> Tensor:
    """(R, D): the combinations of rows (m, D) that carry most of the energy over tokens with E[x x^T] = root root^T."""
    left, _, _ = torch.linalg.svd(rows.double() @ root, full_matrices=False)
    return (left[:, :rank].t() @ rows.double()).float()
