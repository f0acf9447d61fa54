"""Launch constants of generated Triton files: what a spec gets where nothing was tuned, and what may be tuned."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .triton_spec import Target, TritonSpec


@dataclass(frozen=True)
class Tiles:
    """Launch constants of the grouped products, for tiles of ``block_m`` tokens of one expert.

    Attributes:
        block_n: columns of a product; a gated first product has block_n / 2 gates and as many ups.
        block_k: elements of a row that are multiplied at a time.
        group: tiles that go through all columns together.
        warps, stages: of a program.
        swap: the weights are the left operand, so that their rows and not the few tokens fill an instruction's 64 rows.
        tma: weights are read by tensor descriptors (cc 9.0 and 10.x, rows of a multiple of 16 bytes, not quantised).
        persistent: as many programs as processors, each taking every n-th block in an order that keeps operands in L2.
    """

    block_m: int
    block_n: int
    block_k: int
    group: int
    warps: int
    stages: int
    swap: bool = False
    tma: bool = False
    persistent: bool = False

    @property
    def ways(self) -> str:
        """The names of what is on of swap, tma and persistent."""
        return " ".join(name for name in ("swap", "tma", "persistent") if getattr(self, name))


@dataclass(frozen=True)
class Pairs:
    """Launch constants of the products of single tokens: rows and elements of a row that a program reads at a time."""

    block_n: int
    block_k: int
    warps: int


@dataclass(frozen=True)
class Constants:
    """All launch constants of one file, and why they are what they are.

    Attributes:
        tiles: one for each height of a tile, rising.
        rank_limit: pairs up to which the generated counting sort orders them, instead of torch's sort.
        why: reasons, a line each.
        back_tiles: as tiles, for the gradients of pre-activations and of x; block_n neurons, gate and up apart.
        weights: of the gradients of the weights; block_m and block_n rows and columns of a matrix, block_k pairs at a time.
        back_why: reasons, a line each.
    """

    tiles: tuple[Tiles, ...]
    pairs: Pairs
    sum_block: int
    rank_limit: int
    why: tuple[str, ...]
    back_tiles: tuple[Tiles, ...]
    weights: Tiles
    back_why: tuple[str, ...]


_TILES = {
    2: (Tiles(16, 128, 64, 8, 4, 4), Tiles(64, 128, 64, 8, 4, 4), Tiles(128, 128, 64, 8, 8, 3)),
    4: (Tiles(16, 64, 32, 8, 4, 3), Tiles(64, 64, 32, 8, 4, 3)),
}
_WHY = {
    2: "128 x 128 x 64: 64 registers of sums per thread; with its stages 96 KB, which consumer cards have, too.",
    4: "64 x 64 x 32: exact float32 has no tensor cores; few sums per thread, against spills (gfx1100 spills).",
}
_WHY_WAYS = (
    "swap: 16 tokens are the narrow side of a product of 64 or 128 rows of weights, which then go to WGMMA or tcgen05 by",
    "way of shared memory alone; with 16 tokens as rows there is only mma.sync, which wants them in registers.",
    "tma: no addresses and no masks of weights in registers. Not with swap: Hopper would take the left operand from there.",
    "persistent: a block of 128 rows fills a processor alone; the next one starts without a launch, near the last in L2.",
    "128 x 256 (cc 9.0): 85 FLOP for each byte of L2, 128 x 128 has 64; on cc 10.x the epilogue of 256 columns can spill.",
)
# A program of rank_pairs reads all pairs twice, 1024 at a time: 8 steps here. From there on a radix sort, which spreads over
# the device, should be faster; where they meet has not been measured.
_RANK_LIMIT = 8192


def heuristic(spec: TritonSpec) -> Constants:
    """The launch constants of a spec for which nothing was tuned. NOT MEASURED: reasoned, and checked for spills."""
    size = spec.element_bytes
    tiles = [_fitted(spec, tile) for tile in _TILES[size]]
    why = (
        "NOT TUNED, only reasoned, and compiled without spills for its target.",
        "tiles: the smallest that holds an expert's share if tokens spread evenly, so that weights are read once.",
        _WHY[size],
        "16 rows is the least that tensor cores take; 64 the least for Hopper's and one warp group.",
        *(_WHY_WAYS if descriptors(spec) else ()),
        "GROUP = 8: 8 x 128 tokens of D = 4096 are 8 MB, a part of L2.",
        "PAIRS: four 16-byte loads in flight per thread; bandwidth is all that counts there, as in SUM.",
        "MAP: few experts have more than 128 tiles; one warp has little to do.",
    )
    back, weights = _backward(spec, tiles)
    back_why = ("NOT TUNED: few columns and many warps, for three products are alive at once, and an activation's derivative.",)
    pairs = Pairs(8 if spec.weight_format == "fp8" else 16, 512 // size, 4)  # 16 rows of fp8 spill on cc 9.0
    return Constants(tuple(tiles), pairs, 2048 // size, _RANK_LIMIT, why, back, weights, back_why)


def _backward(spec: TritonSpec, tiles: list[Tiles]) -> tuple[tuple[Tiles, ...], Tiles]:
    """Constants of the gradients: the widest that did not spill on any target, with gelu, which has the longest derivative."""
    hip = spec.target.backend == "hip"
    exact = spec.element_bytes == 4  # float32 products hold both operands in registers
    depth = 16 if exact else 32
    back = []
    for tile in tiles:
        columns = 16 if hip and (exact or tile.block_m > 64) else 32 if hip or exact or tile.block_m > 64 else 64
        warps = tile.warps if tile.block_m <= 16 else 8
        stages = 2 if hip else 3
        back.append(replace(tile, block_n=columns, block_k=depth, warps=warps, stages=stages))
    side = 32 if exact and hip else 64
    return tuple(back), Tiles(side, side, depth, 1, 4, 2 if hip else 3)


def tuned(spec: TritonSpec, tiles: dict[int, Tiles], pairs: Pairs | None, source: str) -> Constants:
    """The heuristic with some constants replaced by measured ones; source says where they were measured."""
    base = heuristic(spec)
    chosen = tuple(tiles.get(tile.block_m, tile) for tile in base.tiles)
    heights = ", ".join(str(height) for height in sorted(tiles))
    why = (f"measured ({source}): tiles of {heights or 'no'} rows{' and PAIRS' if pairs else ''}; the others:", *base.why)
    return replace(base, tiles=chosen, pairs=pairs or base.pairs, why=why)


def descriptors(spec: TritonSpec) -> bool:
    """Whether weights can be read by TMA, and products be WGMMA or tcgen05: 16-bit on cc 9.0 and 10.x, rows of 16 bytes."""
    hopper = spec.target.backend == "cuda" and int(spec.target.arch) // 10 in (9, 10)
    whole = spec.hidden_size % 8 == 0 and spec.expert_width % 8 == 0
    return hopper and whole and spec.element_bytes == 2 and not spec.quantised


def shared_bytes(target: Target) -> int:
    """Shared memory that a program may take: 227 KB on cc 9.0 and 10.x, 163 KB on 8.0 and 8.7, 99 KB on other CUDA devices, 64
    KB on AMD's (CUDA C++ Programming Guide, technical specifications per compute capability)."""
    if target.backend == "hip":
        return 65536
    arch = int(target.arch)
    return 232448 if arch // 10 in (9, 10) else 166912 if arch in (80, 87) else 101376


def _fitted(spec: TritonSpec, tile: Tiles) -> Tiles:
    """What a device and a format ask of a tile."""
    if spec.target.backend == "hip":
        # 64 KB of shared memory; 2-byte elements with BLOCK_K = 64 spill on gfx1100 (its compiler says so).
        # So do exact float32 products with BLOCK_K = 32.
        tile = replace(tile, block_k=16 if spec.element_bytes == 4 else 32, stages=2)
        if spec.quantised and tile.block_m > 16:
            tile = replace(tile, block_n=64)  # 128 columns of 8-bit weights spill on gfx1100
        if spec.element_bytes == 4 and tile.block_m > 16:
            tile = replace(tile, block_n=32)
    elif descriptors(spec):
        columns = 256 if spec.target.arch == 90 else 128
        if tile.block_m == 16:
            tile = replace(tile, swap=True)
        elif tile.block_m == 64:
            tile = replace(tile, tma=True)
        else:
            tile = replace(tile, block_n=columns, stages=4, tma=True, persistent=True)
    elif int(spec.target.arch) >= 100 and spec.quantised and tile.block_m != 64:
        tile = replace(tile, block_n=64)  # 128 columns of 8-bit weights spill on cc 10.0
    if spec.element_bytes == 2 and tile.block_m > 16 and (spec.hidden_size % 8 or spec.expert_width % 8):
        # Rows that do not begin at 16 bytes are read by elements, each with its address; wide tiles spill.
        tile = replace(tile, block_n=32 if spec.target.backend == "hip" else 64, block_k=32)
    if spec.group_size:
        tile = replace(tile, block_k=math.gcd(tile.block_k, spec.group_size))
    return tile


def tile_space(spec: TritonSpec, block_m: int) -> Iterator[Tiles]:
    """Tiles of one height worth compiling: the heuristic first, then variations of each constant.

    With each size come the ways (swap, tma, persistent) that the target and the spec have, that of the heuristic first.
    Pruned by what is known without compiling: shared memory (stages of both operands in what :func:`shared_bytes` gives) and
    registers (sums take at most 128 of a thread's 255).
    """
    base = next(tile for tile in heuristic(spec).tiles if tile.block_m == block_m)
    yield base
    room = shared_bytes(spec.target)
    sizes = itertools.product((64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4, 5) if spec.target.backend == "cuda" else (1, 2))
    for block_n, block_k, warps, stages in sizes:
        shared = (block_m + block_n) * block_k * spec.element_bytes * max(stages - 1, 1)
        sums = block_m * block_n // (warps * spec.target.lanes)
        if shared > room or sums > 128 or (spec.group_size and spec.group_size % block_k):
            continue
        for ways in _ways(spec, base):
            tile = replace(base, block_n=block_n, block_k=block_k, warps=warps, stages=stages, **ways)
            if tile != base:
                yield tile


def _ways(spec: TritonSpec, base: Tiles) -> list[dict[str, bool]]:
    """Combinations of swap, tma and persistent for one height of tiles, that of the heuristic first."""
    tma = descriptors(spec)
    found = [
        {"swap": swap, "tma": described, "persistent": persistent}
        for swap in ((True, False) if tma and base.block_m < 128 else (False,))
        for described in ((True, False) if tma else (False,))
        for persistent in ((True, False) if base.block_m == 128 else (False,))
    ]
    return sorted(found, key=lambda ways: sum(getattr(base, name) != on for name, on in ways.items()))


def pairs_space(spec: TritonSpec) -> Iterator[Pairs]:
    """Constants of the products of single tokens that are worth measuring; the heuristic first."""
    base = heuristic(spec).pairs
    yield base
    for block_n in (4, 8, 16, 32):
        for block_k in (128, 256, 512, 1024):
            for warps in (2, 4, 8):
                pairs = Pairs(block_n, block_k, warps)
                if 16 <= block_n * block_k // (warps * spec.target.lanes) <= 64 and pairs != base:
                    yield pairs
