"""ExpertWeaver (Zhao et al. 2026, arXiv 2602.15521): universal neurons are shared, the rest is clustered by when it is active.

With a_j the activation under the gate (signed; of a plain FFN's up projection) and its mean in each context:

    1. how many are shared   a layer's share of the model's neurons whose means vary least from context to context (lowest
                             standard deviation / |mean|), so that the layers differ; in whole slices, S in the mean
    2. which are shared      those of the largest |mean| in their layer
    3. experts               balanced clusters of the rest, by their means in the contexts at unit length
    4. router                the mean of each cluster's gate rows; outputs are not weighted

Every layer has the same share of active neurons: one with more shared slices chooses fewer experts. The paper's contexts are
the tasks of a calibration set. Here each calibration sequence is one: a handful of domains has too few dimensions for that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..plans import MoEPlan, SitePlan
from ..sites import DenseFFN
from ..stream import Stream
from .base import Context, Recipe, check_counts, planner, slice_sizes
from .clusters import balanced_clusters, input_rows, mean_rows_router, members, others, routed_site, spread_starts

_ROUNDS = 5


@dataclass(frozen=True)
class ExpertWeaver(Recipe):
    """Settings of the recipe; N + S = 64 slices as in the paper.

    Attributes:
        experts: N, routed experts, in the mean over the layers.
        shared: S, slices that are always on, in the mean over the layers.
        top_k: K, experts chosen per token, in the mean; S + K is the same in every layer.
    """

    experts: int = 48
    shared: int = 16
    top_k: int = 16

    def check(self) -> None:
        """Refuse numbers that make no sense."""
        check_counts(self.experts, self.shared, self.top_k)


@planner(ExpertWeaver)
def plan_expertweaver(recipe: ExpertWeaver, context: Context) -> MoEPlan:
    """One pass over the dense model for the profiles, then the layers' shares, then the split."""
    slices = recipe.experts + recipe.shared
    profiles = _profiles(context)
    generator = torch.Generator().manual_seed(context.seed)
    counts = shared_slices([variation(p) for p in profiles], recipe.shared, slices, recipe.shared + recipe.top_k)
    sites: list[SitePlan] = []
    tensors: dict[str, Tensor] = {}
    for match, profile, count in zip(context.matches, profiles, counts, strict=True):
        site, ffn = match.site, DenseFFN.read(match.site, context.captured.module)
        sizes = slice_sizes(site.intermediate_size, slices, site.name)
        shared = profile.mean(0).abs().topk(sum(sizes[:count])).indices
        neurons = others(shared, site.intermediate_size)
        points = torch.nn.functional.normalize(profile[:, neurons].t(), dim=1)
        labels, _ = balanced_clusters(points, spread_starts(points, slices - count, generator), sizes[count:], _ROUNDS)
        experts = members(labels, neurons, slices - count)
        top_k = recipe.shared + recipe.top_k - count
        planned, named = routed_site(site, shared, experts, top_k, "linear", mean_rows_router(ffn, experts))
        sites.append(planned)
        tensors.update({f"{site.name}/{name}": value for name, value in named.items()})
    return MoEPlan(recipe.name, recipe.settings(), tuple(sites), tensors)


def _profiles(context: Context) -> list[Tensor]:
    """For each FFN the mean activation (contexts, F) of every neuron in every context, on the CPU.

    Raises:
        InputError: there is one context alone, in which nothing can vary.
    """
    stream = Stream(context.captured, context.matches, context.batches)
    found = []
    for match, inputs in context.progress.over(stream, "expertweaver", len(context.matches)):
        ffn = DenseFFN.read(match.site, context.captured.module)
        weight, bias = input_rows(ffn)
        means, outputs = [], []
        for index, value in enumerate(inputs):
            rows = stream.rows(index, value)
            whole = value.dim() == 3 and len(rows) == value.shape[0] * value.shape[1]  # no padding was left out
            for part in rows.chunk(value.shape[0] if whole else 1):
                means.append(ffn.site.act(torch.nn.functional.linear(part, weight, bias)).float().mean(0).cpu())
            outputs.append(ffn.output(ffn.hidden(rows)))
        if len(means) < 2:
            raise InputError("the recipe expertweaver compares calibration sequences; give at least two")
        found.append(torch.stack(means))
        stream.feed(lambda rows, ffn=ffn: ffn.output(ffn.hidden(rows)), torch.cat(outputs))  # type: ignore[misc]
    return found


def variation(profile: Tensor) -> Tensor:
    """(F,) deviation over |mean| of each neuron's mean activations (contexts, F); infinite for one that is never on."""
    found = profile.std(0, unbiased=False) / profile.mean(0).abs().clamp_min(1e-12)
    return found.masked_fill((profile == 0).all(0), float("inf"))


def shared_slices(variations: list[Tensor], shared: int, slices: int, most: int) -> list[int]:
    """How many slices each layer shares: in proportion to its part of the steadiest ``shared / slices`` of all neurons.

    Args:
        variations: (F,) for each layer.
        shared: S, the mean wanted; rounding and the limit may leave it a little off.
        slices: N + S.
        most: S + K; a layer that shared more would have nothing to choose by.
    """
    if not shared:
        return [0] * len(variations)
    everything = torch.cat(variations)
    limit = everything.kthvalue(max(1, round(len(everything) * shared / slices))).values
    shares = [float((one <= limit).float().mean()) for one in variations]
    return [min(round(share * slices), most, slices - 1) for share in shares]
