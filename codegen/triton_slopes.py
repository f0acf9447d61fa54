"""Derivatives of activation expressions as Triton code, by forward differentiation:  (u, u')  ->  (f(u), f'(u) u').

:data:`SLOPES` and :data:`BINARY` are the calculus of the elementary functions; everything in :mod:`.triton_algebra` follows
from them. Values are those of :mod:`.triton_expressions`, and what the two share is computed once. At a kink the slope is the
one that torch's own backward uses.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable

from ..activations import Activation
from .triton_algebra import ALGEBRA, expanded
from .triton_expressions import RULES, Printer, Unavailable, Value, function_text, literal, shaped, text_of

Dual = tuple[Value, Value | None]  # value, slope; a slope of None is 0


def derivative_function(activation: str, name: str = "activation_slope") -> str:
    """The source of a jitted function ``name(x) -> (f(x), f'(x))``, float32 tensors of one shape.

    Args:
        activation: a name or expression of :mod:`moecompile.activations`.

    Raises:
        PlanError: ``activation`` is not an expression in x.
        Unavailable: it is one, but uses something that has no Triton form.
    """
    tree = ast.parse(Activation(activation).expression, mode="eval").body
    printer = Printer()
    value, slope = _visit(printer, tree)
    end = f"return {shaped(value)}, {shaped(0.0 if slope is None else slope)}"
    return function_text(name, f"({ast.unparse(tree)}, its derivative)", [*printer.lines, end])


def _visit(p: Printer, node: ast.expr) -> Dual:
    """Value and slope of one node."""
    if isinstance(node, ast.Name):
        return p.visit(node), 1.0
    if isinstance(node, ast.Constant):
        return p.visit(node), None
    if isinstance(node, ast.UnaryOp):
        value, slope = _visit(p, node.operand)
        return p.visit(node), _times(p, -1.0, slope)
    assert isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    value, name = p.visit(node), node.func.id
    if name in ALGEBRA and isinstance(value, str):
        return _visit(p, expanded(node))
    if name == "where":
        branches = [_visit(p, branch)[1] for branch in node.args[1:]]
        then, otherwise = (0.0 if slope is None else slope for slope in branches)
        return value, None if branches == [None, None] else p.pick(node, then, otherwise)
    operands = [_visit(p, argument) for argument in node.args]
    if all(slope is None for _, slope in operands) or not isinstance(value, str):
        return value, None
    if name in BINARY:
        return value, BINARY[name](p, value, *operands)
    if name not in SLOPES:
        raise Unavailable(f"the activation primitive '{name}' has no derivative in Triton")
    (u, slope), *parameters = operands
    try:
        return value, _times(p, SLOPES[name](p, u, value, *[parameter for parameter, _ in parameters]), slope)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise Unavailable(f"the derivative of '{ast.unparse(node)}' has no Triton form: {error}") from error


def _times(p: Printer, a: Value | None, b: Value | None) -> Value | None:
    if a is None or b is None:
        return None
    if not isinstance(a, str) and not isinstance(b, str):
        return a * b
    if b == 1.0 or a == 1.0:
        return a if b == 1.0 else b
    return p.let(f"{text_of(a)} * {text_of(b)}")


def _plus(p: Printer, a: Value | None, b: Value | None, sign: str = "+") -> Value | None:
    if b is None:
        return a
    if a is None:
        return b if sign == "+" else _times(p, -1.0, b)
    if not isinstance(a, str) and not isinstance(b, str):
        return a + b if sign == "+" else a - b
    return p.let(f"{text_of(a)} {sign} {text_of(b)}")


def _div(p: Printer, value: str, a: Dual, b: Dual) -> Value | None:
    """(a' - (a / b) b') / b"""
    top = _plus(p, a[1], _times(p, value, b[1]), "-")
    return None if top is None else p.let(f"{text_of(top)} / {text_of(b[0])}")


def _pick(sign: str) -> Callable[[Printer, str, Dual, Dual], Value | None]:
    def rule(p: Printer, value: str, a: Dual, b: Dual) -> Value | None:
        condition = f"{text_of(a[0])} {sign} {text_of(b[0])}"
        if not isinstance(a[0], str):  # a comparison must have its tensor on the left
            condition = f"{text_of(b[0])} {'>=' if sign == '<=' else '<='} {text_of(a[0])}"
        left, right = (text_of(0.0 if slope is None else slope) for slope in (a[1], b[1]))
        return p.let(f"tl.where({condition}, {left}, {right})")

    return rule


# operands with slopes -> slope of the result
BINARY: dict[str, Callable[[Printer, str, Dual, Dual], Value | None]] = {
    "add": lambda p, v, a, b: _plus(p, a[1], b[1]),
    "sub": lambda p, v, a, b: _plus(p, a[1], b[1], "-"),
    "mul": lambda p, v, a, b: _plus(p, _times(p, a[1], b[0]), _times(p, b[1], a[0])),
    "div": _div,
    "minimum": _pick("<="),
    "maximum": _pick(">="),
}


def _form(code: str) -> Callable[..., Value]:
    """A slope that is a line of code in the operand u and the value v."""
    return lambda p, u, v: p.let(code.replace("{u}", u).replace("{v}", v))


def _pow(p: Printer, u: str, v: str, exponent: float) -> Value:
    if exponent == 0:
        return 0.0
    lower = RULES["pow"](p, u, exponent - 1.0)
    return p.let(f"{literal(exponent)} * {text_of(lower)}")


# primitive -> slope, of the names of its operand and its value and of its parameters
SLOPES: dict[str, Callable[..., Value]] = {
    "neg": lambda p, u, v: -1.0,
    "abs": _form("tl.where({u} > 0.0, 1.0, tl.where({u} < 0.0, -1.0, {u}))"),
    "pow": _pow,
    "sqrt": _form("0.5 / {v}"),
    "rsqrt": _form("-0.5 * {v} / {u}"),
    "exp": lambda p, u, v: v,
    "expm1": _form("tl.exp({u})"),
    "log": _form("1.0 / {u}"),
    "log1p": _form("1.0 / (1.0 + {u})"),
    "sin": _form("tl.cos({u})"),
    "cos": _form("-tl.sin({u})"),
    "tanh": _form("1.0 - {v} * {v}"),
    "sigmoid": _form("{v} / (1.0 + tl.exp({u}))"),
    "erf": _form(f"{literal(2 / math.sqrt(math.pi))} * tl.exp(-{{u}} * {{u}})"),
}
