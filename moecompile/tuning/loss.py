"""KL(teacher || student) of the next-token distributions, head included, without ever holding all logits.

    L = sum_j in top p_j log(p_j / q_j) + p_rest log(p_rest / q_rest)
    dL/ds_j = q_j - p_j in the teacher's top,  q_j (1 - p_rest / q_rest) elsewhere

p, q are the softmax of the teacher's and the student's logits; "top" are the teacher's largest ones, everything else is one
class. Positions go through the head a chunk at a time, and the gradient of the hidden states is made in the forward pass while
the chunk's logits are at hand (as in Liger-Kernel's fused linear losses, arXiv 2410.10989), so no logits are kept or computed
again. The head itself is not trained.

Letters: T positions, D hidden, V words, k top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_CHUNK_BYTES = 64 << 20  # of float32 logits at a time
_SMALL = 1e-6


@dataclass(frozen=True)
class Head:
    """A language model's head: logits = cap * tanh((h W^T + b) / cap), without the tanh where ``cap`` is None.

    Attributes:
        weight: (V, D).
        bias: (V,) or None.
        cap: Gemma's soft cap.
        dtype: to multiply in.
    """

    weight: Tensor
    bias: Tensor | None
    cap: float | None
    dtype: torch.dtype

    def logits(self, hidden: Tensor) -> Tensor:
        """(T, D) -> (T, V) float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(self.dtype)
            raw = torch.nn.functional.linear(hidden.to(self.dtype), self.weight.to(self.dtype), bias).float()
        return raw if self.cap is None else torch.tanh(raw / self.cap) * self.cap

    @property
    def chunk(self) -> int:
        """Positions at a time."""
        return max(16, _CHUNK_BYTES // (4 * self.weight.shape[0]))


@torch.no_grad()
def top_log_probabilities(hidden: Tensor, head: Head, count: int) -> tuple[Tensor, Tensor]:
    """The teacher's distribution: (T, D) -> word numbers (T, k) int64 and their log-probabilities (T, k) float32."""
    count = min(count, head.weight.shape[0] - 1)
    ids, values = [], []
    for part in hidden.split(head.chunk):
        logits = head.logits(part)
        best, index = logits.topk(count, dim=-1)
        ids.append(index)
        values.append(best - logits.logsumexp(-1, keepdim=True))
    return torch.cat(ids), torch.cat(values)


class _HeadKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, ids: Tensor, logp: Tensor) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float64)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), head.chunk):
            span = slice(start, start + head.chunk)
            q = head.logits(hidden[span])  # [C, V], in place from here on
            slope = None if head.cap is None else 1 - (q / head.cap).square()
            q.sub_(q.logsumexp(-1, keepdim=True))
            p, log_p, index = logp[span].exp(), logp[span], ids[span]
            log_q = q.gather(1, index)
            p_rest = (1 - p.sum(1, keepdim=True)).clamp_min(0)
            q_rest = (1 - log_q.exp().sum(1, keepdim=True)).clamp_min(_SMALL)
            loss = (p * (log_p - log_q)).sum(1, keepdim=True) + p_rest * (p_rest.clamp_min(_SMALL).log() - q_rest.log())
            total += loss.sum()
            if grad is not None:
                q.exp_().mul_(1 - p_rest / q_rest).scatter_(1, index, log_q.exp() - p)
                if slope is not None:
                    q.mul_(slope)
                with torch.autocast(hidden.device.type, enabled=False):
                    grad[span] = (q.to(head.dtype) @ head.weight.to(head.dtype)).to(grad.dtype)
        ctx.save_for_backward(grad if grad is None else grad.div_(max(1, len(hidden))))
        return (total / max(1, len(hidden))).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0].to(grad.dtype), None, None, None


def head_kl(hidden: Tensor, head: Head, ids: Tensor, logp: Tensor) -> Tensor:
    """Mean KL over positions, in nats.

    Args:
        hidden: (T, D), the student's last hidden states.
        head: the student's head.
        ids: (T, k) int64, words of the teacher's largest logits.
        logp: (T, k) float32, the teacher's log-probabilities of them.
    """
    return _HeadKL.apply(hidden, head, ids, logp)  # type: ignore[no-any-return]


def relative_error(own: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of |own - target|^2 / |target|^2 for (T, D) float tensors.

    Relative for each token, so that attention sinks, whose outputs are hundreds of times larger, count as one token each.
    """
    target = target.float()
    scale = target.square().sum(-1).clamp_min(_SMALL)
    return ((own.float() - target).square().sum(-1) / scale).mean()
