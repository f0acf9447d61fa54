"""Calibrated: the training-free recipe. Shared neurons, balanced experts, a linear router in closed form, a refitted down
projection; layer by layer on the converted prefix, with the dense model as the target.

First, on the dense model, for each FFN (survey.py):

    1. shared neurons: those that a router would lose most of, and those that attention sinks need    (neurons.choose_shared)
    2. experts: balanced clusters of what a linear router can predict                 (neurons.group_neurons)
    3. how many experts it gets, by what idle ones do to the model's output           (budgets.allocate)

Then in order, with x, h of the *converted* stream and y, r of the *dense* one (r, r' what the output is added to):

    4. router: ridge regression of the experts' amplitudes on x                       (routing.fit_router)
    5. refit of the down projection against y + drift * (r - r'), clipped             (drift.repaired, refit.refit_down)

The last step lets each layer repair part of what the layers before it broke. Behind the last FFN, in a language model:

    6. gain of the norm before the head, fitted to the dense model's next words       (final_norm.refit_final_norm)

docs/quality.md holds what was tried.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..apply import build_block
from ..errors import PlanError
from ..plans import BIAS, DOWN, MEANS, ROUTER, MoEPlan, SitePlan
from ..precision import PRECISIONS, compute_dtype, multiplying, product
from ..sites import DenseFFN
from ..stream import Stream
from .base import Context, Recipe, check_counts, planner
from .drift import repaired
from .final_norm import FinalNorm, find_final_norm, refit_final_norm
from .neurons import token_weights
from .refit import CHUNK, Mask, idle_means, in_chunks, neuron_mask, refit_down
from .routing import fit_router, route
from .survey import BUDGETS, Split, survey

_KEEP_EVERY = 12  # one batch in so many is kept from the regressions: the final norm needs tokens that they have not seen


@dataclass(frozen=True)
class Calibrated(Recipe):
    """Settings of the recipe.

    Attributes:
        experts: N, routed experts.
        shared: S, slices that are always on.
        top_k: K, experts chosen per token, on average over the layers; (S + K) / (N + S) of the neurons are active.
        drift: how much of the drift between dense and converted residual each layer tries to repair (0: none).
        budget: ``effect`` gives each layer its own number of experts by what idle ones do to the model's output (from 32
            experts on; with fewer it is as ``even``), ``even`` gives every layer K. The effect is measured on the first
            calibration batch, which should be of many texts.
        precision: what products over tokens are multiplied in; ``auto`` is bfloat16 where the device multiplies it natively,
            for a model in float32. Routers are fitted, and choose, in float32.
        final_norm: fit the norm before the head anew, where the model has logits of words.
    """

    experts: int = 96
    shared: int = 32
    top_k: int = 32
    drift: float = 0.6
    budget: str = "effect"
    precision: str = "auto"
    final_norm: bool = True

    def check(self) -> None:
        """Refuse numbers that make no sense."""
        check_counts(self.experts, self.shared, self.top_k)
        if not (math.isfinite(self.drift) and 0.0 <= self.drift <= 1.0):
            raise PlanError(f"drift is {self.drift}; it must be from 0 to 1")
        if self.budget not in BUDGETS:
            raise PlanError(f"there is no budget '{self.budget}'; there are: {', '.join(BUDGETS)}")
        if self.precision not in PRECISIONS:
            raise PlanError(f"--precision is '{self.precision}'; it can be {', '.join(PRECISIONS)}")


@planner(Calibrated)
def plan_calibrated(recipe: Calibrated, context: Context) -> MoEPlan:
    """Survey the dense model, then plan every FFN in order, each on the stream that the ones before it have left."""
    recipe = replace(recipe, precision=_precision(recipe, context))
    dtype: torch.dtype = getattr(torch, recipe.precision)
    generator = torch.Generator().manual_seed(context.seed)
    splits = survey(context, recipe.experts, recipe.shared, recipe.top_k, recipe.budget, generator, dtype)
    norm = find_final_norm(context.captured, context.vocabulary) if recipe.final_norm else ""
    last = norm.states if isinstance(norm, FinalNorm) else None
    enough = last is not None and len(context.batches) >= _KEEP_EVERY
    kept = set(range(_KEEP_EVERY - 1, len(context.batches), _KEEP_EVERY)) if enough else set()
    dense_stream = Stream(context.captured, context.matches, context.batches, dtype, last)
    moe_stream = Stream(context.captured, context.matches, context.batches, dtype, last)
    sites: list[SitePlan] = []
    tensors: dict[str, Tensor] = {}
    for number, match in enumerate(context.progress.over(context.matches, "calibrating")):
        ffn = DenseFFN.read(match.site, context.captured.module)
        x_dense = dense_stream.tokens(number, dense_stream.inputs(number)).float()
        inputs = moe_stream.inputs(number)
        x = moe_stream.tokens(number, inputs).float()
        unseen = _of_batches(moe_stream, inputs, kept)
        with multiplying(dtype, x.device):
            y = in_chunks(lambda rows, ffn=ffn: ffn.output(ffn.hidden(rows)), x_dense, ffn.site.hidden_size, ffn.up.dtype)  # type: ignore[misc]
        del x_dense
        target = repaired(dense_stream, moe_stream, number, y, recipe.drift)
        planned, fitted, error, own = _plan_site(splits[number], ffn, x, y, target, unseen, dtype)
        if error > 1.0:
            context.progress.say(
                f"{match.site.name}: the relative error is {error:.2f}; the calibration text may not suit the model"
            )
        sites.append(planned)
        tensors.update({f"{match.site.name}/{name}": value.cpu() for name, value in fitted.items()})
        dense_stream.feed(lambda rows, ffn=ffn: ffn.output(ffn.hidden(rows)), y)  # type: ignore[misc]
        moe_stream.feed(build_block(planned, fitted, ffn).eval(), own)
    plan = MoEPlan(recipe.name, recipe.settings(), tuple(sites), tensors)
    if not isinstance(norm, FinalNorm):
        return plan.with_dense_norm(norm) if recipe.final_norm else plan
    states, wanted = moe_stream.behind(), dense_stream.behind()
    found = refit_final_norm(norm, states, wanted, unseen, generator, dtype, context.progress)
    if found is None:
        return plan.with_dense_norm("unseen tokens gain nothing by another")
    return plan.with_final_norm(norm.name, found.parameter, found.metrics)


def _of_batches(stream: Stream, inputs: Sequence[Tensor], chosen: set[int]) -> Tensor:
    """(T,) bool: the tokens of the chosen batches."""
    counts = [len(stream.rows(index, value)) for index, value in enumerate(inputs)]
    return torch.cat([torch.full((count,), index in chosen) for index, count in enumerate(counts)]).to(inputs[0].device)


def _precision(recipe: Calibrated, context: Context) -> str:
    """``float32`` or ``bfloat16``; float32 also stands for a model's own other type."""
    weights = DenseFFN.read(context.matches[0].site, context.captured.module).up
    if recipe.precision == "auto" and weights.dtype != torch.float32:
        return "float32"
    return str(compute_dtype(recipe.precision, weights.device)).removeprefix("torch.")


def _plan_site(
    split: Split, ffn: DenseFFN, x: Tensor, y: Tensor, target: Tensor, unseen: Tensor, dtype: torch.dtype
) -> tuple[SitePlan, dict[str, Tensor], float, Tensor | None]:
    """One FFN: its plan, its fitted tensors, its weighted relative error on the calibration tokens, its outputs there.

    Args:
        split: its neurons' places and its number of experts.
        x: (T, D) the converted stream's inputs, float32.
        y: (T, D) the dense stream's outputs.
        target: (T, D) what the converted FFN should put out.
        unseen: (T,) bool, tokens to fit nothing to.
        dtype: what products over tokens are multiplied in.
    """
    site, shared, experts, top_k = ffn.site, split.shared, split.experts, split.top_k
    planned = SitePlan(site, tuple(shared.tolist()), tuple(tuple(e) for e in experts), top_k)
    if top_k == len(experts):
        return planned, {}, 0.0, None
    down = ffn.down.float()
    bias = None if ffn.down_bias is None else ffn.down_bias.float()
    with multiplying(dtype, x.device):
        hidden = in_chunks(ffn.hidden, x, site.intermediate_size, ffn.up.dtype)
    weights = torch.zeros(len(x), device=x.device)
    weights[~unseen] = token_weights(torch.maximum(y.norm(dim=1), target.norm(dim=1))[~unseen])
    fitted: dict[str, Tensor] = {}
    chosen = torch.zeros(len(x), len(experts), dtype=torch.bool, device=x.device)
    if top_k:
        fitted[f"{ROUTER}weight"], fitted[f"{ROUTER}bias"] = fit_router(x, hidden, down, experts, weights)
        chosen = route(x, fitted[f"{ROUTER}weight"], fitted[f"{ROUTER}bias"], top_k)
    mask = neuron_mask(chosen, experts, site.intermediate_size)
    fitted[MEANS] = idle_means(hidden, mask, weights)
    fitted[DOWN], fitted[BIAS] = refit_down(hidden, mask, fitted[MEANS], down, bias, target, weights, dtype=dtype)
    own, error = masked_outputs(hidden, mask, fitted, bias, y, weights, dtype)
    router = "linear" if top_k else "none"
    metrics = {"calibration_error": round(error, 6), **split.metrics}
    return replace(planned, router=router, fitted=tuple(fitted), metrics=metrics), fitted, error, own


def masked_outputs(
    hidden: Tensor,
    mask: Mask,
    fitted: dict[str, Tensor],
    bias: Tensor | None,
    y: Tensor,
    weights: Tensor,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, float]:
    """The converted FFN's outputs (T, D), and their error: the root of weighted |y - y_dense|^2 / |y_dense|^2.

    ``dtype`` is what the product with the down projection is multiplied in.
    """
    down, means = fitted[DOWN], fitted[MEANS]
    base = fitted[BIAS] + down @ means + (0.0 if bias is None else bias)
    parts, wrong, right = [], 0.0, 0.0
    for start in range(0, len(hidden), CHUNK):
        stop = min(start + CHUNK, len(hidden))
        parts.append(product((hidden[start:stop] - means) * mask(start, stop), down.t(), dtype) + base)
        w = weights[start:stop]
        wrong += float(w @ (parts[-1] - y[start:stop]).square().sum(1))
        right += float(w @ y[start:stop].square().sum(1))
    return torch.cat(parts), math.sqrt(wrong / max(right, 1e-30))
