"""``moecompile convert MODEL OUT``: convert, check, save."""

from __future__ import annotations

import argparse
import datetime
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..balancing import balance
from ..conversion import Conversion, convert_with_record
from ..costs import as_stored
from ..distil import Distillation
from ..errors import InputError
from ..files import check_new_folder
from ..hub import check_positions, check_tokens, load_dense, local_path, stored_dtype
from ..plans import NORM_FIT
from ..precision import PRECISIONS
from ..recipes import RECIPES, Calibrated, ReadMe, Recipe
from ..recipes.survey import BUDGETS
from ..targets import TARGETS
from ..text import calibration_windows
from ..version import __version__
from . import command
from .common import (
    add_texts,
    checkpoint,
    device_of,
    model_name,
    peak_rss_bytes,
    progress_of,
    source_path,
    tokenizer_of,
    versions,
)

_HELD_OUT = 1024  # tokens (or a window) kept from calibration, on which the layers' errors and the experts' usage are measured
_BATCH, _BATCH_TOKENS = 4, 2048  # windows at most, and tokens
_MANY, _SHORT = 16, 128  # windows and tokens of the batch that budgets are measured on


def add(commands: Any) -> None:
    """The subcommand's options."""
    sub = command(
        commands,
        "convert",
        "Convert a dense model into an MoE, check that it is exact with all experts on, and save it.",
        "moecompile convert ./model ./moe --recipe calibrated --experts 96 --shared 32 --top-k 32 --calibration a.txt b.txt",
    )
    sub.add_argument("model", metavar="MODEL", help="a Hugging Face folder or id, or a .gguf file")
    sub.add_argument("out", metavar="OUT", type=Path, help="the folder to write; it is there whole or not at all")
    sub.add_argument("--recipe", choices=sorted(RECIPES), default="calibrated", help="how to split (default: calibrated)")
    sub.add_argument("--experts", type=int, metavar="N", help="routed experts, equal slices of the dense width")
    sub.add_argument("--shared", type=int, metavar="S", help="slices that are always on")
    sub.add_argument("--top-k", type=int, metavar="K", help="experts chosen per token; active fraction = (S + K) / (N + S)")
    sub.add_argument("--active-fraction", type=float, metavar="A", help="recipes static and flap: share of neurons that stay")
    sub.add_argument(
        "--budget",
        choices=BUDGETS,
        help="recipes calibrated and read-me: top-k (or working neurons) of each layer by what idle ones do to the model's "
        "output, as many on average, or even (default: effect)",
    )
    sub.add_argument(
        "--compensation",
        choices=("none", "means", "refit"),
        help="recipes static (default: none) and read-me (default: refit): for the idle neurons",
    )
    sub.add_argument(
        "--router",
        choices=("layerwise", "pregate"),
        help="a router in each layer, or one at the front for all of them; as the recipe has it (read-me: pregate)",
    )
    sub.add_argument(
        "--disjoint",
        action="store_const",
        const=True,
        help="recipe read-me: finer experts that do not overlap, and a decision for each layer, in place of one per text file",
    )
    sub.add_argument(
        "--ranking",
        choices=("activation", "output", "variance"),
        help="recipe read-me: neurons by mean |a| (the paper's), by mean |a| |w|, or by the variance of a, times |w|^2 "
        "(default: variance)",
    )
    sub.add_argument("--own-table", action="store_const", const=True, help="recipe read-me: the router's own embedding table")
    sub.add_argument(
        "--router-target",
        choices=TARGETS,
        help="recipe read-me: what the router learns, the paper's overlaps or, disjoint, which experts matter most "
        "(default: overlap, disjoint: amplitude)",
    )
    sub.add_argument(
        "--router-steps", type=int, metavar="N", help="recipe read-me: training steps of the router (default: 100)"
    )
    sub.add_argument(
        "--plain-statistics", action="store_const", const=True, help="recipe flap: all tokens alike, as in the paper"
    )
    sub.add_argument(
        "--scores",
        choices=("representative", "spectral", "mlp", "similarity"),
        help="the router: of cmoe representative (default) or spectral, of moefication mlp (default) or similarity",
    )
    sub.add_argument("--rank", type=int, metavar="R", help="recipe cmoe: rank of the spectral router (default: 16)")
    sub.add_argument(
        "--markers", type=int, metavar="M", help="recipe cmoe: neurons per token that count as active (default: 10)"
    )
    add_texts(sub, "--calibration", "UTF-8 text or .jsonl with a 'text' field, for recipes that look at data")
    sub.add_argument(
        "--calibration-tokens",
        type=int,
        default=81920,
        metavar="T",
        help="tokens in all (default: 81920)",
    )
    sub.add_argument(
        "--calibration-weights",
        nargs="+",
        type=float,
        metavar="W",
        help="each file's share of the tokens, in any unit: more for the kind of text that matters (default: equal shares)",
    )
    sub.add_argument("--calibration-window", type=int, default=512, metavar="L", help="tokens per window (default: 512)")
    sub.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="recipe calibrated: what products over calibration tokens are computed in (default: auto, bfloat16 where the "
        "device multiplies it natively)",
    )
    sub.add_argument(
        "--final-norm",
        action=argparse.BooleanOptionalAction,
        help="recipe calibrated: fit the norm before the head anew, to the dense model's next words (default: yes, where all "
        "experts on need not stay the dense model)",
    )
    sub.add_argument(
        "--keep-exact",
        action="store_true",
        help="keep the dense down projection beside a refitted one, and the dense final norm",
    )
    sub.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the saved weights (default: the source's)",
    )
    sub.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    sub.set_defaults(run=run)


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The recipe with the settings given; the others keep their defaults.

    Raises:
        InputError: a setting is given that the recipe does not have.
        PlanError: the numbers make no sense.
    """
    kind = RECIPES[options.recipe]
    names = {field.name for field in fields(kind)}
    given = {name: getattr(options, name) for name in _SETTINGS if getattr(options, name) is not None}
    for name in given:
        if name not in names:
            raise InputError(f"--{name.replace('_', '-')} has no meaning for the recipe '{options.recipe}'")
    if options.router is not None and (options.router == "pregate") != (kind is ReadMe):
        raise InputError(f"the recipe '{options.recipe}' has no {options.router} router; pregate is that of read-me")
    if options.router_steps is not None:
        if kind is not ReadMe:
            raise InputError(f"--router-steps has no meaning for the recipe '{options.recipe}'")
        given["distillation"] = Distillation(steps=options.router_steps)
    recipe = kind(**given)
    recipe.check()
    return recipe


_SETTINGS = (
    "experts", "shared", "top_k", "active_fraction", "budget", "compensation", "plain_statistics", "disjoint", "ranking",
    "own_table", "router_target", "scores", "rank", "markers", "precision", "final_norm",
)  # fmt: skip


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Check what can be checked first; then load, convert, save."""
    start = time.perf_counter()
    progress = progress_of(options)
    recipe = recipe_of(options)
    if options.calibration_weights and isinstance(recipe, ReadMe):
        raise InputError("--calibration-weights has no meaning for the recipe 'read-me', whose experts have a text each")
    if options.calibration_weights and not options.calibration:
        raise InputError("--calibration-weights are shares of the files of --calibration; none is given")
    if recipe.needs_calibration and not options.calibration:
        raise InputError(f"the recipe '{options.recipe}' looks at data; give text with --calibration")
    path = local_path(options.model)
    if path is not None and checkpoint.is_converted(path):
        raise InputError(f"{options.model} is converted already")
    if path is not None and path.resolve() in (options.out.resolve(), *options.out.resolve().parents):
        raise InputError(f"{options.out} lies in the model's own folder; give another")
    if path is not None and options.out.resolve() in path.resolve().parents:
        raise InputError(f"{options.out} holds {options.model} itself; give another folder")
    check_new_folder(options.out, options.overwrite)
    torch.manual_seed(options.seed)
    tokenizer = _tokenizer(options)
    windows = _windows(options, tokenizer) if options.calibration else None
    progress.say(f"loading {options.model}")
    model = load_dense(options.model, trust_remote_code=options.trust_remote_code)
    stored = stored_dtype(options.model, trust_remote_code=options.trust_remote_code)
    model = model.to(device_of(options))  # type: ignore[arg-type]
    held: Any = None
    batches: Any = None
    if windows is not None:
        check_positions(model, windows.shape[1], "--calibration-window")
        check_tokens(model, windows)
        rows = windows.to(next(model.parameters()).device)
        kept = _held(rows)
        batches = [inputs_of(model, part) for part in batched(rows[: len(rows) - kept], recipe)]
        held = [inputs_of(model, rows[len(rows) - kept :])] if kept else None
        if isinstance(recipe, ReadMe):
            batches = _by_domain(options, model, tokenizer, rows[len(rows) - kept :])
    loaded = time.perf_counter()
    conversion = convert_with_record(
        model, recipe, batches, held_out=held, keep_exact=options.keep_exact, seed=options.seed, progress=progress
    )
    diagnosis = balance(conversion.module, model, held, progress=progress) if held is not None else None
    dtype = stored if options.dtype == "auto" else getattr(torch, options.dtype)
    before = next(p.dtype for p in conversion.module.parameters() if p.is_floating_point())
    module = checkpoint.cast_weights(conversion.module.to("cpu"), dtype)
    record = _record(options, recipe, conversion, windows, as_stored(conversion.costs, module, before))
    if isinstance(recipe, ReadMe) and batches:
        record["calibration"]["tokens"] = sum(v.numel() for part in batches.values() for one in part for v in one.values())
    if diagnosis is not None and diagnosis["layers"]:
        record["diagnosis"] = diagnosis
    record["seconds"] = {"load": round(loaded - start, 3), **conversion.seconds, "total": round(time.perf_counter() - start, 3)}
    record["peak_rss_bytes"] = peak_rss_bytes()
    progress.say(f"writing {options.out}")
    checkpoint.save(module, options.out, tokenizer=tokenizer, record=record, overwrite=options.overwrite)
    result = {**record, "seconds": record["seconds"]["total"], "stages": record["seconds"], "out": str(options.out)}
    return {"json": result, "text": _summary(record, options.out)}


def _tokenizer(options: argparse.Namespace) -> Any:
    """The model's tokenizer; one that is missing is an error only where text is to be read."""
    try:
        return tokenizer_of(options)
    except InputError:
        if options.calibration:
            raise
        return None


def _windows(options: argparse.Namespace, tokenizer: Any) -> Tensor:
    """Calibration windows, and the few held out, drawn together so that they are different ones."""
    tokens = options.calibration_tokens
    if tokens >= options.calibration_window:
        tokens += held_windows(options.calibration_window) * options.calibration_window
    return calibration_windows(
        tokenizer, options.calibration, tokens, options.calibration_window, options.seed, options.calibration_weights
    )


def held_windows(length: int) -> int:
    """How many windows of so many tokens are held out."""
    return max(1, min(2, _HELD_OUT // max(1, length)))


def _held(rows: Tensor) -> int:
    return min(held_windows(rows.shape[1]), len(rows) - 1)


def batched(rows: Tensor, recipe: Recipe | None) -> list[Tensor]:
    """Calibration windows (W, L) in batches of a few.

    `calibrated` measures by its first batch what each layer does to the model's output. One of a few long windows would favour
    the kind of text that these happen to be of: it gets one of many short windows more, the others' beginnings.
    """
    parts = list(rows.split(max(1, min(_BATCH, _BATCH_TOKENS // rows.shape[1]))))
    several = isinstance(recipe, Calibrated) and len(rows) > _MANY and rows.shape[1] > _SHORT
    return [rows[:_MANY, :_SHORT], *parts] if several else parts


def _by_domain(options: argparse.Namespace, model: nn.Module, tokenizer: Any, held: Tensor) -> dict[str, list[dict[str, Any]]]:
    """Calibration inputs by text file, each with an equal share of the tokens, without the windows held out (H, L).

    Raises:
        InputError: two files have one name, or a file has nothing but what is held out.
    """
    names = [path.stem for path in options.calibration]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"two calibration files are called '{twice}'; a domain needs a name of its own")
    share = max(options.calibration_tokens // len(names), options.calibration_window)
    more = len(held) * options.calibration_window
    device = next(model.parameters()).device
    found = {}
    for name, path in zip(names, options.calibration, strict=True):
        rows = calibration_windows(tokenizer, [path], share + more, options.calibration_window, options.seed).to(device)
        rows = rows[~(rows[:, None] == held).all(-1).any(1)][: round(share / options.calibration_window)]
        if not len(rows):
            raise InputError(f"the calibration text {path} has no window beside those held out (--calibration-window)")
        found[name] = [inputs_of(model, part) for part in batched(rows, None)]
    return found


def inputs_of(model: nn.Module, rows: Tensor) -> dict[str, Any]:
    """Model inputs from windows (B, L): an encoder-decoder reads the first half and writes the second.

    Raises:
        InputError: the model does not read text.
    """
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise InputError(f"{type(model).__name__} does not read text; calibrate it through the Python interface")
    if getattr(model.config, "is_encoder_decoder", False):
        half = rows.shape[1] // 2
        return {"input_ids": rows[:, :half], "decoder_input_ids": rows[:, half:]}
    return {"input_ids": rows}


def _record(
    options: argparse.Namespace, recipe: Recipe, conversion: Conversion, windows: Tensor | None, costs: dict[str, Any]
) -> dict[str, Any]:
    plan = conversion.plan
    settings = {name: plan.config.get(name, value) for name, value in recipe.settings().items()}  # `auto` as it was read
    first = plan.sites[0]
    calibration = None
    if windows is not None and recipe.needs_calibration:
        held = _held(windows)
        calibration = {
            "files": [path.name for path in options.calibration],
            **({"weights": options.calibration_weights} if options.calibration_weights else {}),
            "tokens": (len(windows) - held) * windows.shape[1],
            "held_out_tokens": held * windows.shape[1],
            "window": windows.shape[1],
            "seed": options.seed,
        }
    return {
        "format": 1,
        "moecompile_version": __version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "source": model_name(options.model),
        "source_path": source_path(options.model),
        "recipe": plan.recipe,
        "recipe_config": settings,
        "experts": len(first.choosable),
        "shared": settings.get("shared", 1),
        "top_k": plan.top_k,
        **({"domains": plan.config["domains"]} if plan.config.get("domains") else {}),
        **({"final_norm": plan.config[NORM_FIT]} if plan.config.get(NORM_FIT) else {}),
        **({"router_training": plan.config["router_training"]} if plan.config.get("router_training") else {}),
        "router": plan.router,
        "active_fraction": round(plan.active_fraction, 6),
        "keep_exact": options.keep_exact,
        "parity_max_abs_error": conversion.parity_max_abs_error,
        "parity_tolerance": conversion.parity_tolerance,
        "routing_relative_error": conversion.routing_error,
        "calibration": calibration,
        "reconstruction": [
            {
                "site": row["site"],
                "relative_error": row["top_k"],
                "relative_error_uncompensated": row.get("uncompensated"),
                "relative_error_all_experts": row["all"],
            }
            for row in conversion.layers
        ],
        "usage": [{"site": row["site"], "fraction": row["usage"]} for row in conversion.layers if row["usage"]],
        "sites": [
            {
                **{key: value for key, value in s.site.to_dict().items() if key in _SITE_KEYS},
                "shared_neurons": len(s.shared),
                "experts": len(s.choosable),
                "expert_width": s.expert_width,
                "top_k": s.top_k,
                "router": s.router,
                "compensation": [name for name in s.fitted if not name.startswith("router.")],
            }
            for s in plan.sites
        ],
        "skipped": [skipped.to_dict() for skipped in conversion.matched.skipped],
        "costs": costs,
        "evaluations": [],
    }


_SITE_KEYS = ("name", "kind", "activation", "hidden_size", "intermediate_size", "bias", "layout")


def _norm_line(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    if "dense" in found:
        return f"final norm: the dense model's ({found['dense']})\n"
    return (
        f"final norm: {found['parameter']} fitted anew, divergence from the dense model's next words "
        f"{found['divergence_before']:.3f} -> {found['divergence']:.3f} nats\n"
    )


def _summary(record: dict[str, Any], out: Path) -> str:
    errors = [row["relative_error"] for row in record["reconstruction"]]
    mean = sum(errors) / len(errors) if errors else 0.0
    return (
        f"{out}: {record['recipe']}, {len(record['sites'])} FFNs, {record['active_fraction']:.0%} of their neurons active\n"
        f"all experts on, before compensation: max abs error {record['parity_max_abs_error']:.2e} "
        f"(allowed {record['parity_tolerance']:.0e})\n"
        f"chosen experts against the same dense neurons: relative error {record['routing_relative_error']:.1e}\n"
        f"relative error per layer at top_k: mean {mean:.3f}\n{_norm_line(record.get('final_norm'))}"
        f"{record['seconds']['total']:.0f} s, peak memory {record['peak_rss_bytes'] / 2**30:.2f} GiB"
    )
