"""KL(teacher || student) of the next-token distributions, head included, without ever holding all logits.

    L = sum_j in top p_j log(p_j / q_j) + p_rest log(p_rest / q_rest)
    dL/ds_j = q_j - p_j in the teacher's top,  q_j (1 - p_rest / q_rest) elsewhere
    C = -log q_y,  dC/ds_j = q_j - [j = y]            (the text's own next word y, where it is wanted)

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
        weight: (V, D), in the type to multiply in.
        bias: (V,) of the same type, or None.
        cap: Gemma's soft cap.
    """

    weight: Tensor
    bias: Tensor | None
    cap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """(T, D) -> (T, V) float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            raw = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias).float()
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
        top = best[:, :1]  # logsumexp by hand, in place: the logits are not needed any more
        ids.append(index)
        values.append(best - top - logits.sub_(top).exp_().sum(-1, keepdim=True).log_())
    return torch.cat(ids), torch.cat(values)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, ids: Tensor, logp: Tensor, labels: Tensor | None, label_weight: float
    ) -> tuple[Tensor, Tensor]:
        total, cross = hidden.new_zeros(2, dtype=torch.float64)
        count = max(1, len(hidden))
        known = labels >= 0 if labels is not None and label_weight else None
        share = label_weight / max(1, int(known.sum())) if known is not None else 0.0
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), head.chunk):
            span = slice(start, start + head.chunk)
            q = head.logits(hidden[span])  # [C, V]
            slope = None if head.cap is None else 1 - (q / head.cap).square()
            here = labels[span].clamp_min(0).unsqueeze(1) if labels is not None and known is not None else None
            real = known[span].unsqueeze(1) if known is not None else None  # [C, 1]
            p, log_p, index = logp[span].exp(), logp[span], ids[span]
            q.sub_(q.amax(-1, keepdim=True))  # softmax by hand, in place: one exponential each
            log_q, log_here = q.gather(1, index), q.gather(1, here) if here is not None else None
            size = q.exp_().sum(-1, keepdim=True)
            log_q -= size.log()
            p_rest = (1 - p.sum(1, keepdim=True)).clamp_min(0)
            q_rest = (1 - log_q.exp().sum(1, keepdim=True)).clamp_min(_SMALL)
            loss = (p * (log_p - log_q)).sum(1, keepdim=True) + p_rest * (p_rest.clamp_min(_SMALL).log() - q_rest.log())
            total += loss.sum()
            if log_here is not None and real is not None:
                cross -= ((log_here - size.log()) * real).sum()
            if grad is not None:
                own = share * real if real is not None else 0.0
                in_top = (log_q.exp() - p) / count + own * log_q.exp()
                q.mul_(((1 - p_rest / q_rest) / count + own) / size).scatter_(1, index, in_top)
                if here is not None and real is not None:
                    q.scatter_add_(1, here, (-share * real).to(q.dtype))
                if slope is not None:
                    q.mul_(slope)
                with torch.autocast(hidden.device.type, enabled=False):
                    grad[span] = (q.to(head.weight.dtype) @ head.weight).to(grad.dtype)
        ctx.save_for_backward(grad)
        kl, label = (total / count).float(), (cross / max(1, int(known.sum()) if known is not None else 0)).float()
        ctx.mark_non_differentiable(label)
        return kl + label_weight * label, label

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0].to(grad.dtype), None, None, None, None, None


def head_loss(
    hidden: Tensor, head: Head, ids: Tensor, logp: Tensor, labels: Tensor | None = None, label_weight: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(mean KL over positions + label_weight * cross-entropy, the cross-entropy alone, without gradient), in nats.

    Args:
        hidden: (T, D), the student's last hidden states.
        head: the student's head.
        ids: (T, k) int64, words of the teacher's largest logits.
        logp: (T, k) float32, the teacher's log-probabilities of them.
        labels: (T,) int64, the text's next words, -1 where there is none.
        label_weight: 0 leaves the labels unread.
    """
    return _HeadLoss.apply(hidden, head, ids, logp, labels, label_weight)  # type: ignore[no-any-return]


class _RelativeError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, target: Tensor) -> Tensor:
        scale = torch.linalg.vector_norm(target, dim=-1, dtype=torch.float32).square_().clamp_min_(_SMALL)
        apart = own.float() - target
        each = torch.linalg.vector_norm(apart, dim=-1).square_().div_(scale)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(apart.mul_((2 / max(1, len(own)) / scale).unsqueeze(-1)))
        ctx.dtype = own.dtype
        return each.mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (slope * grads[0]).to(ctx.dtype), None


def relative_error(own: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of |own - target|^2 / |target|^2 for (T, D) float tensors, with a gradient for ``own``.

    Relative for each token, so that attention sinks, whose outputs are hundreds of times larger, count as one token each.
    """
    return _RelativeError.apply(own, target)  # type: ignore[no-any-return]
