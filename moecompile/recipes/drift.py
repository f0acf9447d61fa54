"""The drift between the dense and the converted residual stream, as a correction of what an FFN should put out.

    r + p(y)        what follows an FFN: its output y, added to the residual r; p is nothing, a factor or a norm
    y* = y + c,     p(y) + share (r - r') = p(y*) to first order:  c = share (r - r') / (a g)

r is the dense stream's residual, r' the converted one's. p is taken as p(y) = a g y with a factor a for each token and g for
each channel: exact for factors, and for RMSNorm but for what c changes of the token's size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..stream import Stream

# The correction of a token is at most this many times its FFN output. Behind the layer that writes the attention sinks, their
# own outputs are tiny and their drift is hundreds of times larger; unclipped it took over the regression on one seed
# (perplexity 108 instead of 68).
_LIMIT = 4.0
_SAMPLE = 64  # tokens by which g is told
_EXACT = 0.02  # by how much p may be something else, relative
_SMALL = 0.1  # channels whose g is smaller, relative to the median one, are corrected less


def repaired(dense: Stream, moe: Stream, number: int, y: Tensor, share: float) -> Tensor:
    """What FFN ``number`` should put out, (T, D): its outputs y in the dense stream, and part of the drift on top.

    Args:
        dense, moe: the streams, at this FFN.
        number: the FFN's.
        y: (T, D) float32.
        share: of the drift that is repaired, from 0 to 1.
    """
    if not share or not dense.matches[number].residual:
        return y
    drift = dense.residual(number).sub_(moe.residual(number))
    if dense.matches[number].between:
        scales = factors(y, dense.added(number, y))
        if scales is None:
            return y
        token, channel = scales
        small = _SMALL * channel.abs().median()
        drift.mul_(torch.where(token == 0, token, 1 / token)[:, None])
        drift.mul_(channel / (channel.square() + small.square()).clamp_min(1e-30))
    return y + clipped(share * drift, y)


def factors(y: Tensor, added: Tensor) -> tuple[Tensor, Tensor] | None:
    """a (T,) and g (D,) of ``added`` = a g y, both (T, D), 0 where nothing is added; None where it is something else."""
    live = (added != 0).any(0)
    whole = torch.nonzero(((y != 0) & (added != 0) | ~live).all(1)).flatten()
    if len(whole) < 2 or not bool(live.any()):
        return None
    some = whole[torch.linspace(0, len(whole) - 1, min(_SAMPLE, len(whole)), device=whole.device).round().long()]
    ratio = added[some][:, live].double() / y[some][:, live].double()
    ratio /= ratio.norm(dim=1, keepdim=True)  # tokens' sizes differ by orders of magnitude
    _, size, right = torch.linalg.svd(ratio, full_matrices=False)
    if not float(size[1:].norm()) <= _EXACT * float(size[0]):
        return None
    channel = torch.zeros_like(y[0]).masked_scatter(live, right[0].to(y.dtype))
    scaled = y * channel
    token = (added * scaled).sum(1) / scaled.square().sum(1).clamp_min(1e-30)
    return (token, channel) if bool(token.isfinite().all()) else None


def clipped(correction: Tensor, output: Tensor) -> Tensor:
    """Corrections (T, D) no longer than :data:`_LIMIT` times each token's output (T, D)."""
    allowed = _LIMIT * output.norm(dim=1, keepdim=True)
    length = correction.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return correction * (allowed / length).clamp_max(1.0)
