"""Quality of the recipes, of other papers' and of what cannot be deployed, side by side: one model, the same calibration
tokens, the same windows.

    python benchmarks/quality.py --domains TEXT... --text TEST --lambada LAMBADA.jsonl \\
        [--only cmoe flap] [--fractions 0.5] [--seeds 0 1 2] [--folders NAME=FOLDER...] [--tune TOKENS] [--output FILE.json]

Without arguments the texts of examples/data are used. With --tune each conversion is tuned, too, all of them alike. Each
conversion runs in a process of its own. Rows are kept one by one in the output file (written aside and renamed): the same
command again goes on where it was stopped and measures only what is missing, and --table alone writes the table anew. A table
(.md) and a chart (.svg) stand beside it. A failed row stops the run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(Path(__file__).resolve().parent)]

from quality_table import chart, markdown  # noqa: E402
from quality_variants import FRACTIONS, STEP_TOKENS, TUNED, VARIANTS, variant_of  # noqa: E402

from moecompile.errors import InputError  # noqa: E402
from moecompile.files import write_bytes  # noqa: E402
from moecompile.hub import load_dense, load_tokenizer  # noqa: E402
from moecompile.progress import Progress  # noqa: E402
from moecompile.text import check_weights, read_passages, read_text  # noqa: E402

DATA = ROOT / "examples" / "data"
DOMAINS = tuple(str(DATA / f"{name}.txt") for name in ("books", "code", "docs", "math", "wiki"))


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", help="a folder or .gguf file (default: SmolLM2-135M-Instruct, downloaded)")
    made.add_argument("--text", default=str(DATA / "wikitext2_test_head.txt"), help="evaluation text, never calibrated on")
    made.add_argument("--window", type=int, default=1024, help="tokens per window (default: 1024)")
    made.add_argument("--windows", type=int, default=8, help="windows of the text (default: 8)")
    made.add_argument(
        "--domains", nargs="+", default=list(DOMAINS), help="calibration texts; the last tenth of each is held out"
    )
    made.add_argument("--held-windows", type=int, default=2, help="windows of each held-out tenth, 0 for none (default: 2)")
    made.add_argument("--lambada", help="LAMBADA test (.jsonl)")
    made.add_argument("--examples", type=int, default=500, help="the first so many LAMBADA passages (default: 500)")
    made.add_argument("--calibration-tokens", type=int, default=16384)
    made.add_argument("--calibration-window", type=int, default=512)
    made.add_argument("--calibration-weights", type=float, nargs="+", metavar="W",
                      help="each domain's share of the calibration tokens (default: equal)")  # fmt: skip
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--fractions", type=float, nargs="+", choices=FRACTIONS, default=list(FRACTIONS))
    made.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT",
                      help=f"of: {', '.join(VARIANTS)}")  # fmt: skip
    made.add_argument("--folders", nargs="+", default=[], metavar="NAME=FOLDER", help="converted or tuned folders as more rows")
    made.add_argument("--prefix", type=int, default=0, help="measure the phase dial with a dense prefix of so many tokens")
    made.add_argument("--tune", type=int, default=0, metavar="TOKENS",
                      help="also tune each conversion that could be deployed, on so many tokens of the same texts")  # fmt: skip
    made.add_argument("--tune-weights", type=float, nargs="+", metavar="W",
                      help="each domain's share of the tuning tokens (default: equal)")  # fmt: skip
    made.add_argument("--compile", action="store_true", help="measure each model compiled: for many windows")
    made.add_argument("--table", action="store_true", help="measure nothing, write table and chart from the rows there are")
    made.add_argument("--quiet", action="store_true", help="no progress on stderr")
    made.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "quality.json")
    return made


def main() -> None:
    """Measure what is missing."""
    options = parser().parse_args()
    check_tuning(options)
    check_folders(options.folders)
    options.examples = min(options.examples, len(read_passages(options.lambada))) if options.lambada else 0
    if options.model is None and not options.table:
        from fetch_model import fetch

        options.model = str(fetch())
    record = json.loads(options.output.read_text(encoding="utf-8")) if options.output.exists() else None
    if options.table:
        if record is None:
            raise SystemExit(f"there are no rows in {options.output} yet")
        write(options.output, record)
        return
    with tempfile.TemporaryDirectory() as folder:
        corpora = texts(options, Path(folder))
        record = started(options, record, corpora)
        pending = list(jobs_of(options, record["rows"], corpora, Path(folder)))
        options.output.parent.mkdir(parents=True, exist_ok=True)
        if pending:
            dense = unpacked(options.model, Path(folder) / "dense")
        with Progress(quiet=options.quiet).bar("rows", len(pending)) as bar:
            for job in pending:
                rows = row_process({**job, "model": dense})
                measured = {key_of(row) for row in rows}
                record["rows"] = [row for row in record["rows"] if key_of(row) not in measured] + rows
                write(options.output, record)
                bar.show(", ".join(job["variants"]))
    write(options.output, record)
    print(options.output.with_suffix(".md").read_text(encoding="utf-8"))


def check_tuning(options: argparse.Namespace) -> None:
    """Refuse what would fail behind the first conversion.

    Raises:
        SystemExit: with what is wrong.
    """
    if options.tune and options.tune < STEP_TOKENS:
        raise SystemExit(f"--tune is {options.tune}; a step takes {STEP_TOKENS} tokens")
    try:
        check_weights("--tune-weights", options.tune_weights, len(options.domains))
    except InputError as error:
        raise SystemExit(str(error)) from None


def check_folders(pairs: list[str]) -> None:
    """Refuse names of folders that would be taken for another row's in the table.

    Raises:
        SystemExit: with what is wrong.
    """
    names = set()
    for pair in pairs:
        name, _, path = pair.partition("=")
        if not (name and path):
            raise SystemExit(f"--folders {pair}: write NAME=FOLDER")
        if name == "dense" or name.removesuffix(TUNED) in VARIANTS:
            raise SystemExit(f"--folders {pair}: '{name}' is a row of this benchmark; give the folder another name")
        if name in names:
            raise SystemExit(f"--folders {pair}: two folders are called '{name}'; each needs a name of its own")
        names.add(name)


def texts(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """The evaluation texts by name; the domains' held-out tenths, and what is left of them, are written into a folder."""
    corpora = {Path(options.text).stem: {"path": str(Path(options.text).resolve()), "windows": options.windows}}
    for part in ("calibration", "held"):
        (folder / part).mkdir()
    for path in map(Path, options.domains):
        name = f"{path.stem}.txt"  # a .jsonl has become text by now
        if (folder / "held" / name).exists() or path.stem in corpora:
            raise SystemExit(f"two texts are called {path.stem}; each needs a name of its own")
        whole = read_text(path)
        cut = whole.rfind("\n", 0, len(whole) * 9 // 10) + 1 or len(whole) * 9 // 10
        (folder / "calibration" / name).write_text(whole[:cut], encoding="utf-8")
        (folder / "held" / name).write_text(whole[cut:], encoding="utf-8")
        if options.held_windows:
            corpora[path.stem] = {"path": str(folder / "held" / name), "windows": options.held_windows}
    return corpora


def started(options: argparse.Namespace, record: dict[str, Any] | None, corpora: dict[str, Any]) -> dict[str, Any]:
    """The record to add to: the one that is there, if it was measured with the same settings, or a new one."""
    settings = {
        "model": Path(options.model).name.removesuffix(".gguf"),  # unpacked or not, the same weights
        "window": options.window,
        "corpora": {name: {"windows": part["windows"]} for name, part in corpora.items()},
        "calibration": [Path(path).name for path in options.domains],
        "calibration_tokens": options.calibration_tokens,
        "calibration_window": options.calibration_window,
        **({"calibration_weights": options.calibration_weights} if options.calibration_weights else {}),
        **({"compiled": True} if options.compile else {}),
    }
    if record is None:
        machine = {"cores": os.cpu_count(), "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))}
        return {"date": time.strftime("%Y-%m-%d"), "machine": machine, "settings": settings, "rows": []}
    if record.get("settings") != settings:
        kept = record.get("settings") or {}
        other = next((name for name in {**settings, **kept} if kept.get(name) != settings.get(name)), "settings")
        raise SystemExit(f"{options.output} was measured with another '{other}'; give the same, or another --output")
    return record


def jobs_of(options: argparse.Namespace, rows: list[Any], corpora: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
    """What is to be run, one conversion each: variants that differ only in what is done afterwards share one."""
    common = {
        "corpora": corpora,
        "window": options.window,
        "lambada": options.lambada,
        "examples": options.examples,
        "calibration": [str(folder / "calibration" / f"{Path(path).stem}.txt") for path in options.domains],
        "calibration_tokens": options.calibration_tokens,
        "calibration_window": options.calibration_window,
        "calibration_weights": options.calibration_weights,
        "tune": options.tune,
        "tune_weights": options.tune_weights,
        "prefix": options.prefix,
        "dial": [name for name, variant in VARIANTS.items() if variant.dial] if options.prefix else [],
        "compile": options.compile,
        "quiet": options.quiet,
        "recipe": None, "settings": {}, "seed": None, "fraction": None, "folder": None,
    }  # fmt: skip
    done = [row for row in rows if complete(row, options)]
    there = {key_of(row) for row in done}
    if ("dense", None, None) not in there:
        yield {**common, "variants": {"dense": "dense"}}
    for seed in options.seeds:
        for fraction in sorted(options.fractions, key=lambda value: abs(value - 0.5)):  # half active first
            groups: dict[str, dict[str, Any]] = {}
            for name in (*options.only, *(tuned_names(options.only) if options.tune else ())):
                if (name, fraction, seed) in there:
                    continue
                variant = variant_of(name)
                recipe = variant.recipe(fraction) if variant.recipe else None
                found = {
                    "recipe": None if recipe is None else recipe.name,
                    "settings": {} if recipe is None else recipe.settings(),
                }
                key = json.dumps([found, variant.wrap == "fitted oracle"])
                groups.setdefault(key, {**common, **found, "seed": seed, "fraction": fraction, "variants": {}})
                groups[key]["variants"][name] = variant.wrap
            yield from groups.values()
    held = {row["variant"]: row["folder"] for row in done if row.get("folder")}
    for name, _, path in (pair.partition("=") for pair in options.folders):
        if held.get(name) != Path(path).name:  # the same name may have come to stand for another folder
            yield {**common, "folder": path, "variants": {name: ""}}


def tuned_names(names: Iterable[str]) -> list[str]:
    """The rows that tuning adds: one for each conversion that could be deployed."""
    return [f"{name}{TUNED}" for name in names if VARIANTS[name].recipe and not VARIANTS[name].wrap]


def key_of(row: dict[str, Any]) -> tuple[str, float | None, int | None]:
    """What tells rows apart; a folder's row by its name alone."""
    return (row["variant"], None, None) if row.get("folder") else (row["variant"], row["fraction"], row["seed"])


def complete(row: dict[str, Any], options: argparse.Namespace) -> bool:
    """Whether a row holds everything that is asked for; one that does not is measured anew."""
    variant = VARIANTS.get(row["variant"])
    if row["variant"].endswith(TUNED) and not row.get("folder"):
        run = row["tuning"][-1]
        if (run["tokens"], run["weights"]) != (options.tune // STEP_TOKENS * STEP_TOKENS, options.tune_weights):
            return False
    dial = options.prefix and (row["variant"] == "dense" or (variant is not None and variant.dial))
    return (not options.examples or row.get("examples") == options.examples) and (
        not dial or row.get("dial", {}).get("prefix") == options.prefix
    )


def unpacked(model: str, folder: Path) -> str:
    """The dense model as a folder that loads in a second: a GGUF file is unpacked once."""
    if Path(model).is_dir():
        return model
    load_dense(model).save_pretrained(folder)
    load_tokenizer(model).save_pretrained(folder)
    return str(folder)


def row_process(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a job, from a process of its own.

    Raises:
        SystemExit: it failed; what went wrong is on stderr.
    """
    script = str(Path(__file__).resolve().parent / "quality_row.py")
    done = subprocess.run([sys.executable, script], input=json.dumps(job), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{', '.join(job['variants'])} at {job['fraction']}, seed {job['seed']}: exit code {done.returncode}")
    rows = json.loads(done.stdout.splitlines()[-1])
    for row in rows:
        if row["fraction"] is None and row["variant"] != "dense":
            row["fraction"] = round(row["active_fraction"] * 4) / 4  # a folder goes into the nearest table
        row["date"] = time.strftime("%Y-%m-%d")
    return rows


def write(output: Path, record: dict[str, Any]) -> None:
    """The rows, the table and the chart, each written aside and renamed."""
    order = [*VARIANTS, *tuned_names(VARIANTS)]
    place = {name: number for number, name in enumerate(order)}
    record["rows"].sort(key=lambda row: (row["fraction"] or 0.0, place.get(row["variant"], len(order)), row["seed"] or 0))
    write_bytes(output, (json.dumps(record, indent=1) + "\n").encode())
    about = {name: variant_of(name).about for name in order}
    write_bytes(output.with_suffix(".md"), markdown(record, about).encode())
    write_bytes(output.with_suffix(".svg"), chart(record).encode())


if __name__ == "__main__":
    main()
