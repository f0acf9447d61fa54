"""The 13 families of transformers models as tiny random configurations, with what matching must find in each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf

VOCABULARY = 99
_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_BASE, "num_key_value_heads": 2}
_VISION = {"image_size": 32, "patch_size": 8}


@dataclass(frozen=True)
class Family:
    """A model class, its tiny config, and the FFNs that it has."""

    name: str
    model: str
    config: str
    settings: dict[str, Any]
    kind: str
    activation: str
    layout: str = "linear"
    bias: bool = False
    ffns: int = 2
    causal: bool = True
    width: int = 48

    def build(self, seed: int = 0, **changes: Any) -> torch.nn.Module:
        """A randomly initialised model in eval mode."""
        torch.manual_seed(seed)
        config = getattr(tf, self.config)(**{**self.settings, **changes})
        return getattr(tf, self.model)(config).eval()


FAMILIES = [
    Family("llama", "LlamaForCausalLM", "LlamaConfig", _GROUPED, "gated", "silu"),
    Family("mistral", "MistralForCausalLM", "MistralConfig", _GROUPED, "gated", "silu"),
    Family("qwen2", "Qwen2ForCausalLM", "Qwen2Config", _GROUPED, "gated", "silu"),
    Family("qwen3", "Qwen3ForCausalLM", "Qwen3Config", {**_GROUPED, "head_dim": 8}, "gated", "silu"),
    Family("gemma2", "Gemma2ForCausalLM", "Gemma2Config", {**_GROUPED, "head_dim": 8}, "gated", "gelu_tanh"),
    Family("gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", {**_GROUPED, "head_dim": 8}, "gated", "gelu_tanh"),
    Family("phi3", "Phi3ForCausalLM", "Phi3Config", _GROUPED, "gated", "silu", layout="fused"),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "n_inner": 48,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "plain",
        "gelu_tanh",
        layout="conv1d",
        bias=True,
    ),
    Family("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", _BASE, "plain", "gelu", bias=True),
    Family(
        "opt",
        "OPTForCausalLM",
        "OPTConfig",
        {
            **{k: v for k, v in _BASE.items() if k != "intermediate_size"},
            "ffn_dim": 48,
            "word_embed_proj_dim": 32,
        },
        "plain",
        "relu",
        bias=True,
    ),
    Family("bert", "BertForMaskedLM", "BertConfig", _BASE, "plain", "gelu", bias=True, causal=False),
    Family(
        "t5",
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "pad_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 0,
        },
        "plain",
        "relu",
        ffns=4,
        causal=False,
    ),
    Family(
        "vit",
        "ViTForImageClassification",
        "ViTConfig",
        {**{k: _BASE[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}, **_VISION},
        "plain",
        "gelu",
        bias=True,
        causal=False,
    ),
]
BY_NAME = {family.name: family for family in FAMILIES}


def batch_of(family: Family, tokens: int = 9, rows: int = 3, seed: int = 1) -> dict[str, Any]:
    """Inputs of another size than those that a capture guesses."""
    generator = torch.Generator().manual_seed(seed)
    if family.name == "vit":
        return {"pixel_values": torch.randn(rows, 3, 32, 32, generator=generator)}
    batch: dict[str, Any] = {"input_ids": torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)}
    if family.name == "t5":
        batch["decoder_input_ids"] = torch.randint(3, VOCABULARY, (rows, tokens - 2), generator=generator)
    return batch
