"""Generated Triton kernels in the interpreter, against float64; a script: it prints a line of JSON for each case.

    TRITON_INTERPRET=1 python triton_interpreted.py [all]

Triton decides at its import whether it interprets, so the interpreter needs a process of its own. Without ``all`` a small
representative selection runs.
"""

from __future__ import annotations

import importlib.util
import json
import random
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from moecompile.codegen.triton_backend import Kernel, build, expert_ffn_backward, route
from moecompile.codegen.triton_backend import moe_ffn as generated
from moecompile.codegen.triton_constants import heuristic
from moecompile.codegen.triton_expressions import RULES, activation_function
from moecompile.codegen.triton_slopes import derivative_function
from moecompile.codegen.triton_spec import TritonSpec
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moecompile.activations import NAMED, Activation
from moecompile.lowered import route_reference

NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class Case:
    """One call, and how ids and x are made.

    Attributes:
        shape: T, N, K, D, I.
        shared: S.
        pick: which experts are chosen: ``any``, ``few`` (half of them never), ``same`` (all tokens alike).
        block: rows of a tile; None leaves it to the kernel.
        ways: of ``swap``, ``tma`` and ``persistent``, those that tiles are to take; None leaves it to the kernel.
    """

    name: str
    shape: tuple[int, int, int, int, int]
    gated: bool = True
    bias: bool = False
    unit: bool = False
    activation: str = "silu"
    pick: str = "any"
    block: int | None = None
    strided: bool = False
    shared: int = 0
    ways: str | None = None


# What the default run of the tests takes: every branch of the kernels once, in small shapes.
CASES = [
    Case("no tokens", (0, 4, 2, 24, 16)),
    Case("no experts chosen", (3, 4, 0, 24, 16), shared=20),
    Case("gated, biases, T=1", (1, 8, 2, 40, 24), bias=True),
    Case("gated, biases, tiles", (12, 5, 2, 70, 45), bias=True, activation="gelu_tanh"),
    Case("plain, tiles, one expert chosen", (9, 8, 1, 33, 17), gated=False, activation="relu2"),
    Case("pairs, odd sizes, shared", (2, 8, 2, 150, 37), bias=True, activation="gelu", shared=21),
    Case("tiles, odd sizes, shared", (20, 5, 2, 70, 37), bias=True, shared=37),
    Case("tiles, plain, shared", (18, 4, 2, 40, 24), gated=False, bias=True, shared=70),
    Case("pairs, plain, shared", (2, 8, 3, 40, 24), gated=False, shared=16),
    Case("empty experts, several groups", (24, 12, 4, 40, 40), bias=True, pick="few"),
    Case("large tiles, all alike", (70, 3, 1, 40, 40), pick="same", block=64),
    Case("unit gates, strided", (12, 8, 2, 40, 24), unit=True, strided=True),
    Case("swapped, shared", (12, 5, 2, 70, 37), bias=True, shared=37, ways="swap", block=16),
    Case("described, persistent, shared", (24, 5, 2, 72, 136), bias=True, shared=40, ways="tma persistent", block=16),
    Case("described, swapped, plain", (12, 5, 2, 40, 72), gated=False, bias=True, ways="tma swap", block=16),
]
MORE = [
    Case("persistent, empty experts", (40, 12, 3, 70, 37), bias=True, pick="few", ways="persistent", block=16),
    Case("described, large tiles", (70, 3, 2, 136, 72), ways="tma persistent", block=64, unit=True),
    Case("described, one token", (1, 3, 2, 72, 72), ways="tma", block=16),
    *(Case(f"gated, biases, T={tokens}", (tokens, 8, 2, 40, 24), bias=True) for tokens in (3, 40)),
    *(Case(f"plain, T={tokens}", (tokens, 8, 2, 40, 24), gated=False) for tokens in (1, 3, 40)),
    Case("pairs, odd sizes", (2, 8, 2, 301, 37), bias=True, activation="gelu"),
    Case("pairs, whole blocks", (1, 4, 2, 256, 256), bias=True, shared=256),
    Case("pairs, one expert chosen", (5, 8, 1, 33, 17), bias=True),
    Case("tiles, odd sizes", (25, 5, 2, 101, 45), bias=True, activation="gelu_tanh"),
    Case("tiles, odd sizes, plain", (25, 5, 2, 101, 37), gated=False, bias=True, activation="mish"),
    Case("tiles, whole blocks", (12, 4, 2, 128, 64), bias=True, shared=128),
    Case("all experts chosen", (7, 3, 3, 40, 24), bias=True),
    Case("a single expert", (9, 1, 1, 40, 24)),
    Case("all tokens alike", (20, 12, 2, 40, 24), bias=True, pick="same"),
    Case("all tokens alike, pairs", (3, 12, 2, 40, 24), bias=True, pick="same"),
    Case("large tiles", (30, 4, 3, 72, 48), bias=True, block=64, shared=100),
    Case("tiles for three tokens", (3, 12, 2, 40, 24), bias=True, block=16),
    Case("unit gates, pairs", (2, 8, 2, 40, 24), unit=True),
    Case("strided x, pairs", (3, 8, 2, 40, 24), strided=True),
]


def random_cases(count: int) -> list[Case]:
    """Cases of any shape, always the same ones."""
    draw = random.Random(0)
    cases = []
    for number in range(count):
        experts = draw.randint(1, 12)
        shape = (
            draw.choice((0, 1, 2, 5, 17, 40)),
            experts,
            draw.randint(1, experts),
            draw.randint(1, 140),
            draw.randint(1, 90),
        )
        cases.append(
            Case(
                f"random {number}: {shape}",
                shape,
                gated=draw.random() < 0.6,
                bias=draw.random() < 0.5,
                unit=draw.random() < 0.3,
                activation=draw.choice(("silu", "gelu", "relu2", "tanh")),
                pick=draw.choice(("any", "few", "same")),
                block=draw.choice((None, 16, 64)),
                strided=draw.random() < 0.3,
                shared=draw.choice((0, 1, 40)),
            )
        )
    return cases


def operands(case: Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor | None]:
    """The tensors of a case, of one seed, under the names that ``moe_ffn`` gives them."""
    tokens, experts, chosen, hidden, width = case.shape
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(device, dtype)

    pool = max(experts // 2, chosen) if case.pick == "few" else experts
    rows = [torch.randperm(pool, generator=g)[:chosen] for _ in range(tokens)]
    rows = rows[:1] * tokens if case.pick == "same" else rows
    ids = torch.stack(rows) if tokens else torch.zeros(0, chosen, dtype=torch.long)
    lines, shared = width * (2 if case.gated else 1), case.shared
    gate = shared and case.gated
    return {
        "x": draw(hidden, tokens).t() if case.strided else draw(tokens, hidden),
        "ids": ids.to(device),
        "weights": None if case.unit else draw(tokens, chosen),
        "up": draw(experts, lines, hidden, scale=hidden**-0.5),
        "down": draw(experts, hidden, width, scale=width**-0.5),
        "up_bias": draw(experts, lines) if case.bias else None,
        "down_bias": draw(experts, hidden) if case.bias else None,
        "shared_gate": draw(shared, hidden, scale=hidden**-0.5) if gate else None,
        "shared_up": draw(shared, hidden, scale=hidden**-0.5) if shared else None,
        "shared_down": draw(hidden, shared, scale=shared**-0.5) if shared else None,
        "shared_gate_bias": draw(shared) if gate and case.bias else None,
        "shared_up_bias": draw(shared) if shared and case.bias else None,
        "bias": draw(hidden) if case.bias else None,
    }


def expected(case: Case, tensors: dict[str, Tensor | None]) -> Tensor:
    """The operator in float64, of the same (rounded) operands."""
    wide = {key: v if v is None else v.cpu() if v.dtype == torch.long else v.cpu().double() for key, v in tensors.items()}
    rest = (case.shape[2], "none", False, case.activation, case.gated, "same", "torch")
    given = {"router_weight": None, "router_bias": None, "order": None, "offsets": None, **wide}
    names = [argument.name for argument in torch.ops.moecompile.moe_ffn.default._schema.arguments][: -len(rest)]
    return torch.ops.moecompile.moe_ffn(*[given[name] for name in names], *rest)


def kernel_of(case: Case, dtype: torch.dtype) -> Kernel:
    """The kernel that a case needs."""
    _, experts, chosen, hidden, width = case.shape
    spec = TritonSpec(hidden, width, experts, chosen, case.gated, case.activation, NAMES[dtype], shared_width=case.shared)
    if case.ways is None:
        return build(spec)
    ways = {way: way in case.ways.split() for way in ("swap", "tma", "persistent")}
    constants = heuristic(spec)
    return build(spec, replace(constants, tiles=tuple(replace(tile, **ways) for tile in constants.tiles)))


def run(case: Case, tensors: dict[str, Tensor | None]) -> Tensor:
    """The generated kernels."""
    order = offsets = None
    if case.block is None and case.ways is None:
        return generated(order=order, offsets=offsets, activation=case.activation, gated=case.gated, **tensors)  # type: ignore[arg-type]
    kernel = kernel_of(case, tensors["x"].dtype)  # type: ignore[union-attr]
    names = ("x", "ids", "weights", "up", "down", "up_bias", "down_bias")
    more: dict[str, Any] = {"bias": tensors["bias"], "routing": kernel.dispatch(tensors["ids"], case.block)}  # type: ignore[arg-type]
    if case.shared:
        more["shared"] = kernel.module.Shared(
            *[tensors[f"shared_{name}"] for name in ("gate", "up", "down", "gate_bias", "up_bias")]
        )
    return kernel(*[tensors[name] for name in names], **more)  # type: ignore[arg-type]


def error_of(case: Case, dtype: torch.dtype, device: str = "cpu") -> float:
    """The largest difference, as a fraction of the largest value."""
    tensors = operands(case, dtype, device)
    y, wanted = run(case, tensors), expected(case, tensors)
    assert y.dtype == dtype and y.shape == wanted.shape and y.is_contiguous()
    return float((y.cpu().double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)) if y.numel() else 0.0


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
    {f"{name}(x)" for name in RULES if name not in ("add", "sub", "mul", "div", "minimum", "maximum", "pow")}
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
    x = torch.cat([torch.linspace(-12, 12, 1534), near, -near])
    y = torch.empty(len(POINTWISE), len(x))
    with tempfile.TemporaryDirectory() as folder:
        pointwise(Path(folder)).slopes[(1,)](x, y, SIZE=len(x))
    worst = 0.0
    for index, text in enumerate(POINTWISE):
        wanted, got = Activation(text).with_derivative(x.double())[1], y[index].double()
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
    }
    cases = CASES + (MORE + random_cases(40) if everything else [])
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
