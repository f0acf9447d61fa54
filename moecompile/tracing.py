"""What TorchDynamo is spared while it traces a model: work that nobody sees, a sixth of a warm first call.

Everything here begins when something is compiled within a call of a compiled module, and ends with that call.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Iterator
from typing import Any
from unittest import mock

from transformers import PreTrainedConfig

from .backend import collect_again


def static_floats() -> Any:
    """TorchDynamo with floats of the model's code as constants: symbolic ones make it trace every graph twice (30 s of 75 on a
    model of 30 layers)."""
    from torch._dynamo import config

    return config.patch(specialize_float=True)


class _Spared:
    """Entered around every call; what it spares begins with a compilation. Calls may be nested."""

    def __init__(self) -> None:
        self._calls = 0
        self._registered = False
        self._undo: contextlib.ExitStack | None = None

    def __enter__(self) -> None:
        if not self._registered:
            from torch._dynamo.callback import on_compile_start

            on_compile_start(self._start)
            self._registered = True
        self._calls += 1

    def __exit__(self, *_: object) -> None:
        self._calls -= 1
        if not self._calls and self._undo is not None:
            undo, self._undo = self._undo, None
            undo.close()

    def _start(self, _: object = None) -> None:
        if self._calls and self._undo is None:
            self._undo = contextlib.ExitStack()
            for spared in (_collection(), _lookups(), _names()):
                self._undo.enter_context(spared)


spared = _Spared()


@contextlib.contextmanager
def _collection() -> Iterator[None]:
    """Garbage collection: walking the model, TorchDynamo's state and the graphs again and again, and once more by TorchDynamo
    itself, takes an eighth of the time."""
    from torch._dynamo import config

    if not gc.isenabled():
        yield
        return
    gc.disable()
    afterwards, config.run_gc_after_compile = config.run_gc_after_compile, False
    try:
        yield
    finally:
        collect_again()
        config.run_gc_after_compile = afterwards


@contextlib.contextmanager
def _lookups() -> Iterator[None]:
    """Following transformers' Python for every attribute of a config that is found as it is stored: a tenth of the time."""
    from torch._dynamo.variables import user_defined

    original = getattr(user_defined, "object_has_getattribute", None)
    if original is None:  # another torch
        yield
        return
    seen: dict[int, tuple[PreTrainedConfig, bool]] = {}  # held, so that no other object gets the number

    def has_own_lookup(value: object) -> bool:
        if not isinstance(value, PreTrainedConfig):
            return original(value)
        if id(value) not in seen:
            seen[id(value)] = value, not stored_plainly(value)
        return seen[id(value)][1]

    with mock.patch.object(user_defined, "object_has_getattribute", has_own_lookup):
        yield


def stored_plainly(config: PreTrainedConfig) -> bool:
    """Whether a config's own way of looking attributes up comes to the ordinary one: no names that stand for others, and
    everything that it holds is found as it is stored (layers with values of their own raise)."""
    if config.attribute_map or type(config).__getattribute__ is not PreTrainedConfig.__getattribute__:
        return False
    try:
        return all(getattr(config, name) is value for name, value in vars(config).items())
    except (AttributeError, RuntimeError):
        return False


@contextlib.contextmanager
def _names() -> Iterator[None]:
    """Parsing every traced source file for the names of its functions, for a line of a log that is not written."""
    from torch._dynamo import symbolic_convert

    log = getattr(symbolic_convert, "trace_call_log", None)
    if log is None or log.isEnabledFor(logging.DEBUG) or not hasattr(symbolic_convert, "get_funcname"):
        yield
        return
    with mock.patch.object(symbolic_convert, "get_funcname", lambda *_: None):
        yield
