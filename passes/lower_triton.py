"""Lower to Triton:  moe_ffn(..., backend="torch")  ->  moe_ffn(..., backend="triton") where tokens are on a GPU."""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule, Node

from ..codegen import stored, triton_backend
from ..lowered import warn_once
from .base import PassResult, clone
from .match_experts import computed_weights, moe_nodes, operands_of, set_operands
from .nodes import site_of, tensor_of


class LowerTriton:
    """Choose the generated Triton kernels for routed and shared experts; a router's scores stay a matrix product there.

    Args:
        weight_format: ``same`` as the weights are stored, or ``int8``, ``int4``, ``fp8``: the routed experts' are packed once.
    """

    name = "lower_triton"
    requires = frozenset({"moe_ffn"})
    ensures = frozenset({"triton"})

    def __init__(self, weight_format: str = "same") -> None:
        self.weight_format = weight_format

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """The graph with GPU blocks lowered; one that no kernel can compute stays in torch operators, with the reason."""
        if not any(_off_cpu(node) for node in moe_nodes(graph_module)):
            return PassResult(graph_module, 0)
        result, lowered, notes = clone(graph_module), 0, []
        for node in moe_nodes(result):
            operands, x = operands_of(node), tensor_of(operands_of(node)["x"])
            if x is None or not _off_cpu(node):
                continue
            refused = self._store(node, x)
            if refused:
                notes.append(f"{site_of(node)}: node {node.name}: weights stay as they are stored: {refused}")
                warn_once(f"weights='{self.weight_format}' is left out: {refused}")
            reason = triton_backend.unsupported(x.dtype, str(operands["activation"]))
            if reason:
                notes.append(f"{site_of(node)}: node {node.name}: plain torch operators: {reason}")
                continue
            set_operands(node, self.name, backend="triton")
            lowered += 1
        result.recompile()
        return PassResult(result, lowered, tuple(notes))

    def _store(self, node: Node, x: Tensor) -> str | None:
        """Say in the node how its weights are read; or why not."""
        down = tensor_of(operands_of(node)["down"])
        if self.weight_format == "same" or down is None:
            return None
        target = triton_backend.device_target(x.device)
        reason = computed_weights(node) or stored.refusal(self.weight_format, target, down.shape[-2], down.shape[-1])
        if reason is None:
            set_operands(node, self.name, weight_format=stored.FORMATS[self.weight_format])
        return reason


def _off_cpu(node: Node) -> bool:
    x = tensor_of(operands_of(node)["x"])
    return x is not None and x.device.type != "cpu"
