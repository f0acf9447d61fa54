"""Graph passes, one a file, and the lists that order them.

``SplitFFN`` rewrites a dense graph; :mod:`moecompile.passes.pipeline` holds the list that compiled graphs go through.
"""

from __future__ import annotations

from .base import Pass, PassError, PassResult, clone, run_passes
from .split_ffn import SplitFFN

__all__ = ["Pass", "PassError", "PassResult", "SplitFFN", "clone", "run_passes"]
