"""Generated Triton kernels: interpreted against float64, standing alone, refused with a reason; on a device, if there is one.

What the compiler makes of them is in ``test_triton_compile.py``.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from moecompile.codegen.triton_algebra import ALGEBRA
from moecompile.codegen.triton_backend import Unavailable, build, emit, expert_ffn, unsupported
from moecompile.codegen.triton_compile import compile_for
from moecompile.codegen.triton_expressions import RULES, activation_function, literal
from moecompile.codegen.triton_slopes import BINARY, SLOPES, derivative_function
from moecompile.codegen.triton_spec import TritonSpec
from triton_cases import CASES, MORE, Case, error_of, kernel_of, operands, run
from triton_interpreted import BACKWARD, MORE_BACKWARD, check_backward, check_operator

from moecompile.activations import PRIMITIVES
from moecompile.errors import PlanError

SPEC = TritonSpec(2048, 1024, 64, 8, True, "silu")
SMALL = TritonSpec(16, 16, 2, 1, False, "relu", "float32")
EXPERT_OPERANDS = ("x", "ids", "weights", "up", "down", "up_bias", "down_bias")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fresh folders for generated files and compiled kernels; skips where there is no Triton."""
    pytest.importorskip("triton", minversion="3.6", reason="triton is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    return tmp_path


def interpret(*arguments: str) -> None:
    """Run the interpreter's script; every error must be small."""
    import numpy
    import triton

    if triton.__version__.startswith("3.6.") and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        pytest.skip("the interpreter of Triton 3.6 does not work with numpy 2.4")
    script = Path(__file__).with_name("triton_interpreted.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script, *arguments], env=environment, capture_output=True, text=True)
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and len(results) > len(CASES), done.stdout + done.stderr
    names = [result["case"] for result in results]
    tolerances = [4e-3 if name == "any float16" else 1.5e-3 if "float16" in name else 3e-6 for name in names]
    bad = [result for result, most in zip(results, tolerances, strict=True) if not result.get("error", 1.0) <= most]
    assert not bad, f"{bad}\n{done.stderr[-2000:]}"


def test_interpreted(cache: Path) -> None:
    interpret()


@pytest.mark.slow
def test_everything_interpreted(cache: Path) -> None:
    interpret("all")


def test_the_benchmark_runs_dry(cache: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "kernels.py"
    command = [sys.executable, script, "--dry", "--output", cache / "out"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((cache / "out" / "kernels-dry.json").read_text())
    assert all(
        row["error"] < 1e-5 and row["gradient_error"] < 1e-5 and row["same_bits"] for row in record["correctness"]["value"]
    )
    assert all(error < 1e-5 for row in record["correctness"]["value"] for error in row["peers"].values())
    for stage in ("forward", "backward"):
        rows = record[stage]["value"]
        assert {row["system"] for row in rows} >= {
            "ours",
            "grouped_mm",
            "batched_mm",
            "hf_grouped_mm",
            "hf_batched_mm",
        } and not any("failed" in row for row in rows)
    assert (
        "times mean nothing" in record["device"] and "| tiny | skewed | 6 |" in (cache / "out" / "kernels-dry.md").read_text()
    )


def test_source_stands_alone() -> None:
    source = emit(replace(SPEC, direction="backward"))
    imported: set[str | None] = set()
    for node in ast.walk(ast.parse(source)):
        imported |= {name.name for name in node.names} if isinstance(node, ast.Import) else set()
        imported |= {node.module} if isinstance(node, ast.ImportFrom) else set()
    known = {"__future__", "collections.abc", "functools", "typing", "torch", "triton", "triton.language"}
    assert imported == known | {"triton.tools.tensor_descriptor"}
    assert source == emit(replace(SPEC, direction="backward")) and "act(x) = silu(x)" in source and "hidden_size=2048" in source
    assert not [word for word in (".item(", ".tolist(", "bincount(", "nonzero(", "atomic") if word in source]


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        replace(SPEC, gated=False, activation="mish", dtype="float32", shared_width=96),
        replace(SPEC, weight_format="int4", group_size=64, shared_width=64, output_bias=True),
        replace(SPEC, activation="gelu_tanh", weight_format="fp8"),
        replace(SPEC, gated=False, activation="softplus", direction="backward"),
        replace(SPEC, activation="gelu", direction="backward", up_bias=True),
    ],
    ids=lambda spec: spec.name,
)
def test_source_is_tidy(spec: TritonSpec) -> None:
    pytest.importorskip("ruff")
    # Lines are as long as their spec makes them; layout is the templates', which no formatter has to like.
    arguments = [sys.executable, "-m", "ruff", "check", "--ignore", "E501", "--stdin-filename", "kernel.py", "-"]
    done = subprocess.run(arguments, input=emit(spec), cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_primitive_has_a_form_and_a_derivative() -> None:
    assert set(RULES) | set(ALGEBRA) == set(PRIMITIVES) and set(RULES) == set(SLOPES) | set(BINARY)
    assert not set(RULES) & set(ALGEBRA)


def test_an_activation_is_one_line_of_algebra(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new line serves values and derivatives, alone and within other expressions; torch's autograd agrees with both."""

    def reference(x: torch.Tensor, a: float = 4.0) -> torch.Tensor:
        return 0.5 * (x + (x * x + a).sqrt())

    def rule(u: tuple[torch.Tensor, torch.Tensor | None], a: tuple[float, None] = (4.0, None)) -> tuple[torch.Tensor, None]:
        return reference(u[0], a[0]), None

    monkeypatch.setitem(ALGEBRA, "squareplus", "x, a=4: 0.5 * (x + sqrt(x * x + a))")
    monkeypatch.setitem(PRIMITIVES, "squareplus", rule)
    x = torch.linspace(-5, 5, 101, dtype=torch.float64, requires_grad=True)
    for text, wanted in (("squareplus(x)", reference(x)), ("mul(x, squareplus(neg(x), 2))", x * reference(-x, 2.0))):
        assert f'"""{text}"""' in activation_function(text)
        names: dict[str, object] = {"tl": SimpleNamespace(sqrt=torch.sqrt, zeros_like=torch.zeros_like)}
        exec(derivative_function(text, "slope").replace("@triton.jit", ""), names)
        value, slope = names["slope"](x.detach())  # type: ignore[operator]
        torch.testing.assert_close(value, wanted.detach())
        torch.testing.assert_close(slope, torch.autograd.grad(wanted.sum(), x)[0])


@pytest.mark.parametrize(("number", "text"), [(1e39, 'float("inf")'), (-1e39, 'float("-inf")'), (1e-39, "0.0"), (0.1, "0.1")])
def test_constants_stay_in_float32(number: float, text: str) -> None:
    assert literal(number) == text


def test_equal_values_are_computed_once() -> None:
    assert activation_function("mul(exp(x), add(exp(x), 1))").count("tl.exp") == 1


def test_text_of_an_activation_cannot_become_code() -> None:
    source = emit(replace(SMALL, activation="add(\nexp(x),\nneg(x)\n)  # remark"))
    assert "remark" not in source and source.count("add(exp(x), neg(x))") == 3


@pytest.mark.parametrize(
    ("activation", "reason"),
    [
        ("pow(x, x)", "exponent"),
        ("elu(x, x)", "elu"),
        ("silu(x, 2)", "silu"),
        ("div(1, 0)", "division by zero"),
        ("pow(x, 1000)", "exponent"),
    ],
)
def test_refusals_of_emit(activation: str, reason: str) -> None:
    with pytest.raises(Unavailable, match=reason) as caught:
        emit(replace(SMALL, activation=activation))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"dtype": "float64"}, "there are: float32"),
        ({"expert_width": 0}, "without neurons"),
        ({"precision": "tf32", "dtype": "bfloat16"}, "float32 products"),
        ({"weight_format": "fp8", "group_size": 32}, "no groups"),
        ({"weight_format": "int8", "group_size": 48}, "power of two"),
        ({"weight_format": "int4", "expert_width": 17}, "do not divide"),
        ({"weight_format": "int8", "direction": "backward"}, "no backward"),
        ({"shared_bias": True}, "without shared"),
    ],
)
def test_refusals_of_a_spec(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        replace(SMALL, **fields)


def test_malformed_activation() -> None:
    with pytest.raises(PlanError):
        emit(replace(SMALL, activation="import os"))


def test_what_is_unsupported(cache: Path) -> None:
    assert unsupported(torch.bfloat16, "silu") is None
    assert "float64" in str(unsupported(torch.float64, "silu")) and "exponent" in str(unsupported(torch.float32, "pow(x, x)"))


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "triton is not installed" in str(unsupported(torch.float32, "silu"))
    for call in (lambda: build(SPEC), lambda: compile_for(SPEC)):
        with pytest.raises(Unavailable, match="triton is not installed"):
            call()
    with pytest.raises(Unavailable, match="triton is not installed"):
        run(CASES[2], operands(CASES[2], torch.float32))


def test_refusals_of_tensors(cache: Path) -> None:
    case = CASES[2]
    tensors = operands(case, torch.float32)
    x, ids, weights, up, down, *biases = (tensors[name] for name in EXPERT_OPERANDS)
    assert x is not None and up is not None and down is not None and ids is not None
    half, wide = up.half(), [x.double(), ids, weights, up.double(), down.double()]
    spread = up.transpose(1, 2).contiguous().transpose(1, 2)
    for given, reason in (
        ([x, ids, weights, up, down], "device"),
        (wide, "float64"),
        ([x, ids, weights, half, down], "equal types"),
        ([x, ids, weights, spread, down], "contiguous"),
    ):
        with pytest.raises(Unavailable, match=reason):
            expert_ffn(*given, *biases, case.activation, case.gated)
    with pytest.raises(ValueError, match="down is"):
        kernel_of(case, torch.float32).module.expert_ffn(x, ids, weights, up, down[:, :, 1:])


def test_unwritable_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "file"))
    with pytest.raises(Unavailable, match="cannot be kept"):
        build(replace(SMALL, activation="relu6"))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES + MORE, ids=lambda case: case.name)
def test_on_a_device(case: Case, cache: Path) -> None:
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float16, 1.5e-3), (torch.bfloat16, 1.2e-2)):
        assert error_of(case, dtype, "cuda") <= tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("case", BACKWARD + MORE_BACKWARD, ids=lambda case: case.name)
def test_gradients_on_a_device(case: Case, cache: Path) -> None:
    for dtype, tolerance in ((torch.float32, 5e-6), (torch.float16, 3e-3), (torch.bfloat16, 2.5e-2)):
        assert check_backward(case, dtype, "cuda", times=20) <= tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["int8/128", "int4/64", "fp8/0"])
def test_stored_weights_on_a_device(form: str, cache: Path) -> None:
    assert max(check_operator(form, tokens, (128, 96), "cuda") for tokens in (1, 9, 200)) <= 3e-6


@pytest.mark.gpu
def test_the_operator_on_a_device(cache: Path) -> None:
    """Forward and gradients of the operator are the generated kernels', without a warning."""
    case = Case("", (50, 8, 2, 64, 48), bias=True)
    tensors = operands(case, torch.float32, "cuda")
    given = [
        None if v is None else v.requires_grad_(v.is_floating_point()) for v in (tensors[name] for name in EXPERT_OPERANDS)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = torch.ops.moecompile.expert_ffn(*given, "silu", True)
        y.sum().backward()
    assert torch.equal(y, expert_ffn(*given, "silu", True)) and all(v.grad is not None for v in given if v.is_floating_point())


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_captured_in_a_graph(tokens: int, cache: Path) -> None:
    case = Case("", (tokens, 16, 2, 512, 384), bias=True, shared=128)
    tensors = operands(case, torch.bfloat16, "cuda")
    eager = run(case, tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(case, tensors)
    for _ in range(3):
        graph.replay()
        assert torch.equal(y, eager)
