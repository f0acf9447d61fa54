"""Tuning of the Triton kernels: what is tried, what is kept, and what happens when processes die, meet or damage files.

Times come from a function of the config here: there is no device. Everything else is what runs on one.
"""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from moecompile.codegen import triton_tuning
from moecompile.codegen.triton_backend import Kernel
from moecompile.codegen.triton_cache import Device, Results, config_of, constants_for, key_of, locked, regimes, text_of
from moecompile.codegen.triton_constants import Pairs, Tiles, heuristic, pairs_space, tile_space
from moecompile.codegen.triton_emit import emit
from moecompile.codegen.triton_spec import Target, TritonSpec
from moecompile.codegen.triton_tuning import Limits, OnDevice, agree, random_operands, regime_of, tune, usable, with_config

from moecompile.cli import main
from moecompile.errors import CompileError, MoECompileError

pytest.importorskip("triton", minversion="3.6", reason="triton is not installed")
SPEC = TritonSpec(2048, 768, 128, 8, True, "silu")
H200, H100 = Device("NVIDIA H200", 132), Device("NVIDIA H100 80GB HBM3", 132)
LIMITS = Limits(790e12, 4.3e12)
LARGE = Tiles(128, 256, 64, 8, 8, 3)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


class Clock:
    """A device that likes wide tiles; it dies after some measurements."""

    def __init__(self, lives: int = 10**6) -> None:
        self.lives, self.asked = lives, 0

    def __call__(self, kernel: Kernel, tokens: int) -> float:
        if self.lives == self.asked:
            raise KeyboardInterrupt
        self.asked += 1
        tiles = kernel.module.TILES.values()
        return 1000.0 - sum(tile["BLOCK_N"] for tile in tiles) + kernel.module.PAIRS["BLOCK_N"]


def run(folder: Path, clock: Clock, tokens: tuple[int, ...] = (1, 4096), **options: object) -> list[triton_tuning.Result]:
    options = {"accept": lambda *_: True, "most": 6, **options}
    return tune(SPEC, tokens, H200, folder, clock, LIMITS, **options)  # type: ignore[arg-type]


def test_regimes_are_those_of_the_generated_file() -> None:
    assert regimes(SPEC) == ["pairs", "16", "64", "128"]
    assert [regime_of(SPEC, tokens) for tokens in (1, 16, 17, 256, 257, 1024, 10**6)] == [
        "pairs", "pairs", "16", "16", "64", "64", "128",
    ]  # fmt: skip


def test_results_are_found_again_and_used(tmp_path: Path) -> None:
    lines: list[str] = []
    clock = Clock()
    results = run(tmp_path, clock, say=lines.append)
    assert [result.regime for result in results] == ["pairs", "128"] and clock.asked == 12 == len(lines)
    assert "best" in lines[-1] and "% of the floor" in lines[-1]
    assert all(result.fraction_of_floor > 0 and len(result.key) == 32 for result in results)
    assert run(tmp_path, clock) == results and clock.asked == 12, "what is known was measured again"
    constants = constants_for(SPEC, H200, tmp_path)
    assert constants is not None and asdict(constants.pairs) == results[0].config
    assert asdict(constants.tiles[-1]) == results[1].config and constants.tiles[0] == heuristic(SPEC).tiles[0]
    assert f"measured ({H200.name})" in emit(SPEC, constants)
    # Shared neurons and gradients are no part of the key; another device, another shape and another K are.
    assert constants_for(replace(SPEC, shared_width=64, output_bias=True), H200, tmp_path) == constants_for(
        SPEC, H200, tmp_path
    )
    assert constants_for(SPEC, H100, tmp_path) is None and constants_for(SPEC, replace(H200, processors=66), tmp_path) is None
    assert constants_for(replace(SPEC, experts=64), H200, tmp_path) is None
    assert constants_for(replace(SPEC, dtype="float16"), H200, tmp_path) is None


def test_a_run_that_was_killed_goes_on(tmp_path: Path) -> None:
    clock = Clock(lives=4)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, clock)
    second = Clock()
    results = run(tmp_path, second)
    assert second.asked == 12 - 4 and len(results) == 2


def test_a_config_that_fails_is_left_out_by_the_next_run(tmp_path: Path) -> None:
    class Failing(Clock):
        def __call__(self, kernel: Kernel, tokens: int) -> float:
            if self.asked == 2:
                raise RuntimeError("an illegal memory access was encountered")
            return super().__call__(kernel, tokens)

    with pytest.raises(CompileError, match="illegal memory access"):
        run(tmp_path, Failing(), (4096,))
    second = Clock()
    results = run(tmp_path, second, (4096,))
    assert second.asked == 6 - 3 and len(results) == 1
    tried = Results(tmp_path, *key_of(SPEC, H200, "128")).read()
    assert len(tried) == 6 and list(tried.values()).count(None) == 1


def test_wrong_numbers_are_not_measured() -> None:
    expected = torch.randn(64, 32, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        right = expected.to(dtype)
        nearly = right + right.roll(1, 0) * torch.finfo(dtype).eps
        spoiled = right.clone()
        spoiled[3, 5] = float("nan")
        off = right.clone()
        off[:16] = 0  # a tile was left out
        assert agree(right, right) and agree(nearly.to(dtype), right)
        assert not agree(spoiled, right) and not agree(off, right)
        x, w = torch.randn(64, 4096, dtype=torch.float64).to(dtype), torch.randn(4096, 32, dtype=torch.float64).to(dtype)
        product = x.double() @ w.double()
        without_a_block = x[:, :-64].double() @ w[:-64].double()
        assert agree((x.float() @ w.float()).to(dtype), product.to(dtype))
        assert not agree(without_a_block.to(dtype), product.to(dtype))
    small = replace(SPEC, hidden_size=32, expert_width=16, experts=4, top_k=2, dtype="float32")
    on_device = OnDevice(small, "cpu", lambda run: 1.0)
    wrong: list[bool] = []

    def kernel(*operands: torch.Tensor) -> torch.Tensor:
        return torch.full_like(operands[0], 2.0 if wrong else 1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_tuning, "build", lambda spec: kernel)
        assert on_device(kernel, 4) == 1.0  # type: ignore[arg-type]
        wrong.append(True)
        assert on_device(kernel, 4) is None  # type: ignore[arg-type]


def test_the_key_knows_the_assembler_and_not_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    blackwell = replace(SPEC, target=Target("cuda", 100))
    before = [key_of(spec, H200, "128")[0] for spec in (SPEC, blackwell)]
    assert before[0] == key_of(replace(SPEC, weighted=not SPEC.weighted), H200, "128")[0]
    monkeypatch.setenv("DISABLE_PTXAS_OPT", "1")
    after = [key_of(spec, H200, "128")[0] for spec in (SPEC, blackwell)]
    assert not set(before) & set(after)


def test_what_cannot_be_used_is_remembered(tmp_path: Path) -> None:
    clock = Clock()
    base = heuristic(SPEC).tiles[-1]
    results = run(tmp_path, clock, (4096,), accept=lambda spec, regime, constants: constants.tiles[-1] == base)
    assert clock.asked == 1 and results[0].config == asdict(base)
    assert sorted(Results(tmp_path, *key_of(SPEC, H200, "128")).read().values(), key=str)[1:] == [None] * 5


def test_the_compiler_prunes() -> None:
    assert usable(SPEC, "16", with_config(SPEC, "16", Tiles(16, 64, 64, 8, 4, 2), "x"))
    assert not usable(SPEC, "16", with_config(SPEC, "16", Tiles(16, 128, 256, 8, 4, 5), "x")), "too much shared memory"


@pytest.mark.parametrize("spoiled", ["", "{", '{"tried": {"a": 1}, "checksum": "0"}', '{"tried": 3}', "[]", "\x00\x01"])
def test_damaged_results_are_a_miss_with_a_warning(spoiled: str, tmp_path: Path) -> None:
    kept = Results(tmp_path, *key_of(SPEC, H200, "128"))
    kept.add(LARGE, 5.0)
    assert kept.best() == (LARGE, 5.0)
    kept.path.write_text(spoiled)
    with pytest.warns(UserWarning, match="damaged"):
        assert kept.best() is None
    kept.add(LARGE, 4.0)
    assert kept.best() == (LARGE, 4.0)


def add_many(folder: str, worker: int) -> None:
    """Some measurements of one process."""
    kept = Results(Path(folder), "key", {"who": "test"})
    for index in range(10):
        kept.add(Pairs(worker + 1, index + 1, 4), 1.0 + worker + index)


def test_many_processes_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=add_many, args=(str(tmp_path), worker)) for worker in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    kept = Results(tmp_path, "key", {})
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len(kept.read()) == 40 and kept.best() == (Pairs(1, 1, 4), 1.0)
    assert not list(tmp_path.glob(".*.part"))


def test_a_lock_that_is_held_is_not_waited_for_without_end(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "lock", 1.0),
        pytest.raises(MoECompileError, match="another process"),
        locked(tmp_path / "lock", 0.1),
    ):
        pass
    with locked(tmp_path / "lock", 0.1):  # free again
        pass


def test_spaces_are_pruned_and_start_with_the_heuristic() -> None:
    for target in ("cuda:80", "cuda:90", "hip:gfx942"):
        spec = replace(SPEC, target=Target.parse(target))
        for base in heuristic(spec).tiles:
            tiles = list(tile_space(spec, base.block_m))
            assert tiles[0] == base and len(set(tiles)) == len(tiles) > 8 and {tile.block_m for tile in tiles} == {base.block_m}
        pairs = list(pairs_space(spec))
        assert pairs[0] == heuristic(spec).pairs and len(set(pairs)) == len(pairs) > 4
    small = max(
        tile.stages * (128 + tile.block_n) * tile.block_k for tile in tile_space(replace(SPEC, target=Target("cuda", 86)), 128)
    )
    large = max(tile.stages * (128 + tile.block_n) * tile.block_k for tile in tile_space(SPEC, 128))
    assert small < large
    grouped = replace(SPEC, weight_format="int4", group_size=32)
    assert {tile.block_k for tile in tile_space(grouped, 64)} == {32}


@pytest.mark.parametrize("config", [LARGE, Pairs(8, 256, 4)])
def test_configs_survive_json(config: Tiles | Pairs) -> None:
    assert config_of(text_of(config)) == config and json.loads(text_of(config))["warps"] == config.warps


@pytest.mark.parametrize("skew", [0.0, 1.2])
def test_random_operands_choose_different_experts(skew: float) -> None:
    spec = replace(SPEC, hidden_size=16, expert_width=8, experts=12, top_k=4)
    _, ids, *_ = random_operands(spec, 200, torch.device("cpu"), skew)
    assert ids is not None and all(len(set(row)) == 4 for row in ids.tolist())
    counts = torch.bincount(ids.flatten(), minlength=12)
    assert (counts[0] > 2 * counts[-1]) == (skew > 0)


def test_the_command_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["autotune", "--shape", "64,32,4,2", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "on the GPU that they run on" in error and error.count("\n") == 1
    assert main(["autotune", "--shape", "64,32,4,2", "--tokens", "1,x"]) == 2


@pytest.mark.gpu
def test_the_command_on_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["autotune", "--shape", "512,256,8,2", "--tokens", "1,64", "--most", "3", "--json", "--quiet"]
    assert main(arguments) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert len(results) == 2 and all(result["microseconds"] > 0 for result in results)
