"""Activation expressions as Triton code:  ``mul(x, sigmoid(mul(x, 1.702)))``  ->  a ``@triton.jit`` function, in float32.

Every intermediate value gets a name and equal ones share it, so the code can be read and nothing is computed twice. Only
``tl.exp``, ``log``, ``sqrt``, ``rsqrt``, ``sin``, ``cos`` and ``erf`` are called: they exist for CUDA, for HIP and in the
interpreter, which libdevice does not. :data:`RULES` has the elementary functions; activations are lines of
:mod:`.triton_algebra`, and a new one is added there.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable

from ..activations import PRIMITIVES, Activation
from .triton_algebra import ALGEBRA, expanded


class Unavailable(RuntimeError):
    """A generated kernel cannot be had here; the message is one line that says why."""


Value = str | float  # the name of a float32 tensor, or a constant

_FLOAT32_MIN, _FLOAT32_MAX = 2.0**-126, 3.4028234663852886e38


def activation_function(activation: str, name: str = "activation") -> str:
    """The source of a jitted function ``name(x)`` of a float32 tensor of any shape.

    Args:
        activation: a name or expression of :mod:`moecompile.activations`.
        name: what the function is called.

    Returns:
        Python text, one function, no imports; ``triton`` and ``tl`` must be in scope.

    Raises:
        PlanError: ``activation`` is not an expression in x.
        Unavailable: it is one, but uses something that has no Triton form.
    """
    tree = ast.parse(Activation(activation).expression, mode="eval").body
    printer = Printer()
    value = shaped(printer.visit(tree))
    return function_text(name, ast.unparse(tree), [*printer.lines, f"return {value}"])


def shaped(value: Value) -> str:
    """A value that has the shape of x; a constant has not yet."""
    return value if isinstance(value, str) else f"tl.zeros_like(x) + {literal(value)}"


def function_text(name: str, docstring: str, lines: list[str]) -> str:
    """A jitted function of x. The docstring is unparsed code: a caller's text may hold comments and line breaks."""
    return f"@triton.jit\ndef {name}(x):\n" + "".join(f"    {line}\n" for line in [f'"""{docstring}"""', *lines])


def literal(number: float) -> str:
    """A constant as Triton reads it in float32; beyond that range Triton would make it a float64 and slow everything."""
    if math.isnan(number):
        return 'float("nan")'
    if abs(number) > _FLOAT32_MAX:
        return f'float("{"-" if number < 0 else ""}inf")'
    return repr(0.0 if abs(number) < _FLOAT32_MIN else float(number))


class Printer:
    """Walks an expression and keeps a line for each value that it needs."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._names: dict[str, str] = {}

    def let(self, code: str) -> str:
        """The name under which the value of ``code`` is known."""
        if code not in self._names:
            self._names[code] = f"v{len(self._names)}"
            self.lines.append(f"{self._names[code]} = {code}")
        return self._names[code]

    def visit(self, node: ast.expr) -> Value:
        """The value of one node."""
        if isinstance(node, ast.Name):
            if node.id != "x":
                raise Unavailable(f"'{node.id}' is named but not called")
            return node.id
        if isinstance(node, ast.Constant):
            return float(node.value)  # type: ignore[arg-type]
        if isinstance(node, ast.UnaryOp):
            inner = self.visit(node.operand)
            return self.let(f"-{inner}") if isinstance(inner, str) else -inner
        assert isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        name = node.func.id
        if name == "where":
            return self.pick(node, *[self.visit(branch) for branch in node.args[1:]])
        operands = [self.visit(argument) for argument in node.args]
        try:
            if not any(isinstance(operand, str) for operand in operands):
                return float(PRIMITIVES[name](*[(operand, None) for operand in operands])[0])
            if name in ALGEBRA:
                return self.visit(expanded(node))
            if name not in RULES:
                raise Unavailable(f"the activation primitive '{name}' has no Triton form")
            return RULES[name](self, *operands)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise Unavailable(f"'{ast.unparse(node)}' has no Triton form: {error}") from error

    def pick(self, where: ast.Call, then: Value, otherwise: Value) -> Value:
        """One of two values, by the condition of a ``where``, whose left side is a tensor."""
        condition = where.args[0]
        assert isinstance(condition, ast.Compare)
        sign = _SIGNS[type(condition.ops[0])]
        left, right = self.visit(condition.left), self.visit(condition.comparators[0])
        return self.let(f"tl.where({left} {sign} {text_of(right)}, {text_of(then)}, {text_of(otherwise)})")


_SIGNS = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}


def text_of(value: Value) -> str:
    return value if isinstance(value, str) else literal(value)


def _infix(sign: str) -> Callable[[Printer, Value, Value], Value]:
    return lambda p, a, b: p.let(f"{text_of(a)} {sign} {text_of(b)}")


def _pick(sign: str) -> Callable[[Printer, Value, Value], Value]:
    def rule(p: Printer, a: Value, b: Value) -> Value:
        a, b = (a, b) if isinstance(a, str) else (b, a)  # a comparison must have its tensor on the left
        return p.let(f"tl.where(({a} {sign} {text_of(b)}) | ({a} != {a}), {a}, {text_of(b)})")  # NaN stays NaN

    return rule


def _form(code: str) -> Callable[[Printer, str], Value]:
    """A rule for one operand ``u`` that is a single line of code."""
    return lambda p, u: p.let(code.replace("{u}", u))


def _horner(p: Printer, variable: str, coefficients: list[float]) -> str:
    """c0 + s (c1 + s (c2 + ...)), a line for each coefficient."""
    value = literal(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = p.let(f"{literal(coefficient)} + {variable} * {value}")
    return value


def _tanh(p: Printer, u: str) -> str:
    # A series near 0, where (1 - e) / (1 + e) loses all relative accuracy; its first missing term is below 1e-8 at 0.25.
    square = p.let(f"{u} * {u}")
    near = p.let(f"{u} * {_horner(p, square, [1.0, -1 / 3, 2 / 15, -17 / 315, 62 / 2835])}")
    e = p.let(f"tl.exp(-2.0 * tl.abs({u}))")
    far = p.let(f"(1.0 - {e}) / (1.0 + {e})")
    return p.let(f"tl.where({square} < 0.0625, {near}, tl.where({u} < 0.0, -{far}, {far}))")


def _expm1(p: Printer, u: str) -> str:
    # As for tanh: the first missing term is below 1e-8 at 0.3.
    near = p.let(f"{u} * {_horner(p, u, [1 / math.factorial(order) for order in range(1, 8)])}")
    return p.let(f"tl.where(tl.abs({u}) < 0.3, {near}, tl.exp({u}) - 1.0)")


def _log1p(p: Printer, u: str) -> str:
    # 2 atanh(u / (2 + u)) near 0; the first missing term is below 1e-8 at -0.3.
    s = p.let(f"{u} / (2.0 + {u})")
    square = p.let(f"{s} * {s}")
    near = p.let(f"2.0 * {s} * {_horner(p, square, [1.0, 1 / 3, 1 / 5, 1 / 7, 1 / 9])}")
    return p.let(f"tl.where(tl.abs({u}) < 0.3, {near}, tl.log(1.0 + {u}))")


def _pow(p: Printer, u: str, exponent: float) -> str:
    if not isinstance(exponent, float) or not isinstance(u, str):
        raise TypeError("the exponent must be a number")
    if exponent == int(exponent):
        if abs(exponent) > 64:
            raise TypeError("an integer exponent above 64")
        power, factor, left = "", u, abs(int(exponent))
        while left:  # by squaring; the logarithm would lose the sign
            if left & 1:
                power = p.let(f"{power} * {factor}") if power else factor
            left >>= 1
            if left:
                factor = p.let(f"{factor} * {factor}")
        power = power or p.let(f"tl.zeros_like({u}) + 1.0")
        return p.let(f"1.0 / {power}") if exponent < 0 else power
    return p.let(f"tl.exp({literal(exponent)} * tl.log({u}))")  # NaN below 0, as it should be


# primitive of moecompile.activations -> rule on names of tensors and constants
RULES: dict[str, Callable[..., Value]] = {
    "add": _infix("+"),
    "sub": _infix("-"),
    "mul": _infix("*"),
    "div": _infix("/"),
    "minimum": _pick("<="),
    "maximum": _pick(">="),
    "neg": _form("-{u}"),
    "abs": _form("tl.abs({u})"),
    "pow": _pow,
    "sqrt": _form("tl.sqrt({u})"),
    "rsqrt": _form("tl.rsqrt({u})"),
    "exp": _form("tl.exp({u})"),
    "expm1": _expm1,
    "log": _form("tl.log({u})"),
    "log1p": _log1p,
    "sin": _form("tl.sin({u})"),
    "cos": _form("tl.cos({u})"),
    "tanh": _tanh,
    "sigmoid": _form("1.0 / (1.0 + tl.exp(-{u}))"),
    "erf": _form("tl.erf({u})"),
}
