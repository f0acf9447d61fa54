"""A spec as Triton source:  :class:`TritonSpec` -> :func:`emit` -> the text of a file that stands alone.

The text comes from ``templates/expert_ffn_triton.py.jinja`` and its parts, the activation from :mod:`.triton_expressions`, the
launch constants from :mod:`.triton_constants`.
"""

from __future__ import annotations

import ast
import functools
from dataclasses import fields
from typing import Any

import jinja2

from ..activations import Activation
from ..version import __version__
from .triton_constants import Constants, heuristic
from .triton_expressions import activation_function
from .triton_slopes import derivative_function
from .triton_spec import TritonSpec

STORED = {"fp8": "float8_e4m3fn", "int8": "int8", "int4": "uint8"}


def emit(spec: TritonSpec, constants: Constants | None = None) -> str:
    """The source of a file that computes one expert FFN; it imports torch and triton alone and is the same on every machine.

    It defines ``expert_ffn(x, ids, weights, up, down, ...)``, ``block_for(pairs)`` and ``dispatch(ids, block)``, which is
    ``rank`` and ``cut``; with the direction ``backward`` also ``expert_ffn_backward``. Optional tensors cost nothing where
    they are not given: Triton compiles a kernel without them.

    Args:
        spec: what is computed.
        constants: launch constants, where they were tuned; None for the heuristic.

    Raises:
        PlanError: ``spec.activation`` is not an activation expression.
        Unavailable: an activation without a Triton form.
    """
    expression = ast.unparse(ast.parse(Activation(spec.activation).expression, mode="eval"))
    activation = activation_function(spec.activation)
    if spec.direction == "backward":
        activation += "\n\n" + derivative_function(spec.activation)
    return _tidy(
        _environment()
        .get_template("expert_ffn_triton.py.jinja")
        .render(
            spec=spec,
            spec_lines=_spec_lines(spec, expression),
            expression=expression,
            activation=activation,
            constants=constants or heuristic(spec),
            stored_dtype=STORED.get(spec.weight_format, spec.dtype),
            version=__version__,
        )
    )


def _spec_lines(spec: TritonSpec, expression: str) -> list[str]:
    """The spec as a call, wrapped; the activation as the expression that it is, so that no text of a caller is copied."""
    values: list[tuple[str, Any]] = [(field.name, getattr(spec, field.name)) for field in fields(spec)]
    parts = [f"{name}={expression if name == 'activation' else value!s}" for name, value in values]
    lines, line = [], "Spec:"
    for part in parts:
        if len(line) + len(part) > 110:
            lines.append(line)
            line = "     "
        line += f" {part}{'' if part is parts[-1] else ','}"
    return [*lines, line]


def _tidy(text: str) -> str:
    """At most two empty lines in a row, one end of line at the end: the templates' parts may leave more."""
    lines: list[str] = []
    for line in text.split("\n"):
        if line.strip() or lines[-2:] != ["", ""]:
            lines.append(line.rstrip())
    return "\n".join(lines).strip("\n") + "\n"


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader(__name__.rpartition(".")[0], "templates"),
        autoescape=False,  # Python, not HTML; every text that enters is a number, a checked name or unparsed code
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
