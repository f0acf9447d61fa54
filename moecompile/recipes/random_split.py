"""LLaMA-MoE's split (Zhu et al. 2024, arXiv 2406.16554): neurons are dealt out at random, no data, no shared ones.

The paper found the random split best for training on. Its routers are trained with the model; here they start with small random
weights, so that before ``moecompile tune`` the choice of experts means nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..plans import MoEPlan, SitePlan
from .base import Context, Recipe, check_counts, planner, slice_sizes
from .clusters import routed_site

_DEVIATION = 0.02  # of a new linear layer in the Llama family


@dataclass(frozen=True)
class RandomSplit(Recipe):
    """Settings of the recipe.

    Attributes:
        experts: N, routed experts.
        shared: S, slices that are always on; none in the paper.
        top_k: K, experts chosen per token.
    """

    experts: int = 16
    shared: int = 0
    top_k: int = 8

    @property
    def name(self) -> str:
        """The name by which commands and files know the recipe."""
        return "random-split"

    @property
    def needs_calibration(self) -> bool:
        """No: the seed decides."""
        return False

    def check(self) -> None:
        """Refuse numbers that make no sense."""
        check_counts(self.experts, self.shared, self.top_k)


@planner(RandomSplit)
def plan_random(recipe: RandomSplit, context: Context) -> MoEPlan:
    """Deal the neurons of every FFN."""
    generator = torch.Generator().manual_seed(context.seed)
    sites: list[SitePlan] = []
    tensors: dict[str, Tensor] = {}
    for match in context.matches:
        site = match.site
        sizes = slice_sizes(site.intermediate_size, recipe.experts + recipe.shared, site.name)
        parts = torch.randperm(site.intermediate_size, generator=generator).split(sizes)
        shared = torch.cat([torch.zeros(0, dtype=torch.long), *parts[: recipe.shared]])
        experts = tuple(tuple(part.sort().values.tolist()) for part in parts[recipe.shared :])
        weight = _DEVIATION * torch.randn(recipe.experts, site.hidden_size, generator=generator)
        fitted = {"weight": weight, "bias": torch.zeros(recipe.experts)}
        planned, named = routed_site(site, shared, experts, recipe.top_k, "linear", fitted)
        sites.append(planned)
        tensors.update({f"{site.name}/{name}": value for name, value in named.items()})
    return MoEPlan(recipe.name, recipe.settings(), tuple(sites), tensors)
