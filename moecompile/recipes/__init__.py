"""Recipes: how to decide which neurons form which expert. Each is a frozen dataclass; its planner is registered by its type."""

from __future__ import annotations

from .base import Context, Recipe, make_plan, planner
from .calibrated import Calibrated
from .cmoe import CMoE
from .contiguous import Contiguous
from .expertweaver import ExpertWeaver
from .moefication import MoEfication
from .pruned import Flap, Static
from .random_split import RandomSplit
from .read_me import ReadMe

RECIPES: dict[str, type[Recipe]] = {
    "calibrated": Calibrated,
    "contiguous": Contiguous,
    "static": Static,
    "flap": Flap,
    "read-me": ReadMe,
    "cmoe": CMoE,
    "expertweaver": ExpertWeaver,
    "moefication": MoEfication,
    "random-split": RandomSplit,
}

__all__ = [
    "RECIPES",
    "CMoE",
    "Calibrated",
    "Context",
    "Contiguous",
    "ExpertWeaver",
    "Flap",
    "MoEfication",
    "RandomSplit",
    "ReadMe",
    "Recipe",
    "Static",
    "make_plan",
    "planner",
]
