"""Activation expressions as C++ code:  ``mul(x, sigmoid(mul(x, 1.702)))``  ->  an inline function of a float32 vector.

Every intermediate value gets a name and equal ones share it, so the code can be read and nothing is computed twice. ``Vec`` is
``at::vec::Vectorized<float>``, which has a form for every instruction set. To add a primitive, add one line to :data:`RULES`.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable

from ..activations import PRIMITIVES, Activation


class Unsupported(RuntimeError):
    """An expression has no C++ form; the message is one line that says why."""


Value = str | float  # the name of a vector, or a constant


def activation_function(activation: str, name: str = "activation") -> str:
    """The source of an inline function ``Vec name(Vec x)``; ``Vec`` must be in scope.

    Args:
        activation: a name or expression of :mod:`moecompile.activations`.
        name: what the function is called.

    Returns:
        C++ text, one function, no includes.

    Raises:
        PlanError: ``activation`` is not an expression in x.
        Unsupported: it is one, but uses something that has no C++ form.
    """
    tree = ast.parse(Activation(activation).expression, mode="eval").body
    printer = _Printer()
    value = _text(printer.visit(tree))
    # Unparsed, not copied: the text may hold line breaks, which would end the comment.
    lines = [f"// {ast.unparse(tree)}", f"inline Vec {name}(Vec x) {{"]
    return "\n".join([*lines, *(f"  {line}" for line in printer.lines), f"  return {value};", "}"])


def literal(number: float) -> str:
    """A constant as C++ reads it in float32."""
    if math.isnan(number):
        return "std::numeric_limits<float>::quiet_NaN()"
    if abs(number) > 3.4028234663852886e38:
        return f"{'-' if number < 0 else ''}std::numeric_limits<float>::infinity()"
    return f"{float(number)!r}f"


class _Printer:
    """Walks an expression and keeps a line for each value that it needs."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._names: dict[str, str] = {}

    def let(self, code: str) -> str:
        """The name under which the value of ``code`` is known."""
        if code not in self._names:
            self._names[code] = f"v{len(self._names)}"
            self.lines.append(f"const Vec {self._names[code]} = {code};")
        return self._names[code]

    def visit(self, node: ast.expr) -> Value:
        """The value of one node."""
        if isinstance(node, ast.Name):
            if node.id != "x":
                raise Unsupported(f"'{node.id}' is named but not called")
            return node.id
        if isinstance(node, ast.Constant):
            return float(node.value)  # type: ignore[arg-type]
        if isinstance(node, ast.UnaryOp):
            inner = self.visit(node.operand)
            return self.let(f"{inner}.neg()") if isinstance(inner, str) else -inner
        assert isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        name, operands = node.func.id, [self.visit(argument) for argument in node.args]
        try:
            if not any(isinstance(operand, str) for operand in operands):
                return float(PRIMITIVES[name](*[(operand, None) for operand in operands])[0])
            if name not in RULES:
                raise Unsupported(f"the activation primitive '{name}' has no C++ form")
            return RULES[name](self, *operands)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise Unsupported(f"'{ast.unparse(node)}' has no C++ form: {error}") from error


def _text(value: Value) -> str:
    return value if isinstance(value, str) else f"Vec({literal(value)})"


def _infix(sign: str) -> Callable[[_Printer, Value, Value], Value]:
    return lambda p, a, b: p.let(f"{_text(a)} {sign} {_text(b)}")


def _call(function: str) -> Callable[[_Printer, Value, Value], Value]:
    return lambda p, a, b: p.let(f"at::vec::{function}({_text(a)}, {_text(b)})")


def _form(code: str) -> Callable[[_Printer, str], Value]:
    """A rule for one operand ``u`` that is a single line of code."""
    return lambda p, u: p.let(code.replace("{u}", u))


def _where(condition: str, yes: str, no: str) -> str:
    return f"Vec::blendv({no}, {yes}, {condition})"


def _clamp(p: _Printer, u: str, low: float = -1.0, high: float = 1.0) -> str:
    # NaN stays NaN: at::vec's minimum and maximum propagate it.
    return p.let(f"at::vec::minimum(at::vec::maximum({u}, {_text(low)}), {_text(high)})")


def _pow(p: _Printer, u: str, exponent: float) -> str:
    if not isinstance(exponent, float) or not isinstance(u, str):
        raise TypeError("the exponent must be a number")
    if exponent == int(exponent) and abs(exponent) <= 64:
        power, factor, left = "", u, abs(int(exponent))
        while left:  # by squaring: exact signs, and no logarithm
            if left & 1:
                power = p.let(f"{power} * {factor}") if power else factor
            left >>= 1
            if left:
                factor = p.let(f"{factor} * {factor}")
        power = power or p.let("Vec(1.0f)")
        return p.let(f"{power}.reciprocal()") if exponent < 0 else power
    return p.let(f"{u}.pow({_text(exponent)})")


def _softplus(p: _Printer, u: str, beta: float = 1.0, threshold: float = 20.0) -> str:
    inner = p.let(f"{u} * {_text(beta)}")
    soft = p.let(f"{inner}.exp().log1p() / {_text(beta)}")
    return p.let(_where(f"{inner} > {_text(threshold)}", u, soft))


def _mish(p: _Printer, u: str) -> str:
    # tanh(log(1 + e)) = n / (n + 2) with n = e (e + 2); above 20 it is 1 in float32, and e is kept from overflowing.
    e = p.let(f"at::vec::minimum({u}, Vec(20.0f)).exp()")
    n = p.let(f"{e} * ({e} + Vec(2.0f))")
    return p.let(f"{u} * ({n} / ({n} + Vec(2.0f)))")


def _gelu_tanh(p: _Printer, u: str) -> str:
    # (1 + tanh z) / 2 = sigmoid(2 z): no cancellation.
    first, third = 2 * math.sqrt(2 / math.pi), 0.044715 * 2 * math.sqrt(2 / math.pi)
    z = p.let(f"{u} * (Vec({literal(first)}) + Vec({literal(third)}) * {u} * {u})")
    return p.let(f"{u} / (Vec(1.0f) + {z}.neg().exp())")


def _leaky_relu(p: _Printer, u: str, slope: float = 0.01) -> str:
    return p.let(_where(f"{u} < Vec(0.0f)", f"{u} * {_text(slope)}", u))


def _elu(p: _Printer, u: str, alpha: float = 1.0, scale: float = 1.0, inner: float = 1.0) -> str:
    low = p.let(f"({u} * {_text(inner)}).expm1() * {_text(alpha * scale)}")
    return p.let(_where(f"{u} > Vec(0.0f)", f"{u} * {_text(scale)}", low))


def _hardsigmoid(p: _Printer, u: str) -> str:
    return p.let(f"{_clamp(p, p.let(f'{u} + Vec(3.0f)'), 0.0, 6.0)} * {_text(1 / 6)}")


# primitive of moecompile.activations -> rule on names of vectors and constants
RULES: dict[str, Callable[..., Value]] = {
    "add": _infix("+"),
    "sub": _infix("-"),
    "mul": _infix("*"),
    "div": _infix("/"),
    "minimum": _call("minimum"),
    "maximum": _call("maximum"),
    "neg": _form("{u}.neg()"),
    "abs": _form("{u}.abs()"),
    "square": _form("{u} * {u}"),
    "pow": _pow,
    "sqrt": _form("{u}.sqrt()"),
    "rsqrt": _form("{u}.rsqrt()"),
    "reciprocal": _form("{u}.reciprocal()"),
    "exp": _form("{u}.exp()"),
    "expm1": _form("{u}.expm1()"),
    "log": _form("{u}.log()"),
    "log1p": _form("{u}.log1p()"),
    "sin": _form("{u}.sin()"),
    "cos": _form("{u}.cos()"),
    "tanh": _form("{u}.tanh()"),
    "sigmoid": _form("Vec(1.0f) / (Vec(1.0f) + {u}.neg().exp())"),
    "erf": _form("{u}.erf()"),
    "relu": _form("at::vec::maximum({u}, Vec(0.0f))"),
    "relu6": lambda p, u: _clamp(p, u, 0.0, 6.0),
    "silu": _form("{u} / (Vec(1.0f) + {u}.neg().exp())"),
    "gelu": _form(f"Vec(0.5f) * {{u}} * (Vec(1.0f) + ({{u}} * Vec({literal(math.sqrt(0.5))})).erf())"),
    "gelu_tanh": _gelu_tanh,
    "mish": _mish,
    "softplus": _softplus,
    "softsign": _form("{u} / (Vec(1.0f) + {u}.abs())"),
    "logsigmoid": _form("at::vec::minimum({u}, Vec(0.0f)) - {u}.abs().neg().exp().log1p()"),
    "hardsigmoid": _hardsigmoid,
    "hardswish": lambda p, u: p.let(f"{u} * {_hardsigmoid(p, u)}"),
    "hardtanh": _clamp,
    "leaky_relu": _leaky_relu,
    "elu": _elu,
}
