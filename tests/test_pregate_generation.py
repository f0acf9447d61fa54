"""Generation of pre-gated models: both caches against the whole prefix, for every family and kind of cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiling import tokens
from families import FAMILIES
from pregating import pregated_model
from transformers.cache_utils import DynamicCache, StaticCache

from moecompile.front import RouterLayer

EXACT: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
QUICK = ("llama", "gemma2", "gpt2", "opt")
FAMILIES_AND_VARIANTS = [
    *(pytest.param(f.name, True, marks=() if f.name in QUICK else pytest.mark.slow) for f in FAMILIES if f.causal),
    pytest.param("gemma2", False),
    pytest.param("gpt2", False, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "aligned"), FAMILIES_AND_VARIANTS)
def test_generation_is_that_of_the_whole_prefix(name: str, aligned: bool) -> None:
    """Both caches, a left-padded batch: each row's logits are those of its own prefix computed from nothing."""
    model = pregated_model(name, aligned)
    rows = [tokens(1, 5, 1)[0].clamp_min(3), tokens(1, 9, 2)[0].clamp_min(3)]
    ids = torch.zeros(2, 9, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, own in enumerate(rows):
        ids[row, -len(own) :], mask[row, -len(own) :] = own, 1
    out = model.generate(
        ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, eos_token_id=None, **GREEDY
    )
    for row, own in enumerate(rows):
        whole = torch.cat([own, out.sequences[row, 9:]])[None]
        with torch.no_grad():
            logits = model(input_ids=whole, use_cache=False).logits[0, len(own) - 1 : -1]
        torch.testing.assert_close(torch.stack([step[row] for step in out.logits]), logits, **EXACT)


def test_cache_holds_one_layer_more() -> None:
    model = pregated_model()
    cache = model(input_ids=tokens(1, 6), use_cache=True).past_key_values
    assert len(cache.layers) == 3 and isinstance(cache.layers[-1], RouterLayer)
    assert cache.layers[-1].keys.shape == (1, 2, 6, 8)


@pytest.mark.parametrize("kind", ["dynamic", "lazy", "static"])
def test_step_by_step_in_any_cache(kind: str) -> None:
    model, ids = pregated_model(aligned=False), tokens(2, 10)
    cache: Any = DynamicCache() if kind == "lazy" else DynamicCache(config=model.config)
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        parts = [model(input_ids=part, past_key_values=cache).logits for part in ids.split([4, 3, 1, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **EXACT)


def test_static_cache_generates_the_same() -> None:
    model, ids = pregated_model(), tokens(1, 6)
    mask = torch.ones_like(ids)
    ours = model.generate(ids, attention_mask=mask, cache_implementation="static", disable_compile=True, **GREEDY)
    assert torch.equal(ours, model.generate(ids, attention_mask=mask, **GREEDY))


def test_prefix_is_reused_and_cropped() -> None:
    """A prompt's cache is taken on by two continuations, and cropped where they part."""
    model, prefix = pregated_model(), tokens(1, 7)
    first, second = (torch.cat([prefix, tokens(1, 4, seed)], dim=1) for seed in (5, 6))
    with torch.no_grad():
        cache = model(input_ids=prefix, use_cache=True).past_key_values
        whole = [model(input_ids=ids, use_cache=False).logits[:, 7:] for ids in (first, second)]
        ours = model(input_ids=first[:, 7:], past_key_values=cache).logits
        reused = model(input_ids=prefix, use_cache=True).past_key_values
        cache.crop(-4)
        again = model(input_ids=second[:, 7:], past_key_values=cache).logits
    torch.testing.assert_close(ours, whole[0], **EXACT)
    torch.testing.assert_close(again, whole[1], **EXACT)
    out = model.generate(first, past_key_values=reused, **GREEDY)
    assert torch.equal(out, model.generate(first, **GREEDY))


def test_beam_search_is_that_without_a_cache() -> None:
    model, ids = pregated_model(), tokens(2, 6)
    options = {"num_beams": 3, **GREEDY}
    mask = torch.ones_like(ids)
    with_cache = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(with_cache, model.generate(ids, attention_mask=mask, use_cache=False, **options))
