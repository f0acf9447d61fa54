"""Pointwise activations as small expressions: one text form from which every backend works.

An activation is written as an expression in ``x``, for example ``silu(x)`` or ``mul(x, sigmoid(mul(x, 1.702)))``.
The matcher reads it off the captured graph, the plan stores it as text, the operators evaluate it together with its
derivative (forward-mode, so no autograd graph is needed inside a custom operator), and a code generator can print it.

To add a primitive, add one line to :data:`PRIMITIVES` (value and derivative) and, when an ATen operator computes it, one
line to :data:`ATEN`. To add a *name* for an expression, add it to :data:`NAMED`.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .errors import PlanError

aten = torch.ops.aten

# A dual number: value and derivative with respect to x. A derivative of None means a constant.
Dual = tuple["Tensor | float", "Tensor | float | None"]


def _chain(value: Callable[..., Tensor], slope: Callable[..., Tensor]) -> Callable[..., Dual]:
    """Lift f and f' of one tensor (and constant parameters) to dual numbers: (f(u), f'(u) u')."""

    def apply(u: Dual, *params: Dual) -> Dual:
        constants = [p[0] for p in params]
        point = u[0]
        if not isinstance(point, Tensor):  # a constant argument, such as sigmoid(0.5)
            return float(value(torch.tensor(point, dtype=torch.float64), *constants)), None
        return value(point, *constants), None if u[1] is None else slope(point, *constants) * u[1]

    apply.value = value  # type: ignore[attr-defined]
    return apply


def _plus(a: Tensor | float | None, b: Tensor | float | None) -> Tensor | float | None:
    return b if a is None else a if b is None else a + b


def _times(a: Tensor | float | None, b: Tensor | float) -> Tensor | float | None:
    return None if a is None else a * b


def _add(a: Dual, b: Dual) -> Dual:
    return a[0] + b[0], _plus(a[1], b[1])


def _sub(a: Dual, b: Dual) -> Dual:
    return a[0] - b[0], _plus(a[1], _times(b[1], -1.0))


def _mul(a: Dual, b: Dual) -> Dual:
    return a[0] * b[0], _plus(_times(a[1], b[0]), _times(b[1], a[0]))


def _div(a: Dual, b: Dual) -> Dual:
    quotient = a[0] / b[0]
    return quotient, _plus(_times(a[1], 1.0 / b[0]), _times(b[1], -quotient / b[0]))


def _pick(first: bool) -> Callable[[Dual, Dual], Dual]:
    """minimum (first=True) or maximum of two operands; ties split the derivative's choice to the first operand."""

    def apply(a: Dual, b: Dual) -> Dual:
        left, right = torch.as_tensor(a[0]), torch.as_tensor(b[0])
        take = left <= right if first else left >= right
        left = left.to(right.dtype) if not left.dim() else left
        value = (torch.minimum if first else torch.maximum)(left, right.to(left))  # NaN stays NaN, as everywhere
        if a[1] is None and b[1] is None:
            return value, None
        da = torch.zeros((), dtype=value.dtype) if a[1] is None else torch.as_tensor(a[1], dtype=value.dtype)
        db = torch.zeros((), dtype=value.dtype) if b[1] is None else torch.as_tensor(b[1], dtype=value.dtype)
        return value, torch.where(take, da.to(value.device), db.to(value.device))

    return apply


def _ones(u: Tensor) -> Tensor:
    return torch.ones_like(u)


# name -> rule on dual numbers. The derivative at a kink is the one that torch's own backward uses.
PRIMITIVES: dict[str, Callable[..., Dual]] = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "minimum": _pick(True),
    "maximum": _pick(False),
    "neg": _chain(lambda u: -u, lambda u: -_ones(u)),
    "abs": _chain(torch.abs, torch.sign),
    "square": _chain(torch.square, lambda u: 2 * u),
    "pow": _chain(lambda u, p: u**p, lambda u, p: torch.zeros_like(u) if p == 0 else p * u ** (p - 1)),
    "sqrt": _chain(torch.sqrt, lambda u: 0.5 * torch.rsqrt(u)),
    "rsqrt": _chain(torch.rsqrt, lambda u: -0.5 * torch.rsqrt(u) / u),
    "reciprocal": _chain(torch.reciprocal, lambda u: -(torch.reciprocal(u) ** 2)),
    "exp": _chain(torch.exp, torch.exp),
    "expm1": _chain(torch.expm1, torch.exp),
    "log": _chain(torch.log, torch.reciprocal),
    "log1p": _chain(torch.log1p, lambda u: torch.reciprocal(1 + u)),
    "sin": _chain(torch.sin, torch.cos),
    "cos": _chain(torch.cos, lambda u: -torch.sin(u)),
    "tanh": _chain(torch.tanh, lambda u: 1 - torch.tanh(u) ** 2),
    "sigmoid": _chain(torch.sigmoid, lambda u: torch.sigmoid(u) * torch.sigmoid(-u)),
    "erf": _chain(torch.erf, lambda u: (2 / math.sqrt(math.pi)) * torch.exp(-u * u)),
    "relu": _chain(torch.relu, lambda u: (u > 0).to(u.dtype)),
    "relu6": _chain(lambda u: u.clamp(0, 6), lambda u: ((u > 0) & (u < 6)).to(u.dtype)),
    "silu": _chain(torch.nn.functional.silu, lambda u: aten.silu_backward(_ones(u), u)),
    "gelu": _chain(torch.nn.functional.gelu, lambda u: aten.gelu_backward(_ones(u), u)),
    "gelu_tanh": _chain(
        lambda u: torch.nn.functional.gelu(u, approximate="tanh"),
        lambda u: aten.gelu_backward(_ones(u), u, approximate="tanh"),
    ),
    "mish": _chain(
        torch.nn.functional.mish,
        lambda u: (t := torch.tanh(torch.nn.functional.softplus(u))) + u * (1 - t * t) * torch.sigmoid(u),
    ),
    "softplus": _chain(
        lambda u, beta=1.0, threshold=20.0: torch.nn.functional.softplus(u, beta, threshold),
        lambda u, beta=1.0, threshold=20.0: torch.where(u * beta > threshold, _ones(u), torch.sigmoid(u * beta)),
    ),
    "softsign": _chain(lambda u: u / (1 + u.abs()), lambda u: (1 + u.abs()) ** -2),
    "logsigmoid": _chain(torch.nn.functional.logsigmoid, lambda u: torch.sigmoid(-u)),
    "hardsigmoid": _chain(torch.nn.functional.hardsigmoid, lambda u: ((u > -3) & (u < 3)).to(u.dtype) / 6),
    "hardswish": _chain(
        torch.nn.functional.hardswish,
        lambda u: torch.where(u <= -3, torch.zeros_like(u), torch.where(u >= 3, _ones(u), u / 3 + 0.5)),
    ),
    "hardtanh": _chain(
        lambda u, low=-1.0, high=1.0: u.clamp(low, high),
        lambda u, low=-1.0, high=1.0: ((u > low) & (u < high)).to(u.dtype),
    ),
    "leaky_relu": _chain(
        lambda u, slope=0.01: torch.nn.functional.leaky_relu(u, slope),
        lambda u, slope=0.01: torch.where(u > 0, _ones(u), torch.full_like(u, slope)),
    ),
    "elu": _chain(
        lambda u, alpha=1.0, scale=1.0, inner=1.0: aten.elu(u, alpha, scale, inner),
        lambda u, alpha=1.0, scale=1.0, inner=1.0: aten.elu_backward(_ones(u), alpha, scale, inner, False, u),
    ),
}

# Names under which an expression is stored when it is the same function (checked by numbers, see `canonical`).
NAMED: dict[str, str] = {
    "identity": "x",
    "relu": "relu(x)",
    "relu2": "square(relu(x))",
    "silu": "silu(x)",
    "gelu": "gelu(x)",
    "gelu_tanh": "gelu_tanh(x)",
    "quick_gelu": "mul(x, sigmoid(mul(x, 1.702)))",
    "sigmoid": "sigmoid(x)",
    "tanh": "tanh(x)",
    "mish": "mish(x)",
    "softplus": "softplus(x)",
    "elu": "elu(x)",
    "leaky_relu": "leaky_relu(x)",
    "hardswish": "hardswish(x)",
    "relu6": "relu6(x)",
}

# ATen operator -> (primitive, how many leading arguments are operands; the rest are constant parameters).
ATEN: dict[object, tuple[str, int]] = {
    aten.add.Tensor: ("add", 2),
    aten.add.Scalar: ("add", 2),
    aten.sub.Tensor: ("sub", 2),
    aten.sub.Scalar: ("sub", 2),
    aten.mul.Tensor: ("mul", 2),
    aten.mul.Scalar: ("mul", 2),
    aten.div.Tensor: ("div", 2),
    aten.div.Scalar: ("div", 2),
    aten.minimum.default: ("minimum", 2),
    aten.maximum.default: ("maximum", 2),
    aten.neg.default: ("neg", 1),
    aten.abs.default: ("abs", 1),
    aten.square.default: ("square", 1),
    aten.pow.Tensor_Scalar: ("pow", 1),
    aten.sqrt.default: ("sqrt", 1),
    aten.rsqrt.default: ("rsqrt", 1),
    aten.reciprocal.default: ("reciprocal", 1),
    aten.exp.default: ("exp", 1),
    aten.expm1.default: ("expm1", 1),
    aten.log.default: ("log", 1),
    aten.log1p.default: ("log1p", 1),
    aten.sin.default: ("sin", 1),
    aten.cos.default: ("cos", 1),
    aten.tanh.default: ("tanh", 1),
    aten.tanh_.default: ("tanh", 1),
    aten.sigmoid.default: ("sigmoid", 1),
    aten.sigmoid_.default: ("sigmoid", 1),
    aten.erf.default: ("erf", 1),
    aten.special_erf.default: ("erf", 1),
    aten.relu.default: ("relu", 1),
    aten.relu_.default: ("relu", 1),
    aten.relu6.default: ("relu6", 1),
    aten.silu.default: ("silu", 1),
    aten.silu_.default: ("silu", 1),
    aten.mish.default: ("mish", 1),
    aten.softplus.default: ("softplus", 1),
    aten.log_sigmoid.default: ("logsigmoid", 1),
    aten.hardsigmoid.default: ("hardsigmoid", 1),
    aten.hardswish.default: ("hardswish", 1),
    aten.hardswish_.default: ("hardswish", 1),
    aten.hardtanh.default: ("hardtanh", 1),
    aten.hardtanh_.default: ("hardtanh", 1),
    aten.leaky_relu.default: ("leaky_relu", 1),
    aten.leaky_relu_.default: ("leaky_relu", 1),
    aten.elu.default: ("elu", 1),
    aten.elu_.default: ("elu", 1),
}


@dataclass(frozen=True)
class Activation:
    """A pointwise function of one variable, as text; equal texts are equal activations.

    Attributes:
        name: a name of :data:`NAMED`, or the expression itself when it has none.

    Raises:
        PlanError: the text is not an expression in x.
    """

    name: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "_rule", _compile(self.expression))
        object.__setattr__(self, "_function", _single(self.expression))

    def __reduce__(self) -> tuple[type[Activation], tuple[str]]:
        return Activation, (self.name,)

    @property
    def expression(self) -> str:
        """The expression in ``x``."""
        return NAMED.get(self.name, self.name)

    def __call__(self, x: Tensor) -> Tensor:
        """f(x), same shape and dtype as x."""
        if self._function is not None:  # type: ignore[attr-defined]
            return self._function(x)  # type: ignore[attr-defined]
        value, _ = self._rule((x, None))  # type: ignore[attr-defined]
        return value if isinstance(value, Tensor) else torch.full_like(x, value)

    def with_derivative(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(f(x), f'(x)), each of the shape and dtype of x."""
        value, slope = self._rule((x, torch.ones_like(x)))  # type: ignore[attr-defined]
        value = value if isinstance(value, Tensor) else torch.full_like(x, value)
        if slope is None:
            return value, torch.zeros_like(x)
        return value, slope if isinstance(slope, Tensor) else torch.full_like(x, slope)


@lru_cache(maxsize=256)
def _parse(expression: str) -> ast.expr:
    try:
        tree = ast.parse(expression, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise PlanError(f"'{expression[:80]}' is not an activation expression") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if not isinstance(node.func, ast.Name) or node.func.id not in PRIMITIVES or node.keywords:
                raise PlanError(f"the activation '{expression[:80]}' calls something that is not a known primitive")
        elif isinstance(node, ast.Name):
            if node.id != "x" and node.id not in PRIMITIVES:
                raise PlanError(f"the activation '{expression[:80]}' names '{node.id}'; only x and primitives are known")
        elif isinstance(node, ast.Constant):
            if not isinstance(node.value, (int, float)) or isinstance(node.value, bool):
                raise PlanError(f"the activation '{expression[:80]}' holds a constant that is not a number")
        elif not isinstance(node, (ast.UnaryOp, ast.USub, ast.Load)):
            raise PlanError(f"the activation '{expression[:80]}' holds more than calls, x and numbers")
    return tree


Rule = Callable[[Dual], Dual]


@lru_cache(maxsize=256)
def _compile(expression: str) -> Rule:
    """The expression as nested functions on dual numbers. The text is parsed, never executed: only x, numbers and
    :data:`PRIMITIVES` are accepted.

    Raises:
        PlanError: the text is not such an expression.
    """

    def build(node: ast.expr) -> Rule:
        if isinstance(node, ast.Name):
            return lambda x: x
        if isinstance(node, ast.Constant):
            number = (float(node.value), None)  # type: ignore[arg-type]
            return lambda x: number
        if isinstance(node, ast.UnaryOp):
            inner = build(node.operand)
            return lambda x: _mul(inner(x), (-1.0, None))
        assert isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        rule, operands = PRIMITIVES[node.func.id], [build(argument) for argument in node.args]
        return lambda x: rule(*[operand(x) for operand in operands])

    return build(_parse(expression))


def _single(expression: str) -> Callable[[Tensor], Tensor] | None:
    """The torch function of an expression that is one call on x alone: TorchDynamo follows it in a tenth of the time."""
    node = _parse(expression)
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and len(node.args) == 1
        and isinstance(node.args[0], ast.Name)
    ):
        return getattr(PRIMITIVES[node.func.id], "value", None)
    return None


NEAR = 4001  # points of the probe in [-12, 12]


def probe() -> Tensor:
    """The float64 points on which functions are compared: many in [-12, 12] first, then some out to 10^4 on either side, which
    tell a function from its clamped variants."""
    far = torch.logspace(1.0, 4.0, 61, dtype=torch.float64)
    return torch.cat([torch.linspace(-12.0, 12.0, NEAR, dtype=torch.float64), far, -far])


@lru_cache(maxsize=256)
def canonical(expression: str) -> Activation:
    """The activation that computes ``expression``, under its name where one of :data:`NAMED` is the same function.

    Sameness is checked by numbers, on :func:`probe`: relative difference at most 1e-9, where both are numbers.
    """
    grid = probe()
    activation = Activation(expression)
    value = activation(grid)
    for name in NAMED:
        named = Activation(name)(grid)
        both = ~(value.isnan() | named.isnan())
        if bool(both[:NEAR].all()) and torch.allclose(value[both], named[both], rtol=1e-9, atol=1e-12):
            return Activation(name)
    return activation


def is_linear(activation: Activation) -> bool:
    """Whether the function is affine: then the two projections around it are one matrix, not an FFN."""
    for reach in (8.0, 1e4):  # the wide one for clamps
        value = activation(torch.linspace(-reach, reach, 101, dtype=torch.float64))
        if not torch.allclose(value[2:] - value[1:-1], value[1:-1] - value[:-2], rtol=1e-9, atol=1e-12):
            return False
    return True
