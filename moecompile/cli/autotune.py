"""``moecompile autotune``: measure launch constants on this device; a run that was stopped goes on where it was."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch

from ..codegen.triton_backend import Unavailable, cache_folder, device_target
from ..codegen.triton_cache import Device
from ..codegen.triton_tuning import OnDevice, measured_limits, tune
from ..errors import CompileError, InputError
from . import command
from .codegen import add_spec, specs_of
from .common import device_of, progress_of


def add(commands: Any) -> None:
    """The subcommand's options."""
    sub = command(
        commands,
        "autotune",
        "Tune the Triton kernels on this device; results are kept and used from then on.",
        "moecompile autotune --shape 2048,768,128,8 --tokens 1,64,4096",
    )
    add_spec(sub)
    sub.add_argument(
        "--tokens", type=tokens, default=(1, 8, 64, 512, 4096), metavar="T,...", help="token counts (default: 1,8,64,512,4096)"
    )
    sub.add_argument("--most", type=int, default=40, metavar="M", help="configurations tried in a regime (default: 40)")
    sub.set_defaults(run=run)


def tokens(text: str) -> tuple[int, ...]:
    """1,8,64."""
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of positive numbers")
    return tuple(int(part) for part in parts)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Tune every spec that the options name.

    Raises:
        InputError: there is no GPU; a spec with weights that are stored otherwise or with shared neurons.
        CompileError: Triton is missing.
    """
    device = device_of(options)
    if device.type != "cuda":
        raise InputError(
            "kernels are tuned on the GPU that they run on, and there is none here; `moecompile codegen` needs none"
        )
    specs = specs_of(options)
    if any(spec.quantised for spec in specs):
        raise InputError("only weights in the format 'same' are tuned")
    progress, results = progress_of(options), []
    target, where = device_target(device), Device.of(device)
    try:
        for spec in specs:
            # The routed part is measured: shared neurons are not part of the key.
            tuned_spec = replace(spec, target=target, shared_width=0, shared_bias=False, output_bias=False)
            limits = measured_limits(getattr(torch, spec.dtype))
            found = tune(
                tuned_spec, options.tokens, where, cache_folder() / "tuning", OnDevice(tuned_spec), limits, options.most,
                say=progress.say,
            )  # fmt: skip
            results += [{"spec": spec.name, "device": where.name, **result.to_dict()} for result in found]
    except Unavailable as reason:
        raise CompileError(str(reason)) from None
    lines = [
        f"{r['regime']:>6} T={r['tokens']:<6} {r['microseconds']:9.1f} us {100 * r['fraction_of_floor']:4.0f} %"
        for r in results
    ]
    return {"json": {"results": results}, "text": "\n".join(lines)}
