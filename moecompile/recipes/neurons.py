"""Which neurons are shared, and which go together: the two choices of the `calibrated` recipe that concern the split.

Letters: T tokens, F dense width, D hidden, N experts. All statistics are weighted per token (see :func:`token_weights`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .clusters import balanced_clusters, others, spread_starts

_ROUTER_RIDGE = 0.2  # relative to the mean variance of an input; .1 to .5 were alike, .01 a little worse
# A token whose output is this many times the median one counts as an outlier (attention sinks reach 900 times).
_OUTLIER = 10.0
_CARRY = 0.01  # a neuron that carries this share of an outlier token's energy is always on
_ROUNDS, _SWEEPS = 5, 1  # one sweep of swaps after five assignments: a second gained nothing measurable


def token_weights(norms: Tensor) -> Tensor:
    """(T,) norms -> (T,) weights 2 / (1 + (norm / median)^2).

    About 1 for usual tokens and 1 / norm^2 for attention sinks, whose massive outputs would own every sum otherwise: what is
    minimised is then close to a relative error.
    """
    return 2 / (1 + (norms / norms.median().clamp_min(1e-12)).square())


def sample_tokens(norms: Tensor, count: int, generator: torch.Generator, most_outliers: int = 64) -> Tensor:
    """Numbers of ``count`` random tokens, and of up to 64 outlier tokens, which :func:`choose_shared` must see."""
    chosen = torch.randperm(len(norms), generator=generator)[:count].to(norms.device)
    outliers = torch.nonzero(norms > _OUTLIER * norms.median()).flatten()
    outliers = outliers[~torch.isin(outliers, chosen)][:most_outliers]
    return torch.cat([chosen, outliers])


@dataclass(frozen=True)
class Activity:
    """What a router has to foresee of some tokens, and what a linear one can.

    Attributes:
        own: (T, F) |h_j - mean_j| |w_j|, how much is lost where neuron j is idle and its mean stands in.
        covariance: (D, D) of the inputs, summed over weighted tokens; ``cross`` (D, F) of inputs and ``own``.
        mean_x: (D,) mean input; ``mean_own`` (F,) mean of ``own``.
    """

    own: Tensor
    covariance: Tensor
    cross: Tensor
    mean_x: Tensor
    mean_own: Tensor

    @classmethod
    def of(cls, x: Tensor, hidden: Tensor, down: Tensor, weights: Tensor) -> Activity:
        """From inputs (T, D), hidden activations (T, F), the down projection (D, F) and token weights (T,), all float32."""
        mean = (weights @ hidden) / weights.sum()
        own = (hidden - mean).abs_().mul_(down.norm(dim=0))
        return cls(own, *weighted_moments(x, own, weights))

    def foreseen(self, x: Tensor) -> Tensor:
        """(T, F) ridge regression of ``own`` on x, as routers are fitted."""
        return (x - self.mean_x) @ ridge_weight(self.covariance, self.cross) + self.mean_own


def choose_shared(
    x: Tensor, hidden: Tensor, down: Tensor, activity: Activity, count: int, on: float, weights: Tensor
) -> Tensor:
    """The ``count`` neurons that are to be always on: those of which routing would lose most.

    The score is the energy |h_j - mean_j|^2 |w_j|^2 on the tokens that a linear router of its own, on for a share ``on`` of the
    tokens, would leave neuron j idle on. (Layer 14 of SmolLM2-135M, held-out error: .1304; with the rate at which a neuron is
    among a token's strongest tenth .1340, with its whole energy .1371.) Neurons that carry the energy of outlier tokens come
    first whatever their score: without them the attention sinks break.

    Args:
        x: (T, D) inputs, float32.
        hidden: (T, F), float32.
        down: (D, F), float32.
        activity: of these tokens.
        count: how many.
        on: K / N, from 0 to 1.
        weights: (T,).

    Returns:
        (count,) neuron numbers, ascending.
    """
    lost = activity.own.square() * weights[:, None]
    kept = round(on * len(x))
    if 0 < kept < len(x):
        foreseen = activity.foreseen(x).t().contiguous()  # [F, T]
        least = foreseen.kthvalue(len(x) - kept + 1, dim=1, keepdim=True).values
        lost *= (foreseen < least).t()
    score = lost.sum(0)
    share = _outlier_shares((hidden * down.norm(dim=0)).square_())
    score = torch.where(share > _CARRY, score + 2 * score.max() * (1 + share), score)
    return score.topk(count).indices.sort().values


def _outlier_shares(energy: Tensor) -> Tensor:
    """(F,) the mean share of each neuron in the energy (T, F) of outlier tokens; 0 where there are none."""
    total = energy.sum(1)
    outliers = total > _OUTLIER**2 * total.median()
    if not outliers.any():
        return torch.zeros_like(energy[0])
    return (energy[outliers] / total[outliers][:, None]).mean(0)


def sink_neurons(hidden: Tensor, down: Tensor) -> Tensor:
    """(F,) bool: the neurons that carry the energy of outlier tokens, from hidden (T, F) and down (D, F) in float32."""
    return _outlier_shares((hidden * down.norm(dim=0)).square_()) > _CARRY


def weighted_moments(x: Tensor, target: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(X^T X, X^T Y, mean x, mean y) of centred, weighted x (T, D) and target (T, M)."""
    total = weights.sum()
    mean_x, mean_y = (weights @ x) / total, (weights @ target) / total
    root = weights.sqrt()[:, None]
    centred = (x - mean_x) * root
    return centred.t() @ centred, centred.t() @ ((target - mean_y) * root), mean_x, mean_y


def ridge_weight(covariance: Tensor, cross: Tensor) -> Tensor:
    """(D, M) ridge regression from :func:`weighted_moments`' (D, D) and (D, M), with the routers' ridge."""
    return torch.cholesky_solve(cross.double(), _root(covariance, _ROUTER_RIDGE)).float()


def _root(covariance: Tensor, ridge: float) -> Tensor:
    """(D, D) float64, the Cholesky factor of a covariance with so much of its mean variance on the diagonal."""
    raised = covariance.clone()
    raised.diagonal().add_(ridge * covariance.diagonal().mean().clamp_min(1e-12))
    return torch.linalg.cholesky(raised.double())


def group_neurons(activity: Activity, shared: Tensor, sizes: list[int], generator: torch.Generator) -> list[list[int]]:
    """Deal the neurons that are not shared to experts of the given sizes.

    A neuron's profile is C^-1/2 Cov(x, |h_j - mean_j| |w_j|) with C = Cov(x): the part of its activity that a linear router can
    predict. Balanced k-means on the profiles maximises the variance of the experts' activities that a linear router explains
    (held-out error .157, against .166 for the activity itself and .179 for random groups). The assignment is the Hungarian
    method's; a sweep of swaps follows.

    Args:
        activity: of some tokens.
        shared: numbers of the shared neurons.
        sizes: neurons per expert; they sum to what is left.
        generator: for the starting points.
    """
    neurons = others(shared, activity.own.shape[1])
    profiles = _profiles(activity, neurons)
    size = torch.tensor(sizes)
    labels = _balanced_kmeans(profiles, size, generator)
    for _ in range(_SWEEPS):
        if _swap(profiles, labels, len(sizes)) < len(labels) // 100:
            break
    numbers = neurons.cpu()
    return [numbers[labels == expert].tolist() for expert in range(len(sizes))]


def _profiles(activity: Activity, neurons: Tensor, ridge: float = 0.01) -> Tensor:
    """(neurons, D) predictable activity profiles of unit mean square length, on the CPU."""
    root, cross = _root(activity.covariance, ridge), activity.cross[:, neurons].double()
    profiles = torch.linalg.solve_triangular(root, cross, upper=False).t().float().cpu()
    return profiles / profiles.square().sum(1).mean().sqrt().clamp_min(1e-30)


def _balanced_kmeans(profiles: Tensor, size: Tensor, generator: torch.Generator) -> Tensor:
    """(neurons,) labels; cluster e gets exactly size[e] members."""
    strongest = int(profiles.square().sum(1).argmax())
    starts = spread_starts(profiles, len(size), generator, strongest)
    return balanced_clusters(profiles, starts, size.tolist(), _ROUNDS)[0]


def _swap(profiles: Tensor, labels: Tensor, count: int) -> int:
    """One sweep: each neuron changes places with the one that raises sum_e |sum_{j in e} P_j|^2 most, if any; in place."""
    sums = torch.zeros(count, profiles.shape[1]).index_add_(0, labels, profiles)
    inner, to_sum, square = profiles @ profiles.t(), profiles @ sums.t(), profiles.square().sum(1)
    own = to_sum.gather(1, labels[:, None])[:, 0]
    moved = 0
    for i in range(len(labels)):
        a = int(labels[i])
        gain = 2 * (to_sum[:, a] - own + to_sum[i][labels] - own[i] + square + square[i] - 2 * inner[i])
        gain[labels == a] = -1.0
        j = int(gain.argmax())
        if gain[j] > 1e-6:
            b, step = int(labels[j]), inner[j] - inner[i]
            to_sum[:, a] += step
            to_sum[:, b] -= step
            labels[i], labels[j] = b, a
            own = to_sum.gather(1, labels[:, None])[:, 0]
            moved += 1
    return moved
