"""What a model costs, counted: parameters, FLOPs per token, bytes; dense and as an MoE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .block import MoEFFN
from .codegen.spec import ExpertKernelSpec
from .sites import FFNSite

_ROUTER_FLOPS = 2  # a multiply and an add per router weight


def dense_costs(model: nn.Module, sites: Sequence[FFNSite]) -> dict[str, int]:
    """Of a dense model: parameters, FFN parameters, FLOPs per token of the FFNs, bytes; tied parameters count once."""
    parameters = list(model.parameters())
    ffn = sum(_dense_spec(site).matrices * site.hidden_size * site.intermediate_size for site in sites)
    return {
        "parameters": sum(p.numel() for p in parameters),
        "ffn_parameters": ffn,
        "flops_per_token": sum(_dense_spec(site).flops(1) for site in sites),
        "bytes": sum(p.numel() * p.element_size() for p in parameters),
    }


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
    flops = sum(shared.flops(1) + experts.flops(1) for shared, experts in specs)
    return {
        "parameters": sum(p.numel() for p in parameters),
        "parameters_dense": dense["parameters"],
        "ffn_parameters": dense["ffn_parameters"],
        "router_parameters": routers,
        "active_ffn_parameters": flops // 2,
        "flops_per_token_dense": dense["flops_per_token"],
        "flops_per_token": flops + _ROUTER_FLOPS * routed,
        "bytes": sum(p.numel() * p.element_size() for p in parameters),
        "bytes_dense": dense["bytes"],
    }
