"""The commands at work on a tiny model: what they print, what they write, and that the figures are right."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import corpus
from families import BY_NAME
from gguf_files import write_llama
from safetensors.torch import load_file

import moecompile
from moecompile.cli import main
from moecompile.evaluate import perplexity
from moecompile.text import evaluation_windows

WINDOW = 32
COMMANDS = ("explain", "convert", "tune", "eval", "generate", "report", "codegen", "autotune")
CALIBRATED = ("--calibration-window", WINDOW, "--calibration-tokens", 256)
Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """The handlers that the command line installs do not outlive a test."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command that must succeed, with --json; its one object."""

    def call(*arguments: object) -> Any:
        capsys.readouterr()
        code = main([*map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        assert code == 0, err
        assert out.endswith("\n") and len(out.splitlines()) == 1
        result = json.loads(out, parse_constant=pytest.fail)
        assert isinstance(result, dict)
        return result

    return call


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A tiny Llama whose every token is a word, so that what it writes can be read."""
    folder = tmp_path_factory.mktemp("worded") / "tiny"
    model = BY_NAME["llama"].build(vocab_size=len(tokenizer))
    with torch.no_grad():  # at the usual scale of 0.02 all of its logits are nearly the same
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                weight.mul_(6)
            elif "embed" in name:
                weight.mul_(30)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(dense: Path) -> Any:
    """The same, loaded by transformers alone."""
    return transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, dense: Path) -> Path:
    """Converted with all experts chosen, which is the dense model again."""
    folder = tmp_path_factory.mktemp("whole") / "moe"
    assert main(["convert", str(dense), str(folder), "--recipe", "contiguous", "--experts", "4", "--quiet"]) == 0
    return folder


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory, dense: Path) -> Path:
    """Converted with 2 of 5 experts chosen beside a shared slice."""
    folder = tmp_path_factory.mktemp("routed") / "moe"
    options = ["--recipe", "contiguous", "--experts", "5", "--shared", "1", "--top-k", "2", "--quiet"]
    assert main(["convert", str(dense), str(folder), *options]) == 0
    return folder


def losses(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """(W, L - 1): the loss of each position but the first of each window."""
    with torch.no_grad():
        logits = model(input_ids=rows).logits[:, :-1].double()
    return -logits.log_softmax(-1).gather(-1, rows[:, 1:, None]).squeeze(-1)


def rows_of(tokenizer: Any, text: Path, windows: int | None = None) -> torch.Tensor:
    """The windows that eval takes."""
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    count = len(ids) // WINDOW if windows is None else windows
    return torch.tensor(ids[: count * WINDOW]).reshape(count, WINDOW)


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    out, err = capsys.readouterr()
    assert f"example: moecompile {command} " in out and err == ""
    for option in ("--json", "--seed", "--device", "--debug"):
        assert option in out


@pytest.mark.parametrize("command", COMMANDS)
def test_example_in_the_help_is_accepted(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    import shlex

    from moecompile.cli import parser

    main([command, "--help"])
    example = re.search(r"example: moecompile (.*)", capsys.readouterr().out)
    assert example and parser().parse_args(shlex.split(example[1])).command == command


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^\s+{command}\s", out, re.M) for command in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"moecompile {moecompile.__version__}\n"


# Explain


def test_explain(run: Run, dense: Path, model: Any) -> None:
    result = run("explain", dense)
    assert {"sites", "skipped", "costs"} <= set(result)
    assert [site["name"] for site in result["sites"]] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    for site in result["sites"]:
        kind = {"kind": "gated", "activation": "silu", "bias": False, "layout": "linear"}
        assert {**kind, "hidden_size": 32, "intermediate_size": 48}.items() <= site.items()
    assert result["costs"]["ffn_parameters"] == 2 * 3 * 32 * 48
    assert result["costs"]["parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_explain_says_what_it_skips(run: Run, tmp_path: Path) -> None:
    BY_NAME["bert"].build().save_pretrained(tmp_path / "bert")
    result = run("explain", tmp_path / "bert")
    assert len(result["sites"]) == 2
    assert [skipped["name"] for skipped in result["skipped"]] == ["cls.predictions"]
    assert result["skipped"][0]["node"] and "normalisation" in result["skipped"][0]["reason"]


def test_explain_for_people(dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in dense.iterdir()}
    assert main(["explain", str(dense)]) == 0
    out, err = capsys.readouterr()
    assert "2 feed-forward networks" in out and "model.layers.1.mlp" in out and "silu" in out
    assert "loading" in err and "loading" not in out
    assert {path.name: path.stat().st_mtime_ns for path in dense.iterdir()} == before


def test_explain_reads_gguf(run: Run, dense: Path, model: Any, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    result = run("explain", write_llama(model, tmp_path / "tiny.gguf"))
    assert [site["intermediate_size"] for site in result["sites"]] == [48, 48]


# Convert

CONVERT_KEYS = {
    "recipe",
    "experts",
    "shared",
    "top_k",
    "router",
    "active_fraction",
    "parity_max_abs_error",
    "reconstruction",
    "seconds",
    "peak_rss_bytes",
}


def check_converted(result: dict[str, Any], folder: Path) -> None:
    """What holds of every conversion of the tiny model."""
    assert set(result) >= CONVERT_KEYS
    assert 0 <= result["parity_max_abs_error"] <= 1e-4
    assert result["seconds"] > 0 and result["peak_rss_bytes"] > 10**7
    assert [row["site"] for row in result["reconstruction"]] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert all(math.isfinite(row["relative_error"]) for row in result["reconstruction"])
    record = json.loads((folder / "moecompile.json").read_text())
    for key in CONVERT_KEYS - {"seconds"}:
        assert record[key] == result[key]
    wanted = {"config.json", "model.safetensors", "moe_plan.json", "moecompile.json", "README.md", "tokenizer.json"}
    assert wanted <= {path.name for path in folder.iterdir()}
    assert not list(folder.parent.glob(".*")) and not list(folder.glob(".*"))
    assert len(moecompile.moe_blocks(moecompile.load(folder))) == 2


def test_convert_contiguous(run: Run, dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    options = ("--recipe", "contiguous", "--experts", 5, "--shared", 1, "--top-k", 2)
    result = run("convert", dense, out, *options)
    check_converted(result, out)
    assert (result["recipe"], result["experts"], result["shared"], result["top_k"]) == ("contiguous", 5, 1, 2)
    assert result["active_fraction"] == 0.5 and result["router"] != "none"
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "moecompile" and (config["num_experts"], config["num_experts_per_tok"]) == (5, 2)


def test_convert_with_every_expert_is_exact(run: Run, dense: Path, tmp_path: Path) -> None:
    result = run("convert", dense, tmp_path / "moe", "--recipe", "contiguous", "--experts", 7)
    assert result["active_fraction"] == 1
    assert all(row["relative_error"] < 1e-5 for row in result["reconstruction"])


@pytest.mark.parametrize("compensation", ["none", "means", "refit"])
def test_convert_static(run: Run, dense: Path, tmp_path: Path, text: Path, compensation: str) -> None:
    out = tmp_path / "moe"
    options = ("--recipe", "static", "--active-fraction", 0.25, "--compensation", compensation, "--calibration", text)
    result = run("convert", dense, out, *options, *CALIBRATED)
    check_converted(result, out)
    assert result["recipe"] == "static" and result["active_fraction"] == 0.25
    assert result["calibration"]["files"] == [text.name] and result["calibration"]["tokens"] == 256
    for row in result["reconstruction"]:
        bare, compensated = row["relative_error_uncompensated"], row["relative_error"]
        assert bare is None or compensated == bare if compensation == "none" else compensated < bare


def test_each_text_gives_its_share(run: Run, dense: Path, tmp_path: Path, text: Path) -> None:
    """What is read decides the neurons that stay: other shares, another plan; the record and the card tell the shares."""
    other = tmp_path / "other.txt"
    other.write_text(corpus(4000, 9))
    plans = []
    for number, weights in enumerate(((), ("--calibration-weights", 1, 3))):
        out = tmp_path / f"moe{number}"
        options = ("--recipe", "static", "--active-fraction", 0.25, "--calibration", text, other, *CALIBRATED, *weights)
        result = run("convert", dense, out, *options)
        assert result["calibration"].get("weights") == ([1, 3] if weights else None)
        assert ("in shares of 1 : 3" in (out / "README.md").read_text()) == bool(weights)
        plans.append(json.loads((out / "moe_plan.json").read_text()))
    assert plans[0] != plans[1]


def test_convert_flap(run: Run, dense: Path, tmp_path: Path, text: Path) -> None:
    out = tmp_path / "moe"
    options = ("--recipe", "flap", "--active-fraction", 0.5, "--calibration", text)
    result = run("convert", dense, out, *options, *CALIBRATED)
    check_converted(result, out)
    assert result["recipe"] == "flap" and result["active_fraction"] == 0.5


def test_keep_exact(run: Run, dense: Path, model: Any, tmp_path: Path, text: Path, tokenizer: Any) -> None:
    options = ("--recipe", "static", "--active-fraction", 0.5, "--compensation", "refit", "--calibration", text)
    rows = rows_of(tokenizer, text, 3)
    difference = {}
    for keep in ((), ("--keep-exact",)):
        out = tmp_path / f"moe{len(keep)}"
        run("convert", dense, out, *options, *CALIBRATED, *keep)
        moe = moecompile.load(out)
        moecompile.set_top_k(moe, None)
        with torch.no_grad():
            difference[bool(keep)] = float((moe(input_ids=rows).logits - model(input_ids=rows).logits).abs().max())
    assert difference[True] < 1e-4 < difference[False]


def test_dtype(run: Run, dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    run("convert", dense, out, "--recipe", "contiguous", "--dtype", "bfloat16")
    assert {t.dtype for t in load_file(out / "model.safetensors").values() if t.is_floating_point()} == {torch.bfloat16}
    assert moecompile.load(out).dtype == torch.bfloat16


def test_dtype_is_the_source_s_own(run: Run, model: Any, tmp_path: Path) -> None:
    import copy

    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    run("convert", tmp_path / "half", tmp_path / "moe", "--recipe", "contiguous")
    assert moecompile.load(tmp_path / "moe").dtype == torch.bfloat16


def test_overwrite(run: Run, dense: Path, whole: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "moe"))
    (out / "stale.txt").write_text("of the old model")
    result = run("convert", dense, out, "--recipe", "contiguous", "--experts", 3, "--overwrite")
    check_converted(result, out)
    assert len(json.loads((out / "moe_plan.json").read_text())["sites"][0]["experts"]) == 3
    assert not (out / "stale.txt").exists()


def test_same_seed_same_model(run: Run, dense: Path, tmp_path: Path, text: Path) -> None:
    weights = {}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        options = ("--recipe", "static", "--compensation", "means", "--calibration", text, *CALIBRATED, "--seed", seed)
        run("convert", dense, tmp_path / name, *options)
        weights[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert weights["a"] == weights["b"] != weights["c"]


def test_convert_shows_progress_on_stderr(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--recipe", "contiguous", "--experts", "4", "--json"]
    assert main(["convert", str(dense), str(tmp_path / "a"), *options]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1 and json.loads(out)["out"] == str(tmp_path / "a")
    assert all(word in err for word in ("loading", "parity", "writing"))
    assert main(["convert", str(dense), str(tmp_path / "b"), *options, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_convert_for_people(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(dense), str(tmp_path / "moe"), "--recipe", "contiguous", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "2 FFNs" in out and "100% of their neurons" in out and "max abs error" in out


# Eval


def test_perplexity_of_a_dense_model(run: Run, dense: Path, model: Any, text: Path, tokenizer: Any) -> None:
    rows = rows_of(tokenizer, text, 5)
    result = run("eval", dense, "--text", text, "--window", WINDOW, "--max-windows", 5)
    assert {"perplexity", "windows", "tokens", "seconds", "active_fraction"} <= set(result)
    assert result["perplexity"] == pytest.approx(math.exp(losses(model, rows).mean()), rel=1e-5)
    assert (result["windows"], result["tokens"], result["active_fraction"]) == (5, 5 * (WINDOW - 1), 1)


def test_perplexity_of_all_the_text(run: Run, dense: Path, model: Any, text: Path, tokenizer: Any) -> None:
    rows = rows_of(tokenizer, text)
    result = run("eval", dense, "--text", text, text, "--window", WINDOW)
    assert result["windows"] == 2 * len(rows)
    assert result["perplexity"] == pytest.approx(math.exp(losses(model, rows).mean()), rel=1e-5)


def test_perplexity_of_a_converted_model(run: Run, routed: Path, text: Path, tokenizer: Any) -> None:
    rows = rows_of(tokenizer, text, 5)
    result = run("eval", routed, "--text", text, "--window", WINDOW, "--max-windows", 5, "--no-record")
    assert result["perplexity"] == pytest.approx(math.exp(losses(moecompile.load(routed), rows).mean()), rel=1e-5)
    assert result["active_fraction"] == 0.5 and result["top_k"] == 2


def test_top_k(run: Run, dense: Path, routed: Path, text: Path) -> None:
    options = ("--text", text, "--window", WINDOW, "--max-windows", 4, "--no-record")
    reference = run("eval", dense, *options)["perplexity"]
    found = {k: run("eval", routed, *options, "--top-k", k) for k in (0, 2, 5)}
    assert {k: result["top_k"] for k, result in found.items()} == {0: 0, 2: 2, 5: 5}
    assert [found[k]["active_fraction"] for k in (0, 2, 5)] == pytest.approx([1 / 6, 1 / 2, 1], abs=1e-6)
    assert found[5]["perplexity"] == pytest.approx(reference, rel=1e-5)
    assert found[0]["perplexity"] != pytest.approx(reference, rel=1e-3)
    assert found[2]["perplexity"] != pytest.approx(found[0]["perplexity"], rel=1e-3)


@pytest.mark.parametrize("prefix", [1, 9, WINDOW - 2])
def test_dense_prefix_with_all_experts_is_the_plain_loss(
    run: Run, whole: Path, model: Any, text: Path, tokenizer: Any, prefix: int
) -> None:
    options = ("--text", text, "--window", WINDOW, "--max-windows", 4, "--no-record")
    result = run("eval", whole, *options, "--dense-prefix", prefix)
    expected = losses(model, rows_of(tokenizer, text, 4))[:, prefix - 1 :]
    assert result["perplexity"] == pytest.approx(math.exp(expected.mean()), rel=1e-5)
    assert result["tokens"] == expected.numel() and result["dense_prefix"] == prefix and result["dense_prefix_exact"]


def test_dense_prefix_of_a_routed_model(routed: Path, model: Any, text: Path, tokenizer: Any) -> None:
    """The prefix's keys and values are the dense model's, and what follows is routed."""
    moe, prefix = moecompile.load(routed), 9
    rows = evaluation_windows(tokenizer, [text], WINDOW, 3)
    with torch.no_grad():
        total = 0.0
        for row in rows:
            head = model(input_ids=row[None, :prefix], use_cache=True)
            rest = moe(input_ids=row[None, prefix:], past_key_values=head.past_key_values, use_cache=True)
            logits = torch.cat([head.logits[0, -1:], rest.logits[0, :-1]])
            total += float(torch.nn.functional.cross_entropy(logits, row[prefix:], reduction="sum"))
    expected = math.exp(total / (len(rows) * (WINDOW - prefix)))
    assert perplexity(moe, rows, dense_prefix=prefix)["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(math.exp(losses(moe, rows)[:, prefix - 1 :].mean()), rel=1e-5)


@pytest.fixture(scope="module")
def passages(tmp_path_factory: pytest.TempPathFactory, model: Any, tokenizer: Any) -> tuple[Path, float]:
    """(passages of which some end in the model's own guess, the share that do)."""
    words = [word for word in tokenizer.get_vocab() if not word.startswith("<")]
    generator = torch.Generator().manual_seed(5)
    rows, right = [], 0
    for number in range(40):
        length = 3 + number % 7
        context = [words[i] for i in torch.randint(len(words), (length,), generator=generator).tolist()]
        ids = tokenizer(" ".join(context), return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            guess = tokenizer.convert_ids_to_tokens(int(model(input_ids=ids).logits[0, -1].argmax()))
        last = guess if number % 3 == 0 and guess in words else words[number % len(words)]
        right += last == guess
        rows.append({"text": " ".join([*context, last])})
    path = tmp_path_factory.mktemp("lambada") / "lambada.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert 5 <= right <= 35
    return path, right / len(rows)


def test_lambada(run: Run, dense: Path, whole: Path, passages: tuple[Path, float]) -> None:
    path, share = passages
    result = run("eval", dense, "--task", "lambada", "--text", path)
    assert result["accuracy"] == pytest.approx(share) and result["examples"] == 40
    assert {"accuracy", "perplexity", "seconds", "active_fraction"} <= set(result)
    same = run("eval", whole, "--task", "lambada", "--text", path, "--no-record")
    assert same["accuracy"] == result["accuracy"]
    assert run("eval", dense, "--task", "lambada", "--text", path, "--max-examples", 7)["examples"] == 7


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """What a folder's record says was measured."""
    return json.loads((folder / "moecompile.json").read_text())["evaluations"]


def test_figures_are_recorded_once(
    run: Run,
    routed: Path,
    text: Path,
    passages: tuple[Path, float],
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(routed, tmp_path / "moe"))
    weights = (folder / "model.safetensors").read_bytes()
    options = ("--text", text, "--window", WINDOW, "--max-windows", 2)
    first = run("eval", folder, *options)
    assert evaluations(folder) == [first]
    second = run("eval", folder, *options)
    assert evaluations(folder) == [second]
    for more in (("--top-k", 5), ("--dense-prefix", 4), ("--window", 16), ("--max-windows", 1)):
        run("eval", folder, *options, *more)
    run("eval", folder, "--task", "lambada", "--text", passages[0])
    assert len(evaluations(folder)) == 6 and evaluations(folder)[0] == second
    run("eval", folder, *options, "--top-k", 5)
    assert len(evaluations(folder)) == 6
    assert f"{first['perplexity']:.2f}" in (folder / "README.md").read_text()
    assert (folder / "model.safetensors").read_bytes() == weights
    assert moecompile.load(folder).moecompile_record["evaluations"] == evaluations(folder)


def test_figures_are_not_recorded_when_told_so(run: Run, routed: Path, dense: Path, text: Path) -> None:
    before = {path: path.read_bytes() for folder in (routed, dense) for path in folder.iterdir()}
    run("eval", routed, "--text", text, "--window", WINDOW, "--max-windows", 1, "--no-record")
    run("eval", dense, "--text", text, "--window", WINDOW, "--max-windows", 1)
    assert {path: path.read_bytes() for folder in (routed, dense) for path in folder.iterdir()} == before


def test_eval_for_people(routed: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--text", str(text), "--window", str(WINDOW), "--max-windows", "2", "--no-record", "--quiet"]
    assert main(["eval", str(routed), *options]) == 0
    out, err = capsys.readouterr()
    setting = r"words.txt, 2 windows of 32, 50% of FFN neurons active"
    assert re.fullmatch(rf"perplexity [\d.]+  \({setting}, [\d.]+ s\)\n", out)
    assert err == ""


def test_eval_compiled(run: Run, routed: Path, text: Path) -> None:
    options = ("--text", text, "--window", WINDOW, "--max-windows", 2, "--no-record")
    eager, compiled = run("eval", routed, *options), run("eval", routed, *options, "--compile")
    assert compiled["compile"] is True and "compile" not in eager
    assert compiled["perplexity"] == pytest.approx(eager["perplexity"], rel=1e-4)


# Generate

PROMPT = "the router sends every token"


def greedy(model: Any, tokenizer: Any, tokens: int) -> str:
    """transformers' own greedy continuation."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_generate(run: Run, dense: Path, routed: Path, whole: Path, model: Any, tokenizer: Any) -> None:
    expected = greedy(model, tokenizer, 20)
    assert len(set(expected.split())) > 3
    options = ("--prompt", PROMPT, "--max-new-tokens", 20)
    result = run("generate", dense, *options)
    assert {"text", "tokens_per_second"} <= set(result) and result["tokens_per_second"] > 0
    assert result["text"] == expected and result["prompt_tokens"] == 5
    assert run("generate", whole, *options)["text"] == expected
    assert run("generate", routed, *options, "--top-k", 5)["text"] == expected
    own = run("generate", routed, *options)["text"]
    assert own == greedy(moecompile.load(routed), tokenizer, 20) and own != expected


def test_generate_samples_by_seed(run: Run, dense: Path) -> None:
    options = ("--prompt", PROMPT, "--max-new-tokens", 20, "--temperature", 3)
    texts = [run("generate", dense, *options, "--seed", seed)["text"] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    narrow = run("generate", dense, *options, "--top-p", 1e-6)["text"]
    assert narrow == run("generate", dense, "--prompt", PROMPT, "--max-new-tokens", 20)["text"]


def test_sampling_is_of_all_words(run: Run, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    own = transformers.LlamaForCausalLM.generate
    monkeypatch.setattr(
        transformers.LlamaForCausalLM, "generate", lambda self, **given: (seen.update(given), own(self, **given))[1]
    )
    run("generate", dense, "--prompt", PROMPT, "--max-new-tokens", 4, "--temperature", 1)
    assert seen["top_k"] == 0 and seen["do_sample"]  # transformers' own default are the 50 likeliest


def test_generate_with_an_encoder(tokenizer: Any) -> None:
    model = BY_NAME["t5"].build(vocab_size=len(tokenizer))
    for words in (3, 12):
        prompt = " ".join(["router"] * words)
        found = moecompile.generate.generate(model, tokenizer, prompt, max_new_tokens=8)
        output = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=8, do_sample=False)
        assert found["new_tokens"] == output.shape[1] - 1 > 0
        assert found["text"] == tokenizer.decode(output[0], skip_special_tokens=True)


def test_generate_for_people(dense: Path, model: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(dense), "--prompt", PROMPT, "--max-new-tokens", "6", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert out == greedy(model, tokenizer, 6) + "\n" and err == ""


def test_chat_template(run: Run, dense: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(dense, tmp_path / "chat"))
    template = "the {% for message in messages %}{{ message.content }}{% endfor %} sends"
    (folder / "chat_template.jinja").write_text(template)
    result = run("generate", folder, "--chat", "--prompt", "router", "--max-new-tokens", 8)
    assert result["prompt_tokens"] == 3
    assert result["text"] == run("generate", dense, "--prompt", "the router sends", "--max-new-tokens", 8)["text"]


# Report


def test_report(run: Run, routed: Path, whole: Path, dense: Path, text: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(routed, tmp_path / "moe"))
    figure = run("eval", folder, "--text", text, "--window", WINDOW, "--max-windows", 2)["perplexity"]
    reference = run("eval", dense, "--text", text, "--window", WINDOW, "--max-windows", 2)
    (tmp_path / "dense.json").write_text(json.dumps(reference))
    result = run("report", folder, "--compare", whole, tmp_path / "dense.json")
    page = Path(result["path"])
    assert page == folder / "report.html"
    source = page.read_text(encoding="utf-8")
    assert f"{figure:.2f}" in source and f"{reference['perplexity']:.2f}" in source
    assert "model.layers.1.mlp" in source
    assert "<style" in source
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?:https?:)?//|@import|<script[^>]+src|<link", source)


def test_report_elsewhere(run: Run, whole: Path, tmp_path: Path) -> None:
    before = sorted(whole.iterdir())
    result = run("report", whole, "--output", tmp_path / "page.html")
    assert Path(result["path"]) == tmp_path / "page.html" and (tmp_path / "page.html").stat().st_size > 1000
    assert sorted(whole.iterdir()) == before


def test_a_folder_with_a_report_is_still_a_model(run: Run, dense: Path, whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "moe"))
    run("report", folder)
    assert len(moecompile.moe_blocks(moecompile.load(folder))) == 2
    run("convert", dense, folder, "--recipe", "contiguous", "--overwrite")
    assert not (folder / "report.html").exists()
