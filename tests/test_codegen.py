"""Kernel specs and counted costs: against the published floor of known shapes, and against tensors that are counted."""

from __future__ import annotations

import pytest
import torch
from families import BY_NAME, FAMILIES, Family, batch_of
from moecompile.codegen import ExpertKernelSpec

import moecompile
from moecompile.checkpoint import cast_weights
from moecompile.conversion import convert_with_record
from moecompile.costs import as_stored
from moecompile.recipes import Contiguous, Flap

# An H200: 790 TFLOP/s in bfloat16 and 4.3 TB/s, both measured; microseconds at T = 1, 64, 4096.
SHAPES = {
    "Mixtral": ((4096, 14336, 8, 2), (164, 657, 3653)),
    "Qwen3": ((2048, 768, 128, 8), (18, 277, 391)),
    "OLMoE": ((2048, 1024, 64, 8), (23, 188, 522)),
}


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_floor(name: str) -> None:
    (hidden, width, experts, top_k), expected = SHAPES[name]
    spec = ExpertKernelSpec(hidden, width, experts, top_k, True, "silu", element_bytes=2)
    for tokens, microseconds in zip((1, 64, 4096), expected, strict=True):
        assert spec.floor_seconds(tokens, 790e12, 4.3e12) * 1e6 == pytest.approx(microseconds, rel=0.01, abs=1)


def test_no_experts_cost_nothing() -> None:
    spec = ExpertKernelSpec(8, 0, 0, 0, False, "relu")
    assert (spec.flops(5), spec.weight_bytes(5)) == (0, 0)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_costs_of_a_family(family: Family) -> None:
    dense = family.build()
    costs = moecompile.explain(dense).costs
    matrices = 3 if family.kind == "gated" else 2
    assert costs["ffn_parameters"] == family.ffns * matrices * 32 * family.width
    assert costs["flops_per_token"] == 2 * costs["ffn_parameters"]
    assert costs["parameters"] == sum(p.numel() for p in dense.parameters())


def test_costs_are_of_what_is_stored() -> None:
    conversion = convert_with_record(BY_NAME["llama"].build(), Contiguous(4, 0, 2))
    module = cast_weights(conversion.module, torch.bfloat16)
    costs = as_stored(conversion.costs, module, torch.float32)
    assert costs["bytes"] == sum(p.numel() * 2 for p in module.parameters()) and costs["bytes"] * 2 == conversion.costs["bytes"]
    assert costs["bytes_dense"] * 2 == conversion.costs["bytes_dense"]


def test_costs_of_a_conversion() -> None:
    family = BY_NAME["llama"]
    costs = convert_with_record(family.build(), Contiguous(experts=5, shared=1, top_k=2)).costs
    assert costs["router_parameters"] == 2 * (5 * 32 + 5)
    assert costs["active_ffn_parameters"] == costs["ffn_parameters"] // 2
    assert costs["flops_per_token"] == costs["flops_per_token_dense"] // 2 + 2 * costs["router_parameters"]
    assert costs["parameters"] == costs["parameters_dense"] + costs["router_parameters"]
    static = convert_with_record(family.build(), Flap(0.5), [batch_of(family)]).costs
    assert static["router_parameters"] == 0 and static["flops_per_token"] == static["flops_per_token_dense"] // 2
