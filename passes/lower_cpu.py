"""Lower to generated C++:  moe_ffn(..., backend="torch")  ->  moe_ffn(..., backend="cpu") where tokens are on the CPU."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from ..codegen import cpu
from ..codegen.block_spec import BlockKernelSpec
from .base import PassResult, clone
from .match_experts import computed_weights, moe_nodes, operands_of, set_operands
from .nodes import Refusals, tensor_of


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
        result, lowered = clone(graph_module), 0
        plain, stored = Refusals("plain torch operators"), Refusals("weights stay as they are stored")
        for node in moe_nodes(result):
            operands, x = operands_of(node), tensor_of(operands_of(node)["x"])
            if x is None or x.device.type != "cpu":
                continue
            refused = self._refusal(node)
            if refused is None:
                set_operands(node, self.name, weight_format=self.weight_format)
            else:
                stored.add(node, refused)
            if reason := cpu.unsupported(str(operands["activation"])) or _without(node):
                plain.add(node, reason)
                continue
            set_operands(node, self.name, backend="cpu")
            lowered += 1
        result.recompile()
        return PassResult(result, lowered, refused=(*stored.notes(), *plain.notes()))

    def _refusal(self, node: Node) -> str | None:
        """Why a block's weights are read as they are stored, where something else was asked for; or None."""
        if self.weight_format == "same":
            return None
        return computed_weights(node) if self.weight_format == "int8" else f"CPU kernels have no {self.weight_format} weights"


def _without(node: Node) -> str | None:
    """Why there is no kernel for a node's operands, or None."""
    try:
        kernel_of(node)
    except (cpu.Unavailable, ValueError) as reason:
        return str(reason)
    return None


def kernel_of(node: Node) -> BlockKernelSpec:
    """The kernel that a lowered block runs.

    Raises:
        Unavailable: there is none.
    """
    operands = operands_of(node)
    named = {name: tensor_of(operands[name]) for name in cpu.STATIC}
    x = tensor_of(operands["x"])
    assert x is not None
    score, normalise, activation, gated, weight_format = (
        operands[each] for each in ("score", "normalise", "activation", "gated", "weight_format")
    )
    weighted = operands["weights"] is not None
    return cpu.spec_of(x, named, weighted, score, normalise, activation, gated, weight_format)  # type: ignore[arg-type]
