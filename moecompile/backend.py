"""The TorchDynamo backend: a traced graph through the passes, then through Inductor.

``torch.compile(model, backend="moecompile")`` finds :func:`backend` by its entry point; :func:`moecompile.compile` uses
:class:`Backend` with its own options. Whatever fails on the way leaves correct, slower code and one warning that names what
stood in the way; with ``fullgraph`` it raises instead.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor
from torch.fx import GraphModule

from . import attention, linears, logs, lowered, ops
from .block_checks import check_blocks, check_experts
from .checking import verified
from .codegen import cpu
from .dispatching import present_trace
from .errors import CompileError, InputError
from .lowered import warn_once
from .passes import lower_cpu
from .passes.base import Pass, clone, run_passes
from .passes.match_experts import moe_nodes, operands_of
from .passes.nodes import site_of
from .passes.pipeline import closing_passes, inference_passes, training_passes
from .records import GraphRecord, graph_text, new_record, observe
from .scope import globals_of, modules_in
from .version import __version__

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
WEIGHTS = ("same", "int8", "int8-all", "int4", "fp8")
Compiled = Callable[..., Any]


@dataclass(frozen=True)
class CompileOptions:
    """How to compile.

    Attributes:
        mode: as of ``torch.compile``: ``default``, ``reduce-overhead``, ``max-autotune``, ``max-autotune-no-cudagraphs``.
        weights: how kernels read weights: ``same`` as stored; the experts' rounded once,
            ``int8`` (a scale for a neuron on CPUs, for 128 elements of a row on GPUs), ``int4`` (GPUs, 64 elements of a
            row) or ``fp8`` (GPUs of cc 8.9 or later, a row); ``int8-all``, on CPUs those of the linear layers around them too
            (projections and head; scales per row).
        verify: compare every compiled graph with eager code at its first call.
        fullgraph: raise where something cannot be compiled.
        inductor: False runs the rewritten graph in eager mode, for debugging.
        options: Inductor's own options, as of ``torch.compile(options=...)``.
    """

    mode: str = "default"
    weights: str = "same"
    verify: bool = False
    fullgraph: bool = False
    inductor: bool = True
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(f"there is no mode '{self.mode}'; there are: {', '.join(MODES)}")
        if self.weights not in WEIGHTS:
            raise InputError(f"weights cannot be '{self.weights}'; there are: {', '.join(WEIGHTS)}")
        if self.options:
            from torch._inductor import config

            known = config.get_config_copy()
            unknown = [name for name, _ in self.options if str(name).replace("-", "_") not in known]
            if unknown:
                raise InputError(f"Inductor has no option '{unknown[0]}'; torch._inductor.list_options() names them")


@dataclass
class Backend:
    """A TorchDynamo backend with its options and what it has compiled so far."""

    options: CompileOptions = field(default_factory=CompileOptions)
    records: list[GraphRecord] = field(default_factory=list, repr=False)
    lowers_experts: ClassVar[bool] = True  # while a graph is traced for it

    def __call__(self, graph_module: GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        """Compile one traced graph.

        Raises:
            CompileError: it cannot be compiled and ``fullgraph`` was asked for.
        """
        if "all" in logs.disabled():
            return graph_module.forward
        with collector_paused():
            return self._compile(graph_module, example_inputs)

    def _compile(self, graph_module: GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        training = torch.is_grad_enabled() and any(getattr(t, "requires_grad", False) for t in example_inputs)
        record = new_record(graph_module, training, self.options)
        record.inputs = tuple(_input_facts(value) for value in example_inputs)
        self.records.append(record)
        record.graph_module = self._rewrite(graph_module, record, example_inputs)
        _describe(record)
        if self.options.fullgraph:
            _build(record)
        lowered = record.graph_module
        if self.options.inductor and not training:
            lowered = self._run(closing_passes(), lowered, record)
        compiled = self._lower(clone(lowered), example_inputs, record)
        return verified(compiled, record, self.options.weights) if self.options.verify else compiled

    def _rewrite(self, graph_module: GraphModule, record: GraphRecord, inputs: Sequence[Any]) -> GraphModule:
        passes = training_passes() if record.training else inference_passes(self.options.weights, inputs)
        return self._run(passes, graph_module, record)

    def _run(self, passes: list[Pass], graph_module: GraphModule, record: GraphRecord) -> GraphModule:
        def failed(step: Pass, error: Exception) -> None:
            if self.options.fullgraph:
                raise CompileError(f"pass {step.name} failed on graph {record.number}: {error}") from error
            record.notes += (f"{step.name}: left out: {error}",)
            warn_once(f"pass {step.name} failed and was left out ({_one_line(error)}); the numbers are those of eager code")

        result = run_passes(
            graph_module,
            passes,
            skip=logs.disabled(),
            observe=lambda step, before, done: observe(record, step, before, done),
            on_error=failed,
        )
        record.notes += result.notes
        for refused in result.refused:
            if self.options.fullgraph:
                raise CompileError(f"graph {record.number}: {refused}")
            warn_once(refused)
        return result.graph_module

    def _lower(self, graph_module: GraphModule, example_inputs: Sequence[Any], record: GraphRecord) -> Compiled:
        from torch._dynamo.exc import RestartAnalysis

        try:
            compiled = through_inductor(graph_module, example_inputs, self.options, record.output_code)
        except RestartAnalysis:  # not a failure: TorchDynamo traces again, knowing more
            self.records.remove(record)
            raise
        except Exception as error:
            if self.options.fullgraph:
                raise CompileError(f"Inductor could not compile graph {record.number}: {_one_line(error)}") from error
            record.fallback = _one_line(error)
            warn_once(f"graphs run in eager mode: Inductor could not compile them: {record.fallback}")
            return record.graph_module.forward
        for code in record.output_code:
            logs.log("output_code", code)
        return compiled


def _build(record: GraphRecord) -> None:
    """The kernels for CPUs, at once instead of at the first call.

    Raises:
        CompileError: one cannot be built.
    """
    for node in moe_nodes(record.graph_module):
        if operands_of(node)["backend"] == "cpu":
            try:
                cpu.build(lower_cpu.kernel_of(node))
            except cpu.Unavailable as reason:
                raise CompileError(f"graph {record.number}: {site_of(node)}: node {node.name}: {reason}") from reason


@functools.lru_cache(maxsize=1)
def operators_key() -> str:
    """A hash of the operators' code, for an option that Inductor hashes and otherwise does not use. Its caches on disk know an
    operator by its name: they would give code back that was made for other shapes and strides than those of this version."""
    files = [module.__file__ for module in (attention, linears, lowered, ops)]
    try:
        text = b"".join(Path(file).read_bytes() for file in files if file)
    except OSError:  # no sources are installed
        text = __version__.encode()
    return hashlib.sha256(text).hexdigest()


def through_inductor(
    graph_module: GraphModule, example_inputs: Sequence[Any], options: CompileOptions, code: list[str]
) -> Compiled:
    """A lowered graph compiled by Inductor (which may edit it), the generated code added to ``code``."""
    if not options.inductor:
        return graph_module.forward
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    # Sizes are what TorchDynamo guards; to assert them again takes a tenth of a decoded token's time on a CPU.
    patches: dict[str, Any] = {"size_asserts": False, "aot_inductor.metadata": {"moecompile": operators_key()}}
    patches.update(list_mode_options(options.mode) if options.mode != "default" else {})
    patches.update(options.options)
    with _collecting(code):
        return compile_fx(graph_module, list(example_inputs), config_patches=patches)  # type: ignore[arg-type,return-value]


def backend(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Compiled:
    """``torch.compile(model, backend="moecompile", mode=..., options=...)``.

    Args:
        mode: as of ``torch.compile``.
        options: ``weights`` and ``verify`` as of :func:`moecompile.compile`; the rest are Inductor's own.
    """
    own = dict(options or {})
    chosen = {key: own.pop(key) for key in ("weights", "verify") if key in own}
    trace = present_trace()
    fullgraph = bool(getattr(trace, "one_graph", False))
    made = CompileOptions(mode=mode or "default", options=tuple(own.items()), fullgraph=fullgraph, **chosen)
    if made.verify:
        for module in modules_in(_named_in(trace)):
            check_blocks(module)
            check_experts(module)
    return Backend(made)(graph_module, example_inputs)


def _named_in(trace: Any) -> list[Any]:
    """What the traced frame has and names: its arguments, its closure, the globals that it reads."""
    if trace is None:
        return []
    return [*trace.f_locals.values(), *(trace.f_globals.get(name) for name in globals_of(trace.f_code))]


backend.lowers_experts = True  # type: ignore[attr-defined]


def _input_facts(value: Any) -> Any:
    """What a repro script needs to know of an input; symbolic sizes are taken at their first values."""

    def first(size: Any) -> Any:
        return size.node.hint if isinstance(size, torch.SymInt) else size  # int() would make the size static

    if not isinstance(value, Tensor):
        return first(value)
    shape, stride = [first(size) for size in value.shape], [first(step) for step in value.stride()]
    return shape, stride, value.dtype, value.device, value.requires_grad


def _describe(record: GraphRecord) -> None:
    """Fill in what became of the MoE layers, and say it in the logs."""
    for node in moe_nodes(record.graph_module):
        operands = operands_of(node)
        router = "fused" if operands["router_weight"] is not None else "none" if operands["ids"] is None else "outside"
        record.layers.append(
            {
                "site": site_of(node),
                "backend": operands["backend"],
                "top_k": operands["top_k"],
                "router": router,
                "shared": operands["shared_up"] is not None,
                "weight_format": operands["weight_format"],
            }
        )
    wanted = logs.artifacts()
    if "match" in wanted:
        logs.log("match", f"graph {record.number}: {len(record.layers)} MoE layers")
        for layer in record.layers:
            logs.log("match", "  {site}: {backend} kernel, top_k {top_k}, router {router}".format(**layer))
        for note in record.notes:
            logs.log("match", f"  left alone: {note}")
    if "passes" in wanted:
        logs.log("passes", str(record))
        logs.log("passes", graph_text(record.graph_module))
    if "hoist" in wanted:
        outside = [layer["site"] for layer in record.layers if layer["router"] == "outside"]
        logs.log("hoist", f"graph {record.number}: {len(outside)} layers read a routing decision made elsewhere")


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """No garbage collection while something is compiled: walking the model, TorchDynamo's state and every graph again and
    again takes an eighth of the time or more. What was made meanwhile is taken for old at once: it is alive, and walking it
    takes .4 s.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if not gc.get_freeze_count():
                gc.freeze()
                gc.unfreeze()
            gc.enable()


@contextlib.contextmanager
def _collecting(into: list[str]) -> Iterator[None]:
    """Keep the code that Inductor generates, or takes from its cache, within the block."""
    from torch._inductor.graph import GraphLowering

    with mock.patch.object(GraphLowering, "save_output_code", staticmethod(into.append)):
        yield


def _one_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
