"""What a pre-gating router learns on a real model: agreement with the oracle, locality, its share of the decode time.

    python benchmarks/pregate.py --dispatch      # only how long deciding and dispatching take
    python benchmarks/pregate.py [--domains TEXT...] [--windows 16] [--steps 120] [--output benchmarks/results/pregate.json]

Domain experts (read-me, aligned) are made of the first seven eighths of each text; the router is distilled there, once for each
target, and measured on windows of the last eighth, which neither the experts nor the router saw.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moecompile import lowered
from moecompile.apply import build_blocks, install
from moecompile.capture import capture
from moecompile.checkpoint import adopt
from moecompile.distil import Distillation, agreement, distil, statistics
from moecompile.files import write_bytes
from moecompile.front import RouterLayer
from moecompile.hub import load_dense, load_tokenizer
from moecompile.match import match
from moecompile.plans import MoEPlan
from moecompile.pregate import PreGateSpec, PreGatingRouter, positions_of
from moecompile.progress import Progress
from moecompile.recipes import ReadMe
from moecompile.recipes.base import Context
from moecompile.recipes.read_me import _aligned_sites, embedder
from moecompile.targets import Targets, collect_targets, membership
from moecompile.text import read_text, token_ids, windows

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
NAMES = ("books", "code", "docs", "math", "wiki")
VARIANTS = {
    "overlap, temperature .25": Distillation(),
    "overlap, one-hot": Distillation(temperature=0.0),
    "overlap, reverse KL": Distillation(reverse=True),
    "overlap, locality 1": Distillation(locality=1.0),
    "centred overlap, temperature .25": Distillation(centred=True),
}


def main() -> None:
    """Collect targets once, train a router for each variant, time the last one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or .gguf file (default: SmolLM2-135M-Instruct, downloaded)")
    parser.add_argument("--domains", nargs="+", default=[str(ROOT / "examples" / "data" / f"{n}.txt") for n in NAMES])
    parser.add_argument("--windows", type=int, default=16, help="training windows of 512 tokens per text")
    parser.add_argument("--held", type=int, default=3, help="held-out windows per text")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--variants", type=int, default=len(VARIANTS), help="how many of the variants")
    parser.add_argument("--active-fraction", type=float, default=0.5)
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "results" / "pregate.json"))
    parser.add_argument("--dispatch", action="store_true", help="only time deciding and dispatching (no model is needed)")
    options = parser.parse_args()
    if options.dispatch:
        found = json.loads(Path(options.output).read_text(encoding="utf-8")) if Path(options.output).exists() else {}
        rows = dispatch_times(30, 576)  # SmolLM2-135M
        write(options.output, {**found, "dispatch": {"threads": torch.get_num_threads(), "rows": rows}})
        return
    if options.model is None:
        from fetch_model import fetch

        options.model = str(fetch())
    start = time.perf_counter()
    progress = Progress(quiet=False)
    tokenizer, model = load_tokenizer(options.model), load_dense(options.model).eval()
    train, held = texts(tokenizer, options)
    batches = [{"input_ids": rows} for part in train for rows in part.split(4)]
    domain_of = tuple(number for number, part in enumerate(train) for _ in part.split(4))
    names = tuple(Path(path).stem for path in options.domains)
    with torch.no_grad():
        captured = capture(model)
        matches = match(captured).matches
        recipe = ReadMe(active_fraction=options.active_fraction, ranking="activation", budget="even")  # as in the paper
        few = [number for number in range(len(batches)) if number % 4 == 0]  # a quarter of the windows ranks the neurons
        some, whose = [batches[number] for number in few], tuple(domain_of[number] for number in few)
        sites = _aligned_sites(recipe, Context(captured, matches, some, progress, 0, names, whose))
    say(f"experts: {time.perf_counter() - start:.0f} s")
    members = [membership(s.choosable, s.site.intermediate_size) for s in sites]
    targets = collect_targets(captured, matches, batches, members, aligned=True, progress=progress)
    say(f"training targets: {time.perf_counter() - start:.0f} s")
    unseen = collect_targets(
        captured,
        matches,
        [{"input_ids": rows} for part in held for rows in part.split(4)],
        members,
        aligned=True,
        progress=progress,
    )
    say(f"targets: {time.perf_counter() - start:.0f} s")
    embed = embedder(model, False)
    spec = PreGateSpec(len(names), model.get_input_embeddings().weight.shape[1])
    result: dict[str, Any] = {
        "model": Path(options.model).name, "domains": list(names), "train_tokens": targets.ids.numel(),
        "held_out_tokens": unseen.ids.numel(), "active_fraction": options.active_fraction, "steps": options.steps,
        "torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads(),
        "shared_neurons": [len(s.shared) for s in sites], "private_neurons": [len(s.experts[0]) for s in sites],
        "idle_neurons": [sum(map(len, s.experts[len(names):])) for s in sites],
        "oracle": oracle(unseen, held, names), "variants": [],
    }  # fmt: skip
    say(json.dumps({key: value for key, value in result.items() if not isinstance(value, list)}))
    for name, base in list(VARIANTS.items())[: options.variants]:
        settings = Distillation(**{**base.__dict__, "steps": options.steps, "held": 0.0})
        torch.manual_seed(0)
        router = PreGatingRouter(spec)
        begin = time.perf_counter()
        learnt = distil(router, embed, targets, settings, progress=progress)
        row = {"variant": name, **learnt, **agreement(router, embed, unseen, settings, statistics(targets.overlap)[0])}
        row["seconds"] = round(time.perf_counter() - begin, 1)
        result["variants"].append(row)
        say(json.dumps(row))
        write(options.output, result)
    result["decode"] = decode_share(model, sites, spec)
    result["seconds"] = round(time.perf_counter() - start, 1)
    say(json.dumps(result["decode"]))
    write(options.output, result)


def texts(tokenizer: Any, options: argparse.Namespace) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Windows of 512 tokens, spread over the first seven eighths of each text, and over its last eighth."""
    train, held = [], []
    for path in options.domains:
        rows = windows(token_ids(tokenizer, read_text(path)), 512)
        border = len(rows) * 7 // 8
        for part, count, into in ((rows[:border], options.windows, train), (rows[border:], options.held, held)):
            into.append(part[torch.linspace(0, len(part) - 1, min(count, len(part))).round().long()])
    return train, held


def oracle(unseen: Targets, held: list[torch.Tensor], names: tuple[str, ...]) -> dict[str, Any]:
    """How often the expert of largest overlap is that of the text's own domain, and how often each is chosen."""
    best = unseen.overlap.float().argmax(-1)
    own = torch.cat([torch.full((len(part), 1), number) for number, part in enumerate(held)])
    shares = torch.bincount(best.flatten(), minlength=len(names)).float() / best.numel()
    return {
        "own_domain": round(float((best == own).float().mean()), 5),
        "choice": dict(zip(names, [round(float(share), 5) for share in shares], strict=True)),
    }


@torch.no_grad()
def decode_share(model: Any, sites: Any, spec: PreGateSpec) -> dict[str, float]:
    """The router's share of a decoded token's time in eager mode, behind 256 tokens; medians of 30 steps."""
    plan = MoEPlan("read-me", {}, tuple(sites)).with_front(spec, {})
    moe: Any = adopt(install(model, plan, build_blocks(model, plan)), plan).eval()
    ids = torch.randint(100, 1000, (1, 256))
    cache = moe(input_ids=ids, use_cache=True).past_key_values
    inner, spent, whole = moe.pregate.begin, [], []

    def timed(*args: Any) -> Any:
        begin = time.perf_counter()
        outcome = inner(*args)
        spent.append(time.perf_counter() - begin)
        return outcome

    moe.pregate.begin = timed
    for _ in range(30):
        begin = time.perf_counter()
        moe(input_ids=ids[:, :1], past_key_values=cache)
        whole.append(time.perf_counter() - begin)
    router, step = sorted(spent)[15], sorted(whole)[15]
    return {"router_seconds": router, "step_seconds": step, "router_share": round(router / step, 5)}


@torch.no_grad()
def dispatch_times(layers: int, width: int, repeats: int = 60) -> list[dict[str, Any]]:
    """How long deciding and dispatching take in one step: routers and permutations of the layers, or of the front.

    The operators are those that the compiled graphs call (``lowered.route``, ``lowered.dispatch_op``) and the router of
    :mod:`moecompile.pregate` in eager mode, on random inputs of the model's shapes in float32; medians. Decoding stands behind
    256 tokens, prefill is one window of 512.

    Args:
        layers: L.
        width: D, of the hidden states and the embeddings.
        repeats: of each measurement.
    """
    apart = "the same experts, a router and a dispatch per layer"
    rows = []
    for name, experts, top_k, front, aligned in (
        ("aligned, hoisted", 5, 1, True, True),
        (apart, 5, 1, False, False),
        ("disjoint, hoisted", 96, 32, True, False),
        (apart, 96, 32, False, False),
    ):
        for phase, tokens, past in (("decode", 1, 256), ("prefill", 512, 0)):
            decide = at_front(layers, width, experts, top_k, aligned, tokens, past)
            if not front:
                decide = per_layer(layers, width, experts, top_k, tokens)
            parts = decide()
            permute = partial(permuted, parts, experts)
            found = {"what": name, "experts": experts, "top_k": top_k, "phase": phase, "tokens": tokens}
            found |= {"dispatches": len(parts), "decide_microseconds": round(median(decide, repeats) * 1e6, 1)}
            rows.append({**found, "dispatch_microseconds": round(median(permute, repeats) * 1e6, 1)})
            say(json.dumps(rows[-1]))
    return rows


def at_front(
    layers: int, width: int, experts: int, top_k: int, aligned: bool, tokens: int, past: int
) -> Callable[[], list[torch.Tensor]]:
    """One router for all layers: a function that gives the different ids (T, K), one or L of them."""
    torch.manual_seed(0)
    router = PreGatingRouter(PreGateSpec(experts, width, groups=1 if aligned else layers)).eval()
    x, cache = torch.randn(1, tokens, width), RouterLayer()
    if past:
        before = positions_of(1, past, 0, past, None, None, x.device)
        router.hidden(torch.randn(1, past, width), before, cache)

    def decide() -> list[torch.Tensor]:
        positions = positions_of(1, tokens, past, past + tokens, None, None, x.device)
        scores = router.scores(router.hidden(x, positions, cache if past else None))
        if past:
            cache.crop(-tokens)
        ids = torch.topk(scores, top_k, dim=-1).indices
        return [ids] if aligned else list(ids.unbind(1))

    return decide


def per_layer(layers: int, width: int, experts: int, top_k: int, tokens: int) -> Callable[[], list[torch.Tensor]]:
    """A linear router in each layer: a function that gives the ids (T, K) of each."""
    torch.manual_seed(0)
    weights, x = torch.randn(layers, experts, width) * width**-0.5, torch.randn(tokens, width)
    return lambda: [lowered.route(x, w, None, top_k, "none", False)[0] for w in weights]


def permuted(parts: list[torch.Tensor], experts: int) -> None:
    """The dispatches of a step."""
    for ids in parts:
        lowered.dispatch_op(ids, experts)


def median(work: Callable[[], Any], repeats: int) -> float:
    """Seconds."""
    taken = []
    for _ in range(repeats + 5):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return sorted(taken[5:])[repeats // 2]


def say(text: str) -> None:
    """A line at once: this runs in the background."""
    print(text, flush=True)


def write(path: str, result: dict[str, Any]) -> None:
    """The figures so far."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_bytes(Path(path), (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
