"""Several devices: ``torchrun`` starts a process for each, FSDP2 shards student and teacher over them.

Every process takes its part of a batch; gradients are averaged, so that the loss is that of one process with the whole batch.
Sharded copies are trained, and the result goes back into the caller's model at the end.
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..apply import moe_blocks
from ..errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

SETTLE_S = 0.5
"""Gloo's threads drop the last collectives' tensors some time after these are done, and need the interpreter for it; one that
asks once the interpreter ends kills the process (pytorch/pytorch#190489: 2 of 38 jobs of 4 steps, two at a time on 2 cores)."""


def world() -> tuple[int, int]:
    """(this process's rank, number of processes); (0, 1) without ``torchrun``."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """The processes that ``torchrun`` started, joined; yields this one's device.

    Raises:
        InputError: ``torchrun`` started more processes than there are devices.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise InputError(f"torchrun started process {local}, but there are {torch.cuda.device_count()} CUDA devices")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        if dist.get_backend() == "gloo":
            time.sleep(SETTLE_S)
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for the other processes."""
    if world()[1] > 1:
        dist.barrier()


def shard(root: nn.Module, student: nn.Module, dense: nn.Module, paths: list[str], device: torch.device) -> None:
    """Shard the layers of both models, then what is left, in place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for model in (student, dense):
        for path in paths:
            fully_shard(model.get_submodule(path), mesh=mesh)
    fully_shard(root, mesh=mesh)


def part_of(rows: Tensor) -> Tensor:
    """This process's rows of a batch (B, ...).

    Raises:
        InputError: the batch cannot be dealt evenly.
    """
    rank, count = world()
    if rows.shape[0] % count:
        raise InputError(f"a batch of {rows.shape[0]} rows cannot be dealt evenly to {count} processes; change --batch")
    return rows[rank::count]


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its shards, on this process (all of them must call)."""
    full = getattr(tensor, "full_tensor", None)
    return tensor.detach() if full is None else full().detach()


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, placed as a parameter is."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return value.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(parameter.device), mesh, parameter.placements)  # type: ignore[attr-defined]


def mean(values: Tensor) -> Tensor:
    """The mean over the processes."""
    _, count = world()
    if count > 1:
        dist.all_reduce(values)
        values /= count
    return values


def has_blocks(model: nn.Module) -> None:
    """Refuse a model without MoE blocks.

    Raises:
        InputError: it is not a converted one.
    """
    if not moe_blocks(model):
        raise InputError("the model has no MoE block; convert it first")
