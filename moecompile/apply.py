"""Applying a plan: dense weights -> MoE blocks, in the live module or in a graph.

The work is in two steps. ``build_block`` with a plan without fitted tensors only rearranges weights; all experts on, that is
the dense FFN. With fitted tensors it adds the compensation and the router.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from .block import MoEFFN
from .errors import InputError, MatchError, PlanError
from .front import attach
from .plans import BIAS, DOWN, GAIN, MEANS, ROUTER, MoEPlan, SitePlan
from .sites import DenseFFN


@torch.no_grad()
def build_block(plan: SitePlan, tensors: dict[str, Tensor], dense: DenseFFN) -> MoEFFN:
    """One MoE block from the dense FFN's weights and the site's fitted tensors.

    Returns:
        A block on the device and in the dtype of the dense weights.

    Raises:
        PlanError: the plan or its tensors do not fit the FFN.
    """
    spec = plan.block_spec()
    block = MoEFFN(spec).to(device=dense.up.device, dtype=dense.up.dtype)
    shared = torch.tensor(plan.shared, dtype=torch.long, device=dense.up.device)
    down = tensors[DOWN].to(dense.down) if DOWN in tensors else dense.down
    if block.shared is not None:
        block.shared.up_proj.weight.copy_(dense.up[shared])
        block.shared.down_proj.weight.copy_(down[:, shared])
        if block.shared.gate_proj is not None and dense.gate is not None:
            block.shared.gate_proj.weight.copy_(dense.gate[shared])
        if spec.input_bias:
            _copy_bias(block.shared.up_proj.bias, dense.up_bias, shared)
            if block.shared.gate_proj is not None:
                _copy_bias(block.shared.gate_proj.bias, dense.gate_bias, shared)
    block.place[shared] = torch.arange(len(plan.shared), device=shared.device)
    rows = block.experts.up  # [N, GI, D]
    biases = block.experts.up_bias_or_none
    width = spec.expert_width
    for number, neurons in enumerate(plan.experts):
        index = counted = torch.tensor(neurons, dtype=torch.long, device=dense.up.device)
        place = len(plan.shared) + number * width + torch.arange(len(neurons), device=index.device)
        if block.neuron is not None:  # the first of a neuron's copies is the one that counts
            first = ~torch.isin(index, block.neuron[:number])
            block.neuron[number, : len(neurons)] = index
            counted, place = index[first], place[first]
        block.place[counted] = place
        halves = [(dense.gate, dense.gate_bias), (dense.up, dense.up_bias)] if spec.gated else [(dense.up, dense.up_bias)]
        for half, (weight, bias) in enumerate(halves):
            window = slice(half * width, half * width + len(neurons))
            assert weight is not None
            rows[number, window] = weight[index]
            if biases is not None and bias is not None:
                biases[number, window] = bias[index]
        block.experts.down_proj[number, :, : len(neurons)] = down[:, index]
    _fill_exact(block, plan, dense, shared)
    _fill_biases(block, plan, tensors, dense, down)
    if block.router is not None:
        own = dict(block.router.named_parameters())
        for name, parameter in own.items():
            if ROUTER + name in tensors:
                if parameter.shape != tensors[ROUTER + name].shape:
                    raise PlanError(f"site {plan.site.name}: the router's '{name}' has the wrong shape")
                parameter.copy_(tensors[ROUTER + name])
    return block


def _copy_bias(target: Tensor, source: Tensor | None, index: Tensor) -> None:
    if source is not None:
        target.copy_(source[index])
    else:
        target.zero_()


def _fill_exact(block: MoEFFN, plan: SitePlan, dense: DenseFFN, shared: Tensor) -> None:
    if block.exact is None:
        return
    for number, neurons in enumerate(plan.experts):
        index = torch.tensor(neurons, dtype=torch.long, device=dense.down.device)
        block.exact.experts[number, :, : len(neurons)] = dense.down[:, index]
    if block.exact.shared is not None:
        block.exact.shared.copy_(dense.down[:, shared])
    if block.exact.bias is not None and dense.down_bias is not None:
        block.exact.bias.copy_(dense.down_bias)


def _fill_biases(block: MoEFFN, plan: SitePlan, tensors: dict[str, Tensor], dense: DenseFFN, down: Tensor) -> None:
    """bias = dense bias + fitted bias + sum_e c_e and each expert's own -c_e, with c_e = sum over its j of mu_j w_j."""
    if block.bias is None:
        return
    total = torch.zeros_like(block.bias, dtype=torch.float64)
    if dense.down_bias is not None:
        total += dense.down_bias
    if BIAS in tensors:
        total += tensors[BIAS].to(total)
    if MEANS in tensors:
        means = tensors[MEANS].to(total)
        if block.idle is not None:  # each neuron once, though several experts may hold it
            held = torch.tensor(sorted({n for expert in plan.experts for n in expert}), device=total.device)
            constant = down[:, held].to(total) @ means[held]
            block.idle.copy_(constant)
            total += constant
        for number, neurons in enumerate(plan.experts):
            index = torch.tensor(neurons, dtype=torch.long, device=total.device)
            constant = down[:, index].to(total) @ means[index]
            if block.idle is None:
                total += constant
            assert block.experts.down_bias is not None
            block.experts.down_bias[number] = -constant.to(block.bias.dtype)
    block.bias.copy_(total)


def install(model: nn.Module, plan: MoEPlan, blocks: Iterable[MoEFFN]) -> nn.Module:
    """Put blocks into a live module, in place.

    Raises:
        MatchError: a site can only be rewritten in the graph, or the model gives a router at the front nothing to read.
    """
    refused = [site.site for site in plan.sites if site.site.placement is None]
    if refused:
        raise MatchError(
            f"{refused[0].name} cannot be replaced in the live module: {refused[0].refusal}; convert(..., form='graph') can"
        )
    blocks = list(blocks)
    for site, block in zip(plan.sites, blocks, strict=True):
        placement = site.site.placement
        assert placement is not None
        _set_module(model, placement.block, block)
        for path in placement.bypass:
            _set_module(model, path, nn.Identity())
    if plan.pregate is not None:
        attach(model, plan, blocks)
    set_final_norm(model, plan)
    return model


def set_final_norm(model: nn.Module, plan: MoEPlan) -> None:
    """Put the plan's values for the norm before the head in the place of the model's, where it has any.

    The parameter is a new one: the dense model may share the old one.

    Raises:
        PlanError: the model has no such parameter.
    """
    value = plan.tensors.get(f"{plan.final_norm}/{GAIN}")
    if not plan.final_norm or value is None:
        return
    parent, _, name = plan.final_norm.rpartition(".")
    try:
        owner = model.get_submodule(parent)
        old = owner.get_parameter(name)
    except AttributeError:
        raise PlanError(f"the model has no parameter '{plan.final_norm}': plan and model differ") from None
    if old.shape != value.shape:
        raise PlanError(f"'{plan.final_norm}' has {len(old)} values in the model and {len(value)} in the plan")
    setattr(owner, name, nn.Parameter(value.to(old), requires_grad=old.requires_grad))


def build_blocks(model: nn.Module, plan: MoEPlan) -> list[MoEFFN]:
    """A block per site, from the dense model's weights."""
    return [build_block(site, plan.site_tensors(site.site.name), DenseFFN.read(site.site, model)) for site in plan.sites]


def _set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    try:
        owner = model.get_submodule(parent)
        module.train(owner.get_submodule(name).training)
    except AttributeError:
        raise PlanError(f"the model has no module '{path}': plan and model differ") from None
    setattr(owner, name, module)


def moe_blocks(model: nn.Module) -> dict[str, MoEFFN]:
    """The MoE blocks of a converted model, by module path, in the order of the model's modules."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoEFFN)}


PHASES = ("prefill", "decode")
Layers = Iterable["int | str"]


def set_top_k(model: nn.Module, k: int | None, *, layers: Layers | None = None, phase: str | None = None) -> None:
    """Set how many experts blocks choose.

    Args:
        model: a converted model, compiled or not.
        k: experts per token; None means all of them.
        layers: only these blocks, by number (in the model's order, negative ones from the end) or by module path.
        phase: ``prefill`` (whole sequences) or ``decode`` (one token each); None sets both. With
            ``set_top_k(model, None, phase="prefill")`` the prompt is read by the dense model, where the plan kept exactness.

    Raises:
        PlanError: the model has no MoE block, or a block has no such k.
        InputError: there is no such layer or phase.
    """
    if phase is not None and phase not in PHASES:
        raise InputError(f"there is no phase '{phase}'; there are: {', '.join(PHASES)}")
    chosen = _blocks_at(model, layers)
    before = dial_state(model)
    try:
        for block in chosen:
            value = block.spec.experts if k is None else k
            if phase == "prefill":
                block.prefill_top_k = value
            elif phase == "decode":
                prefill = block.top_k if block.prefill_top_k is None else block.prefill_top_k
                block.top_k = value
                block.prefill_top_k = prefill
            else:
                block.top_k = value
    except PlanError:
        restore_dial(model, before)
        raise


@contextlib.contextmanager
def using_top_k(
    model: nn.Module, k: int | None, *, layers: Layers | None = None, phase: str | None = None
) -> Iterator[nn.Module]:
    """:func:`set_top_k` within a ``with`` block; each block's own dial comes back afterwards.

    Raises:
        PlanError, InputError: as :func:`set_top_k`.
    """
    before = dial_state(model)
    try:
        set_top_k(model, k, layers=layers, phase=phase)
        yield model
    finally:
        restore_dial(model, before)


def dial_state(model: nn.Module) -> tuple[tuple[int, int | None], ...]:
    """(top_k, prefill_top_k) of every block."""
    return tuple(block.dial for block in moe_blocks(model).values())


def restore_dial(model: nn.Module, state: Iterable[tuple[int, int | None]]) -> None:
    """Set every block's dial to what :func:`dial_state` returned."""
    for block, (k, prefill) in zip(moe_blocks(model).values(), state, strict=True):
        block.top_k = k
        block.prefill_top_k = prefill


def _blocks_at(model: nn.Module, layers: Layers | None) -> list[MoEFFN]:
    blocks = moe_blocks(model)
    if not blocks:
        raise PlanError("the model has no MoE block; convert it first")
    if layers is None:
        return list(blocks.values())
    ordered, chosen = list(blocks.values()), []
    for layer in layers:
        if isinstance(layer, str):
            if layer not in blocks:
                raise InputError(f"there is no MoE block '{layer}'; the first is '{next(iter(blocks))}'")
            chosen.append(blocks[layer])
        elif -len(ordered) <= layer < len(ordered):
            chosen.append(ordered[layer])
        else:
            raise InputError(f"there is no MoE layer {layer}; the model has {len(ordered)}")
    return chosen
