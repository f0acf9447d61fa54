"""Graph passes, one a file, and the lists that order them.

The rewrite of a dense graph is one pass; lowering to kernels appends its own.
"""

from __future__ import annotations

from .base import Pass, PassError, PassResult, clone, run_passes
from .split_ffn import SplitFFN

__all__ = ["Pass", "PassError", "PassResult", "SplitFFN", "clone", "run_passes"]
