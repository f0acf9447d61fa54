"""Measuring a language model: perplexity over windows, last-word accuracy on LAMBADA."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from .apply import moe_blocks
from .errors import InputError
from .hub import check_positions, check_tokens
from .parity import evaluating
from .progress import Progress
from .text import start_of

_LOOK = 8  # tokens on which it is seen whether a model is causal
_PLACES = 8  # at so many places, where the first leave a doubt


def active_fraction(model: nn.Module) -> float:
    """FFN neurons computed per token over all neurons of the split FFNs, at the present top_k; 1 for a dense model.

    Padding of uneven experts is not counted as neurons; a block's experts are taken to be of mean size.
    """
    total = active = 0.0
    plan = getattr(model, "moecompile_plan", None)
    for site, block in zip(plan.sites if plan is not None else (), moe_blocks(model).values(), strict=False):
        width = block.spec.hidden_size
        total += site.site.intermediate_size * width
        active += site.active_at(block.top_k) * width
    return active / total if total else 1.0


@torch.no_grad()
def perplexity(
    model: nn.Module, rows: Tensor, *, dense_prefix: int = 0, skip: int = 0, progress: Progress | None = None
) -> dict[str, Any]:
    """Perplexity over windows without overlap, every position but the first of each window scored.

    Args:
        model: a causal language model whose outputs have ``logits``.
        rows: (W, length) int64 windows.
        dense_prefix: score only what follows the first P tokens of each window, which are processed with all experts on.
        skip: score only what follows the first P tokens, which are processed as the rest: what ``dense_prefix`` compares with.
        progress: shows how far the work is.

    Returns:
        ``perplexity, windows, window, tokens`` (scored), ``seconds``.

    Raises:
        InputError: the model has no logits, or the prefix leaves nothing to score.
    """
    length = rows.shape[1]
    for option, value in (("--dense-prefix", dense_prefix), ("--skip", skip)):
        if not 0 <= value < length - 1:
            raise InputError(f"{option} is {value}; with windows of {length} it can be 0 to {length - 2}")
    if dense_prefix and skip:
        raise InputError("--dense-prefix and --skip both leave the first tokens out of the score; give one of them")
    _refuse_encoder(model, "perplexity")
    device = next(model.parameters()).device
    total, scored, start = 0.0, 0, time.perf_counter()
    with evaluating(model):
        _check_causal(model, rows, "perplexity")
        for row in (progress or Progress()).over(rows, "perplexity", len(rows)):
            ids = row.unsqueeze(0).to(device)
            logits = (
                _logits_after_prefix(model, ids, dense_prefix)
                if dense_prefix
                else _logits(model, input_ids=ids, use_cache=False)[:, max(skip - 1, 0) :]
            )
            first = ids.shape[1] - logits.shape[1]
            targets = ids[0, first + 1 :]
            total += float(nn.functional.cross_entropy(logits[0, :-1].float(), targets, reduction="sum"))
            scored += len(targets)
    return {
        "perplexity": math.exp(total / scored) if total / scored < 700 else math.inf,
        "windows": len(rows),
        "window": length,
        "tokens": scored,
        "seconds": round(time.perf_counter() - start, 3),
    }


def _logits(model: nn.Module, **inputs: Any) -> Tensor:
    outputs = model(**inputs)
    if not isinstance(getattr(outputs, "logits", None), Tensor):
        raise InputError(f"{type(model).__name__} gives no logits; perplexity needs a causal language model")
    return outputs.logits


def _refuse_encoder(model: nn.Module, task: str) -> None:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise InputError(f"{type(model).__name__} has an encoder; {task} needs a causal language model")


def _check_causal(model: nn.Module, rows: Iterable[Tensor], task: str) -> None:
    """Refuse a model whose logits for a word change with the word: rows of token ids.

    Eight tokens show it. But an expert's sums are rounded by how many tokens it gets, and where a router weighs two experts
    alike that may turn its choice: if the first eight differ, most of eight places have to.
    """
    pieces = islice((piece for row in rows for piece in row.split(_LOOK) if len(piece) > 1), _PLACES)
    if not _sees_last(model, next(pieces)):
        return
    others = [_sees_last(model, piece) for piece in pieces]
    if 1 + sum(others) > (1 + len(others)) / 2:
        name = type(model).__name__
        raise InputError(f"{name} sees the words that it is to predict; {task} needs a causal language model")


def _sees_last(model: nn.Module, piece: Tensor) -> bool:
    """Whether the logits before the last of some tokens (L,) change with that one."""
    parameter = next(model.parameters())
    ids = piece.unsqueeze(0).to(parameter.device)
    other = ids.clone()
    other[:, -1] = torch.where(ids[:, -1] == ids[:, 0], ids[:, -1] - 1, ids[:, 0]).abs()
    one, two = (_logits(model, input_ids=each, use_cache=False)[:, :-1].float() for each in (ids, other))
    narrow = parameter.dtype in (torch.bfloat16, torch.float16)  # experts may be summed in another order
    return float((one - two).abs().max()) > (0.1 if narrow else 1e-4) * float(one.abs().max())


def _logits_after_prefix(model: nn.Module, ids: Tensor, prefix: int) -> Tensor:
    """Logits from the prefix's last position on: the prefix with all experts, the rest as the model is set."""
    from .parity import all_experts_on

    with all_experts_on(model):
        head = model(input_ids=ids[:, :prefix], use_cache=True)
    rest = model(input_ids=ids[:, prefix:], past_key_values=head.past_key_values, use_cache=True)
    return torch.cat([head.logits[:, -1:], rest.logits], dim=1)


@torch.no_grad()
def lambada(
    model: nn.Module, tokenizer: Any, passages: Sequence[str], *, batch: int = 8, progress: Progress | None = None
) -> dict[str, Any]:
    """Last-word accuracy: the share of passages whose every token of the last word is the model's likeliest one.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        passages: texts; the last word is what follows the last space.
        batch: passages at a time, right-padded.
        progress: shows how far the work is.

    Returns:
        ``accuracy, examples, perplexity`` (of the last word, per word), ``seconds``.

    Raises:
        InputError: a passage has a single word, more tokens than the model has positions or some that it does not know; the
            model is no causal language model.
    """
    _refuse_encoder(model, "lambada")
    start_tokens = start_of(tokenizer)
    examples = []
    for number, passage in enumerate(passages, 1):
        context, space, word = passage.rstrip().rpartition(" ")
        if not space or not context.strip():
            raise InputError(f"passage {number} has no last word to predict")
        before = tokenizer(context, add_special_tokens=False)["input_ids"]
        whole = tokenizer(f"{context} {word}", add_special_tokens=False)["input_ids"]
        target = whole[len(before) :]
        if not target or whole[: len(before)] != before:  # the word's first token reaches into the context
            target = tokenizer(" " + word, add_special_tokens=False)["input_ids"]
        tokens = [*start_tokens, *before, *target]
        check_positions(model, len(tokens), f"passage {number}")
        check_tokens(model, torch.tensor(tokens))
        examples.append((tokens, len(target)))
    order = sorted(range(len(examples)), key=lambda index: len(examples[index][0]))
    groups = [order[start : start + batch] for start in range(0, len(order), batch)]
    device = next(model.parameters()).device
    right, loss, start = 0, 0.0, time.perf_counter()
    with evaluating(model):
        _check_causal(model, (torch.tensor(examples[index][0]) for index in reversed(order)), "lambada")
        for group in (progress or Progress()).over(groups, "lambada", len(groups)):
            longest = max(len(examples[index][0]) for index in group)
            ids = torch.zeros(len(group), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(group):
                tokens = examples[index][0]
                ids[row, : len(tokens)] = torch.tensor(tokens)
                mask[row, : len(tokens)] = 1
            logits = _logits(model, input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
            for row, index in enumerate(group):
                tokens, width = examples[index]
                target = torch.tensor(tokens[-width:], device=device)
                scores = logits[row, len(tokens) - width - 1 : len(tokens) - 1].float()
                right += int((scores.argmax(-1) == target).all())
                loss += float(nn.functional.cross_entropy(scores, target, reduction="sum"))
    return {
        "accuracy": right / len(examples),
        "examples": len(examples),
        "perplexity": math.exp(min(700.0, loss / len(examples))),
        "seconds": round(time.perf_counter() - start, 3),
    }
