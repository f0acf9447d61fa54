"""Student, teacher and their losses as one module, so that a single forward call is everything that is sharded or recomputed.

    loss = KL(teacher || student) + label_weight * (-log student(next word))
           + layer_weight * mean over layers of |s_l - t_l|^2 / |t_l|^2 + (oracle_weight or front_weight) * L_router

s_l, t_l are the residual streams behind layer l. L_router is a logistic loss of the routers' centred scores against the experts
that matter most in the dense model, each weighted by how far its amplitude is from the threshold: a choice that is nearly a tie
costs nearly nothing (:mod:`moecompile.choice`). For a router at the front with aligned ids it is Read-ME's: KL(softmax of the
experts' overlaps with the dense model's active neurons || softmax of the scores), :mod:`moecompile.distil`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..choice import oracle_loss
from ..distil import Distillation, loss_of, probabilities, statistics
from ..front import front_of
from ..precision import multiplying
from .config import TuneConfig
from .loss import head_loss, relative_error
from .parallel import mean
from .student import Inside
from .teacher import Teacher, head_of, hidden_states, real_tokens, unpadded

PARTS = ("loss", "kl", "label", "layers", "router")


class Distiller(nn.Module):
    """Computes the loss of a batch.

    Args:
        student: the converted model, made ready by :func:`moecompile.tuning.student.ready_for_training`.
        teacher: the dense model.
        inside: what the student's hooks fill.
        top_k: block path -> experts chosen, of the blocks that route.
        config: the weights of the losses.
        dtype: to compute in; other than float32 it is autocast's.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        inside: Inside,
        top_k: Mapping[str, int],
        config: TuneConfig,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.config, self.dtype = config, dtype
        self._inside, self._top_k = inside, dict(top_k)

    def forward(self, inputs: Mapping[str, Tensor], step: int, front_alone: bool = False) -> Tensor:
        """(5,) float32: the loss and its parts, as in :data:`PARTS`; only the first has a gradient.

        With ``front_alone`` the router at the front learns its targets and the student is not computed.
        """
        if front_alone:
            return self._front_alone(inputs)
        stride = self.config.kl_stride
        positions = slice(step % stride, None, stride)
        with multiplying(self.dtype, inputs["input_ids"].device):
            targets = self.teacher(inputs, self.dtype, positions)
            with self._inside.collecting():
                hidden = hidden_states(self.student, inputs)
        rows = unpadded(hidden, inputs)[positions]
        weight = self.config.label_weight
        labels = next_words(inputs)[positions] if weight else None
        main, label = head_loss(rows, head_of(self.student, self.dtype), targets.ids, targets.logp, labels, weight)
        kl = main.detach() - weight * label
        zero = kl.new_zeros(())
        mask = real_tokens(inputs)
        real = slice(None) if mask is None else mask
        layers = [
            relative_error(own.flatten(0, -2)[real], targets.layers[path][real])
            for path, own in self._inside.layers.items()
            if path in targets.layers
        ]
        layer = torch.stack(layers).mean() if layers else zero
        routers = [
            oracle_loss(scores[real], targets.amplitudes[path][real], self._top_k[path])
            for path, scores in self._inside.scores.items()
            if path in targets.amplitudes
        ]
        router = torch.stack(routers).mean() if routers else zero
        if targets.front is not None and self._inside.front is not None:
            router = front_loss(self._inside.front[real], targets.front[real], max(self._top_k.values()))
        self._inside.clear()
        weight = self.config.oracle_weight if targets.front is None else self.config.front_weight
        loss = main + self.config.layer_weight * layer + weight * router
        return torch.stack([loss, kl, label, layer.detach(), router.detach()]) * _share(inputs)

    def _front_alone(self, inputs: Mapping[str, Tensor]) -> Tensor:
        front = front_of(self.student)
        assert front is not None
        ids, mask = inputs["input_ids"], real_tokens(inputs)
        with multiplying(self.dtype, ids.device):
            wanted = self.teacher.front(inputs)
            scores = front.router(front.tokens(self.student, ids), inputs.get("attention_mask"))
        real = slice(None) if mask is None else mask
        loss = front_loss(scores[real], wanted[real], max(self._top_k.values()))
        zero = loss.new_zeros(())
        return torch.stack([loss, zero, zero, zero, loss.detach()]) * _share(inputs)


def front_loss(scores: Tensor, targets: Tensor, top_k: int) -> Tensor:
    """Of a router at the front: (T, N) scores and overlaps of aligned experts, or (T, L, N) scores and amplitudes."""
    options = Distillation(target="overlap" if scores.dim() == 2 else "amplitude", top_k=top_k)
    mean, scale = statistics(targets[None])
    wanted = probabilities(targets, options, mean.to(targets.device), scale)
    return loss_of(scores, wanted, options)


def _share(inputs: Mapping[str, Tensor]) -> Tensor:
    """This process's real tokens over the mean of all processes: gradients are averaged, each process's loss is a mean."""
    ids, real = inputs["input_ids"], real_tokens(inputs)
    own = torch.full((), ids.numel(), device=ids.device).float() if real is None else real.sum().float()
    return own / mean(own.clone()).clamp_min(1.0)


def next_words(inputs: Mapping[str, Tensor]) -> Tensor:
    """(T,) int64: each position's next token in its window, -1 where there is none; padding is left out."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    following = torch.full_like(ids, -1)
    following[:, :-1] = torch.where(mask[:, 1:], ids[:, 1:], -1)
    return following[mask]
