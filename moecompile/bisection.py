"""Bisect: the first pass behind which a model's numbers are not those of eager code."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from . import logs
from .backend import CompileOptions, through_inductor
from .capture import normalise_inputs
from .checking import copies, largest_difference, overwritten
from .compiled import Compilation
from .errors import InputError
from .parity import tolerance_for
from .passes.base import Pass, clone
from .passes.pipeline import closing_passes, inference_passes
from .stock import ExpertsSwitch


@dataclass(frozen=True)
class Step:
    """Numbers behind one pass: graph, pass, largest absolute difference from the traced graph, what is allowed."""

    graph: int
    name: str
    error: float
    allowed: float

    @property
    def agrees(self) -> bool:
        """Whether the difference is within tolerance; infinite where a pass failed, or a number is NaN in one of the two."""
        return self.error <= self.allowed


@dataclass(frozen=True)
class Bisection:
    """What :func:`bisect` measured.

    Attributes:
        steps: in order; the last of each graph is ``inductor``.
    """

    steps: tuple[Step, ...]

    @property
    def culprit(self) -> str | None:
        """The first pass at which numbers diverge, or None."""
        return next((step.name for step in self.steps if not step.agrees), None)

    def __str__(self) -> str:
        rows = [f"  graph {s.graph}  {s.name:16} {s.error:.1e}  {'ok' if s.agrees else 'DIVERGES'}" for s in self.steps]
        head = f"numbers diverge at: {self.culprit}" if self.culprit else "numbers agree behind every pass"
        return "\n".join([head, *rows])


@torch.no_grad()
def bisect(
    model: nn.Module, inputs: Any = None, *, weights: str | None = None, passes: Sequence[Pass] | None = None
) -> Bisection:
    """Run a model once, each of its graphs behind every pass, and compare outputs.

    Args:
        model: compiled or not; for inference.
        inputs: as :func:`moecompile.capture.capture` takes them; guessed for transformers models.
        weights: as of :func:`moecompile.compile`, by default what the model was compiled with. ``int8`` differs from eager
            code by its rounding, and shows so.
        passes: another list than the pipeline's.

    Raises:
        CaptureError: the inputs cannot be guessed.
        InputError: it is a function.
    """
    options, dynamic = CompileOptions(), None
    while isinstance(found := getattr(model, "_moecompile", None), Compilation):
        options, dynamic, model = found.options, found.dynamic, found.target
    if not isinstance(model, nn.Module):
        raise InputError(f"bisect takes a module, not {type(model).__name__}; give the module that the function calls")
    options = replace(options, inductor=True, weights=options.weights if weights is None else weights)
    args, kwargs = normalise_inputs(model, inputs)
    steps: list[Step] = []
    own = (inference_passes(options.weights), closing_passes()) if passes is None else (passes, ())
    backend = _Bisecting(options, steps, *own)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    with ExpertsSwitch(model):
        torch.compile(forward, backend=backend, dynamic=dynamic)(*args, **kwargs)
    return Bisection(tuple(steps))


class _Bisecting:
    """A backend that runs eager code, and beside it every stage of the pipeline."""

    def __init__(self, options: CompileOptions, steps: list[Step], passes: Sequence[Pass], closing: Sequence[Pass]) -> None:
        self.options, self.steps, self.passes, self.closing = options, steps, passes, closing
        self.graphs = 0

    def __call__(self, graph_module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1
        number, first = self.graphs, True
        stages = self._stages(graph_module)
        # Here, as in a compilation: Inductor takes subgraphs from a graph that is being traced alone.
        compiled = through_inductor(clone(stages[-1][1]), list(example_inputs), self.options, [])

        def run(*inputs: Any) -> Any:
            nonlocal first
            if first:
                first = False
                self._compare(number, graph_module, [*stages, ("inductor", compiled)], inputs)
            return graph_module(*inputs)

        return run

    def _stages(self, graph_module: GraphModule) -> list[tuple[str, Any]]:
        """(pass, the graph behind it, or None where it failed), the traced graph first and a graph last."""
        found: list[tuple[str, Any]] = [("", graph_module)]
        stage = graph_module
        for step in (*self.passes, *self.closing):
            if step.name in logs.disabled():
                continue
            try:
                stage = step(stage).graph_module
                found.append((step.name, stage))
            except Exception as error:  # compiling leaves it out
                logs.log("passes", f"{step.name} failed: {error}")
                found.append((step.name, None))
        return found if found[-1][1] is not None else [*found, ("", stage)]

    def _compare(
        self, number: int, graph_module: GraphModule, stages: Sequence[tuple[str, Any]], inputs: Sequence[Any]
    ) -> None:
        changed = overwritten(graph_module)
        reference = _floats(graph_module(*copies(inputs, changed)))
        allowed = tolerance_for(reference)
        for name, stage in stages:
            if stage is None:
                self.steps.append(Step(number, name, math.inf, allowed))
            elif name:
                self._note(number, name, reference, stage(*copies(inputs, changed)), allowed)

    def _note(self, number: int, name: str, reference: list[Tensor], outputs: Any, allowed: float) -> None:
        self.steps.append(Step(number, name, largest_difference(_floats(outputs), reference), allowed))


def _floats(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
