"""Calibrated: the training-free recipe. Shared neurons, balanced experts, a linear router in closed form, a refitted down
projection; layer by layer on the converted prefix, with the dense model as the target.

For each FFN, with x, h of the *converted* stream and y, r of the *dense* one (r, r' the residuals that the output is added to):

    1. shared neurons: those that fire most, and those that attention sinks need      (neurons.choose_shared)
    2. experts: balanced clusters of what a linear router can predict                 (neurons.group_neurons)
    3. router: ridge regression of the experts' amplitudes on x                       (routing.fit_router)
    4. refit of the down projection against y + drift * (r - r'), clipped             (refit.refit_down)

The last step lets each layer repair part of what the layers before it broke. docs/quality.md holds what was tried.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..apply import build_block
from ..errors import PlanError
from ..plans import BIAS, DOWN, MEANS, ROUTER, MoEPlan, SitePlan
from ..sites import DenseFFN
from ..stream import Stream
from .base import Context, Recipe, check_counts, planner, slice_sizes
from .neurons import choose_shared, group_neurons, sample_tokens, token_weights
from .refit import Mask, idle_means, refit_down
from .routing import fit_router, route

_GROUPING_TOKENS = 8192
# The correction of a token is at most this many times its FFN output. Behind the layer that writes the attention sinks, their
# own outputs are tiny and their drift is hundreds of times larger; unclipped it took over the regression on one seed
# (perplexity 108 instead of 68).
_DRIFT_LIMIT = 4.0
_CHUNK = 8192


@dataclass(frozen=True)
class Calibrated(Recipe):
    """Settings of the recipe.

    Attributes:
        experts: N, routed experts.
        shared: S, slices that are always on.
        top_k: K, experts chosen per token; (S + K) / (N + S) of the neurons are active.
        drift: how much of the drift between dense and converted residual each layer tries to repair (0: none).
    """

    experts: int = 48
    shared: int = 16
    top_k: int = 16
    drift: float = 0.6

    def check(self) -> None:
        """Refuse numbers that make no sense."""
        check_counts(self.experts, self.shared, self.top_k)
        if not (math.isfinite(self.drift) and 0.0 <= self.drift <= 1.0):
            raise PlanError(f"drift is {self.drift}; it must be from 0 to 1")


@planner(Calibrated)
def plan_calibrated(recipe: Calibrated, context: Context) -> MoEPlan:
    """Plan every FFN in order, each on the stream that the ones before it have left."""
    dense_stream = Stream(context.captured, context.matches, context.batches)
    moe_stream = Stream(context.captured, context.matches, context.batches)
    generator = torch.Generator().manual_seed(context.seed)
    sites: list[SitePlan] = []
    tensors: dict[str, Tensor] = {}
    for number, match in enumerate(context.progress.over(context.matches, "calibrating")):
        ffn = DenseFFN.read(match.site, context.captured.module)
        x_dense = dense_stream.tokens(number, dense_stream.inputs(number)).float()
        x = moe_stream.tokens(number, moe_stream.inputs(number)).float()
        y = torch.cat([ffn.output(ffn.hidden(part.to(ffn.up.dtype))).float() for part in x_dense.split(_CHUNK)])
        del x_dense
        target = y
        if recipe.drift and match.residual is not None:
            drift = dense_stream.residual(number).sub_(moe_stream.residual(number))
            target = y + clipped(recipe.drift * drift, y)
            del drift
        planned, fitted, error, own = _plan_site(recipe, ffn, x, y, target, generator)
        if error > 1.0:
            context.progress.say(
                f"{match.site.name}: the relative error is {error:.2f}; the calibration text may not suit the model"
            )
        sites.append(planned)
        tensors.update({f"{match.site.name}/{name}": value.cpu() for name, value in fitted.items()})
        dense_stream.feed(lambda rows, ffn=ffn: ffn.output(ffn.hidden(rows)), y)  # type: ignore[misc]
        moe_stream.feed(build_block(planned, fitted, ffn).eval(), own)
    return MoEPlan(recipe.name, recipe.settings(), tuple(sites), tensors)


def clipped(correction: Tensor, output: Tensor) -> Tensor:
    """Corrections (T, D) no longer than :data:`_DRIFT_LIMIT` times each token's output (T, D)."""
    allowed = _DRIFT_LIMIT * output.norm(dim=1, keepdim=True)
    length = correction.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return correction * (allowed / length).clamp_max(1.0)


def _plan_site(
    recipe: Calibrated, ffn: DenseFFN, x: Tensor, y: Tensor, target: Tensor, generator: torch.Generator
) -> tuple[SitePlan, dict[str, Tensor], float, Tensor | None]:
    """One FFN: its plan, its fitted tensors, its weighted relative error on the calibration tokens, its outputs there.

    Args:
        x: (T, D) the converted stream's inputs, float32.
        y: (T, D) the dense stream's outputs.
        target: (T, D) what the converted FFN should put out.
    """
    site = ffn.site
    down = ffn.down.float()
    bias = None if ffn.down_bias is None else ffn.down_bias.float()
    hidden = torch.cat([ffn.hidden(part.to(ffn.up.dtype)).float() for part in x.split(_CHUNK)])  # [T, F]
    sizes = slice_sizes(site.intermediate_size, recipe.experts + recipe.shared, site.name)
    weights = token_weights(torch.maximum(y.norm(dim=1), target.norm(dim=1)))
    some = sample_tokens(y.norm(dim=1), _GROUPING_TOKENS, generator)
    count = sum(sizes[: recipe.shared])
    shared = choose_shared(hidden[some], down, count, weights[some]) if count else torch.zeros(0, dtype=torch.long)
    experts = group_neurons(x[some], hidden[some], down, shared, sizes[recipe.shared :], weights[some], generator)
    planned = SitePlan(site, tuple(shared.tolist()), tuple(tuple(e) for e in experts), recipe.top_k)
    if recipe.top_k == recipe.experts:
        return planned, {}, 0.0, None
    fitted: dict[str, Tensor] = {}
    chosen = torch.zeros(len(x), recipe.experts, dtype=torch.bool, device=x.device)
    if recipe.top_k:
        fitted[f"{ROUTER}weight"], fitted[f"{ROUTER}bias"] = fit_router(x, hidden, down, experts, weights)
        chosen = route(x, fitted[f"{ROUTER}weight"], fitted[f"{ROUTER}bias"], recipe.top_k)
    mask = _neuron_mask(chosen, shared, experts, site.intermediate_size)
    fitted[MEANS] = idle_means(hidden, mask, weights)
    fitted[DOWN], fitted[BIAS] = refit_down(hidden, mask, fitted[MEANS], down, bias, target, weights)
    own, error = masked_outputs(hidden, mask, fitted, bias, y, weights)
    router = "linear" if recipe.top_k else "none"
    metrics = {"calibration_error": round(error, 6)}
    return replace(planned, router=router, fitted=tuple(fitted), metrics=metrics), fitted, error, own


def _neuron_mask(chosen: Tensor, shared: Tensor, experts: list[list[int]], width: int) -> Mask:
    """From the (T, N) choice of experts to (tokens, F) float masks of active neurons, a chunk at a time."""
    owner = torch.full((width,), len(experts), dtype=torch.long, device=chosen.device)  # the extra column is always on
    for number, neurons in enumerate(experts):
        owner[neurons] = number

    def mask(start: int, stop: int) -> Tensor:
        part = chosen[start:stop]
        return torch.cat([part, torch.ones_like(part[:, :1])], dim=1).float()[:, owner]

    return mask


def masked_outputs(
    hidden: Tensor, mask: Mask, fitted: dict[str, Tensor], bias: Tensor | None, y: Tensor, weights: Tensor
) -> tuple[Tensor, float]:
    """The converted FFN's outputs (T, D), and their error: the root of weighted |y - y_dense|^2 / |y_dense|^2."""
    down, means = fitted[DOWN], fitted[MEANS]
    base = fitted[BIAS] + down @ means + (0.0 if bias is None else bias)
    parts, wrong, right = [], 0.0, 0.0
    for start in range(0, len(hidden), _CHUNK):
        stop = min(start + _CHUNK, len(hidden))
        parts.append(((hidden[start:stop] - means) * mask(start, stop)) @ down.t() + base)
        w = weights[start:stop]
        wrong += float(w @ (parts[-1] - y[start:stop]).square().sum(1))
        right += float(w @ y[start:stop].square().sum(1))
    return torch.cat(parts), math.sqrt(wrong / max(right, 1e-30))
