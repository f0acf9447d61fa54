"""Activations as one line of algebra each, from which the Triton code of value and derivative follows.

To add an activation, add its line to :data:`ALGEBRA` (and to :data:`moecompile.activations.PRIMITIVES`, the reference that
it is tested against): it then serves gated and plain layers, forward and backward. A line is an expression in ``x`` and
parameters with default values, of the operators ``+ - * /``, of ``where(comparison, then, else)`` and of functions: other
lines, and the elementary ones of :mod:`.triton_expressions`, whose derivatives are known (:mod:`.triton_slopes`).

At a kink the branch that is taken decides the slope, so comparisons are such that torch's own backward is met. A comparison
with NaN is false: the last branch must let it through.
"""

from __future__ import annotations

import ast
import copy
import functools
import math

# name -> "parameters: expression"
ALGEBRA: dict[str, str] = {
    "square": "x: x * x",
    "reciprocal": "x: 1 / x",
    "relu": "x: where(x <= 0, 0, x)",
    "relu6": "x: hardtanh(x, 0, 6)",
    "silu": "x: x * sigmoid(x)",
    "gelu": f"x: 0.5 * x * (1 + erf(x * {math.sqrt(0.5)}))",
    # (1 + tanh z) / 2 = sigmoid(2 z): no cancellation.
    "gelu_tanh": f"x: x * sigmoid(x * ({2 * math.sqrt(2 / math.pi)} + {0.044715 * 2 * math.sqrt(2 / math.pi)} * x * x))",
    "mish": "x: x * tanh(softplus(x))",
    "softplus": "x, beta=1, threshold=20: where(x * beta > threshold, x, log1p(exp(x * beta)) / beta)",
    "softsign": "x: x / (1 + abs(x))",
    "logsigmoid": "x: where(x < -20, x, -log1p(exp(-x)))",
    "hardsigmoid": "x: hardtanh(x + 3, 0, 6) / 6",
    "hardswish": "x: where(x <= -3, 0, where(x >= 3, x, x * (x + 3) / 6))",
    "hardtanh": "x, low=-1, high=1: where(x <= low, low, where(x >= high, high, x))",
    "leaky_relu": "x, slope=0.01: where(x <= 0, x * slope, x)",
    "elu": "x, alpha=1, scale=1, inner=1: where(x <= 0, expm1(x * inner) * (alpha * scale), x * scale)",
}
_OPERATORS = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div"}


def expanded(call: ast.Call) -> ast.expr:
    """The algebra of a call of a name of :data:`ALGEBRA`, its operand and parameters put in.

    Raises:
        TypeError: too many operands, or a parameter that is no number.
    """
    assert isinstance(call.func, ast.Name)
    line = _line(call.func.id)
    names = [argument.arg for argument in line.args.args]
    given: list[ast.expr] = [*call.args, *line.args.defaults[len(line.args.defaults) - len(names) + len(call.args) :]]
    if len(call.args) > len(names) or len(given) < len(names):
        raise TypeError(f"{call.func.id} takes up to {len(names)} operands")
    for name, value in zip(names[1:], given[1:], strict=True):
        if not isinstance(value.operand if isinstance(value, ast.UnaryOp) else value, ast.Constant):
            raise TypeError(f"'{name}' must be a number")
    return _Put(dict(zip(names, given, strict=True))).visit(copy.deepcopy(line.body))


@functools.cache
def _line(name: str) -> ast.Lambda:
    line = ast.parse(f"lambda {ALGEBRA[name]}", mode="eval").body
    assert isinstance(line, ast.Lambda)
    return line


class _Put(ast.NodeTransformer):
    """Operands for names, and calls for operators, so that one form is left."""

    def __init__(self, values: dict[str, ast.expr]) -> None:
        self.values = values

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.values.get(node.id, node)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        return ast.Call(node.func, [self.visit(argument) for argument in node.args], [])

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        name = ast.Name(_OPERATORS[type(node.op)], ast.Load())
        return ast.Call(name, [self.visit(node.left), self.visit(node.right)], [])
