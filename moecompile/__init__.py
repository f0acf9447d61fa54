"""moecompile: turn a dense transformer into a Mixture-of-Experts and make it run fast."""

from __future__ import annotations

from .apply import moe_blocks, set_top_k
from .checkpoint import load, register, save
from .conversion import convert, plan
from .errors import (
    CaptureError,
    CheckpointError,
    InputError,
    MatchError,
    MoECompileError,
    ParityError,
    PlanError,
)
from .explanation import explain
from .plans import MoEPlan
from .verification import verify
from .version import __version__

register()

__all__ = [
    "CaptureError",
    "CheckpointError",
    "InputError",
    "MatchError",
    "MoECompileError",
    "MoEPlan",
    "ParityError",
    "PlanError",
    "__version__",
    "convert",
    "explain",
    "load",
    "moe_blocks",
    "plan",
    "save",
    "set_top_k",
    "verify",
]
