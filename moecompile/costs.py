"""What a model costs, counted: parameters, FLOPs per token, bytes; dense and as an MoE."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from . import stock
from .block import MoEFFN
from .codegen import stored
from .codegen.spec import ExpertKernelSpec
from .front import PreGate
from .sites import FFNSite

_ROUTER_FLOPS = 2  # a multiply and an add per router weight


def dense_costs(model: nn.Module, sites: Sequence[FFNSite], converted: Sequence[FFNSite] = ()) -> dict[str, int]:
    """Of a dense model: parameters, FFN parameters, FLOPs per token of the FFNs, bytes; tied parameters count once.

    Args:
        model: the dense model, or one of which some FFNs are MoE blocks already.
        sites: its dense FFNs.
        converted: what the blocks were made of; counted as the FFNs that they were.
    """
    blocks = {id(p) for module in model.modules() if isinstance(module, MoEFFN) for p in module.parameters()}
    parameters = [p for p in model.parameters() if id(p) not in blocks]
    size = next(iter(model.parameters())).element_size()
    before = sum(_site_parameters(site) for site in converted)
    everything = [*sites, *converted]
    return {
        "parameters": sum(p.numel() for p in parameters) + before,
        "ffn_parameters": sum(_matrices(site) for site in everything),
        "flops_per_token": sum(_dense_spec(site).flops(1) for site in everything),
        "bytes": sum(p.numel() * p.element_size() for p in parameters) + before * size,
    }


def as_stored(costs: Mapping[str, Any], model: nn.Module, before: torch.dtype) -> dict[str, Any]:
    """The costs of a conversion whose weights were cast for the disk, from type ``before``."""
    parameters = list(model.parameters())
    size = next(p.element_size() for p in parameters if p.is_floating_point())
    return {
        **costs,
        "bytes": sum(p.numel() * p.element_size() for p in parameters),
        "bytes_dense": costs["bytes_dense"] * size // before.itemsize,
    }


def _matrices(site: FFNSite) -> int:
    return _dense_spec(site).matrices * site.hidden_size * site.intermediate_size


def _site_parameters(site: FFNSite) -> int:
    sizes = [(p, site.hidden_size if p is site.down else site.intermediate_size) for p in site.projections]
    return _matrices(site) + sum(size for p, size in sizes if p.bias is not None)


def _dense_spec(site: FFNSite) -> ExpertKernelSpec:
    return ExpertKernelSpec(site.hidden_size, site.intermediate_size, 1, 1, site.gated, site.activation)


def block_specs(block: MoEFFN) -> tuple[ExpertKernelSpec, ExpertKernelSpec]:
    """A block as (shared, routed) kernel specs, at its present top_k."""
    s = block.spec
    size = block.experts.down_proj.element_size()
    shared = ExpertKernelSpec(s.hidden_size, s.shared_width, 1, 1, s.gated, s.activation, size)
    routed = ExpertKernelSpec(s.hidden_size, s.expert_width, s.experts, block.top_k, s.gated, s.activation, size)
    return shared, routed


def moe_costs(model: nn.Module, blocks: Sequence[MoEFFN], dense: dict[str, int]) -> dict[str, Any]:
    """Of a converted model, beside the dense one's figures. FLOPs per token are those of FFNs and routers; the padding of
    uneven experts is counted as computed, because it is."""
    parameters = list(model.parameters())
    specs = [block_specs(block) for block in blocks]
    routers = sum(p.numel() for block in blocks if block.router is not None for p in block.router.parameters())
    routed = sum(
        p.numel()
        for block in blocks
        if block.router is not None and 0 < block.top_k < block.spec.experts
        for p in block.router.parameters()
    )
    front = sum(p.numel() for p in front_parameters(model))
    flops = sum(shared.flops(1) + experts.flops(1) for shared, experts in specs)
    return {
        "parameters": sum(p.numel() for p in parameters),
        "parameters_dense": dense["parameters"],
        "ffn_parameters": dense["ffn_parameters"],
        "router_parameters": routers + front,
        "active_ffn_parameters": flops // 2,
        "flops_per_token_dense": dense["flops_per_token"],
        "flops_per_token": flops + _ROUTER_FLOPS * (routed + front),
        "bytes": sum(p.numel() * p.element_size() for p in parameters),
        "bytes_dense": dense["bytes"],
    }


def front_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Of the router at the front, where there is one, that each token multiplies with: an embedding table does not count."""
    front = getattr(model, "pregate", None)
    if not isinstance(front, PreGate):
        return []
    return [p for name, p in front.router.named_parameters() if not name.startswith("table.")]


@dataclass(frozen=True)
class DeviceSpeed:
    """What a device does at best, measured here: bytes read per second, float32 multiply-adds times two per second."""

    bytes_per_second: float
    flops_per_second: float


@cache
def device_speed(device: str) -> DeviceSpeed:
    """Measure a device (a third of a second): the sum of 256 MiB, and a 1024 x 1024 x 1024 matrix product; best of several."""
    data = torch.ones(64 << 20, device=device)
    square = torch.randn(1024, 1024, device=device)
    return DeviceSpeed(data.numel() * 4 / _best(data.sum, device), 2 * 1024**3 / _best(lambda: square @ square, device))


def _best(work: Any, device: str) -> float:
    taken = []
    for _ in range(6):
        start = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return min(taken)


def decode_bytes(model: nn.Module, weights: str = "same") -> int:
    """Bytes of weights that one decoded token reads: of the experts the chosen, of an input embedding none.

    Args:
        model: dense, converted, or an MoE of transformers, whose configuration says how many experts are chosen (all of them
            are counted where it does not).
        weights: how kernels read them, as of :func:`moecompile.compile`.
    """
    sizes = {id(p): float(p.numel() * p.element_size()) for p in model.parameters()}
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    heads = {id(module.weight) for module in linears}
    for module in model.modules():
        if isinstance(module, nn.Embedding) and id(module.weight) not in heads:
            sizes.pop(id(module.weight), None)
    for parameter, by_column in _rounded(model, linears, weights):
        sizes[id(parameter)] = _stored_bytes(parameter, weights, by_column)
    shares: dict[int, float] = {}
    for experts, share in _active(model):
        shares.update((id(p), max(share, shares.get(id(p), 0.0))) for p in experts.parameters())
    for each, share in shares.items():
        sizes[each] *= share
    for block in (m for m in model.modules() if isinstance(m, MoEFFN)):
        for parameter in block.exact.parameters() if block.exact is not None else ():
            sizes.pop(id(parameter), None)
    return round(sum(sizes.values()))


def _active(model: nn.Module) -> Iterator[tuple[nn.Module, float]]:
    """(experts, the share of them that a token uses)."""
    for block in (m for m in model.modules() if isinstance(m, MoEFFN)):
        if block.spec.experts:
            yield block.experts, block.top_k / block.spec.experts
    for experts in stock.all_experts(model).values():
        count, top_k = stock.width_of(experts)[0], stock.chosen(model, experts)
        yield experts, 1.0 if top_k is None else min(1.0, top_k / count)


def _rounded(model: nn.Module, linears: Sequence[nn.Linear], weights: str) -> Iterator[tuple[Tensor, bool]]:
    """The matrices that are read in another form than they are stored, and whether by column, as CPU kernels read the down
    projections: a scale for each neuron."""
    if weights == "same":
        return
    on_cpu = next(iter(model.parameters())).device.type == "cpu"
    shared = set[int]()
    for block in (m for m in model.modules() if isinstance(m, MoEFFN)):
        yield block.experts.up, False
        yield block.experts.down_proj, on_cpu
        for each in block.shared.modules() if block.shared is not None else ():
            if isinstance(each, nn.Linear):
                shared.add(id(each))
                if on_cpu:
                    yield each.weight, each is block.shared.down_proj  # type: ignore[union-attr]
    for experts in stock.stock_experts(model).values():
        turned = bool(experts.is_transposed)
        yield (experts.gate_up_proj if experts.has_gate else experts.up_proj), turned  # type: ignore[misc]
        yield experts.down_proj, on_cpu != turned  # type: ignore[misc]
    if weights == "int8-all" and on_cpu and any(True for _ in _active(model)):  # graphs without experts stay as they are
        yield from ((module.weight, False) for module in linears if id(module) not in shared)


def _stored_bytes(matrix: Tensor, weights: str, by_column: bool) -> float:
    """Bytes of a matrix and of its float32 scales."""
    columns = matrix.shape[-2] if by_column else matrix.shape[-1]
    cpu = matrix.device.type == "cpu"
    kind, group = ("int8", 0) if cpu else stored.parsed(stored.FORMATS["int8" if weights == "int8-all" else weights])
    rows = matrix.numel() // columns
    return matrix.numel() * (0.5 if kind == "int4" else 1.0) + 4.0 * rows * (-(-columns // group) if group else 1)


def stock_costs(model: nn.Module) -> dict[str, int]:
    """Of the experts of an MoE of transformers: ``ffn_parameters``, all of them; ``flops_per_token``, of the chosen and their
    routers."""
    parameters = flops = 0
    for experts in stock.all_experts(model).values():
        count, hidden, width = stock.width_of(experts)
        gated = bool(experts.has_gate)
        spec = ExpertKernelSpec(hidden, width, count, min(count, stock.chosen(model, experts) or count), gated, "")
        parameters += count * spec.matrices * hidden * width
        flops += spec.flops(1) + _ROUTER_FLOPS * count * hidden
    return {"ffn_parameters": parameters, "flops_per_token": flops}


def floor_seconds(model: nn.Module, weights: str = "same") -> dict[str, float]:
    """The device's floor: no decoded token can be faster than its weights are read, none of a prompt than it is computed.

    Args:
        weights: as of :func:`decode_bytes`.

    Returns:
        ``decode_seconds`` per token, ``prefill_seconds`` per token, ``bytes_per_second``, ``flops_per_second``.
    """
    parameter = next(iter(model.parameters()))
    speed = device_speed(str(parameter.device))
    read, active = decode_bytes(model, weights), decode_bytes(model) // parameter.element_size()
    return {
        "decode_bytes": read,
        "decode_seconds": read / speed.bytes_per_second,
        "prefill_seconds": 2 * active / speed.flops_per_second,
        "bytes_per_second": speed.bytes_per_second,
        "flops_per_second": speed.flops_per_second,
    }
