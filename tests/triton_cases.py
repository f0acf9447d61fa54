"""Cases of the generated Triton kernels: shapes, operands, what they must give; for the interpreter and for devices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from moecompile.codegen.triton_backend import Kernel, build
from moecompile.codegen.triton_backend import moe_ffn as generated
from moecompile.codegen.triton_constants import heuristic
from moecompile.codegen.triton_spec import TritonSpec
from torch import Tensor

import moecompile  # noqa: F401  (its operators)

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


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    """A case of any shape: no or one token, empty experts, all tokens alike, ragged ends, gaps in inputs, all ways."""
    experts = draw(st.integers(1, 12))
    chosen = draw(st.integers(1, experts))
    tokens, hidden, width = draw(st.sampled_from((0, 1, 2, 5, 17, 40))), draw(st.integers(1, 140)), draw(st.integers(1, 90))
    ways = draw(st.sampled_from((None, "", "swap", "persistent", "tma", "swap tma persistent")))
    if ways and "tma" in ways:  # rows of whole 16 bytes
        hidden, width = -8 * (-hidden // 8), -8 * (-width // 8)
    return Case(
        "any",
        (tokens, experts, chosen, hidden, width),
        gated=draw(st.booleans()),
        bias=draw(st.booleans()),
        unit=draw(st.booleans()),
        activation=draw(st.sampled_from(("silu", "gelu", "relu2", "tanh"))),
        pick=draw(st.sampled_from(("any", "few", "same"))),
        block=draw(st.sampled_from((None, 16, 64))),
        strided=draw(st.booleans()),
        shared=draw(st.sampled_from((0, 1, 40))),
        ways=ways,
    )


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
    tensors = {
        "x": draw(tokens, hidden),
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
    if case.strided:  # everything but the experts' matrices, which must not have gaps
        for name, tensor in tensors.items():
            if tensor is not None and name not in ("up", "down"):
                tensors[name] = torch.stack([tensor, tensor], dim=-1)[..., 0]
    return tensors


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
