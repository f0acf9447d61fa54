"""Baselines that cannot be deployed: they compute everything before they decide what to leave out.

oracle       the K experts of the largest |output|. Where nothing was fitted to the routers' choice (CMoE) the converted model
             is otherwise as it is; `calibrated` fits its projections and norm to the oracle's choice (`fitted_to_oracle`)
teal, wina   neurons with |h_j| (TEAL, arXiv 2408.14690) or |h_j| |w_j| (WINA, arXiv 2505.19427) above a threshold: the
             quantile of the layer's calibration tokens that leaves the wanted share; a token may keep more or fewer.
             Whole neurons are left out, from the down projection's input; the papers also thin the inputs of the others
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import moecompile
from moecompile.apply import install, moe_blocks
from moecompile.block import Experts
from moecompile.conversion import find_ffns
from moecompile.parity import evaluating
from moecompile.recipes import Contiguous, calibrated
from moecompile.routers import Router
from moecompile.sites import DenseFFN
from moecompile.stream import Stream

_CHUNK = 512  # tokens at a time: every expert's hidden activations are held
_SAMPLE = 4096  # tokens of a layer that its threshold is taken from


class OracleRouter(Router):
    """scores_e = |W_e h_e + c_e|, how much the output changes when expert e is on; from (T, D) tokens to (T, N).

    Taken as h^T (W^T W) h + 2 h^T (W^T c) + c^T c, so that no expert's output is made.
    """

    def __init__(self, experts: Experts, down: Tensor, constant: Tensor | None = None) -> None:
        """From down projections W (N, D, I) and constants c (N, D)."""
        super().__init__()
        self.experts = experts
        self.products = down.transpose(1, 2) @ down  # [N, I, I]
        self.crossed = None if constant is None else torch.einsum("ndi,nd->ni", down, constant)
        self.constant = None if constant is None else constant.square().sum(-1)  # [N]

    def scores(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, N)."""
        return torch.cat([self._scores(part) for part in x.split(_CHUNK)])

    def _scores(self, x: Tensor) -> Tensor:
        experts = self.experts
        rows = torch.einsum("td,njd->tnj", x, experts.up)  # [T, N, GI]
        if experts.up_bias_or_none is not None:
            rows = rows + experts.up_bias_or_none
        if experts.gated:
            gate, up = rows.chunk(2, dim=-1)
            hidden = experts.act(gate) * up
        else:
            hidden = experts.act(rows)
        squares = (torch.einsum("tni,nij->tnj", hidden, self.products) * hidden).sum(-1)
        if self.crossed is not None and self.constant is not None:
            squares = squares + 2 * (hidden * self.crossed).sum(-1) + self.constant
        return squares.clamp(min=0).sqrt()


def with_oracle(moe: nn.Module) -> nn.Module:
    """The converted model with an oracle in place of each router, in place; blocks that choose nothing stay."""
    for block in moe_blocks(moe).values():
        if block.router is not None:
            bias = block.experts.down_bias
            block.router = OracleRouter(
                block.experts, block.experts.down_proj.detach(), None if bias is None else bias.detach()
            )
    return moe


Changes = list[tuple[Tensor, Tensor]]
"""For each layer that chooses, the dense model's W_e (N, D, I) and c_e = -W_e mean(h_e), (N, D)."""


@contextmanager
def fitted_to_oracle() -> Iterator[Changes]:
    """Within, `calibrated` fits all that it fits behind the routers to what an oracle chooses: the experts of which the dense
    FFN's output changes most when each is replaced by its mean, on the converted model's own inputs.

    Yields what :func:`with_changes` needs. Experts must be of one size, batches without padding. The split and the budgets are
    those of the linear router. Activations in bfloat16 choose here, those in float32 at run time: close choices may turn.
    """
    changes: Changes = []
    lengths: list[Tensor] = []
    fit = calibrated.fit_router

    def fitted(x: Tensor, hidden: Tensor, down: Tensor, experts: list[list[int]], weights: Tensor) -> tuple[Tensor, Tensor]:
        neurons = torch.tensor(experts)  # [N, I]
        mean = (weights @ hidden) / weights.sum()
        columns = down[:, neurons].transpose(0, 1).contiguous()  # [N, D, I]
        changes.append((columns, -torch.einsum("ndi,ni->nd", columns, mean[neurons])))
        products = columns.transpose(1, 2) @ columns
        parts = ((part - mean)[:, neurons] for part in hidden.split(_CHUNK))
        lengths[:] = [torch.cat([(torch.einsum("tni,nij->tnj", h, products) * h).sum(-1) for h in parts])]
        return fit(x, hidden, down, experts, weights)

    def chosen(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> Tensor:
        return torch.zeros_like(lengths[0], dtype=torch.bool).scatter_(1, lengths[0].topk(k, dim=1).indices, True)

    with mock.patch.multiple(calibrated, fit_router=fitted, route=chosen):
        yield changes


def with_changes(moe: nn.Module, changes: Changes) -> nn.Module:
    """A model that was converted within :func:`fitted_to_oracle`, with that oracle in place of its routers."""
    blocks = moe_blocks(moe)
    routed = [blocks[site.site.placement.block] for site in moe.moecompile_plan.sites if site.router != "none"]  # type: ignore
    for block, change in zip(routed, changes, strict=True):
        block.router = OracleRouter(block.experts, *change)
    return moe


class ThresholdFFN(nn.Module):
    """A dense FFN without the neurons whose strength is below a threshold; counts how many stayed."""

    def __init__(self, dense: DenseFFN, threshold: float, weighted: bool) -> None:
        super().__init__()
        self.dense, self.threshold = dense, threshold
        self.scale = dense.down.norm(dim=0) if weighted else torch.ones(dense.down.shape[1])
        self.kept, self.seen = 0, 0

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        hidden = self.dense.hidden(hidden_states)
        stays = hidden.abs() * self.scale >= self.threshold
        self.kept += int(stays.sum())
        self.seen += stays.numel()
        return self.dense.output(hidden * stays)


@torch.no_grad()
def with_thresholds(dense: nn.Module, batches: Sequence[Any], fraction: float, weighted: bool) -> nn.Module:
    """The dense model with a :class:`ThresholdFFN` for each FFN, in place; thresholds from its own calibration tokens."""
    captured, matched = find_ffns(dense)
    stream = Stream(captured, matched.matches, batches)
    blocks = []
    with evaluating(dense):
        for number, (match, inputs) in enumerate(stream):
            ffn = DenseFFN.read(match.site, dense)
            hidden = ffn.hidden(stream.tokens(number, inputs))
            strength = hidden[:: max(1, len(hidden) // _SAMPLE)].abs()
            strength = (strength * ffn.down.norm(dim=0) if weighted else strength).flatten()
            keep = max(1, round(fraction * len(strength)))
            threshold = float(strength.kthvalue(len(strength) - keep + 1).values)
            blocks.append(ThresholdFFN(ffn, threshold, weighted))
            stream.feed(lambda rows, ffn=ffn: ffn.output(ffn.hidden(rows)), ffn.output(hidden))  # type: ignore[misc]
        plan = moecompile.plan(dense, Contiguous(1))  # where the FFNs are
    return install(dense, plan, blocks)  # type: ignore[arg-type]


def kept_fraction(model: nn.Module) -> float:
    """The share of neurons that the model's thresholds have let through so far."""
    blocks = [module for module in model.modules() if isinstance(module, ThresholdFFN)]
    return sum(block.kept for block in blocks) / max(1, sum(block.seen for block in blocks))
