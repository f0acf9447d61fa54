"""Domain experts: which neurons each domain of text uses most, layer by layer (Read-ME, arXiv 2410.19123, section 3.1).

    M_i = the d neurons of the largest mean |a_j| over domain i;  shared = M_1 ∩ ... ∩ M_n;  expert i = M_i - shared

All M_i have d neurons, so all experts have one width. Neurons of no mask go into spare experts that no router chooses, so that
all experts on is still the dense model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..sites import DenseFFN
from ..stream import Stream
from .base import Context
from .neurons import sink_neurons, token_weights

RANKINGS = ("activation", "output", "variance")


@torch.no_grad()
def domain_strengths(context: Context, ranking: str) -> tuple[list[Tensor], list[Tensor]]:
    """How strongly each domain uses each neuron, and which neurons attention sinks need; one pass over the dense model.

    Args:
        context: whose batches belong to domains.
        ranking: ``activation``, E|a_j| as in the paper, ``output``, E|a_j| |w_j|, or ``variance``, Var[a_j] |w_j|^2 with tokens
            weighted by :func:`.neurons.token_weights`: what is lost of an idle neuron whose mean is put back.

    Returns:
        For each FFN the strengths (domains, F) and the sinks' neurons (F,) bool.
    """
    stream = Stream(context.captured, context.matches, context.batches)
    strengths, sinks = [], []
    for match, inputs in context.progress.over(stream, "domain statistics", len(context.matches)):
        dense = DenseFFN.read(match.site, context.captured.module)
        scale = dense.down.float().norm(dim=0)
        total = torch.zeros(len(context.domains), match.site.intermediate_size)
        count = torch.zeros(len(context.domains))
        moments = torch.zeros(2, len(context.domains), match.site.intermediate_size, dtype=torch.float64)
        weight = torch.zeros(len(context.domains), dtype=torch.float64)
        sink = torch.zeros(match.site.intermediate_size, dtype=torch.bool)
        outputs = []
        for index, value in enumerate(inputs):
            hidden = dense.hidden(stream.rows(index, value))
            domain, size = context.domain_of[index], hidden.float().abs()
            total[domain] += size.sum(0).cpu()
            count[domain] += len(hidden)
            sink |= sink_neurons(hidden.float(), dense.down.float()).cpu()
            outputs.append(dense.output(hidden))
            own = token_weights(outputs[-1].float().norm(dim=1))
            moments[:, domain] += torch.stack([own @ hidden.float(), own @ size.square()]).cpu()
            weight[domain] += float(own.sum())
        mean = total / count.clamp_min(1)[:, None]
        first, second = moments / weight.clamp_min(1e-12)[:, None]
        variance = (second - first.square()).clamp_min(0).float()
        by = {"activation": mean, "output": mean * scale.cpu(), "variance": variance * scale.cpu().square()}
        strengths.append(by[ranking])
        sinks.append(sink)
        stream.feed(lambda rows, dense=dense: dense.output(dense.hidden(rows)), torch.cat(outputs))  # type: ignore[misc]
    return strengths, sinks


def domain_experts(strength: Tensor, width: int, always: Tensor) -> tuple[list[int], list[list[int]], int]:
    """Shared neurons, experts, and how many of the experts are spare.

    Args:
        strength: (domains, F).
        width: d, neurons that work for a domain, the shared ones included.
        always: (F,) bool, neurons that belong to every domain whatever their rank.

    Returns:
        The numbers of the shared neurons; those of each domain's expert, then of each spare one; how many are spare.
    """
    ranked = torch.where(always, strength.amax() + strength + 1, strength)
    masks = torch.zeros_like(strength, dtype=torch.bool)
    masks.scatter_(1, ranked.topk(width, dim=1).indices, True)
    common = masks.all(0)
    if bool((masks == common).all()):  # every domain uses the same neurons: an expert needs one at least
        common[int(torch.where(common, ranked.mean(0), torch.inf).argmin())] = False
    experts = [torch.nonzero(mask & ~common).flatten().tolist() for mask in masks]
    size = len(experts[0])
    idle = torch.nonzero(~(masks.any(0) | common)).flatten()
    spare = [part.tolist() for part in idle.split(size)] if len(idle) else []
    return torch.nonzero(common).flatten().tolist(), experts + spare, len(spare)
