"""The model that is tuned: which of its parameters train, and what it shows of its inside while it computes.

Routing is a choice of the k highest scores, and a chosen expert's weight is 1, so the routers get no gradient by themselves.
Two sources are on offer:

    straight-through   w = 1 + p - stop(p),  p = sigmoid((s - c) / d): the loss's own gradient of the chosen experts' weights
    oracle             a logistic loss of z = (s - c) / d against the experts that matter most in the dense model

s are a token's scores, c the middle between its k-th and (k+1)-th, d their standard deviation; c and d carry no gradient.
Centred like this the slope of p is steepest where the choice is close, and layers whose scores differ in scale get gradients of
the same one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from ..apply import moe_blocks
from ..block import MoEFFN
from ..choice import centred_scores
from ..errors import InputError
from ..front import PreGate, front_of
from ..pregate import RoutingPlan
from ..routers import Router
from .config import TuneConfig
from .experts import chosen_experts
from .norms import closed_form
from .scores import training_scores

FRONT = "pregate"  # the name of the router at the front in a model


def layer_path(block: str) -> str:
    """The module path of the layer that a block belongs to: ``model.layers.3.mlp`` -> ``model.layers.3``."""
    parts = block.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return block


class Inside:
    """What a forward pass of the student leaves behind: the layers' outputs, and the routers' centred scores.

    Attributes:
        layers: module path -> (B, L, D) output of the layer.
        scores: block path -> (T, N) centred scores.
        front: (T, N) or (T, L, N) scores of a router at the front, None where there is none.
    """

    def __init__(self) -> None:
        self.layers: dict[str, Tensor] = {}
        self.scores: dict[str, Tensor] = {}
        self.front: Tensor | None = None
        self.open = False

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Only what runs within is kept: a checkpointed layer runs again in the backward pass."""
        self.clear()
        self.open = True
        try:
            yield
        finally:
            self.open = False

    def clear(self) -> None:
        """Let go of the tensors."""
        self.layers, self.scores, self.front = {}, {}, None

    def keep_layer(self, path: str, output: Any) -> None:
        """A forward hook's work."""
        if self.open:
            self.layers[path] = output[0] if isinstance(output, tuple) else output


def watch_layers(model: nn.Module, paths: list[str], inside: Inside) -> list[Any]:
    """Hooks that keep the layers' outputs; to be removed by their ``remove``."""
    return [
        model.get_submodule(path).register_forward_hook(lambda _m, _i, output, path=path: inside.keep_layer(path, output))
        for path in paths
    ]


def ready_for_training(model: nn.Module, config: TuneConfig, inside: Inside) -> Callable[[], None]:
    """Training versions of routers and experts, layers that are checkpointed; returns what undoes it.

    The modules stay in eval mode, so that no dropout blurs the comparison with the teacher.
    """
    changed: list[tuple[nn.Module, str]] = []

    def replace(module: nn.Module, method: Callable[..., Any], name: str = "forward") -> None:
        module.__dict__[name] = method
        changed.append((module, name))

    blocks = moe_blocks(model)
    for path, block in blocks.items():
        replace(block.experts, functools.partial(chosen_experts, block.experts))
        if block.router is not None:
            replace(block.router, functools.partial(_route, block.router, config.straight_through, inside, path))
    for module in list(model.modules()):
        normalise = closed_form(module) if "rmsnorm" in type(module).__name__.lower() else None
        if normalise is not None:
            replace(module, normalise)
    front = front_of(model)
    if front is not None:
        replace(front, functools.partial(_decide, front, config.front_straight_through, inside), "_plan")
        replace(front, lambda _model: None, "end")  # layers that are computed again in the backward pass read the plan
    hooks = watch_layers(model, list(dict.fromkeys(layer_path(path) for path in blocks)), inside)
    if config.checkpointing:
        for path in dict.fromkeys(layer_path(path) for path in blocks):
            layer = model.get_submodule(path)
            replace(layer, functools.partial(checkpoint, layer.forward, use_reentrant=False))

    def undo() -> None:
        for hook in hooks:
            hook.remove()
        for module, name in reversed(changed):
            module.__dict__.pop(name, None)
        if front is not None:
            front.end(model)

    return undo


def _route(router: Router, straight_through: bool, inside: Inside, path: str, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    ids, centred = centred_scores(training_scores(router, x), k)
    if inside.open:
        inside.scores[path] = centred
    weights = torch.ones_like(ids, dtype=x.dtype)
    if straight_through and torch.is_grad_enabled():
        p = torch.sigmoid(centred.gather(1, ids)).to(x.dtype)
        weights = weights + (p - p.detach())
    return ids, weights


def _decide(front: PreGate, straight_through: bool, inside: Inside, hidden: Tensor, k: int) -> RoutingPlan:
    scores = front.router.scores(hidden)
    ids, centred = centred_scores(scores, k)
    if inside.open:
        inside.front = scores
    learning = straight_through and torch.is_grad_enabled()
    return RoutingPlan(ids, centred.gather(-1, ids) if learning else None)


def choose_parameters(model: nn.Module, config: TuneConfig) -> dict[str, str]:
    """Freeze everything but what the stages name: parameter name -> its stage.

    Low-rank updates are put in place here; :func:`merge_updates` makes plain weights of them.

    Raises:
        InputError: a stage has nothing to train in this model.
    """
    model.requires_grad_(False)
    chosen: dict[str, str] = {}
    for path, block in moe_blocks(model).items():
        if block.exact is not None and config.stages != ("router",):
            raise InputError("what was kept to be exactly the dense model would no longer be; take --stage router")
        if "experts" in config.stages:
            if config.lora_rank:
                if block.spec.overlap:
                    raise InputError("--lora-rank: low-rank updates would part the copies of neurons that experts share")
                _low_rank(block, config)
            for name, parameter in block.named_parameters():
                idle = name == "idle" or (name.startswith("experts.") and block.top_k == 0)
                if not idle and not name.startswith("router.") and not name.endswith(".original"):
                    chosen[f"{path}.{name}"] = "experts"
                    parameter.requires_grad_(True)
        if "router" in config.stages and block.router is not None:
            for name, parameter in block.router.named_parameters():
                chosen[f"{path}.router.{name}"] = "router"
                parameter.requires_grad_(True)
    front = front_of(model)
    if "router" in config.stages and front is not None:
        for name, parameter in front.router.named_parameters():
            chosen[f"{FRONT}.router.{name}"] = "router"
            parameter.requires_grad_(True)
    if "norms" in config.stages:
        for name, parameter in norm_parameters(model):
            chosen[name] = "norms"
            parameter.requires_grad_(True)
    if "attention" in config.stages:
        for name, parameter in attention_parameters(model):
            chosen[name] = "attention"
            parameter.requires_grad_(True)
    for stage in config.stages:
        if stage not in chosen.values():
            raise InputError(f"--stage {stage}: this model has nothing of the kind to train")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # AdamW's steps are too small for bfloat16
    return chosen


def norm_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of all normalisations, by name."""
    return [
        (f"{path}.{name}", parameter)
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and not path.startswith(f"{FRONT}.")
        for name, parameter in module.named_parameters(recurse=False)
    ]


def attention_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What the layers with MoE blocks hold beside the blocks and the normalisations, by name: attention, as a rule."""
    blocks = moe_blocks(model)
    taken = {id(parameter) for block in blocks.values() for parameter in block.parameters()}
    taken |= {id(parameter) for _, parameter in norm_parameters(model)}
    return [
        (f"{path}.{name}", parameter)
        for path in dict.fromkeys(map(layer_path, blocks))
        for name, parameter in model.get_submodule(path).named_parameters()
        if id(parameter) not in taken
    ]


class _LowRank(nn.Module):
    """W + B A over a matrix of (rows, columns); experts' weights (N, rows, columns) are one matrix, as they were in the FFN."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = self._matrix(weight).shape
        rank = min(rank, rows, columns)
        start = torch.randn(rank, columns, generator=generator) / columns**0.5
        self.a = nn.Parameter(start.to(weight.device))
        self.b = nn.Parameter(torch.zeros(rows, rank, device=weight.device))

    @staticmethod
    def _matrix(weight: Tensor) -> Tensor:
        return weight.reshape(-1, weight.shape[-1])

    def forward(self, weight: Tensor) -> Tensor:
        """The updated weight, of the same shape."""
        return weight + (self.b @ self.a).view(weight.shape).to(weight.dtype)


def _low_rank(block: MoEFFN, config: TuneConfig) -> None:
    generator = torch.Generator().manual_seed(config.seed)
    for module in (*block.experts.modules(), *(block.shared.modules() if block.shared is not None else ())):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() >= 2 and name.endswith(("proj", "weight")):
                parametrize.register_parametrization(module, name, _LowRank(parameter, config.lora_rank, generator))


def merge_updates(model: nn.Module) -> None:
    """Low-rank updates become part of the weights."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type, union-attr]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def parameter_groups(model: nn.Module, chosen: dict[str, str], config: TuneConfig) -> list[dict[str, Any]]:
    """AdamW's groups; ``peak`` is each group's learning rate before the schedule, ``stage`` what it belongs to."""
    groups: dict[tuple[str, float, float], list[Tensor]] = {}
    parameters = dict(model.named_parameters())
    for name, stage in chosen.items():
        parameter = parameters[name]
        peak = config.learning_rate
        if name.startswith(f"{FRONT}."):
            peak = config.front_rate
        elif stage == "router":
            weight = parameters[name.rpartition(".")[0] + ".weight"] if name.endswith(".bias") else parameter
            peak = config.router_rate * max(float(_whole(weight).float().square().mean().sqrt()), 1e-8)
        decay = config.weight_decay if parameter.dim() >= 2 else 0.0
        groups.setdefault((stage, peak, decay), []).append(parameter)
    return [
        {"params": params, "stage": stage, "peak": peak, "lr": peak, "weight_decay": decay}
        for (stage, peak, decay), params in groups.items()
    ]


def _whole(tensor: Tensor) -> Tensor:
    full: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor.detach() if full is None else full().detach()
