"""What a graph pass is: GraphModule in, new GraphModule out, with what it requires and ensures said and checked.

A pass never edits the graph that it is given. The pipeline is an ordered list of passes; after each one the graph is linted.
To add a pass, write one file with one class and put it into a list where it belongs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch.fx import Graph, GraphModule
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module

from ..errors import MoECompileError


@dataclass(frozen=True)
class PassResult:
    """What a pass made.

    Attributes:
        graph_module: the new graph, or the given one when nothing was to be done.
        modified: how many places were rewritten.
        notes: what was left alone and why, a line each.
        refused: what will not be computed as asked for, and why, a line each: plain operators for a kernel, stored weights for
            rounded ones. With ``fullgraph`` that is an error, and otherwise a warning.
    """

    graph_module: GraphModule
    modified: int
    notes: tuple[str, ...] = field(default=())
    refused: tuple[str, ...] = field(default=())


class Pass(Protocol):
    """A named rewrite of a whole graph.

    Attributes:
        name: as logs and dumps call it.
        requires: properties that earlier passes must have ensured.
        ensures: properties of the graph that it returns.
    """

    name: str
    requires: frozenset[str]
    ensures: frozenset[str]

    def __call__(self, graph_module: GraphModule) -> PassResult: ...


class PassError(MoECompileError):
    """A pass was run out of order, or made a graph that is not well formed."""


def clone(graph_module: GraphModule) -> GraphModule:
    """The same graph and tensors in a new GraphModule whose graph and module tree may be edited; node names are kept."""
    graph: Graph = copy.deepcopy(graph_module.graph)
    for old, new in zip(graph_module.graph.nodes, graph.nodes, strict=True):
        if hasattr(old, "_dynamo_source"):  # where an input comes from: TorchDynamo's guards and CUDA graphs ask for it
            new._dynamo_source = old._dynamo_source
    with _use_lazy_graph_module(True):  # Python code for a graph of 30 layers takes 0.2 s, and most are never run
        result = _make_graph_module(graph_module, graph, class_name="GraphModule")
    result.meta.update(graph_module.meta)
    if hasattr(graph_module, "_param_name_to_source"):
        result._param_name_to_source = graph_module._param_name_to_source
    return result


Observer = Callable[[Pass, GraphModule, PassResult], None]
OnError = Callable[[Pass, Exception], None]


def run_passes(
    graph_module: GraphModule,
    passes: Sequence[Pass],
    *,
    skip: Collection[str] = (),
    observe: Observer | None = None,
    on_error: OnError | None = None,
) -> PassResult:
    """Run passes in order and lint the graph after each.

    Args:
        skip: names of passes to leave out. What they would ensure is taken as given: passes find less to do, not wrong things.
        observe: called after each pass with the pass, the graph before it, and its result.
        on_error: called when a pass fails, which is then left out; without it the error is raised.

    Raises:
        PassError: a pass needs a property that no earlier one ensured, or its graph is malformed.
    """
    known: set[str] = set()
    modified, notes, refused = 0, [], []
    for step in passes:
        missing = step.requires - known
        if missing:
            raise PassError(f"pass {step.name} needs a graph with: {', '.join(sorted(missing))}")
        known |= step.ensures
        if step.name in skip:
            continue
        try:
            result = step(graph_module)
            _lint(step, result.graph_module)
        except Exception as error:
            if on_error is None:
                raise
            on_error(step, error)
            continue
        if observe is not None:
            observe(step, graph_module, result)
        graph_module = result.graph_module
        modified += result.modified
        notes += [f"{step.name}: {note}" for note in (*result.notes, *result.refused)]
        refused += result.refused
    return PassResult(graph_module, modified, tuple(notes), tuple(refused))


def _lint(step: Pass, graph_module: GraphModule) -> None:
    try:
        graph_module.graph.lint()
    except RuntimeError as error:
        raise PassError(f"pass {step.name} made a malformed graph: {error}") from error
