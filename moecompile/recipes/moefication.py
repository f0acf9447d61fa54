"""MoEfication (Zhang et al. 2022, arXiv 2110.01786): experts by the neurons' own weights, routed by a small MLP.

For each FFN, on the dense model's stream:

    1. experts   balanced k-means on the neurons' rows under the activation (the gate's rows in a gated FFN), at unit length
    2. router    an MLP with one hidden layer of N, trained to name the K experts of the largest summed activity;
                 or ``similarity``: the cosine of x and the mean row of each expert

An expert's activity is the sum of its neurons' positive activations, as in the paper. The neurons of a gated FFN have no such
sign (the up projection turns it), so theirs is the sum of |h|.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..plans import MoEPlan, SitePlan
from ..sites import DenseFFN
from ..stream import Stream
from .base import Context, Recipe, check_counts, planner, slice_sizes
from .clusters import balanced_clusters, input_rows, members, routed_site, spread_starts

_ROUNDS = 5
_CHUNK = 8192
# On eight experts of a known linear rule, K 4, the held-out share of right choices: .76 at rate .003 and 10 epochs, .86 at 30;
# .85 and .90 at rate .01; .03 and 30 epochs gave .90 too.
_EPOCHS, _BATCH, _RATE = 30, 512, 1e-2
SCORES = ("mlp", "similarity")


@dataclass(frozen=True)
class MoEfication(Recipe):
    """Settings of the recipe.

    Attributes:
        experts: N, routed experts; the paper takes 32 neurons for each.
        shared: S; the paper has no shared experts, so only 0 makes sense.
        top_k: K, experts chosen per token.
        scores: ``mlp`` or ``similarity``, the paper's two routers that can be deployed.
    """

    experts: int = 48
    shared: int = 0
    top_k: int = 24
    scores: str = "mlp"

    def check(self) -> None:
        """Refuse numbers that make no sense."""
        check_counts(self.experts, self.shared, self.top_k)
        if self.shared:
            raise PlanError(f"--shared is {self.shared}; the recipe moefication has no shared experts")
        if self.scores not in SCORES:
            raise PlanError(f"the recipe moefication has no scores '{self.scores}'; there are: {', '.join(SCORES)}")


@planner(MoEfication)
def plan_moefication(recipe: MoEfication, context: Context) -> MoEPlan:
    """One pass over the dense model."""
    stream = Stream(context.captured, context.matches, context.batches)
    generator = torch.Generator().manual_seed(context.seed)
    sites: list[SitePlan] = []
    tensors: dict[str, Tensor] = {}
    none = torch.zeros(0, dtype=torch.long)
    for number, (match, inputs) in enumerate(context.progress.over(stream, "moefication", len(context.matches))):
        site, ffn = match.site, DenseFFN.read(match.site, context.captured.module)
        sizes = slice_sizes(site.intermediate_size, recipe.experts, site.name)
        rows = nn.functional.normalize(input_rows(ffn)[0].float().cpu(), dim=1)
        labels, _ = balanced_clusters(rows, spread_starts(rows, recipe.experts, generator), sizes, _ROUNDS)
        experts = members(labels, torch.arange(site.intermediate_size), recipe.experts)
        x = stream.tokens(number, inputs)
        activity, y = _activity(ffn, x, labels.to(x.device), recipe.experts)
        trained = recipe.scores == "mlp"
        fitted = fit_mlp(x.float(), activity, recipe.top_k, generator) if trained else _centres(ffn, experts)
        planned, named = routed_site(site, none, experts, recipe.top_k, "mlp" if trained else "linear", fitted)
        sites.append(planned)
        tensors.update({f"{site.name}/{name}": value for name, value in named.items()})
        stream.feed(lambda rows, ffn=ffn: ffn.output(ffn.hidden(rows)), y)  # type: ignore[misc]
    return MoEPlan(recipe.name, recipe.settings(), tuple(sites), tensors)


def _activity(ffn: DenseFFN, x: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(T, N) summed activity of each expert for inputs (T, D), and the FFN's outputs (T, D)."""
    member = nn.functional.one_hot(labels, count).float()
    parts, outputs = [], []
    for rows in x.split(_CHUNK):
        hidden = ffn.hidden(rows)
        strength = hidden.float().clamp_min(0) if ffn.gate is None else hidden.float().abs()
        parts.append(strength @ member)
        outputs.append(ffn.output(hidden))
    return torch.cat(parts), torch.cat(outputs)


def _centres(ffn: DenseFFN, experts: tuple[tuple[int, ...], ...]) -> dict[str, Tensor]:
    """A linear router that ranks experts by the cosine of x and their mean row: x's own length changes no ranking."""
    rows = input_rows(ffn)[0].float()
    weight = torch.stack([rows[list(expert)].mean(0) for expert in experts])
    return {"weight": nn.functional.normalize(weight, dim=1), "bias": torch.zeros(len(experts))}


@torch.enable_grad()
def fit_mlp(x: Tensor, activity: Tensor, top_k: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Train an MLP router to name each token's ``top_k`` most active experts (binary cross-entropy, Adam).

    Args:
        x: (T, D) inputs, float32.
        activity: (T, N).
        top_k: K; where it is 0 or N there is nothing to learn.
        generator: for the starting weights and the order of tokens.

    Returns:
        ``hidden`` (N, D) and ``out`` (N, N).
    """
    count, width = activity.shape[1], x.shape[1]
    scale = x.square().mean().sqrt().clamp_min(1e-12)  # so that tanh starts in its linear part, whatever the model's scale
    hidden = (torch.randn(count, width, generator=generator).to(x) / (scale * width**0.5)).requires_grad_()
    out = (torch.randn(count, count, generator=generator).to(x) / count**0.5).requires_grad_()
    if not 0 < top_k < count:
        return {"hidden": hidden.detach(), "out": out.detach()}
    wanted = torch.zeros_like(activity).scatter_(1, activity.topk(top_k, dim=1).indices, 1.0)
    groups = [{"params": [hidden], "lr": _RATE / float(scale)}, {"params": [out], "lr": _RATE}]
    optimizer = torch.optim.Adam(groups)
    for _ in range(_EPOCHS):
        for index in torch.randperm(len(x), generator=generator).to(x.device).split(_BATCH):
            scores = torch.tanh(x[index] @ hidden.t()) @ out.t()
            loss = nn.functional.binary_cross_entropy_with_logits(scores, wanted[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return {"hidden": hidden.detach(), "out": out.detach()}
