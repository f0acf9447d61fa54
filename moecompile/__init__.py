"""moecompile: turn a dense transformer into a Mixture-of-Experts and make it run fast."""

from __future__ import annotations

from .apply import moe_blocks, set_top_k, using_top_k
from .balancing import balance
from .bisection import bisect
from .checkpoint import load, register, save
from .compiled import compile
from .conversion import convert, plan
from .dispatching import offer_experts
from .errors import (
    CaptureError,
    CheckpointError,
    CompileError,
    InputError,
    MatchError,
    MoECompileError,
    ParityError,
    PlanError,
)
from .explanation import explain
from .inspection import generated_code, last_graphs, write_repro
from .lowered import FallbackWarning
from .plans import MoEPlan
from .stock import register_experts
from .tuning import TuneConfig, Tuning, tune
from .verification import verify
from .version import __version__

register()
register_experts()
offer_experts()

__all__ = [
    "CaptureError",
    "CheckpointError",
    "CompileError",
    "FallbackWarning",
    "InputError",
    "MatchError",
    "MoECompileError",
    "MoEPlan",
    "ParityError",
    "PlanError",
    "TuneConfig",
    "Tuning",
    "__version__",
    "balance",
    "bisect",
    "compile",
    "convert",
    "explain",
    "generated_code",
    "last_graphs",
    "load",
    "moe_blocks",
    "plan",
    "save",
    "set_top_k",
    "tune",
    "using_top_k",
    "verify",
    "write_repro",
]
