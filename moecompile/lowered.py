"""The operators that the passes lower to: what compiled graphs call. Inference only; training keeps ``expert_ffn``.

    route:    s = x W^T + b,  p = score(s),  ids = the k largest,  weights = p[ids] (/ their sum)
    moe_ffn:  y = shared(x) + sum over chosen e of w_e (W2_e act(G_e x) * (U_e x) + b2_e) + bias

Letters: T tokens, N experts, K chosen, D hidden, I expert width, S shared width; G = 2 for a gated FFN, 1 for a plain one.
``weight_format`` says how the matrices are rounded first: ``same`` not at all, ``int8`` as the CPU kernel reads them (a scale
for each neuron, shared ones too), or a name of :mod:`.codegen.stored` (routed experts, scales along rows).
Each operator has one meaning and several ways to compute it: ``backend`` names generated kernels (``cpu``, ``triton``) or plain
torch operators (``torch``), which are the specification and the fallback.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .activations import Activation
from .codegen import cpu, packing, stored, triton_backend
from .ops import expert_ffn

BACKENDS = ("torch", "cpu", "triton")
SCORES = ("none", "softmax", "sigmoid")

_library = torch.library.Library("moecompile", "FRAGMENT")
_library.define(
    "route(Tensor x, Tensor weight, Tensor? bias, int top_k, str score, bool normalise) -> (Tensor ids, Tensor weights)"
)
_library.define("dispatch(Tensor ids, int experts) -> (Tensor order, Tensor offsets)")
_library.define(
    "moe_ffn(Tensor x, Tensor? router_weight, Tensor? router_bias, Tensor? ids, Tensor? weights, "
    "Tensor? order, Tensor? offsets, Tensor up, Tensor down, "
    "Tensor? up_bias, Tensor? down_bias, Tensor? shared_gate, Tensor? shared_up, Tensor? shared_down, "
    "Tensor? shared_gate_bias, Tensor? shared_up_bias, Tensor? bias, int top_k, str score, bool normalise, "
    "str activation, bool gated, str weight_format, str backend) -> Tensor"
)


class FallbackWarning(UserWarning):
    """Something could not be compiled as asked; correct, slower code runs in its place."""


_told: set[str] = set()


def warn_once(message: str, depth: int = 3) -> None:
    """A :class:`FallbackWarning`, once per message and process, ascribed to the caller ``depth`` frames up."""
    if message not in _told:
        _told.add(message)
        warnings.warn(message, FallbackWarning, stacklevel=depth)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def route_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, top_k: int, score: str, normalise: bool
) -> tuple[Tensor, Tensor]:
    """Which experts each token uses, in plain torch operators.

    Args:
        x: (T, D); weight: (N, D); bias: (N,) or None. Scores are computed in float32 at least.
        score: ``none`` (weights are 1, the k largest raw scores are chosen), ``softmax`` over all N, or ``sigmoid``.
        normalise: divide the weights by their sum over the chosen.

    Returns:
        ids (T, K) int64 and weights (T, K) in float32, or float64 where x is.
    """
    wide = _wide(x)
    scores = torch.nn.functional.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    if score == "softmax":
        scores = scores.softmax(-1)
    elif score == "sigmoid":
        scores = scores.sigmoid()
    best, ids = torch.topk(scores, top_k, dim=-1, sorted=False)
    if score == "none":
        return ids, torch.ones_like(best)
    if normalise:
        best = best / best.sum(-1, keepdim=True)
    return ids, best


def dispatch(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The order in which grouped kernels visit (token, choice) pairs; no host synchronisation.

    Args:
        ids: (T, K) int64.

    Returns:
        order (T*K,): positions in ``ids.flatten()``, by expert, then by token; offsets (N+1,): where each expert's begin;
        int64 both.
    """
    flat, order = torch.sort(ids.reshape(-1), stable=True)
    offsets = torch.searchsorted(flat, torch.arange(experts + 1, device=ids.device, dtype=ids.dtype))
    return order, offsets


def _reference(
    x: Tensor,
    router_weight: Tensor | None,
    router_bias: Tensor | None,
    ids: Tensor | None,
    weights: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    shared_gate: Tensor | None,
    shared_up: Tensor | None,
    shared_down: Tensor | None,
    shared_gate_bias: Tensor | None,
    shared_up_bias: Tensor | None,
    bias: Tensor | None,
    top_k: int,
    score: str,
    normalise: bool,
    activation: str,
    gated: bool,
    weight_format: str,
    experts: Callable[..., Tensor] | None = None,
) -> Tensor:
    """``moe_ffn`` in plain torch operators; ``experts`` may compute the routed part in another way."""
    linear, experts = torch.nn.functional.linear, experts or _experts
    if weight_format == "int8":
        up, down = packing.rounded(up), packing.rounded(down, columns=True)
        shared_gate = None if shared_gate is None else packing.rounded(shared_gate)
        shared_up = None if shared_up is None else packing.rounded(shared_up)
        shared_down = None if shared_down is None else packing.rounded(shared_down, columns=True)
    elif weight_format != "same":
        up, down = stored.rounded(up, weight_format), stored.rounded(down, weight_format)
    parts: list[Tensor] = []
    if shared_up is not None and shared_down is not None:
        act = Activation(activation)
        h = linear(x, shared_up, shared_up_bias)
        h = act(linear(x, shared_gate, shared_gate_bias)) * h if shared_gate is not None else act(h)
        parts.append(linear(h, shared_down))
    if top_k > 0:
        if ids is None:
            assert router_weight is not None
            ids, weights = route_reference(x, router_weight, router_bias, top_k, score, normalise)
        parts.append(experts(x, ids, weights, up, down, up_bias, down_bias, activation, gated, order, offsets))
    y = sum(parts[1:], parts[0]) if parts else x.new_zeros(x.shape)
    return y if bias is None else y + bias.to(y.dtype)


def _experts(
    x: Tensor, ids: Tensor, weights: Tensor | None, up: Tensor, down: Tensor, up_bias: Tensor | None,
    down_bias: Tensor | None, activation: str, gated: bool, order: Tensor | None, offsets: Tensor | None,
) -> Tensor:  # fmt: skip
    """The routed part by ``expert_ffn``, which groups tokens itself."""
    weights = torch.ones_like(ids, dtype=x.dtype) if weights is None else weights.to(x.dtype)
    return expert_ffn(x, ids, weights, up, down, up_bias, down_bias, activation, gated)


def _triton_experts(x: Tensor, ids: Tensor, weights: Tensor | None, *rest: object) -> Tensor:
    return triton_backend.expert_ffn(x, ids, None if weights is None else weights.to(x.dtype), *rest)  # type: ignore[arg-type]


def _triton_block(
    x: Tensor, router_weight: Tensor | None, router_bias: Tensor | None, ids: Tensor | None, weights: Tensor | None,
    order: Tensor | None, offsets: Tensor | None, *rest: Any,
) -> Tensor:  # fmt: skip
    """``moe_ffn`` by Triton kernels, shared experts in the same launches; a router's scores are torch's, in float32."""
    *tensors, top_k, score, normalise, activation, gated, weight_format = rest
    if not top_k or weight_format == "int8":  # nothing is routed, or weights are rounded first
        operands = (x, router_weight, router_bias, ids, weights, order, offsets, *rest)
        return _reference(*operands, experts=_triton_experts)  # type: ignore[misc]
    if ids is None:
        assert router_weight is not None
        bias = None if router_bias is None else router_bias.float()
        scores = torch.nn.functional.linear(x.float(), router_weight.float(), bias)
        ids, weights = triton_backend.route(scores, top_k, score, normalise)
        weights = None if score == "none" else weights
    options = {"activation": activation, "gated": gated, "weight_format": weight_format}
    return triton_backend.moe_ffn(x, ids, weights, order, offsets, *tensors, **options)


def _moe_ffn(
    x: Tensor,
    router_weight: Tensor | None,
    router_bias: Tensor | None,
    ids: Tensor | None,
    weights: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    shared_gate: Tensor | None,
    shared_up: Tensor | None,
    shared_down: Tensor | None,
    shared_gate_bias: Tensor | None,
    shared_up_bias: Tensor | None,
    bias: Tensor | None,
    top_k: int,
    score: str,
    normalise: bool,
    activation: str,
    gated: bool,
    weight_format: str,
    backend: str,
) -> Tensor:
    rest = (
        up, down, up_bias, down_bias, shared_gate, shared_up, shared_down, shared_gate_bias, shared_up_bias, bias,
        top_k, score, normalise, activation, gated, weight_format,
    )  # fmt: skip
    operands = (x, router_weight, router_bias, ids, weights, order, offsets, *rest)
    if backend == "cpu":  # its counting sort is part of the kernel: an order given costs more to read than to make
        try:
            return cpu.moe_ffn(x, router_weight, router_bias, ids, weights, *rest)
        except cpu.Unavailable as reason:
            warn_once(f"moe_ffn runs in plain torch operators: {reason}")
    elif backend == "triton":
        try:
            return _triton_block(*operands)
        except triton_backend.Unavailable as reason:
            warn_once(f"moe_ffn runs in plain torch operators: {reason}")
    return _reference(*operands)


def _fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _route_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, top_k: int, score: str, normalise: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], top_k, dtype=torch.long), x.new_empty(x.shape[0], top_k, dtype=_wide(x))


def _dispatch_fake(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    return ids.new_empty(ids.shape[0] * ids.shape[1]), ids.new_empty(experts + 1)


_library.impl("route", route_reference, "CompositeExplicitAutograd")
_library.impl("dispatch", dispatch, "CompositeExplicitAutograd")
_library.impl("moe_ffn", _moe_ffn, "CompositeExplicitAutograd")
torch.library.register_fake("moecompile::route", _route_fake, lib=_library)
torch.library.register_fake("moecompile::dispatch", _dispatch_fake, lib=_library)
torch.library.register_fake("moecompile::moe_ffn", _fake, lib=_library)

dispatch_op = torch.ops.moecompile.dispatch.default
route = torch.ops.moecompile.route.default
moe_ffn = torch.ops.moecompile.moe_ffn.default
# Operand names in order, as the passes address them.
OPERANDS = tuple(argument.name for argument in moe_ffn._schema.arguments)
