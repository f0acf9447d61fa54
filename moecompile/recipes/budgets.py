"""How many experts each layer gets: the mean is given, the spread follows from what idle experts do to the model's output.

For layer l, effect_l is the divergence of the model's output when l alone runs on K experts (all other layers dense), and
error_l(k) the relative error of the layer's own output with k experts. The loss of a layer with k experts is taken as

    loss_l(k) = effect_l * error_l(k) / error_l(K)

and experts go, ``step`` at a time, to the layer that gains most per neuron, until the mean is reached. The first layers of
a language model get most: their errors travel through all the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_FEWEST = 32  # with fewer experts a layer's steps would be coarse and the figures noisy: every layer gets the same
_STEPS = 12  # levels of the dial, so that few different kernels are needed
_LOWER = 4  # levels up to K where K is within the first two steps
_EVERY = 4  # of a batch's positions one in four is compared: a language model's logits are large
_ROWS = 512


@dataclass(frozen=True)
class Curve:
    """What a layer loses with fewer experts.

    Attributes:
        expert_width: neurons that one more expert costs per token.
        errors: squared relative error of the layer's output by number of experts.
        effect: divergence of the model's output at ``reference`` experts in this layer.
        reference: K, the number of experts at which the effect was measured.
    """

    expert_width: float
    errors: Mapping[int, float]
    effect: float
    reference: int

    def loss(self, k: int) -> float:
        """The model's loss that this layer causes with k experts; k is one of ``errors``."""
        return self.effect * self.errors[k] / max(self.errors[self.reference], 1e-30)


def levels(experts: int, top_k: int) -> list[int]:
    """The numbers of experts that a layer may get, ascending; ``top_k`` alone where there are too few to choose from.

    All experts on is not among them: a layer without idle experts has nothing to route, and could not repair drift.
    """
    step = max(1, experts // _STEPS)
    if experts < _FEWEST or not _LOWER <= top_k < experts - step:
        return [top_k]
    fine = step if top_k >= 2 * step else -(-top_k // _LOWER)  # what one layer gains others must be able to give
    lower = [k for k in range(top_k, 0, -fine) if k >= fine]
    near = [top_k + fine * 2**i for i in range(experts.bit_length()) if fine * 2**i < step]
    return sorted({*lower, *near, *range(top_k + step, experts, step)})


def allocate(curves: Sequence[Curve]) -> list[int]:
    """Experts per layer with the least sum of losses; together no more neurons than with each layer's ``reference``."""
    largest = max((curve.effect for curve in curves), default=0.0) or 1.0
    curves = [replace(curve, effect=curve.effect / largest) for curve in curves]  # so that tiny effects do not underflow
    choices = [sorted(curve.errors) for curve in curves]
    place = [0] * len(curves)
    left = sum(c.expert_width * (c.reference - k[0]) for c, k in zip(curves, choices, strict=True))

    def gain(layer: int) -> float:
        """What the next level saves per neuron; none where there is no next level, or no money for it."""
        curve, options, at = curves[layer], choices[layer], place[layer]
        if at + 1 == len(options):
            return -1.0
        price = curve.expert_width * (options[at + 1] - options[at])
        return (curve.loss(options[at]) - curve.loss(options[at + 1])) / price if price <= left + 1e-9 else -1.0

    while True:
        best = max(range(len(curves)), key=gain, default=-1)
        if best < 0 or gain(best) < 0.0:
            return [options[at] for options, at in zip(choices, place, strict=True)]
        options, at = choices[best], place[best]
        left -= curves[best].expert_width * (options[at + 1] - options[at])
        place[best] += 1


class Divergence:
    """How far a model's outputs are from the dense ones of the same batch.

    For logits over a vocabulary the mean KL divergence (nats) from the dense distribution; for other outputs the squared
    relative difference.

    Args:
        outputs: the dense model's output tensors.
        vocabulary: the size of the last dimension that marks logits, or None.
    """

    def __init__(self, outputs: Sequence[Tensor], vocabulary: int | None) -> None:
        self._pick = self._picker(outputs, vocabulary)
        self._logits = vocabulary is not None and any(t.shape[-1:] == (vocabulary,) for t in outputs)
        self._reference = [t.clone() for t in self._pick(outputs)]

    @staticmethod
    def _picker(outputs: Sequence[Tensor], vocabulary: int | None) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        chosen = [i for i, t in enumerate(outputs) if vocabulary is not None and t.shape[-1:] == (vocabulary,)][:1]
        chosen = chosen or [i for i, t in enumerate(outputs) if t.is_floating_point() and t.dim() > 0]

        def pick(tensors: Sequence[Tensor]) -> list[Tensor]:
            rows = [tensors[i].reshape(-1, tensors[i].shape[-1]) for i in chosen]
            return [r[::_EVERY] if len(r) >= _ROWS else r for r in rows]

        return pick

    def __call__(self, outputs: Sequence[Tensor]) -> float:
        """The divergence of these outputs, the same tensors in the same order."""
        pairs = list(zip(self._reference, self._pick(outputs), strict=True))
        if not self._logits:
            wrong = sum(float((a.float() - b.float()).square().sum()) for a, b in pairs)
            return wrong / max(sum(float(a.float().square().sum()) for a, _ in pairs), 1e-30)
        (dense, other), total = pairs[0], 0.0
        for a, b in zip(dense.split(_ROWS), other.split(_ROWS), strict=True):
            p, q = torch.log_softmax(a.float(), -1), torch.log_softmax(b.float(), -1)
            total += float((p.exp() * (p - q)).sum())
        return total / max(len(dense), 1)
