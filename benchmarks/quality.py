"""Perplexity of the recipes side by side: one model, the same calibration tokens, the same windows.

    python benchmarks/quality.py [--text TEST] [--domains TEXT...] [--seeds 0 1 2] [--output benchmarks/results/quality.json]

Writes a JSON file with everything and a Markdown table beside it. Without arguments the texts of examples/data are used. Each
row says what was measured and with which seed; a failed row stops the run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

DATA = ROOT / "examples" / "data"
RECIPES: dict[str, list[str]] = {
    "static": ["--recipe", "static", "--active-fraction", "0.5"],
    "static, idle means": ["--recipe", "static", "--active-fraction", "0.5", "--compensation", "means"],
    "static, refit": ["--recipe", "static", "--active-fraction", "0.5", "--compensation", "refit"],
    "flap": ["--recipe", "flap", "--active-fraction", "0.5"],
    "flap, plain statistics": ["--recipe", "flap", "--active-fraction", "0.5", "--plain-statistics"],
    "calibrated 25 %": ["--recipe", "calibrated", "--experts", "56", "--shared", "8", "--top-k", "8"],
    "calibrated 50 %": ["--recipe", "calibrated", "--experts", "48", "--shared", "16", "--top-k", "16"],
    "calibrated 75 %": ["--recipe", "calibrated", "--experts", "48", "--shared", "16", "--top-k", "32"],
}


def command(*arguments: str) -> dict:  # type: ignore[type-arg]
    """A command's JSON, from a process of its own."""
    code = "import sys; from moecompile.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--json", "--quiet"], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout)


def main() -> None:
    """Run every recipe with every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or .gguf file (default: SmolLM2-135M-Instruct, downloaded)")
    parser.add_argument("--text", default=str(DATA / "wikitext2_test_head.txt"))
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument(
        "--domains", nargs="+", default=[str(DATA / f"{n}.txt") for n in ("books", "code", "docs", "math", "wiki")]
    )
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=sorted(RECIPES), default=list(RECIPES))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "quality.json")
    options = parser.parse_args()
    if options.model is None:
        from fetch_model import fetch

        options.model = str(fetch())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        measure = ("--text", options.text, "--window", "1024", "--max-windows", str(options.windows), "--no-record")
        dense = command("eval", options.model, *measure)
        rows.append({"variant": "dense", **dense})
        for variant in options.only:
            for seed in options.seeds:
                out = str(Path(folder) / "moe")
                done = command(
                    "convert", options.model, out, *RECIPES[variant], "--calibration", *options.domains,
                    "--calibration-tokens", str(options.calibration_tokens), "--seed", str(seed), "--overwrite",
                )  # fmt: skip
                measured = command("eval", out, *measure)
                kept = ("parity_max_abs_error", "routing_relative_error", "calibration")
                rows.append(
                    {
                        "variant": variant,
                        "seed": seed,
                        **measured,
                        "conversion_seconds": done["seconds"],
                        "conversion_peak_rss_bytes": done["peak_rss_bytes"],
                        **{name: done[name] for name in kept},
                    }
                )
                print(f"{variant}, seed {seed}: {measured['perplexity']:.2f}", file=sys.stderr, flush=True)
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        },
        "model": Path(options.model).name,
        "corpus": Path(options.text).name,
        "calibration": [Path(p).name for p in options.domains],
        "rows": rows,
        "children_peak_rss_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    table = markdown(record)
    options.output.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)


def markdown(record: dict) -> str:  # type: ignore[type-arg]
    """The rows as a table; a variant's seeds share a row: perplexities in the order of the seeds, and their geometric mean."""
    rows = record["rows"]
    base = rows[0]["perplexity"]
    first = rows[0]
    lines = [
        f"{record['model']}, {record['corpus']}, {first['windows']} windows of {first['window']}; {record['date']}, "
        f"{record['machine']['cores']} cores. Calibrated on {', '.join(record['calibration'])}.",
        "",
        "| variant | active | perplexity | over dense | seeds | conversion, s | peak, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant]
        values = [row["perplexity"] for row in own]
        mean = math.exp(sum(math.log(value) for value in values) / len(values))
        each = " / ".join(f"{value:.2f}" for value in values)
        seeds = ", ".join(str(row["seed"]) for row in own if "seed" in row) or "-"
        seconds = max((row.get("conversion_seconds", 0) for row in own), default=0)
        memory = max((row.get("conversion_peak_rss_bytes", 0) for row in own), default=0) / 2**30
        cost = (f"{seconds:.0f}", f"{memory:.2f}") if seconds else ("-", "-")
        active = f"{own[0]['active_fraction']:.0%}"
        lines.append(f"| {variant} | {active} | {each} | {mean / base:.2f} | {seeds} | {cost[0]} | {cost[1]} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
