"""The command ``moecompile``: one module a subcommand, each with ``add`` (its options) and ``run`` (its work)."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from ..errors import MoECompileError
from ..memory import keep_freed

USE, INTERNAL = 2, 1


class Parser(argparse.ArgumentParser):
    """argparse, with its complaints on one line."""

    def error(self, message: str) -> NoReturn:
        """One line on stderr, exit code 2."""
        self.exit(USE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parser() -> Parser:
    """The whole command line."""
    from ..version import __version__
    from . import autotune, codegen, convert, evaluate, explain, generate, report, tune

    top = Parser(prog="moecompile", description="Turn a dense transformer into a Mixture-of-Experts.")
    top.add_argument("--version", action="version", version=f"moecompile {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for module in (explain, convert, tune, evaluate, generate, report, codegen, autotune):
        module.add(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 on success, 2 on bad use or bad input (one line on stderr), 1 on an internal error.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if argv is None:  # the process is the command's own
        keep_freed()
    try:
        if threading.current_thread() is threading.main_thread():  # an end by `kill` cleans up as Ctrl-C does
            signal.signal(signal.SIGTERM, _interrupt)
        options = parser().parse_args(arguments)
        result = options.run(options)
        if options.json and "json" in result:  # under torchrun only the first process has something to say
            print(json.dumps(result["json"]))
        elif result.get("text"):
            print(result["text"])
        sys.stdout.flush()
        return 0
    except SystemExit as stop:  # argparse
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return _complain("interrupted; nothing was left behind", debug)
    except BrokenPipeError:
        sys.stderr.close()
        return INTERNAL
    except MoECompileError as error:
        return _complain(" ".join(str(error).split()), debug)
    except MemoryError:
        return _complain("out of memory; take a smaller model or fewer calibration tokens", debug)
    except Exception as error:  # the promise is one line, and the traceback only when asked for
        if debug:
            traceback.print_exc()
        else:
            text = " ".join(str(error).split())[:300]
            print(f"moecompile: internal error: {type(error).__name__}: {text} (--debug shows where)", file=sys.stderr)
        return INTERNAL


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt  # not SIGINT: a shell's background jobs ignore that one


def _complain(text: str, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"moecompile: {text}", file=sys.stderr)
    return USE


def seed(text: str) -> int:
    """A seed that torch takes."""
    number = int(text)
    if not -(2**63) <= number < 2**63:
        raise argparse.ArgumentTypeError(f"{text} has more than 64 bits")
    return number


def command(commands: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    """A subcommand with what all of them share."""
    sub: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else there")
    sub.add_argument("--seed", type=seed, default=0, metavar="N", help="of every random choice (default: 0)")
    sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (default: auto)")
    sub.add_argument("--quiet", action="store_true", help="no progress on stderr")
    sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
    sub.add_argument("--trust-remote-code", action="store_true", help="allow a model folder's own Python code to run")
    return sub
