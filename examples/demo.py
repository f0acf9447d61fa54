"""The whole way on a real model: explain, convert, evaluate, generate, report; every step is a command that you can type.

    python examples/demo.py [--output demo-output] [--windows 8] [--calibration-tokens 16384]

Needs about 2.5 GB of disk. Dense, static, flap and calibrated are measured on the same windows of WikiText-2's test split;
what is calibrated sees only the five domain texts of examples/data.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shlex
import sys
import time
from pathlib import Path

from fetch_model import fetch

from moecompile.cli import main as moecompile
from moecompile.hub import load_dense, load_tokenizer

DATA = Path(__file__).resolve().parent / "data"
DOMAINS = [str(DATA / f"{name}.txt") for name in ("books", "code", "docs", "math", "wiki")]
TEST = str(DATA / "wikitext2_test_head.txt")
PROMPT = "The most important thing about a good tool is"


def run(*arguments: str) -> dict:
    """Run a command, show it, and return its JSON."""
    print(f"\n$ moecompile {shlex.join(arguments)}", flush=True)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = moecompile([*arguments, "--json"])
    if code:
        raise SystemExit(code)
    return json.loads(out.getvalue())


def dense_folder(output: Path) -> str:
    """The model as a folder: reading GGUF takes a quarter of a minute, so it is done once."""
    folder = output / "SmolLM2-135M-Instruct"
    if not (folder / "model.safetensors").is_file():
        gguf = str(fetch())
        print(f"dequantising {Path(gguf).name}", flush=True)
        model = load_dense(gguf)
        model.save_pretrained(folder)
        load_tokenizer(gguf).save_pretrained(folder)
    return str(folder)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    options = parser.parse_args()
    start = time.perf_counter()
    options.output.mkdir(parents=True, exist_ok=True)
    dense = dense_folder(options.output)

    explained = run("explain", dense)
    first = explained["sites"][0]
    print(
        f"{len(explained['sites'])} feed-forward networks ({first['kind']}, {first['activation']}, "
        f"{first['hidden_size']} x {first['intermediate_size']}), {len(explained['skipped'])} candidates skipped"
    )

    calibration = ["--calibration", *DOMAINS, "--calibration-tokens", str(options.calibration_tokens)]
    recipes = {
        "static": ["--active-fraction", "0.5"],
        "flap": ["--active-fraction", "0.5"],
        "calibrated": ["--experts", "96", "--shared", "32", "--top-k", "32"],
    }
    models = {"dense": dense}
    for recipe, settings in recipes.items():
        models[recipe] = str(options.output / recipe)
        done = run("convert", dense, models[recipe], "--recipe", recipe, *settings, *calibration, "--overwrite")
        print(
            f"all experts on, before compensation: max abs error {done['parity_max_abs_error']:.1e}; "
            f"{done['seconds']:.0f} s, peak memory {done['peak_rss_bytes'] / 2**30:.1f} GiB"
        )

    rows = []
    for name, model in models.items():
        measured = run("eval", model, "--text", TEST, "--window", "1024", "--max-windows", str(options.windows))
        (options.output / f"eval-{name}.json").write_text(json.dumps(measured), encoding="utf-8")
        written = run("generate", model, "--prompt", PROMPT, "--max-new-tokens", "32")
        print(PROMPT + written["text"])
        rows.append((name, measured, written))

    compiled = {}
    for name in ("dense", "calibrated"):  # both by moecompile.compile, which for the dense model is torch.compile
        fast = run("generate", models[name], "--prompt", PROMPT, "--max-new-tokens", "64", "--compile")
        compiled[name] = fast["tokens_per_second"]

    compared = [models["static"], models["flap"], str(options.output / "eval-dense.json")]
    page = run("report", models["calibrated"], "--compare", *compared)["path"]

    print(f"\nWikiText-2 test, {options.windows} windows of 1024 tokens; calibrated on other texts (seed 0)")
    print(f"{'model':<12}{'active':>8}{'perplexity':>12}{'over dense':>12}{'tokens/s':>10}{'compiled':>10}")
    base = rows[0][1]["perplexity"]
    for name, measured, written in rows:
        print(
            f"{name:<12}{measured['active_fraction']:>8.0%}{measured['perplexity']:>12.2f}"
            f"{measured['perplexity'] / base:>11.2f}x{written['tokens_per_second']:>10.1f}"
            + (f"{compiled[name]:>10.1f}" if name in compiled else f"{'-':>10}")
        )
    print("tokens/s: decoding one sequence on the CPU by transformers' generate, without compiling and with")
    print(f"compiled, the MoE decodes {compiled['calibrated'] / compiled['dense']:.2f}x as fast as the dense model")
    print(f"\n{time.perf_counter() - start:.0f} s in all. The report: {Path(page).resolve()}")


if __name__ == "__main__":
    sys.exit(main())
