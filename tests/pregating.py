"""What the tests of pre-gating share: small pre-gated models with a random router."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from compiling import dense_model
from families import BY_NAME

import moecompile
from moecompile.plans import MoEPlan
from moecompile.pregate import PreGateSpec, PreGatingRouter
from moecompile.recipes import Contiguous

SMALL: dict[str, Any] = {"width": 16, "heads": 2, "mlp_width": 16}


def random_router(spec: PreGateSpec, seed: int = 7) -> PreGatingRouter:
    """A router whose scores differ well between tokens."""
    torch.manual_seed(seed)
    router = PreGatingRouter(spec)
    for parameter in router.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=1.0 / parameter.shape[1] ** 0.5 * 2)
    return router.eval()


def pregated_plan(dense: Any, aligned: bool = True, experts: int = 6, top_k: int = 2, **changes: Any) -> MoEPlan:
    """Contiguous experts behind a random router."""
    plan = moecompile.plan(dense, Contiguous(experts=experts, shared=2, top_k=top_k))
    width = dense.get_input_embeddings().weight.shape[1]
    spec = PreGateSpec(experts, width, groups=1 if aligned else len(plan.sites), **{**SMALL, **changes})
    return plan.with_front(spec, dict(random_router(spec).state_dict()))


@cache
def _converted(name: str, aligned: bool) -> Any:
    return _convert(BY_NAME[name].build() if name else dense_model(), aligned)


def pregated_model(name: str = "", aligned: bool = True) -> Any:
    """A pre-gated model in eval mode: of a family, or of the Llama that the tests of compilation use."""
    return copy.deepcopy(_converted(name, aligned))


def _convert(dense: Any, aligned: bool, **changes: Any) -> Any:
    return moecompile.convert(dense, pregated_plan(dense, aligned, **changes)).eval()
