"""What every recipe shares: the checks of its numbers, the slices of a width, and the registry of planners.

A recipe is a frozen dataclass with settings; its planner is a function registered by the recipe's type. To add a recipe,
write one file with both and import it in :mod:`moecompile.recipes`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from ..capture import Captured
from ..errors import InputError, PlanError
from ..match import Match
from ..plans import MoEPlan
from ..progress import Progress


@dataclass(frozen=True)
class Recipe:
    """Base of all recipes."""

    @property
    def name(self) -> str:
        """The name by which commands and files know the recipe."""
        return type(self).__name__.lower()

    @property
    def needs_calibration(self) -> bool:
        """Whether the planner looks at data."""
        return True

    def check(self) -> None:
        """Refuse settings that make no sense for any model.

        Raises:
            PlanError: with what is wrong.
        """

    def settings(self) -> dict[str, Any]:
        """The settings, for the record."""
        return asdict(self)


@dataclass(frozen=True)
class Context:
    """What a planner works on.

    Attributes:
        captured: the captured model.
        matches: its FFNs in order.
        batches: calibration inputs; empty when the recipe needs none.
        progress: shows how far the work is.
        seed: for the recipe's own random choices.
        domains: names of the kinds of text that the batches are of, where they were given by name.
        domain_of: for each batch the number of its domain.
    """

    captured: Captured
    matches: tuple[Match, ...]
    batches: Sequence[Any]
    progress: Progress
    seed: int
    domains: tuple[str, ...] = ()
    domain_of: tuple[int, ...] = ()

    @property
    def vocabulary(self) -> int | None:
        """How many words a language model has logits for; None where its config says nothing."""
        return getattr(getattr(self.captured.module, "config", None), "vocab_size", None)


R = TypeVar("R", bound=Recipe)
Planner = Callable[[Any, Context], MoEPlan]
_PLANNERS: dict[type[Recipe], Planner] = {}


def planner(recipe: type[R]) -> Callable[[Callable[[R, Context], MoEPlan]], Callable[[R, Context], MoEPlan]]:
    """Register the planner of a recipe's type."""

    def register(function: Callable[[R, Context], MoEPlan]) -> Callable[[R, Context], MoEPlan]:
        _PLANNERS[recipe] = function
        return function

    return register


def make_plan(recipe: Recipe, context: Context) -> MoEPlan:
    """The plan that a recipe makes, validated.

    Raises:
        PlanError: the settings make no sense for this model.
        InputError: the recipe needs calibration data and got none.
    """
    recipe.check()
    if type(recipe) not in _PLANNERS:
        raise PlanError(f"no planner is registered for the recipe {type(recipe).__name__}")
    if recipe.needs_calibration and not context.batches:
        raise InputError(f"the recipe '{recipe.name}' needs calibration data; give some with --calibration (calibration=)")
    plan = _PLANNERS[type(recipe)](recipe, context)
    plan.validate()
    return plan


def check_counts(experts: int, shared: int, top_k: int) -> None:
    """Refuse numbers of experts, shared slices and chosen experts that make no sense.

    Raises:
        PlanError: with what is wrong.
    """
    if experts < 1:
        raise PlanError(f"--experts is {experts}; there must be at least one routed expert")
    if shared < 0:
        raise PlanError(f"--shared is {shared}; it cannot be negative")
    if not 0 <= top_k <= experts:
        raise PlanError(f"--top-k is {top_k}; with {experts} experts it can be 0 to {experts}")
    if top_k == 0 and shared == 0:
        raise PlanError("--top-k 0 with --shared 0 would compute no neuron at all")


def check_fraction(fraction: float) -> None:
    """Refuse an active fraction outside (0, 1].

    Raises:
        PlanError: with what is wrong.
    """
    if not 0.0 < fraction <= 1.0:
        raise PlanError(f"--active-fraction is {fraction:g}; it must be above 0 and at most 1")


def slice_sizes(width: int, parts: int, site: str) -> list[int]:
    """``width`` neurons as ``parts`` slices whose sizes differ by one at most, the larger ones first.

    Raises:
        PlanError: there are more slices than neurons.
    """
    if parts > width:
        raise PlanError(f"site {site} has {width} neurons; it cannot be cut into {parts} slices (experts + shared)")
    small, larger = divmod(width, parts)
    return [small + 1] * larger + [small] * (parts - larger)
