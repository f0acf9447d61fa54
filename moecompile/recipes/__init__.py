"""Recipes: how to decide which neurons form which expert. Each is a frozen dataclass; its planner is registered by its type."""

from __future__ import annotations

from .base import Context, Recipe, make_plan, planner
from .calibrated import Calibrated
from .contiguous import Contiguous
from .pruned import Flap, Static
from .read_me import ReadMe

RECIPES: dict[str, type[Recipe]] = {
    "calibrated": Calibrated,
    "contiguous": Contiguous,
    "static": Static,
    "flap": Flap,
    "read-me": ReadMe,
}

__all__ = ["RECIPES", "Calibrated", "Context", "Contiguous", "Flap", "ReadMe", "Recipe", "Static", "make_plan", "planner"]
