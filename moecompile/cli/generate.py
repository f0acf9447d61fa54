"""``moecompile generate MODEL --prompt P``: text, with the KV cache."""

from __future__ import annotations

import argparse
from typing import Any

from ..apply import set_top_k
from ..compiled import compile
from ..generate import generate
from . import command
from .common import load_any, progress_of, tokenizer_of

_UNSET = object()  # None is a value: all experts


def add(commands: Any) -> None:
    """The subcommand's options."""
    sub = command(
        commands,
        "generate",
        "Continue a prompt.",
        'moecompile generate ./moe --prompt "The capital of France is" --max-new-tokens 32',
    )
    sub.add_argument("model", metavar="MODEL", help="a converted folder, a Hugging Face folder or id, or a .gguf file")
    sub.add_argument("--prompt", required=True, metavar="P", help="the text to continue")
    sub.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="at most so many tokens (default: 64)")
    sub.add_argument("--temperature", type=float, default=0.0, help="0 for greedy decoding (default)")
    sub.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling, with a temperature (default: 1)")
    sub.add_argument("--chat", action="store_true", help="wrap the prompt by the tokenizer's chat template")
    sub.add_argument("--top-k", type=int, metavar="K", help="experts chosen per token (default: as converted)")
    sub.add_argument(
        "--prefill-top-k",
        type=_experts,
        default=_UNSET,
        metavar="K",
        help="experts for the prompt's tokens, or 'all' (default: as --top-k)",
    )
    sub.add_argument("--compile", action="store_true", help="compile the model first (a minute or two for the first time)")
    sub.set_defaults(run=run)


def _experts(text: str) -> int | None:
    return None if text == "all" else int(text)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Load, compile where asked for, generate."""
    model, _ = load_any(options)
    tokenizer = tokenizer_of(options)
    if options.top_k is not None:
        set_top_k(model, options.top_k)
    if options.prefill_top_k is not _UNSET:
        set_top_k(model, options.prefill_top_k, phase="prefill")
    if options.compile:
        model = compile(model)
        progress_of(options).say("compiling")
        generate(model, tokenizer, options.prompt, max_new_tokens=3, chat=options.chat, seed=options.seed)
    result = generate(
        model,
        tokenizer,
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        chat=options.chat,
        seed=options.seed,
    )
    return {"json": result, "text": result["text"]}
