"""moecompile: turn a dense transformer into a Mixture-of-Experts and make it run fast."""

from __future__ import annotations

from .convert import convert, plan
from .errors import (
    CaptureError,
    CheckpointError,
    InputError,
    MatchError,
    MoECompileError,
    ParityError,
    PlanError,
)
from .explain import explain
from .parity import verify
from .plan import MoEPlan
from .version import __version__

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
    "plan",
    "verify",
]
