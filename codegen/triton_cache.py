"""Tuning results on disk: one JSON file for each spec, device and regime, safe under many processes.

    key = sha256 of (generated source, schema, Triton version, ptxas, device, its processors, dtype, D, I, N, K, regime)

A file is written aside and renamed, under a lock of its own with a time-out; it carries a checksum, and one that is damaged
counts as missing, with a warning. A regime (``pairs``, or the rows of a tile) is a key of its own: a result for few tokens is
never used for many. Where nothing was measured, the heuristic of :mod:`.triton_constants` holds.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, MoECompileError
from ..files import write_bytes
from .triton_constants import Constants, Pairs, Tiles, heuristic, tuned
from .triton_emit import emit
from .triton_spec import Target, TritonSpec

SCHEMA = 1
PAIRS = "pairs"
LOCK_SECONDS = 10.0
Config = Tiles | Pairs


@dataclass(frozen=True)
class Device:
    """What a measurement is good for.

    Attributes:
        name: as the driver calls it; an H100 is not an H200.
        processors: streaming multiprocessors, or compute units.
    """

    name: str
    processors: int

    @classmethod
    def of(cls, device: torch.device) -> Device:
        """A CUDA or HIP device."""
        properties = torch.cuda.get_device_properties(device)
        return cls(properties.name, properties.multi_processor_count)


def key_of(spec: TritonSpec, device: Device, regime: str) -> tuple[str, dict[str, Any]]:
    """(the key, what it was made of). Weights of the chosen, shared neurons, an output bias and gradients are no part of it: a
    result serves all."""
    import triton

    spec = replace(spec, weighted=False, shared_width=0, shared_bias=False, output_bias=False, direction="forward")

    parts = {
        "source": hashlib.sha256(emit(spec).encode()).hexdigest(),
        "schema": SCHEMA,
        "triton": triton.__version__,
        "ptxas": _assembler(spec.target),
        "device": device.name,
        "processors": device.processors,
        "dtype": spec.dtype,
        "shape": [spec.hidden_size, spec.expert_width, spec.experts, spec.top_k],
        "regime": regime,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32], parts


def _assembler(target: Target) -> str:
    """A hash of the assembler that Triton runs for a target (Blackwell has its own), and of what it is told."""
    from triton import knobs
    from triton.backends.nvidia import compiler

    if target.backend != "cuda":
        return "none"
    find = getattr(compiler, "get_ptxas", None)
    try:
        path = (find(int(target.arch)) if find is not None else knobs.nvidia.ptxas).path
    except RuntimeError:  # there is none
        return "none"
    told = [getattr(knobs.nvidia, name, None) for name in ("disable_ptxas_opt", "ptxas_options")]
    return _hash_of(Path(path)) + "".join(f" {each}" for each in told if each)


@functools.cache
def _hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else "none"


class Results:
    """What was measured for one key.

    Args:
        folder: where the files of all keys lie.
        key: of :func:`key_of`.
        parts: what it was made of, for readers.
    """

    def __init__(self, folder: Path, key: str, parts: dict[str, Any]) -> None:
        self.path, self.parts = folder / f"{key}.json", parts

    def read(self) -> dict[str, float | None]:
        """Config as JSON -> microseconds, None for one that cannot be used; empty where nothing is known."""
        try:
            record = json.loads(self.path.read_text(encoding="utf-8"))
            tried = record["tried"]
            if record["checksum"] == _checksum(tried) and all(isinstance(v, (int, float, type(None))) for v in tried.values()):
                return tried
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
        warnings.warn(f"the tuning result {self.path} is damaged and not used", stacklevel=2)
        return {}

    def add(self, config: Config, microseconds: float | None) -> None:
        """Keep one measurement, beside those of other processes.

        Raises:
            CheckpointError: it cannot be written.
            MoECompileError: another process holds the lock for too long.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.path.with_suffix(".lock"), LOCK_SECONDS):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a damaged file is replaced here
                tried = self.read()
            tried[text_of(config)] = microseconds
            record = {"key": self.parts, "tried": tried, "checksum": _checksum(tried)}
            write_bytes(self.path, (json.dumps(record, indent=1) + "\n").encode())

    def best(self) -> tuple[Config, float] | None:
        """The fastest config and its microseconds."""
        known = [(time_taken, text) for text, time_taken in self.read().items() if time_taken is not None]
        if not known:
            return None
        time_taken, text = min(known)
        return config_of(text), time_taken


def text_of(config: Config) -> str:
    """A config as JSON, always the same for the same one."""
    return json.dumps(asdict(config), sort_keys=True)


def config_of(text: str) -> Config:
    """The config in a text of :func:`text_of`."""
    values = json.loads(text)
    return Tiles(**values) if "block_m" in values else Pairs(**values)


def _checksum(tried: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tried, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def locked(path: Path, seconds: float) -> Iterator[None]:
    """Hold a file's lock; the system frees it when a process ends, however it ends.

    Raises:
        MoECompileError: it is not to be had within the time.
        CheckpointError: the file cannot be made.
    """
    import fcntl

    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        end = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise MoECompileError(f"another process holds {path} for more than {seconds:.0f} s") from None
                time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


def constants_for(spec: TritonSpec, device: Device, folder: Path) -> Constants | None:
    """The launch constants that were measured for a spec on a device; None where none were."""
    found: dict[str, Config] = {}
    for regime in regimes(spec):
        best = Results(folder, *key_of(spec, device, regime)).best()
        if best is not None:
            found[regime] = best[0]
    if not found:
        return None
    tiles = {int(regime): config for regime, config in found.items() if isinstance(config, Tiles)}
    pairs = found.get(PAIRS)
    return tuned(spec, tiles, pairs if isinstance(pairs, Pairs) else None, device.name)


def regimes(spec: TritonSpec) -> list[str]:
    """The names of a spec's regimes, that of few tokens first."""
    return [PAIRS, *(str(tile.block_m) for tile in heuristic(spec).tiles)]
