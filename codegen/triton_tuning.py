"""Tuning:  spec -> space -> pruned by what the compiler says -> measured -> kept, one config at a time.

The space and its first pruning (shared memory, registers of sums) are in :mod:`.triton_constants`. The order is a cost model: a
config is tried earlier the fewer bytes its programs move and the fewer programs' worth of work its last wave wastes,

    cost = waves * (block_m + block_n) * block_k * steps,    waves = ceil(programs / processors)

and of equal cost those that differ from the heuristic in fewer constants (depth, stages, warps, swap, tma and persistent move
the same bytes).

Then each candidate is compiled, and dropped where the lint has a reason (spills, no tensor cores, a WGMMA hazard). What is left
is measured: cold L2, in a CUDA graph, the median. Every measurement is kept at once, so that a run that was killed goes on.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CompileError
from .triton_backend import Kernel, build
from .triton_cache import PAIRS, Config, Device, Results, key_of, regimes, text_of
from .triton_compile import compile_for, lint
from .triton_constants import Constants, Pairs, Tiles, heuristic, pairs_space, tile_space, tuned
from .triton_expressions import Unavailable
from .triton_spec import TritonSpec

Measure = Callable[[Kernel, int], float | None]  # microseconds of one forward with T tokens; None: of no use


@dataclass(frozen=True)
class Limits:
    """What a device does at best: FLOP/s in the spec's dtype, bytes read per second."""

    flops_per_second: float
    bytes_per_second: float


@dataclass(frozen=True)
class Result:
    """The best of one regime.

    Attributes:
        key: under which it is kept.
        regime: ``pairs`` or the rows of a tile.
        tokens: T that it was measured with.
        config: the constants.
        microseconds: median of one forward.
        fraction_of_floor: the floor's time over that.
    """

    key: str
    regime: str
    tokens: int
    config: dict[str, int]
    microseconds: float
    fraction_of_floor: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def regime_of(spec: TritonSpec, tokens: int) -> str:
    """The regime that a generated file takes for T tokens: its ``block_for``."""
    pairs = tokens * spec.top_k
    if pairs <= spec.experts:
        return PAIRS
    heights = [tile.block_m for tile in heuristic(spec).tiles]
    return str(min((height for height in heights if height * spec.experts >= pairs), default=max(heights)))


def space(spec: TritonSpec, regime: str, tokens: int, processors: int) -> list[Config]:
    """The configs of a regime in the order in which they are tried: the heuristic, then by the cost model."""
    if regime == PAIRS:
        return list(pairs_space(spec))
    first, *rest = tile_space(spec, int(regime))

    def cost(tile: Tiles) -> tuple[float, int]:
        programs = math.ceil(tokens * spec.top_k / tile.block_m) * math.ceil(spec.rows / tile.block_n)
        steps = math.ceil(spec.hidden_size / tile.block_k)
        moved = math.ceil(programs / processors) * (tile.block_m + tile.block_n) * tile.block_k * steps
        return moved, sum(getattr(tile, field.name) != getattr(first, field.name) for field in fields(tile))

    return [first, *sorted(rest, key=cost)]


def with_config(spec: TritonSpec, regime: str, config: Config, device: str) -> Constants:
    """The heuristic with one regime's constants replaced."""
    if isinstance(config, Pairs):
        return tuned(spec, {}, config, device)
    return tuned(spec, {int(regime): config}, None, device)


def usable(spec: TritonSpec, regime: str, constants: Constants) -> bool:
    """Whether the kernels of a regime compile, and nothing is to be said against them."""
    wanted = ("up_pairs", "down_pairs") if regime == PAIRS else ("up_tiles", "down_tiles")
    try:
        kernels = compile_for(spec, [] if regime == PAIRS else [int(regime)], constants, only=wanted)
    except Unavailable:
        return False
    return not any(lint(name, kernel, spec) for name, kernel in kernels.items())


def tune(
    spec: TritonSpec,
    tokens: Sequence[int],
    device: Device,
    folder: Path,
    measure: Measure,
    limits: Limits,
    most: int = 40,
    accept: Callable[[TritonSpec, str, Constants], bool] = usable,
    say: Callable[[str], None] = lambda text: None,
) -> list[Result]:
    """Measure the space of every regime that the token counts reach; what is known already is not measured again.

    Args:
        tokens: T; of those in one regime the largest is measured.
        folder: where results are kept.
        measure: microseconds of one forward.
        limits: of the device, for the share of the floor.
        most: configs tried in a regime.
        accept: whether a compiled candidate may be measured.
        say: told the best so far.

    Raises:
        CompileError: a config failed on the device; the next run leaves it out.
        MoECompileError: results cannot be kept.
    """
    results = []
    for regime in regimes(spec):
        reached = [count for count in tokens if regime_of(spec, count) == regime]
        if not reached:
            continue
        count = max(reached)
        key, parts = key_of(spec, device, regime)
        kept = Results(folder, key, parts)
        floor = 1e6 * spec.costs.floor_seconds(count, limits.flops_per_second, limits.bytes_per_second)
        known = kept.read()
        candidates = space(spec, regime, count, device.processors)[:most]
        for index, config in enumerate(candidates):
            if text_of(config) in known:
                continue
            constants = with_config(spec, regime, config, device.name)
            taken = None
            try:
                if accept(spec, regime, constants):
                    taken = measure(build(spec, constants), count)
            except Exception as error:  # it would be met again by every run that goes on from here
                kept.add(config, None)
                raise CompileError(
                    f"{text_of(config)} failed ({type(error).__name__}: {error}); run again to go on without it"
                ) from error
            kept.add(config, taken)
            best = kept.best()
            if best is not None:
                share = f"{100 * floor / best[1]:.0f} % of the floor"
                say(f"T={count}: {index + 1}/{len(candidates)}, best {best[1]:.1f} us, {share}")
        best = kept.best()
        if best is not None:
            results.append(Result(key, regime, count, asdict(best[0]), best[1], floor / best[1]))
    return results


# ---- measuring on a device ----


def random_operands(spec: TritonSpec, tokens: int, device: torch.device, skew: float = 0.0) -> list[Tensor | None]:
    """x, ids, weights, up, down, up_bias, down_bias of random numbers, weights in the format ``same``.

    Args:
        skew: 0 draws experts uniformly; above, expert e with a probability that falls as (e + 1) ** -skew.
    """
    g = torch.Generator(device=device).manual_seed(0)
    dtype = getattr(torch, spec.dtype)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g, device=device, dtype=dtype).mul_(scale)

    d, i, n = spec.hidden_size, spec.expert_width, spec.experts
    chances = (torch.arange(1, n + 1, device=device, dtype=torch.float32) ** -skew).expand(max(tokens, 1), n)
    ids = torch.multinomial(chances, spec.top_k, generator=g)[:tokens]
    return [
        draw(tokens, d), ids, draw(tokens, spec.top_k) if spec.weighted else None,
        draw(n, spec.rows, d, scale=d**-0.5), draw(n, d, i, scale=i**-0.5),
        draw(n, spec.rows) if spec.up_bias else None, draw(n, d) if spec.down_bias else None,
    ]  # fmt: skip


def cold_microseconds(run: Callable[[], Any], repeats: int = 20, graph: bool = True) -> float:
    """Median time of a call on the current CUDA device with a cold L2, in a CUDA graph or eager."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")  # five times an H200's L2
    run()  # compiles
    torch.cuda.synchronize()
    replay: Callable[[], Any] = run
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            run()
        replay = captured.replay
    taken = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) * 1e3)
    return statistics.median(taken)


def measured_limits(dtype: torch.dtype) -> Limits:
    """What the current CUDA device does: an 8192^3 product, the sum of 2 GiB; best of ten each."""
    square = torch.randn(8192, 8192, device="cuda", dtype=dtype)
    data = torch.ones(512 << 20, device="cuda")
    product = _fastest(lambda: square @ square)
    return Limits(2 * 8192**3 / product, data.numel() * 4 / _fastest(data.sum))


def _fastest(run: Callable[[], Any], turns: Iterable[int] = range(12)) -> float:
    """Seconds of the fastest of some calls."""
    taken = []
    for _ in turns:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) * 1e-3)
    return min(taken)


class OnDevice:
    """Measures forwards of one spec on the current CUDA device; the operands of a token count are made once.

    A kernel is compared with that of the heuristic first, so that none is chosen that a compiler's fault made fast and wrong.
    """

    def __init__(self, spec: TritonSpec, device: str = "cuda", time: Callable[..., float] = cold_microseconds) -> None:
        self.spec, self._device, self._time = spec, torch.device(device), time
        self._operands: dict[int, list[Tensor | None]] = {}
        self._expected: Tensor | None = None

    def __call__(self, kernel: Kernel, tokens: int) -> float | None:
        """Microseconds; None where the device has too little of something, or the numbers are others."""
        from triton.runtime.errors import OutOfResources

        if tokens not in self._operands:
            self._operands = {tokens: random_operands(self.spec, tokens, self._device)}
            self._expected = None
            with contextlib.suppress(OutOfResources):  # then nothing is there to compare with
                self._expected = build(self.spec)(*self._operands[tokens])  # type: ignore[arg-type]
        operands = self._operands[tokens]
        try:
            found = kernel(*operands)  # type: ignore[arg-type]
        except OutOfResources:
            return None
        if self._expected is not None and not agree(found, self._expected):
            return None
        return self._time(lambda: kernel(*operands))  # type: ignore[arg-type]


def agree(found: Tensor, expected: Tensor) -> bool:
    """Whether two kernels' outputs differ in no token by more than another order of sums explains, by the norm: 4 epsilons
    of 16 bits (sums are float32), 64 of float32."""
    allowed = (4 if expected.dtype.itemsize == 2 else 64) * torch.finfo(expected.dtype).eps
    wrong, size = (found.double() - expected.double()).norm(dim=-1), expected.double().norm(dim=-1)
    return bool((wrong <= allowed * size).all())  # False for NaN
