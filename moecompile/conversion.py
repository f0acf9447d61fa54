"""From a dense model to an MoE: plan, check, convert."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from .apply import build_block, build_blocks, install, moe_blocks, set_final_norm
from .block import MoEFFN
from .capture import Captured, capture, normalise_inputs
from .capture import example_inputs as guess_inputs
from .checkpoint import adopt
from .costs import dense_costs, moe_costs
from .diagnose import layer_rows
from .errors import CaptureError, InputError, MatchError, PlanError
from .front import attach_to_graph, deciding, front_of
from .match import Match, Matched, match
from .parity import check_parity, check_routing, evaluating, outputs_of
from .passes import SplitFFN, run_passes
from .passes.split_ffn import block_path
from .plans import MoEPlan
from .progress import Progress
from .reading import token_input
from .recipes import Recipe, make_plan
from .recipes.base import Context
from .sites import DenseFFN, tensors_by_name

Filter = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class Conversion:
    """A converted model and what was measured on the way.

    Attributes:
        module: the MoE.
        plan: how it was made.
        matched: what was found in the dense model.
        parity_max_abs_error: largest difference of outputs, all experts on, before any compensation.
        parity_tolerance: how large it was allowed to be.
        routing_error: largest relative difference, over the layers, of the chosen experts' output from that of the same
            neurons in the dense FFN.
        layers: per FFN, on tokens that the recipe did not see (where some were held out): ``site``, relative errors ``all``,
            ``top_k`` and ``uncompensated``, and ``usage`` of the experts.
        costs: parameters, FLOPs and bytes beside the dense model's.
        seconds: per stage.
    """

    module: nn.Module
    plan: MoEPlan
    matched: Matched
    parity_max_abs_error: float
    parity_tolerance: float
    routing_error: float
    layers: list[dict[str, Any]]
    costs: dict[str, Any]
    seconds: dict[str, float]


def find_ffns(model: nn.Module, inputs: Any = None, filter_fn: Filter | None = None) -> tuple[Captured, Matched]:
    """Capture a model (in eval mode) and match its FFNs; ``filter_fn(module, name)`` may leave some alone.

    Raises:
        CaptureError: it cannot be captured.
        MatchError: there is no FFN to split.
    """
    with evaluating(model):
        captured = capture(model, inputs)
    matched = match(captured)
    if blocks := tuple(moe_blocks(model)):  # what is within a block is a part of it
        matched = Matched(tuple(m for m in matched.matches if not _within(m, blocks)), matched.skipped)
        if not matched.matches:
            raise MatchError(f"{type(model).__name__} is converted already, and nothing else in it is a feed-forward network")
    if not matched.matches:
        why = f"; nearest: {matched.skipped[0].name}: {matched.skipped[0].reason}" if matched.skipped else ""
        raise MatchError(f"no feed-forward network was found in {type(model).__name__}{why}")
    if filter_fn is not None:
        chosen = tuple(m for m in matched.matches if filter_fn(_module_at(model, m.site.name), m.site.name))
        if not chosen:
            raise MatchError("filter_fn leaves no feed-forward network to split")
        matched = Matched(chosen, matched.skipped)
    return captured, matched


def _within(found: Match, blocks: tuple[str, ...]) -> bool:
    """Whether an FFN lies in one of these modules."""
    places = [found.site.name] if found.site.placement is None else [found.site.name, found.site.placement.block]
    return any(place == path or place.startswith(f"{path}.") for place in places for path in blocks)


def _module_at(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return model


def plan(
    model: nn.Module,
    recipe: Recipe,
    calibration: Iterable[Any] | None = None,
    *,
    example_inputs: Any = None,
    filter_fn: Filter | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> MoEPlan:
    """How a recipe would split a model; the model is not changed.

    Args:
        model: any module that can be captured.
        recipe: an instance of a class of :mod:`moecompile.recipes`.
        calibration: model inputs (dicts of keyword arguments, tuples, or tensors), for recipes that look at data; as
            ``{domain: inputs}`` for a recipe that tells domains of text apart.
        example_inputs: inputs to capture with; by default the first calibration batch, or a guess for transformers models.
        filter_fn: ``filter_fn(module, name) -> bool``, which FFNs to split.
        seed: for the recipe's random choices.
        progress: shows how far the work is; silent by default.

    Raises:
        CaptureError, MatchError, PlanError, InputError: with the reason.
    """
    data = CalibrationData.of(calibration)
    captured, matched = find_ffns(model, capture_inputs(model, example_inputs, data.batches), filter_fn)
    return _plan(captured, matched.matches, recipe, data, seed, progress or Progress())


@dataclass(frozen=True)
class CalibrationData:
    """Model inputs, and which domain of text each is of where they were given by domain."""

    batches: list[Any]
    domains: tuple[str, ...] = ()
    domain_of: tuple[int, ...] = ()

    @classmethod
    def of(cls, calibration: Iterable[Any] | Mapping[str, Iterable[Any]] | None) -> CalibrationData:
        """From batches, or from ``{domain: batches}``."""
        if not isinstance(calibration, Mapping):
            return cls(list(calibration or ()))
        parts = [list(part) for part in calibration.values()]
        batches = [batch for part in parts for batch in part]
        return cls(batches, tuple(calibration), tuple(number for number, part in enumerate(parts) for _ in part))


def _plan(
    captured: Captured,
    matches: tuple[Match, ...],
    recipe: Recipe,
    data: CalibrationData,
    seed: int,
    progress: Progress,
) -> MoEPlan:
    with evaluating(captured.module), torch.no_grad():
        return make_plan(recipe, Context(captured, matches, data.batches, progress, seed, data.domains, data.domain_of))


def capture_inputs(model: nn.Module, inputs: Any, batches: list[Any]) -> Any:
    """What to capture with. A guess is better than a batch (its sizes are not 1, so they stay symbolic) if its names agree."""
    if inputs is not None or not batches:
        return inputs
    try:
        guess = guess_inputs(model)
    except CaptureError:
        return batches[0]
    _, kwargs = normalise_inputs(model, batches[0])
    return guess if set(kwargs) == set(guess) else batches[0]


def convert(
    model: nn.Module,
    plan_or_recipe: MoEPlan | Recipe,
    calibration: Iterable[Any] | None = None,
    *,
    form: str = "module",
    inplace: bool = False,
    keep_exact: bool = False,
    example_inputs: Any = None,
    filter_fn: Filter | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> nn.Module:
    """Turn a dense model into an MoE that trains, saves and generates.

    The split is checked before anything is fitted: with all experts on it must be the dense model.

    Args:
        model: the dense model; left alone unless ``inplace``.
        plan_or_recipe: a plan made earlier, or a recipe to make one by.
        calibration: model inputs for the recipe.
        form: ``module``, the live module with its FFNs replaced, or ``graph``, the captured graph rewritten.
        inplace: replace the FFNs in ``model`` itself.
        keep_exact: keep the dense down projection beside a refitted one, and the dense final norm in place of a refitted one,
            so that all experts on stays the dense model.
        example_inputs, filter_fn, seed, progress: as for :func:`plan`.

    Raises:
        CaptureError, MatchError, PlanError, InputError: with the reason.
        ParityError: the split model is not the dense one.
    """
    return convert_with_record(
        model,
        plan_or_recipe,
        calibration,
        form=form,
        inplace=inplace,
        keep_exact=keep_exact,
        example_inputs=example_inputs,
        filter_fn=filter_fn,
        seed=seed,
        progress=progress,
    ).module


def convert_with_record(
    model: nn.Module,
    plan_or_recipe: MoEPlan | Recipe,
    calibration: Iterable[Any] | None = None,
    *,
    form: str = "module",
    inplace: bool = False,
    keep_exact: bool = False,
    example_inputs: Any = None,
    filter_fn: Filter | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    held_out: Iterable[Any] | None = None,
) -> Conversion:
    """As :func:`convert`, with everything that was measured; ``held_out`` batches are measured on and not calibrated on."""
    if form not in ("module", "graph"):
        raise InputError(f"form is '{form}'; it can be 'module' or 'graph'")
    progress = progress or Progress()
    clock = _Clock()
    data = CalibrationData.of(calibration)
    captured, matched = find_ffns(model, capture_inputs(model, example_inputs, data.batches), filter_fn)
    _refuse_graph_only(matched, form)
    if form == "module":
        _refuse_other_outputs(model, matched, captured.kwargs or captured.args)
    earlier = _earlier_plan(model, form)
    clock.mark("capture")
    if isinstance(plan_or_recipe, MoEPlan):
        the_plan = plan_or_recipe
        the_plan.validate()
        matched = matches_of(the_plan, matched)
    else:
        the_plan = _plan(captured, matched.matches, plan_or_recipe, data, seed, progress)
    if keep_exact and the_plan.final_norm:
        progress.say(f"{the_plan.final_norm} stays the dense model's, so that all experts on is the dense model")
    the_plan = the_plan.with_exact(keep_exact)
    clock.mark("plan")
    samples = list(held_out or data.batches[:1]) or [captured.kwargs or captured.args]
    converted = () if earlier is None else tuple(planned.site for planned in earlier.sites)
    costs = dense_costs(model, matched.sites, converted)
    trial = _assemble(model, captured, matched, the_plan.split_only(), form, inplace=False)
    error, allowed = check_parity(trial, model, samples)
    progress.say(f"parity: all experts on, max abs error {error:.2e} (allowed {allowed:.0e})")
    del trial
    clock.mark("parity")
    module = _assemble(model, captured, matched, the_plan, form, inplace)
    module = adopt(module, the_plan if earlier is None else _joined(earlier, the_plan, module))
    clock.mark("apply")
    layers = _measure(captured, matched, module, the_plan, model if not inplace else None, samples)
    routing_error = check_routing(layers, next(p.dtype for p in module.parameters() if p.is_floating_point()))
    clock.mark("measure")
    blocks = list(moe_blocks(module).values())
    return Conversion(
        module, the_plan, matched, error, allowed, routing_error, layers, moe_costs(module, blocks, costs), clock.seconds
    )


def _earlier_plan(model: nn.Module, form: str) -> MoEPlan | None:
    """The plan by which some of a model's FFNs were converted before.

    Raises:
        InputError: no more can be.
    """
    earlier = getattr(model, "moecompile_plan", None) if moe_blocks(model) else None
    if earlier is not None and earlier.pregate is not None:
        raise InputError("the model has a router at its front, which decides for the layers that it was made for")
    if earlier is not None and form == "graph":
        raise InputError("some of the model's layers are converted already; what is left can be with form='module'")
    return earlier


def _joined(earlier: MoEPlan, later: MoEPlan, module: nn.Module) -> MoEPlan:
    """One plan of all that is converted, in the order of the module's blocks."""
    if later.pregate is not None:
        raise InputError("a router at the front decides for all layers, but some are converted already")
    order = {path: number for number, path in enumerate(moe_blocks(module))}
    sites = [site for plan in (earlier, later) for site in plan.sites]
    sites.sort(key=lambda site: order[site.site.placement.block] if site.site.placement else len(order))
    return replace(later, sites=tuple(sites), final_norm=later.final_norm or earlier.final_norm)


def _measure(
    captured: Captured, matched: Matched, module: nn.Module, the_plan: MoEPlan, dense: nn.Module | None, samples: list[Any]
) -> list[dict[str, Any]]:
    """The layers' errors; none once the dense weights are gone (``inplace``)."""
    if dense is None:
        return []
    blocks = moe_blocks(module)
    bare = the_plan.router_only()

    def bare_block(number: int, found: Match) -> MoEFFN:
        planned = bare.sites[number]
        block = build_block(planned, bare.site_tensors(planned.site.name), DenseFFN.read(planned.site, dense))
        front = front_of(module)
        if front is not None:
            block.connect(front.routing, number)
        return block

    with evaluating(dense), deciding(module, samples):
        return layer_rows(
            captured, matched.matches, lambda number, found: blocks.get(block_path(found, number)), samples, bare_block
        )


def _refuse_graph_only(matched: Matched, form: str) -> None:
    for site in matched.sites if form == "module" else ():
        if site.placement is None:
            raise MatchError(
                f"{site.name} cannot be replaced in the live module: {site.refusal}; form='graph' can, "
                "or filter_fn can leave it dense"
            )


def _refuse_other_outputs(model: nn.Module, matched: Matched, inputs: Any) -> None:
    """Refuse modules to be replaced that give something around their FFN's output: a block gives a tensor."""
    places = {site.placement.block: site.name for site in matched.sites if site.placement and not site.placement.bypass}
    given: dict[str, str] = {}

    def look(path: str) -> Callable[..., None]:
        return lambda _m, _inputs, output: None if isinstance(output, Tensor) else given.update({path: type(output).__name__})

    hooks = [model.get_submodule(path).register_forward_hook(look(path)) for path in places]
    try:
        with evaluating(model):
            outputs_of(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for path, kind in given.items():
        raise MatchError(
            f"{places[path]} cannot be replaced in the live module: '{path}' gives a {kind}, not its FFN's output alone; "
            "form='graph' can, or filter_fn can leave it dense"
        )


def matches_of(the_plan: MoEPlan, matched: Matched) -> Matched:
    """The matches that a plan speaks of, in the plan's order.

    Raises:
        PlanError: the plan names an FFN that the model does not have.
    """
    found = {m.site.name: m for m in matched.matches}
    chosen = []
    for planned in the_plan.sites:
        m = found.get(planned.site.name)
        if m is None or m.site != planned.site:
            raise PlanError(
                f"the plan's site {planned.site.name} is not in this model, or differs: plan and model do not belong together"
            )
        chosen.append(m)
    return Matched(tuple(chosen), matched.skipped)


def _assemble(model: nn.Module, captured: Captured, matched: Matched, the_plan: MoEPlan, form: str, inplace: bool) -> nn.Module:
    blocks = build_blocks(model, the_plan)
    if form == "graph":
        for block in blocks:
            block.train(model.training)
        rewritten = run_passes(captured.graph_module, [SplitFFN(matched.matches, blocks)]).graph_module
        if the_plan.pregate is not None:
            attach_to_graph(rewritten, _reading(the_plan, captured), blocks)
        module = GraphModule(rewritten, rewritten.graph)  # its Python code is written now, so that TorchDynamo can trace it
        set_final_norm(module, the_plan)
        return module
    target = model if inplace else copy_but_ffns(model, the_plan)
    return install(target, the_plan, blocks)


def _reading(the_plan: MoEPlan, captured: Captured) -> MoEPlan:
    """The plan of a router at the front, with the place where it finds token ids in a graph."""
    found = token_input(captured)
    if isinstance(found, str):
        raise MatchError(f"a pre-gating router reads token ids before the first layer: {found}")
    assert the_plan.pregate is not None
    return replace(the_plan, pregate=replace(the_plan.pregate, argument=found.argument, embedding=found.embedding))


def copy_but_ffns(model: nn.Module, the_plan: MoEPlan) -> nn.Module:
    """A deep copy that shares the FFNs' dense weights, since they are about to be replaced."""
    named = tensors_by_name(model)
    memo: dict[int, Any] = {}
    for planned in the_plan.sites:
        for projection in planned.site.projections:
            for name in (projection.weight, projection.bias):
                if name is not None:
                    memo[id(named[name])] = named[name]
    return copy.deepcopy(model, memo)


class _Clock:
    """Seconds per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = self._last = time.perf_counter()

    def mark(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._last, 3)
        self.seconds["total"] = round(now - self._start, 3)
        self._last = now
