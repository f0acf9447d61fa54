"""The measured sections: perplexity against active fraction, use of the experts, reconstruction error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from . import charts, text
from .blocks import CONVERT, EVAL, TUNE, Block, Section, Table
from .evaluations import DENSE, Evaluation, Group
from .text import finite, items, mappings, plain

DEAD = 0.001  # an expert that at most one token in a thousand chooses is called dead


def perplexities(rows: Sequence[Evaluation], groups: Sequence[Group]) -> Section:
    """Perplexity against active fraction, a chart and a table for each corpus and window setting; then accuracies."""
    names = dict.fromkeys(row.series for row in rows if not row.dense and not row.accuracy_task)
    index = {name: i for i, name in enumerate(names, start=1)}
    several = len({group.source for group in groups}) > 1
    blocks = [_group_block(group, index, several) for group in groups]
    if not blocks:
        blocks = [Block(missing="No perplexity has been measured for this folder yet", command=EVAL)]
    accuracies = [row for row in rows if row.accuracy_task]
    if accuracies:
        blocks.append(Block(heading="Last-word accuracy", tables=[_accuracy_table(accuracies)]))
    return Section("perplexity", "Perplexity against active fraction", blocks)


def _group_block(group: Group, index: Mapping[str, int], several: bool) -> Block:
    drawable: dict[str, list[charts.Point]] = {}
    undrawn = 0
    for row in group.rows:
        x, y = finite(row.active_fraction), finite(row.get("perplexity"))
        if x is None or y is None:
            undrawn += 1
            continue
        tip = f"{row.series}: {text.perplexity(y)} at {text.percent(x)} active"
        drawable.setdefault(DENSE if row.dense else row.series, []).append(charts.Point(x, y, tip))
    heading = f"{group.corpus}, {group.setting}" + (f" \u00b7 {group.source}" if several else "")
    series = [charts.Series(label, points, index.get(label, 0)) for label, points in drawable.items()]
    base = drawable.get(DENSE)
    level = base[0].y if base else None
    chart = charts.line_chart(
        series, title=f"Perplexity against active fraction, {heading}", x_label="active fraction of the FFN neurons",
        y_label="perplexity, lower is better", x_percent=True, level=level,
    )  # fmt: skip
    notes = []
    if group.baseline is None:
        notes.append("The dense model has not been measured in this setting, so there is no ratio to it")
    if undrawn:
        notes.append(f"Not drawn, for want of a finite number: {undrawn} of {len(group.rows)} rows.")
    missing, command = ("", "") if group.baseline else (notes.pop(0), EVAL.replace("OUT", "MODEL"))
    return Block(heading, " ".join(notes), chart, [_perplexity_table(group, heading)], missing, command)


def _perplexity_table(group: Group, heading: str) -> Table:
    columns = (
        "recipe",
        "corpus",
        "windows \u00d7 tokens",
        "active",
        "top-k",
        "perplexity",
        "over dense",
        "tokens",
        "time",
    )
    rows = [
        (
            row.series, group.corpus, group.windowing, text.percent(row.active_fraction), plain(row.get("top_k")),
            text.perplexity(row.get("perplexity")), text.ratio(1.0 if row is group.baseline else row.ratio),
            text.whole(row.get("tokens")), text.duration(row.get("seconds")),
        )
        for row in group.rows
    ]  # fmt: skip
    own = frozenset(i for i, row in enumerate(group.rows) if row.own)
    return Table(f"Perplexity on {heading}", columns, rows, frozenset(range(3, 9)), own)


def _accuracy_table(rows: Sequence[Evaluation]) -> Table:
    columns = ("recipe", "task", "corpus", "active", "top-k", "examples", "accuracy", "time")
    cells = [
        (
            row.series, plain(row.get("task")), plain(row.get("corpus")), text.percent(row.active_fraction),
            plain(row.get("top_k")), text.whole(row.get("examples")), text.percent(row.get("accuracy")),
            text.duration(row.get("seconds")),
        )
        for row in rows
    ]  # fmt: skip
    own = frozenset(i for i, row in enumerate(rows) if row.own)
    return Table("Share of passages whose last word is predicted", columns, cells, frozenset(range(3, 8)), own)


def usage(record: Mapping[str, Any]) -> Section:
    """How often each expert is chosen: a heat map, and for each site the entropy and the dead experts."""
    title = "Use of the experts"
    layers = [(plain(one.get("site")), items(one.get("fraction"))) for one in mappings(record.get("usage"))]
    layers = [(name, fractions) for name, fractions in layers if fractions]
    if not layers:
        if str(record.get("router") or "none") == "none":
            why = f"The recipe {plain(record.get('recipe'))} has no router, so no experts are chosen"
            block = Block(missing=f"{why}; for a recipe that routes", command=CONVERT)
        else:
            block = Block(missing="How often each expert is chosen has not been recorded yet; tuning measures it", command=TUNE)
        return Section("usage", title, [block])
    chosen = {plain(site.get("name")): finite(site.get("top_k")) for site in mappings(record.get("sites"))}
    labels, pattern = text.short_names([name for name, _ in layers])
    heat, rows, levels = [], [], set()
    for label, (name, fractions) in zip(labels, layers, strict=True):
        values = [text.numeric(value) for value in fractions]
        known = [value for value in values if value is not None and math.isfinite(value)]
        top_k = chosen.get(name) or finite(record.get("top_k"))
        level = top_k / len(values) if top_k else None
        levels.add(level)
        dead = plain(sum(value <= DEAD for value in known))
        spread = entropy(values)
        heat.append(charts.HeatRow(label, name, values, (spread, dead)))
        least, most = (text.percent(min(known), 2), text.percent(max(known), 2)) if known else (text.MISSING, text.MISSING)
        rows.append((name, plain(len(values)), text.percent(level), least, most, spread, dead))
    uniform = levels.pop() if len(levels) == 1 else None
    where = f"row n: {pattern}" if pattern else "rows: sites"
    chart = charts.heat_map(
        heat, title=f"Share of tokens that chose each expert, {where}", columns=f"expert ({where})",
        notes=("entropy", "dead"), uniform=uniform, dead=DEAD,
    )  # fmt: skip
    sentence = (
        "Each cell is the share of tokens that chose the expert. The entropy is 1 where all experts of a site are used "
        f"equally and 0 where one takes all; a dead expert is chosen by at most {text.percent(DEAD)} of the tokens."
    )
    columns = ("site", "experts", "uniform level", "least", "most", "entropy", "dead")
    table = Table("Use of the experts by site", columns, rows, frozenset(range(1, 7)))
    missing = "" if chart else "No share in the record is a finite number; to measure again"
    return Section("usage", title, [Block("", sentence, chart, [table], missing, TUNE if missing else "")])


def entropy(values: Sequence[float | None]) -> str:
    """-sum p ln p / ln N with p the shares scaled to sum 1: 1 for equal use, 0 for a single expert."""
    if any(value is None or not math.isfinite(value) for value in values):
        return "NaN"
    shares = [max(value or 0.0, 0.0) for value in values]
    most = max(shares, default=0.0)
    if most <= 0 or len(shares) < 2:
        return text.MISSING
    shares = [share / most for share in shares]  # so that their sum cannot overflow
    total = sum(shares)
    found = -sum(s / total * math.log(s / total) for s in shares if s > 0) / math.log(len(shares))
    return f"{abs(found):.3f}"  # not -0.000


def reconstruction(record: Mapping[str, Any]) -> Section:
    """The relative error of each rewritten network, before and after the compensation."""
    title = "Reconstruction error"
    layers = mappings(record.get("reconstruction"))
    if not layers:
        missing = "The record holds no reconstruction errors; a conversion with calibration text writes them"
        return Section("reconstruction", title, [Block(missing=missing, command=CONVERT)])
    names = [plain(layer.get("site")) for layer in layers]
    series, undrawn = [], 0
    for key, label, index in (
        ("relative_error_uncompensated", "before compensation", 0),
        ("relative_error", "after compensation", 1),
    ):
        points = []
        for i, layer in enumerate(layers):
            error = finite(layer.get(key))
            if error is not None:
                points.append(charts.Point(i, error, f"{names[i]}, {label}: {text.error(error)}"))
            undrawn += key in layer and error is None
        if points:
            series.append(charts.Series(label, points, index))
    chart = charts.line_chart(
        series, title="Relative reconstruction error by site", x_label="site, in the order of the model (from 0)",
        y_label="relative error, lower is better", from_zero=True, x_step=1.0,
    )  # fmt: skip
    rows = [
        (name, text.error(layer.get("relative_error_uncompensated")), text.error(layer.get("relative_error")))
        for name, layer in zip(names, layers, strict=True)
    ]
    table = Table("Relative error by site", ("site", "before", "after"), rows, frozenset({1, 2}))
    sentence = "How far the output of each converted network is from that of the dense one, relative to the latter."
    if mappings(record.get("tuning")):
        sentence += " As converted: tuning came later."
    if undrawn:
        sentence += f" Not drawn, for want of a finite number: {undrawn} values."
    return Section("reconstruction", title, [Block("", sentence, chart, [table], aside=True)])
