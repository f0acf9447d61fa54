"""What a section of the page is made of: blocks of a heading, a sentence, a chart and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

EVAL = "moecompile eval OUT --text FILE"
TUNE = "moecompile tune OUT --text FILE --tokens 500000"
CONVERT = "moecompile convert MODEL OUT --recipe calibrated --calibration FILE"


@dataclass(frozen=True)
class Table:
    """A captioned table; the first column names the row, ``numeric`` are the columns that align right."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: frozenset[int] = frozenset()
    marked: frozenset[int] = frozenset()  # rows to set off: the folder that the page is about


@dataclass(frozen=True)
class Block:
    """A part of a section: a heading, a sentence, a chart, tables, or what is missing and the command that fills it."""

    heading: str = ""
    sentence: str = ""
    chart: Markup | None = None
    tables: Sequence[Table] = ()
    missing: str = ""
    command: str = ""
    aside: bool = False  # the chart stands beside the table where there is room


@dataclass(frozen=True)
class Section:
    """A numbered section with an anchor."""

    anchor: str
    title: str
    blocks: Sequence[Block] = ()
