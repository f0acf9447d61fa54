"""Shared fixtures: a tiny trained-on-nothing Llama folder with a real tokenizer, and one thread per worker."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from families import BY_NAME

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)

SENTENCE = "the a router sends every token to some of its experts and never looks back at what it lost on the way"
WORDS = SENTENCE.split()


def corpus(words: int, seed: int) -> str:
    """Nonsense of known words."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(0, len(WORDS), (words,), generator=generator).tolist()
    return " ".join(WORDS[index] for index in chosen) + "\n"


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of some 1200 tokens."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(corpus(1200, 0), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer():  # type: ignore[no-untyped-def]
    """A word-level tokenizer that fits the tiny models' vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{word: index + 3 for index, word in enumerate(dict.fromkeys(WORDS))}}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:  # type: ignore[no-untyped-def]
    """A tiny Llama with its tokenizer, as a model folder; tests copy it before they spoil it."""
    folder = tmp_path_factory.mktemp("dense") / "tiny-llama"
    BY_NAME["llama"].build().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
