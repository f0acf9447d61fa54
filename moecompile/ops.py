"""The operators of the MoE block, registered with ``torch.library``: opaque to tracing, with fake kernels and autograd.

    expert_ffn:  y_t = sum_k w_tk (W2_e h + b2_e),  h = act(G_e x_t + bg_e) * (U_e x_t + bu_e),  e = ids_tk

Letters: T tokens, N experts, K chosen, D hidden, I expert width; G = 2 for a gated FFN (gate rows first, then up rows), 1 for
a plain one. This is the reference implementation, in plain torch operators. Generated kernels replace it at lowering, and on
CUDA devices they run in its place, forward and backward, where there are some.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .activations import Activation

_EMPTY = 0
# Experts of fewer neurons are all multiplied on a CPU where tokens are many: their products are too small alone. 1,024 tokens,
# D 576, 2 Zen 4 cores, float32 (bfloat16): N 176, K 48, 6 neurons 81 -> 29 ms (49 -> 12); N 112, K 16, 12 neurons 41 -> 34
# (28 -> 15); N 56, K 8, 24 neurons would go from 18 to 36 (16 -> 15).
NARROW = 16
_TOKENS = 2048  # at a time, where all experts are multiplied: their hidden activations are held


def _check(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor, gated: bool) -> None:
    tokens, chosen = ids.shape
    experts, rows, hidden = up.shape
    width = rows // (2 if gated else 1)
    if x.shape != (tokens, hidden) or weights.shape != (tokens, chosen) or down.shape != (experts, hidden, width):
        raise ValueError(
            f"expert_ffn: x {tuple(x.shape)}, ids {tuple(ids.shape)}, weights {tuple(weights.shape)}, "
            f"up {tuple(up.shape)} and down {tuple(down.shape)} do not fit"
        )


def _hidden(pre: Tensor, activation: str, gated: bool) -> Tensor:
    """(..., G*I) pre-activations -> (..., I)."""
    act = Activation(activation)
    if not gated:
        return act(pre)
    gate, up = pre.chunk(2, dim=-1)
    return act(gate) * up


def _accumulator(x: Tensor) -> torch.dtype:
    """The type in which experts are summed: one wider than x where that is cheap.

    On the CPU float32 is summed in float64: with 64 slices the logits of a real 135 M model then differ from the dense ones by
    7.2e-5 at most, which is the dense model's own rounding error, against 9.3e-5 summed in float32.
    """
    if x.dtype == torch.float64 or (x.dtype == torch.float32 and x.device.type == "cpu"):
        return torch.float64
    return torch.float32


def _by_expert(ids: Tensor, experts: int) -> tuple[Tensor, list[int]]:
    """(positions in ids.flatten() ordered by expert (T*K,), how many belong to each expert)."""
    flat = ids.reshape(-1)
    order = torch.argsort(flat, stable=True)
    return order, torch.bincount(flat, minlength=experts).tolist()


def every_expert(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
) -> Tensor:
    """What :func:`expert_ffn` computes, in a few large products: every expert multiplied, what was not chosen set to 0.

    Operands and result are those of :func:`expert_ffn`; plain operators, so autograd sees through it.
    """
    (experts, hidden, width), halves, act = down.shape, 2 if gated else 1, Activation(activation)
    gates = x.new_zeros(len(x), experts).scatter_add(1, ids, weights.to(x.dtype))  # [T, N]
    rows = up.view(experts, halves, width, hidden).transpose(0, 1).reshape(halves, -1, hidden)  # [G, NI, D]
    biases: list[Tensor | None] = [None] * halves
    if up_bias is not None:
        biases = list(up_bias.view(experts, halves, width).transpose(0, 1).reshape(halves, -1))
    pre = [torch.nn.functional.linear(x, row, bias) for row, bias in zip(rows, biases, strict=True)]
    h = act(pre[0]) * pre[1] if gated else act(pre[0])  # [T, NI]
    h = h * gates.repeat_interleave(width, dim=1)
    y = h @ down.transpose(1, 2).reshape(-1, hidden)
    return y if down_bias is None else torch.addmm(y, gates, down_bias)


def _generated(name: str, *operands: Any) -> Any:
    """A function of the generated Triton kernels, which are deterministic; None, and one warning, where there are none."""
    from .codegen import triton_backend  # here: the reference itself needs no code generation
    from .lowered import warn_once

    try:
        return getattr(triton_backend, name)(*operands)
    except triton_backend.Unavailable as reason:
        warn_once(f"{name} runs in plain torch operators: {reason}")
        return None


@torch.library.custom_op("moecompile::expert_ffn", mutates_args=())
def expert_ffn(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
) -> Tensor:
    """Weighted sum of the chosen experts' outputs.

    Args:
        x: (T, D) tokens.
        ids: (T, K) int64 expert numbers, all different within a row.
        weights: (T, K) the weight of each chosen expert, dtype of x.
        up: (N, G*I, D) gate rows then up rows of each expert.
        down: (N, D, I).
        up_bias: (N, G*I) or None.
        down_bias: (N, D) or None.
        activation: a name or expression of :mod:`moecompile.activations`.
        gated: whether G is 2.

    Returns:
        (T, D), dtype of x.
    """
    _check(x, ids, weights, up, down, gated)
    if x.is_cuda:
        y = _generated("expert_ffn", x, ids, weights, up, down, up_bias, down_bias, activation, gated)
        if y is not None:
            return y
    tokens, chosen = ids.shape
    experts = up.shape[0]
    if tokens * chosen == 0:
        return x.new_zeros(x.shape)
    if tokens * chosen <= experts:  # decode: read the chosen experts' weights alone
        flat = ids.reshape(-1)
        rows = x.repeat_interleave(chosen, dim=0).unsqueeze(-1)  # [TK, D, 1]
        pre = torch.bmm(up[flat], rows).squeeze(-1)  # [TK, GI]
        pre = pre if up_bias is None else pre + up_bias[flat]
        h = _hidden(pre, activation, gated)  # [TK, I]
        y = torch.bmm(down[flat], h.unsqueeze(-1)).squeeze(-1)  # [TK, D]
        y = y if down_bias is None else y + down_bias[flat]
        y = y * weights.reshape(-1, 1)
        return y.view(tokens, chosen, -1).sum(1, dtype=_accumulator(x)).to(x.dtype)
    if down.shape[2] < NARROW and x.device.type == "cpu":
        parts = zip(x.split(_TOKENS), ids.split(_TOKENS), weights.split(_TOKENS), strict=True)
        return torch.cat([every_expert(*part, up, down, up_bias, down_bias, activation, gated) for part in parts])
    out = x.new_zeros(x.shape, dtype=_accumulator(x))
    order, counts = _by_expert(ids, experts)
    token_of, weight_of = order // chosen, weights.reshape(-1)[order].unsqueeze(-1)
    everyone = torch.arange(tokens, device=x.device)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            here = token_of[start : start + count]
            whole = count == tokens and torch.equal(here, everyone)  # no need to gather
            rows = x if whole else x[here]
            pre = torch.nn.functional.linear(rows, up[expert], None if up_bias is None else up_bias[expert])
            h = _hidden(pre, activation, gated)
            y = torch.nn.functional.linear(h, down[expert], None if down_bias is None else down_bias[expert])
            y = (y * weight_of[start : start + count]).to(out.dtype)
            if whole:
                out.add_(y)
            else:
                out.index_add_(0, here, y)
            start += count
    return out.to(x.dtype)


@expert_ffn.register_fake
def _(x, ids, weights, up, down, up_bias, down_bias, activation, gated):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)  # without gaps whatever the strides of x: compiled code counts on what is said here


@torch.library.custom_op("moecompile::expert_ffn_backward", mutates_args=())
def expert_ffn_backward(
    grad: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`expert_ffn`; the hidden activations are computed again, not kept.

    Args:
        grad: (T, D) gradient of the output.
        needs: which of (x, weights, up, down, up_bias, down_bias) are wanted.

    Returns:
        The six gradients in that order; those not wanted are empty.
    """
    if x.is_cuda:
        grads = _generated("expert_ffn_backward", grad, x, ids, weights, up, down, up_bias, down_bias, activation, gated, needs)
        if grads is not None:
            first, *others = (x.new_empty(_EMPTY) if g is None else g for g in grads)
            return (first, *others)  # type: ignore[return-value]
    tokens, chosen = ids.shape
    experts, width = up.shape[0], down.shape[2]
    act, wide = Activation(activation), _accumulator(x)
    gx = x.new_zeros(x.shape, dtype=wide) if needs[0] else x.new_empty(_EMPTY)
    gweights = weights.new_zeros(weights.shape) if needs[1] else weights.new_empty(_EMPTY)
    gup = torch.zeros_like(up) if needs[2] else up.new_empty(_EMPTY)
    gdown = torch.zeros_like(down) if needs[3] else down.new_empty(_EMPTY)
    gup_bias = torch.zeros_like(up_bias) if needs[4] and up_bias is not None else up.new_empty(_EMPTY)
    gdown_bias = torch.zeros_like(down_bias) if needs[5] and down_bias is not None else down.new_empty(_EMPTY)
    order, counts = _by_expert(ids, experts) if tokens * chosen else (ids.reshape(-1), [0] * experts)
    token_of, weight_of = order // max(chosen, 1), weights.reshape(-1)[order].unsqueeze(-1)
    start = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        span = slice(start, start + count)
        here, scale = token_of[span], weight_of[span]
        start += count
        xe, ge = x[here], grad[here]  # [Te, D]
        pre = torch.nn.functional.linear(xe, up[expert], None if up_bias is None else up_bias[expert])  # [Te, GI]
        value, slope = act.with_derivative(pre[:, :width])
        h = value * pre[:, width:] if gated else value  # [Te, I]
        gh = ge @ down[expert]  # [Te, I], before the token's weight
        if needs[1]:
            g = (gh * h).sum(-1)
            g = g if down_bias is None else g + ge @ down_bias[expert]
            gweights.view(-1)[order[span]] = g.to(weights.dtype)
        scaled = ge * scale
        if needs[3]:
            gdown[expert] = scaled.t() @ h
        if needs[5] and down_bias is not None:
            gdown_bias[expert] = scaled.sum(0)
        gh = gh * scale
        gpre = torch.cat([gh * pre[:, width:] * slope, gh * value], dim=-1) if gated else gh * slope  # [Te, GI]
        if needs[2]:
            gup[expert] = gpre.t() @ xe
        if needs[4] and up_bias is not None:
            gup_bias[expert] = gpre.sum(0)
        if needs[0]:
            gx.index_add_(0, here, (gpre @ up[expert]).to(wide))
    return gx.to(x.dtype), gweights, gup, gdown, gup_bias, gdown_bias


@expert_ffn_backward.register_fake
def _(grad, x, ids, weights, up, down, up_bias, down_bias, activation, gated, needs):  # type: ignore[no-untyped-def]
    def like(tensor: Tensor | None, wanted: bool, other: Tensor) -> Tensor:
        return torch.empty_like(tensor) if wanted and tensor is not None else other.new_empty(_EMPTY)

    return (
        x.new_empty(x.shape if needs[0] else _EMPTY),
        weights.new_empty(weights.shape if needs[1] else _EMPTY),
        like(up, needs[2], up),
        like(down, needs[3], down),
        like(up_bias, needs[4], up),
        like(down_bias, needs[5], down),
    )


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, ids, weights, up, down, up_bias, down_bias, activation, gated = inputs
    ctx.save_for_backward(x, ids, weights, up, down, up_bias, down_bias)
    ctx.activation, ctx.gated = activation, gated


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, ids, weights, up, down, up_bias, down_bias = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    needs = [wanted[0], wanted[2], wanted[3], wanted[4], wanted[5], wanted[6]]
    grads = expert_ffn_backward(
        grad.contiguous(), x, ids, weights, up, down, up_bias, down_bias, ctx.activation, ctx.gated, needs
    )
    gx, gweights, gup, gdown, gup_bias, gdown_bias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return gx, None, gweights, gup, gdown, gup_bias, gdown_bias, None, None


expert_ffn.register_autograd(_backward, setup_context=_setup_context)
