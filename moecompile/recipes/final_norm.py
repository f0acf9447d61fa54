"""The gain of the norm in front of a language model's head, fitted anew once every FFN is converted.

A converted model's last hidden states carry the errors of all its layers, and the head reads them as if they were the dense
model's: it is too sure. Least squares on the hidden states does not help (docs/quality.md); what helps is the divergence of
the next words' distributions. With u the normalised states, w the gain, E the head and s the factors that are looked for:

    min over s (D,)   mean_t KL( softmax(E (w u_dense)_t) || softmax(E (s w u)_t) )

It is convex. First one factor for all, by Newton's method, then each its own, by a few dozen steps of Adam with the gradient
in closed form. Only the head is multiplied; no gradient goes through a layer. On the tokens that the layers were fitted to, the
model errs less than elsewhere: one more factor for all comes from tokens that they were not fitted to.

Letters: T tokens, D hidden, V words.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..capture import Captured
from ..match.nodes import ASSERTS, argument, as_linear, aten, attribute, is_call, last_size, strip, value_of
from ..precision import product
from ..progress import Progress

_STEPS, _ROWS = 40, 512  # 80 steps or 1,024 tokens each: no better than what another draw of tokens changes
_RATE = 0.01
_FIRST = 1024  # tokens for the first factor
_UNSEEN = 4096  # tokens for the last factor
_LEAST = 1e-3  # nats that they must gain by it, a thousandth of their perplexity; else the norm stays
_LOGITS = 1 << 25  # at a time


@dataclass(frozen=True)
class FinalNorm:
    """logits = factor * (gain * u + shift) E^T + head_bias, with gain = parameter + offset.

    Attributes:
        name: of the parameter, as the module knows it.
        states: the graph's node whose values (..., D) ``normalise`` turns into u.
        normalise: u of those.
        parameter: (D,).
        offset: added to the parameter (1 in Gemma's norms).
        shift: (D,) or None.
        factor: between norm and head.
        head: E, (V, D).
        head_bias: (V,) or None.
    """

    name: str
    states: fx.Node
    normalise: Callable[[Tensor], Tensor]
    parameter: Tensor
    offset: float
    shift: Tensor | None
    factor: float
    head: Tensor
    head_bias: Tensor | None


@dataclass(frozen=True)
class Refitted:
    """What came of it.

    Attributes:
        parameter: (D,) the new one, float32, on the CPU.
        scale: the factors' mean.
        divergence: mean KL in nats on tokens that the layers were not fitted to, before and after.
    """

    parameter: Tensor
    scale: float
    divergence: tuple[float, float]

    @property
    def metrics(self) -> dict[str, float]:
        """For the record."""
        before, after = self.divergence
        return {"scale": round(self.scale, 4), "divergence_before": round(before, 5), "divergence": round(after, 5)}


def find_final_norm(captured: Captured, vocabulary: int | None) -> FinalNorm | str:
    """The norm that the head of a captured language model reads, or why there is none that can be fitted."""
    output = next(node for node in captured.graph_module.graph.nodes if node.op == "output")
    logits = [node for node in output.all_input_nodes if vocabulary is not None and last_size(node) == vocabulary]
    if len(logits) != 1:
        return "the model has no logits over a vocabulary" if not logits else "the model has several outputs of logits"
    last = _before_views(logits[0])
    head = as_linear(last)
    if head is None or head.weight.op != "get_attr" or not (head.bias is None or head.bias.op == "get_attr"):
        return f"the logits are not those of a linear layer ({last.name})"
    node, factor = _before_views(head.x), 1.0
    while is_call(node, {aten.mul.Tensor, aten.div.Tensor}) and isinstance(node.args[1], (int, float)):
        factor = factor * node.args[1] if node.target is aten.mul.Tensor else factor / node.args[1]
        node = _before_views(node.args[0])  # type: ignore[arg-type]
    found = _gain(node)
    if found is None:
        return f"the head does not read a norm ({node.name})"
    states, gain, offset, bias, normalise = found
    own = attribute(captured.graph_module, gain.target)
    parameter = dict(captured.module.named_parameters(remove_duplicate=False)).get(str(gain.target))
    readers = [
        user
        for other in captured.graph_module.graph.nodes
        if other.op == "get_attr" and attribute(captured.graph_module, other.target) is own
        for user in other.users
        if user.target not in ASSERTS
    ]
    if len(readers) != 1 or parameter is None or parameter is not own:
        return f"the norm's gain ({gain.target}) is no parameter of its own"
    weight = attribute(captured.graph_module, head.weight.target)

    def optional(node: fx.Node | None) -> Tensor | None:
        return None if node is None else attribute(captured.graph_module, node.target).detach().float()

    return FinalNorm(
        str(gain.target), states, normalise, parameter.detach(), offset, optional(bias), factor,
        (weight.t() if head.transposed else weight).detach(), optional(head.bias),
    )  # fmt: skip


def _before_views(node: fx.Node) -> fx.Node:
    """Walk back over what only passes features on, and over choices of tokens."""
    while True:
        node = strip(node)
        value = value_of(node)
        if not is_call(node, {aten.slice.Tensor}) or value is None:
            return node
        if argument(node, 1, "dim", 0) in (-1, value.dim() - 1):
            return node
        node = node.args[0]  # type: ignore[assignment]


def _gain(node: fx.Node) -> tuple[fx.Node, fx.Node, float, fx.Node | None, Callable[[Tensor], Tensor]] | None:
    """Read ``gain * u + shift``: the states that u is made of, gain parameter, its offset, shift, how u is made."""
    width = last_size(node)
    if is_call(node, {aten.layer_norm.default, aten.rms_norm.default}):
        layer = node.target is aten.layer_norm.default
        gain = argument(node, 2, "weight")
        bias = argument(node, 3, "bias") if layer else None
        eps = argument(node, 4 if layer else 3, "eps", 1e-5 if layer else None)
        if list(argument(node, 1, "normalized_shape")) != [width] or not _vector(gain, width):
            return None
        if bias is not None and not _vector(bias, width):
            return None
        norm = F.layer_norm if layer else F.rms_norm
        return node.args[0], gain, 0.0, bias, lambda h: norm(h, (h.shape[-1],), eps=eps)  # type: ignore[operator,return-value]
    if not is_call(node, {aten.mul.Tensor}):
        return None
    for vector, states in (node.args, node.args[::-1]):
        if not isinstance(vector, fx.Node) or not isinstance(states, fx.Node) or states.op != "call_function":
            continue
        gain, offset = strip(vector), 0.0
        if is_call(gain, {aten.add.Tensor}) and isinstance(gain.args[1], (int, float)):
            gain, offset = strip(gain.args[0]), float(gain.args[1])  # type: ignore[arg-type]
        if _vector(gain, width) and last_size(states) == width and value_of(states).dim() > 1:  # type: ignore[union-attr]
            return states, gain, offset, None, lambda u: u
    return None


def _vector(node: object, width: int | None) -> bool:
    value = value_of(node) if isinstance(node, fx.Node) and node.op == "get_attr" else None
    return value is not None and value.dim() == 1 and value.shape[0] == width and value.is_floating_point()


def refit_final_norm(
    found: FinalNorm,
    states: Tensor,
    dense: Tensor,
    unseen: Tensor,
    generator: torch.Generator,
    dtype: torch.dtype,
    progress: Progress | None = None,
) -> Refitted | None:
    """The gain fitted to the dense model's next words; None where unseen tokens gain next to nothing by it.

    Args:
        found: where it is, and the head.
        states: (T, D) the converted stream's values of ``found.states``.
        dense: (T, D) the dense stream's.
        unseen: (T,) bool, tokens that the layers were not fitted to; where there are none, some are drawn.
        generator: draws the tokens.
        dtype: what products with the head are multiplied in.
        progress: shows the steps.
    """
    device, order = states.device, torch.randperm(len(states), generator=generator).to(states.device)
    apart = unseen.to(device)[order]
    if not apart.any():
        apart = torch.arange(len(order), device=device) < len(order) // 8
    pool, last = order[~apart][: _STEPS * _ROWS], order[apart][:_UNSEEN]
    if not len(pool) or not len(last):
        return None
    fit = _Fit(found, dtype)

    def take(rows: Tensor) -> tuple[Tensor, Tensor]:
        return found.normalise(states[rows].float()), found.normalise(dense[rows].float())

    factors = torch.full((states.shape[1],), fit.one_factor(*take(pool[:_FIRST])), device=device)
    optimiser = torch.optim.Adam([factors], lr=_RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _STEPS)
    for step in (progress or Progress()).over(range(_STEPS), "final norm"):
        rows = pool[(torch.arange(_ROWS, device=device) + step * _ROWS) % len(pool)]
        _, factors.grad = fit.loss(*take(rows), factors)
        optimiser.step()
        schedule.step()
    u, wanted = take(last)
    factors = factors * fit.one_factor(u * factors, wanted)
    before, after = fit.loss(u, wanted, torch.ones_like(factors))[0], fit.loss(u, wanted, factors)[0]
    if not before - after > _LEAST:
        return None
    new = factors * (found.parameter.float() + found.offset) - found.offset
    return Refitted(new.cpu(), float(factors.mean()), (before, after))


class _Fit:
    """Divergence from the dense model's next words, with its derivatives."""

    def __init__(self, found: FinalNorm, dtype: torch.dtype) -> None:
        self.gain = (found.parameter.float() + found.offset) * found.factor
        self.head, self.dtype = found.head.to(dtype), dtype
        self.fixed = torch.zeros(len(self.head), device=self.head.device)  # the part of the logits that no token changes
        if found.shift is not None:
            self.fixed += product(found.shift * found.factor, self.head.t(), dtype)
        if found.head_bias is not None:
            self.fixed += found.head_bias
        self.chunk = max(1, _LOGITS // len(self.head))

    def _logits(self, u: Tensor, factors: Tensor | float) -> Tensor:
        return self._along(u * factors).add_(self.fixed)

    def loss(self, u: Tensor, dense: Tensor, factors: Tensor) -> tuple[float, Tensor]:
        """Mean KL in nats over the tokens (T, D), and its gradient by the factors (D,)."""
        total, gradient = 0.0, torch.zeros_like(factors)
        for part, reference in zip(u.split(self.chunk), dense.split(self.chunk), strict=True):
            p, q = torch.log_softmax(self._logits(reference, 1.0), -1), torch.log_softmax(self._logits(part, factors), -1)
            wanted = p.exp()
            total += float((wanted * (p - q)).sum())
            gradient += (product(q.exp_().sub_(wanted), self.head, self.dtype) * part).sum(0) * self.gain
        return total / len(u), gradient / len(u)

    def one_factor(self, u: Tensor, dense: Tensor) -> float:
        """The one factor for all channels with the least divergence, by three of Newton's steps from 1; from 0.5 to 2."""
        factor, wanted = 1.0, 0.0  # (the dense model's mean of what a factor multiplies, summed over the tokens)
        for part, reference in zip(u.split(self.chunk), dense.split(self.chunk), strict=True):
            wanted += float((torch.softmax(self._logits(reference, 1.0), -1) * self._along(part)).sum())
        for _ in range(3):
            slope, curvature = -wanted, 0.0
            for part in u.split(self.chunk):
                along = self._along(part)
                q = torch.softmax(along * factor + self.fixed, -1)
                mean = (q * along).sum(-1)
                slope += float(mean.sum())
                curvature += float(((q * along.square()).sum(-1) - mean.square()).sum())
            if not (math.isfinite(slope) and curvature > 0.0):
                return factor
            factor = min(max(factor - slope / curvature, 0.5), 2.0)
        return factor

    def _along(self, u: Tensor) -> Tensor:
        """The part of the logits that a factor multiplies, (T, V)."""
        return product(u * self.gain, self.head.t(), self.dtype)
