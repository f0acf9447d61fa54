"""Text from a model, with its KV cache."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from .errors import InputError
from .hub import check_positions


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    chat: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Continue a prompt.

    Args:
        model: a transformers model that generates.
        tokenizer: its tokenizer.
        prompt: the text to continue.
        max_new_tokens: at most so many.
        temperature: 0 for greedy decoding.
        top_p: nucleus sampling, with a temperature.
        chat: wrap the prompt as a user's message by the tokenizer's chat template.
        seed: of the sampling.

    Returns:
        ``text`` (the continuation), ``prompt_tokens, new_tokens, seconds, tokens_per_second``.

    Raises:
        InputError: the model does not generate, or an option makes no sense.
    """
    own_generate: Any = getattr(model, "generate", None)
    if not callable(own_generate):
        raise InputError(f"{type(model).__name__} does not generate text")
    if max_new_tokens < 1:
        raise InputError(f"--max-new-tokens is {max_new_tokens}; it must be at least 1")
    if temperature < 0 or not 0 < top_p <= 1:
        raise InputError("--temperature cannot be negative, and --top-p must be above 0 and at most 1")
    if chat:
        if getattr(tokenizer, "chat_template", None) is None:
            raise InputError("the tokenizer has no chat template; leave --chat away")
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    device = next(model.parameters()).device
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).to(device)
    if inputs["input_ids"].shape[1] == 0:
        raise InputError("the prompt is empty")
    encoded = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    if encoded:  # the prompt is read by the encoder; what is generated begins with a token of the decoder's own
        check_positions(model, inputs["input_ids"].shape[1], "the prompt")
        check_positions(model, 1 + max_new_tokens, "--max-new-tokens")
    else:
        check_positions(model, inputs["input_ids"].shape[1] + max_new_tokens, "the prompt with --max-new-tokens")
    options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        options = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}  # by default transformers has 50
    torch.manual_seed(seed)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    start = time.perf_counter()
    output = own_generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        use_cache=True,
        **options,
    )
    seconds = time.perf_counter() - start
    new = output[0, 1 if encoded else inputs["input_ids"].shape[1] :]
    return {
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "prompt_tokens": int(inputs["input_ids"].shape[1]),
        "new_tokens": len(new),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(len(new) / seconds, 3) if seconds else 0.0,
    }
