"""``moecompile tune OUT --text TEXT...``: recover a converted model by distillation from the dense one."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..balancing import balance
from ..errors import InputError
from ..evaluate import active_fraction, perplexity
from ..files import check_new_folder, read_json
from ..hub import check_positions, check_tokens, load_dense, load_tokenizer, local_path
from ..precision import PRECISIONS
from ..progress import Progress
from ..text import check_weights
from ..tuning import TuneConfig, Tuning, share_tensors, tune
from ..tuning.config import STAGES
from ..tuning.data import Windows, split
from ..tuning.loop import fingerprint
from ..tuning.parallel import barrier, process_group, world
from ..tuning.state import STATE, latest, throw_away
from . import command
from .common import add_texts, checkpoint, device_of, peak_rss_bytes, progress_of, versions

_DEFAULTS = TuneConfig()
_DIAGNOSED = 4  # held-out windows at most; 5 of 512 tokens took 53 s for 30 layers
_CURVE_POINTS = 400  # of the curve in the record; the last checkpoint's is whole


def add(commands: Any) -> None:
    """The subcommand's options."""
    sub = command(
        commands,
        "tune",
        "Recover a converted model by distillation from the dense one; OUT is replaced once it is done.",
        "moecompile tune ./moe --text a.txt b.txt --tokens 500000 --stage router,experts",
    )
    sub.add_argument("out", metavar="OUT", type=Path, help="a converted folder")
    add_texts(sub, "--text", "UTF-8 text or .jsonl with a 'text' field; the last tenth of each is held out", required=True)
    sub.add_argument("--tokens", type=int, required=True, metavar="N", help="tokens to learn from, of all files")
    sub.add_argument(
        "--text-weights",
        nargs="+",
        type=float,
        metavar="W",
        help="each file's share of the tokens, in any unit (default: equal shares)",
    )
    sub.add_argument(
        "--stage",
        default=",".join(_DEFAULTS.stages),
        metavar="LIST",
        help=f"what is trained, together: any of {','.join(STAGES)} (default: {','.join(_DEFAULTS.stages)})",
    )
    sub.add_argument("--dense", metavar="MODEL", help="the dense model (default: the one that OUT's record names)")
    sub.add_argument("--output", type=Path, metavar="DIR", help="write the tuned model here and leave OUT alone")
    sub.add_argument("--overwrite", action="store_true", help="replace --output if it is there")
    sub.add_argument("--window", type=int, default=512, metavar="L", help="tokens per window (default: 512)")
    sub.add_argument("--batch", type=int, default=4, metavar="B", help="windows per step, of all devices (default: 4)")
    sub.add_argument("--held-out", type=int, default=2, metavar="H", help="held-out windows of each file (default: 2)")
    sub.add_argument("--restart", action="store_true", help="throw away an unfinished run's checkpoint")
    for name, kind, text in (
        ("learning_rate", float, "peak rate of AdamW for experts and norms"),
        ("router_rate", float, "peak rate of the routers, relative to their weights' own size"),
        ("front_rate", float, "peak rate of a router at the front"),
        ("rounds", int, "alternate, so many times, between the routers and the other stages; 0: all together"),
        ("router_share", float, "with --rounds: the routers' share of the steps"),
        ("round_decay", float, "with --rounds: each round's rates over the one's before"),
        ("warmup", float, "share of the steps in which the rate rises; a cosine to 0 follows"),
        ("weight_decay", float, "AdamW's"),
        ("clip", float, "largest norm of the gradients"),
        ("label_weight", float, "weight of the text's own next words beside the logits' KL"),
        ("layer_weight", float, "weight of the layers' relative error beside the logits' KL"),
        ("oracle_weight", float, "weight of the layers' routers' loss against the oracle choice"),
        ("front_weight", float, "weight of the distillation of a router at the front"),
        ("top_logits", int, "the teacher's largest logits that are matched one by one"),
        ("kl_stride", int, "match the logits at every n-th position alone: less work with the head"),
        ("lora_rank", int, "train low-rank updates of the experts' matrices; 0: the matrices"),
        ("save_every", int, "steps between checkpoints"),
    ):
        default = getattr(_DEFAULTS, name)
        flag = f"--{name.replace('_', '-')}"
        sub.add_argument(flag, type=kind, default=default, metavar="X", help=f"{text} (default: {default})")
    sub.add_argument(
        "--no-straight-through", action="store_true", help="no gradient to the routers through the experts' weights"
    )
    sub.add_argument(
        "--front-straight-through", action="store_true", help="such a gradient to a router at the front too: it may collapse"
    )
    sub.add_argument("--gradient-checkpointing", action="store_true", help="less memory: compute each layer twice")
    sub.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="auto: bfloat16 on a GPU and on a CPU that multiplies it natively, else float32",
    )
    sub.set_defaults(run=run)


def config_of(options: argparse.Namespace) -> TuneConfig:
    """The settings given.

    Raises:
        InputError: they make no sense.
    """
    same = (
        "learning_rate",
        "router_rate",
        "front_rate",
        "rounds",
        "router_share",
        "round_decay",
        "warmup",
        "weight_decay",
        "clip",
        "label_weight",
        "layer_weight",
        "oracle_weight",
        "front_weight",
        "top_logits",
    )
    config = TuneConfig(
        stages=tuple(part.strip() for part in options.stage.split(",") if part.strip()),
        **{name: getattr(options, name) for name in (*same, "kl_stride", "lora_rank", "save_every", "precision", "seed")},
        straight_through=not options.no_straight_through,
        front_straight_through=options.front_straight_through,
        checkpointing=options.gradient_checkpointing,
    )
    config.check()
    return config


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Check what can be checked first; then load, measure, tune, measure, save."""
    config = config_of(options)
    record = checkpoint.record_of(options.out)
    for name in ("tokens", "batch"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} is {getattr(options, name)}; it must be at least 1")
    if options.tokens < options.batch * options.window:
        raise InputError(f"--tokens is {options.tokens}; one step takes {options.batch * options.window} (--batch x --window)")
    check_weights("--text-weights", options.text_weights, len(options.text))
    target = options.output or options.out
    teacher, place = local_path(dense_of(options.dense, record)), target.resolve()
    if teacher is not None and (place in teacher.resolve().parents or teacher.resolve() in (place, *place.parents)):
        raise InputError(f"{target} is, holds or lies in the folder of the dense model, {teacher}; give another")
    check_new_folder(target, options.overwrite or options.output is None)
    with process_group(device_of(options)) as device:
        progress = progress_of(options) if world()[0] == 0 else Progress()
        result = _tune(options, config, record, target, device, progress)
    if "out" not in result:
        return {}
    text = (
        f"{target}: held-out perplexity {result['perplexity_before']:.3f} -> {result['perplexity_after']:.3f} "
        f"(dense {result['perplexity_dense']:.3f}), {result['tokens']} tokens, {result['tokens_per_second']:.0f} tokens/s"
    )
    return {"json": result, "text": text}


def _tune(
    options: argparse.Namespace,
    config: TuneConfig,
    record: dict[str, Any],
    target: Path,
    device: torch.device,
    progress: Progress,
) -> dict[str, Any]:
    start = time.perf_counter()
    tokenizer = load_tokenizer(str(options.out), trust_remote_code=options.trust_remote_code)
    parts, held = split(tokenizer, options.text, options.window, options.held_out)
    steps = options.tokens // (options.batch * options.window)
    batches = Windows(parts, steps, options.batch, options.seed, options.text_weights)
    folder = target.resolve()
    folder = folder.with_name(f".{folder.name}.tuning")
    facts = {"data": fingerprint(batches.rows[batches.order])}
    saved_before = None if options.restart else _saved_run(folder, target)
    barrier()  # all have looked
    if saved_before is not None and saved_before[0] == {"config": config.to_dict(), "steps": steps, **facts}:
        progress.say(f"{target} holds the result of this run already; its checkpoint was all that was left")
        if world()[0] != 0:
            return {}
        throw_away(folder)
        return {**saved_before[1], "out": str(target)}
    source = dense_of(options.dense, record)
    progress.say(f"loading {options.out} and {source}")
    moe = checkpoint.load(options.out, device=device)
    dense = load_dense(source, dtype=_dtype(moe), trust_remote_code=options.trust_remote_code).to(device)  # type: ignore[arg-type]
    check_positions(moe, options.window, "--window")
    check_tokens(moe, batches.rows)
    saved = share_tensors(moe, dense, config, _stages(record))
    progress.say(f"dense and converted model share {saved / 1e6:.0f} MB")
    if (options.restart or saved_before is not None) and world()[0] == 0:
        throw_away(folder)
    barrier()
    rows = held.to(device)
    before = _before(folder, moe, dense, rows, progress)
    try:
        tuning = tune(moe, dense, batches, config, folder=folder, facts=facts, progress=progress)
    except KeyboardInterrupt:
        if (state := latest(folder)) is None:
            raise
        raise InputError(f"interrupted; the same command goes on from {state}, --restart throws it away") from None
    after = perplexity(moe, rows, progress=progress)["perplexity"]
    result = _result(options, config, tuning, before, after, held)
    result["active_fraction"] = round(active_fraction(moe), 6)
    if world()[0] != 0:
        return {}
    some = rows[:: -(-len(rows) // _DIAGNOSED)]
    record["diagnosis"] = balance(moe, dense, [{"input_ids": row[None]} for row in some], progress=progress)
    if layers := record["diagnosis"]["layers"]:
        record["usage"] = [{"site": one["site"], "fraction": one["usage"]} for one in layers]
    result["seconds"] = round(time.perf_counter() - start, 3)
    result["peak_rss_bytes"] = peak_rss_bytes()
    curve = thinned(tuning.curve)
    record["tuning"] = [*record.get("tuning", ()), {**result, "curve": curve, "run": _run_mark(_state(folder)["settings"])}]
    record["evaluations"] = []  # they were the untuned model's
    record["versions"] = versions()
    checkpoint.save(moe, target, tokenizer=tokenizer, record=record, overwrite=options.overwrite or options.output is None)
    throw_away(folder)
    return {**result, "out": str(target)}


def _saved_run(folder: Path, target: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(settings, result) of the run whose last checkpoint lies in a folder, where the target is its result already.

    Such a run was killed while it threw the checkpoint away.
    """
    if latest(folder) is None or not checkpoint.is_converted(target):
        return None
    state, runs = _state(folder), checkpoint.record_of(target).get("tuning") or [{}]
    settings = state["settings"]
    if state["step"] < settings["steps"] or runs[-1].get("run") != _run_mark(settings):
        return None
    del settings["model"]  # the one that it began with is no longer there
    return settings, {key: value for key, value in runs[-1].items() if key not in ("curve", "run")}


def _state(folder: Path) -> dict[str, Any]:
    """What the newest checkpoint in a folder says of its run."""
    newest = latest(folder)
    assert newest is not None
    return read_json(newest / STATE)


def _run_mark(settings: dict[str, Any]) -> str:
    """A short mark of a run: of its settings, its data and the weights that it began with."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def dense_of(given: str | None, record: dict[str, Any]) -> str:
    """The dense model: the one given, or the one that the record names.

    Raises:
        InputError: neither is there.
    """
    if given is not None:
        return given
    source = record.get("source_path")
    if not source:
        raise InputError("the record does not say where the dense model is; give it with --dense")
    if str(source).startswith("/") and not Path(source).exists():
        raise InputError(f"the dense model is no longer at {source}; give it with --dense")
    return str(source)


def _dtype(model: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def _stages(record: dict[str, Any]) -> set[str]:
    """What earlier runs have trained."""
    return {stage for run in record.get("tuning", ()) for stage in run.get("stage", ())}


def _before(folder: Path, moe: nn.Module, dense: nn.Module, rows: Tensor, progress: Progress) -> dict[str, float]:
    """Held-out perplexities before the run, measured anew also for one that goes on: OUT still holds the untuned model."""
    if latest(folder) is not None:
        progress.say(f"an unfinished run lies in {folder}; --restart throws it away")
    return {
        "perplexity_before": perplexity(moe, rows, progress=progress)["perplexity"],
        "perplexity_dense": perplexity(dense, rows, progress=progress)["perplexity"],
    }


def _result(
    options: argparse.Namespace, config: TuneConfig, tuning: Tuning, before: dict[str, float], after: float, held: Tensor
) -> dict[str, Any]:
    facts = asdict(tuning)
    facts.pop("curve")
    return {
        **before,
        "perplexity_after": after,
        "tokens": tuning.tokens,
        "seconds": tuning.seconds,
        "training_seconds": tuning.seconds,
        **{name: facts[name] for name in ("steps", "tokens_per_second", "parameters", "resumed_from")},
        "stage": list(config.stages),
        "config": config.to_dict(),
        "window": options.window,
        "batch": options.batch,
        "texts": [Path(path).name for path in options.text],
        **({"weights": options.text_weights} if options.text_weights else {}),
        "held_out": {"share": 0.1, "windows": len(held), "tokens": held.numel()},
        "processes": world()[1],
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def thinned(curve: list[dict[str, float]]) -> list[dict[str, float]]:
    """At most 400 rows of a curve, each the mean of equally many steps (with the last one's step and tokens)."""
    size = -(-len(curve) // _CURVE_POINTS)
    rows = []
    for start in range(0, len(curve), size):
        part = curve[start : start + size]
        values = {key: [one[key] for one in part if key in one] for one in part for key in one}
        row = {key: sum(found) / len(found) for key, found in values.items()}
        rows.append({**row, "step": part[-1]["step"], "tokens": part[-1]["tokens"]})
    return [{key: float(f"{value:.6g}") for key, value in row.items()} for row in rows]
