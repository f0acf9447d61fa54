"""One self-contained HTML page about a converted folder: ``moecompile report OUT``.

:func:`render` turns the record of a folder (``moecompile.json``) into a page that needs no network, no script and no
other file. Values come from the record alone; the only derived ones are ratios and entropies. What the record lacks is
said in one sentence, with the command that fills it.

    text       values as text           evaluations   like with like
    charts     inline SVG               blocks        what a section is made of
    quality    measured sections        facts         sections of facts
    training   tuning, diagnosis
    routing    which token goes where
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from . import text
from .blocks import EVAL, Section
from .evaluations import Evaluation, Group, collect, groups, headline
from .facts import costs, sites
from .quality import perplexities, reconstruction, usage
from .routing import routing
from .text import as_mapping, finite, numeric, plain
from .training import diagnosis, tuning

__all__ = ["render"]

PLANNED = ("sites", "skipped", "recipe", "recipe_config", "experts", "shared", "top_k", "router", "active_fraction")


@dataclass(frozen=True)
class Fact:
    """A headline figure: what it is, its value, a note, and for a check whether it passed."""

    label: str
    value: str
    note: str = ""
    passed: bool | None = None
    command: str = ""


def render(record: Mapping[str, Any], *, plan: object = None, comparisons: Sequence[Mapping[str, Any]] = ()) -> str:
    """The whole page as HTML.

    ``record`` describes the folder. ``plan`` (a mapping, or an object with attributes or ``to_dict``) fills in sites
    and settings that the record lacks. ``comparisons`` are records of other folders, or single evaluations; they join
    the perplexity section, where only equal corpora and window settings are compared.
    """
    record = _completed(record, plan)
    rows = collect(record, comparisons)
    grouped = groups(rows)
    order: list[Section] = [
        perplexities(rows, grouped),
        sites(record),
        usage(record),
        *([found] if (found := routing(record)) is not None else []),
        reconstruction(record),
        diagnosis(record),
        tuning(record),
        costs(record),
    ]
    page = _environment().get_template("page.html.jinja")
    return page.render(
        source=plain(record.get("source")),
        recipe=plain(record.get("recipe")),
        active=text.percent(record.get("active_fraction")),
        summary=_summary(record),
        facts=_facts(record, grouped),
        sections=order,
        version=plain(record.get("moecompile_version")),
        created=plain(record.get("created")),
    )


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader(__name__, "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def _completed(record: Mapping[str, Any], plan: object) -> dict[str, Any]:
    """The record, with what it lacks taken from the plan."""
    planned = as_mapping(plan) if plan is not None else {}
    known = {key: value for key, value in record.items() if value is not None}
    return {key: planned[key] for key in PLANNED if key in planned} | known


def _summary(record: Mapping[str, Any]) -> str:
    """What happens to a token, in one sentence."""
    if str(record.get("router") or "none") == "none":
        return "There is no router: the same neurons work for every token."
    shared = f" and all {plain(record['shared'])} shared slices" if record.get("shared") else ""
    chosen = f"{plain(record.get('top_k'))} of {plain(record.get('experts'))} experts"
    return f"In each feed-forward network, a {plain(record['router'])} router gives every token {chosen}{shared}."


def _facts(record: Mapping[str, Any], grouped: Sequence[Group]) -> list[Fact]:
    cost = as_mapping(record.get("costs"))
    return [
        _perplexity(headline(grouped, record)),
        _parity(record),
        Fact(
            "Size on disk",
            _change(cost, "bytes_dense", "bytes", text.size),
            f"parameters {_change(cost, 'parameters_dense', 'parameters', text.short)}",
        ),
        Fact(
            "FLOPs per token of FFNs, routers",
            _change(cost, "flops_per_token_dense", "flops_per_token", text.short),
            f"FFN parameters used {_change(cost, 'ffn_parameters', 'active_ffn_parameters', text.short)}",
        ),
    ]


def _change(cost: Mapping[str, Any], before: str, after: str, show: Any) -> str:
    """Dense to converted; one dash where neither is known."""
    if cost.get(before) is None and cost.get(after) is None:
        return text.MISSING
    return f"{show(cost.get(before))} \u2192 {show(cost.get(after))}"


def _perplexity(found: tuple[Group, Evaluation] | None) -> Fact:
    label = "Perplexity, dense \u2192 converted"
    if found is None:
        return Fact(label, text.MISSING, "not measured yet at this setting", command=EVAL)
    group, own = found
    base = group.baseline
    where = f"{group.corpus}, {group.setting}"
    after = text.perplexity(own.get("perplexity"))
    if base is None:
        return Fact(label, after, f"{where}; dense not measured there", command=EVAL.replace("OUT", "MODEL"))
    before = text.perplexity(base.get("perplexity"))
    over = f"{text.ratio(own.ratio)} dense; " if own.ratio is not None else ""
    return Fact(label, f"{before} \u2192 {after}", over + where)


def _parity(record: Mapping[str, Any]) -> Fact:
    """The check that the split alone changes nothing: a tick, a cross, or neither where it cannot be judged."""
    label = "Parity, largest error"
    error, tolerance = record.get("parity_max_abs_error"), finite(record.get("parity_tolerance"))
    measured = numeric(error)
    if measured is None:
        return Fact(label, text.MISSING, "not recorded")
    if tolerance is None:
        return Fact(label, text.number(error), "no tolerance recorded")
    passed = math.isfinite(measured) and abs(measured) <= tolerance
    verdict = "within" if passed else "not within"
    note = f"{verdict} {text.number(tolerance)} of the dense output, all experts on, before compensation"
    return Fact(label, text.number(error), note, passed)
