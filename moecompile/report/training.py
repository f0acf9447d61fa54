"""Sections about tuning and routing: the curves of each run, steadiness of the choice, what the error is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import charts, text
from .blocks import TUNE, Block, Section, Table
from .text import as_mapping, finite, mappings, plain

_PARTS = (
    ("loss", "loss"),
    ("kl", "KL of the logits, nats"),
    ("label", "next words, nats"),
    ("layers", "layers' relative error"),
    ("router", "router"),
)


def tuning(record: Mapping[str, Any]) -> Section:
    """The loss against tokens for every run, and what each run did."""
    title = "Tuning"
    runs = mappings(record.get("tuning"))
    if not runs:
        block = Block(missing="This model has not been tuned; to recover part of what the conversion lost", command=TUNE)
        return Section("tuning", title, [block])
    blocks = [_curves(number, one) for number, one in enumerate(runs, start=1)]
    columns = ("run", "stages", "tokens", "tokens/s", "time", "held-out before", "after", "dense", "learning rate")
    rows = [
        (
            f"run {number}", ", ".join(map(plain, one.get("stage") or ())), text.whole(one.get("tokens")),
            text.number(one.get("tokens_per_second")), text.duration(one.get("training_seconds")),
            text.perplexity(one.get("perplexity_before")), text.perplexity(one.get("perplexity_after")),
            text.perplexity(one.get("perplexity_dense")), text.number(as_mapping(one.get("config")).get("learning_rate")),
        )
        for number, one in enumerate(runs, start=1)
    ]  # fmt: skip
    sentence = "Distillation from the dense model; the perplexities are those of the last tenth of each text, never trained on."
    table = Table("Runs", columns, rows, frozenset(range(2, 9)))
    return Section("tuning", title, [Block("", sentence, None, [table]), *blocks])


def _curves(number: int, one: Mapping[str, Any]) -> Block:
    curve = mappings(one.get("curve"))
    series = []
    for index, (key, label) in enumerate(_PARTS):
        points = []
        for row in curve:
            x, y = finite(row.get("tokens")), finite(row.get(key))
            if x is not None and y is not None:
                points.append(charts.Point(x, y, f"{label} {text.number(y)} after {text.whole(x)} tokens"))
        if any(point.y for point in points):
            series.append(charts.Series(label, points, index))
    if not series:
        return Block(f"Run {number}", missing="The record holds no curve of this run; to tune again", command=TUNE)
    chart = charts.line_chart(
        series, title=f"Loss of run {number} against tokens", x_label="tokens learned from", y_label="loss, lower is better",
        from_zero=True,
    )  # fmt: skip
    return Block(f"Run {number}", chart=chart)


def diagnosis(record: Mapping[str, Any]) -> Section:
    """Consistency of the routing and the shares of the error, for each layer."""
    title = "Routing: consistency and error"
    found = as_mapping(record.get("diagnosis"))
    layers = mappings(found.get("layers"))
    if not layers:
        if str(record.get("router") or "none") == "none":
            return Section("diagnosis", title, [Block(sentence="There is no router, so there is nothing to diagnose.")])
        return Section("diagnosis", title, [Block(missing="Routing has not been diagnosed yet", command=TUNE)])
    names = [plain(layer.get("site")) for layer in layers]
    segment = plain(found.get("segment"))
    columns = ("site", "entropy", "dead", f"SRP, m = {segment}", "its experts", "SCH", "its cache")
    rows = [
        (
            name, text.number(layer.get("entropy")), plain(layer.get("dead")), text.number(layer.get("srp")),
            plain(layer.get("srp_size")), text.percent(layer.get("sch")),
            f"{plain(layer.get('sch_experts'))} of {plain(layer.get('experts'))}",
        )
        for name, layer in zip(names, layers, strict=True)
    ]  # fmt: skip
    sentence = (
        f"On {text.whole(found.get('tokens'))} tokens. SRP is the best F1 of having the same experts on for {segment} tokens "
        f"in a row; SCH is the hit rate of the best cache of the size shown that knows the next {segment} tokens "
        "(arXiv 2505.16056); where it holds them all, only first uses miss."
    )
    blocks = [Block("Use and consistency", sentence, None, [Table("Routing by site", columns, rows, frozenset(range(1, 7)))])]
    if any(finite(layer.get("error_router")) is not None for layer in layers):
        blocks.append(_shares(names, layers))
    return Section("diagnosis", title, blocks)


_CHOICES = (
    ("error_router", "the router's experts"),
    ("error_oracle", "the best experts (oracle)"),
    ("error_neurons", "the best neurons"),
    ("error_converted", "the block as it is"),
)


def _shares(names: Sequence[str], layers: Sequence[Mapping[str, Any]]) -> Block:
    series = []
    for index, (key, label) in enumerate(_CHOICES):
        points = []
        for i, (name, layer) in enumerate(zip(names, layers, strict=True)):
            error = finite(layer.get(key))
            if error is not None:
                points.append(charts.Point(i, error, f"{name}, {label}: {text.error(error)}"))
        if points:
            series.append(charts.Series(label, points, index))
    chart = charts.line_chart(
        series, title="Relative squared error by the choice of neurons", x_label="site, in the order of the model (from 0)",
        y_label="relative squared error", from_zero=True, x_step=1.0,
    )  # fmt: skip
    rows = [
        (
            name, *(text.error(layer.get(key)) for key, _ in _CHOICES),
            text.percent(layer.get("routing_share")), text.percent(layer.get("granularity_share")),
        )
        for name, layer in zip(names, layers, strict=True)
    ]  # fmt: skip
    columns = ("site", *(label for _, label in _CHOICES), "routing", "granularity")
    sentence = (
        "The dense weights with idle neurons at their means and as many neurons on, chosen in three ways. "
        "Routing is what the best experts would save, granularity what single neurons would save beyond that; where outputs "
        "cancel, it may be less than nothing."
    )
    table = Table("Error by the choice of neurons", columns, rows, frozenset(range(1, 7)))
    return Block("What the error is made of", sentence, chart, [table])
