"""Activation expressions: values against torch, derivatives against autograd, names by sameness, refusal of anything else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moecompile.activations import ATEN, NAMED, PRIMITIVES, Activation, canonical, is_linear
from moecompile.errors import PlanError

F = torch.nn.functional
TORCH = {
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "mish": F.mish,
    "softplus": F.softplus,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
    "hardswish": F.hardswish,
    "relu6": F.relu6,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
}


@pytest.mark.parametrize("name", sorted(NAMED))
def test_named_value_and_derivative(name: str) -> None:
    x = torch.linspace(-7.03, 7.01, 301, dtype=torch.float64, requires_grad=True)
    expected = TORCH[name](x)
    (slope,) = torch.autograd.grad(expected.sum(), x)
    value, derivative = Activation(name).with_derivative(x.detach())
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(derivative, slope)


def test_every_name_is_tested() -> None:
    assert set(TORCH) == set(NAMED)


UNARY = sorted(set(PRIMITIVES) - {"add", "sub", "mul", "div", "minimum", "maximum", "pow", "log", "sqrt", "rsqrt"})


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(UNARY), st.sampled_from(UNARY), st.floats(-2, 2), st.sampled_from(["add", "sub", "mul"]))
def test_composed_derivative_is_autograds(outer: str, inner: str, number: float, join: str) -> None:
    """Chain, product and sum rules on random compositions, away from kinks and poles."""
    expression = f"{join}({outer}(mul(0.3, {inner}(x))), mul({number!r}, x))"
    x = torch.tensor([-1.37, -0.41, 0.53, 1.29], dtype=torch.float64, requires_grad=True)
    value = Activation(expression)(x)
    if not torch.isfinite(value).all() or (value.requires_grad and value.abs().max() > 1e6):
        return
    (slope,) = torch.autograd.grad(value.sum(), x)
    _, derivative = Activation(expression).with_derivative(x.detach())
    torch.testing.assert_close(derivative, slope, rtol=1e-6, atol=1e-7)  # torch's hardsigmoid has a float32 slope


@pytest.mark.parametrize("expression", ["pow(x, 3.0)", "sqrt(square(x))", "log(exp(x))", "div(1.0, add(1.0, exp(neg(x))))"])
def test_other_derivatives(expression: str) -> None:
    x = torch.tensor([0.3, 0.9, 2.2], dtype=torch.float64, requires_grad=True)
    value = Activation(expression)(x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(Activation(expression).with_derivative(x.detach())[1], slope)


@pytest.mark.parametrize(
    ("expression", "name"),
    [
        ("mul(x, sigmoid(x))", "silu"),
        ("div(x, add(1.0, exp(neg(x))))", "silu"),
        ("mul(mul(0.5, x), add(1.0, erf(div(x, 1.4142135623730951))))", "gelu"),
        ("mul(mul(x, 0.5), add(tanh(mul(0.7978845608028654, add(x, mul(0.044715, pow(x, 3.0))))), 1.0))", "gelu_tanh"),
        ("pow(relu(x), 2.0)", "relu2"),
        ("maximum(x, 0.0)", "relu"),
        ("mul(x, tanh(softplus(x)))", "mish"),
        ("mul(1.0, x)", "identity"),
        ("mul(2.0, silu(x))", "mul(2.0, silu(x))"),
    ],
)
def test_canonical_name(expression: str, name: str) -> None:
    assert canonical(expression).name == name


def test_a_bound_does_not_hide_nan() -> None:
    x = torch.tensor([float("nan"), 1.0, 9.0, -9.0])
    for expression in ("minimum(x, 7.0)", "maximum(x, -7.0)", "minimum(7.0, x)"):
        found = Activation(expression)(x)
        limit = float(expression.split("(")[1].rstrip(")").replace("x", "").strip(", "))
        torch.testing.assert_close(found, (x.clamp(max=limit) if limit > 0 else x.clamp(min=limit)), equal_nan=True)
        assert found[0].isnan()


def test_is_linear() -> None:
    assert is_linear(Activation("mul(3.0, add(x, 1.0))"))
    assert not is_linear(Activation("relu"))


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os')",
        "x.real",
        "open(x)",
        "lambda: 1",
        "x if x else x",
        "relu(y)",
        "'x'",
        "relu(x",
        "relu(x=x)",
        "[x]",
        "True",
    ],
)
def test_nothing_but_arithmetic_is_evaluated(expression: str) -> None:
    with pytest.raises(PlanError):
        Activation(expression)


def test_aten_table_names_primitives() -> None:
    assert {name for name, _ in ATEN.values()} <= set(PRIMITIVES)


def test_survives_pickling() -> None:
    import pickle

    again = pickle.loads(pickle.dumps(Activation("mul(2.0, silu(x))")))
    assert again == Activation("mul(2.0, silu(x))") and float(again(torch.ones(()))) == pytest.approx(2 * 0.731058, rel=1e-5)


def test_a_clamp_far_out_is_not_forgotten() -> None:
    for expression in ("minimum(relu(x), 20.0)", "maximum(mul(x, sigmoid(x)), -0.1)", "minimum(gelu(x), 1000.0)"):
        assert canonical(expression).name not in NAMED
    assert not is_linear(Activation("maximum(minimum(x, 10.0), -10.0)"))
