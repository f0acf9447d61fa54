"""``moecompile report OUT``: one self-contained HTML page of everything known about a converted folder."""

from __future__ import annotations

import argparse
import webbrowser
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import read_json, write_bytes
from ..hub import check_positions, check_tokens
from ..report import render
from ..routing import routing_record
from ..text import evaluation_windows
from . import command
from .common import checkpoint, device_of, progress_of, tokenizer_of


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
    sub.add_argument("--routing", type=Path, metavar="TEXT", help="measure the routing over a text first; kept in the record")
    sub.add_argument("--tokens", type=int, default=2048, metavar="T", help="tokens of that text (default: 2048)")
    sub.add_argument("--window", type=int, default=256, metavar="L", help="tokens per window of it (default: 256)")
    sub.add_argument("--output", type=Path, metavar="FILE", help="where to write the page (default: OUT/report.html)")
    sub.add_argument("--open", action="store_true", help="show it in the browser")
    sub.set_defaults(run=run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Gather the records, write the page."""
    if not options.out.is_dir():
        raise InputError(f"there is no folder {options.out}")
    record = checkpoint.record_of(options.out)
    if options.routing is not None:
        record["routing"] = _routing(options)
        checkpoint.update_record(options.out, record)
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


def _routing(options: argparse.Namespace) -> dict[str, Any]:
    """The routing over the first tokens of a text.

    Raises:
        InputError: the text is too short, or the model chooses no experts.
    """
    if options.tokens < options.window:
        raise InputError(f"--tokens is {options.tokens}; one window needs {options.window} (--window)")
    options.model = str(options.out)
    tokenizer = tokenizer_of(options)
    rows = evaluation_windows(tokenizer, [options.routing], options.window, options.tokens // options.window)
    progress_of(options).say(f"routing over {rows.numel()} tokens of {options.routing.name}")
    model = checkpoint.load(options.out, device=device_of(options))
    check_positions(model, options.window, "--window")
    check_tokens(model, rows)
    pieces = [tokenizer.decode([token]) for token in rows[0].tolist()]
    return routing_record(model, rows, pieces, options.routing.name)
