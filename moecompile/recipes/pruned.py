"""The controls: a static choice of neurons, no routing. What an MoE has to beat.

Both keep the idle neurons as one expert that is never chosen, so that "all experts on" is still the dense model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import PlanError
from ..plans import BIAS, DOWN, MEANS, MoEPlan, SitePlan
from ..sites import DenseFFN
from ..stream import Stream
from .base import Context, Recipe, check_fraction, planner
from .neurons import token_weights
from .refit import CHUNK, in_chunks, refit_down


@dataclass(frozen=True)
class Static(Recipe):
    """Keep the neurons of the highest mean output energy, E[h_j^2] |w_j|^2, the same share in every layer.

    Attributes:
        active_fraction: share of neurons that stay.
        compensation: ``none``, ``means`` (the idle neurons' mean output as a bias) or ``refit`` (means, and the down
            projection refitted by least squares for this mask).
    """

    active_fraction: float = 0.5
    compensation: str = "none"

    def check(self) -> None:
        """Refuse settings that make no sense."""
        check_fraction(self.active_fraction)
        if self.compensation not in ("none", "means", "refit"):
            raise PlanError(f"there is no compensation '{self.compensation}'; there are: none, means, refit")


@dataclass(frozen=True)
class Flap(Recipe):
    """FLAP for FFNs (An et al. 2024, arXiv 2312.11983): score Var[h_j] |w_j|^2, standardised within each layer, one ranking
    over all layers; the pruned neurons' mean output becomes a bias.

    Attributes:
        active_fraction: share of neurons that stay, over all layers together.
        plain_statistics: take means and variances over tokens as the paper does. By default tokens are weighted as for
            ``calibrated``, which makes a far stronger control: the plain variances are the attention sinks' alone.
    """

    active_fraction: float = 0.5
    plain_statistics: bool = False

    def check(self) -> None:
        """Refuse settings that make no sense."""
        check_fraction(self.active_fraction)


@dataclass
class _Statistics:
    mean: Tensor  # [F]
    energy: Tensor  # [F], E[h^2] |w|^2
    fluctuation: Tensor  # [F], Var[h] |w|^2


def _statistics(h: Tensor, down: Tensor, weights: Tensor | None = None) -> _Statistics:
    """Of hidden activations (T, F), float32, and a down projection (D, F); tokens weighted by (T,) or alike."""
    share = torch.full((len(h),), 1.0 / len(h), device=h.device) if weights is None else weights / weights.sum()
    scale = down.float().square().sum(0)
    mean = share @ h
    energy, fluctuation = torch.zeros_like(mean), torch.zeros_like(mean)
    for weight, rows in zip(share.split(CHUNK), h.split(CHUNK), strict=True):
        energy += weight @ rows.square()
        fluctuation += weight @ (rows - mean).square()
    return _Statistics(mean, energy * scale, fluctuation * scale)


def _activity(dense: DenseFFN, x: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden activations (T, F) and outputs (T, D), float32; what else it takes is held for a chunk of tokens alone."""
    hidden = in_chunks(dense.hidden, x, dense.site.intermediate_size, dense.up.dtype)
    return hidden, in_chunks(dense.output, hidden, dense.site.hidden_size, dense.up.dtype)


def _site_plan(match_site, keep: Tensor, fitted: tuple[str, ...]) -> SitePlan:  # type: ignore[no-untyped-def]
    kept = torch.nonzero(keep).flatten().tolist()
    idle = torch.nonzero(~keep).flatten().tolist()
    return SitePlan(match_site, tuple(kept), (tuple(idle),) if idle else (), 0, "none", fitted)


def _kept(fraction: float, width: int) -> int:
    return min(width, max(1, round(fraction * width)))


@planner(Static)
def plan_static(recipe: Static, context: Context) -> MoEPlan:
    """One pass over the dense model."""
    sites, tensors = [], {}
    stream = Stream(context.captured, context.matches, context.batches)
    for number, (match, inputs) in enumerate(context.progress.over(stream, "static mask", len(context.matches))):
        site, dense = match.site, DenseFFN.read(match.site, context.captured.module)
        h, y = _activity(dense, stream.tokens(number, inputs))
        statistics = _statistics(h, dense.down)
        keep = torch.zeros(site.intermediate_size, dtype=torch.bool)
        keep[statistics.energy.topk(_kept(recipe.active_fraction, site.intermediate_size)).indices.cpu()] = True
        fitted: tuple[str, ...] = ()
        if recipe.compensation != "none" and not keep.all():
            fitted = (MEANS,)
            means = torch.where(keep, 0.0, statistics.mean.cpu())
            tensors[f"{site.name}/{MEANS}"] = means
            if recipe.compensation == "refit":
                rows = keep.to(h).expand(CHUNK, -1)
                bias = None if dense.down_bias is None else dense.down_bias.float()
                down, constant = refit_down(
                    h,
                    lambda start, stop, rows=rows: rows[: stop - start],  # type: ignore[misc]
                    means.to(h.device),
                    dense.down.float(),
                    bias,
                    y,
                    torch.ones(len(h), device=h.device),
                )
                tensors[f"{site.name}/{DOWN}"], tensors[f"{site.name}/{BIAS}"] = down.cpu(), constant.cpu()
                fitted = (MEANS, DOWN, BIAS)
        sites.append(_site_plan(site, keep, fitted))
        stream.feed(lambda rows, dense=dense: dense.output(dense.hidden(rows)), y)  # type: ignore[misc]
    return MoEPlan(recipe.name, recipe.settings(), tuple(sites), tensors)


@planner(Flap)
def plan_flap(recipe: Flap, context: Context) -> MoEPlan:
    """One pass over the dense model for the statistics, then one ranking over all layers."""
    stream = Stream(context.captured, context.matches, context.batches)
    found: list[_Statistics] = []
    for number, (match, inputs) in enumerate(context.progress.over(stream, "FLAP statistics", len(context.matches))):
        dense = DenseFFN.read(match.site, context.captured.module)
        h, y = _activity(dense, stream.tokens(number, inputs))
        weights = None if recipe.plain_statistics else token_weights(y.norm(dim=1))
        found.append(_statistics(h, dense.down, weights))
        stream.feed(lambda rows, dense=dense: dense.output(dense.hidden(rows)), y)  # type: ignore[misc]
    scores = [(s.fluctuation - s.fluctuation.mean()) / s.fluctuation.std().clamp_min(1e-12) for s in found]
    ranking = torch.cat(scores).cpu()
    threshold = ranking.topk(_kept(recipe.active_fraction, len(ranking))).values.min()
    sites, tensors = [], {}
    for match, score, statistics in zip(context.matches, scores, found, strict=True):
        keep = score.cpu() >= threshold
        keep[score.argmax()] = True  # a layer keeps one neuron at least
        fitted: tuple[str, ...] = () if keep.all() else (MEANS,)
        if fitted:
            tensors[f"{match.site.name}/{MEANS}"] = torch.where(keep, 0.0, statistics.mean.cpu())
        sites.append(_site_plan(match.site, keep, fitted))
    return MoEPlan(recipe.name, recipe.settings(), tuple(sites), tensors)
