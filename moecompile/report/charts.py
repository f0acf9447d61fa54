"""Charts as inline SVG: lines with markers, bars, and a heat map. Plain functions from numbers to markup.

Colours are classes (``s0`` the dense baseline, ``s1`` ... ``s6`` the series) that the style sheet defines for light and
dark; every series also has its own marker shape, so that no chart depends on colour alone. A tooltip is a ``<title>``.
All text is escaped here, and only finite numbers become coordinates: callers say in words what could not be drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from .text import number, percent, whole

WIDTH, HEIGHT = 640, 320  # user units; the style sheet scales the drawing to its column
LEFT, RIGHT, TOP, BOTTOM = 70, 32, 14, 62
SHAPES = (  # drawn around (0, 0), of about equal visual weight
    '<circle r="5"/>',
    '<path d="M-4.6-4.6h9.2v9.2h-9.2z"/>',
    '<path d="M0-6.2 6.2 0 0 6.2-6.2 0z"/>',
    '<path d="M0-6 5.8 4.4H-5.8z"/>',
    '<path d="M0 6 5.8-4.4H-5.8z"/>',
    '<path d="M-1.7-5.6h3.4v3.9h3.9v3.4h-3.9v3.9h-3.4v-3.9h-3.9v-3.4h3.9z"/>',
)
COLOURS = 6


@dataclass(frozen=True)
class Point:
    """A point and its tooltip."""

    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Series:
    """Points joined by a line in order of x; ``index`` chooses colour and shape (0: the baseline)."""

    label: str
    points: Sequence[Point]
    index: int


@dataclass(frozen=True)
class Bar:
    """One bar of a group: its value, the text at its end, and its series."""

    label: str
    value: float
    text: str
    index: int


@dataclass(frozen=True)
class HeatRow:
    """A row of a heat map: cells (None: no such cell), and texts for the columns at its right."""

    label: str
    title: str
    values: Sequence[float | None]
    notes: Sequence[str]


def colour(index: int) -> str:
    """The style class of a series: s0 for the baseline, then s1 to s6 in turn."""
    return f"s{(index - 1) % COLOURS + 1 if index > 0 else 0}"


def marker(index: int) -> str:
    """The marker of a series, around (0, 0); shapes and colours come apart after six series."""
    return SHAPES[(index + max(index - 1, 0) // COLOURS) % len(SHAPES)]


def legend(entries: Sequence[tuple[str, int]]) -> Markup:
    """A legend as a list, beside the drawing, so that it wraps on a narrow screen."""
    rows = (
        f'<li><svg class="key" viewBox="-8 -8 16 16" aria-hidden="true"><g class="{colour(index)}">{marker(index)}</g>'
        f"</svg>{escape(label)}</li>"
        for label, index in entries
    )
    return Markup(f'<ul class="legend">{"".join(rows)}</ul>')


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_percent: bool = False,
    from_zero: bool = False,
    level: float | None = None,
    x_step: float = 0.0,
) -> Markup:
    """Series over x with a legend; y is logarithmic where the values span more than a factor of 20.

    ``level`` is the value of y to compare with, drawn as a dashed line across; ``x_step`` is the least distance
    between two marks of x.
    """
    points = [point for one in series for point in one.points]
    if not points:
        return Markup("")
    xs, ys = [p.x for p in points], [p.y for p in points]
    log = not from_zero and min(ys) > 0 and max(ys) / min(ys) > 20
    x_ticks = ticks(min(xs), max(xs), least=x_step) if max(xs) > min(xs) or not x_percent else ticks(0.0, 1.0)
    y_ticks = log_ticks(min(ys), max(ys)) if log else ticks(0.0 if from_zero else min(ys), max(ys))

    def place_x(x: float) -> float:
        return LEFT + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (WIDTH - LEFT - RIGHT)

    def place_y(y: float) -> float:
        low, high, at = y_ticks[0], y_ticks[-1], y
        if log:
            low, high, at = math.log(low), math.log(high), math.log(y)
        return HEIGHT - BOTTOM - (at - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    floor = HEIGHT - BOTTOM
    drawn = [f'<path class="axis" d="M{LEFT} {floor}H{WIDTH - RIGHT}"/>']
    for value in y_ticks:
        y = place_y(value)
        drawn.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        drawn.append(f'<text x="{LEFT - 10}" y="{y:.1f}" class="end mid">{_tick(value)}</text>')
    for value in x_ticks:
        text = percent(value) if x_percent else _tick(value)
        drawn.append(f'<text x="{place_x(value):.1f}" y="{floor + 27}" class="centre">{text}</text>')
    drawn.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" class="centre">{escape(x_label)}</text>')
    if level is not None:
        drawn.append(f'<path class="level" d="M{LEFT} {place_y(level):.1f}H{WIDTH - RIGHT}"/>')
    for one in series:
        ordered = sorted(one.points, key=lambda p: p.x)
        places = [(place_x(p.x), place_y(p.y), p.title) for p in ordered]
        trail = "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in places)
        marks = "".join(
            f'<g transform="translate({x:.1f} {y:.1f})"><title>{escape(tip)}</title>{marker(one.index)}</g>'
            for x, y, tip in places
        )
        line = f'<path class="line" d="M{trail}"/>' if len(places) > 1 else ""
        drawn.append(f'<g class="{colour(one.index)}">{line}{marks}</g>')
    heading = f'<p class="axis-title">{escape(y_label)}{" (logarithmic scale)" if log else ""}</p>'
    key = legend([(one.label, one.index) for one in series])
    summary = f"{title}. " + " ".join(f"{one.label}: {len(one.points)} points." for one in series)
    return Markup(f'<div class="chart">{heading}{_svg(WIDTH, HEIGHT, summary, drawn)}{key}</div>')


def bars(groups: Sequence[tuple[str, Sequence[Bar]]], *, title: str, shared_scale: bool) -> Markup:
    """Horizontal bars under a label each; on one scale for all, or each group on the scale of its longest bar."""
    groups = [(label, members) for label, members in groups if members]
    if not groups:
        return Markup("")
    most = max(bar.value for _, members in groups for bar in members)
    top, drawn, said = 0.0, [], []
    entries = {bar.index: bar.label for _, members in groups for bar in members}
    thick = 16 if len(entries) > 1 else 12
    for label, members in groups:
        drawn.append(f'<text x="0" y="{top + 16:.0f}">{escape(label)}</text>')
        top += 26
        scale = most if shared_scale else max(bar.value for bar in members)
        for bar in members:
            length = max(bar.value / scale * (WIDTH - 150), 1.5) if scale > 0 else 1.5
            tip = f"{label}, {bar.label}: {bar.text}" if len(entries) > 1 else f"{label}: {bar.text}"
            drawn.append(
                f'<g class="{colour(bar.index)}"><title>{escape(tip)}</title>'
                f'<rect y="{top:.0f}" width="{length:.1f}" height="{thick}" rx="2"/></g>'
                f'<text x="{length + 8:.1f}" y="{top + thick / 2:.0f}" class="mid strong">{escape(bar.text)}</text>'
            )
            said.append(tip)
            top += thick + 6
        top += 12
    key = legend([(label, index) for index, label in entries.items()]) if len(entries) > 1 else ""
    picture = _svg(WIDTH, top, f"{title}. " + ". ".join(said), drawn)
    return Markup(f'<div class="chart">{picture}{key}</div>')


def heat_map(
    rows: Sequence[HeatRow], *, title: str, columns: str, notes: Sequence[str], uniform: float | None, dead: float
) -> Markup:
    """Cells from faint (0) to full (the largest value), a dot in each that is at most ``dead``, notes at the right."""
    count = max((len(row.values) for row in rows), default=0)
    known = [value for row in rows for value in row.values if value is not None and math.isfinite(value)]
    if not count or not known:
        return Markup("")
    most = max(max(known), uniform or 0.0, 1e-12)
    cell, tall = min(max(640 / count, 4.0), 28.0), 15
    left, head = 14 + 7.0 * max(len(row.label) for row in rows), 40
    right = left + cell * count
    drawn = [f'<text x="{left}" y="12">{escape(columns)}</text>']
    every = next(step for step in (1, 2, 5, 8, 10, 16, 32, 64, 128, 10**9) if step * cell >= 26)
    for column in range(0, count, every):
        drawn.append(f'<text x="{left + cell * (column + 0.5):.1f}" y="{head - 8}" class="centre">{column}</text>')
    for i, note in enumerate(notes):
        drawn.append(f'<text x="{right + 84 + 62 * i:.1f}" y="{head - 8}" class="end">{escape(note)}</text>')
    for i, row in enumerate(rows):
        y = head + tall * i
        drawn.append(f'<text x="{left - 8:.1f}" y="{y + tall / 2}" class="end mid">{escape(row.label)}</text>')
        for column, value in enumerate(row.values):
            if value is not None:
                name = f"{row.title}, expert {column}"
                drawn.append(_cell(left + cell * column, y, cell - 1, tall - 1, value, most, dead, name))
        for j, note in enumerate(row.notes):
            x = right + 84 + 62 * j
            drawn.append(f'<text x="{x:.1f}" y="{y + tall / 2}" class="end mid">{escape(note)}</text>')
    width = right + 84 + 62 * max(len(notes) - 1, 0) + 4
    picture = _svg(width, head + tall * len(rows) + 2, title, drawn, f' style="width:{width:.0f}px"')
    box = f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(columns)}">{picture}</div>'
    return Markup(f'<div class="heat">{box}{_scale(most, uniform, dead)}</div>')


def _cell(x: float, y: float, wide: float, tall: float, value: float, most: float, dead: float, name: str) -> str:
    """One cell with its tooltip; one that is not finite is hollow, a dead one carries a dot."""
    place = f'x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{tall}"'
    if not math.isfinite(value):
        return f'<rect class="void" {place}><title>{escape(name)}: {number(value)}</title></rect>'
    share = min(max(value / most, 0.0), 1.0)
    tip = f"{escape(name)}: {percent(value, 2)}"
    cell = f'<rect {place} fill-opacity="{_opacity(share)}"><title>{tip}</title></rect>'
    dot = f'<circle class="dead" cx="{x + wide / 2:.1f}" cy="{y + tall / 2:.1f}" r="2"/>'
    return cell + dot if value <= dead else cell


def _scale(most: float, uniform: float | None, dead: float) -> Markup:
    """The legend of a heat map: a ramp from 0 to the largest value, with the uniform level marked on it."""
    steps = "".join(f'<rect x="{i * 8}" width="8" height="12" fill-opacity="{_opacity(i / 19)}"/>' for i in range(20))
    tick, word = "", ""
    if uniform is not None:
        x = 160 * uniform / most
        tick = f'<path class="tick" d="M{x:.1f}-3v18"/>'
        word = f"<li>mark: uniform level, top-k / N = {percent(uniform)}</li>"
    ramp = f'<svg class="ramp" viewBox="-2 -4 164 20" aria-hidden="true">{steps}{tick}</svg>'
    dot = '<svg class="key" viewBox="-8 -8 16 16" aria-hidden="true"><circle class="dead" r="4"/></svg>'
    ends = f"<li>0{ramp}{percent(most)} of tokens</li>"
    return Markup(f'<ul class="legend">{ends}{word}<li>{dot}dead: at most {percent(dead)}</li></ul>')


def _opacity(share: float) -> str:
    """How full a cell of a heat map is drawn; 0 stays visible as a cell."""
    return f"{0.05 + 0.95 * share:.2f}"


def _tick(value: float) -> str:
    return whole(value) if 1 <= abs(value) < 1e6 and value == round(value) else number(value)


def _svg(width: float, height: float, label: str, drawn: Sequence[str], more: str = "") -> str:
    box = f'viewBox="0 0 {width:.0f} {height:.0f}"'
    return f'<svg {box} role="img" aria-label="{escape(label)}"{more}>{"".join(drawn)}</svg>'


def ticks(low: float, high: float, wanted: int = 5, least: float = 0.0) -> list[float]:
    """Round tick values that cover [low, high], at least two and at least ``least`` apart."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value, but for rounding
        pad = abs(low) * 0.1 or 0.5
        low, high = (low - pad, high + pad) if low else (0.0, 1.0)
    rough = max((high - low) / wanted, least)
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks 1, 2, 5, 10, ... that cover [low, high]; powers of ten alone over more than three decades."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    mantissas = (1, 2, 5) if last - first <= 3 else (1,)
    every = [m * 10.0**e for e in range(first, last + 1) for m in mantissas]
    start = max((v for v in every if v <= low), default=every[0])
    stop = min((v for v in every if v >= high), default=every[-1])
    return [v for v in every if start <= v <= stop]
