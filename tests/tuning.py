"""What the tests of tuning share: a tiny pair of models, batches; also run as a process of its own."""

from __future__ import annotations

import copy
import os
import signal
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from families import BY_NAME

import moecompile
from moecompile.distil import Distillation
from moecompile.recipes import Calibrated, ReadMe
from moecompile.tuning import TuneConfig, Tuning

TOKENS, ROWS, LENGTH = 99, 4, 24


def batches(count: int, seed: int = 3) -> list[torch.Tensor]:
    """(B, L) random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, TOKENS, (ROWS, LENGTH), generator=generator) for _ in range(count)]


def dense_model(family: str = "llama", **changes: Any) -> Any:
    """A tiny model whose weights are large enough that the FFNs matter."""
    model = BY_NAME[family].build(**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model


def pair(family: str = "llama") -> tuple[Any, Any]:
    """(dense, converted with 2 of 6 experts beside 2 shared slices), fresh copies."""
    return copy.deepcopy(_pair(family))


@cache
def _pair(family: str) -> tuple[Any, Any]:
    dense = dense_model(family)
    recipe = Calibrated(experts=6, shared=2, top_k=2, precision="float32")
    return dense, moecompile.convert(dense, recipe, [{"input_ids": rows} for rows in batches(4, 11)])


def front_pair(disjoint: bool = False) -> tuple[Any, Any]:
    """(dense, read-me), fresh copies; aligned: experts that overlap."""
    return copy.deepcopy(_front_pair(disjoint))


@cache
def _front_pair(disjoint: bool) -> tuple[Any, Any]:
    dense = dense_model()
    shape: dict[str, Any] = {"disjoint": True, "experts": 6, "shared": 2, "top_k": 2} if disjoint else {"active_fraction": 0.6}
    recipe = ReadMe(distillation=Distillation(steps=3), router_width=16, router_heads=2, router_mlp=16, **shape)
    data = {f"d{n}": [{"input_ids": rows % 33 + 33 * n}] for n, rows in enumerate(batches(3, 11))}
    return dense, moecompile.convert(dense, recipe, data).eval()


def run(folder: Path | None, steps: int = 8, kill_at: int | None = None, lora_rank: int = 0) -> tuple[Any, Tuning]:
    """Tune a fresh pair; with ``kill_at`` the process dies by SIGKILL once that many steps are done."""

    def on_step(done: int, row: dict[str, float]) -> None:
        if done == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    dense, moe = pair()
    config = TuneConfig(learning_rate=3e-3, oracle_weight=0.1, save_every=3, precision="float32", lora_rank=lora_rank)
    return moe, moecompile.tune(moe, dense, batches(8), config, steps=steps, folder=folder, on_step=on_step)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), kill_at=int(sys.argv[2]), lora_rank=int(sys.argv[3]))
