"""The routed experts in training: only the chosen ones where that is faster, with what the backward pass needs kept.

    H[t, e] = w_te act(G_e x_t) * (U_e x_t)  for chosen e, else 0      (gathered by expert)
    y = H W2^T + w b2                                                  (one matrix product over all neurons)

The reference operator (``ops.expert_ffn``) sums K expert outputs of width D for every token and computes the hidden activations
again in its backward pass. With experts of 24 neurons those sums cost more than the products that they save: on 1024 tokens,
D 576, N 48, K 16, one core, forward and backward take 181 ms there and 141 ms here (medians of 6, CPU time, a shared machine).

On a CPU many small products do not pay once a good part of the experts is on: then all are multiplied, in three large products,
and the hidden activations of the others set to 0. CPU time on a busy 2-core machine with AVX-512 BF16, one thread:

    share on   type       chosen    all      of
    16 of 48   bfloat16   9.65 s    7.97 s   a whole step on SmolLM2-135M, 1,024 tokens
    16 of 48   bfloat16   174 ms    167 ms   one layer, 2,048 tokens, forward and backward
    16 of 48   float32    237 ms    274 ms   the same
    8 of 56    bfloat16   121 ms    170 ms   the same
    8 of 56    float32    179 ms    329 ms   the same

Narrow experts are always all multiplied there: with experts of 12 neurons (N 96, K 8 to 80) a step of 2,048 tokens takes 8.9 s,
and 15.6 s where layers with less than 30 % on multiply the chosen ones alone; with experts of 6 neurons (N 192) 10.3 and 22 s
(SmolLM2-135M, bfloat16, two threads).

Letters: T tokens, N experts, K chosen, D hidden, I expert width; G = 2 for a gated FFN, 1 for a plain one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..activations import Activation
from ..block import Experts
from ..ops import NARROW, _by_expert, every_expert

_ALL_FROM = {torch.bfloat16: 0.3}  # share of the experts from which on all of them are multiplied; the table above
_ALL_FROM_ELSE = 0.5


class _ChosenExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
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
        (tokens, chosen), (experts, hidden, width) = ids.shape, down.shape
        act = Activation(activation)
        order, counts = _by_expert(ids, experts)
        token_of, weight_of = order // max(chosen, 1), weights.reshape(-1)[order].unsqueeze(-1)
        pre = x.new_empty(tokens * chosen, up.shape[1])  # [TK, GI], by expert
        h = x.new_zeros(tokens, experts, width)
        start = 0
        for expert, count in enumerate(counts):
            if count:
                span = slice(start, start + count)
                here = token_of[span]
                own = torch.nn.functional.linear(x[here], up[expert], None if up_bias is None else up_bias[expert])
                pre[span] = own
                value = act(own[:, :width]) * own[:, width:] if gated else act(own)
                h[here, expert] = value * weight_of[span]
                start += count
        y = h.view(tokens, -1) @ down.transpose(1, 2).reshape(-1, hidden)
        gates = x.new_zeros(tokens, experts).scatter_(1, ids, weights) if down_bias is not None else None
        if gates is not None and down_bias is not None:
            y = torch.addmm(y, gates, down_bias)
        ctx.save_for_backward(x, ids, weights, up, down, up_bias, down_bias, pre, h, gates, order)
        ctx.counts, ctx.act, ctx.gated = counts, act, gated
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, ids, weights, up, down, up_bias, down_bias, pre, h, gates, order = ctx.saved_tensors
        grad, wanted = grads[0].contiguous(), ctx.needs_input_grad
        (tokens, chosen), (experts, hidden, width) = ids.shape, down.shape
        token_of, weight_of = order // max(chosen, 1), weights.reshape(-1)[order].unsqueeze(-1)
        gh = (grad @ down.transpose(1, 2).reshape(-1, hidden).t()).view(tokens, experts, width)
        gdown = (grad.t() @ h.view(tokens, -1)).view(hidden, experts, width).transpose(0, 1) if wanted[4] else None
        gdown_bias = gates.t() @ grad if wanted[6] and gates is not None else None
        gweights = torch.zeros_like(weights) if wanted[2] else None
        through_bias = grad @ down_bias.t() if gweights is not None and down_bias is not None else None
        gx = torch.zeros_like(x) if wanted[0] else None
        gup = torch.zeros_like(up) if wanted[3] else None
        gup_bias = torch.zeros_like(up_bias) if wanted[5] and up_bias is not None else None
        start = 0
        for expert, count in enumerate(ctx.counts):
            if not count:
                continue
            span = slice(start, start + count)
            here, own, ge = token_of[span], pre[span], gh[token_of[span], expert]
            start += count
            value, slope = ctx.act.with_derivative(own[:, :width])
            if gweights is not None:
                each = (ge * (value * own[:, width:] if ctx.gated else value)).sum(-1)
                each = each if through_bias is None else each + through_bias[here, expert]
                gweights.view(-1)[order[span]] = each
            ge = ge * weight_of[span]
            gpre = torch.cat([ge * own[:, width:] * slope, ge * value], dim=-1) if ctx.gated else ge * slope  # [Te, GI]
            if gup is not None:
                torch.mm(gpre.t(), x[here], out=gup[expert])
            if gup_bias is not None:
                gup_bias[expert] = gpre.sum(0)
            if gx is not None:
                gx.index_add_(0, here, gpre @ up[expert])
        return gx, None, gweights, gup, gdown, gup_bias, gdown_bias, None, None


def chosen_experts(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """What ``experts(x, ids, weights)`` computes: (T, D), (T, K), (T, K) -> (T, D), for training.

    Under autocast everything is cast to its type first, as the block does.
    """
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None

    def cast(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or dtype is None else tensor.to(dtype)

    tensors = [cast(tensor) for tensor in (x, weights, experts.up, experts.down_proj)]
    biases = [cast(tensor) for tensor in (experts.up_bias_or_none, experts.down_bias)]
    with torch.autocast(x.device.type, enabled=False):
        count, _, width = experts.down_proj.shape
        least = 0.0 if width < NARROW else _ALL_FROM.get(dtype or x.dtype, _ALL_FROM_ELSE)
        x, weights, up, down = tensors  # type: ignore[assignment]
        operands = (x, ids, weights, up, down, *biases, experts.act.name, experts.gated)
        if x.device.type == "cpu" and ids.shape[1] >= least * count:
            return every_expert(*operands)  # type: ignore[arg-type]
        return _ChosenExperts.apply(*operands)  # type: ignore[no-any-return]
