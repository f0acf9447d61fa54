"""Lower to generated C++:  moe_ffn(..., backend="torch")  ->  moe_ffn(..., backend="cpu") where tokens are on the CPU."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from ..codegen import cpu
from ..lowered import warn_once
from .base import PassResult, clone
from .match_experts import computed_weights, moe_nodes, operands_of, set_operands
from .nodes import site_of, tensor_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class LowerCPU:
    """Choose the generated CPU kernel.

    Args:
        weight_format: ``same`` as the weights are stored, or ``int8``; what GPUs alone have (``int4``, ``fp8``) is left out.
    """

    name = "lower_cpu"
    requires = frozenset({"moe_ffn"})
    ensures = frozenset({"cpu"})

    def __init__(self, weight_format: str = "same") -> None:
        self.weight_format = weight_format

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """The graph with CPU blocks lowered; one that no kernel can compute stays in torch operators, with the reason."""
        if not moe_nodes(graph_module):
            return PassResult(graph_module, 0)
        result, lowered, notes = clone(graph_module), 0, []
        for node in moe_nodes(result):
            operands, x = operands_of(node), tensor_of(operands_of(node)["x"])
            if x is None or x.device.type != "cpu":
                continue
            refused = self._refusal(node)
            if refused is None:
                set_operands(node, self.name, weight_format=self.weight_format)
            else:
                notes.append(f"{site_of(node)}: node {node.name}: weights stay as they are stored: {refused}")
                warn_once(f"weights='{self.weight_format}' is left out: {refused}")
            reason = cpu.unsupported(str(operands["activation"]))
            if x.dtype not in _DTYPES:
                reason = f"there is no CPU kernel for {str(x.dtype).removeprefix('torch.')}"
            if reason:
                notes.append(f"{site_of(node)}: node {node.name}: plain torch operators: {reason}")
                continue
            set_operands(node, self.name, backend="cpu")
            lowered += 1
        result.recompile()
        return PassResult(result, lowered, tuple(notes))

    def _refusal(self, node: Node) -> str | None:
        """Why a block's weights are read as they are stored, where something else was asked for; or None."""
        if self.weight_format == "same":
            return None
        return computed_weights(node) if self.weight_format == "int8" else f"CPU kernels have no {self.weight_format} weights"
