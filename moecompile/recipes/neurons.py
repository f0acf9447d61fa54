"""Which neurons are shared, and which go together: the two choices of the `calibrated` recipe that concern the split.

Letters: T tokens, F dense width, D hidden, N experts. All statistics are weighted per token (see :func:`token_weights`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .clusters import balanced_clusters, spread_starts

# A token whose output is this many times the median one counts as an outlier (attention sinks reach 900 times).
_OUTLIER = 10.0
_TOP_SHARE = 0.1  # a neuron "fires" when it is among this share of a token's strongest
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


def choose_shared(hidden: Tensor, down: Tensor, count: int, weights: Tensor) -> Tensor:
    """The ``count`` neurons that are to be always on.

    The score is the weighted rate at which a neuron is among a token's strongest tenth by |h_j| |w_j|. Neurons that carry the
    energy of outlier tokens come first whatever their rate: without them the attention sinks break.

    Args:
        hidden: (T, F), float32.
        down: (D, F), float32.
        count: how many.
        weights: (T,).

    Returns:
        (count,) neuron numbers, ascending.
    """
    strength = hidden.abs() * down.norm(dim=0)
    strongest = strength.topk(max(1, int(_TOP_SHARE * hidden.shape[1])), dim=1).indices
    score = torch.zeros(hidden.shape[1], device=hidden.device)
    score.index_add_(0, strongest.flatten(), weights[:, None].expand_as(strongest).flatten())
    share = _outlier_shares(strength.square_())
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


def group_neurons(
    x: Tensor, hidden: Tensor, down: Tensor, shared: Tensor, sizes: list[int], weights: Tensor, generator: torch.Generator
) -> list[list[int]]:
    """Deal the neurons that are not shared to experts of the given sizes.

    A neuron's profile is C^-1/2 Cov(x, |h_j - mean_j| |w_j|) with C = Cov(x): the part of its activity that a linear router can
    predict. Balanced k-means on the profiles maximises the variance of the experts' activities that a linear router explains
    (held-out error .157, against .166 for the activity itself and .179 for random groups). The assignment is the Hungarian
    method's; a sweep of swaps follows.

    Args:
        x: (T, D) inputs of the FFN, float32.
        hidden: (T, F), float32.
        down: (D, F), float32.
        shared: numbers of the shared neurons.
        sizes: neurons per expert; they sum to what is left.
        weights: (T,).
        generator: for the starting points.
    """
    free = torch.ones(hidden.shape[1], dtype=torch.bool, device=hidden.device)
    free[shared] = False
    neurons = torch.nonzero(free).flatten()
    profiles = _profiles(x, hidden[:, neurons], down[:, neurons], weights)
    size = torch.tensor(sizes)
    labels = _balanced_kmeans(profiles, size, generator)
    for _ in range(_SWEEPS):
        if _swap(profiles, labels, len(sizes)) < len(labels) // 100:
            break
    numbers = neurons.cpu()
    return [numbers[labels == expert].tolist() for expert in range(len(sizes))]


def _profiles(x: Tensor, hidden: Tensor, down: Tensor, weights: Tensor, ridge: float = 0.01) -> Tensor:
    """(neurons, D) predictable activity profiles of unit mean square length, on the CPU."""
    mean = (weights @ hidden) / weights.sum()
    activity = (hidden - mean).abs_() * down.norm(dim=0)
    covariance, cross, _, _ = weighted_moments(x, activity, weights)
    covariance.diagonal().add_(ridge * covariance.diagonal().mean().clamp_min(1e-12))
    root = torch.linalg.cholesky(covariance.double())
    profiles = torch.linalg.solve_triangular(root, cross.double(), upper=False).t().float().cpu()
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
