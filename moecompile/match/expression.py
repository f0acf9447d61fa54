"""From graph nodes to an activation expression: walk back from the down projection's input to the projections."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..activations import ATEN, Activation
from . import nodes as N

aten = torch.ops.aten


class Blocked(Exception):
    """The walk met a node that cannot be part of an FFN that is split."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason


@dataclass(frozen=True)
class Leaf:
    """Where the walk ends: a projection's output, or a slice of one."""

    linear: N.LinearNode
    rows: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Call:
    """A primitive applied to sub-expressions and numbers."""

    primitive: str
    operands: tuple[Expression, ...]


Expression = Leaf | Call | float


def leaves_of(expression: Expression) -> list[Leaf]:
    """The different leaves, in order of appearance."""
    if isinstance(expression, Leaf):
        return [expression]
    found: list[Leaf] = []
    for operand in expression.operands if isinstance(expression, Call) else ():
        found += [leaf for leaf in leaves_of(operand) if leaf not in found]
    return found


def text_of(expression: Expression) -> str:
    """The expression in x, whatever its (one) leaf is."""
    if isinstance(expression, Leaf):
        return "x"
    if isinstance(expression, Call):
        return f"{expression.primitive}({', '.join(text_of(operand) for operand in expression.operands)})"
    return repr(float(expression))


def factors_of(expression: Expression) -> list[Expression]:
    """The expression as a product: a * b / c -> [a, b, 1/c], however the products are nested."""
    if isinstance(expression, Call):
        if expression.primitive == "mul":
            return [factor for operand in expression.operands for factor in factors_of(operand)]
        if expression.primitive == "div":
            numerator, denominator = expression.operands
            inverse = 1.0 / denominator if isinstance(denominator, float) else Call("reciprocal", (denominator,))
            return [*factors_of(numerator), inverse]
        if expression.primitive == "neg":
            return [-1.0, *factors_of(expression.operands[0])]
    return [expression]


def product_of(factors: list[Expression]) -> Expression:
    """The product of factors, as nested calls."""
    product = factors[0]
    for factor in factors[1:]:
        product = Call("mul", (product, factor))
    return product


class Walk:
    """One walk back from a down projection's input; ``region`` collects every node that belongs to the FFN."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.region: set[fx.Node] = set()
        self._seen: dict[fx.Node, Expression] = {}

    def read(self, node: Any) -> Expression:
        """The expression that a node computes.

        Raises:
            Blocked: with the node that stands in the way.
        """
        if isinstance(node, (int, float)) and not isinstance(node, bool):
            return float(node)
        assert isinstance(node, fx.Node)
        if node not in self._seen:
            self._seen[node] = self._read(node)
            if node.op == "call_function":
                self.region.add(node)
        return self._seen[node]

    def _leaf(self, linear: N.LinearNode, rows: tuple[int, int, int] | None = None) -> Leaf:
        self.region.update((linear.node, *linear.inner))
        return Leaf(linear, rows)

    def _read(self, node: fx.Node) -> Expression:
        linear = N.as_linear(node)
        if linear is not None:
            return self._leaf(linear)
        rows = N.as_rows(node)
        if rows is not None:
            source, window, between = rows
            source = N.strip(source, self.region)
            linear = N.as_linear(source)
            if linear is None:
                raise Blocked(node, f"the features of {source.name} are split apart between the projections")
            self.region.update(between)
            return self._leaf(linear, window)
        if N.passes_on(node):
            return self.read(node.args[0])
        if node.op == "get_attr":
            return self._constant(node)
        if node.op != "call_function":
            raise Blocked(node, f"{node.name} is an input of the model, not a projection")
        return self._operator(node)

    def _constant(self, node: fx.Node) -> float:
        try:
            tensor = N.attribute(self.graph_module, node.target)
        except AttributeError:
            tensor = None
        if isinstance(tensor, Tensor) and tensor.numel() == 1 and not isinstance(tensor, torch.nn.Parameter):
            return float(tensor)
        raise Blocked(node, f"the activation reads the tensor '{node.target}', so it is not a function of one number")

    def _operator(self, node: fx.Node) -> Expression:
        target = node.target
        if target in N.DROPOUTS:
            probability, _ = N.dropout_probability(node)
            raise Blocked(node, f"a dropout of p={probability:g} is active (training mode): call model.eval() first")
        if target in N.RESHAPES or target in N.SQUEEZES or target in (aten.transpose.int, aten.permute.default):
            raise Blocked(node, f"{node.name} reshapes the intermediate across features")
        if target in N.NORMS:
            raise Blocked(node, f"{N.NORMS[target]} stands between the projections")
        if target in N.CASTS:
            raise Blocked(node, f"{node.name} casts the intermediate to a type that is not floating-point")
        special = self._special(node)
        if special is not None:
            return special
        if target not in ATEN:
            raise Blocked(node, f"{target} is not a pointwise function of one number that moecompile knows")
        primitive, operands = ATEN[target]
        if set(node.kwargs) - {"alpha"} or (target is aten.div.Tensor and len(node.args) > 2):
            raise Blocked(node, f"{target} is called with options that moecompile does not know: {dict(node.kwargs)}")
        values = [self.read(argument) for argument in node.args[:operands]]
        for parameter in node.args[operands:]:
            if not isinstance(parameter, (int, float)) or not math.isfinite(parameter):
                raise Blocked(node, f"{target} has an argument that is not a number")
            values.append(float(parameter))
        alpha = node.kwargs.get("alpha", 1)
        if alpha != 1:
            values[1] = Call("mul", (values[1], float(alpha)))  # type: ignore[arg-type]
        return self._fold(Call(primitive, tuple(values)))

    def _special(self, node: fx.Node) -> Expression | None:
        """Operators whose arguments do not map one to one onto a primitive."""
        target = node.target
        if target in (aten.gelu.default, aten.gelu_.default):
            form = N.argument(node, 1, "approximate", node.kwargs.get("approximate", "none"))
            return Call("gelu_tanh" if form == "tanh" else "gelu", (self.read(node.args[0]),))
        if target in (aten.clamp.default, aten.clip.default, aten.clamp_.default):
            value = self.read(node.args[0])
            low, high = N.argument(node, 1, "min"), N.argument(node, 2, "max")
            low, high = None if low == -math.inf else low, None if high == math.inf else high
            value = value if low is None else Call("maximum", (value, self.read(low)))
            return value if high is None else Call("minimum", (value, self.read(high)))
        if target is aten.clamp_min.default:
            return Call("maximum", (self.read(node.args[0]), self.read(node.args[1])))
        if target is aten.clamp_max.default:
            return Call("minimum", (self.read(node.args[0]), self.read(node.args[1])))
        if target in (aten.rsub.Scalar, aten.rsub.Tensor) and not node.kwargs and len(node.args) == 2:
            return Call("sub", (self.read(node.args[1]), self.read(node.args[0])))
        if target is aten.selu.default:
            return Call("elu", (self.read(node.args[0]), 1.6732632423543772, 1.0507009873554805, 1.0))
        if target is aten.celu.default:
            alpha = float(N.argument(node, 1, "alpha", 1.0))
            return Call("elu", (self.read(node.args[0]), alpha, 1.0, 1.0 / alpha))
        if target is aten.glu.default:
            source = N.strip(node.args[0], self.region)  # type: ignore[arg-type]
            linear, output, width = N.as_linear(source), N.value_of(source), N.last_size(source)
            if linear is None or output is None or width is None or width % 2:
                raise Blocked(node, "the input of the GLU is not a projection of even width")
            if N.argument(node, 1, "dim", -1) not in (-1, output.dim() - 1):
                raise Blocked(node, "the GLU does not split features")
            half = width // 2
            first, second = self._leaf(linear, (0, half, 1)), self._leaf(linear, (half, width, 1))
            return Call("mul", (first, Call("sigmoid", (second,))))
        return None

    @staticmethod
    def _fold(call: Call) -> Expression:
        """Arithmetic on numbers alone is done here, so that it never blocks a match."""
        if all(isinstance(operand, float) for operand in call.operands):
            return float(Activation(text_of(call))(torch.zeros((), dtype=torch.float64)))
        return call
