"""``moecompile report OUT``: one self-contained HTML page of everything known about a converted folder."""

from __future__ import annotations

import argparse
import webbrowser
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import read_json, write_bytes
from ..report import render
from . import command
from .common import checkpoint


def add(commands: Any) -> None:
    """The subcommand's options."""
    sub = command(
        commands,
        "report",
        "Write one HTML page of everything known about a converted model.",
        "moecompile report ./moe --compare ./static dense.json",
    )
    sub.add_argument("out", metavar="OUT", type=Path, help="a converted folder")
    sub.add_argument(
        "--compare",
        nargs="+",
        type=Path,
        default=[],
        metavar="PATH",
        help="other converted folders, or files of eval --json, to show beside",
    )
    sub.add_argument("--output", type=Path, metavar="FILE", help="where to write the page (default: OUT/report.html)")
    sub.add_argument("--open", action="store_true", help="show it in the browser")
    sub.set_defaults(run=run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Gather the records, write the page."""
    if not options.out.is_dir():
        raise InputError(f"there is no folder {options.out}")
    record = checkpoint.record_of(options.out)
    others = []
    for path in options.compare:
        other = checkpoint.record_of(path) if path.is_dir() else read_json(path)
        if path.is_dir() or "task" in other:
            others.append(other)
        else:
            raise InputError(f"{path} is neither a converted folder nor the output of eval --json")
    page = options.output or options.out / "report.html"
    if not page.absolute().parent.is_dir():
        raise InputError(f"there is no folder {page.parent}")
    write_bytes(page, render(record, comparisons=others).encode())
    if options.open:
        webbrowser.open(page.absolute().as_uri())
    return {"json": {"path": str(page)}, "text": str(page)}
