"""Values of a record as text: tolerant reads, and one formatter for each kind of number.

A record comes from a JSON file that an older or newer version may have written, so nothing here raises on a value that
is missing or odd: what is missing reads as a dash, and what is not finite reads as ``NaN`` or ``infinite``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MISSING = "\u2014"
UNIT_SPACE = "\u202f"  # narrow and unbreakable, between a number and its unit


def as_mapping(value: object) -> Mapping[str, Any]:
    """A mapping, a dataclass, or anything with ``to_dict`` or attributes, seen as a mapping; else an empty one."""
    if isinstance(value, Mapping):
        return value
    to_dict = getattr(value, "to_dict", None)
    if callable(to_dict):
        return as_mapping(to_dict())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return dict(getattr(value, "__dict__", {}))


def items(value: object) -> list[Any]:
    """The items of a list-like value; nothing for a string, a mapping or a missing value."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        return []
    return list(value)


def mappings(value: object) -> list[Mapping[str, Any]]:
    """The non-empty mappings among the items of a list-like value."""
    return [seen for item in items(value) if (seen := as_mapping(item))]


def numeric(value: object) -> float | None:
    """A number as a float, NaN and infinities included (also when written as text); None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, int) and abs(value) > 10**300:  # near or beyond the range of float64
        return math.inf if value > 0 else -math.inf
    try:
        return float(value)
    except ValueError:
        return None


def finite(value: object) -> float | None:
    """A number that can be drawn and divided, or None; beyond 1e100 a record is broken and sums would overflow."""
    number_ = numeric(value)
    return number_ if number_ is not None and abs(number_) < 1e100 else None


def _special(value: object) -> str | None:
    """The text of a value that is no finite number, or None when it is one."""
    if value is None or value == "":
        return MISSING
    number_ = numeric(value)
    if number_ is None:
        return plain(value)
    if math.isnan(number_):
        return "NaN"
    if math.isinf(number_):
        return "infinite" if number_ > 0 else "minus infinite"
    return None


def plain(value: object) -> str:
    """Any value as short text: yes or no for a flag, a comma-separated list for a list."""
    if value is None or value == "":
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return whole(value)
    if isinstance(value, float):
        return number(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items()) or MISSING
    if isinstance(value, (list, tuple, set, frozenset)):
        return ", ".join(plain(item) for item in value) or MISSING
    return str(value)


def number(value: object, digits: int = 4) -> str:
    """A number to ``digits`` significant digits: 0.3125, 2.1e-05."""
    special = _special(value)
    return f"{numeric(value):.{digits}g}" if special is None else special


def error(value: object) -> str:
    """A relative error to four decimals, or a smaller one to four significant digits: 0.3100, 2.1e-05."""
    exact = finite(value)
    return number(value) if exact is None or 0 < abs(exact) < 0.001 else f"{exact:.4f}"


def whole(value: object) -> str:
    """A count in full: 134,515,008."""
    special = _special(value)
    if special is not None:
        return special
    exact = numeric(value) or 0.0
    if isinstance(value, int):
        return f"{value:,}"
    return f"{exact:,.0f}" if exact == round(exact) else f"{exact:,.4g}"


def short(value: object) -> str:
    """A count in short: 134.5 M."""
    return _special(value) or _scaled(numeric(value) or 0.0, ("", "k", "M", "G", "T"))


def size(value: object) -> str:
    """A size in decimal units: 269.1 MB."""
    return _special(value) or _scaled(numeric(value) or 0.0, ("B", "kB", "MB", "GB", "TB"))


def _scaled(value: float, units: Sequence[str]) -> str:
    step = 0
    while abs(value) >= 999.5 and step + 1 < len(units):
        value, step = value / 1000, step + 1
    return f"{value:.4g}{UNIT_SPACE}{units[step]}".rstrip()


def percent(value: object, decimals: int = 1) -> str:
    """A fraction as a percentage: 50 %, 33.3 %."""
    special = _special(value)
    if special is not None:
        return special
    text = f"{100 * (numeric(value) or 0.0):.{decimals}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) + UNIT_SPACE + "%"


def ratio(value: object) -> str:
    """A ratio: 2.68x, with a multiplication sign."""
    special = _special(value)
    if special is not None:
        return special
    exact = numeric(value) or 0.0
    return (f"{exact:.2f}" if abs(exact) < 100 else f"{exact:,.0f}") + "\u00d7"


def perplexity(value: object) -> str:
    """A perplexity: 29.21, or 12,346 from a thousand on."""
    special = _special(value)
    if special is not None:
        return special
    exact = numeric(value) or 0.0
    return f"{exact:.2f}" if abs(exact) < 1000 else f"{exact:,.0f}"


def duration(value: object) -> str:
    """A time in seconds: 16.0 s, and 3 min 20 s from two minutes on."""
    special = _special(value)
    if special is not None:
        return special
    exact = numeric(value) or 0.0
    if abs(exact) < 120:
        return f"{exact:.3g}{UNIT_SPACE}s" if abs(exact) < 1 else f"{exact:.1f}{UNIT_SPACE}s"
    minutes, seconds = divmod(round(exact), 60)
    if minutes < 120:
        return f"{minutes}{UNIT_SPACE}min {seconds}{UNIT_SPACE}s"
    return f"{minutes // 60}{UNIT_SPACE}h {minutes % 60}{UNIT_SPACE}min"


def short_names(names: Sequence[str]) -> tuple[list[str], str]:
    """Short row labels and what they stand for: model.layers.0.mlp, ... -> 0, ... of ``model.layers.n.mlp``.

    Where more than one part of the dotted names varies, the names themselves, cut at the left, and no pattern.
    """
    parts = [name.split(".") for name in names]
    if len(set(names)) > 1 and len({len(part) for part in parts}) == 1:
        varying = [i for i, column in enumerate(zip(*parts, strict=True)) if len(set(column)) > 1]
        if len(varying) == 1:
            pattern = [("n" if i == varying[0] else part) for i, part in enumerate(parts[0])]
            return [part[varying[0]] for part in parts], ".".join(pattern)
    return [name if len(name) <= 24 else "\u2026" + name[-23:] for name in names], ""
