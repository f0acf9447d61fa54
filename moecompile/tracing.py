"""How TorchDynamo is set while a compiled module is called, and what it is spared while it traces: work that nobody sees, a
sixth of a warm first call."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

from torch import Tensor
from transformers import Cache, PreTrainedConfig

from .backend import collector_paused
from .lowered import warn_once


class _Calls(threading.local):
    """The keyword arguments of the calls that this thread is in."""

    def __init__(self) -> None:
        self.running: list[Mapping[str, Any]] = []


_calls = _Calls()
_undo = contextlib.ExitStack()


@contextlib.contextmanager
def calling(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Around each call of something compiled: TorchDynamo's settings, and what is spared where it compiles.

    Floats of the model's code are constants: symbolic ones make TorchDynamo trace every graph twice (30 s of 75 on a model of
    30 layers). Not where the call has floats of its own, each of which would be compiled anew. And no garbage collection behind
    each graph, .35 s.
    """
    from torch._dynamo import config, convert_frame
    from torch._dynamo.callback import callback_handler

    if _limit_told not in convert_frame.log.filters:
        convert_frame.log.addFilter(_limit_told)

    if _start not in callback_handler.start_callbacks:  # torch._dynamo.reset() forgets them
        callback_handler.register_start_callback(_start)
        callback_handler.register_end_callback(_end)
    given = any(isinstance(value, float) for value in (*args, *kwargs.values()))
    _calls.running.append(kwargs)
    try:
        changes = {"run_gc_after_compile": False, **({} if given else {"specialize_float": True})}
        with config.patch(changes):
            yield
    finally:
        _calls.running.pop()


def _start(_: object) -> None:
    """Called by TorchDynamo, which lets one thread at a time begin and end."""
    if _calls.running:
        _fix_heads(_calls.running[-1].get("past_key_values"))
        for each in (collector_paused(), _lookups(), _names()):
            _undo.enter_context(each)


def _limit_told(record: logging.LogRecord) -> bool:
    """TorchDynamo gives up on a function that it compiled too often, and logs it: our warning in its place."""
    if not _calls.running or not str(record.msg).startswith("torch._dynamo hit config."):
        return True
    limit, value, function, reason, *_ = map(str, record.args or ())
    told = f"{limit} ({value}) is reached, last reason: {in_a_line(reason)}"
    warn_once(f"{function}: calls that match no compiled graph run in eager mode from now on: {told}")
    return False


def in_a_line(text: str) -> str:
    """What TorchDynamo says in many, at most 300 characters of it."""
    return " ".join(text.split())[:300]


def _fix_heads(cache: Any) -> None:
    """The number of heads and their width in a KV cache never change. TorchDynamo takes sizes that are equal in its first call
    for one: the length of a prompt of 64 tokens for the width, a batch of 4 for the heads; and would compile again for others.
    """
    for layer in cache.layers if isinstance(cache, Cache) else ():
        for each in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if isinstance(each, Tensor) and each.dim() == 4:
                # what torch._dynamo.mark_static does outside of a compilation
                each._dynamo_static_indices = getattr(each, "_dynamo_static_indices", set()) | {1, 3}  # type: ignore[attr-defined]


def _end(_: object) -> None:
    _undo.close()


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

    logs = [getattr(symbolic_convert, name, None) for name in ("trace_call_log", "trace_source_log")]
    wanted = any(log is None or log.isEnabledFor(logging.DEBUG) for log in logs)
    if wanted or not hasattr(symbolic_convert, "get_funcname"):
        yield
        return
    with mock.patch.object(symbolic_convert, "get_funcname", lambda *_: None):
        yield
