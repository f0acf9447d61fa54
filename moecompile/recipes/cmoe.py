"""CMoE (Pei et al. 2025, arXiv 2502.04416): experts by which neurons are a token's strongest, routed by one neuron each.

For each FFN, on the stream that the converted ones before it have left, with h the down projection's input:

    1. markers   A_tj = 1 where |h_j| is among token t's ``markers`` largest;  rate mu_j = mean_t A_tj
    2. shared    the neurons of highest rate
    3. experts   balanced clusters of the columns A_j of the rest, by linear assignment; first centres: the highest rates
    4. router    |h_r(x)| of each cluster's representative r, the neuron whose column is nearest to the cluster's mean

A plain FFN has no gate: its h_j is act(u_j x), and so is the representative's score. Chosen experts count fully (the paper's
learned gate 1 + s u starts at u = 0). ``scores="spectral"`` keeps the split and takes the router of :mod:`.spectral`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..apply import build_block
from ..errors import PlanError
from ..plans import MoEPlan, SitePlan
from ..sites import DenseFFN
from ..stream import Stream
from .base import Context, Recipe, check_counts, planner, slice_sizes
from .clusters import balanced_clusters, members, others, routed_site
from .spectral import fit_spectral

_ROUNDS = 5
_CHUNK = 8192
SCORES = ("representative", "spectral")


@dataclass(frozen=True)
class CMoE(Recipe):
    """Settings of the recipe; by default the paper's eight slices, half of them active.

    Attributes:
        experts: N, routed experts.
        shared: S, slices that are always on.
        top_k: K, experts chosen per token; (S + K) / (N + S) of the neurons are active.
        markers: K_a, neurons per token that count as active.
        scores: ``representative``, the paper's router, or ``spectral``.
        rank: R of the spectral router.
    """

    experts: int = 6
    shared: int = 2
    top_k: int = 2
    markers: int = 10
    scores: str = "representative"
    rank: int = 16

    def check(self) -> None:
        """Refuse numbers that make no sense."""
        check_counts(self.experts, self.shared, self.top_k)
        if self.markers < 1:
            raise PlanError(f"--markers is {self.markers}; at least one neuron per token must count as active")
        if self.scores not in SCORES:
            raise PlanError(f"the recipe cmoe has no scores '{self.scores}'; there are: {', '.join(SCORES)}")
        if self.rank < 1:
            raise PlanError(f"--rank is {self.rank}; it must be at least 1")


@planner(CMoE)
def plan_cmoe(recipe: CMoE, context: Context) -> MoEPlan:
    """Plan every FFN in order, each on the stream that the ones before it have left."""
    stream = Stream(context.captured, context.matches, context.batches)
    sites: list[SitePlan] = []
    tensors: dict[str, Tensor] = {}
    for number, match in enumerate(context.progress.over(context.matches, "cmoe")):
        ffn = DenseFFN.read(match.site, context.captured.module)
        x = stream.tokens(number, stream.inputs(number))
        planned, fitted = _plan_site(recipe, ffn, x)
        sites.append(planned)
        tensors.update({f"{match.site.name}/{name}": value for name, value in fitted.items()})
        stream.feed(build_block(planned, fitted, ffn).eval())
    return MoEPlan(recipe.name, recipe.settings(), tuple(sites), tensors)


def _plan_site(recipe: CMoE, ffn: DenseFFN, x: Tensor) -> tuple[SitePlan, dict[str, Tensor]]:
    """One FFN from its inputs (T, D): its plan and the router's tensors."""
    site = ffn.site
    sizes = slice_sizes(site.intermediate_size, recipe.experts + recipe.shared, site.name)
    marked = mark(ffn, x, recipe.markers)  # [T, F]
    rate = marked.mean(0)
    shared = rate.topk(sum(sizes[: recipe.shared])).indices
    neurons = others(shared, site.intermediate_size)
    columns = marked[:, neurons].t().contiguous()  # [n, T]
    starts = columns[rate[neurons].topk(recipe.experts).indices]
    labels, centres = balanced_clusters(columns, starts, sizes[recipe.shared :], _ROUNDS)
    experts = members(labels, neurons, recipe.experts)
    if recipe.scores == "spectral":
        rank = min(recipe.rank, min(sizes))
        return routed_site(site, shared, experts, recipe.top_k, "spectral", fit_spectral(ffn, x, experts, rank), rank)
    fitted = representatives(ffn, nearest(columns, centres, labels, neurons))
    return routed_site(site, shared, experts, recipe.top_k, "representative", fitted)


def mark(ffn: DenseFFN, x: Tensor, count: int) -> Tensor:
    """(T, F) float markers on the CPU: 1 where a neuron is among the ``count`` strongest of its token, by |h|."""
    parts = []
    for rows in x.split(_CHUNK):
        hidden = ffn.hidden(rows.to(ffn.up.dtype)).float().abs()
        best = hidden.topk(min(count, hidden.shape[1]), dim=1).indices
        parts.append(torch.zeros_like(hidden).scatter_(1, best, 1.0).cpu())
    return torch.cat(parts)


def nearest(columns: Tensor, centres: Tensor, labels: Tensor, neurons: Tensor) -> Tensor:
    """(N,) the number of the neuron (of those numbered by ``neurons`` (n,)) nearest to each cluster's centre (N, T)."""
    distance = (columns - centres[labels]).square().sum(1)
    chosen = []
    for cluster in range(len(centres)):
        chosen.append(neurons[torch.where(labels == cluster, distance, torch.inf).argmin()])
    return torch.stack(chosen)


def representatives(ffn: DenseFFN, neurons: Tensor) -> dict[str, Tensor]:
    """The parameters of a representative router: these neurons' (N,) rows, and biases where the FFN has some."""
    index = neurons.to(ffn.up.device)
    parts = {"up": (ffn.up, ffn.up_bias), "gate": (ffn.gate, ffn.gate_bias)}
    fitted = {}
    with_bias = ffn.up_bias is not None or ffn.gate_bias is not None
    for name, (weight, bias) in parts.items():
        if weight is None:
            continue
        fitted[name] = weight[index]
        if with_bias:
            fitted[f"{name}_bias"] = torch.zeros(len(index)) if bias is None else bias[index]
    return fitted
