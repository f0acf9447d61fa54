"""``moecompile eval MODEL --text TEXT``: perplexity, or LAMBADA's last-word accuracy."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import nn

from ..apply import moe_blocks, set_top_k
from ..compiled import compile
from ..errors import CheckpointError, InputError
from ..evaluate import active_fraction, lambada, perplexity
from ..hub import check_positions, check_tokens
from ..text import evaluation_windows, read_passages, shares
from . import command
from .common import add_texts, checkpoint, load_any, progress_of, tokenizer_of


def add(commands: Any) -> None:
    """The subcommand's options."""
    sub = command(
        commands,
        "eval",
        "Measure perplexity or LAMBADA accuracy.",
        "moecompile eval ./moe --text wiki.test.raw --max-windows 16",
    )
    sub.add_argument("model", metavar="MODEL", help="a converted folder, a Hugging Face folder or id, or a .gguf file")
    add_texts(sub, "--text", "UTF-8 text or .jsonl with a 'text' field", required=True)
    sub.add_argument(
        "--task", choices=("perplexity", "lambada"), default="perplexity", help="what to measure (default: perplexity)"
    )
    sub.add_argument("--window", type=int, default=1024, metavar="L", help="tokens per window (default: 1024)")
    sub.add_argument("--max-windows", type=int, metavar="M", help="take only M windows, the first of each text (default: all)")
    sub.add_argument(
        "--max-examples",
        type=int,
        metavar="M",
        help="lambada: only M passages, the first of each file (default: all)",
    )
    sub.add_argument("--top-k", type=int, metavar="K", help="experts chosen per token (default: as converted)")
    sub.add_argument(
        "--dense-prefix",
        type=int,
        default=0,
        metavar="P",
        help="process the first P tokens of a window with all experts, score the rest; they are the dense model where "
        "the folder was converted with --keep-exact, or nothing was refitted",
    )
    sub.add_argument("--skip", type=int, default=0, metavar="P", help="score only what follows the first P tokens of a window")
    sub.add_argument("--compile", action="store_true", help="compile the model first (a minute or two); pays for long texts")
    sub.add_argument("--no-record", action="store_true", help="do not add the figure to the converted folder's record")
    sub.set_defaults(run=run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Load, measure, add to the record."""
    progress = progress_of(options)
    tokenizer = tokenizer_of(options)
    if options.task == "lambada":
        if options.dense_prefix or options.skip:
            raise InputError("--dense-prefix and --skip have no meaning for lambada, which scores the last word alone")
        files = [read_passages(path) for path in options.text]
        counts = [len(file) for file in files]
        if options.max_examples is not None:
            if options.max_examples < len(files):
                raise InputError(f"--max-examples is {options.max_examples}; it must be at least {len(files)}")
            counts = shares(options.max_examples, counts)
        passages = [passage for file, count in zip(files, counts, strict=True) for passage in file[:count]]
    else:
        rows = evaluation_windows(tokenizer, options.text, options.window, options.max_windows)
    model, converted = load_any(options)
    if options.dense_prefix and not converted:
        raise InputError("--dense-prefix is for a converted model; a dense one has no experts to switch")
    if options.top_k is not None:
        set_top_k(model, options.top_k)
    if options.compile:
        model = compile(model)
        progress.say("compiling")
    if options.task == "lambada":
        measured = lambada(model, tokenizer, passages, progress=progress)
    else:
        check_positions(model, options.window, "--window")
        check_tokens(model, rows)
        measured = perplexity(model, rows, dense_prefix=options.dense_prefix, skip=options.skip, progress=progress)
    result: dict[str, Any] = {
        "name": model.moecompile_plan.recipe if converted else "dense",  # type: ignore[union-attr]
        "task": options.task,
        "corpus": "+".join(Path(path).name for path in options.text),
        **measured,
        "active_fraction": round(active_fraction(model), 6),
        "top_k": _common_top_k(model),
    }
    for name in ("dense_prefix", "skip", "compile"):
        if getattr(options, name):
            result[name] = getattr(options, name)
    if options.dense_prefix:
        result["dense_prefix_exact"] = checkpoint.exact(model, checkpoint.record_of(options.model))
        if not result["dense_prefix_exact"]:
            progress.say("all experts on is not the dense model here, which was refitted or tuned; see --keep-exact of convert")
    if converted and not options.no_record:
        _record(options, result)
    figure = f"accuracy {result['accuracy']:.4f}" if options.task == "lambada" else f"perplexity {result['perplexity']:.3f}"
    amount = (
        f"{result['examples']} passages" if options.task == "lambada" else f"{result['windows']} windows of {result['window']}"
    )
    active = f"{result['active_fraction']:.0%} of FFN neurons active"
    text = f"{figure}  ({result['corpus']}, {amount}, {active}, {result['seconds']:.1f} s)"
    return {"json": result, "text": text}


def _record(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Replace the same measurement in the folder's record, or add it; a folder that cannot be written keeps its old one."""
    try:
        record = checkpoint.record_of(options.model)
        same = ("task", "corpus", "window", "windows", "examples", "top_k", "dense_prefix", "skip", "name")
        others = [e for e in record.get("evaluations", ()) if any(e.get(key) != result.get(key) for key in same)]
        record["evaluations"] = [*others, result]
        checkpoint.update_record(options.model, record)
    except CheckpointError as error:
        progress_of(options).say(f"the figure was not recorded: {error}")


def _common_top_k(model: nn.Module) -> int | None:
    """The number of experts chosen per token; None where layers differ (and for a dense model)."""
    dials = {block.top_k for block in moe_blocks(model).values()}
    return dials.pop() if len(dials) == 1 else None
