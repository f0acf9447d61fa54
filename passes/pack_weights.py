"""Pack weights: what kernels read in another form than it is stored, made while compiling instead of at the first call.

    down (N, D, I), stored by rows  ->  by neuron      any matrix  ->  int8, int4, fp8 and scales

The graph stays as it is: copies are kept by parameter and version (:mod:`moecompile.codegen.packing`), where operators look.
``moecompile.compile`` lays a model's weights out in place before it is traced, so that only rounded ones are left to do here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

from .. import linears
from ..codegen import cpu, packing, stored
from . import lower_cpu
from .base import PassResult
from .match_experts import moe_nodes, operands_of
from .nodes import site_of


class PackWeights:
    """Make the copies of weights that the lowered graph will read.

    Args:
        inputs: what the graph is called with, by position; those that are no parameters do not matter. Without them nothing
            is packed here.
    """

    name = "pack_weights"
    requires = frozenset({"moe_ffn"})
    ensures = frozenset({"packed"})

    def __init__(self, inputs: Sequence[Any] = ()) -> None:
        self.inputs = inputs

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """The same graph; ``modified`` counts the matrices and vectors that were packed."""
        values = self._parameters(graph_module)
        sites: dict[str, None] = {}
        made, size = 0, 0
        for site, parameter, form in _forms(graph_module, values):
            try:
                with _disable_current_modes(), torch.no_grad():
                    copies = packing.cache.get(parameter, form)
            except (ValueError, RuntimeError):  # the operator meets it again, and says so
                continue
            sites[site] = None
            made, size = made + 1, size + sum(copy.numel() * copy.element_size() for copy in copies)
        if not made:
            return PassResult(graph_module, 0)
        first, *others = sites
        more = f" and {len(others)} more" if others else ""
        kept = f"{first}{more}: {made} copies of weights, {size / 2**20:.1f} MiB, are kept beside the stored ones"
        return PassResult(graph_module, made, (kept,))

    def _parameters(self, graph_module: GraphModule) -> dict[Node, nn.Parameter]:
        """The parameters that the graph's inputs and attributes are."""
        placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
        values: dict[Node, Any] = dict(zip(placeholders, self.inputs, strict=False))
        for node in graph_module.graph.nodes:
            if node.op == "get_attr":
                path, _, name = str(node.target).rpartition(".")
                values[node] = getattr(graph_module.get_submodule(path), name, None)
        return {
            node: value
            for node, value in values.items()
            if isinstance(value, nn.Parameter) and not value.is_inference() and not is_traceable_wrapper_subclass(value)
        }


def _forms(graph_module: GraphModule, values: dict[Node, nn.Parameter]) -> Iterator[tuple[str, nn.Parameter, str]]:
    """(site, parameter, the form in which a kernel wants it) where that is not how it is stored."""
    for node in moe_nodes(graph_module):
        operands = operands_of(node)
        if operands["backend"] == "cpu":
            try:
                spec = lower_cpu.kernel_of(node)
            except (cpu.Unavailable, ValueError):
                continue
            for name in cpu.STATIC:
                parameter = values.get(operands[name])  # type: ignore[call-overload]
                if parameter is not None and (form := cpu.form_of(name, parameter, spec)) is not None:
                    yield site_of(node), parameter, form
        elif operands["backend"] == "triton" and operands["weight_format"] not in ("same", "int8") and operands["top_k"]:
            for name in ("up", "down"):
                if (parameter := values.get(operands[name])) is not None:  # type: ignore[call-overload]
                    yield site_of(node), parameter, stored.form(str(operands["weight_format"]))
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and node.target is linears.linears and node.args[3] == "int8":
            for weight in node.args[1]:  # type: ignore[union-attr]
                if (parameter := values.get(weight)) is not None:  # type: ignore[call-overload,arg-type]
                    yield site_of(node), parameter, "int8 rows"
