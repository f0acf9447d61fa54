"""Generated Triton kernels compiled ahead of time: resources, instructions, the lint, the committed table, the command."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from moecompile.codegen import stored, triton_compile
from moecompile.codegen.triton_compile import TARGETS, Resources, assembly, compile_for, left_in_registers, lint, resources
from moecompile.codegen.triton_constants import heuristic, tile_space
from moecompile.codegen.triton_expressions import Unavailable
from moecompile.codegen.triton_grid import SHAPES, TABLE, rows_of, text_of
from moecompile.codegen.triton_spec import Target, TritonSpec

from moecompile.cli import main

triton = pytest.importorskip("triton", minversion="3.6", reason="triton is not installed")
MMA = {"80": "mma.sync", "90": "wgmma.mma_async", "100": "tcgen05.mma", "gfx942": "v_mfma", "gfx1100": "v_wmma"}
PRODUCTS = ["up_pairs", "down_pairs", "up_tiles", "down_tiles"]
SPEC = TritonSpec(2048, 768, 128, 8, True, "silu", up_bias=True, down_bias=True)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh folders for generated files and compiled kernels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


def narrow_offsets(kernel: Any, spec: TritonSpec) -> list[str]:
    """32-bit products with a row's length or a matrix's height: they would overflow in tensors beyond 2^31 elements."""
    text = kernel.asm["ttir"]
    numbers = dict(re.findall(r"(%\w+) = arith\.constant (?:dense<)?(\d+)>? : (?:tensor<\S+xi32>|i32)", text))
    sizes = {spec.hidden_size, spec.expert_width, spec.rows, spec.shared_width}
    products = re.findall(r"(%\w+) = arith\.muli (%\w+), (%\w+) : (?:i32|tensor<\S*i32>)", text)
    return [name for name, *pair in products if any(int(numbers.get(operand, -1)) in sizes for operand in pair)]


def heights(spec: TritonSpec) -> list[int]:
    """Rows of a spec's tiles."""
    return [tile.block_m for tile in heuristic(spec).tiles]


def check(spec: TritonSpec, **options: object) -> dict[str, Resources]:
    """Compile, lint, and say what each kernel uses; offsets in memory must be 64-bit."""
    found = {}
    for name, kernel in compile_for(spec, **options).items():  # type: ignore[arg-type]
        assert not lint(name, kernel, spec)
        if spec.direction == "forward" and min(spec.hidden_size, spec.expert_width) > 256:
            gates = name.startswith("up_tiles") and spec.gated  # a lane's half: 0 or I
            assert len(narrow_offsets(kernel, spec)) == gates, f"{name}: {narrow_offsets(kernel, spec)}"
        found[name] = resources(kernel)
        assert found[name].registers > 0
    return found


def test_all_kernels_of_a_split_model() -> None:
    """Unit gates, shared neurons and a bias, in the shape of a small real model."""
    spec = TritonSpec(576, 24, 48, 16, True, "silu", weighted=False, shared_width=384, output_bias=True)
    found = check(spec, blocks=[16])
    assert set(found) == {
        "up_pairs",
        "down_pairs",
        "sum_pairs",
        "rank_pairs",
        "choose",
        "up_tiles/16",
        "down_tiles/16",
        "map_tiles/16",
    }


@pytest.mark.parametrize(
    "fields", [{"weight_format": "int8"}, {"weight_format": "int4", "group_size": 64}, {"weight_format": "fp8"}], ids=str
)
def test_stored_formats_keep_the_left_operand_in_memory(fields: dict[str, object]) -> None:
    kernels = compile_for(replace(SPEC, **fields), blocks=[64], only=["up_tiles"])
    (kernel,) = kernels.values()
    assert "wgmma.mma_async" in assembly(kernel) and not left_in_registers(kernel) and not lint("", kernel, SPEC)


def test_fp8_is_refused_where_a_device_has_none() -> None:
    with pytest.raises(Unavailable, match=r"does not compile for cuda:80.*fp8"):
        compile_for(replace(SPEC, weight_format="fp8", target=Target("cuda", 80)), blocks=[16], only=["up_tiles"])


GRADIENTS = ["hidden_back", "input_back", "weight_back"]


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("gated", [True, False])
def test_gradients_compile_everywhere(gated: bool, dtype: str, target: Target) -> None:
    spec = replace(SPEC, direction="backward", dtype=dtype, gated=gated, activation="gelu", target=target)
    found = check(spec, only=[*GRADIENTS, "bias_back", "bias_dot"])
    products = {f"{kind}/{block}" for kind in ("hidden_back", "input_back") for block in heights(spec)}
    assert set(found) == products | {"weight_back/up", "weight_back/down", "bias_back/up", "bias_back/down", "bias_dot"}


KINDS: list[dict[str, object]] = [
    {},
    {"gated": False, "activation": "gelu", "dtype": "float32"},
    {"dtype": "float32", "precision": "tf32"},
    {"shared_width": 2048, "shared_bias": True, "output_bias": True, "dtype": "float16"},
    {"weight_format": "int8"},
    {"weight_format": "int8", "group_size": 128},
    {"weight_format": "int4", "group_size": 64},
    {"weight_format": "fp8"},
    {"hidden_size": 98, "expert_width": 41, "experts": 5, "top_k": 2, "activation": "mish"},
]


def exists(fields: dict[str, object], target: Target) -> bool:
    """Whether a device has what a spec asks for: float8_e4m3fn (cc 8.9 and later), tf32 (NVIDIA's)."""
    eight = fields.get("weight_format") == "fp8" and stored.refusal("fp8", target, 2, 2) is not None
    return not eight and not (fields.get("precision") == "tf32" and target.backend == "hip")


@pytest.mark.parametrize(("fields", "target"), [(f, t) for f in KINDS for t in TARGETS if exists(f, t)], ids=str)
def test_every_kind_compiles(fields: dict[str, object], target: Target) -> None:
    spec = replace(SPEC, target=target, **fields)
    found = check(spec, only=PRODUCTS)
    assert set(found) == {"up_pairs", "down_pairs"} | {f"{kind}_tiles/{m}" for kind in ("up", "down") for m in heights(spec)}


# ---- swapped operands, tensor descriptors, persistent programs ----


@pytest.mark.parametrize("arch", [90, 100])
def test_tiles_of_hopper_and_blackwell(arch: int) -> None:
    """16 tokens are the narrow side of a product; the weights of larger tiles come by TMA, which nothing smaller has."""
    spec = replace(SPEC, target=Target("cuda", arch))
    assert [tile.ways for tile in heuristic(spec).tiles] == ["swap", "tma", "tma persistent"]
    kernels = compile_for(spec, blocks=[16, 64], only=["up_tiles"])
    few, middle = assembly(kernels["up_tiles/16"]), assembly(kernels["up_tiles/64"])
    assert MMA[str(arch)] in few and ("m64n16k16" in few) == (arch == 90)
    assert "cp.async.bulk.tensor" in middle and "cp.async.bulk.tensor" not in few
    assert not lint("up_tiles/64", kernels["up_tiles/64"], spec)


@pytest.mark.parametrize(
    "fields",
    [
        {"target": Target("cuda", 80)},
        {"target": Target("cuda", 120)},
        {"target": Target("hip", "gfx942")},
        {"dtype": "float32"},
        {"weight_format": "int8"},
        {"expert_width": 44},
    ],
    ids=str,
)
def test_devices_and_weights_without_descriptors(fields: dict[str, object]) -> None:
    spec = replace(SPEC, **fields)
    assert not any(tile.swap or tile.tma for tile in heuristic(spec).tiles)
    assert not any(tile.swap or tile.tma for block in heights(spec) for tile in tile_space(spec, block))


def test_swapped_and_described_weights_of_two_parts_are_refused() -> None:
    """Hopper would take gates and ups, which TMA reads as one box, through registers into the left operand."""
    constants = heuristic(SPEC)
    both = replace(constants, tiles=(replace(constants.tiles[0], swap=True, tma=True),))
    kernels = compile_for(SPEC, constants=both, only=["up_tiles", "down_tiles"])
    assert "left operand" in lint("up", kernels["up_tiles/16"], SPEC)[0] and not lint("down", kernels["down_tiles/16"], SPEC)


# ---- the lint, on kernels that are not as they should be ----


def test_lint_finds_spills_and_missing_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = SimpleNamespace(asm={"ttir": "%1 = tt.dot %a, %b", "ptx": "fma.rn.f32"}, metadata=SimpleNamespace(shared=300_000))
    monkeypatch.setattr(triton_compile, "resources", lambda kernel: Resources(255, 48, kernel.metadata.shared, ""))
    spills, shared, cores = lint("up_tiles/128", kernel, SPEC)
    assert "spills 48 bytes" in spills and "300000 bytes of shared" in shared and "no tensor-core" in cores


_HAZARD = """
import triton
import triton.language as tl


@triton.jit
def kernel(a, b, c, K, COMPUTE: tl.constexpr):
    i, k = tl.arange(0, 64)[:, None], tl.arange(0, 64)
    total = tl.zeros((64, 64), tl.float32)
    for begin in range(0, K, 64):
        left = tl.load(a + i * K + begin + k[None, :])
        if COMPUTE:
            left = (left.to(tl.float32) * 2.0).to(tl.bfloat16)
        right = tl.load(b + (begin + k)[:, None] * 64 + k[None, :])
        total = tl.dot(left, right, total)
    tl.store(c + i * 64 + k[None, :], total)
"""


@pytest.mark.parametrize("compute", [True, False])
def test_lint_finds_a_left_operand_in_registers(tmp_path: Path, compute: bool) -> None:
    from moecompile.codegen.triton_backend import load
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    (tmp_path / "hazard.py").write_text(_HAZARD)
    signature = {"a": "*bf16", "b": "*bf16", "c": "*fp32", "K": "i32", "COMPUTE": "constexpr"}
    attributes = {(place,): [["tt.divisibility", 16]] for place in range(4)}
    source = ASTSource(load(tmp_path / "hazard.py").kernel, signature, {"COMPUTE": compute}, attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert left_in_registers(kernel) == compute
    assert any("left operand" in reason for reason in lint("hazard", kernel, SPEC)) == compute


# ---- the committed table ----


def committed() -> dict[str, dict[str, list[int | str]]]:
    """The table, if this Triton made it: other versions allot registers otherwise."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    if table["triton"] != triton.__version__:
        pytest.skip(f"the table is of Triton {table['triton']}, this is {triton.__version__}")
    return table["kernels"]


def test_table_is_whole_and_clean() -> None:
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    assert set(table["kernels"]) == {f"{shape} {target}" for shape in SHAPES for target in TARGETS}
    assert all(row[1] == 0 for rows in table["kernels"].values() for row in rows.values()), "a kernel of the table spills"
    assert text_of(table["triton"], table["kernels"]) == TABLE.read_text(encoding="utf-8")


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_spec_of_the_grid(shape: str, target: Target) -> None:
    """All kernels that a benchmark launches compile, the lint has nothing against them, and they use what the table says."""
    rows = rows_of(shape, target)
    large = {row[3] for name, row in rows.items() if name.endswith("_tiles/64") or name.endswith("_tiles/128")}
    assert large - {""} == {MMA[str(target.arch)]}
    assert rows == committed()[f"{shape} {target}"]


# ---- the command ----


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kernels"
    assert main(["codegen", "--shape", "64,32,4,2", "--target", "cuda:80", "--out", str(out), "--json", "--quiet"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads((out / "kernels.json").read_text())["kernels"] == result["kernels"]
    rows = {row["name"]: row for row in result["kernels"]}
    assert {name.partition("/")[0] for name in rows} > set(PRODUCTS)
    assert rows["up_tiles/128"]["mma"] == "mma.sync" and rows["sum_pairs"]["mma"] == ""
    for row in rows.values():
        assert row["spill_bytes"] == 0 and row["registers"] > 0 and row["target"] == "cuda:80"
        assert all((out / row[file]).stat().st_size > 0 for file in ("source", "binary", "assembly"))
    compile((out / rows["up_pairs"]["source"]).read_text(), "kernel", "exec")


def test_command_fails_with_the_lints_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moecompile.cli.codegen.lint", lambda name, kernel, spec: [f"{name}: spills 8 bytes per thread"])
    monkeypatch.setattr("moecompile.cli.codegen.compile_for", lambda spec: compile_for(spec, only=["sum_pairs"]))
    out = tmp_path / "kernels"
    assert main(["codegen", "--shape", "64,32,4,2", "--target", "cuda:80", "--out", str(out), "--quiet"]) == 2
    assert "sum_pairs: spills 8 bytes" in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--shape", "64,32,4"], "four positive"),
        (["--shape", "64,32,4,5"], "5 experts are chosen of 4"),
        (["--shape", "64,32,4,2", "--target", "cuda:10"], "no target"),
        ([], "either MODEL or --shape"),
        (["--shape", "64,32,4,2", "--weight-format", "int8", "--group-size", "48"], "power of two"),
        (["--shape", "64,32,4,2", "--activation", "nonsense("], "activation"),
        (
            ["--shape", "64,32,4,2", "--weight-format", "fp8", "--target", "cuda:90", "hip:gfx942"],
            "8.9 or later, not hip:gfx942",
        ),
    ],
)
def test_bad_use(arguments: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["codegen", *arguments, "--out", str(tmp_path / "out"), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_kernels_of_a_converted_model(dense_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "moe", tmp_path / "kernels"
    split = ["--recipe", "contiguous", "--experts", "6", "--shared", "2", "--top-k", "2"]
    assert main(["convert", str(dense_folder), str(folder), *split, "--quiet"]) == 0
    options = ["--target", "hip:gfx942", "--dtype", "float16", "--out", str(out), "--json", "--quiet"]
    capsys.readouterr()
    assert main(["codegen", str(folder), *options]) == 0
    rows = json.loads(capsys.readouterr().out)["kernels"]
    (source,) = {row["source"] for row in rows}  # the blocks are alike
    text = (out / source).read_text()
    assert "experts=6" in text and "top_k=2" in text and "weighted=False" in text and "shared_width=0" not in text
    assert {row["mma"] for row in rows if row["name"].startswith("up_tiles")} == {"v_mfma"}


def test_specs_of_a_stock_model(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    from moecompile.cli import parser
    from moecompile.cli.codegen import specs_of

    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    MixtralForCausalLM(MixtralConfig(**sizes, **heads)).save_pretrained(tmp_path / "mixtral")
    options = parser().parse_args(["codegen", str(tmp_path / "mixtral"), "--out", str(tmp_path / "out"), "--quiet"])
    assert specs_of(options) == [TritonSpec(32, 16, 4, 2, True, "silu", "float32")]


def test_k_by_every_name() -> None:
    from moecompile.cli.codegen import _chosen
    from moecompile.errors import InputError

    text = SimpleNamespace(moe_topk=3)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))
    assert _chosen(model, SimpleNamespace(config=SimpleNamespace(top_k_experts=4))) == 4
    assert _chosen(model, SimpleNamespace()) == 3
    with pytest.raises(InputError, match="does not say how many"):
        _chosen(SimpleNamespace(), SimpleNamespace())


def test_blackwells_of_every_number_have_its_memory() -> None:
    spec = TritonSpec(2048, 768, 128, 8, True, "silu", target=Target("cuda", 103))
    for name, kernel in compile_for(spec, [128], only=["up_tiles"]).items():
        assert not lint(name, kernel, spec) and resources(kernel).shared_bytes > 101376


def test_a_dense_model_has_no_experts(dense_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["codegen", str(dense_folder), "--out", str(tmp_path / "out"), "--quiet"]) == 2
    assert "has no experts; convert it first" in capsys.readouterr().err


def test_gradients_beside_shared_neurons() -> None:
    from moecompile.cli.codegen import with_gradients

    assert with_gradients(SPEC) == [replace(SPEC, direction="backward")]
    shared = replace(SPEC, shared_width=384, shared_bias=True, output_bias=True, weighted=False)
    assert with_gradients(shared) == [shared, replace(SPEC, direction="backward")]
