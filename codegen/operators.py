"""The CPU kernels of what stands around expert FFNs, for a few tokens: linear layers and attention. C++ that registers itself
as ``moecompile::linears`` and ``moecompile::attend`` for CPU tensors.

One library serves every model: sizes, types and the number of tokens are seen at run time. It is compiled once by Inductor's
toolchain, kept on disk by hash, and called by torch's dispatcher without Python in between (a Python operator takes 15 us a
call, a matrix-vector product of an attention as long).
"""

from __future__ import annotations

import threading
import time
from functools import lru_cache

import torch

from ..logs import log
from .cpu import Unavailable, available, first_error, origin, template

# Tokens that the kernel takes itself; more go to torch's matrix product. (2 cores, q, k and v of D = 576, float32 and bfloat16:
# 8 tokens take half and two thirds of torch's time.)
MOST_TOKENS = 8
# With int8 weights, which torch needs as floats first (45 ms for a head of 49152 x 576, as long as 64 tokens take).
MOST_INT8_TOKENS = 64
# Queries per sequence for which attention goes to the kernel.
MOST_QUERIES = 8
# Keys of a piece that one thread takes, with few queries and with many.
KEYS = 256
PIECE = 128
# Bytes of weights, or keys and values, that are worth another thread.
LEAST_BYTES = 32 * 1024

_lock = threading.Lock()
_failed: list[str] = []
_loaded: list[object] = []


@lru_cache(maxsize=1)
def emit() -> str:
    """The C++ source."""
    return template("operators.cpp.jinja").render(
        most_tokens=MOST_TOKENS,
        most_int8_tokens=MOST_INT8_TOKENS,
        least_bytes=LEAST_BYTES,
        keys=KEYS,
        piece=PIECE,
        most_queries=MOST_QUERIES,
    )


def pairs() -> bool:
    """Whether this CPU multiplies pairs of bfloat16 numbers (AVX-512 BF16), and torch is not told to use shorter vectors; then
    bfloat16 prompts have an attention kernel."""
    from torch._inductor import config

    whole = torch.backends.cpu.get_cpu_capability() == "AVX512" and config.cpp.simdlen in (None, 512)
    return whole and bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def loaded() -> bool:
    """Whether CPU tensors go to the kernels."""
    return bool(_loaded)


def load() -> None:
    """Build the kernels (or find them on disk) and register them; nothing where that was done already.

    Raises:
        Unavailable: there is no compiler, or it failed; a second call says so again without trying.
    """
    with _lock:
        if not _loaded and not _failed:
            start = time.time()
            try:
                _loaded.append(_compile())
                log("cache", f"CPU operators: {origin(_loaded[0], start)}")
            except Unavailable as error:
                _failed.append(str(error))
    if _failed:
        raise Unavailable(_failed[0])


def _compile() -> object:
    if (reason := available()) is not None:
        raise Unavailable(reason)
    from torch._inductor.codecache import CppCodeCache

    # A library that uses torch's own, as Inductor's C++ wrappers do.
    flags = {"include_pytorch": True, "shared": True}
    kind = type("OperatorsCache", (CppCodeCache,), {"cache": {}, "cpp_compile_command_flags": flags})
    try:
        return kind.load(emit())  # type: ignore[attr-defined]
    except Exception as error:
        raise Unavailable(first_error(error)) from error
