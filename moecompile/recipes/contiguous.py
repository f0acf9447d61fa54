"""Contiguous: slices of the dense width in stored order, no data. For tests and parity, not for quality."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from ..plans import ROUTER, MoEPlan, SitePlan
from ..sites import DenseFFN
from .base import Context, Recipe, check_counts, planner, slice_sizes


@dataclass(frozen=True)
class Contiguous(Recipe):
    """Settings of the recipe.

    Attributes:
        experts: N, routed experts.
        shared: S, slices that are always on (the first ones).
        top_k: K, experts chosen per token; all of them by default.
    """

    experts: int = 8
    shared: int = 0
    top_k: int | None = None

    @property
    def needs_calibration(self) -> bool:
        """No: the slices are as stored."""
        return False

    @property
    def chosen(self) -> int:
        """K."""
        return self.experts if self.top_k is None else self.top_k

    def check(self) -> None:
        """Refuse numbers that make no sense."""
        check_counts(self.experts, self.shared, self.chosen)


@planner(Contiguous)
def plan_contiguous(recipe: Contiguous, context: Context) -> MoEPlan:
    """Cut every FFN in stored order; where experts are to be chosen, the router's row is the mean of the expert's gate rows
    (of its up rows in a plain FFN), as ExpertWeaver does (arXiv 2602.15521)."""
    sites, tensors = [], {}
    routed = 0 < recipe.chosen < recipe.experts
    for match in context.matches:
        site = match.site
        sizes = slice_sizes(site.intermediate_size, recipe.experts + recipe.shared, site.name)
        bounds = torch.tensor([0, *sizes]).cumsum(0).tolist()
        slices = [tuple(range(start, stop)) for start, stop in pairwise(bounds)]
        shared = tuple(n for part in slices[: recipe.shared] for n in part)
        experts = tuple(slices[recipe.shared :])
        fitted: tuple[str, ...] = ()
        if routed:
            dense = DenseFFN.read(site, context.captured.module)
            rows = dense.up if dense.gate is None else dense.gate
            weight = torch.stack([rows[list(expert)].mean(0) for expert in experts])
            tensors[f"{site.name}/{ROUTER}weight"] = weight.float().cpu()
            tensors[f"{site.name}/{ROUTER}bias"] = torch.zeros(recipe.experts)
            fitted = (f"{ROUTER}weight", f"{ROUTER}bias")
        sites.append(SitePlan(site, shared, experts, recipe.chosen, "linear" if routed else "none", fitted))
    return MoEPlan(recipe.name, recipe.settings(), tuple(sites), tensors)
