"""Read-ME beside what it has to beat, at equal active fraction and equal tuning tokens: perplexity by domain of text.

    python benchmarks/read_me.py --domains TEXT... [--text WIKITEXT] [--tokens 98304] [--only dense static aligned] \\
        [--work FOLDER] [--output benchmarks/results/read_me.json]

The last tenth of each text is held out: conversions are calibrated and models tuned on what stands before it, and windows of
it are measured by domain. WikiText-2 is measured alone, never chosen by. The commands `convert` and `tune` do the work, in
processes of their own; rows are kept one by one (written aside and renamed), and the same command again does only what is
missing: a conversion or a tuning whose folder is there with the same settings is not done again, a killed tuning goes on.
`--table` writes the table from the rows there are.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
DATA = ROOT / "examples" / "data"
NAMES = ("books", "code", "docs", "math", "wiki")
ROUTED = "router,experts,norms,attention"
PLAIN = "experts,norms,attention"
RUN = "import sys; from moecompile.cli import main; sys.exit(main(sys.argv[1:]))"
COMMON = ("--label-weight", "0.5", "--learning-rate", "3e-4", "--window", "256", "--batch", "8", "--held-out", "2")


@dataclass(frozen=True)
class Variant:
    """A row before tuning and one after it.

    Attributes:
        label: in the table.
        convert: arguments of ``moecompile convert``.
        stage: what is tuned.
        tune: more arguments of ``moecompile tune``.
        start: another variant whose conversion is taken.
    """

    label: str
    convert: tuple[str, ...]
    stage: str = ROUTED
    tune: tuple[str, ...] = ()
    start: str = ""


# Active fractions count the router: 2.35 % of SmolLM2-135M's FFN for read-me aligned, 4.2 % for 96 experts and a decision per
# layer, 3.3 % for 48, 2.1 % for calibrated's 30 linear routers. The static models get the largest share of all.
READ_ME = ("--recipe", "read-me", "--active-fraction", "0.5")
ALIGNED = (*READ_ME, "--ranking", "activation", "--budget", "even")
VARIANCE = (*READ_ME, "--ranking", "variance", "--budget", "even")
BUDGET = (*READ_ME, "--ranking", "variance", "--budget", "effect")
VARIANTS = {
    "dense": Variant("dense", ("--recipe", "static", "--active-fraction", "1"), PLAIN),
    "static": Variant("static", ("--recipe", "static", "--active-fraction", "0.525", "--compensation", "refit"), PLAIN),
    "flap": Variant("flap", ("--recipe", "flap", "--active-fraction", "0.525"), PLAIN),
    "calibrated": Variant(
        "calibrated, layer-wise", ("--recipe", "calibrated", "--experts", "96", "--shared", "32", "--top-k", "32")
    ),
    "aligned": Variant("read-me, aligned, ranked as in the paper", ALIGNED),
    "aligned-variance": Variant("read-me, aligned, ranked by variance", VARIANCE),
    "aligned-budget": Variant("read-me, aligned, by variance, widths by layer", BUDGET),
    "static-60": Variant("static", ("--recipe", "static", "--active-fraction", "0.599", "--compensation", "refit"), PLAIN),
    "calibrated-60": Variant(
        "calibrated, layer-wise", ("--recipe", "calibrated", "--experts", "96", "--shared", "32", "--top-k", "42")
    ),
    "aligned-60": Variant(
        "read-me, aligned, by variance, widths by layer",
        ("--recipe", "read-me", "--active-fraction", "0.575", "--ranking", "variance", "--budget", "effect"),
    ),
    "disjoint": Variant(
        "read-me, disjoint 96", ("--recipe", "read-me", "--disjoint", "--experts", "96", "--shared", "32", "--top-k", "29")
    ),
    "disjoint-48": Variant(
        "read-me, disjoint 48", ("--recipe", "read-me", "--disjoint", "--experts", "48", "--shared", "16", "--top-k", "15")
    ),
    "aligned-straight": Variant(
        "read-me, aligned, router by straight-through",
        ALIGNED,
        tune=("--front-straight-through", "--front-weight", "0"),
        start="aligned",
    ),
    "aligned-rounds": Variant(
        "the same, tuned in 2 rounds of router and experts", BUDGET, tune=("--rounds", "2"), start="aligned-budget"
    ),
}


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", help="a folder or .gguf file (default: SmolLM2-135M-Instruct, downloaded)")
    made.add_argument("--domains", nargs="+", default=[str(DATA / f"{name}.txt") for name in NAMES])
    made.add_argument("--text", default=str(DATA / "wikitext2_test_head.txt"), help="evaluation text, 8 windows of 1,024")
    made.add_argument("--windows", type=int, default=6, help="held-out windows of 512 tokens per domain (default: 6)")
    made.add_argument("--calibration-tokens", type=int, default=40960, help="of each conversion (default: 40960)")
    made.add_argument("--tokens", type=int, default=98304, help="tuning tokens of each variant (default: 98304)")
    made.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT",
                      help=f"of: {', '.join(VARIANTS)}")  # fmt: skip
    made.add_argument("--untuned", action="store_true", help="only the rows before tuning")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--work", type=Path, default=Path("read_me_work"), help="where the converted folders are kept")
    made.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "read_me.json")
    made.add_argument("--table", action="store_true", help="measure nothing, write the table")
    made.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    return made


def main() -> None:
    """Do what is missing, in the order of --only; write the table."""
    options = parser().parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options)))
        return
    if not options.table:
        if options.model is None:
            from fetch_model import fetch

            options.model = str(fetch())
        options.work.mkdir(parents=True, exist_ok=True)
        texts = leading_parts(options)
        for name in options.only:
            variant = VARIANTS[name]
            folder = options.work / (variant.start or name)
            if not variant.start:
                convert = [options.model, str(folder), *variant.convert, "--seed", str(options.seed), "--overwrite"]
                convert += ["--calibration-tokens", str(options.calibration_tokens)]
                done(options, folder, ["convert", *convert, "--calibration", *map(str, texts)])
                row(options, name, False, folder)
            if not options.untuned:
                target = options.work / f"{name}-tuned"
                tune = [str(folder), "--output", str(target), "--overwrite", "--tokens", str(options.tokens)]
                tune += ["--stage", variant.stage, *COMMON, *variant.tune, "--seed", str(options.seed), "--save-every", "8"]
                done(options, target, ["tune", *tune, "--text", *options.domains], folder)
                row(options, name, True, target)
    record = read(options.output)
    table = markdown(record)
    options.output.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)


def leading_parts(options: argparse.Namespace) -> list[Path]:
    """The texts without the tokens that :func:`moecompile.tuning.data.split` holds out, in files of their own."""
    from moecompile.files import write_bytes
    from moecompile.hub import load_tokenizer
    from moecompile.text import read_text, token_ids
    from moecompile.tuning.data import HELD_OUT

    (options.work / "texts").mkdir(exist_ok=True)
    tokenizer, paths = load_tokenizer(options.model), []
    for path in map(Path, options.domains):
        paths.append(options.work / "texts" / path.name)
        text = read_text(path)
        ids = token_ids(tokenizer, text)
        part = tokenizer.decode(ids[: len(ids) - round(HELD_OUT * len(ids))], clean_up_tokenization_spaces=False)
        if not text.startswith(part):
            raise SystemExit(f"{path}: the tokenizer does not give the text back, so its last tenth cannot be cut off")
        write_bytes(paths[-1], part.encode())
    return paths


def done(options: argparse.Namespace, folder: Path, command: list[str], start: Path | None = None) -> None:
    """Run a command of moecompile, unless the folder is there and was made by the same one, from the same ``start``."""
    made = {"command": command}
    if start is not None:
        made["start"] = json.loads(_mark(start).read_text(encoding="utf-8"))["command"]
    mark = _mark(folder)
    if folder.is_dir() and mark.is_file():
        known = json.loads(mark.read_text(encoding="utf-8"))
        if {key: known.get(key) for key in made} == made:
            return
    say(f"moecompile {' '.join(command)}")
    began = time.perf_counter()
    with folder.with_name(f"{folder.name}.log").open("w", encoding="utf-8") as log:
        outcome = subprocess.run([sys.executable, "-c", RUN, *command, "--json"], stdout=subprocess.PIPE, stderr=log)
    if outcome.returncode:
        raise SystemExit(f"moecompile {command[0]} failed; see {log.name}")
    result = json.loads(outcome.stdout)
    kept = {key: value for key, value in result.items() if not isinstance(value, list)}
    write(mark, {**made, "seconds": round(time.perf_counter() - began, 1), "result": kept})


def _mark(folder: Path) -> Path:
    """Where it is kept how a folder was made."""
    return folder.with_name(f"{folder.name}.json")


def row(options: argparse.Namespace, name: str, tuned: bool, folder: Path) -> None:
    """Measure a folder in a process of its own and keep the row, unless it is there."""
    record = read(options.output)
    key = {"variant": name, "tuned": tuned, "tokens": options.tokens if tuned else 0, "seed": options.seed}
    key["calibration_tokens"] = options.calibration_tokens
    if any(all(one[part] == key[part] for part in key) for one in record["rows"]):
        return
    say(f"measuring {folder}")
    command = [sys.executable, __file__, "--measure", str(folder), "--text", options.text, "--windows", str(options.windows)]
    outcome = subprocess.run([*command, "--domains", *options.domains], stdout=subprocess.PIPE, check=True)
    mark = json.loads(_mark(folder).read_text(encoding="utf-8"))
    figures = {**key, **json.loads(outcome.stdout), "seconds": mark["seconds"], "command": shortened(mark["command"])}
    for part in ("tokens_per_second", "peak_rss_bytes"):
        if part in mark["result"]:
            figures[part] = mark["result"][part]
    record = read(options.output)  # again: another process may have measured meanwhile
    record["rows"].append(figures)
    record |= {"model": Path(options.model).name, "domains": [Path(path).name for path in options.domains]}
    record |= {"threads": os.environ.get("OMP_NUM_THREADS", ""), "windows": options.windows, "text": Path(options.text).name}
    write(options.output, record)
    say(json.dumps(figures))


def shortened(command: list[str]) -> str:
    """A command without the folders' places."""
    return " ".join(Path(part).name if part.startswith("/") else part for part in command)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Perplexities of a folder, and what it computes per token beside the dense FFN, the router counted."""
    import torch

    from moecompile.cli.common import checkpoint
    from moecompile.evaluate import active_fraction, perplexity
    from moecompile.hub import load_tokenizer
    from moecompile.text import read_text, token_ids, windows
    from moecompile.tuning.data import split

    tokenizer = load_tokenizer(str(options.measure))
    model = checkpoint.load(options.measure).eval()
    result: dict[str, Any] = {"perplexity": {}, "active_fraction": round(active_fraction(model), 5)}
    for path in map(Path, options.domains):
        result["perplexity"][path.stem] = round(
            perplexity(model, split(tokenizer, [path], 512, options.windows)[1])["perplexity"], 4
        )
    rows = windows(token_ids(tokenizer, read_text(Path(options.text))), 1024)[:8]
    costs = checkpoint.record_of(options.measure)["costs"]
    result["computed"] = round(costs["flops_per_token"] / costs["flops_per_token_dense"], 5)
    result["wikitext2"] = round(perplexity(model, torch.as_tensor(rows))["perplexity"], 4)
    return result


def markdown(record: dict[str, Any]) -> str:
    """The rows as a table: each domain's perplexity, their geometric mean, WikiText-2."""
    names = [Path(name).stem for name in record.get("domains", ())]
    lines = [
        f"{record.get('model')}: perplexity on {record.get('windows')} held-out windows of 512 tokens per domain and on 8 of "
        f"1,024 of {record.get('text')}. Computed: FLOPs of FFNs and routers over the dense FFNs'.",
        "",
        f"| | calibrated on | tuned on | seed | computed | {' | '.join(names)} | mean | WikiText-2 |",
        f"|---|---|---|---|---|{'---|' * len(names)}---|---|",
    ]
    order = {name: number for number, name in enumerate(VARIANTS)}

    def place(one: dict[str, Any]) -> tuple[int, ...]:
        return one["tokens"], one["calibration_tokens"], order.get(one["variant"], 99), one["seed"]

    for one in sorted(record["rows"], key=place):
        values = [one["perplexity"][name] for name in names]
        mean = math.exp(sum(map(math.log, values)) / len(values))
        label = VARIANTS[one["variant"]].label if one["variant"] in VARIANTS else one["variant"]
        cells = " | ".join(f"{value:.2f}" for value in [*values, mean, one["wikitext2"]])
        settings = f"{one['calibration_tokens']} | {one['tokens'] or '-'} | {one['seed']}"
        lines.append(f"| {label} | {settings} | {one['computed']:.1%} | {cells} |")
    return "\n".join(lines) + "\n"


def read(path: Path) -> dict[str, Any]:
    """The record so far."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}


def write(path: Path, record: dict[str, Any]) -> None:
    """Whole or not at all."""
    from moecompile.files import write_bytes

    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, (json.dumps(record, indent=1) + "\n").encode())


def say(text: str) -> None:
    """Progress, on stderr."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.path[:] = [
        path for path in sys.path if Path(path).resolve() != ROOT / "benchmarks"
    ]  # transformers would find kernels.py
    main()
