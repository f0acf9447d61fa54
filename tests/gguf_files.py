"""Writing a tiny Llama as a GGUF file, as llama.cpp's own converter lays it out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor, nn


def write_llama(model: nn.Module, path: Path) -> Path:
    """A Llama of transformers as a float32 GGUF file without a tokenizer."""
    from gguf import GGUFWriter

    config = model.config
    writer = GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    state = model.state_dict()

    def add(name: str, tensor: Tensor) -> None:
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(tensor.float().numpy()))

    add("token_embd", state["model.embed_tokens.weight"])
    add("output_norm", state["model.norm.weight"])
    if not config.tie_word_embeddings:
        add("output", state["lm_head.weight"])
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        add(f"{theirs}.attn_norm", state[f"{ours}.input_layernorm.weight"])
        add(f"{theirs}.ffn_norm", state[f"{ours}.post_attention_layernorm.weight"])
        add(f"{theirs}.attn_q", interleaved(state[f"{ours}.self_attn.q_proj.weight"], config.num_attention_heads))
        add(f"{theirs}.attn_k", interleaved(state[f"{ours}.self_attn.k_proj.weight"], config.num_key_value_heads))
        add(f"{theirs}.attn_v", state[f"{ours}.self_attn.v_proj.weight"])
        add(f"{theirs}.attn_output", state[f"{ours}.self_attn.o_proj.weight"])
        for part in ("gate", "up", "down"):
            add(f"{theirs}.ffn_{part}", state[f"{ours}.mlp.{part}_proj.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """The rows of a query or key projection in llama.cpp's rotary order: the two halves of each head interleaved."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
