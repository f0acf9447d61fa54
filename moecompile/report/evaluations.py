"""Evaluations of one or more records, grouped so that only like is compared with like.

Perplexities are comparable only for the same model family, corpus, window, number of windows and number of tokens at the
start of a window that are not scored; those five are the key of a :class:`Group`, and no ratio and no line of a chart ever
leaves a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .text import finite, mappings, plain, whole

DENSE = "dense"


@dataclass(frozen=True)
class Evaluation:
    """One measured row; ``own`` marks the converted folder that the page is about, ``series`` what it is drawn as."""

    entry: Mapping[str, Any]
    name: str
    series: str
    source: str
    active_fraction: object
    own: bool = False
    owner: int = -1  # which record holds it; -1 for a bare entry
    ratio: float | None = None

    @property
    def dense(self) -> bool:
        return self.name.lower() == DENSE

    @property
    def accuracy_task(self) -> bool:
        """Whether the row holds an accuracy (LAMBADA) and not a perplexity."""
        return str(self.entry.get("task", "")).lower() not in ("", "perplexity") or "accuracy" in self.entry

    def get(self, key: str) -> Any:
        return self.entry.get(key)


@dataclass(frozen=True)
class Group:
    """Rows that may be compared: one model, one corpus, one window, one number of windows, as many tokens scored of each."""

    source: str
    corpus: str
    window: object
    windows: object
    rows: Sequence[Evaluation]
    unscored: object = None  # tokens at the start of each window

    @property
    def windowing(self) -> str:
        """The number of windows and their length: 8 x 1,024."""
        return f"{whole(self.windows)}\u00a0\u00d7\u00a0{whole(self.window)}"

    @property
    def setting(self) -> str:
        """The window setting in words: 8 x 1,024 tokens."""
        if self.window is None and self.windows is None:
            return "windows not recorded"
        behind = f" behind their first {whole(self.unscored)}" if self.unscored else ""
        return f"{self.windowing} tokens{behind}"

    @property
    def baseline(self) -> Evaluation | None:
        """The dense row that the others are compared with."""
        return next((row for row in self.rows if row.dense and finite(row.get("perplexity"))), None)


def collect(record: Mapping[str, Any], comparisons: Sequence[Mapping[str, Any]]) -> list[Evaluation]:
    """All evaluations of the record and of what it is compared with, without those that occur twice."""
    source = plain(record.get("source"))
    found = _of_record(record, 0, source)
    for owner, other in enumerate(comparisons, start=1):
        if other == record:
            continue
        if "evaluations" in other or not {"task", "perplexity", "accuracy"} & set(other):
            found += _of_record(other, owner, source)
        else:
            name = str(other.get("name") or other.get("recipe") or "unnamed")
            found.append(Evaluation(other, name, name, str(other.get("source") or source), _fraction(other, name, {})))
    seen: set[tuple[object, ...]] = set()
    kept = []
    for row in found:
        measured = (
            "task", "corpus", "window", "windows", "examples", "tokens", "perplexity", "accuracy", "top_k", "skip",
            "dense_prefix",
        )  # fmt: skip
        identity = (row.source, row.series, repr(row.active_fraction), *(repr(row.get(key)) for key in measured))
        if identity not in seen:
            seen.add(identity)
            kept.append(row)
    return kept


def groups(rows: Sequence[Evaluation]) -> list[Group]:
    """The perplexity rows by what they have in common (:class:`Group`), in the order of the record, with ratios over dense."""
    gathered: dict[tuple[str, ...], list[Evaluation]] = {}
    for row in rows:
        if not row.accuracy_task:
            key = (row.source, *(repr(row.get(part)) for part in ("corpus", "window", "windows")), repr(unscored(row)))
            gathered.setdefault(key, []).append(row)
    return [_group(members) for members in gathered.values()]


def unscored(row: Evaluation) -> object:
    """How many tokens at the start of each window a row does not score; None for none."""
    return row.get("skip") or row.get("dense_prefix") or None


def headline(all_groups: Sequence[Group], record: Mapping[str, Any]) -> tuple[Group, Evaluation] | None:
    """The folder's own result at its own setting, and its group: one with a dense baseline where there is one."""
    fraction = finite(record.get("active_fraction"))

    def at_own_setting(row: Evaluation) -> bool:
        measured = finite(row.active_fraction)
        same_fraction = fraction is None or measured is None or abs(measured - fraction) < 1e-6
        return row.own and row.get("top_k") in (None, record.get("top_k")) and same_fraction and unscored(row) is None

    own = [(group, row) for group in all_groups for row in group.rows if at_own_setting(row)]
    return next((pair for pair in own if pair[0].baseline), own[0] if own else None)


def _group(members: Sequence[Evaluation]) -> Group:
    """Ratios over the dense row (the same record's, where it has one), then the rows in reading order."""
    bases = [row for row in members if row.dense and finite(row.get("perplexity"))]

    def with_ratio(row: Evaluation) -> Evaluation:
        base = next((base for base in bases if base.owner == row.owner), bases[0] if bases else None)
        measured = finite(row.get("perplexity"))
        if base is None or measured is None or row.dense:
            return row
        return replace(row, ratio=measured / float(base.get("perplexity")))

    def order(row: Evaluation) -> tuple[bool, bool, str, float]:
        return not row.dense, not row.own, row.series, -(finite(row.active_fraction) or 0.0)

    first = members[0]
    rows = sorted(map(with_ratio, members), key=order)
    corpus = plain(first.get("corpus"))
    return Group(first.source, corpus, first.get("window"), first.get("windows"), rows, unscored(first))


def _of_record(record: Mapping[str, Any], owner: int, source: str) -> list[Evaluation]:
    """The evaluations that a record holds; those under the recipe's own name are the folder's own."""
    recipe = str(record.get("recipe") or "")
    rows = []
    for entry in mappings(record.get("evaluations")):
        name = str(entry.get("name") or recipe or "unnamed")
        converted = name == recipe and name.lower() != DENSE
        series = name if owner == 0 or not converted else _variant(record, name)
        where = str(entry.get("source") or record.get("source") or source)
        fraction = _fraction(entry, name, record if converted else {})
        rows.append(Evaluation(entry, name, series, where, fraction, converted and owner == 0, owner))
    return rows


def _variant(record: Mapping[str, Any], name: str) -> str:
    """The name of a compared folder's series: two folders of one recipe are two series."""
    parts: list[str] = []
    if str(record.get("router") or "none") != "none":
        parts = [f"{plain(record[key])} {key}" for key in ("experts", "shared") if record.get(key)]
        parts.append(f"{record['router']} router")
    settings = record.get("recipe_config")
    compensation = settings.get("compensation") if isinstance(settings, Mapping) else None
    if compensation not in (None, "none"):
        parts.append(plain(compensation))
    return f"{name} ({', '.join(parts)})" if parts else name


def _fraction(entry: Mapping[str, Any], name: str, record: Mapping[str, Any]) -> object:
    """The active fraction of an entry; a dense model's is 1, a folder's own top-k has the folder's own."""
    if entry.get("active_fraction") is not None:
        return entry["active_fraction"]
    if name.lower() == DENSE:
        return 1.0
    return record.get("active_fraction") if entry.get("top_k") in (None, record.get("top_k")) else None
