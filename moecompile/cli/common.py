"""What the subcommands share: loading a model of any kind, the device, measuring memory."""

from __future__ import annotations

import argparse
import platform
import resource
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from .. import checkpoint
from ..errors import InputError
from ..hub import load_dense, load_tokenizer, local_path
from ..progress import Progress


def device_of(options: argparse.Namespace) -> torch.device:
    """The device asked for.

    Raises:
        InputError: there is no such device.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: there is no CUDA device; take --device cpu")
    if options.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(options.device)


def progress_of(options: argparse.Namespace) -> Progress:
    """Progress on stderr, unless --quiet."""
    return Progress(quiet=options.quiet)


def load_any(options: argparse.Namespace) -> tuple[nn.Module, bool]:
    """(model on its device, whether it is a converted one)."""
    path = local_path(options.model)
    if path is not None and checkpoint.is_converted(path):
        return checkpoint.load(path, device=device_of(options)), True
    model = load_dense(options.model, trust_remote_code=options.trust_remote_code)
    return model.to(device_of(options)), False  # type: ignore[arg-type]


def tokenizer_of(options: argparse.Namespace) -> Any:
    """The tokenizer of the model named on the command line."""
    return load_tokenizer(options.model, trust_remote_code=options.trust_remote_code)


def model_name(model: str) -> str:
    """A short name for records and tables: the folder's or file's own, or the hub id."""
    path = local_path(model)
    return model if path is None else (path.stem if path.is_file() else path.resolve().name)


def source_path(model: str) -> str:
    """Where the dense model is, for the record: the whole path of a folder or file, or the hub id."""
    path = local_path(model)
    return model if path is None else str(path.resolve())


def peak_rss_bytes() -> int:
    """The process's largest resident set so far."""
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def versions() -> dict[str, str]:
    """What the figures were measured with."""
    return {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}


def add_texts(parser: argparse.ArgumentParser, flag: str, text: str, required: bool = False) -> None:
    """An option that takes several text files."""
    parser.add_argument(flag, nargs="+", type=Path, metavar="TEXT", default=[], required=required, help=text)
