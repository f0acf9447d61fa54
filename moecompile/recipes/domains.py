"""Domain experts: which neurons each domain of text uses most, layer by layer (Read-ME, arXiv 2410.19123, section 3.1).

    M_i = the d neurons of the largest mean |a_j| over domain i;  shared = M_1 ∩ ... ∩ M_n;  expert i = M_i - shared

All M_i have d neurons, so all experts of a layer have one width. Neurons of no mask go into spare experts that no router
chooses, so that all experts on is still the dense model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..sites import DenseFFN
from ..stream import Stream
from .base import Context
from .budgets import Curve, Divergence, allocate
from .neurons import sink_neurons, token_weights

RANKINGS = ("activation", "output", "variance")
_STEPS = 12  # levels of a layer's width between none and all


@dataclass(frozen=True)
class DomainNeurons:
    """What one FFN's neurons are to each domain.

    Attributes:
        strength: (domains, F), how strongly a domain uses a neuron.
        always: (F,) bool, neurons that attention sinks need.
        active: neurons that work for a domain, the shared ones included.
        metrics: what was measured for the budget, for the record.
    """

    strength: Tensor
    always: Tensor
    active: int
    metrics: Mapping[str, Any] = field(default_factory=dict)


@torch.no_grad()
def survey_domains(context: Context, ranking: str, fraction: float, sinks: bool, budget: str) -> list[DomainNeurons]:
    """What each FFN's neurons are to each domain, and how many of them work; one pass over the dense model.

    With the budget ``effect`` layers get more or fewer neurons, ``fraction`` of them on average (budgets.py). A layer's effect
    is the divergence of the model's output, on a window of each domain, when that layer alone has only each domain's neurons,
    the others at their mean; its error with fewer or more is the variance that idle ones take away.

    Args:
        context: whose batches belong to domains.
        ranking: ``activation``, E|a_j| as in the paper, ``output``, E|a_j| |w_j|, or ``variance``, Var[a_j] |w_j|^2 with tokens
            weighted by :func:`.neurons.token_weights`: what is lost of an idle neuron whose mean is put back.
        fraction: share of a layer's neurons that work for a domain.
        sinks: neurons that attention sinks need belong to every domain.
        budget: ``effect``, or ``even`` for the same fraction in every layer.
    """
    stream = Stream(context.captured, context.matches, context.batches)
    effects = _Effects(context) if budget == "effect" and len(context.matches) > 1 else None
    found, curves = [], []
    for match, inputs in context.progress.over(stream, "domain statistics", len(context.matches)):
        dense = DenseFFN.read(match.site, context.captured.module)
        width = match.site.intermediate_size
        sums = _Sums(len(context.domains), width)
        outputs = []
        for index, value in enumerate(inputs):
            hidden = dense.hidden(stream.rows(index, value))
            outputs.append(dense.output(hidden))
            sums.add(context.domain_of[index], hidden.float(), outputs[-1].float(), dense.down.float())
        strength, variance = sums.strength(ranking, dense.down.float()), sums.strength("variance", dense.down.float())
        active = min(width, max(2, round(fraction * width)))
        always = sums.sink if sinks and int(sums.sink.sum()) < active else torch.zeros_like(sums.sink)
        found.append(DomainNeurons(strength, always, active))
        dial = [k for k in _levels(width, active) if k > int(always.sum())]
        if effects is not None:
            errors = {k: float((variance * ~domain_masks(strength, k, always)).sum()) for k in dial}
            effect = effects.next(dense, domain_masks(strength, active, always), sums)
            curves.append(Curve(1.0, errors, effect, active))
        stream.feed(lambda rows, dense=dense: dense.output(dense.hidden(rows)), torch.cat(outputs))  # type: ignore[misc]
    if len(curves) < len(found):
        return found
    widths = allocate(curves)
    return [
        replace(one, active=active, metrics={"output_divergence": round(curve.effect, 6)})
        for one, active, curve in zip(found, widths, curves, strict=True)
    ]


def _levels(width: int, active: int) -> list[int]:
    """Numbers of neurons that a layer may have, ``active`` among them, ascending; not all: nothing would be routed then."""
    step = max(1, width // _STEPS)
    return sorted({active, *range(active % step or step, width, step)})


class _Sums:
    """Sums over the tokens of each domain, on the CPU."""

    def __init__(self, domains: int, width: int) -> None:
        self.size = torch.zeros(domains, width)
        self.count = torch.zeros(domains)
        self.moments = torch.zeros(2, domains, width, dtype=torch.float64)
        self.weight = torch.zeros(domains, dtype=torch.float64)
        self.sink = torch.zeros(width, dtype=torch.bool)

    def add(self, domain: int, hidden: Tensor, y: Tensor, down: Tensor) -> None:
        """Hidden activations (T, F) and outputs (T, D) of one batch; the down projection is (D, F)."""
        self.size[domain] += hidden.abs().sum(0).cpu()
        self.count[domain] += len(hidden)
        self.sink |= sink_neurons(hidden, down).cpu()
        weights = token_weights(y.norm(dim=1))
        self.moments[:, domain] += torch.stack([weights @ hidden, weights @ hidden.square()]).cpu()
        self.weight[domain] += float(weights.sum())

    def mean(self, domain: int) -> Tensor:
        """(F,) weighted mean of the activations."""
        return (self.moments[0, domain] / self.weight[domain].clamp_min(1e-12)).float()

    def strength(self, ranking: str, down: Tensor) -> Tensor:
        """(domains, F) by one of :data:`RANKINGS`."""
        scale = down.norm(dim=0).cpu()
        if ranking == "variance":
            first, second = self.moments / self.weight.clamp_min(1e-12)[:, None]
            return (second - first.square()).clamp_min(0).float() * scale.square()
        mean = self.size / self.count.clamp_min(1)[:, None]
        return mean * scale if ranking == "output" else mean


class _Effects:
    """What it does to the model's output when one FFN alone has only each domain's neurons; FFN after FFN."""

    def __init__(self, context: Context) -> None:
        whose = context.domain_of
        self._domains = sorted(set(whose))
        windows = [_first_window(context, context.batches[whose.index(domain)]) for domain in self._domains]
        self._stream = Stream(context.captured, context.matches, windows)
        self._vocabulary = context.vocabulary
        self._dense: list[Divergence] = []
        self._number = 0

    def next(self, dense: DenseFFN, masks: Tensor, sums: _Sums) -> float:
        """The mean divergence over the domains. ``masks`` (domains, F) are the neurons that each one keeps."""
        stream, found = self._stream, 0.0
        for place, (domain, value) in enumerate(zip(self._domains, stream.inputs(self._number), strict=True)):
            hidden = dense.hidden(value.reshape(-1, value.shape[-1]))
            if len(self._dense) == place:
                full = stream.outputs(place, dense.output(hidden).reshape(value.shape))
                self._dense.append(Divergence(full, self._vocabulary))
            kept = torch.where(masks[domain].to(hidden.device), hidden, sums.mean(domain).to(hidden))
            found += self._dense[place](stream.outputs(place, dense.output(kept).reshape(value.shape)))
        stream.feed(lambda rows: dense.output(dense.hidden(rows)))
        self._number += 1
        return found / len(self._domains)


def _first_window(context: Context, batch: Any) -> Any:
    """The first row of each input; the whole batch where the graph was not captured for any batch size."""
    if not isinstance(batch, Mapping) or any(0 not in context.captured.dynamic.get(name, ()) for name in batch):
        return batch
    return {name: value[:1] for name, value in batch.items()}


def domain_masks(strength: Tensor, width: int, always: Tensor) -> Tensor:
    """(domains, F) bool: the ``width`` strongest neurons of each domain, those of ``always`` first."""
    return _masks(_ranked(strength, always), width)


def _ranked(strength: Tensor, always: Tensor) -> Tensor:
    return torch.where(always, strength.amax() + strength + 1, strength)


def _masks(ranked: Tensor, width: int) -> Tensor:
    return torch.zeros_like(ranked, dtype=torch.bool).scatter_(1, ranked.topk(width, dim=1).indices, True)


def domain_experts(strength: Tensor, width: int, always: Tensor) -> tuple[list[int], list[list[int]], int]:
    """Shared neurons, experts, and how many of the experts are spare.

    Args:
        strength: (domains, F).
        width: d, neurons that work for a domain, the shared ones included.
        always: (F,) bool, neurons that belong to every domain whatever their rank.

    Returns:
        The numbers of the shared neurons; those of each domain's expert, then of each spare one; how many are spare.
    """
    ranked = _ranked(strength, always)
    masks = _masks(ranked, width)
    common = masks.all(0)
    if bool((masks == common).all()):  # every domain uses the same neurons: an expert needs one at least
        common[int(torch.where(common, ranked.mean(0), torch.inf).argmin())] = False
    experts = [torch.nonzero(mask & ~common).flatten().tolist() for mask in masks]
    size = len(experts[0])
    idle = torch.nonzero(~(masks.any(0) | common)).flatten()
    spare = [part.tolist() for part in idle.split(size)] if len(idle) else []
    return torch.nonzero(common).flatten().tolist(), experts + spare, len(spare)
