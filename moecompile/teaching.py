"""Teaching the router of a model that is converted already: the front's counterpart of a training loop for experts."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .conversion import capture_inputs, find_ffns, matches_of
from .distil import Distillation, distil
from .errors import InputError
from .front import front_of
from .parity import evaluating
from .plans import MoEPlan
from .progress import Progress
from .reading import IDS, embedder
from .targets import Targets, collect_targets, membership


def router_targets(
    moe: nn.Module, dense: nn.Module, batches: Iterable[Any], *, active: float = 0.5, target: str = "overlap",
    progress: Progress | None = None,
) -> Targets:  # fmt: skip
    """What the router at the front of ``moe`` is to learn on batches: which experts the dense model's neurons belong to.

    Args:
        moe: a pre-gated model.
        dense: the dense model it came from.
        batches: inputs with ``input_ids`` (B, S), all of one length, without padding.
        active: share of a layer's neurons that counts as activated.
        target: as of :func:`moecompile.distil.collect_targets`.

    Raises:
        InputError: the model has no router at its front, or batches do not fit.
        PlanError: the two models do not belong together.
    """
    front, plan = front_of(moe), getattr(moe, "moecompile_plan", None)
    if front is None or not isinstance(plan, MoEPlan):
        raise InputError("the model has no pre-gating router to teach")
    batches = list(batches)
    captured, matched = find_ffns(dense, capture_inputs(dense, None, batches))
    matches = matches_of(plan, matched).matches
    members = [membership(s.choosable, s.site.intermediate_size) for s in plan.sites]
    with evaluating(dense):
        return collect_targets(
            captured, matches, batches, members, aligned=front.router.spec.groups == 1, active=active, target=target,
            argument=front.router.spec.argument or IDS, progress=progress,
        )  # fmt: skip


def distil_front(
    moe: nn.Module,
    targets: Targets,
    options: Distillation | None = None,
    *,
    seed: int = 0,
    state: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train the router at a model's front, in place; everything else stays as it is.

    The training is done in float32 on a copy, whatever the model's type.

    Args:
        moe: a pre-gated model.
        targets: from :func:`router_targets`.
        options, seed, state, progress: as of :func:`moecompile.distil.distil`.

    Returns:
        As of :func:`moecompile.distil.distil`.

    Raises:
        InputError: the model has no router at its front, or the settings make no sense.
    """
    front = front_of(moe)
    if front is None:
        raise InputError("the model has no pre-gating router to teach")
    router = copy.deepcopy(front.router).float()
    for parameter in router.parameters():
        parameter.requires_grad_(True)
    with torch.enable_grad():
        learnt = distil(router, embedder(moe, router.spec), targets, options, seed=seed, state=state, progress=progress)
    with torch.no_grad():
        for name, parameter in front.router.named_parameters():
            parameter.copy_(router.get_parameter(name))
    return learnt
