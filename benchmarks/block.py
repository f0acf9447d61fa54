"""The generated CPU kernel alone: one MoE block beside a dense FFN and one of half the width; no model, no Inductor.

    python benchmarks/block.py [--threads 2] [--output benchmarks/results]

Thirty blocks of different random weights at SmolLM2-135M's shape (D 576, F 1536; 48 experts of 24 neurons and 384 shared ones,
16 chosen: half of the neurons), so that a decoded token's weights come from memory. All systems take turns; medians over
rounds, milliseconds for the thirty blocks. The limit is that of bytes for a decoded token, of multiply-adds for a prompt.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from moecompile.codegen import cpu, packing
from torch import Tensor

from moecompile.costs import device_speed
from moecompile.files import write_bytes

sys.path.insert(0, str(Path(__file__).resolve().parent))
from speed import machine

LAYERS, D, F, N, I, S, K = 30, 576, 1536, 48, 24, 384, 16  # noqa: E741
Layers = list[tuple[Tensor, ...]]


def dense(layers: Layers) -> Callable[[Tensor], None]:
    """gate, up, silu, down by torch."""

    def run(x: Tensor) -> None:
        linear = torch.nn.functional.linear
        for gate, up, down in layers:
            linear(torch.nn.functional.silu(linear(x, gate)) * linear(x, up), down)

    return run


def ours(layers: Layers, weight_format: str) -> Callable[[Tensor], None]:
    """The block's kernel, its router included."""

    def run(x: Tensor) -> None:
        for router, up, down, shared_gate, shared_up, shared_down in layers:
            cpu.moe_ffn(
                x, router, None, None, None, up, down, None, None, shared_gate, shared_up, shared_down, None, None, None,
                K, "none", False, "silu", True, weight_format,
            )  # fmt: skip

    return run


def weights(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> Layers:
    """Random weights of thirty layers; down projections by neuron where they belong to our kernel."""

    def made(shape: tuple[int, ...]) -> Tensor:  # copies are kept of parameters alone
        return torch.nn.Parameter((torch.randn(shape) * 0.02).to(dtype), requires_grad=False)

    return [tuple(map(made, shapes)) for _ in range(LAYERS)]


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = []
    for name in ("float32", "bfloat16"):
        dtype = getattr(torch, name)
        blocks = weights([(N, D), (N, 2 * I, D), (N, D, I), (S, D), (S, D), (D, S)], dtype)
        for block in blocks:
            packing.relayout_(block[2])
            packing.relayout_(block[5])
        systems = {
            "dense": dense(weights([(F, D), (F, D), (D, F)], dtype)),
            "half width": dense(weights([(F // 2, D), (F // 2, D), (D, F // 2)], dtype)),
            "ours 50 %": ours(blocks, "same"),
            "ours 50 %, int8": ours(blocks, "int8"),
        }
        for tokens in (1, 8, 64, 512):
            x = torch.randn(tokens, D).to(dtype)
            taken: dict[str, list[float]] = {system: [] for system in systems}
            with torch.no_grad():
                for turn in range(options.rounds + 2 if tokens < 512 else 5):
                    for system, run in systems.items():
                        start = time.perf_counter()
                        run(x)
                        if turn >= 2:  # the first turns build kernels and pack
                            taken[system].append(time.perf_counter() - start)
            median = {system: statistics.median(times) for system, times in taken.items()}
            for system, seconds in median.items():
                rows.append(
                    {"dtype": name, "tokens": tokens, "system": system, "milliseconds": seconds * 1e3,
                     "over_dense": median["dense"] / seconds, "over_half": median["half width"] / seconds}
                )  # fmt: skip
    speed = device_speed("cpu")
    result = {"machine": machine(), "threads": options.threads, "date": str(date.today()), "torch": torch.__version__,
              "bytes_per_second": speed.bytes_per_second, "flops_per_second": speed.flops_per_second, "rows": rows}  # fmt: skip
    lines = [f"# One MoE block on the CPU: {result['machine']}, {options.threads} threads, {result['date']}", ""]
    lines += [f"torch {torch.__version__}; {speed.bytes_per_second / 1e9:.1f} GB/s read, "
              f"{speed.flops_per_second / 1e9:.0f} GFLOP/s float32, both measured in this run.", ""]  # fmt: skip
    lines += ["| dtype | tokens | system | ms for 30 blocks | over dense | over half width |", "|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            "| {dtype} | {tokens} | {system} | {milliseconds:.2f} | {over_dense:.2f} | {over_half:.2f} |".format(**row)
        )
    options.output.mkdir(parents=True, exist_ok=True)
    write_bytes(options.output / "block.json", (json.dumps(result, indent=1) + "\n").encode())
    write_bytes(options.output / "block.md", ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


if __name__ == "__main__":
    main()
