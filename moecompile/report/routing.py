"""The section about routing over a text: who goes where, how alike adjacent layers choose, how long a choice lasts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup, escape

from . import charts, text
from .blocks import Block, Section, Table
from .text import as_mapping, finite, items, mappings, plain

MEASURE = "moecompile report OUT --routing FILE"
PAPER_KEPT = 2921 / 4096  # consecutive tokens that choose the same expert in Read-ME (table 4); Mixtral: 850 / 4096


def routing(record: Mapping[str, Any]) -> Section | None:
    """The section; None where there is no router at the front and nothing was measured."""
    training, found = as_mapping(record.get("router_training")), as_mapping(record.get("routing"))
    if not training and not found:
        return None
    blocks: list[Block | None] = [_training(training)] if training else []
    if not found:
        blocks.append(Block(missing="The routing over a text has not been measured yet", command=MEASURE))
    else:
        blocks += [_coloured(found), _adjacent(found), _locality(found)]
    return Section("routing", "Routing over a text", [block for block in blocks if block is not None])


def _training(training: Mapping[str, Any]) -> Block:
    rows = [
        ("choices that are the dense model's own", text.percent(training.get("agreement"))),
        ("the best constant choice", text.percent(training.get("constant_agreement"))),
        ("consecutive tokens with the same expert", text.percent(training.get("same_as_previous"))),
        ("the same of the dense model's own choices", text.percent(training.get("oracle_same_as_previous"))),
        ("held-out tokens", plain(training.get("tokens"))),
        ("training steps", plain(training.get("steps"))),
    ]
    sentence = (
        "One router decides for all layers before the first one runs. It was taught to choose the expert that has most neurons "
        "in common with those that the dense model activates; measured on windows it was not taught on."
    )
    return Block("The router at the front", sentence, None, [Table("Distillation", ("figure", "value"), rows, frozenset({1}))])


def _coloured(found: Mapping[str, Any]) -> Block | None:
    sample = as_mapping(found.get("sample"))
    tokens, experts = items(sample.get("tokens")), items(sample.get("experts"))
    pairs = [(str(t), int(e)) for t, e in zip(tokens, experts, strict=False) if finite(e) is not None]
    if not pairs:
        return None
    spans = "".join(
        f'<span class="token {charts.colour(expert + 1)}" title="expert {expert}">{escape(token)}</span>'
        for token, expert in pairs
    )
    used = sorted({expert for _, expert in pairs})
    where = "all layers" if found.get("aligned") else plain(sample.get("site"))
    sentence = (
        f"The first window of {plain(found.get('text'))}, each token in the colour of its first expert in {where} "
        f"({len(used)} experts; point at a token to see its number)."
    )
    return Block("Which token goes where", sentence, Markup(f'<p class="tokens">{spans}</p>'))


def _adjacent(found: Mapping[str, Any]) -> Block | None:
    pairs = mappings(found.get("adjacent"))
    if not pairs:
        return None
    if found.get("aligned"):
        return Block("Adjacent layers", "All layers use the same expert: each layer's choice tells the next one's entirely.")
    points = [
        charts.Point(i, share, f"{plain(p.get('from'))} to {plain(p.get('to'))}: {text.percent(share)}")
        for i, p in enumerate(pairs)
        if (share := finite(p.get("share"))) is not None
    ]
    chart = charts.line_chart(
        [charts.Series("share of the entropy", points, 1)], title="What a layer's choice tells of the next one's",
        x_label="layer, in the order of the model (from 0)", y_label="mutual information / entropy", from_zero=True, x_step=1.0,
    )  # fmt: skip
    rows = [
        (plain(p.get("from")), plain(p.get("to")), text.number(p.get("bits"), 3), text.percent(p.get("share")),
         text.percent(p.get("likeliest_successor")))
        for p in pairs
    ]  # fmt: skip
    columns = ("layer", "next layer", "bits", "of its entropy", "likeliest successor")
    table = Table("Mutual information between adjacent layers", columns, rows, frozenset({2, 3, 4}))
    sentence = (
        "How much the experts that one layer chooses say about those of the next, as a share of what there is to say; the last "
        "column is how often the next layer's expert is the likeliest one. Redundant choices can be made once, at the front."
    )
    return Block("Adjacent layers", sentence, chart, [table, *_matrix(found)])


def _matrix(found: Mapping[str, Any]) -> list[Table]:
    """The transition matrix of the middle pair, where it is small enough to read."""
    shown = as_mapping(found.get("transition"))
    rows = [items(row) for row in items(shown.get("rows"))]
    if not rows or len(rows) > 12:
        return []
    caption = f"Transitions, {plain(shown.get('from'))} (rows) to {plain(shown.get('to'))}"
    columns = ("expert", *(str(i) for i in range(len(rows))))
    cells = [(str(i), *(text.percent(value) for value in row)) for i, row in enumerate(rows)]
    return [Table(caption, columns, cells, frozenset(range(1, len(columns))))]


def _locality(found: Mapping[str, Any]) -> Block | None:
    layers = mappings(found.get("layers"))
    if not layers:
        return None
    series = []
    for key, label, index in (("kept_by_chance", "tokens in random order", 0), ("kept", "as they stand in the text", 1)):
        points = [
            charts.Point(i, value, f"{plain(layer.get('site'))}, {label}: {text.percent(value)}")
            for i, layer in enumerate(layers)
            if (value := finite(layer.get(key))) is not None
        ]
        if points:
            series.append(charts.Series(label, points, index))
    chart = charts.line_chart(
        series, title="Experts kept from one token to the next", x_label="layer, in the order of the model (from 0)",
        y_label="share of experts that the token before used", from_zero=True, x_step=1.0,
    )  # fmt: skip
    distances = items(found.get("distances"))
    rows = [(plain(layer.get("site")), *(text.percent(v) for v in items(layer.get("reuse")))) for layer in layers]
    widest = max(len(row) for row in rows)
    columns = ("site", *(f"within {plain(d)}" for d in distances[: widest - 1]))
    table = Table("Share of choices made again within so many tokens", columns, rows, frozenset(range(1, widest)))
    sentence = (
        f"A cache of experts lives on choices that last. (Read-ME reports {text.percent(PAPER_KEPT)} of consecutive tokens "
        "with the same one of 7 experts, and 20.8% for Mixtral.)"
    )
    return Block("How long a choice lasts", sentence, chart, [table])
