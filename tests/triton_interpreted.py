"""Generated Triton kernels in the interpreter, against float64; a script: it prints a line of JSON for each case.

    TRITON_INTERPRET=1 python triton_interpreted.py [all]

Triton decides at its import whether it interprets, so the interpreter needs a process of its own. Without ``all`` a small
representative selection runs.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from compiling import plain, without_inductor
from compiling import tokens as some_tokens
from hypothesis import HealthCheck, given, settings
from moecompile.codegen import stored as stored_weights
from moecompile.codegen.triton_backend import build, expert_ffn_backward, route
from moecompile.codegen.triton_constants import heuristic
from moecompile.codegen.triton_expressions import activation_function
from moecompile.codegen.triton_slopes import derivative_function
from moecompile.codegen.triton_spec import TritonSpec
from moecompile.passes import lower_triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton_cases import CASES, MORE, Case, any_case, error_of, expected, kernel_of, operands

import moecompile
from moecompile import compiled
from moecompile.activations import NAMED, PRIMITIVES, Activation
from moecompile.apply import moe_blocks
from moecompile.lowered import route_reference


class Recorder(TorchDispatchMode):
    """Which operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def check_dispatch() -> float:
    """Order, offsets and tile map against a plain loop, over uneven shares and tile sizes, by both ways of ordering."""
    module = build(TritonSpec(16, 16, 7, 3, False, "relu", "float32")).module
    for tokens, block, limit in ((1, 16, 8192), (40, 16, 8192), (40, 64, 0), (400, 16, 8192), (300, 16, 0)):
        g = torch.Generator().manual_seed(tokens)
        ids = torch.stack([torch.randperm(6, generator=g)[:3] for _ in range(tokens)])  # the last expert stays empty
        module.RANK_LIMIT = limit
        routing = module.dispatch(ids, block)
        share = [[p for p, e in enumerate(ids.flatten().tolist()) if e == expert] for expert in range(7)]
        assert routing.order.tolist() == [p for pairs in share for p in pairs]
        starts = [sum(len(pairs) for pairs in share[:expert]) for expert in range(8)]
        assert routing.offsets.tolist() == starts
        tiles = [(e, starts[e] + first) for e in range(7) for first in range(0, len(share[e]), block)]
        spare = len(routing.tile_expert) - len(tiles)
        assert spare >= 0 and routing.tile_expert.tolist() == [e for e, _ in tiles] + [-1] * spare
        assert routing.tile_row.tolist()[: len(tiles)] == [row for _, row in tiles]
    return 0.0


def check_sharing() -> float:
    """A shared routing changes nothing, equal calls give equal bits, and no operator makes the host wait."""
    case = Case("", (10, 8, 2, 24, 16), bias=True)
    tensors, kernel = operands(case, torch.float32), kernel_of(case, torch.float32)
    names = ("x", "ids", "weights", "up", "down", "up_bias", "down_bias")
    given = [tensors[name] for name in names]
    with Recorder() as recorder:
        y = kernel(*given)  # type: ignore[arg-type]
    routing = kernel.dispatch(tensors["ids"])  # type: ignore[arg-type]
    assert all(torch.equal(y, kernel(*given, routing=routing)) for _ in range(2))  # type: ignore[arg-type]
    waiting = ("_local_scalar_dense", "nonzero", "bincount", "unique", "masked_select", "repeat_interleave")
    assert recorder.names and not [name for name in recorder.names if any(w in name for w in waiting)]
    few = [tensor[:2] for tensor in given[:3]] + given[3:]  # type: ignore[index]
    assert kernel.dispatch(few[1]) is None  # type: ignore[arg-type]
    order, offsets = kernel.module.rank(few[1])
    assert kernel.cut(order, offsets) is None
    try:
        kernel(*few, routing=routing)  # type: ignore[arg-type]
    except ValueError as error:
        assert "routing" in str(error)
        return 0.0
    raise AssertionError("a routing of ten tokens was taken for two")


def check_routing() -> float:
    """The choice against the reference, and against a plain loop where scores are equal or not numbers."""
    g = torch.Generator().manual_seed(0)
    worst = 0.0
    for experts, chosen in ((5, 2), (64, 8), (3, 3), (1, 1)):
        x, weight = torch.randn(6, 12, generator=g), torch.randn(experts, 12, generator=g)
        scores = torch.nn.functional.linear(x, weight)
        for score in ("none", "softmax", "sigmoid"):
            for normalise in (False, True):
                ids, weights = route(scores, chosen, score, normalise)
                wanted, gates = route_reference(x, weight, None, chosen, score, normalise)
                assert torch.equal(ids.sort(-1).values, wanted.sort(-1).values)
                order = wanted.gather(-1, gates.argsort(-1, descending=True)) if score != "none" else None
                assert order is None or torch.equal(ids, order)
                worst = max(worst, float((weights - gates.sort(-1, descending=True).values).abs().max()))
    nan, inf = float("nan"), float("inf")
    odd = torch.tensor(
        [[1.0, 2.0, 2.0, 2.0, 0.0], [nan, 1.0, 1.0, -inf, nan], [-inf] * 5, [nan] * 5, [inf, 0.0, inf, 1.0, 1.0]]
    )
    assert route(odd, 3, "none", False)[0].tolist() == [[1, 2, 3], [1, 2, 0], [0, 1, 2], [0, 1, 2], [0, 2, 3]]
    return worst


POINTWISE = sorted(
    {f"{name}(x)" for name in PRIMITIVES if name not in ("add", "sub", "mul", "div", "minimum", "maximum", "pow")}
    | set(NAMED)
    | {"add(x, 2)", "sub(1, x)", "div(1, add(x, 20.5))", "minimum(0.5, x)", "maximum(x, mul(x, x))", "maximum(-1, x)"}
    | {"pow(x, 3)", "pow(x, 0.5)", "pow(x, -2)", "pow(x, 1.5)", "pow(x, 0)", "softplus(x, 2.0, 10.0)", "hardtanh(x, -2.0, 0.5)"}
    | {"elu(x, 0.5, 1.5, 0.7)", "leaky_relu(x, 0.3)", "add(x, sigmoid(0.5))", "mul(2, 3)", "mul(x, 1e-39)", "-x"}
)


def pointwise(folder: Path) -> ModuleType:
    """A module with one kernel that applies every activation of POINTWISE, and one with their derivatives."""
    parts = ["import triton\nimport triton.language as tl\n"]
    parts += [activation_function(text, f"f{index}") for index, text in enumerate(POINTWISE)]
    parts += [derivative_function(text, f"g{index}") for index, text in enumerate(POINTWISE)]
    for name in ("kernel", "slopes"):
        parts.append(
            f"@triton.jit\ndef {name}(x, y, SIZE: tl.constexpr):\n    i = tl.arange(0, SIZE)\n    value = tl.load(x + i)\n"
        )
        call = "f{0}(value)" if name == "kernel" else "g{0}(value)[1]"
        parts[-1] += "".join(f"    tl.store(y + {i} * SIZE + i, {call.format(i)})\n" for i in range(len(POINTWISE)))
    path = folder / "pointwise.py"
    path.write_text("\n\n".join(parts), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("pointwise", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_activations() -> float:
    """Every primitive and name, near 0 and far from it, relative to the value; NaN stays NaN."""
    near = torch.logspace(-6, 0, 500)
    x = torch.cat([torch.linspace(-30, 30, 3003), near, -near, torch.full((93,), float("nan"))])
    y = torch.empty(len(POINTWISE), len(x))
    with tempfile.TemporaryDirectory() as folder:
        pointwise(Path(folder)).kernel[(1,)](x, y, SIZE=len(x))
    worst = 0.0
    for index, text in enumerate(POINTWISE):
        # In float64 and rounded, so that what overflows float32 does so on both sides.
        wanted, got = Activation(text)(x.double()).float().double(), y[index].double()
        same = (got == wanted) | (got.isnan() & wanted.isnan()) | ((got - wanted).abs() < 1e-37)
        # Where a function cancels (1 + erf at -5, a sine at a multiple of pi), relative to what it cancels.
        scale = wanted.abs().clamp_min(x.double().abs().clamp_max(1.0) if text != "gelu(x)" and text != "gelu" else 1.0)
        error = torch.where(same, 0.0, (got - wanted).abs() / scale)
        assert not error.isnan().any(), text
        assert text in ("mul(2, 3)", "pow(x, 0)") or got[-1].isnan(), f"{text} hides NaN"
        worst = max(worst, float(error.max()))
        if error.max() > 2e-6:
            print(text, float(error.max()), float(x[error.argmax()]), file=sys.stderr)
    return worst


def check_slopes() -> float:
    """Every derivative against the reference's, relative to 1 or to the slope where that is larger."""
    near = torch.logspace(-4, 0, 257)
    far = torch.tensor([-100.0, -60.0, -30.0, 30.0, 60.0, 100.0])
    x = torch.cat([torch.linspace(-12, 12, 1528), far, near, -near])
    y = torch.empty(len(POINTWISE), len(x))
    with tempfile.TemporaryDirectory() as folder:
        pointwise(Path(folder)).slopes[(1,)](x, y, SIZE=len(x))
    worst = 0.0
    for index, text in enumerate(POINTWISE):
        wanted, got = Activation(text).with_derivative(x.double())[1].float().double(), y[index].double()
        known = wanted.isfinite()
        error = ((got - wanted).abs() / wanted.abs().clamp_min(1.0))[known]
        assert not error.isnan().any(), text
        worst = max(worst, float(error.max()))
        if error.max() > 2e-6:
            print(text, float(error.max()), float(x[known][error.argmax()]), file=sys.stderr)
    return worst


def check_backward(case: Case, dtype: torch.dtype, device: str = "cpu", times: int = 2) -> float:
    """The six gradients against the operator's own in float64; the largest error, each as a fraction of the largest value."""
    tensors = operands(case, dtype, device)
    names = ("x", "ids", "weights", "up", "down", "up_bias", "down_bias")
    given = [tensors[name] for name in names]
    grad = torch.randn(case.shape[0], case.shape[3], generator=torch.Generator().manual_seed(1)).to(device, dtype)
    needs = [given[index] is not None for index in (0, 2, 3, 4, 5, 6)]
    first, *others = (expert_ffn_backward(grad, *given, case.activation, case.gated, needs) for _ in range(times))  # type: ignore[arg-type]
    wide = [v if v is None else v.cpu().double() if v.is_floating_point() else v.cpu() for v in given]
    wanted = torch.ops.moecompile.expert_ffn_backward(grad.cpu().double(), *wide, case.activation, case.gated, needs)
    worst = 0.0
    for index, (got, want, need, tensor) in enumerate(zip(first, wanted, needs, [given[0], *given[2:]], strict=True)):
        assert (got is not None) == need
        if got is None:
            continue
        assert got.dtype == tensor.dtype and got.shape == tensor.shape  # type: ignore[union-attr]
        assert all(torch.equal(got, other[index]) for other in others), "other bits at another call"
        if got.numel():
            worst = max(worst, float((got.cpu().double() - want).abs().max() / want.abs().max().clamp_min(1e-30)))
    return worst


def stored(w: Tensor, form: str, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """(weights as they are stored, their scales, their values) of rows of weights."""
    groups = w.unflatten(-1, (-1, group or w.shape[-1]))
    most = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}[form]
    scale = groups.abs().amax(-1, keepdim=True) / most
    if form == "fp8":
        q = (groups / scale).to(torch.float8_e4m3fn)
        return q.flatten(-2), scale.squeeze(-1), (q.to(w.dtype) * scale).flatten(-2)
    q = (groups / scale).round()
    values = (q * scale).flatten(-2)
    if form == "int8":
        return q.flatten(-2).to(torch.int8), scale.squeeze(-1), values
    halves = (q.flatten(-2) + 8).to(torch.uint8)
    return (halves[..., 0::2] | (halves[..., 1::2] << 4)).contiguous(), scale.squeeze(-1), values


# Of any shape: an output may be one number, in which parts that were rounded to float16 (2^-11 each) cancel.
TOLERANCES = {torch.float32: 3e-6, torch.float16: 4e-3}


def check_any(check: Callable[[Case, torch.dtype], float], dtype: torch.dtype, count: int) -> float:
    """A check over cases of any shape, always the same ones; a failure is shrunk to the smallest."""
    worst = 0.0

    @settings(max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(any_case())
    def holds(case: Case) -> None:
        nonlocal worst
        error = check(case, dtype)
        assert error <= TOLERANCES[dtype], f"{error} in {case}"
        worst = max(worst, error)

    holds()
    return worst


def check_any_backward(case: Case, dtype: torch.dtype) -> float:
    """:func:`check_backward` of a case without what gradients do not have."""
    return check_backward(replace(case, unit=False), dtype)


def check_far_weights() -> float:
    """Experts whose weights lie beyond 2^31 elements, in files that are empty but for them: their offsets need 64 bits."""
    experts, hidden, width = 8200, 1024, 256
    spec = TritonSpec(hidden, width, experts, 2, True, "silu", "float16")
    with tempfile.TemporaryDirectory() as folder, arguments_in_place():
        up = torch.from_file(f"{folder}/up", True, experts * 2 * width * hidden, dtype=torch.float16)
        down = torch.from_file(f"{folder}/down", True, experts * hidden * width, dtype=torch.float16)
        assert min(up.numel(), down.numel()) > 2**31
        up, down = up.view(experts, 2 * width, hidden), down.view(experts, hidden, width)
        small = operands(Case("", (3, 2, 2, hidden, width)), torch.float16)
        up[-2:], down[-2:] = small["up"], small["down"]
        ids = small["ids"] + experts - 2
        wanted = expected(Case("", (3, 2, 2, hidden, width)), small)
        order, counts = ids.flatten().argsort(stable=True), torch.bincount(ids.flatten(), minlength=experts)
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
        tile_expert = torch.tensor([experts - 2, experts - 1, -1], dtype=torch.int32)
        tile_row = torch.tensor([0, int(offsets[-2]), 0], dtype=torch.int32)
        worst = 0.0
        for ways in (None, "swap", "tma"):
            tiles = tuple(replace(tile, swap=ways == "swap", tma=ways == "tma") for tile in heuristic(spec).tiles)
            kernel = build(spec, replace(heuristic(spec), tiles=tiles))
            routing = None if ways is None else kernel.module.Routing(order, offsets, tile_expert, tile_row, 16)
            y = kernel(small["x"], ids, small["weights"], up, down, routing=routing)
            worst = max(worst, float((y.double() - wanted).abs().max() / wanted.abs().max()))
    return worst


def check_far_rows() -> float:
    """The last tile of so many pairs that x, h and out have more than 2^31 elements."""
    tokens, chosen, hidden, width, rows = 2_100_000, 4, 1024, 256, 9
    pairs = tokens * chosen
    case = Case("", (rows, 1, 1, hidden, width))
    spec = TritonSpec(hidden, width, 1, chosen, True, "silu", "float16")
    small, module = operands(case, torch.float16), build(spec).module
    with tempfile.TemporaryDirectory() as folder, arguments_in_place():
        shapes = {"x": (tokens, hidden), "h": (pairs, width), "out": (pairs, hidden)}
        x, h, out = (
            torch.from_file(f"{folder}/{name}", True, shape[0] * shape[1], dtype=torch.float16).view(shape)
            for name, shape in shapes.items()
        )
        assert min(tensor.numel() for tensor in (x, h, out)) > 2**31
        order = torch.arange(pairs).roll(3)  # the last places hold pairs of the last tokens
        order[-rows:] = pairs - 1 - chosen * torch.arange(rows)
        x[order[-rows:] // chosen] = small["x"]
        weights = torch.zeros(pairs, dtype=torch.float16)
        weights[order[-rows:]] = small["weights"].flatten()
        where = (
            order,
            torch.tensor([0, pairs]),
            torch.tensor([0], dtype=torch.int32),
            torch.tensor([pairs - rows], dtype=torch.int32),
            1,
        )
        meta = {**module.TILES[16], "TMA": False}
        module.up_tiles[(-(-width // (meta["BLOCK_N"] // 2)),)](x, *where, small["up"], None, h, TOP_K=chosen, **meta)
        module.down_tiles[(-(-hidden // meta["BLOCK_N"]),)](h, *where, weights, small["down"], None, out, **meta)
        # An offset that wraps is wrong for the store and the load alike.
        assert bool(h[-rows:].any(1).all()), "h was written elsewhere"
        y, wanted = out[order[-rows:]].double(), expected(case, small)
        return float((y - wanted).abs().max() / wanted.abs().max())


@contextlib.contextmanager
def arguments_in_place() -> Iterator[None]:
    """The interpreter copies every tensor that it is given onto itself; one of many gigabytes must be left as it is."""
    from triton.runtime.interpreter import GridExecutor

    keep = mock.patch.object(GridExecutor, "_init_args_hst", lambda self, arguments, named: (arguments, named))
    with keep, mock.patch.object(GridExecutor, "_restore_args_dev", lambda *_: None):
        yield


def check_operator(form: str, tokens: int, shape: tuple[int, int] = (90, 46), device: str = "cpu") -> float:
    """The operator with a weight format, by Triton and by torch operators in float64; changed weights are packed again."""
    hidden, width = shape
    case = Case("", (tokens, 4, 2, hidden, width), bias=True, shared=20)
    tensors = operands(case, torch.float32, device)
    given = {"router_weight": None, "router_bias": None, "order": None, "offsets": None, **tensors}
    names = [argument.name for argument in torch.ops.moecompile.moe_ffn.default._schema.arguments][:17]
    worst = 0.0
    for _ in range(2):
        wide = {name: v if v is None or v.dtype == torch.long else v.double() for name, v in given.items()}
        wanted = torch.ops.moecompile.moe_ffn(*[wide[n] for n in names], 2, "none", False, "silu", True, form, "torch")
        exact = torch.ops.moecompile.moe_ffn(*[wide[n] for n in names], 2, "none", False, "silu", True, "same", "torch")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # no fallback
            y = torch.ops.moecompile.moe_ffn(*[given[n] for n in names], 2, "none", False, "silu", True, form, "triton")
        worst = max(worst, float((y.double() - wanted).abs().max() / wanted.abs().max()))
        lost = float((wanted - exact).norm() / exact.norm())
        assert 1e-4 < lost < (0.2 if "int4" in form else 0.05), f"{form} loses {lost}"
        given["up"].mul_(-1.5)  # type: ignore[union-attr]
    return worst


def check_model(form: str) -> float:
    """A converted model, compiled: its logits against eager ones with rounded experts. The pass that asks for a
    GPU is told that there is one; the kernels are interpreted."""
    moe, ids = plain(), some_tokens(2, 5)
    rounded = copy.deepcopy(moe)
    for block in moe_blocks(rounded).values():
        for weight in (block.experts.up, block.experts.down_proj):
            weight.data = stored_weights.rounded(weight.data, stored_weights.FORMATS[form])
    lower_triton._off_cpu = lambda node: True
    compiled._prepare = lambda scope: None  # the weights lie on the CPU, and stay as a GPU's kernels want them
    os.environ["MOECOMPILE_DISABLE"] = "lower_cpu"
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = moecompile.compile(lambda ids: moe(input_ids=ids).logits, weights=form, fullgraph=True)
        got, wanted = without_inductor(fast)(ids), rounded(input_ids=ids).logits
    layers = moecompile.last_graphs(fast)[-1].layers
    assert {layer["backend"] for layer in layers} == {"triton"}
    assert {layer["weight_format"] for layer in layers} == {stored_weights.FORMATS[form]}
    return float((got - wanted).abs().max() / wanted.abs().max())


def check_format(form: str, group: int, tokens: int, gated: bool = True) -> float:
    """Stored weights: as the operator with their values."""
    hidden, width = (128, 64) if group else (54, 38)
    case = Case("", (tokens, 4, 2, hidden, width), bias=True, shared=20, gated=gated)
    tensors = operands(case, torch.float32)
    spec = TritonSpec(hidden, width, 4, 2, gated, "silu", "float32", form, group, shared_width=20)
    kernel, more, values = build(spec), {}, dict(tensors)
    given = {}
    for name in ("up", "down"):
        weight = tensors[name]
        assert weight is not None
        given[name], more[f"{name}_scale"], values[name] = stored(weight, form, group)
    shared = [tensors[f"shared_{name}"] for name in ("gate", "up", "down", "gate_bias", "up_bias")]
    y = kernel(
        tensors["x"], tensors["ids"], tensors["weights"], given["up"], given["down"], tensors["up_bias"], tensors["down_bias"],
        **more, shared=kernel.module.Shared(*shared), bias=tensors["bias"],
    )  # type: ignore[arg-type]  # fmt: skip
    wanted = expected(case, values)
    try:  # weights of another format are refused, not misread
        other = given["up"].view(torch.int8 if form != "int8" else torch.uint8)
        kernel(tensors["x"], tensors["ids"], None, other, given["down"], **more, shared=kernel.module.Shared(*shared))
    except ValueError as error:
        assert "made for" in str(error)
        return float((y.double() - wanted).abs().max() / wanted.abs().max())
    raise AssertionError("weights of another format were taken")


FORMATS = [("int8", 0, 3), ("int4", 32, 9), ("int4", 0, 2), ("int8", 32, 2), ("fp8", 0, 9)]
MORE_FORMATS = [(form, group, tokens) for form in ("int8", "int4") for group in (0, 32, 64) for tokens in (2, 20)]
MORE_FORMATS += [("fp8", 0, 2), ("fp8", 0, 20)]
BACKWARD = [CASES[0], CASES[3], CASES[4], Case("empty experts", (9, 6, 2, 40, 33), pick="few", activation="mish")]
MORE_BACKWARD = [
    Case("plain, biases", (14, 5, 3, 40, 70), gated=False, bias=True, activation="gelu"),
    Case("all alike, large tiles", (70, 3, 1, 70, 40), pick="same", bias=True),
    Case("whole blocks", (33, 4, 2, 64, 64), activation="quick_gelu"),
    Case("one token", (1, 8, 2, 40, 24), bias=True),
]


def checks(everything: bool) -> dict[str, Any]:
    """Name -> function that returns an error; float16 takes a third of the cases."""
    found: dict[str, Any] = {
        "dispatch": check_dispatch,
        "sharing": check_sharing,
        "routing": check_routing,
        "activations": check_activations,
        "slopes": check_slopes,
        "operator, int4/64, T=9": lambda: check_operator("int4/64", 9),
        "operator, int8/128, T=1": lambda: check_operator("int8/128", 1),
        "model, int4": lambda: check_model("int4"),
    }
    if everything:
        for form in ("int8/32", "int4/32", "int4/128", "fp8/0", "int8/0"):
            found |= {f"operator, {form}, T={t}": lambda form=form, t=t: check_operator(form, t, (128, 34)) for t in (1, 12)}
        found |= {f"model, {form}": lambda form=form: check_model(form) for form in ("int8", "fp8")}
    found |= {
        "far weights, float16": check_far_weights,
        "far rows, float16": check_far_rows,
        "any float32": lambda: check_any(error_of, torch.float32, 120 if everything else 15),
        "any float16": lambda: check_any(error_of, torch.float16, 60 if everything else 6),
        "any backward, float32": lambda: check_any(check_any_backward, torch.float32, 60 if everything else 5),
    }
    cases = CASES + (MORE if everything else [])
    for dtype, chosen in ((torch.float32, cases), (torch.float16, cases[2::3])):
        found |= {f"{dtype} {case.name}": lambda case=case, dtype=dtype: error_of(case, dtype) for case in chosen}
    for form, group, tokens in FORMATS + (MORE_FORMATS if everything else []):
        name = f"{form}, groups of {group}, T={tokens}"
        found[name] = lambda form=form, group=group, tokens=tokens: check_format(form, group, tokens, gated=tokens != 3)
    backward = BACKWARD + (MORE_BACKWARD if everything else [])
    for dtype, chosen in ((torch.float32, backward), (torch.float16, backward[3::2])):
        found |= {
            f"{dtype} backward, {case.name}": lambda case=case, dtype=dtype: check_backward(case, dtype) for case in chosen
        }
    return found


def main() -> None:
    """Every check in one process, a line of JSON each."""
    for name, check in checks("all" in sys.argv[1:]).items():
        try:
            print(json.dumps({"case": name, "error": check()}), flush=True)
        except Exception as error:
            print(json.dumps({"case": name, "failure": f"{type(error).__name__}: {error}"}), flush=True)


if __name__ == "__main__":
    main()
