"""Generated Triton kernels: interpreted against float64, compiled ahead of time for every target, refused with a reason.

Run as a script (``TRITON_INTERPRET=1 python test_triton_kernel.py``) it prints a line of JSON for each case: Triton
decides at its import whether it interprets, so the interpreter needs a process of its own.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from moecompile.codegen import ExpertKernelSpec
from moecompile.codegen.triton_backend import Unavailable, build, compile_for, emit, expert_ffn, unsupported
from moecompile.codegen.triton_expressions import RULES, activation_function, literal
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moecompile.activations import NAMED, PRIMITIVES, Activation
from moecompile.errors import PlanError
from moecompile.ops import expert_ffn as reference

TARGETS = [("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64), ("hip", "gfx1100", 32)]
INSTRUCTIONS = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", "gfx942": "v_mfma", "gfx1100": "v_wmma"}
SPEC = ExpertKernelSpec(2048, 1024, 64, 8, True, "silu", 2)
# Products of 32-bit numbers: a block's first column, a tile's group, a lane's half. Everything times a row's length is 64-bit.
NARROW = {"up_pairs": 1, "down_pairs": 1, "sum_pairs": 1, "up_tiles": 3, "down_tiles": 2, "map_tiles": 0}


@dataclass(frozen=True)
class Case:
    """One call, and how ids and x are made.

    Attributes:
        shape: T, N, K, D, I.
        pick: which experts are chosen: ``any``, ``few`` (half of them never), ``same`` (all tokens alike).
        block: rows of a tile; None leaves it to the kernel.
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


CASES = [
    Case("no tokens", (0, 4, 2, 24, 16)),
    Case("no experts chosen", (3, 4, 0, 24, 16)),
    *(Case(f"gated, biases, T={tokens}", (tokens, 8, 2, 40, 24), bias=True) for tokens in (1, 3, 40)),
    *(Case(f"plain, T={tokens}", (tokens, 8, 2, 40, 24), gated=False) for tokens in (1, 3, 40)),
    Case("gated, T=12", (12, 8, 2, 40, 24)),
    Case("plain, biases, T=12", (12, 8, 2, 40, 24), gated=False, bias=True),
    Case("pairs, odd sizes", (2, 8, 2, 301, 37), bias=True, activation="gelu"),
    Case("pairs, whole blocks", (1, 4, 2, 256, 256), bias=True),
    Case("pairs, one expert chosen", (5, 8, 1, 33, 17), bias=True),
    Case("tiles, odd sizes", (25, 5, 2, 101, 45), bias=True, activation="gelu_tanh"),
    Case("tiles, odd sizes, plain", (25, 5, 2, 101, 37), gated=False, bias=True, activation="relu2"),
    Case("tiles, whole blocks", (12, 4, 2, 128, 64), bias=True),
    Case("tiles, several groups", (24, 12, 4, 70, 40), bias=True),
    Case("tiles, one expert chosen", (12, 8, 1, 40, 24), bias=True),
    Case("all experts chosen", (7, 3, 3, 40, 24), bias=True),
    Case("a single expert", (9, 1, 1, 40, 24)),
    Case("empty experts", (12, 12, 2, 40, 24), bias=True, pick="few"),
    Case("all tokens alike", (20, 12, 2, 40, 24), bias=True, pick="same"),
    Case("all tokens alike, pairs", (3, 12, 2, 40, 24), bias=True, pick="same"),
    Case("large tiles", (30, 4, 3, 72, 48), bias=True, block=64),
    Case("large tiles, plain, all alike", (70, 3, 1, 72, 48), gated=False, pick="same", block=64),
    Case("tiles for three tokens", (3, 12, 2, 40, 24), bias=True, block=16),
    Case("unit gates", (12, 8, 2, 40, 24), bias=True, unit=True),
    Case("unit gates, pairs", (2, 8, 2, 40, 24), unit=True),
    Case("strided x", (12, 8, 2, 40, 24), strided=True),
    Case("strided x, pairs", (3, 8, 2, 40, 24), strided=True),
]


def operands(case: Case, dtype: torch.dtype, device: str = "cpu") -> list[Tensor | None]:
    """The seven tensors of a case, of one seed."""
    tokens, experts, chosen, hidden, width = case.shape
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(device, dtype)

    pool = max(experts // 2, chosen) if case.pick == "few" else experts
    rows = [torch.randperm(pool, generator=g)[:chosen] for _ in range(tokens)]
    rows = [rows[0]] * tokens if case.pick == "same" else rows
    ids = torch.stack(rows) if tokens else torch.zeros(0, chosen, dtype=torch.long)
    x = draw(hidden, tokens).t() if case.strided else draw(tokens, hidden)
    lines = 2 * width if case.gated else width
    return [
        x,
        ids.to(device),
        None if case.unit else draw(tokens, chosen),
        draw(experts, lines, hidden, scale=hidden**-0.5),
        draw(experts, hidden, width, scale=width**-0.5),
        draw(experts, lines) if case.bias else None,
        draw(experts, hidden) if case.bias else None,
    ]


def expected(case: Case, tensors: list[Tensor | None]) -> Tensor:
    """The operator in float64, of the same (rounded) operands."""
    x, ids, weights, *rest = (None if v is None else v.cpu() if v.dtype == torch.long else v.cpu().double() for v in tensors)
    assert x is not None and ids is not None
    weights = torch.ones(ids.shape, dtype=torch.float64) if weights is None else weights
    return reference(x, ids, weights, *rest, case.activation, case.gated)


def run(case: Case, tensors: list[Tensor | None]) -> Tensor:
    """The generated kernels."""
    if case.block is None:
        return expert_ffn(*tensors, case.activation, case.gated)
    _, experts, chosen, hidden, width = case.shape
    size = tensors[0].element_size()  # type: ignore[union-attr]
    kernel = build(ExpertKernelSpec(hidden, width, experts, chosen, case.gated, case.activation, size))
    return kernel(*tensors, routing=kernel.dispatch(tensors[1], case.block))


def error_of(case: Case, dtype: torch.dtype, device: str = "cpu") -> float:
    """The largest difference, as a fraction of the largest value."""
    tensors = operands(case, dtype, device)
    y, wanted = run(case, tensors), expected(case, tensors)
    assert y.dtype == dtype and y.shape == wanted.shape and y.is_contiguous()
    return float((y.cpu().double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)) if y.numel() else 0.0


# ---- in the interpreter's process ----


class Recorder(TorchDispatchMode):
    """Which operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def check_dispatch() -> float:
    """Order, offsets and tile map against a plain loop, over uneven shares and tile sizes."""
    kernel = build(ExpertKernelSpec(16, 16, 7, 3, False, "relu", 4))
    for tokens, block in ((1, 16), (40, 16), (40, 64), (300, 16)):
        g = torch.Generator().manual_seed(tokens)
        ids = torch.stack([torch.randperm(6, generator=g)[:3] for _ in range(tokens)])  # the last expert stays empty
        routing = kernel.dispatch(ids, block)
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
    tensors = operands(case, torch.float32)
    kernel = build(ExpertKernelSpec(24, 16, 8, 2, True, "silu", 4))
    with Recorder() as recorder:
        y = kernel(*tensors)
    routing = kernel.dispatch(tensors[1])
    assert all(torch.equal(y, kernel(*tensors, routing=routing)) for _ in range(2))
    waiting = ("_local_scalar_dense", "nonzero", "bincount", "unique", "masked_select", "repeat_interleave")
    assert "aten::sort" in recorder.names and not [name for name in recorder.names if any(w in name for w in waiting)]
    assert kernel.dispatch(tensors[1][:2]) is None  # type: ignore[index]
    for rows in (10, 2):  # tiles and pairs
        x, ids, weights, *rest = [tensor[:rows] for tensor in tensors[:3]] + tensors[3:]  # type: ignore[index]
        order, offsets = kernel.module.rank(ids, 8)
        shared = expert_ffn(x, ids, weights, *rest, case.activation, case.gated, order, offsets)
        assert torch.equal(shared, kernel(x, ids, weights, *rest))
    with pytest.raises(ValueError, match="routing"):
        kernel(x, ids, weights, *rest, routing=routing)  # of ten tokens, not two
    return 0.0


POINTWISE = sorted(
    {f"{name}(x)" for name in RULES if name not in ("add", "sub", "mul", "div", "minimum", "maximum", "pow")}
    | set(NAMED)
    | {"add(x, 2)", "sub(1, x)", "div(1, add(x, 20.5))", "minimum(0.5, x)", "maximum(x, mul(x, x))", "maximum(-1, x)"}
    | {"pow(x, 3)", "pow(x, 0.5)", "pow(x, -2)", "pow(x, 1.5)", "pow(x, 0)", "softplus(x, 2.0, 10.0)", "hardtanh(x, -2.0, 0.5)"}
    | {"elu(x, 0.5, 1.5, 0.7)", "leaky_relu(x, 0.3)", "add(x, sigmoid(0.5))", "mul(2, 3)", "mul(x, 1e-39)", "-x"}
)


def pointwise(folder: Path) -> ModuleType:
    """A module with one kernel that applies every activation of POINTWISE."""
    parts = ["import triton\nimport triton.language as tl\n"]
    parts += [activation_function(text, f"f{index}") for index, text in enumerate(POINTWISE)]
    lines = [f"    tl.store(y + {index} * SIZE + i, f{index}(value))" for index in range(len(POINTWISE))]
    head = "@triton.jit\ndef kernel(x, y, SIZE: tl.constexpr):\n    i = tl.arange(0, SIZE)\n    value = tl.load(x + i)\n"
    path = folder / "pointwise.py"
    path.write_text("\n\n".join([*parts, head + "\n".join(lines) + "\n"]), encoding="utf-8")
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


def main() -> None:
    """Every case in one process, a line of JSON each; float16 takes a third of them."""
    checks: dict[str, Any] = {"dispatch": check_dispatch, "sharing": check_sharing, "activations": check_activations}
    for dtype, cases in ((torch.float32, CASES), (torch.float16, CASES[2::3])):
        checks |= {f"{dtype} {case.name}": lambda case=case, dtype=dtype: error_of(case, dtype) for case in cases}
    for name, check in checks.items():
        try:
            print(json.dumps({"case": name, "error": check()}), flush=True)
        except Exception as error:
            print(json.dumps({"case": name, "failure": f"{type(error).__name__}: {error}"}), flush=True)


# ---- in pytest's process ----


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fresh folders for generated files and compiled kernels; skips where there is no Triton."""
    pytest.importorskip("triton", minversion="3.6", reason="triton is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    return tmp_path


def test_interpreted(cache: Path) -> None:
    import numpy
    import triton

    if triton.__version__.startswith("3.6.") and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        pytest.skip("the interpreter of Triton 3.6 does not work with numpy 2.4")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and len(results) > len(CASES), done.stdout + done.stderr
    tolerances = [1.5e-3 if "float16" in result["case"] else 2e-6 for result in results]
    bad = [result for result, most in zip(results, tolerances, strict=True) if not result.get("error", 1.0) <= most]
    assert not bad, f"{bad}\n{done.stderr[-2000:]}"


def resources(kernel: Any) -> dict[str, int]:
    """Spilled bytes or registers, and shared memory, as the assembler counts them."""
    import triton

    shared = {"shared": kernel.metadata.shared}
    if "amdgcn" in kernel.asm:
        names = "vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size"
        counts = re.findall(rf"\.({names}): +(\d+)", kernel.asm["amdgcn"])
        assert len(counts) == 3
        return shared | {name: int(count) for name, count in counts}
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():  # then only what the compiler itself says
        return shared
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    counts = re.findall(r"\b(STACK|LOCAL):(\d+)", text)
    assert len(counts) == 2, text
    return shared | {name: int(count) for name, count in counts}


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target[1]))
def test_compiles_for(target: tuple[str, int | str, int], cache: Path) -> None:
    blocks = (
        (16, 64, 128) if target[1] in (90, "gfx1100") else (128,)
    )  # all, where register files are scarce or instructions differ
    compiled = compile_for(SPEC, target, blocks=blocks)
    assert {name.partition("/")[2] for name in compiled} == {"", *map(str, blocks)}
    limit = 101376 if target[0] == "cuda" else 65536  # what a program may have on the smallest device of the kind
    for name, kernel in compiled.items():
        used = resources(kernel)
        assert used.pop("shared") <= limit, name
        assert not any(used.values()), f"{name} spills: {used}"
        narrow = re.findall(r"arith\.muli .*: (?:i32|tensor<\w*i32>) ", kernel.asm["ttir"])
        assert len(narrow) == NARROW[name.partition("/")[0]], f"{name}: {narrow}"
    for name in ("up_tiles/128", "down_tiles/128"):
        assert INSTRUCTIONS[target[1]] in (compiled[name].asm.get("ptx") or compiled[name].asm["amdgcn"]), name
    if target[1] == 90:
        for name in ("up_tiles/64", "down_tiles/64", "up_tiles/128", "down_tiles/128"):
            assert_left_operand_in_memory(compiled[name])


def assert_left_operand_in_memory(kernel: Any) -> None:
    """Triton 3.4 to 3.7 can overwrite a left operand that sits in registers: it must come from shared memory, by descriptor."""
    dots = re.findall(r"warp_group_dot .*: (\S+)<", kernel.asm["ttgir"])
    assert dots and all(left == "!ttg.memdesc" for left in dots)
    instructions = re.findall(r"wgmma\.mma_async\S+\s+\{[^}]*\},\s*(\S)", kernel.asm["ptx"])
    assert instructions and all(first != "{" for first in instructions)


@pytest.mark.parametrize(
    "spec", [ExpertKernelSpec(4096, 1376, 8, 2, False, "gelu", 2), ExpertKernelSpec(96, 40, 5, 2, True, "mish", 4)]
)
def test_compiles_other_shapes(spec: ExpertKernelSpec, cache: Path) -> None:
    dtype = torch.float16 if spec.element_bytes == 2 else torch.float32
    for name, kernel in compile_for(spec, ("cuda", 90, 32), dtype, blocks=[64]).items():
        used = resources(kernel)
        assert used.pop("shared") <= 101376 and not any(used.values()), name


def test_activations_compile(cache: Path) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = pointwise(cache).kernel
    for target in (TARGETS[0], TARGETS[3]):
        source = ASTSource(kernel, {"x": "*fp32", "y": "*fp32", "SIZE": "constexpr"}, {"SIZE": 128})
        assembly = triton.compile(source, target=GPUTarget(*target)).asm
        assert "f64" not in assembly["ttir"]


def test_source_stands_alone() -> None:
    source = emit(SPEC)
    imported: set[str | None] = set()
    for node in ast.walk(ast.parse(source)):
        imported |= {name.name for name in node.names} if isinstance(node, ast.Import) else set()
        imported |= {node.module} if isinstance(node, ast.ImportFrom) else set()
    assert imported == {"__future__", "typing", "torch", "triton", "triton.language"}
    assert source == emit(SPEC) and "silu(x)" in source and "D = 2048" in source
    assert not [word for word in (".item(", ".tolist(", "bincount(", "nonzero(", "atomic") if word in source]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("activation", "size"), [("gelu_tanh", 2), ("mish", 4), ("softplus", 4)])
def test_source_is_tidy(gated: bool, activation: str, size: int) -> None:
    pytest.importorskip("ruff")
    source = emit(ExpertKernelSpec(2048, 1376, 64, 8, gated, activation, size))
    for command in (["check"], ["format", "--diff"]):
        arguments = [sys.executable, "-m", "ruff", *command, "--stdin-filename", "kernel.py", "-"]
        done = subprocess.run(arguments, input=source, cwd=Path(__file__).parents[1], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_primitive_has_a_form() -> None:
    assert set(RULES) == set(PRIMITIVES)


@pytest.mark.parametrize(("number", "text"), [(1e39, 'float("inf")'), (-1e39, 'float("-inf")'), (1e-39, "0.0"), (0.1, "0.1")])
def test_constants_stay_in_float32(number: float, text: str) -> None:
    assert literal(number) == text


def test_equal_values_are_computed_once() -> None:
    assert activation_function("mul(exp(x), add(exp(x), 1))").count("tl.exp") == 1


def test_text_of_an_activation_cannot_become_code() -> None:
    source = emit(ExpertKernelSpec(16, 16, 2, 1, False, "add(\nexp(x),\nneg(x)\n)  # remark", 4))
    assert "remark" not in source and source.count("add(exp(x), neg(x))") == 2


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (ExpertKernelSpec(16, 16, 2, 1, False, "relu", 8), "bytes per element"),
        (ExpertKernelSpec(16, 0, 2, 1, False, "relu", 4), "without neurons"),
        (ExpertKernelSpec(16, 16, 2, 1, False, "pow(x, x)", 4), "exponent"),
        (ExpertKernelSpec(16, 16, 2, 1, False, "elu(x, x)", 4), "elu"),
        (ExpertKernelSpec(16, 16, 2, 1, False, "silu(x, 2)", 4), "silu"),
        (ExpertKernelSpec(16, 16, 2, 1, False, "div(1, 0)", 4), "division by zero"),
        (ExpertKernelSpec(16, 16, 2, 1, False, "pow(x, 1000)", 4), "exponent"),
    ],
)
def test_refusals_of_emit(spec: ExpertKernelSpec, reason: str) -> None:
    with pytest.raises(Unavailable, match=reason) as caught:
        emit(spec)
    assert "\n" not in str(caught.value)


def test_malformed_activation() -> None:
    with pytest.raises(PlanError):
        emit(ExpertKernelSpec(16, 16, 2, 1, False, "import os", 4))


def test_what_is_unsupported(cache: Path) -> None:
    assert unsupported(torch.bfloat16, "silu") is None
    assert "float64" in str(unsupported(torch.float64, "silu")) and "exponent" in str(unsupported(torch.float32, "pow(x, x)"))


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "triton is not installed" in str(unsupported(torch.float32, "silu"))
    for call in (lambda: build(SPEC), lambda: compile_for(SPEC, TARGETS[0])):
        with pytest.raises(Unavailable, match="triton is not installed"):
            call()
    with pytest.raises(Unavailable, match="triton is not installed"):
        run(CASES[2], operands(CASES[2], torch.float32))


def test_refusals_of_tensors(cache: Path) -> None:
    case = CASES[2]
    x, ids, weights, up, down, *biases = operands(case, torch.float32)
    assert x is not None and up is not None and down is not None
    half, wide = up.half(), [x.double(), ids, weights, up.double(), down.double()]
    spread = up.transpose(1, 2).contiguous().transpose(1, 2)
    for tensors, reason in (
        ([x, ids, weights, up, down], "device"),
        (wide, "float64"),
        ([x, ids, weights, half, down], "equal types"),
        ([x, ids, weights, spread, down], "contiguous"),
    ):
        with pytest.raises(Unavailable, match=reason):
            expert_ffn(*tensors, *biases, case.activation, case.gated)
    with pytest.raises(ValueError, match="down is"):
        build(ExpertKernelSpec(40, 24, 8, 2, True, "silu", 4)).module.expert_ffn(x, ids, weights, up, down[:, :, 1:])


def test_unwritable_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "file"))
    with pytest.raises(Unavailable, match="cannot be kept"):
        build(ExpertKernelSpec(16, 16, 3, 1, False, "relu6", 4))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_on_a_device(case: Case, cache: Path) -> None:
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float16, 1.5e-3), (torch.bfloat16, 1.2e-2)):
        assert error_of(case, dtype, "cuda") <= tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_captured_in_a_graph(tokens: int, cache: Path) -> None:
    case = Case("", (tokens, 16, 2, 512, 384), bias=True)
    tensors = operands(case, torch.bfloat16, "cuda")
    eager = run(case, tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(case, tensors)
    for _ in range(3):
        graph.replay()
        assert torch.equal(y, eager)


if __name__ == "__main__":
    main()
