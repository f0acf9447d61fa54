"""Recipes: how to decide which neurons form which expert. Each is a frozen dataclass; its planner is registered by its type."""

from __future__ import annotations

from .base import Context, Recipe, make_plan, planner
from .contiguous import Contiguous
from .pruned import Flap, Static

RECIPES: dict[str, type[Recipe]] = {"contiguous": Contiguous, "static": Static, "flap": Flap}

__all__ = ["RECIPES", "Contiguous", "Context", "Flap", "Recipe", "Static", "make_plan", "planner"]
