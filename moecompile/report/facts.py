"""The sections of facts: the rewritten sites, sizes and FLOPs, and how the folder was made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import charts, text
from .blocks import CONVERT, Block, Section, Table
from .text import as_mapping, finite, mappings, plain

SITE_COLUMNS = {
    "kind": "kind",
    "activation": "activation",
    "hidden_size": "hidden",
    "intermediate_size": "FFN width",
    "bias": "bias",
    "layout": "layout",
    "shared_neurons": "shared neurons",
    "experts": "experts",
    "expert_width": "expert width",
    "top_k": "top\u2011k",
    "router": "router",
}


def sites(record: Mapping[str, Any]) -> Section:
    """What was rewritten, and what was left alone and why."""
    found, skipped = mappings(record.get("sites")), mappings(record.get("skipped"))
    blocks = []
    if found:
        rows = [(plain(site.get("name")), *(plain(site.get(key)) for key in SITE_COLUMNS)) for site in found]
        numeric = frozenset({3, 4, 7, 8, 9, 10})
        alike = len({row[1:] for row in rows}) == 1 and len(rows) > 1
        count = "One feed-forward network was" if len(rows) == 1 else f"{len(rows)} feed-forward networks were"
        sentence = f"{count} rewritten{'; all are alike' if alike else ''}."
        table = Table("Rewritten sites", ("site", *SITE_COLUMNS.values()), rows, numeric)
        blocks.append(Block(sentence=sentence, tables=[table]))
    else:
        blocks.append(Block(missing="The record lists no rewritten sites", command="moecompile explain MODEL"))
    if skipped:
        reasons = [(plain(one.get("name")), plain(one.get("node")), plain(one.get("reason"))) for one in skipped]
        table = Table("Left as they were", ("candidate", "node", "reason"), reasons)
        blocks.append(Block("Skipped candidates", tables=[table]))
    elif found:
        blocks.append(Block(sentence="No candidate was skipped."))
    return Section("sites", "Sites", blocks)


def costs(record: Mapping[str, Any]) -> Section:
    """Sizes and FLOPs beside the dense model, then what the conversion took and what it was made from."""
    blocks = [_sizes(as_mapping(record.get("costs"))), _conversion(record), _calibration(record.get("calibration"))]
    return Section("costs", "Sizes and FLOPs", [*blocks, _settings(record)])


def _sizes(cost: Mapping[str, Any]) -> Block:
    if not cost:
        return Block(missing="The record holds no sizes", command=CONVERT)
    pairs = (
        ("FLOPs per token of FFNs, routers", "flops_per_token_dense", "flops_per_token", text.short),
        ("FFN parameters per token", "ffn_parameters", "active_ffn_parameters", text.short),
        ("Parameters", "parameters_dense", "parameters", text.short),
        ("Size on disk", "bytes_dense", "bytes", text.size),
    )
    groups, rows = [], []
    for label, before, after, show in pairs:
        old, new = finite(cost.get(before)), finite(cost.get(after))
        known = [("dense", old, before, 0), ("converted", new, after, 1)]
        groups.append((label, [charts.Bar(n, v, show(cost[k]), i) for n, v, k, i in known if v is not None]))
        share = text.percent(new / old) if old and new is not None else text.MISSING
        rows.append((label, text.whole(cost.get(before)), text.whole(cost.get(after)), share))
    rows[3] = (f"{rows[3][0]} (bytes)", *rows[3][1:])
    for label, key in (("of these, FFN", "ffn_parameters"), ("of these, router", "router_parameters")):
        rows.insert(-1, (label, text.MISSING, text.whole(cost.get(key)), text.MISSING))
    chart = charts.bars(groups, title="Dense and converted", shared_scale=False)
    columns = ("quantity", "dense", "converted", "converted / dense")
    table = Table("Sizes and FLOPs", columns, rows, frozenset({1, 2, 3}))
    return Block("", "", chart, [table])


def _conversion(record: Mapping[str, Any]) -> Block:
    seconds, memory = record.get("seconds"), record.get("peak_rss_bytes")
    phases = dict(as_mapping(seconds)) if not isinstance(seconds, (int, float)) else {"total": seconds}
    parts = [(name, value) for name, value in phases.items() if name != "total"]
    told = [
        (_words(name), [charts.Bar(name, value, text.duration(value), 1)])
        for name, part in parts
        if (value := finite(part)) is not None
    ]
    rows = [(_words(name), text.duration(value)) for name, value in parts]
    if "total" in phases:
        rows.append(("total", text.duration(phases["total"])))
    if memory is not None:
        rows.append(("peak memory (RSS)", text.size(memory)))
    missing = "" if phases else "The record does not say how long the conversion took"
    return Block(
        "The conversion",
        chart=charts.bars(told, title="Time by step", shared_scale=True),
        tables=[Table("Time and memory of the conversion", ("step", "taken"), rows, frozenset({1}))] if rows else (),
        missing=missing,
        command=CONVERT,
        aside=True,
    )


def _calibration(value: object) -> Block:
    data = as_mapping(value)
    if not data:
        missing = "No calibration text was used; for a recipe that uses one"
        return Block("Calibration text", missing=missing, command=CONVERT)
    rows = [(_words(key), plain(part)) for key, part in data.items()]
    return Block("Calibration text", tables=[Table("What the conversion saw", ("property", "value"), rows)])


def _words(key: object) -> str:
    return str(key).replace("_", " ")


def _settings(record: Mapping[str, Any]) -> Block:
    settings = [(key, plain(value)) for key, value in as_mapping(record.get("recipe_config")).items()]
    settings += [(f"final norm, {_words(key)}", plain(value)) for key, value in as_mapping(record.get("final_norm")).items()]
    versions = [("moecompile", plain(record.get("moecompile_version")))]
    versions += [(key, plain(value)) for key, value in as_mapping(record.get("versions")).items()]
    versions += [("record format", plain(record.get("format"))), ("created", plain(record.get("created")))]
    tables = [Table("Versions", ("software", "version"), versions)]
    if settings:
        tables.insert(0, Table(f"Settings of the recipe {plain(record.get('recipe'))}", ("setting", "value"), settings))
    return Block("Settings and versions", tables=tables)
