"""Activation expressions as Triton code:  ``mul(x, sigmoid(mul(x, 1.702)))``  ->  a ``@triton.jit`` function, in float32.

Every intermediate value gets a name and equal ones share it, so the code can be read and nothing is computed twice. Only
``tl.exp``, ``log``, ``sqrt``, ``rsqrt``, ``sin``, ``cos`` and ``erf`` are called: they exist for CUDA, for HIP and in the
interpreter, which libdevice does not. To add a primitive, add one line to :data:`RULES`, and one to ``SLOPES`` of
:mod:`.triton_slopes` for its derivative.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable

from ..activations import PRIMITIVES, Activation


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
        name, operands = node.func.id, [self.visit(argument) for argument in node.args]
        try:
            if not any(isinstance(operand, str) for operand in operands):
                return float(PRIMITIVES[name](*[(operand, None) for operand in operands])[0])
            if name not in RULES:
                raise Unavailable(f"the activation primitive '{name}' has no Triton form")
            return RULES[name](self, *operands)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise Unavailable(f"'{ast.unparse(node)}' has no Triton form: {error}") from error


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


def _clamp(p: Printer, u: str, low: float = -1.0, high: float = 1.0) -> str:
    # By comparisons, not tl.minimum, which turns NaN into a number and so hides an overflow.
    below = p.let(f"tl.where({u} < {literal(low)}, {literal(low)}, {u})")
    return p.let(f"tl.where({below} > {literal(high)}, {literal(high)}, {below})")


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


def _softplus(p: Printer, u: str, beta: float = 1.0, threshold: float = 20.0) -> str:
    inner = p.let(f"{u} * {literal(beta)}")
    soft = _log1p(p, p.let(f"tl.exp({inner})"))
    return p.let(f"tl.where({inner} > {literal(threshold)}, {u}, {soft} / {literal(beta)})")


def _logsigmoid(p: Printer, u: str) -> str:
    tail = _log1p(p, p.let(f"tl.exp(-tl.abs({u}))"))
    return p.let(f"tl.where({u} > 0.0, -{tail}, {u} - {tail})")


def _gelu_tanh(p: Printer, u: str) -> str:
    # (1 + tanh z) / 2 = sigmoid(2 z): no cancellation.
    z = p.let(f"{u} * ({literal(2 * math.sqrt(2 / math.pi))} + {literal(0.044715 * 2 * math.sqrt(2 / math.pi))} * {u} * {u})")
    return p.let(f"{u} / (1.0 + tl.exp(-{z}))")


def _mish(p: Printer, u: str) -> str:
    # tanh(log(1 + e)) = n / (n + 2) with n = e (e + 2); above 20 it is 1 in float32, and e is kept from overflowing.
    e = p.let(f"tl.exp(tl.minimum({u}, 20.0))")
    n = p.let(f"{e} * ({e} + 2.0)")
    return p.let(f"{u} * ({n} / ({n} + 2.0))")


def _leaky_relu(p: Printer, u: str, slope: float = 0.01) -> str:
    return p.let(f"tl.where({u} < 0.0, {u} * {literal(slope)}, {u})")


def _elu(p: Printer, u: str, alpha: float = 1.0, scale: float = 1.0, inner: float = 1.0) -> str:
    low = _expm1(p, p.let(f"{u} * {literal(inner)}"))
    return p.let(f"tl.where({u} > 0.0, {u} * {literal(scale)}, {low} * {literal(alpha * scale)})")


def _hardsigmoid(p: Printer, u: str) -> str:
    return p.let(f"{_clamp(p, p.let(f'{u} + 3.0'), 0.0, 6.0)} * {literal(1 / 6)}")


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
    "square": _form("{u} * {u}"),
    "pow": _pow,
    "sqrt": _form("tl.sqrt({u})"),
    "rsqrt": _form("tl.rsqrt({u})"),
    "reciprocal": _form("1.0 / {u}"),
    "exp": _form("tl.exp({u})"),
    "expm1": _expm1,
    "log": _form("tl.log({u})"),
    "log1p": _log1p,
    "sin": _form("tl.sin({u})"),
    "cos": _form("tl.cos({u})"),
    "tanh": _tanh,
    "sigmoid": _form("1.0 / (1.0 + tl.exp(-{u}))"),
    "erf": _form("tl.erf({u})"),
    "relu": _form("tl.where({u} < 0.0, 0.0, {u})"),
    "relu6": lambda p, u: _clamp(p, u, 0.0, 6.0),
    "silu": _form("{u} / (1.0 + tl.exp(-{u}))"),
    "gelu": _form(f"0.5 * {{u}} * (1.0 + tl.erf({{u}} * {literal(math.sqrt(0.5))}))"),
    "gelu_tanh": _gelu_tanh,
    "mish": _mish,
    "softplus": _softplus,
    "softsign": _form("{u} / (1.0 + tl.abs({u}))"),
    "logsigmoid": _logsigmoid,
    "hardsigmoid": _hardsigmoid,
    "hardswish": lambda p, u: p.let(f"{u} * {_hardsigmoid(p, u)}"),
    "hardtanh": _clamp,
    "leaky_relu": _leaky_relu,
    "elu": _elu,
}
