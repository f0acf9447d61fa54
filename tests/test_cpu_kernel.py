"""The generated CPU kernel against plain torch operators in float64."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from moecompile.codegen import cpu, packing
from torch import Tensor

from moecompile import lowered
from moecompile.activations import NAMED, Activation

pytestmark = pytest.mark.skipif(cpu.available() is not None, reason=str(cpu.available()))

D, WIDTH, N, S = 37, 5, 7, 11  # no multiples of a vector


def operands(gated: bool = True, biases: bool = False, shared: bool = True, routing: str = "linear") -> dict[str, Any]:
    """Random operands of ``moe_ffn`` without the tokens."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    halves = 2 if gated else 1
    found: dict[str, Any] = dict.fromkeys(lowered.OPERANDS)
    found.update(up=random(N, halves * WIDTH, D), down=random(N, D, WIDTH), score="none", normalise=False)
    if routing == "linear":
        found.update(router_weight=random(N, D), router_bias=random(N) if biases else None)
    if biases:
        found.update(up_bias=random(N, halves * WIDTH), down_bias=random(N, D), bias=random(D))
    if shared:
        found.update(shared_up=random(S, D), shared_down=random(D, S), shared_gate=random(S, D) if gated else None)
        if biases:
            found.update(shared_up_bias=random(S), shared_gate_bias=random(S) if gated else None)
    found.update(activation="silu" if gated else "relu", gated=gated, weight_format="same", backend="cpu")
    return found


def tokens(count: int) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(count + 1))


def cast(found: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in found.items()
    }


def reference(found: dict[str, Any]) -> Tensor:
    """The same operands in float64, in torch operators."""
    return lowered.moe_ffn(**(cast(found, torch.float64) | {"backend": "torch"}))


def kernel(found: dict[str, Any]) -> Tensor:
    """The kernel itself: nothing may fall back."""
    given = {key: value for key, value in found.items() if key not in ("order", "offsets", "backend")}
    return cpu.moe_ffn(**given)


@pytest.mark.parametrize(("gated", "biases", "shared"), [(True, True, True), (True, False, False), (False, True, True)])
def test_numbers(gated: bool, biases: bool, shared: bool) -> None:
    found = operands(gated, biases, shared)
    for count, k in itertools.product((0, 1, 5, 40, 150), (0, 1, 3, N)):
        case = found | {"x": tokens(count), "top_k": k}
        torch.testing.assert_close(kernel(case).double(), reference(case), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("score", "normalise"), [("softmax", False), ("softmax", True), ("sigmoid", True)])
def test_routers(score: str, normalise: bool) -> None:
    found = operands(shared=False) | {"score": score, "normalise": normalise, "top_k": 3}
    for count in (1, 33):
        case = found | {"x": tokens(count)}
        torch.testing.assert_close(kernel(case).double(), reference(case), rtol=2e-5, atol=2e-5)


def test_a_given_choice() -> None:
    found = operands(routing="given")
    for count in (1, 40):
        x, generator = tokens(count), torch.Generator().manual_seed(9)
        spread = torch.stack([torch.randperm(N, generator=generator)[:2] for _ in range(count)])
        for ids in (spread, torch.tensor([[3, 0]]).expand(count, 2)):  # some experts empty; all tokens to two experts
            for weights in (None, torch.rand(count, 2, generator=generator)):
                case = found | {"x": x, "ids": ids, "weights": weights, "top_k": 2}
                torch.testing.assert_close(kernel(case).double(), reference(case), rtol=2e-5, atol=2e-5)
    for wrong in (-1, N):
        with pytest.raises(IndexError, match="expert number"):
            kernel(found | {"x": tokens(1), "ids": torch.tensor([[wrong]]), "weights": None, "top_k": 1})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types(dtype: torch.dtype) -> None:
    found = cast(operands(routing="given"), dtype)
    for count in (1, 40):
        ids = torch.arange(count * 2).view(count, 2) % N
        case = found | {"x": tokens(count).to(dtype), "ids": ids, "weights": None, "top_k": 2}
        wanted = reference(case)
        error = (kernel(case).double() - wanted).norm() / wanted.norm()
        assert error < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("gated", "biases", "shared"), [(True, True, True), (False, False, False)])
@pytest.mark.parametrize("routing", ["linear", "given"])
def test_bfloat16_in_pairs(gated: bool, biases: bool, shared: bool, routing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An even hidden size: CPUs with AVX-512 BF16 multiply pairs of numbers where an expert has many tokens."""
    for hidden in (2, 38, 134):
        monkeypatch.setitem(globals(), "D", hidden)
        found = cast(operands(gated, biases, shared, routing), torch.bfloat16)
        for count in (7, 15, 16, 33, 150):
            x = tokens(count).to(torch.bfloat16)
            case = found | {"x": x, "top_k": N}
            if routing == "given":
                spread = [torch.randperm(N, generator=torch.Generator().manual_seed(t))[:3] for t in range(count)]
                case |= {"ids": torch.stack(spread), "weights": torch.rand(count, 3), "top_k": 3}
            for weight_format in ("same", "int8"):
                case["weight_format"] = weight_format
                wanted = reference(case)
                error = (kernel(case).double() - wanted).norm() / wanted.norm()
                assert error < 2 * torch.finfo(torch.bfloat16).eps, (hidden, count, weight_format)


def test_int8_weights() -> None:
    found = operands() | {"weight_format": "int8", "top_k": 3}
    for count in (1, 40):
        case = found | {"x": tokens(count)}
        torch.testing.assert_close(kernel(case).double(), reference(case), rtol=1e-3, atol=1e-3)
    rounded = packing.rounded(found["up"])
    assert 0 < (rounded - found["up"]).abs().max() <= found["up"].abs().amax(-1).max() / 127


def test_layouts_and_changed_weights() -> None:
    found = operands() | {"x": tokens(9), "top_k": 2}
    wanted = kernel(found)
    laid = found | {"down": torch.nn.Parameter(found["down"].clone(), requires_grad=False)}
    packing.relayout_(laid["down"])
    assert laid["down"].shape == found["down"].shape and torch.equal(laid["down"], found["down"])
    torch.testing.assert_close(kernel(laid), wanted)
    for case in (found, laid, found | {"weight_format": "int8"}):
        before = kernel(case)
        case["down"].mul_(2)
        assert not torch.allclose(kernel(case), before)
        torch.testing.assert_close(kernel(case).double(), reference(case), rtol=1e-3, atol=1e-3)
        case["down"].div_(2)


def test_threads_and_repetition() -> None:
    before, found = torch.get_num_threads(), operands() | {"top_k": 3}
    try:
        for count in (1, 40, 150):
            case, seen = found | {"x": tokens(count)}, []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                first = kernel(case)
                assert torch.equal(first, kernel(case))
                seen.append(first)
            torch.testing.assert_close(seen[0], seen[1], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(seen[0], seen[2], rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(before)


def test_scores_that_are_no_numbers_do_no_harm() -> None:
    found = operands() | {"x": tokens(4), "top_k": 3}
    found["x"][1] = float("nan")
    y = kernel(found)
    assert y[1].isnan().all() and y[[0, 2, 3]].isfinite().all()


def test_building_is_logged(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    case = operands() | {"x": tokens(1), "top_k": 1}
    kernel(case)
    monkeypatch.setattr(cpu, "_kernels", {})
    monkeypatch.setenv("MOECOMPILE_LOGS", "cache")
    fresh = {key: value.clone() if isinstance(value, Tensor) else value for key, value in case.items()}
    kernel(fresh)
    kernel(fresh)
    assert capsys.readouterr().err.count("[moecompile:cache] CPU kernel") == 1


def test_what_has_no_kernel_says_why() -> None:
    with pytest.raises(cpu.Unavailable, match="float64"):
        kernel(cast(operands(), torch.float64) | {"x": tokens(2).double(), "top_k": 1})
    assert "no such" in str(cpu.unsupported("no such"))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NAMED))
def test_every_named_activation(name: str) -> None:
    found = operands(gated=False, shared=False) | {"x": tokens(40) * 4, "top_k": 2, "activation": name}
    torch.testing.assert_close(kernel(found).double(), reference(found), rtol=1e-4, atol=1e-4)
    assert Activation(name)


NARROW = """
import sys
import torch
torch._inductor.config.cpp.simdlen = 256
sys.path.insert(0, sys.argv[1])
import test_cpu_kernel as cases
for changes in ({}, {"score": "softmax", "normalise": True}):
    found = cases.operands(biases=True) | changes
    for count in (1, 2, 5, 40, 150):
        for k in (0, 1, 3, cases.N):
            case = found | {"x": cases.tokens(count), "top_k": k}
            torch.testing.assert_close(cases.kernel(case).double(), cases.reference(case), rtol=2e-5, atol=2e-5)
low = cases.cast(cases.operands(), torch.bfloat16) | {"x": cases.tokens(40).bfloat16(), "top_k": 2}
torch.testing.assert_close(cases.kernel(low).double(), cases.reference(low).double(), rtol=5e-2, atol=5e-2)
from moecompile.codegen import operators
operators.load()
assert operators.loaded() and not operators.pairs()
"""


@pytest.mark.skipif("avx512" not in torch.backends.cpu.get_cpu_capability().lower(), reason="has no wider vectors than AVX2's")
def test_vectors_of_avx2() -> None:
    """What a CPU without AVX-512 compiles, on one that has it."""
    done = subprocess.run(
        [sys.executable, "-c", NARROW, str(Path(__file__).parent)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("weight_format", ["same", "int8"])
def test_copies_are_kept_of_parameters_alone(weight_format: str) -> None:
    """The buffers of compiled code are filled again and again, at the same version of the same object."""
    found = operands() | {"x": tokens(9), "top_k": 2, "weight_format": weight_format}
    parameters = found | {name: torch.nn.Parameter(found[name].clone(), False) for name in ("up", "down")}
    before = kernel(found)
    torch.testing.assert_close(kernel(parameters), before)
    for name in ("up", "down"):
        found[name].data.mul_(-3)  # raises no version
        parameters[name].data = found[name].clone()  # the same object elsewhere
    wanted = reference(found)
    assert (wanted.float() - before).abs().max() > 1
    for case in (found, parameters):
        torch.testing.assert_close(kernel(case).double(), wanted, rtol=1e-3, atol=1e-3)
