"""``moecompile explain MODEL``: what would be split, and what stands in the way elsewhere; nothing is written."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import InputError
from ..explanation import explain
from ..hub import load_dense, local_path
from . import command
from .common import checkpoint, device_of, progress_of


def add(commands: Any) -> None:
    """The subcommand's options."""
    sub = command(
        commands,
        "explain",
        "Show which feed-forward networks a model has and what splitting skips.",
        "moecompile explain ./model",
    )
    sub.add_argument("model", metavar="MODEL", help="a Hugging Face folder or id, or a .gguf file")
    sub.set_defaults(run=run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Capture and match."""
    path = local_path(options.model)
    if path is not None and checkpoint.is_converted(path):
        raise InputError(
            f"{options.model} is converted already; moecompile report {options.model} shows what is known about it"
        )
    progress = progress_of(options)
    progress.say(f"loading {options.model}")
    model = load_dense(options.model, trust_remote_code=options.trust_remote_code).to(device_of(options))  # type: ignore[arg-type]
    progress.say("capturing")
    explanation = explain(model)
    return {"json": explanation.to_dict(), "text": str(explanation)}
