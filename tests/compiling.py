"""What the tests of compilation share: small models, and a backend that leaves Inductor out."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import moecompile
from moecompile.compiled import compilation_of
from moecompile.recipes import Calibrated, Contiguous

VOCABULARY = 96


def dense_model(**changes: Any) -> LlamaForCausalLM:
    """A random Llama of two layers that never ends a text by itself."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, eos_token_id=None, bos_token_id=None, pad_token_id=0,
        **({"num_hidden_layers": 2, "intermediate_size": 64} | changes),
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids (batch, length) without the padding token."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


IDS = tokens(2, 11)


def batches() -> list[dict[str, torch.Tensor]]:
    """Calibration inputs."""
    return [{"input_ids": tokens(2, 16, seed)} for seed in range(4)]


def calibrated(dense: Any = None, **changes: Any) -> Any:
    """A model with routers, shared experts and compensation: every kind of operand."""
    recipe = Calibrated(experts=6, shared=2, top_k=2, **changes)
    return moecompile.convert(dense or dense_model(), recipe, calibration=batches()).eval()


def plain(dense: Any = None) -> Any:
    """A split model without compensation, its routers random."""
    moe = moecompile.convert(dense or dense_model(), Contiguous(experts=6, shared=2, top_k=2)).eval()
    generator = torch.Generator().manual_seed(1)
    for block in moecompile.moe_blocks(moe).values():
        block.router.weight.data = torch.randn(block.router.weight.shape, generator=generator)
    return moe


def without_inductor(fast: Any) -> Any:
    """Rewritten graphs run as they are: a tenth of the time, for tests in which Inductor has no part."""
    compilation = compilation_of(fast)
    compilation.options = compilation.backend.options = dataclasses.replace(compilation.options, inductor=False)
    return fast
