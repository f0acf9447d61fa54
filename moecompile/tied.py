"""Tied training of overlapping experts: the copies of a neuron stay one neuron, though each expert stores its own.

    gradient of every copy := sum of the copies' gradients

That is the gradient of one tied weight (Read-ME trains experts as masks over one dense FFN). Copies start equal, get equal
gradients, and any optimizer that treats elements alike (SGD, Adam, with weight decay) keeps them equal, so the experts are
materialised at every moment: nothing is converted, saved or loaded otherwise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .apply import moe_blocks
from .block import MoEFFN


@contextlib.contextmanager
def tied_experts(model: nn.Module) -> Iterator[int]:
    """Within the block, backward passes sum the gradients of copies; blocks whose experts do not overlap are left alone.

    Gradients of the copies are summed when each parameter's gradient has been accumulated, so for several backward passes
    before one optimizer step use :func:`sum_copies` before that step instead.

    Yields:
        How many parameters are tied.
    """
    handles = []
    for block in moe_blocks(model).values():
        for name, parameter in _stored_by_neuron(block):

            def hook(tensor: Tensor, block: MoEFFN = block, name: str = name) -> None:
                if tensor.grad is not None:
                    _sum(tensor.grad, block, name)

            handles.append(parameter.register_post_accumulate_grad_hook(hook))
    try:
        yield len(handles)
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def sum_copies(model: nn.Module) -> int:
    """Give every copy of a neuron the sum of the copies' gradients, once, before a step; returns how many parameters."""
    count = 0
    for block in moe_blocks(model).values():
        for name, parameter in _stored_by_neuron(block):
            if parameter.grad is not None:
                _sum(parameter.grad, block, name)
                count += 1
    return count


@torch.no_grad()
def largest_gap(model: nn.Module) -> float:
    """The largest absolute difference between two copies of a neuron: 0 while they are tied."""
    worst = 0.0
    for block in moe_blocks(model).values():
        for name, parameter in _stored_by_neuron(block):
            rows, index = _rows(parameter.detach(), block, name)
            first = torch.zeros(block.spec.dense_width + 1, rows.shape[1], dtype=rows.dtype, device=rows.device)
            first[index] = rows
            worst = max(worst, float((rows - first[index])[index < block.spec.dense_width].abs().max()))
    return worst


def _stored_by_neuron(block: MoEFFN) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a block that hold something for each neuron of each expert."""
    if block.neuron is None:
        return []
    experts = block.experts
    named = {"up": experts.up, "up_bias": experts.up_bias_or_none, "down": experts.down_proj}
    return [(name, p) for name, p in named.items() if isinstance(p, nn.Parameter)]


def _rows(tensor: Tensor, block: MoEFFN, name: str) -> tuple[Tensor, Tensor]:
    """A parameter as (N * I, ...) rows, one for each stored neuron, and the dense neuron of each row; padding is neuron F."""
    assert block.neuron is not None
    spec = block.spec
    neuron = torch.where(block.neuron < 0, spec.dense_width, block.neuron)  # [N, I]
    if name == "down":  # [N, D, I]
        rows = tensor.transpose(1, 2).flatten(0, 1)
    else:  # [N, G*I, D] or [N, G*I]: gate and up half side by side
        halves = tensor.reshape(spec.experts, 2 if spec.gated else 1, spec.expert_width, -1)
        rows = halves.transpose(1, 2).flatten(0, 1).flatten(1)
    return rows, neuron.flatten()


@torch.no_grad()
def _sum(grad: Tensor, block: MoEFFN, name: str) -> None:
    """In place."""
    rows, index = _rows(grad, block, name)
    total = torch.zeros(block.spec.dense_width + 1, rows.shape[1], dtype=rows.dtype, device=rows.device)
    total.index_add_(0, index, rows)
    summed = total[index]
    spec = block.spec
    if name == "down":
        grad.copy_(summed.unflatten(0, (spec.experts, spec.expert_width)).transpose(1, 2))
    else:
        parts = summed.reshape(spec.experts, spec.expert_width, 2 if spec.gated else 1, -1).transpose(1, 2)
        grad.copy_(parts.reshape(grad.shape))
