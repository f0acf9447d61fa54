"""What the recipes of other papers share: balanced clusters by linear assignment, slices of a layer, sites without a router."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..plans import ROUTER, SitePlan
from ..sites import DenseFFN, FFNSite


def spread_starts(points: Tensor, count: int, generator: torch.Generator, first: int | None = None) -> Tensor:
    """(count, M) starting centres among points (n, M), each likelier the farther from those before it (k-means++).

    The first is a random one unless its number is given.
    """
    index = int(torch.randint(len(points), (1,), generator=generator)) if first is None else first
    chosen, distance = [], torch.full((len(points),), torch.inf)
    for _ in range(count):
        chosen.append(index)
        distance = torch.minimum(distance, (points - points[index]).square().sum(1))
        index = int(torch.multinomial(distance.clamp_min(1e-12), 1, generator=generator))
    return points[chosen]


def balanced_clusters(points: Tensor, centres: Tensor, sizes: list[int], rounds: int) -> tuple[Tensor, Tensor]:
    """Balanced k-means: assignment is a linear assignment problem with centre e repeated sizes[e] times (Hungarian method).

    Args:
        points: (n, M) float32 on the CPU; n is the sum of the sizes.
        centres: (N, M) to start from.
        sizes: members of each cluster.
        rounds: assignments at most; fewer where nothing changes any more.

    Returns:
        (n,) labels, and (N, M) the clusters' means.
    """
    count = len(sizes)
    slot = torch.arange(count).repeat_interleave(torch.tensor(sizes))
    labels = torch.full((len(points),), -1)
    for _ in range(rounds):
        cost = centres.square().sum(1)[None] - 2 * points @ centres.t()  # the points' own squares do not matter
        rows, columns = linear_sum_assignment(cost[:, slot].numpy())
        new = torch.empty_like(labels)
        new[torch.from_numpy(rows)] = slot[torch.from_numpy(columns)]
        if bool((new == labels).all()):
            break
        labels = new
        centres = torch.zeros(count, points.shape[1]).index_add_(0, labels, points) / torch.tensor(sizes)[:, None]
    return labels, centres


def members(labels: Tensor, neurons: Tensor, count: int) -> tuple[tuple[int, ...], ...]:
    """The neuron numbers (n,) of each of ``count`` clusters, by labels (n,)."""
    return tuple(tuple(neurons[labels == number].tolist()) for number in range(count))


def others(shared: Tensor, width: int) -> Tensor:
    """The neurons of 0 ... width - 1 that are not shared, ascending."""
    free = torch.ones(width, dtype=torch.bool, device=shared.device)
    free[shared] = False
    return torch.nonzero(free).flatten()


def routed_site(
    site: FFNSite,
    shared: Tensor,
    experts: tuple[tuple[int, ...], ...],
    top_k: int,
    router: str,
    fitted: dict[str, Tensor],
    rank: int = 0,
) -> tuple[SitePlan, dict[str, Tensor]]:
    """A site's plan and its tensors; without a router where nothing is to be chosen (no expert, or all of them).

    Args:
        site: the FFN.
        shared: numbers of its shared neurons.
        experts: the neurons of each expert.
        top_k: K.
        router: the router's kind.
        fitted: its parameters by their own names.
        rank: of a spectral router.
    """
    always = tuple(sorted(shared.tolist()))
    if not 0 < top_k < len(experts):
        return SitePlan(site, always, experts, top_k), {}
    named = {ROUTER + name: value.detach().float().cpu().contiguous() for name, value in fitted.items()}
    return SitePlan(site, always, experts, top_k, router, tuple(named), router_rank=rank), named


def input_rows(ffn: DenseFFN) -> tuple[Tensor, Tensor | None]:
    """(F, D) and (F,): the projection under the activation, with its bias: the gate's, in a plain FFN the up projection's."""
    if ffn.gate is None:
        return ffn.up, ffn.up_bias
    return ffn.gate, ffn.gate_bias


def mean_rows_router(ffn: DenseFFN, experts: tuple[tuple[int, ...], ...]) -> dict[str, Tensor]:
    """A linear router whose row is the mean of the expert's rows under the activation (ExpertWeaver, arXiv 2602.15521)."""
    rows, bias = input_rows(ffn)
    weight = torch.stack([rows[list(expert)].float().mean(0) for expert in experts])
    offset = torch.zeros(len(experts)) if bias is None else torch.stack([bias[list(e)].float().mean() for e in experts])
    return {"weight": weight, "bias": offset}
