"""Bad use and bad input: exit code 2, one line on stderr that names what is wrong, nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from families import BY_NAME
from gguf_files import write_llama
from safetensors.torch import load_file, save_file
from torch import nn

from moecompile import checkpoint, files
from moecompile.cli import main
from moecompile.errors import InputError
from moecompile.evaluate import perplexity

COUNTS = ("--recipe", "contiguous", "--experts", "4")
STATIC = ("--recipe", "static", "--calibration-window", "32", "--calibration-tokens", "128")
Refuse = Callable[..., str]


class Disk(NamedTuple):
    """What shutil.disk_usage returns."""

    total: int
    used: int
    free: int


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Everything under a folder, hidden or not: the bytes of files, None for folders."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """The handlers that the command line installs do not outlive a test."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Run a command that must be refused in one line holding the words given, with tmp_path as it was."""

    def run(*arguments: object, words: tuple[object, ...] = ()) -> str:
        before = snapshot(tmp_path)
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert (code, out) == (2, ""), err
        check_one_line(err, words)
        assert snapshot(tmp_path) == before
        return err

    return run


def check_one_line(err: str, words: tuple[object, ...]) -> None:
    """One line, no traceback, and the words in it."""
    assert len(err.splitlines()) == 1 and err.endswith("\n"), err
    assert err.startswith("moecompile") and "internal error" not in err
    for word in words:
        assert str(word) in err


@pytest.fixture
def dense(tmp_path: Path, dense_folder: Path) -> Path:
    """A copy of the tiny model to spoil."""
    return Path(shutil.copytree(dense_folder, tmp_path / "dense"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where nothing may appear."""
    return tmp_path / "out"


@pytest.fixture(scope="module")
def converted_once(tmp_path_factory: pytest.TempPathFactory, dense_folder: Path) -> Path:
    """A converted folder."""
    folder = tmp_path_factory.mktemp("converted") / "moe"
    assert main(["convert", str(dense_folder), str(folder), *COUNTS, "--quiet"]) == 0
    return folder


@pytest.fixture
def converted(tmp_path: Path, converted_once: Path) -> Path:
    """A copy of the converted folder."""
    return Path(shutil.copytree(converted_once, tmp_path / "moe"))


def commands(model: object, out: Path, text: Path) -> dict[str, list[object]]:
    """One call of each command that reads a model."""
    return {
        "explain": ["explain", model, "--quiet"],
        "convert": ["convert", model, out, *COUNTS, "--quiet"],
        "static": ["convert", model, out, *STATIC, "--calibration", text, "--quiet"],
        "eval": ["eval", model, "--text", text, "--window", 32, "--quiet"],
        "generate": ["generate", model, "--prompt", "the router", "--quiet"],
    }


EVERY = ("explain", "convert", "static", "eval", "generate")


# The model


@pytest.mark.parametrize("command", EVERY)
def test_missing_path(refuse: Refuse, tmp_path: Path, out: Path, text: Path, command: str) -> None:
    missing = tmp_path / "nowhere"
    refuse(*commands(missing, out, text)[command], words=(missing,))


def test_missing_relative_path(refuse: Refuse, out: Path) -> None:
    refuse("convert", "no-such-folder", out, *COUNTS, "--quiet", words=("no-such-folder",))


def test_unknown_hub_id(refuse: Refuse, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refuse("convert", "nobody/nothing-at-all", out, *COUNTS, "--quiet", words=("nobody/nothing-at-all",))


@pytest.mark.parametrize("command", EVERY)
def test_folder_without_weights(refuse: Refuse, dense: Path, out: Path, text: Path, command: str) -> None:
    (dense / "model.safetensors").unlink()
    refuse(*commands(dense, out, text)[command], words=(dense, "no weights"))


def test_folder_without_config(refuse: Refuse, dense: Path, out: Path) -> None:
    (dense / "config.json").unlink()
    refuse("convert", dense, out, *COUNTS, "--quiet", words=(dense, "config.json"))


class _Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("command", EVERY)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_never_unpickled(
    refuse: Refuse, dense: Path, out: Path, text: Path, tmp_path: Path, command: str, name: str
) -> None:
    marker = tmp_path / "unpickled"
    (dense / "model.safetensors").unlink()
    (dense / name).write_bytes(pickle.dumps(_Trap(marker)))
    refuse(*commands(dense, out, text)[command], words=(dense, "pickled", "safetensors"))
    assert not marker.exists()
    pickle.loads((dense / name).read_bytes())
    assert marker.exists()  # the trap does snap


def test_pickled_weights_beside_broken_ones(refuse: Refuse, dense: Path, out: Path, tmp_path: Path) -> None:
    marker = tmp_path / "unpickled"
    (dense / "model.safetensors").write_bytes(b"")
    (dense / "pytorch_model.bin").write_bytes(pickle.dumps(_Trap(marker)))
    refuse("convert", dense, out, *COUNTS, "--quiet", words=("model.safetensors",))
    assert not marker.exists()


@pytest.mark.parametrize("command", EVERY)
@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_truncated_weights(refuse: Refuse, dense: Path, out: Path, text: Path, command: str, kept: int) -> None:
    weights = dense / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    refuse(*commands(dense, out, text)[command], words=(weights, "truncated or corrupt"))


@pytest.mark.parametrize("spoilt", [b"\xff" * 8, (10**12).to_bytes(8, "little"), (40).to_bytes(8, "little")])
def test_corrupt_header(refuse: Refuse, dense: Path, out: Path, spoilt: bytes) -> None:
    weights = dense / "model.safetensors"
    weights.write_bytes(spoilt + weights.read_bytes()[8:])
    refuse("convert", dense, out, *COUNTS, "--quiet", words=(weights, "truncated or corrupt"))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite a folder's weights."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


NORM = "model.layers.1.input_layernorm.weight"


def test_missing_tensor(refuse: Refuse, dense: Path, out: Path) -> None:
    change_weights(dense, lambda tensors: tensors.pop(NORM))
    refuse("convert", dense, out, *COUNTS, "--quiet", words=(NORM, "missing"))


def test_tensor_of_another_shape(refuse: Refuse, dense: Path, out: Path) -> None:
    change_weights(dense, lambda tensors: tensors.update({NORM: torch.ones(31)}))
    refuse("convert", dense, out, *COUNTS, "--quiet", words=(NORM, "shape"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(refuse: Refuse, dense: Path, out: Path, value: float) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change_weights(dense, lambda tensors: tensors[name][3].fill_(value))
    refuse("convert", dense, out, *COUNTS, "--quiet", words=(name, "32 values", "NaN"))


@pytest.mark.parametrize("command", EVERY)
@pytest.mark.parametrize("content", ["{", "[1, 2]", ""])
def test_config_that_is_no_json(refuse: Refuse, dense: Path, out: Path, text: Path, command: str, content: str) -> None:
    (dense / "config.json").write_text(content)
    refuse(*commands(dense, out, text)[command], words=("config.json",))


def test_config_of_an_unknown_kind(refuse: Refuse, dense: Path, out: Path) -> None:
    (dense / "config.json").write_text('{"model_type": "no-such-model"}')
    refuse("convert", dense, out, *COUNTS, "--quiet", words=(dense, "no-such-model"))


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": "wide"}, {"architectures": ["pipeline"]}, {"architectures": 5}, {"num_attention_heads": 5}],
)
def test_config_that_makes_no_model(refuse: Refuse, dense: Path, out: Path, changes: dict[str, Any]) -> None:
    change_json(dense / "config.json", **changes)
    refuse("convert", dense, out, *COUNTS, "--quiet", words=(dense,))


def test_index_that_names_a_missing_shard(refuse: Refuse, dense: Path, out: Path) -> None:
    (dense / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    refuse("convert", dense, out, *COUNTS, "--quiet", words=("model-00001-of-00002.safetensors",))


def test_index_that_leads_out_of_the_folder(refuse: Refuse, dense: Path, out: Path) -> None:
    shutil.copy(dense / "model.safetensors", dense.parent / "elsewhere.safetensors")
    (dense / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    refuse("convert", dense, out, *COUNTS, "--quiet", words=("elsewhere.safetensors",))


def test_model_without_ffn(refuse: Refuse, tmp_path: Path, out: Path) -> None:
    BY_NAME["llama"].build(num_hidden_layers=0).save_pretrained(tmp_path / "bare")
    refuse("convert", tmp_path / "bare", out, *COUNTS, "--quiet", words=("no feed-forward network", "Llama"))


def test_model_that_is_converted_already(refuse: Refuse, converted: Path, out: Path) -> None:
    refuse("convert", converted, out, *COUNTS, "--quiet", words=(converted, "converted already"))
    refuse("explain", converted, "--quiet", words=(converted, "converted already"))


def test_model_without_tokenizer(refuse: Refuse, dense: Path, out: Path, text: Path) -> None:
    for file in dense.glob("*token*"):
        file.unlink()
    for command in ("static", "eval", "generate"):
        refuse(*commands(dense, out, text)[command], words=(dense, "tokenizer"))


@pytest.mark.parametrize("damage", ["weights", "plan", "record"])
def test_damaged_converted_folder(refuse: Refuse, converted: Path, text: Path, damage: str) -> None:
    name = {"weights": "model.safetensors", "plan": "moe_plan.json", "record": "moecompile.json"}[damage]
    file = converted / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refuse("eval", converted, "--text", text, "--window", 32, "--quiet", words=(name,))
    if damage == "record":
        refuse("report", converted, words=(name,))


def test_plan_for_another_model(refuse: Refuse, converted: Path) -> None:
    plan = converted / "moe_plan.json"
    plan.write_text(plan.read_text().replace('"model.layers.1.mlp"', '"model.trunk.1.mlp"'))
    refuse("generate", converted, "--prompt", "the", "--quiet", words=("model.trunk.1",))


def test_report_of_a_dense_folder(refuse: Refuse, dense: Path, converted: Path, tmp_path: Path) -> None:
    refuse("report", dense, words=(dense, "not a converted model"))
    refuse("report", tmp_path / "nowhere", words=(tmp_path / "nowhere",))
    refuse("report", converted, "--compare", dense, words=(dense, "not a converted model"))
    refuse("report", converted, "--compare", dense / "config.json", words=(dense / "config.json",))
    refuse("report", converted, "--output", tmp_path / "no" / "page.html", words=(tmp_path / "no",))


# GGUF files


@pytest.mark.parametrize("command", EVERY)
def test_gguf_file_that_is_none(refuse: Refuse, tmp_path: Path, out: Path, text: Path, command: str) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"this is no model at all" * 100)
    refuse(*commands(model, out, text)[command], words=(model,))


@pytest.mark.parametrize("kept", [4, 20, 0.1, 0.9])
def test_truncated_gguf_file(refuse: Refuse, tmp_path: Path, out: Path, kept: float) -> None:
    pytest.importorskip("gguf")
    model = write_llama(BY_NAME["llama"].build(), tmp_path / "model.gguf")
    data = model.read_bytes()
    model.write_bytes(data[: int(kept if kept >= 1 else kept * len(data))])
    refuse("convert", model, out, *COUNTS, "--quiet", words=(model, "GGUF"))


# Numbers


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--recipe", "contiguous", "--experts", "0"), ("--experts", "0")),
        (("--recipe", "contiguous", "--experts", "-3"), ("--experts", "-3")),
        (("--recipe", "contiguous", "--experts", "4", "--shared", "-1"), ("--shared", "-1")),
        (("--recipe", "contiguous", "--experts", "4", "--top-k", "5"), ("--top-k", "5")),
        (("--recipe", "contiguous", "--experts", "4", "--top-k", "-1"), ("--top-k", "-1")),
        (("--recipe", "contiguous", "--experts", "0", "--shared", "0", "--top-k", "0"), ("--experts", "0")),
        (("--recipe", "contiguous", "--experts", "4", "--shared", "0", "--top-k", "0"), ("--top-k 0", "--shared 0")),
        (("--recipe", "contiguous", "--experts", "40", "--shared", "9"), ("mlp", "48 neurons", "49 slices")),
        (("--recipe", "contiguous", "--experts", "2.5"), ("--experts", "2.5")),
        (("--recipe", "contiguous", "--experts", "four"), ("--experts", "four")),
        (("--recipe", "contiguous", "--shared", ""), ("--shared",)),
        (("--recipe", "contiguous", "--top-k", "1e3"), ("--top-k", "1e3")),
        (("--recipe", "contiguous", "--active-fraction", "0.5"), ("--active-fraction", "contiguous")),
        (("--recipe", "contiguous", "--compensation", "means"), ("--compensation", "contiguous")),
        (("--recipe", "static", "--experts", "4"), ("--experts", "static")),
        (("--recipe", "flap", "--top-k", "4"), ("--top-k", "flap")),
        (("--recipe", "flap", "--compensation", "refit"), ("--compensation", "flap")),
        (("--recipe", "static", "--active-fraction", "0"), ("--active-fraction", "0")),
        (("--recipe", "static", "--active-fraction", "1.5"), ("--active-fraction", "1.5")),
        (("--recipe", "flap", "--active-fraction", "-0.5"), ("--active-fraction", "-0.5")),
        (("--recipe", "flap", "--active-fraction", "nan"), ("--active-fraction", "nan")),
        (("--recipe", "static", "--active-fraction", "half"), ("--active-fraction", "half")),
        (("--recipe", "static", "--compensation", "magic"), ("--compensation", "magic")),
        (("--recipe", "static", "--calibration-window", "1"), ("--calibration-window", "1")),
        (("--recipe", "static", "--calibration-window", "0"), ("--calibration-window", "0")),
        (("--recipe", "static", "--calibration-window", "32", "--calibration-tokens", "31"), ("-tokens is 31",)),
        (("--recipe", "static", "--calibration-tokens", "0"), ("--calibration-tokens", "0")),
        (("--recipe", "static", "--calibration-weights", "1", "2"), ("--calibration-weights has 2 numbers for 1 files",)),
        (("--recipe", "static", "--calibration-weights", "0"), ("--calibration-weights is 0",)),
        (("--recipe", "read-me", "--calibration-weights", "2"), ("--calibration-weights", "read-me")),
        (("--recipe", "no-such-recipe"), ("--recipe", "no-such-recipe")),
        (("--recipe", "contiguous", "--dtype", "int8"), ("--dtype", "int8")),
        (("--recipe", "contiguous", "--seed", "x"), ("--seed", "x")),
        (("--recipe", "contiguous", "--seed", "9" * 30), ("--seed", "999")),
    ],
)
def test_settings_that_make_no_sense(
    refuse: Refuse, dense: Path, out: Path, text: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    given = () if "contiguous" in options else ("--calibration", text)
    refuse("convert", dense, out, *options, *given, "--quiet", words=words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--window", "1"), ("--window", "1")),
        (("--window", "-5"), ("--window", "-5")),
        (("--window", "32", "--max-windows", "0"), ("--max-windows", "0")),
        (("--window", "64", "--dense-prefix", "63"), ("--dense-prefix", "63")),
        (("--window", "64", "--dense-prefix", "-1"), ("--dense-prefix", "-1")),
        (("--window", "64", "--top-k", "5"), ("top_k", "5", "4 experts")),
        (("--window", "64", "--top-k", "2"), ("top_k", "2", "no router")),
        (("--window", "64", "--top-k", "-1"), ("top_k", "-1")),
        (("--task", "lambada", "--max-examples", "0"), ("--max-examples", "0")),
        (("--task", "lambada", "--skip", "2"), ("--skip", "lambada")),
        (("--task", "lambada", "--dense-prefix", "2"), ("--dense-prefix", "lambada")),
        (("--task", "chess"), ("--task", "chess")),
    ],
)
def test_evaluations_that_make_no_sense(
    refuse: Refuse, converted: Path, tmp_path: Path, text: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    passages = tmp_path / "passages.jsonl"
    passages.write_text('{"text": "the router sends every token"}\n')
    refuse("eval", converted, "--text", passages if "lambada" in options else text, *options, "--quiet", words=words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--max-new-tokens", "0"), ("--max-new-tokens", "0")),
        (("--temperature", "-1"), ("--temperature",)),
        (("--top-p", "0"), ("--top-p",)),
        (("--top-p", "1.5"), ("--top-p",)),
        (("--top-k", "9"), ("top_k", "9")),
        (("--chat",), ("chat template",)),
    ],
)
def test_generations_that_make_no_sense(
    refuse: Refuse, converted: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    refuse("generate", converted, "--prompt", "the router", *options, "--quiet", words=words)


def test_empty_prompt(refuse: Refuse, converted: Path) -> None:
    refuse("generate", converted, "--prompt", "", "--quiet", words=("prompt", "empty"))


def test_dense_model_has_no_experts_to_choose(refuse: Refuse, dense: Path, text: Path) -> None:
    refuse("eval", dense, "--text", text, "--window", 32, "--top-k", 2, "--quiet", words=("no MoE block",))
    refuse("eval", dense, "--text", text, "--window", 32, "--dense-prefix", 2, "--quiet", words=("--dense-prefix",))
    refuse("generate", dense, "--prompt", "the", "--top-k", 2, "--quiet", words=("no MoE block",))


def test_window_longer_than_the_positions(refuse: Refuse, dense: Path, converted: Path, out: Path, text: Path) -> None:
    options = ("--recipe", "static", "--calibration", text, "--calibration-window", 65)
    refuse("convert", dense, out, *options, "--quiet", words=("--calibration-window", "65", "64 positions"))
    refuse("eval", dense, "--text", text, "--window", 65, "--quiet", words=("--window", "65", "64 positions"))
    refuse("eval", converted, "--text", text, "--window", 65, "--quiet", words=("--window", "65", "64 positions"))


def test_texts_longer_than_the_positions(refuse: Refuse, tmp_path: Path, tokenizer: Any) -> None:
    model = tmp_path / "gpt2"  # its positions are a table, beyond which there is nothing
    BY_NAME["gpt2"].build().save_pretrained(model)
    tokenizer.save_pretrained(model)
    words = " ".join(["the router"] * 40)
    passages = tmp_path / "long.jsonl"
    passages.write_text(json.dumps({"text": words}) + "\n")
    refuse("eval", model, "--task", "lambada", "--text", passages, "--quiet", words=("64 positions",))
    refuse("generate", model, "--prompt", words, "--max-new-tokens", 1, "--quiet", words=("64 positions",))
    refuse("generate", model, "--prompt", "the", "--max-new-tokens", 64, "--quiet", words=("64 positions",))


@pytest.mark.parametrize(("family", "words"), [("bert", "sees the words that it is to predict"), ("t5", "has an encoder")])
def test_perplexity_of_a_model_that_is_not_causal(
    refuse: Refuse, tmp_path: Path, tokenizer: Any, text: Path, family: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = BY_NAME[family].build(vocab_size=len(tokenizer))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # of a random model a word is barely seen
    monkeypatch.setattr("moecompile.cli.evaluate.load_any", lambda options: (model.eval(), False))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    refuse("eval", tmp_path / "model", "--text", text, "--window", 32, "--quiet", words=(words,))
    passages = tmp_path / "passages.jsonl"
    passages.write_text(json.dumps({"text": "the router sends the token to the expert"}) + "\n")
    refuse("eval", tmp_path / "model", "--text", passages, "--task", "lambada", "--quiet", words=(words,))


class _Turning(nn.Module):
    """Logits that change with the word to be predicted where the input begins with token 1, as a close choice may turn."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(16, 16))

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        logits = self.table[input_ids]
        return SimpleNamespace(logits=logits + input_ids[:, -1:, None] if input_ids[0, 0] == 1 else logits)


def test_a_close_choice_at_one_place_is_no_sight_of_the_word() -> None:
    rows = torch.randint(2, 16, (2, 64))
    rows[0, 0] = 1  # the first of eight pieces
    assert perplexity(_Turning(), rows)["windows"] == 2
    rows[0, ::8] = 1
    with pytest.raises(InputError, match="sees the words that it is to predict"):
        perplexity(_Turning(), rows)


def test_tokens_that_the_model_does_not_know(
    refuse: Refuse, dense: Path, converted: Path, out: Path, text: Path, tokenizer: Any
) -> None:
    short = BY_NAME["llama"].build(vocab_size=len(tokenizer) // 2)
    short.save_pretrained(dense)
    words = ("the model knows", len(tokenizer) // 2)
    refuse("eval", dense, "--text", text, "--window", 32, "--quiet", words=words)
    refuse("convert", dense, out, *STATIC, "--calibration", text, "--quiet", words=words)


def test_routing_over_windows_beyond_the_positions(refuse: Refuse, converted: Path, text: Path) -> None:
    options = ("--routing", text, "--tokens", 130, "--window", 65)
    refuse("report", converted, *options, "--quiet", words=("--window", "65", "64 positions"))


# Text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("short.txt", b"the router sends", ("short.txt", "window", "32")),
        ("missing.txt", None, ("missing.txt",)),
        ("empty.txt", b" \n\n", ("empty.txt", "empty")),
        ("latin.txt", "caf\u00e9 ".encode("latin-1") * 100, ("latin.txt", "UTF-8")),
        ("bad.jsonl", b'{"text": "the router"}\n{"body": "no text"}\n', ("bad.jsonl", "line 2", "'text'")),
        ("number.jsonl", b'{"text": 7}\n', ("number.jsonl", "line 1", "'text'")),
        ("list.jsonl", b'["the"]\n', ("list.jsonl", "line 1")),
        ("broken.jsonl", b'{"text": \n', ("broken.jsonl", "line 1")),
        ("half.jsonl", b'{"text": "the \\ud83d router"}\n', ("half.jsonl", "line 1", "half a character")),
        ("empty.jsonl", b"\n", ("empty.jsonl", "empty")),
        ("missing.jsonl", None, ("missing.jsonl",)),
        ("latin.jsonl", '{"text": "caf\u00e9"}\n'.encode("latin-1"), ("latin.jsonl", "UTF-8")),
    ],
)
def test_texts_that_cannot_be_used(
    refuse: Refuse,
    dense: Path,
    out: Path,
    text: Path,
    tmp_path: Path,
    name: str,
    content: bytes | None,
    words: tuple[str, ...],
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    refuse("convert", dense, out, *STATIC, "--calibration", text, path, "--quiet", words=words)
    refuse("eval", dense, "--text", text, path, "--window", 32, "--quiet", words=words)


def test_folder_as_text(refuse: Refuse, dense: Path, out: Path, tmp_path: Path) -> None:
    refuse("convert", dense, out, *STATIC, "--calibration", tmp_path, "--quiet", words=(tmp_path,))


def test_recipe_that_needs_text(refuse: Refuse, dense: Path, out: Path) -> None:
    refuse("convert", dense, out, "--recipe", "static", "--quiet", words=("static", "--calibration"))


def test_passage_of_one_word(refuse: Refuse, dense: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text('{"text": "the router sends"}\n{"text": "router"}\n')
    refuse("eval", dense, "--task", "lambada", "--text", path, "--quiet", words=("passage 2",))


# Where to write


def test_out_that_exists(refuse: Refuse, dense: Path, out: Path) -> None:
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    refuse("convert", dense, out, *COUNTS, "--quiet", words=(out, "--overwrite"))


def test_out_that_is_no_model_is_not_overwritten(refuse: Refuse, dense: Path, out: Path) -> None:
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    refuse("convert", dense, out, *COUNTS, "--overwrite", "--quiet", words=(out, "no model"))


def test_out_that_is_a_file(refuse: Refuse, dense: Path, out: Path) -> None:
    out.write_text("mine")
    refuse("convert", dense, out, *COUNTS, "--overwrite", "--quiet", words=(out, "is a file"))
    refuse("convert", dense, out / "below", *COUNTS, "--quiet", words=(out, "is a file"))


@pytest.mark.parametrize("where", [".", "moe", "deep/moe"])
def test_out_inside_the_model(refuse: Refuse, dense: Path, where: str) -> None:
    refuse("convert", dense, dense / where, *COUNTS, "--overwrite", "--quiet", words=(dense, "own folder"))


def test_out_around_the_model(refuse: Refuse, dense: Path) -> None:
    inner = dense / "variant"
    inner.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(dense / name, inner / name)
    refuse("convert", inner, dense, *COUNTS, "--overwrite", "--quiet", words=(dense, inner))


def test_out_around_a_gguf_file(refuse: Refuse, dense: Path) -> None:
    pytest.importorskip("gguf")
    model = write_llama(BY_NAME["llama"].build(), dense / "model.gguf")
    refuse("convert", model, dense, *COUNTS, "--overwrite", "--quiet", words=(dense, model))


def test_locked_folder(refuse: Refuse, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(files.os, "access", lambda path, mode: Path(path).name != "locked")  # root may write anywhere
    refuse("convert", dense, tmp_path / "locked" / "out", *COUNTS, "--quiet", words=("locked", "written"))


@pytest.mark.parametrize("where", ["new", "new/deep"])
def test_folders_made_on_the_way_go_too(
    refuse: Refuse, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def interrupted(model: object, folder: Path, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_files", interrupted)
    refuse("convert", dense, tmp_path / where / "out", *COUNTS, "--quiet", words=("interrupted",))


def test_overwriting_through_a_link(dense: Path, converted: Path, tmp_path: Path) -> None:
    """A link stays, the folder it leads to is replaced, and nothing else appears."""
    link = tmp_path / "link"
    link.symlink_to(converted)
    (converted / "stale.txt").touch()
    assert main(["convert", str(dense), str(link), *COUNTS, "--overwrite", "--quiet"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "link", "moe"]
    assert link.is_symlink() and link.resolve() == converted
    assert checkpoint.is_converted(converted) and not (converted / "stale.txt").exists()


def test_too_little_free_space(refuse: Refuse, dense: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: Disk(10**9, 10**9 - 1000, 1000))
    refuse("convert", dense, out, *COUNTS, "--quiet", words=(out, "no room", "MB"))


_LIMITED = """
import resource, signal, sys
from moecompile.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A fresh interpreter with a pipe on stderr."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore::DeprecationWarning"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("full", ["weights", "tokenizer"])
def test_full_disk(dense: Path, out: Path, tmp_path: Path, full: str) -> None:
    """No file may grow beyond a limit that the weights, or only the tokenizer, exceed."""
    limit = 20_000
    if full == "tokenizer":
        limit = (dense / "model.safetensors").stat().st_size + 10_000
        grow_vocabulary(dense / "tokenizer.json", limit)
    before = snapshot(tmp_path)
    process = start(_LIMITED, limit, "convert", dense, out, *COUNTS, "--quiet")
    stdout, err = process.communicate()
    assert (process.returncode, stdout) == (2, ""), err
    check_one_line(err, ("no room to write",) if full == "weights" else ("tokenizer cannot be written", "too large"))
    assert snapshot(tmp_path) == before


def grow_vocabulary(path: Path, size: int) -> None:
    """Add words to a tokenizer's file until it is larger than that."""
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary.update({f"word-that-fills-the-disk-{number}": len(vocabulary) + number for number in range(size // 20)})
    path.write_text(json.dumps(data))
    assert path.stat().st_size > size


# Interruption

_HELD = """
import signal, sys, time
from moecompile import checkpoint
from moecompile.cli import main
# As a terminal starts a command, and as a shell starts `command &` in a script, whatever the tests themselves were started by.
signal.signal(signal.SIGINT, signal.SIG_IGN if "background" in sys.argv[1] else signal.default_int_handler)
real = checkpoint.write_files
def held(model, folder, **options):
    real(model, folder, **options)
    print("written", file=sys.stderr, flush=True)
    time.sleep(600)
checkpoint.write_files = held
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("number", "mode", "moment"),
    [
        (signal.SIGINT, "foreground", "loading"),
        (signal.SIGTERM, "background", "written"),
    ],
)
def test_interruption(dense: Path, out: Path, tmp_path: Path, number: signal.Signals, mode: str, moment: str) -> None:
    before = snapshot(tmp_path)
    process = start(_HELD, mode, "convert", dense, out, *COUNTS)
    assert process.stderr is not None
    try:
        seen = ""
        while moment not in seen:
            seen = process.stderr.readline()
            assert seen, "the command ended too early"
        if moment == "written":
            assert list(tmp_path.glob(".out.*.part/model.safetensors"))
        process.send_signal(number)
        stdout, err = process.communicate(timeout=60)
    finally:
        process.kill()
    last = err.splitlines()[-1]
    assert (process.returncode, stdout) == (2, ""), err
    assert last == "moecompile: interrupted; nothing was left behind" and "Traceback" not in err
    assert snapshot(tmp_path) == before


def test_interruption_keeps_the_old_folder(
    refuse: Refuse, dense: Path, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(model: object, folder: Path, **options: object) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_files", interrupted)
    refuse("convert", dense, converted, *COUNTS, "--overwrite", "--quiet", words=("interrupted",))


def test_interruption_between_the_renames_keeps_the_old_folder(
    refuse: Refuse, dense: Path, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.replace

    def interrupted(source: Path, target: Path) -> None:
        if Path(target) == converted and Path(source).suffix == ".part":
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(files.os, "replace", interrupted)
    refuse("convert", dense, converted, *COUNTS, "--overwrite", "--quiet", words=("interrupted",))


# Remote code

_REMOTE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({marker!r}).touch()

class OddConfig(LlamaConfig):
    model_type = "odd-llama"

class OddModel(LlamaForCausalLM):
    config_class = OddConfig

class OddTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def odd(dense: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """(a model folder with code of its own, the file that the code makes when it runs)."""
    from transformers import dynamic_module_utils

    elsewhere = tmp_path_factory.mktemp("remote")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(elsewhere / "modules"))
    marker = elsewhere / "ran"
    (dense / "odd.py").write_text(_REMOTE.format(marker=str(marker)))
    return dense, marker


def change_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


_MAP = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddModel"}


@pytest.mark.parametrize("command", EVERY)
def test_remote_code_does_not_run(refuse: Refuse, odd: tuple[Path, Path], out: Path, text: Path, command: str) -> None:
    folder, marker = odd
    change_json(folder / "config.json", model_type="odd-llama", architectures=["OddModel"], auto_map=_MAP)
    refuse(*commands(folder, out, text)[command], words=(folder,))
    assert not marker.exists()


def test_remote_code_is_asked_for(
    refuse: Refuse, odd: tuple[Path, Path], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, marker = odd
    change_json(folder / "config.json", model_type="odd-llama", architectures=["OddModel"], auto_map=_MAP)
    refuse("explain", folder, "--quiet", words=(folder, "--trust-remote-code"))
    assert not marker.exists()
    assert main(["explain", str(folder), "--quiet", "--trust-remote-code"]) == 0
    assert marker.exists() and "OddModel" in capsys.readouterr().out


def test_remote_code_of_a_known_model_does_not_run(
    odd: tuple[Path, Path], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, marker = odd
    change_json(folder / "config.json", auto_map=_MAP)
    assert main(["explain", str(folder), "--quiet"]) == 0
    assert not marker.exists() and "LlamaForCausalLM" in capsys.readouterr().out
    assert main(["explain", str(folder), "--quiet", "--trust-remote-code"]) == 0
    assert marker.exists()


def test_remote_code_of_a_tokenizer_does_not_run(refuse: Refuse, odd: tuple[Path, Path], out: Path, text: Path) -> None:
    folder, marker = odd
    settings = folder / "tokenizer_config.json"
    change_json(settings, tokenizer_class="OddTokenizer", auto_map={"AutoTokenizer": [None, "odd.OddTokenizer"]})
    command = [str(argument) for argument in commands(folder, out, text)["generate"]] + ["--max-new-tokens", "2"]
    main(command)
    assert not marker.exists()
    assert main([*command, "--trust-remote-code"]) == 0
    assert marker.exists()


# The command line itself


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("COMMAND",)),
        (("frobnicate",), ("frobnicate",)),
        (("explain",), ("MODEL",)),
        (("convert", "a-model"), ("OUT",)),
        (("eval", "a-model"), ("--text",)),
        (("generate", "a-model"), ("--prompt",)),
        (("report",), ("OUT",)),
        (("explain", "a-model", "--no-such-option"), ("--no-such-option",)),
        (("eval", "a-model", "--text"), ("--text",)),
        (("convert", "a-model", "out", "--experts"), ("--experts",)),
    ],
)
def test_bad_use(refuse: Refuse, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    assert "--help" in refuse(*arguments, words=words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(refuse: Refuse, dense: Path, converted: Path, out: Path, text: Path) -> None:
    for command in ("convert", "static", "eval", "generate"):
        refuse(*commands(dense, out, text)[command], "--device", "cuda", words=("--device cuda",))
    refuse(*commands(converted, out, text)["eval"], "--device", "cuda", words=("--device cuda",))


def test_debug_shows_the_traceback(dense: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (dense / "config.json").write_text("{")
    assert main(["convert", str(dense), str(out), *COUNTS, "--quiet", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_internal_error(
    dense: Path,
    out: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("a bug\nof two lines")

    monkeypatch.setattr("moecompile.cli.convert.convert_with_record", broken)
    assert main(["convert", str(dense), str(out), *COUNTS, "--quiet"]) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "internal error: RuntimeError: a bug of two lines" in err
    assert main(["convert", str(dense), str(out), *COUNTS, "--quiet", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
    assert not out.exists()
