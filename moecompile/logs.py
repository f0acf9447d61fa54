"""What the compiler says of its work: ``MOECOMPILE_LOGS``, ``MOECOMPILE_DISABLE``, ``MOECOMPILE_DUMP_DIR``.

    MOECOMPILE_LOGS=passes,output_code      comma-separated artifacts, or ``all``; lines go to stderr
    MOECOMPILE_DISABLE=fuse_router          passes to leave out, comma-separated; ``1`` or ``all`` turns the compiler off
    MOECOMPILE_DUMP_DIR=folder              a file per graph and pass, with provenance and a diff

They are read whenever a graph is compiled, so that they can be set from Python too.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from .errors import InputError

# artifact -> what it shows
ARTIFACTS = {
    "match": "which expert FFNs were found in a graph, and what was left alone and why",
    "plan": "how a dense model given with a plan is rewritten",
    "passes": "each pass: how much it rewrote, and its notes",
    "hoist": "what becomes of routers",
    "output_code": "the generated code",
    "autotune": "which measured launch constants a Triton kernel takes, or that none were measured",
    "cache": "which kernels were built or found on disk",
}


def _names(variable: str) -> frozenset[str]:
    return frozenset(part.strip() for part in os.environ.get(variable, "").split(",") if part.strip())


def artifacts() -> frozenset[str]:
    """The artifacts asked for.

    Raises:
        InputError: there is no such artifact.
    """
    names = _names("MOECOMPILE_LOGS")
    unknown = sorted(names - ARTIFACTS.keys() - {"all"})
    if unknown:
        raise InputError(f"MOECOMPILE_LOGS: there is no artifact '{unknown[0]}'; there are: all, {', '.join(ARTIFACTS)}")
    return frozenset(ARTIFACTS) if "all" in names else names


def log(artifact: str, text: str) -> None:
    """Show text on stderr if its artifact was asked for, each line with a prefix."""
    if artifact in artifacts():
        for line in text.splitlines() or [""]:
            print(f"[moecompile:{artifact}] {line}", file=sys.stderr, flush=True)


def disabled() -> frozenset[str]:
    """Names of the passes to leave out; ``all`` in it means everything.

    Raises:
        InputError: there is no such pass.
    """
    names = _names("MOECOMPILE_DISABLE")
    if names & {"1", "all", "true"}:
        return frozenset({"all"})
    names -= {"0", "false"}
    if names:
        # At first use: passes need operators, which need this module.
        from .passes.pipeline import closing_passes, inference_passes

        known = [step.name for step in (*inference_passes(), *closing_passes())]
        unknown = sorted(names - set(known))
        if unknown:
            raise InputError(f"MOECOMPILE_DISABLE: there is no pass '{unknown[0]}'; there are: all, {', '.join(known)}")
    return names


def dump_folder() -> Path | None:
    """Where to write dumps, or None."""
    folder = os.environ.get("MOECOMPILE_DUMP_DIR")
    return Path(folder) if folder else None
