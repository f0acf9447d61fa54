"""What tuning learns best from, on a small model: settings side by side, same start, same tokens.

    python benchmarks/tuning_choices.py --text a.txt b.txt [--output benchmarks/results/tuning_choices.json]

A small Llama (4 layers, D 128, F 384, bytes as tokens) is trained on the first nine tenths of the texts, converted (by default
with half of its neurons active: 24 experts, 8 chosen, 8 shared slices), then tuned with each setting from the same start on the
same batches. Perplexity per byte on windows of the last tenth. One seed; it says which setting is better on a model of this
size, nothing about larger ones.

Two controls are tuned with the same loss on the same batches: the dense model itself (as a converted model that keeps every
neuron), because next words teach it the texts too, and a static mask of the same active fraction, refitted. What a setting
recovers has to be read beside the dense model tuned with it.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path

import torch
import transformers
from torch import Tensor

import moecompile
from moecompile.evaluate import perplexity
from moecompile.recipes import Calibrated, Static
from moecompile.tuning import TuneConfig

LENGTH, BATCH = 256, 4
ALL = ("router", "experts", "norms", "attention")
UNROUTED = ("experts", "norms", "attention")
SETTINGS: dict[str, dict[str, object]] = {
    "experts alone": {"stages": ("experts",)},
    "router alone, straight-through": {"stages": ("router",)},
    "router alone, oracle": {"stages": ("router",), "straight_through": False, "oracle_weight": 0.3},
    "both, straight-through": {},
    "both, oracle": {"straight_through": False, "oracle_weight": 0.3},
    "both, straight-through and oracle": {"oracle_weight": 0.3},
    "both, router rate x 10": {"router_rate": 1e-2},
    "both, no layer loss": {"layer_weight": 0.0},
    "both, layer loss x 4": {"layer_weight": 4.0},
    "both, logits at every 4th position": {"kl_stride": 4},
    "both and norms": {"stages": ("router", "experts", "norms")},
    "both, low rank 16": {"lora_rank": 16, "learning_rate": 1e-3},
    "both, rate x 3": {"learning_rate": 9e-4},
    "all but embeddings": {"stages": ALL},
    "all but embeddings, rate x 3": {"stages": ALL, "learning_rate": 9e-4},
    "all but embeddings, next words x .5": {"stages": ALL, "label_weight": 0.5},
    "all but embeddings, next words x 2": {"stages": ALL, "label_weight": 2.0},
    "all but embeddings, next words x .5, rate x 3": {"stages": ALL, "label_weight": 0.5, "learning_rate": 9e-4},
    "control: dense, next words x .5": {"start": "dense", "stages": UNROUTED, "label_weight": 0.5},
    "control: dense, next words x 2": {"start": "dense", "stages": UNROUTED, "label_weight": 2.0},
    "control: dense, next words x .5, rate x 3": {
        "start": "dense",
        "stages": UNROUTED,
        "label_weight": 0.5,
        "learning_rate": 9e-4,
    },
    "control: static, no next words": {"start": "static", "stages": UNROUTED},
    "control: static, next words x .5": {"start": "static", "stages": UNROUTED, "label_weight": 0.5},
    "control: static, next words x .5, rate x 3": {
        "start": "static",
        "stages": UNROUTED,
        "label_weight": 0.5,
        "learning_rate": 9e-4,
    },
    "both, rate / 3": {"learning_rate": 1e-4},
}


def windows(texts: list[Path]) -> tuple[Tensor, Tensor]:
    """(training windows, held-out windows) of bytes."""
    train, held = [], []
    for path in texts:
        data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()
        cut = int(0.9 * len(data))
        train.append(data[: cut // LENGTH * LENGTH].view(-1, LENGTH))
        held.append(data[cut:][: 4 * LENGTH].view(4, LENGTH))
    return torch.cat(train), torch.cat(held)


def train(rows: Tensor, steps: int) -> transformers.LlamaForCausalLM:
    """A small model that has learned something."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=LENGTH, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        batch = rows[torch.randint(0, len(rows), (2 * BATCH,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}: loss {float(loss.detach()):.3f}", file=sys.stderr, flush=True)
    return model.eval()


def main() -> None:
    """Train, convert, tune with each setting, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", type=Path, required=True)
    parser.add_argument("--train-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument(
        "--split", type=int, nargs=3, default=(24, 8, 8), metavar=("N", "S", "K"), help="experts, shared, chosen"
    )
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "tuning_choices.json")
    options = parser.parse_args()
    rows, held = windows(options.text)
    dense = train(rows, options.train_steps)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    calibration = [{"input_ids": part} for part in rows[order[:64]].split(8)]
    slices, shared, chosen = options.split
    active = (shared + chosen) / (slices + shared)
    recipes = {
        "converted": Calibrated(*options.split), "static": Static(active, "refit"), "dense": Static(1.0),
    }  # fmt: skip
    starts = {name: moecompile.convert(dense, recipe, calibration) for name, recipe in recipes.items()}
    batches = list(rows[order[64 : 64 + options.steps * BATCH]].split(BATCH))
    base = perplexity(dense, held)["perplexity"]
    results = [
        {"setting": f"{name}, not tuned", "perplexity": perplexity(model, held)["perplexity"]} for name, model in starts.items()
    ]
    print(results, file=sys.stderr, flush=True)
    for name in options.only:
        changes = dict(SETTINGS[name])
        moe, clock = copy.deepcopy(starts[str(changes.pop("start", "converted"))]), time.perf_counter()
        config = TuneConfig(**{"learning_rate": 3e-4, **changes})  # type: ignore[arg-type]
        done = moecompile.tune(moe, dense, batches, config)
        row = {"setting": name, "perplexity": perplexity(moe, held)["perplexity"], "config": config.to_dict()}
        results.append({**row, "tokens": done.tokens, "seconds": round(time.perf_counter() - clock, 1)})
        print(f"{name}: {row['perplexity']:.4f} ({row['perplexity'] / base:.4f} x dense)", file=sys.stderr, flush=True)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(
            json.dumps({"texts": [p.name for p in options.text], "split": list(options.split), "rows": results}, indent=1)
            + "\n"
        )
    print("| setting | perplexity | over dense |\n|---|---|---|")
    for row in results:
        print(f"| {row['setting']} | {row['perplexity']:.3f} | {row['perplexity'] / base:.4f} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
