"""Lower to Triton:  moe_ffn(..., backend="torch")  ->  moe_ffn(..., backend="triton") where tokens are on a GPU."""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule, Node

from ..codegen import stored, triton_backend
from ..codegen.triton_spec import TritonSpec
from .base import PassResult, clone
from .match_experts import computed_weights, moe_nodes, operands_of, set_operands
from .nodes import Refusals, tensor_of


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
        result, lowered = clone(graph_module), 0
        plain, stay = Refusals("plain torch operators"), Refusals("weights stay as they are stored")
        for node in moe_nodes(result):
            operands, x = operands_of(node), tensor_of(operands_of(node)["x"])
            if x is None or not _off_cpu(node):
                continue
            refused = self._store(node, x)
            if refused:
                stay.add(node, refused)
            if reason := triton_backend.unsupported(x.dtype, str(operands["activation"])) or _without(node):
                plain.add(node, reason)
                continue
            set_operands(node, self.name, backend="triton")
            lowered += 1
        result.recompile()
        return PassResult(result, lowered, refused=(*stay.notes(), *plain.notes()))

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


def _without(node: Node) -> str | None:
    """Why there is no kernel for a node's operands, or None. One that chooses no expert needs none."""
    try:
        if operands_of(node)["top_k"]:
            kernel_of(node)
    except (triton_backend.Unavailable, ValueError) as reason:
        return str(reason)
    return None


def kernel_of(node: Node) -> TritonSpec:
    """The kernel that a lowered block runs.

    Raises:
        Unavailable: there is none.
    """
    operands = operands_of(node)
    tensors = {
        name: tensor_of(operands[name])
        for name in (
            "x", "up", "down", "up_bias", "down_bias", "shared_gate", "shared_up", "shared_down", "shared_gate_bias",
            "shared_up_bias", "bias",
        )
    }  # fmt: skip
    computed = operands["ids"] is None  # by the kernel's own router, which weights by its scores
    weighted = operands["score"] != "none" if computed else operands["weights"] is not None
    options = {name: operands[name] for name in ("activation", "gated", "weight_format")}
    x = tensors.pop("x")
    return triton_backend.spec_of(x, operands["top_k"], weighted, *tensors.values(), **options)  # type: ignore[arg-type]
