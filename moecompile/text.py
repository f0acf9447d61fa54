"""Text files in, windows of tokens out."""

from __future__ import annotations

import json
import math
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
            passages[-1].encode()
        except UnicodeEncodeError:  # half of an escaped pair, "\\ud83d"
            raise InputError(f"{path}, line {number}: the text holds half a character, which UTF-8 has not") from None
        except (ValueError, KeyError, TypeError, AssertionError):
            raise InputError(f"{path}, line {number}: not a JSON object with a 'text' field") from None
    if not passages:
        raise InputError(f"{path} is empty")
    return passages


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, without special ones."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def start_of(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts before a text, if that is its token for the beginning: models that were trained with one,
    such as Llama and Gemma, need it in every window."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def windows(ids: Sequence[int], length: int, start: Sequence[int] = ()) -> Tensor:
    """(W, length) int64: windows without overlap, each behind the tokens ``start``; a rest shorter than one is left out."""
    own = length - len(start)
    count = len(ids) // own
    rows = torch.tensor(ids[: count * own], dtype=torch.long).reshape(count, own)
    return torch.cat([torch.tensor(start, dtype=torch.long).expand(count, -1), rows], 1) if start else rows


def evaluation_windows(tokenizer: Any, paths: Iterable[str | Path], length: int, most: int | None) -> Tensor:
    """The first windows of each text, ``most`` in all, shared evenly.

    Raises:
        InputError: a file cannot be read, or there is less than one window.
    """
    if length < 2:
        raise InputError(f"--window is {length}; a window needs at least 2 tokens")
    if most is not None and most < 1:
        raise InputError(f"--max-windows is {most}; it must be at least 1")
    parts: list[Tensor] = []
    start = start_of(tokenizer)
    for path in paths:
        ids = token_ids(tokenizer, read_text(path))
        parts.append(windows(ids, length, start=start))
        if len(parts[-1]) == 0:
            raise InputError(f"{path} has {len(ids)} tokens; one window needs {length - len(start)} (--window)")
    if most is not None:
        if most < len(parts):
            raise InputError(f"--max-windows is {most}; it must be at least {len(parts)}, one for each text")
        parts = [part[:count] for part, count in zip(parts, shares(most, [len(part) for part in parts]), strict=True)]
    return torch.cat(parts)


def check_weights(option: str, weights: Sequence[float] | None, files: int) -> None:
    """Refuse weights of texts that are not one positive number for each file.

    Raises:
        InputError: names the option.
    """
    if weights is None:
        return
    if len(weights) != files:
        raise InputError(f"{option} has {len(weights)} numbers for {files} files")
    if not (all(weight > 0 for weight in weights) and sum(weights) < math.inf):
        raise InputError(f"{option} is {' '.join(f'{weight:g}' for weight in weights)}; weights are above 0")


def shares(total: int, sizes: Sequence[int], weights: Sequence[float] | None = None) -> list[int]:
    """How many of ``total`` windows each text gives: in proportion to its weight, and all that it has where that is less.

    Args:
        total: windows wanted.
        sizes: windows that each text has.
        weights: of each text, positive; None: all alike.

    Returns:
        Windows of each text; in all ``total``, or ``sum(sizes)`` where that is less.
    """
    parts = [1.0] * len(sizes) if weights is None else [weight / max(weights) for weight in weights]
    given, left = list(sizes), total
    some = list(range(len(sizes)))  # the texts that give a part of what they have
    while some:
        whole = sum(parts[index] for index in some)
        quotas = {index: left * parts[index] / whole for index in some}
        short = [index for index in some if sizes[index] <= quotas[index]]
        if not short:
            break
        left -= sum(sizes[index] for index in short)
        some = [index for index in some if index not in short]
    for index in some:
        given[index] = int(quotas[index])
    rest = left - sum(given[index] for index in some)
    for index in sorted(some, key=lambda index: int(quotas[index]) - quotas[index])[:rest]:  # the largest remainders
        given[index] += 1
    return given


def calibration_windows(
    tokenizer: Any,
    paths: Sequence[str | Path],
    tokens: int,
    length: int,
    seed: int,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """About ``tokens`` tokens as (W, length) windows, each file's share spread over it at random places, all of them mixed.

    Args:
        tokenizer: the model's.
        paths: the files.
        tokens: how many in all; fewer where the files together have fewer.
        length: tokens per window.
        seed: of the windows' places and order.
        weights: each file's share, in any unit; None: equal shares. What a short file lacks the others give.

    Raises:
        InputError: a file cannot be read, or is shorter than a window; the weights do not fit the files.
    """
    if length < 2:
        raise InputError(f"--calibration-window is {length}; a window needs at least 2 tokens")
    if tokens < length:
        raise InputError(f"--calibration-tokens is {tokens}; one window needs {length} (--calibration-window)")
    check_weights("--calibration-weights", weights, len(paths))
    generator = torch.Generator().manual_seed(seed)
    start = start_of(tokenizer)
    wholes = []
    for path in paths:
        wholes.append(windows(token_ids(tokenizer, read_text(path)), length, start=start))
        if len(wholes[-1]) == 0:
            raise InputError(
                f"the calibration text {path} is shorter than one window of {length} tokens (--calibration-window)"
            )
    counts = shares(max(1, round(tokens / length)), [len(whole) for whole in wholes], weights)
    parts = []
    for whole, count in zip(wholes, counts, strict=True):
        chosen = torch.randperm(len(whole), generator=generator)[:count].sort().values
        parts.append(whole[chosen])
    rows = torch.cat(parts)
    return rows[torch.randperm(len(rows), generator=generator)]
