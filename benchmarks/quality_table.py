"""The rows of benchmarks/quality.py as Markdown tables and as a chart of perplexity against active fraction."""

from __future__ import annotations

import html
import math
import re
import textwrap
from typing import Any

from moecompile.report import charts

Row = dict[str, Any]
_COLOURS = ("#7a818c", "#2a5fc4", "#b8500f", "#12775d", "#8446b8", "#8a6a00", "#b52c63")  # s0 ... s6 of the report, light
_LINE = 20
_TOP, _WRAP = 40, 80  # of the dense perplexity, drawn at most; characters of a line of notes


def markdown(record: dict[str, Any], about: dict[str, str]) -> str:
    """A table for each active fraction, the phase dial, and what each variant is."""
    rows, corpora = record["rows"], list(record["settings"]["corpora"])
    dense = next((row for row in rows if row["variant"] == "dense"), None)
    lines = [_heading(record), ""]
    fractions = sorted({row["fraction"] for row in rows if row["fraction"] is not None})
    for fraction in fractions:
        here = [row for row in rows if row["fraction"] == fraction]
        lines += [f"## {fraction:.0%} active", "", *_table(here, dense, corpora), ""]
    lines += _dial(rows)
    shown = dict.fromkeys(row["variant"] for row in rows)
    lines += [f"- **{name}**: {about[name]}" for name in shown if name in about]
    return "\n".join(lines) + "\n"


def _heading(record: dict[str, Any]) -> str:
    settings, machine = record["settings"], record["machine"]
    parts = "; ".join(f"{name} {part['windows']}" for name, part in settings["corpora"].items())
    examples = sorted({row["examples"] for row in record["rows"] if "examples" in row})
    weights = settings.get("calibration_weights")
    shares = f" ({' : '.join(f'{weight:g}' for weight in weights)})" if weights else ""
    accuracy = f"LAMBADA: the first {' or '.join(map(str, examples))} passages. " if examples else ""
    return (
        f"# Conversion quality: {settings['model']}\n\n"
        f"{record['date']}, {machine['cores']} cores, {machine['threads']} thread(s). Perplexity, windows of "
        f"{settings['window']}: {parts}. {accuracy}Calibrated on {settings['calibration_tokens']} tokens of "
        f"{', '.join(settings['calibration'])}{shares}, without the last tenth of each text, from which the windows "
        "of that name are. Several seeds: geometric mean (smallest to largest). Compute: multiply-adds of the active FFN "
        "neurons and of the router over those of the dense FFN; a dash where the choice itself needs every neuron."
    )


def _table(rows: list[Row], dense: Row | None, corpora: list[str]) -> list[str]:
    head = ["variant", "active", "compute", *corpora, "over dense", "LAMBADA", "seeds", "convert, s", "peak, GiB"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    everything = ([dense] if dense is not None else []) + rows
    for variant in dict.fromkeys(row["variant"] for row in everything):
        own = [row for row in everything if row["variant"] == variant]
        first = corpora[0]
        over = f"{mean(own, first) / dense['perplexity'][first]:.2f}" if dense else "-"
        right = [row["lambada"] for row in own if "lambada" in row]
        seconds = [row["conversion_seconds"] for row in own if row.get("conversion_seconds")]
        memory = [row["conversion_peak_rss_bytes"] for row in own if row.get("conversion_peak_rss_bytes")]
        compute = own[0]["compute_fraction"]
        cells = [
            variant,
            f"{sum(row['active_fraction'] for row in own) / len(own):.1%}",
            "-" if compute is None else f"{compute:.1%}",
            *(_spread([row["perplexity"][corpus] for row in own]) for corpus in corpora),
            over,
            f"{sum(right) / len(right):.1%}" if right else "-",
            ", ".join(str(row["seed"]) for row in own if row["seed"] is not None) or "-",
            f"{max(seconds):.0f}" if seconds else "-",
            f"{max(memory) / 2**30:.2f}" if memory else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def mean(rows: list[Row], corpus: str) -> float:
    """Geometric mean of the rows' perplexities on a corpus."""
    values = [row["perplexity"][corpus] for row in rows]
    return math.exp(sum(math.log(value) for value in values) / len(values)) if all(map(math.isfinite, values)) else math.inf


def _spread(values: list[float]) -> str:
    if not all(map(math.isfinite, values)):
        return "overflow"
    middle = math.exp(sum(math.log(value) for value in values) / len(values))
    return _short(middle) if len(values) == 1 else f"{_short(middle)} ({_short(min(values))} to {_short(max(values))})"


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _dial(rows: list[Row]) -> list[str]:
    measured = [row for row in rows if "dense_prefix" in row.get("dial", {})]
    if not measured:
        return []
    base = next((row["dial"]["dense"] for row in rows if "dense" in row.get("dial", {})), None)
    prefix = measured[0]["dial"]["prefix"]
    lines = [f"## Phase dial: what follows the first {prefix} tokens of each window of the first corpus", ""]
    lines += ["| variant | active | seed | sparse throughout | prefix dense | dense |", "|---|---|---|---|---|---|"]
    for row in measured:
        dial = row["dial"]
        dense = "-" if base is None else _short(base)
        cells = (
            row["variant"], f"{row['active_fraction']:.1%}", str(row["seed"]), _short(dial["sparse"]),
            _short(dial["dense_prefix"]), dense,
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def chart(record: dict[str, Any]) -> str:
    """A standalone SVG: perplexity on the first corpus (means over the seeds) against active fraction, dense a dashed line.

    What is above :data:`_TOP` times the dense one is named under it alone: the others could not be told apart.
    """
    corpus = next(iter(record["settings"]["corpora"]))
    names = [name for name in dict.fromkeys(row["variant"] for row in record["rows"]) if name != "dense"]
    dense = next((row for row in record["rows"] if row["variant"] == "dense"), None)
    level = dense["perplexity"][corpus] if dense else None
    most = math.inf if level is None else _TOP * level
    series, above = [], []
    for index, name in enumerate(names, 1):
        own = [row for row in record["rows"] if row["variant"] == name]
        points = []
        for fraction in sorted({row["fraction"] for row in own}, key=lambda value: value or 0.0):
            here = [row for row in own if row["fraction"] == fraction]
            value, active = mean(here, corpus), sum(row["active_fraction"] for row in here) / len(here)
            if value > most:
                above.append(f"{name} at {active:.0%}")
            elif math.isfinite(value):
                points.append(charts.Point(active, value, f"{name}: {_short(value)} at {active:.0%}"))
        if points:
            series.append(charts.Series(name, points, index))
    if not series:
        return ""
    everything = series if dense is None else [
        charts.Series("dense", [charts.Point(1.0, level, f"dense: {_short(level)}")], 0), *series
    ]  # fmt: skip
    drawn = charts.line_chart(
        everything, title=f"Perplexity on {corpus} against active fraction", x_label="active fraction of the FFN neurons",
        y_label="perplexity", x_percent=True, level=level,
    )  # fmt: skip
    found = re.search(r"<svg[^>]*>(.*?)</svg>", str(drawn), flags=re.DOTALL)
    assert found is not None
    scale = " (logarithmic scale)" if "logarithmic" in str(drawn) else ""
    notes = textwrap.wrap(f"Above {_short(most)}: {', '.join(above)}", _WRAP) if above else []
    return _standalone(found.group(1), everything, f"Perplexity on {corpus}{scale}; {record['settings']['model']}", notes)


def _standalone(inner: str, series: list[charts.Series], title: str, notes: list[str]) -> str:
    """The drawing with its own colours, title, legend and lines of notes, so that it can be shown outside the report."""
    half = (len(series) + 1) // 2
    height = charts.HEIGHT + 30 + (half + len(notes)) * _LINE + 10
    keys = [
        f'<text x="{charts.LEFT}" y="{charts.HEIGHT + 40 + (half + number) * _LINE}" class="mid">{html.escape(line)}</text>'
        for number, line in enumerate(notes)
    ]
    for number, one in enumerate(series):
        x, y = 80 + (number // half) * charts.WIDTH / 2, charts.HEIGHT + 40 + (number % half) * _LINE
        keys.append(
            f'<g class="{charts.colour(one.index)}" transform="translate({x:.0f} {y:.0f})">{charts.marker(one.index)}</g>'
            f'<text x="{x + 14:.0f}" y="{y:.0f}" class="mid">{html.escape(one.label)}</text>'
        )
    colours = "".join(f".s{number}{{color:{colour}}}" for number, colour in enumerate(_COLOURS))
    style = (
        "text{font:12px sans-serif;fill:#333}.end{text-anchor:end}.centre{text-anchor:middle}.mid{dominant-baseline:central}"
        ".axis,.grid,.line,.level{fill:none}.axis{stroke:#555}.grid{stroke:#ddd}.level{stroke:#7a818c;stroke-dasharray:5 4}"
        "g{fill:currentColor}.line{stroke:currentColor;stroke-width:1.8;fill:none}" + colours
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {charts.WIDTH} {height}" role="img">'
        f'<style>{style}</style><rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="{charts.LEFT}" y="18">{html.escape(title)}</text>'
        f'<g transform="translate(0 22)" style="fill:none">{inner}</g>{"".join(keys)}</svg>\n'
    )
