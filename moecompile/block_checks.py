"""``verify=True``: all experts on, each block of a model beside the sum of its experts, before anything is compiled."""

from __future__ import annotations

import copy
import inspect
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .apply import moe_blocks
from .block import MoEFFN
from .checking import largest_difference
from .errors import ParityError
from .lowered import warn_once
from .stock import experts_forward, stock_experts, width_of

Module = TypeVar("Module", bound=nn.Module)


@torch.no_grad()
def check_blocks(model: nn.Module) -> int:
    """All experts on, is each block the sum of its experts: the dense order against expert by expert, on random tokens.

    Returns:
        How many blocks were checked; those that keep the exact dense weights beside refitted ones, or whose experts overlap,
        are different by intent.

    Raises:
        ParityError: naming the block that is not.
    """
    checked = 0
    for name, block in moe_blocks(model).items():
        # (Experts that overlap count neurons several times.)
        if block.exact is not None or block.spec.overlap or _sharded(block):
            continue
        checked += 1
        block = _precise(block)
        like = block.experts.down_proj
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(4, block.spec.hidden_size, generator=generator, device="cpu").to(device=like.device, dtype=like.dtype)
        with torch.autocast(like.device.type, enabled=False):
            dense, routed = block.dense_order(x), _all_routed(block, x)
        scale = float(dense.abs().max()) or 1.0
        worst = float((dense - routed).abs().max()) / scale
        allowed = 256 * torch.finfo(like.dtype).eps
        if not worst <= allowed:
            raise ParityError(
                f"{name}: all experts on, the block differs from the sum of its experts by {worst:.1e} (relative)"
            )
    return checked


@torch.no_grad()
def check_experts(model: nn.Module) -> int:
    """Experts of transformers' MoE models, all of them on: our operator against their own eager forward, on random tokens.

    Returns:
        How many modules of experts were checked.

    Raises:
        ParityError: naming those that differ.
    """
    served = stock_experts(model)
    for name, experts in served.items():
        if _sharded(experts):
            continue
        experts = _precise(experts)
        down: Any = experts.down_proj
        generator = torch.Generator().manual_seed(0)
        count, hidden, _ = width_of(experts)
        x = torch.randn(4, hidden, generator=generator, device="cpu").to(device=down.device, dtype=down.dtype)
        weights = torch.rand(4, count, generator=generator, device="cpu").to(device=down.device, dtype=down.dtype)
        everyone = torch.arange(count, device=down.device).expand(4, -1)
        with torch.autocast(down.device.type, enabled=False):
            ours = experts_forward(experts, x, everyone, weights)
            theirs = inspect.unwrap(type(experts).forward)(experts, x, everyone, weights)
        worst = largest_difference([ours], [theirs]) / (float(theirs.abs().max()) or 1.0)
        if not worst <= 256 * torch.finfo(down.dtype).eps:
            raise ParityError(f"{name}: all experts on, the operator differs from their own forward by {worst:.1e} (relative)")
    return len(served)


def _sharded(module: nn.Module) -> bool:
    found = any(is_traceable_wrapper_subclass(p) for p in module.parameters())
    if found:
        warn_once("verify: blocks whose parameters are spread over processes are not checked on their own")
    return found


def _precise(module: Module) -> Module:
    """The module in float32 at least, where a difference is no rounding: a copy, of one layer at a time."""
    narrow = any(p.dtype in (torch.bfloat16, torch.float16) for p in module.parameters())
    return copy.deepcopy(module).float() if narrow else module


def _all_routed(block: MoEFFN, x: Tensor) -> Tensor:
    everyone = torch.arange(block.spec.experts, device=x.device).expand(len(x), -1)
    parts = [] if block.shared is None else [block.shared(x)]
    if block.spec.experts:
        parts.append(block.experts(x, everyone, torch.ones_like(everyone, dtype=x.dtype)))
    y = sum(parts[1:], parts[0])
    return y if block.bias is None else y + block.bias
