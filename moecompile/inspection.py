"""Looking inside: what was compiled, the code that runs, a script that runs it alone."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import torch
from torch.fx import Node

from .attention import attend
from .codegen import cpu, operators, triton_backend
from .compiled import Compilation, compilation_of
from .errors import CompileError, InputError, PlanError
from .files import write_bytes
from .linears import linears
from .passes import lower_cpu, lower_triton
from .passes.match_experts import moe_nodes, operands_of
from .passes.nodes import tensor_of
from .records import GraphRecord, recent


def last_graphs(compiled: Any = None) -> list[GraphRecord]:
    """The graphs compiled so far, oldest first; each prints itself, and holds its passes with graphs and diffs.

    Args:
        compiled: what :func:`moecompile.compile` returned; None for the last graphs of the process, those of
            ``torch.compile(..., backend="moecompile")`` included.

    Raises:
        InputError: it was not compiled by :func:`moecompile.compile`.
    """
    return list(recent) if compiled is None else list(compilation_of(compiled).records)


def generated_code(compiled: Any = None) -> dict[str, str]:
    """The code that runs, by name: ``kernel_...`` for generated kernels, ``graph_N`` for Inductor's code around them.

    Args:
        compiled: as for :func:`last_graphs`. Kernels are built of it, at their first call or before.

    Raises:
        InputError: it was not compiled by :func:`moecompile.compile`.
    """
    graphs = last_graphs(compiled)
    code: dict[str, str] = {}
    for node in (node for record in graphs for node in moe_nodes(record.graph_module)):
        code |= _kernel(node)
    if any(node.target in (linears, attend) for record in graphs for node in record.graph.nodes) and operators.loaded():
        code["kernel_operators"] = operators.emit()
    for record in graphs:
        if record.output_code:
            code[f"graph_{record.number}"] = "\n".join(record.output_code)
    return code


def _kernel(node: Node) -> dict[str, str]:
    """The generated kernel of a lowered block, by name; nothing where there is none."""
    operands = operands_of(node)
    try:
        if operands["backend"] == "cpu":
            spec = lower_cpu.kernel_of(node)
            return {f"kernel_{spec.name}": cpu.source(spec)}
        if operands["backend"] == "triton":
            x = tensor_of(operands["x"])
            assert x is not None
            kernel = triton_backend.kernel_of(lower_triton.kernel_of(node), x.device)
            return {f"kernel_{kernel.path.stem}": kernel.source}
    except (cpu.Unavailable, triton_backend.Unavailable, PlanError, ValueError):  # the graph's notes say so
        pass
    return {}


def write_repro(compiled: Any, path: str | Path, graph: int = -1) -> Path:
    """Write a script that compiles and runs one graph on random inputs of the same shapes, as it was compiled, beside eager
    code; with rounded weights the two are run, not compared.

    Args:
        compiled: what :func:`moecompile.compile` returned, after a call.
        path: where to; an existing file is replaced.
        graph: which of its graphs, by position.

    Raises:
        InputError: nothing was compiled yet, or there is no such graph.
        CompileError: the graph cannot be written as a script.
    """
    from torch._dynamo.repro.after_dynamo import generate_dynamo_fx_repro_string

    graphs = last_graphs(compiled)
    if not graphs:
        raise InputError("nothing was compiled yet: call the model first")
    if not -len(graphs) <= graph < len(graphs):
        raise InputError(f"there is no graph {graph}; {len(graphs)} were compiled")
    record = graphs[graph]
    try:
        text = generate_dynamo_fx_repro_string(
            record.original,
            [_blank(fact, record.training) for fact in record.inputs],
            "moecompile_repro",
            check_accuracy=record.options.weights == "same",  # rounded weights differ from eager code's
            stable_output=True,
        )
    except Exception as error:
        raise CompileError(f"graph {record.number} cannot be written as a script: {error}") from error
    names = sorted(set(re.findall(r"\b_operator_(\w+)", text)))
    imports = "".join(f"from operator import {name} as _operator_{name}\n" for name in names)
    head = f"""# Graph {record.number} as it was traced; run: python {Path(path).name}
from math import inf
import torch
import moecompile
from moecompile.backend import Backend, CompileOptions
from torch._dynamo import register_backend
{imports}

@register_backend(name="moecompile_repro")
def compiled_as_it_was(graph_module, example_inputs):
    return Backend({record.options!r})(graph_module, example_inputs)

"""
    script = head + text.lstrip()
    try:
        ast.parse(script)
    except SyntaxError as error:  # functions among Inductor's options, say
        raise CompileError(f"graph {record.number} cannot be written as a script: {error.text or error}") from error
    write_bytes(Path(path), script.encode())
    return Path(path)


def _blank(fact: Any, training: bool) -> Any:
    """An input of the recorded shape; never filled, so that it takes no memory."""
    if not isinstance(fact, tuple):
        return fact
    shape, stride, dtype, device, wants_gradient = fact
    tensor = torch.empty_strided(shape, stride, dtype=dtype, device=device)
    return tensor.requires_grad_(wants_gradient and training)  # a graph of inference goes through the passes of inference


def lowering(compilation: Compilation) -> list[dict[str, Any]]:
    """What became of each MoE layer, a row per graph and layer."""
    return [{"graph": record.number, **layer} for record in compilation.records for layer in record.layers]
