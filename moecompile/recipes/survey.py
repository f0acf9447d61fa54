"""The survey of the dense model that `calibrated` starts with: where each neuron goes, and how many experts each layer gets.

It walks the dense stream of a few thousand tokens once. Letters: T tokens, F dense width, D hidden, N experts, K chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..precision import multiplying, product
from ..sites import DenseFFN
from ..stream import Stream
from .base import Context, slice_sizes
from .budgets import Curve, Divergence, allocate, levels
from .neurons import Activity, choose_shared, group_neurons, sample_tokens, token_weights
from .refit import idle_means, neuron_mask
from .routing import fit_router, route

BUDGETS = ("effect", "even")
_TOKENS = 8192


@dataclass(frozen=True)
class Split:
    """Where the neurons of one FFN go.

    Attributes:
        shared: (S slices,) int64, numbers of the neurons that are always on.
        experts: numbers of the neurons of each routed expert.
        top_k: experts chosen per token in this layer.
        metrics: what was measured for the budget, for the record.
    """

    shared: Tensor
    experts: list[list[int]]
    top_k: int
    metrics: Mapping[str, Any] = field(default_factory=dict)


def survey(
    context: Context, experts: int, shared: int, top_k: int, budget: str, generator: torch.Generator, dtype: torch.dtype
) -> list[Split]:
    """A split for each FFN.

    Args:
        context: the captured model and the calibration batches; about 8192 tokens of them are read.
        experts: N.
        shared: S, slices that are always on.
        top_k: K, on average over the layers.
        budget: one of :data:`BUDGETS`.
        generator: for the clusters' starting points.
        dtype: what the model's products are multiplied in.
    """
    dial = levels(experts, top_k) if budget == "effect" and len(context.matches) > 1 else [top_k]
    stream = Stream(context.captured, context.matches, _some(context.batches), dtype)
    divergence: Divergence | None = None
    splits, curves = [], []
    for number, match in enumerate(context.progress.over(context.matches, "surveying")):
        ffn = DenseFFN.read(match.site, context.captured.module)
        inputs = stream.inputs(number)
        x = stream.tokens(number, inputs)
        with multiplying(dtype, x.device):
            hidden = ffn.hidden(x)
            y, hidden, x = ffn.output(hidden), hidden.float(), x.float()
        split = split_neurons(ffn, x, hidden, y, experts, shared, top_k, generator)
        splits.append(split)
        if len(dial) > 1:
            if divergence is None:
                with multiplying(dtype, x.device):
                    first = ffn.output(ffn.hidden(inputs[0].reshape(-1, inputs[0].shape[-1])))
                divergence = Divergence(stream.outputs(0, first.reshape(inputs[0].shape)), context.vocabulary)
            curves.append(_curve(stream, split, ffn, x, hidden, y.float(), inputs[0], dial, divergence))
        stream.feed(lambda rows, ffn=ffn: ffn.output(ffn.hidden(rows)), y)  # type: ignore[misc]
    if len(dial) == 1:
        return splits
    counts = allocate(curves)
    return [
        replace(split, top_k=count, metrics={"output_divergence": round(curve.effect, 6)})
        for split, count, curve in zip(splits, counts, curves, strict=True)
    ]


def _some(batches: Sequence[Any]) -> list[Any]:
    """Batches spread evenly over all of them: they may come sorted by kind of text.

    :data:`_TOKENS` tokens (of the largest tensor's first two dimensions) to twice as many; all of them where there are fewer.
    """
    total = 0
    for batch in batches:
        values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else [batch]
        total += max((int(v.shape[:2].numel()) for v in values if isinstance(v, Tensor)), default=_TOKENS)
    return list(batches[:: max(1, total // _TOKENS)])


def split_neurons(
    ffn: DenseFFN, x: Tensor, hidden: Tensor, y: Tensor, experts: int, shared: int, top_k: int, generator: torch.Generator
) -> Split:
    """Shared neurons and clusters of one FFN, from some of its tokens.

    Args:
        ffn: the dense FFN.
        x: (T, D) its inputs; ``hidden`` (T, F) and ``y`` (T, D) belong to them.
        experts: N.
        shared: S, slices that are always on.
        top_k: K.
        generator: for the sample and the clusters' starting points.
    """
    site, down = ffn.site, ffn.down.float()
    sizes = slice_sizes(site.intermediate_size, experts + shared, site.name)
    norms = y.float().norm(dim=1)
    weights = token_weights(norms)
    some = sample_tokens(norms, _TOKENS, generator)
    count = sum(sizes[:shared])
    x, hidden, weights = x[some].float(), hidden[some].float(), weights[some]
    activity = Activity.of(x, hidden, down, weights)
    always = torch.zeros(0, dtype=torch.long, device=x.device)
    if count:
        always = choose_shared(x, hidden, down, activity, count, top_k / experts, weights)
    groups = group_neurons(activity, always, sizes[shared:], generator)
    return Split(always, groups, top_k)


def _curve(
    stream: Stream,
    split: Split,
    ffn: DenseFFN,
    x: Tensor,
    hidden: Tensor,
    y: Tensor,
    first: Tensor,
    dial: list[int],
    divergence: Divergence,
) -> Curve:
    """Errors of one FFN by number of experts, and what K of them do to the model's outputs for the first batch.

    Args:
        x: (T, D) inputs of all batches; ``hidden`` (T, F) and ``y`` (T, D) belong to them.
        first: the first batch's input, (..., D).
    """
    down, weights = ffn.down.float(), token_weights(y.norm(dim=1))
    scored = fit_router(x, hidden, down, split.experts, weights)
    rows = len(stream.rows(0, first))  # the errors are those of the first batch, as the effect is
    x, hidden, y, weights = x[:rows], hidden[:rows], y[:rows], weights[:rows]
    right = max(float(weights @ y.square().sum(1)), 1e-30)
    bias = 0.0 if ffn.down_bias is None else ffn.down_bias.float()

    def output(tokens: Tensor, activity: Tensor, means: Tensor, k: int) -> Tensor:
        on = neuron_mask(route(tokens, *scored, k), split.experts, hidden.shape[1])(0, len(tokens))
        return product(torch.where(on > 0, activity, means), down.t(), stream.dtype) + bias

    errors, effect = {}, 0.0
    for k in dial:
        means = idle_means(hidden, neuron_mask(route(x, *scored, k), split.experts, hidden.shape[1]), weights)
        errors[k] = float(weights @ (output(x, hidden, means, k) - y).square().sum(1)) / right
        if k == split.top_k:
            everything = first.reshape(-1, first.shape[-1])  # padding too
            with multiplying(stream.dtype, x.device):
                activity = ffn.hidden(everything).float()
            replaced = output(everything.float(), activity, means, k)
            effect = divergence(stream.outputs(0, replaced.to(first.dtype).reshape(first.shape)))
    width = sum(map(len, split.experts)) / len(split.experts)
    return Curve(width, errors, effect, split.top_k)
