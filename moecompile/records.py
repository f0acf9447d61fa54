"""What was compiled, kept for looking at: graphs before, between and after the passes, notes, generated code."""

from __future__ import annotations

import difflib
import itertools
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule, Node

from .files import write_bytes
from .logs import dump_folder
from .passes.base import Pass, PassResult
from .passes.nodes import site_of, tensor_of

_numbers = itertools.count(1)
_KEPT_GLOBALLY = 64


@dataclass(eq=False)
class PassRecord:
    """One pass over one graph.

    Attributes:
        name: the pass.
        modified: how many places it rewrote.
        notes: what it left alone and why.
        before: the graph before it.
        after: the graph behind it.
    """

    name: str
    modified: int
    notes: tuple[str, ...]
    before: GraphModule
    after: GraphModule

    def diff(self) -> str:
        """A unified diff of the two texts; empty when nothing changed."""
        texts = graph_text(self.before).splitlines(), graph_text(self.after).splitlines()
        lines = difflib.unified_diff(*texts, f"before {self.name}", f"after {self.name}", lineterm="", n=2)
        return "\n".join(lines)


@dataclass(eq=False)
class GraphRecord:
    """One compiled graph.

    Attributes:
        number: counts the graphs of this process.
        options: how it was compiled, a :class:`moecompile.backend.CompileOptions`.
        original: as it was traced.
        graph_module: as it went to Inductor.
        passes: one record a pass.
        inputs: for each input its (shape, stride, dtype, device, whether a gradient is wanted), or a number.
        training: whether gradients flow through it.
        layers: for each ``moe_ffn``: ``site``, ``backend``, ``top_k``, ``weight_format``, ``router`` (fused, outside or none).
        notes: what was left alone and why.
        fallback: why it runs in eager mode, or empty.
        output_code: Inductor's code for it.
        ties: tokens at which verification found two experts level but for rounding.
    """

    number: int
    original: GraphModule
    graph_module: GraphModule
    training: bool
    options: Any
    inputs: tuple[Any, ...] = ()
    passes: list[PassRecord] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    fallback: str = ""
    output_code: list[str] = field(default_factory=list)
    ties: int = 0

    @property
    def graph(self) -> Any:
        """The ``torch.fx`` graph that went to Inductor."""
        return self.graph_module.graph

    def code(self) -> str:
        """The lowered graph as text."""
        return graph_text(self.graph_module)

    def __str__(self) -> str:
        head = f"graph {self.number}" + (" (training)" if self.training else "")
        lines = [f"{head}: {len(self.layers)} MoE layers" + (f", eager: {self.fallback}" if self.fallback else "")]
        lines += [f"  {step.name}: {step.modified} rewritten" for step in self.passes]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


recent: list[GraphRecord] = []


def new_record(original: GraphModule, training: bool, options: Any) -> GraphRecord:
    """A record for a graph about to be compiled; the last ones of the process are kept besides."""
    record = GraphRecord(next(_numbers), original, original, training, options)
    recent.append(record)
    del recent[:-_KEPT_GLOBALLY]
    return record


def graph_text(graph_module: GraphModule) -> str:
    """A graph, a node a line: shape, module, what made it. Placeholders of parameters are left out."""
    lines = []
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" and not node.users:
            continue
        value = tensor_of(node)
        shape = f": {str(value.dtype).removeprefix('torch.')}{list(value.shape)}" if value is not None else ""
        origin = node.meta.get("moecompile")
        made = f"  # {origin['pass']} from {', '.join(origin['from'])}" if origin else ""
        where = f"  # {site_of(node)}" if node.op not in ("placeholder", "output", "get_attr") else ""
        lines.append(f"{node.name}{shape} = {_call(node)}{where}{made}")
    return "\n".join(lines)


def _call(node: Node) -> str:
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    if node.op == "call_function" and not isinstance(node.target, str) and hasattr(node.target, "_schema"):
        target = str(node.target)
    arguments = [str(argument) for argument in node.args] + [f"{key}={value}" for key, value in node.kwargs.items()]
    return f"{node.op.removeprefix('call_')} {target}({', '.join(arguments)})"


def observe(record: GraphRecord, step: Pass, before: GraphModule, result: PassResult) -> None:
    """Add a pass to a graph's record, and to the dump folder if there is one."""
    said = (*result.notes, *result.refused)
    entry = PassRecord(step.name, result.modified, said, before, result.graph_module)
    record.passes.append(entry)
    folder = dump_folder()
    if folder is not None:
        name = f"graph{record.number:03d}-{len(record.passes):02d}-{step.name}.txt"
        notes = "".join(f"# note: {note}\n" for note in said)
        head = f"# graph {record.number}, pass {step.name}: {result.modified} rewritten\n{notes}\n"
        behind = graph_text(result.graph_module)
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / name, f"{head}{entry.diff() or '# unchanged'}\n\n# the graph behind it\n{behind}\n".encode())
