"""The pipeline: every pass that a compiled graph goes through, in order.

| pass | rewrites |
|---|---|
| ``fold_constants`` | casts, reshapes and dropouts that change nothing |
| ``match_experts`` | ``expert_ffn`` -> ``moe_ffn``, unit weights left out |
| ``hoist_router`` | routers that read nothing but the front -> one top-k above the first layer |
| ``fuse_router`` | linear, softmax or sigmoid, top-k, normalisation -> ``route`` |
| ``share_dispatch`` | one routing decision of several layers -> one ``dispatch`` |
| ``merge_shared`` | shared experts and output biases -> into ``moe_ffn`` |
| ``fuse_block`` | a layer's own ``route`` -> into ``moe_ffn`` |
| ``dead_code`` | what nothing reads any more |
| ``lower_triton``, ``lower_cpu`` | ``moe_ffn`` -> generated kernels |
| ``lower_linear`` | the linear layers that are left -> ``linears``, one launch for those that read one x |
| ``lower_attention`` | attention of few queries -> ``attend`` |
| ``pack_weights`` | weights that a kernel reads in another form: the copies are made |
| ``outline_layers`` | equal layers -> calls of one subgraph, which Inductor compiles once |

The rest is left to Inductor, as is a graph without expert FFNs. A graph that is differentiated keeps ``expert_ffn``, which has
gradients: it goes through ``fold_constants`` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .base import Pass
from .dead_code import DeadCode
from .fold_constants import FoldConstants
from .fuse_block import FuseBlock
from .fuse_router import FuseRouter
from .hoist_router import HoistRouter
from .lower_attention import LowerAttention
from .lower_cpu import LowerCPU
from .lower_linear import LowerLinear
from .lower_triton import LowerTriton
from .match_experts import MatchExperts
from .merge_shared import MergeShared
from .outline_layers import OutlineLayers
from .pack_weights import PackWeights
from .share_dispatch import ShareDispatch


def inference_passes(weight_format: str = "same", inputs: Sequence[Any] = ()) -> list[Pass]:
    """The passes of a graph that is not differentiated.

    Args:
        weight_format: how kernels read weights: ``same`` as stored, ``int8`` the experts', ``int8-all`` on CPUs the other
            linear layers' too, or on GPUs ``int4`` or ``fp8``.
        inputs: what the graph is called with, for weights to be packed ahead.
    """
    experts, others = ("int8", "int8") if weight_format == "int8-all" else (weight_format, "same")
    return [
        FoldConstants(),
        MatchExperts(),
        HoistRouter(),
        FuseRouter(),
        ShareDispatch(),
        MergeShared(),
        FuseBlock(),
        DeadCode(),
        LowerTriton(experts),
        LowerCPU(experts),
        LowerLinear(others),
        LowerAttention(),
        PackWeights(inputs),
    ]


def closing_passes() -> list[Pass]:
    """What is done last, for Inductor alone: records and checks keep the graph as it was before."""
    return [OutlineLayers()]


def training_passes() -> list[Pass]:
    """The passes of a graph through which gradients flow."""
    return [FoldConstants()]
