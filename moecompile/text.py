"""Text files in, windows of tokens out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InputError


def read_text(path: str | Path) -> str:
    """A UTF-8 text file, or the ``text`` fields of a ``.jsonl`` file, joined by newlines.

    Raises:
        InputError: it is missing, not UTF-8, empty, or a line has no ``text``.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        return "\n".join(read_passages(path))
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"there is no text file {path}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if not text.strip():
        raise InputError(f"{path} is empty")
    return text


def read_passages(path: str | Path) -> list[str]:
    """The ``text`` field of each line of a ``.jsonl`` file.

    Raises:
        InputError: it is missing, or a line is not such a record.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON may hold other line separators unescaped
    except FileNotFoundError:
        raise InputError(f"there is no text file {path}") from None
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}") from None
    passages = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            passages.append(json.loads(line)["text"])
            assert isinstance(passages[-1], str)
        except (ValueError, KeyError, TypeError, AssertionError):
            raise InputError(f"{path}, line {number}: not a JSON object with a 'text' field") from None
    if not passages:
        raise InputError(f"{path} is empty")
    return passages


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, without special ones."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def windows(ids: Sequence[int], length: int, most: int | None = None) -> Tensor:
    """(W, length) int64: windows without overlap; a rest shorter than a window is left out."""
    count = len(ids) // length
    count = count if most is None else min(count, most)
    return torch.tensor(ids[: count * length], dtype=torch.long).reshape(count, length)


def evaluation_windows(tokenizer: Any, paths: Iterable[str | Path], length: int, most: int | None) -> Tensor:
    """The first windows of the texts, one after the other.

    Raises:
        InputError: a file cannot be read, or there is less than one window.
    """
    if length < 2:
        raise InputError(f"--window is {length}; a window needs at least 2 tokens")
    if most is not None and most < 1:
        raise InputError(f"--max-windows is {most}; it must be at least 1")
    parts: list[Tensor] = []
    for path in paths:
        ids = token_ids(tokenizer, read_text(path))
        left = None if most is None else most - sum(len(part) for part in parts)
        parts.append(windows(ids, length, left))
        if len(parts[-1]) == 0 and (left is None or left > 0):
            raise InputError(f"{path} has {len(ids)} tokens; one window needs {length} (--window)")
    return torch.cat(parts)


def calibration_windows(tokenizer: Any, paths: Sequence[str | Path], tokens: int, length: int, seed: int) -> Tensor:
    """About ``tokens`` tokens as (W, length) windows, an equal share from each file, spread over it at random places.

    Raises:
        InputError: a file cannot be read, or is shorter than a window.
    """
    if length < 2:
        raise InputError(f"--calibration-window is {length}; a window needs at least 2 tokens")
    if tokens < length:
        raise InputError(f"--calibration-tokens is {tokens}; one window needs {length} (--calibration-window)")
    generator = torch.Generator().manual_seed(seed)
    total = max(1, round(tokens / length))
    shares = [total // len(paths) + (1 if index < total % len(paths) else 0) for index in range(len(paths))]
    parts = []
    for path, share in zip(paths, shares, strict=True):
        whole = windows(token_ids(tokenizer, read_text(path)), length)
        if len(whole) == 0:
            raise InputError(
                f"the calibration text {path} is shorter than one window of {length} tokens (--calibration-window)"
            )
        chosen = torch.randperm(len(whole), generator=generator)[:share].sort().values
        parts.append(whole[chosen])
    rows = torch.cat(parts)
    return rows[torch.randperm(len(rows), generator=generator)]
