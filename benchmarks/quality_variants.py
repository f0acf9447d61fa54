"""What benchmarks/quality.py compares: recipes by active fraction, and what is measured on each converted model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from moecompile.recipes import Calibrated, CMoE, ExpertWeaver, Flap, MoEfication, RandomSplit, Recipe, Static
from moecompile.tuning import TuneConfig

FRACTIONS = (0.25, 0.5, 0.75)
# Slices (shared, chosen, routed), of 256 for our own recipe (docs/quality.md), of 64 for the others that have fine experts.
OWN = {0.25: (40, 24, 216), 0.5: (80, 48, 176), 0.75: (128, 64, 128)}
# The same with fewer chosen, so that the router's N products of width D are within the fraction too, where F is 1,536.
_COUNTED = {0.25: (24, 27, 232), 0.5: (80, 38, 176), 0.75: (128, 56, 128)}
_FINE = {0.25: (8, 8, 56), 0.5: (16, 16, 48), 0.75: (16, 32, 48)}
_EIGHT = {0.25: (1, 1, 7), 0.5: (2, 2, 6), 0.75: (3, 3, 5)}  # CMoE's own: eight slices

# How every variant is tuned (docs/tuning.md); what has no routers, without the router stage.
TUNED = ", tuned"
TUNING = TuneConfig(("router", "experts", "norms", "attention"), learning_rate=3e-4, label_weight=0.5)
TUNE_WINDOW, TUNE_BATCH = 256, 8
STEP_TOKENS = TUNE_WINDOW * TUNE_BATCH


@dataclass(frozen=True)
class Variant:
    """A row of the table.

    Attributes:
        about: what it is, for the notes under the table.
        recipe: the recipe for an active fraction; None where the dense model itself is measured.
        wrap: ``""``, or what is done to the model: ``tuned``, or :mod:`quality_baselines`' ``oracle``, ``teal``, ``wina``;
            ``fitted oracle`` does it to the conversion too, which is then its own.
        deployable: whether the decision can be had without computing what it decides about.
        dial: whether the phase dial is measured too.
    """

    about: str
    recipe: Callable[[float], Recipe] | None
    wrap: str = ""
    deployable: bool = True
    dial: bool = False


def _calibrated(fraction: float) -> Calibrated:
    shared, top_k, experts = OWN[fraction]
    return Calibrated(experts, shared, top_k)


def _unrouted(fraction: float) -> Calibrated:
    shared = round(4 * fraction)
    return Calibrated(4 - shared, shared, 0)


def _counted(fraction: float) -> Calibrated:
    shared, top_k, experts = _COUNTED[fraction]
    return Calibrated(experts, shared, top_k)


def _cmoe(fraction: float) -> CMoE:
    shared, top_k, experts = _EIGHT[fraction]
    return CMoE(experts, shared, top_k)


def _spectral(fraction: float) -> CMoE:
    shared, top_k, experts = _EIGHT[fraction]
    return CMoE(experts, shared, top_k, scores="spectral")


def _cmoe_fine(fraction: float) -> CMoE:
    shared, top_k, experts = _FINE[fraction]
    return CMoE(experts, shared, top_k)


def _expertweaver(fraction: float) -> ExpertWeaver:
    shared, top_k, experts = _FINE[fraction]
    return ExpertWeaver(experts, shared, top_k)


def _moefication(scores: str) -> Callable[[float], Recipe]:
    return lambda fraction: MoEfication(48, 0, round(48 * fraction), scores)


VARIANTS: dict[str, Variant] = {
    "static": Variant("static mask by output energy, no routing", Static),
    "static, refit": Variant(
        "static mask, idle means, least-squares refit of the down projection", lambda f: Static(f, "refit")
    ),
    "calibrated, no routing": Variant(
        "this project's recipe with K 0: static neurons, as many in every layer, idle means, refit, final norm",
        _unrouted,
    ),
    "flap": Variant("FLAP for FFNs, weighted statistics, mean-bias compensation, no routing", Flap),
    "random split": Variant("LLaMA-MoE: 16 random experts, untrained router", lambda f: RandomSplit(16, 0, round(16 * f))),
    "moefication": Variant("MoEfication: 48 experts of like gate rows, trained MLP router", _moefication("mlp")),
    "moefication, similarity": Variant("the same experts, routed by cosine", _moefication("similarity")),
    "expertweaver": Variant("ExpertWeaver: 64 slices, shared ones by layer, mean gate rows as router", _expertweaver),
    "cmoe": Variant("CMoE: 8 slices, markers, representative neurons", _cmoe),
    "cmoe, spectral": Variant("CMoE's experts with a spectral router of rank 16", _spectral),
    "cmoe, 64 slices": Variant("CMoE with 64 slices", _cmoe_fine),
    "cmoe, oracle": Variant("CMoE's experts, chosen by what they would put out", _cmoe, "oracle", deployable=False),
    "cmoe, 64 slices, oracle": Variant(
        "its fine experts, chosen by what they would put out", _cmoe_fine, "oracle", deployable=False
    ),
    "teal": Variant("neurons above a threshold of |h|, calibrated per layer", None, "teal", deployable=False),
    "wina": Variant("neurons above a threshold of |h| |w|, calibrated per layer", None, "wina", deployable=False),
    "calibrated": Variant("this project's recipe", _calibrated, dial=True),
    "calibrated, router counted": Variant(
        "the same with fewer experts on, so that neurons and router together compute no more than the fraction "
        "(of a gated FFN of width 1,536)",
        _counted,
    ),
    "calibrated, oracle": Variant(
        "its experts and budgets; chosen by what they would put out, projections and final norm fitted to that choice",
        _calibrated,
        "fitted oracle",
        deployable=False,
    ),
}


def variant_of(name: str) -> Variant:
    """A variant by its name, also one that is tuned."""
    if not name.endswith(TUNED):
        return VARIANTS[name]
    base = VARIANTS[name.removesuffix(TUNED)]
    about = f"{base.about}; tuned by distillation from the dense model and by the texts' own next words"
    return replace(base, about=about, wrap="tuned", dial=False)
