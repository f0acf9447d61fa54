"""Balance and diagnosis of a converted model: how its experts are used, how steady the choice is, what the error is made of.

For a layer with N experts of which K are chosen, over T tokens:

    usage        share of tokens that choose each expert; entropy: -sum p ln p / ln N of the shares; dead: at most one in 1000
    SRP(E, m)    segment routing best performance: E experts are on for a whole segment of m tokens, the others off; the best
                 F1 of that as a prediction of the choices (the E most used are the best such set)
    SCH(m, r)    segment cache best hit rate: hits of a cache of r K experts that, at a miss, evicts what the next m tokens
                 use least (both: arXiv 2505.16056)
    error        |y - y_dense|^2 / |y_dense|^2, weighted per token as the recipes do, on the inputs of the converted stream,
                 from the dense weights with idle neurons at their means, for three choices of as many neurons: the router's,
                 the oracle's (the K experts of largest amplitude), the best neurons of each token
                 routing = router - oracle;  granularity = oracle - neurons;  the rest is what any such choice loses.
                 Outputs may cancel, so that the largest are not always the best choice, and a difference may be below 0

``error_converted`` is the block as it is, with its compensation and what tuning made of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .apply import moe_blocks
from .block import MoEFFN
from .errors import InputError
from .plans import MoEPlan, SitePlan
from .progress import Progress
from .recipes.neurons import token_weights
from .routing import Choices, watched
from .sites import DenseFFN

DEAD = 0.001
SEGMENT, CACHE = 16, 2.0  # m of both metrics; the cache holds twice the active experts, the paper's recommendation
_HELD = 1 << 30  # bytes of layers' inputs that are held at a time; the model runs once for each such share of its layers


@torch.no_grad()
def balance(
    moe: nn.Module,
    dense: nn.Module | None,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    segment: int = SEGMENT,
    cache: float = CACHE,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure every layer that routes, in the live module.

    Args:
        moe: a converted model.
        dense: the dense model, for the shares of the error; None leaves them out.
        batches: model inputs (keyword arguments) without padding; each row is one sequence.
        segment: m, tokens.
        cache: r, the cache's size over the experts chosen.
        progress: shows how far the work is.

    Returns:
        ``tokens, segment, cache`` and ``layers``: for each ``site, experts`` (that can be chosen), ``top_k, usage, entropy,
        dead, srp, srp_size, sch, sch_experts`` and, with the dense model, ``error_router, error_oracle, error_neurons,
        error_converted, routing_share, granularity_share`` (of ``error_router``).

    Raises:
        InputError: the model was not converted, or there are no batches.
    """
    plan = getattr(moe, "moecompile_plan", None)
    if not isinstance(plan, MoEPlan) or not moe_blocks(moe):
        raise InputError("the model was not converted by moecompile")
    if not batches:
        raise InputError("there are no batches to measure on")
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    blocks, layers = moe_blocks(moe), []
    routed = {
        site.site.placement.block: site
        for site in plan.sites
        if site.site.placement is not None and (block := blocks.get(site.site.placement.block)) and block.chooses
    }
    with (progress or Progress()).bar("diagnosis", len(routed)) as bar:
        for names in _shares_of(routed, tokens if dense is not None else 0):
            kept = watched(moe, batches, inputs=dense is not None, only=names)
            for name in names:
                site, block, own = routed[name], blocks[name], kept.pop(name)
                layers.append({"site": site.site.name, **routing(own.ids, block.spec.choosable, block.top_k, segment, cache)})
                if dense is not None:
                    layers[-1] |= _errors(block, DenseFFN.read(site.site, dense), own)
                bar.show(name)
    return {"tokens": tokens, "segment": segment, "cache": cache, "layers": layers}


def _shares_of(routed: Mapping[str, SitePlan], tokens: int) -> Iterator[list[str]]:
    """Layers in order, as many at a time as may have their inputs of so many tokens held."""
    names: list[str] = []
    held = 0
    for name, site in routed.items():
        size = 4 * tokens * site.site.hidden_size
        if names and held + size > _HELD:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    if names:
        yield names


def routing(ids: Sequence[Tensor], experts: int, top_k: int, segment: int = SEGMENT, cache: float = CACHE) -> dict[str, Any]:
    """Usage and consistency of one layer's choices.

    Args:
        ids: for each sequence the chosen experts (L, K).
        experts: N.
        top_k: K.
        segment: m.
        cache: r.
    """
    chosen = [torch.zeros(len(one), experts, device=one.device).scatter_(1, one, 1.0) for one in ids]
    usage = torch.cat(chosen).mean(0).cpu()
    shares = usage / usage.sum().clamp_min(1e-12)
    entropy = float(-(shares * shares.clamp_min(1e-12).log()).sum()) / math.log(experts) if experts > 1 else 1.0
    size, srp = _srp(chosen, top_k, segment)
    slots = min(experts, max(1, round(cache * top_k)))
    return {
        "experts": experts,
        "top_k": top_k,
        "usage": [round(float(value), 5) for value in usage],
        "entropy": round(entropy, 4),
        "dead": int((usage <= DEAD).sum()),
        "srp": None if srp is None else round(srp, 4),
        "srp_size": size,
        "sch": round(_sch(chosen, slots, segment), 4),
        "sch_experts": slots,
    }


def _srp(chosen: Sequence[Tensor], top_k: int, segment: int) -> tuple[int, float | None]:
    """(best number of experts E, its F1): with counts c_e within a segment, F1 = 2 sum_{e on} c_e / (m E + m K)."""
    counts = [part.sum(0).sort(descending=True).values for one in chosen for part in one.split(segment) if len(part) == segment]
    if not counts:
        return 0, None
    hits = torch.stack(counts).double().mean(0).cumsum(0)  # [N], of E = 1 ... N
    sizes = torch.arange(1, len(hits) + 1, device=hits.device)
    f1 = 2 * hits / (segment * (sizes + top_k))
    best = int(f1.argmax())
    return best + 1, float(f1[best])


def _sch(chosen: Sequence[Tensor], slots: int, segment: int) -> float:
    """Hit rate of a cache of ``slots`` experts over each sequence, empty at its start.

    What stays after a token is the set of experts, among those cached and those just used, that the next ``segment`` tokens use
    most; the rest of a tie is decided for the more recently used.
    """
    hits = total = 0
    for one in chosen:
        needs = one.cpu().bool()
        ahead = torch.cat([needs.double().cumsum(0), needs.new_zeros(1, needs.shape[1]).double()])
        length, experts = needs.shape
        cached = torch.zeros(experts, dtype=torch.bool)
        last = torch.full((experts,), -1.0, dtype=torch.float64)
        for token in range(length):
            need = needs[token]
            hits += int((need & cached).sum())
            total += int(need.sum())
            last[need] = float(token)
            here = need | cached
            if int(here.sum()) > slots:
                stop = min(length - 1, token + segment)
                soon = ahead[stop] - ahead[token]
                worth = torch.where(here, soon + (last + 1) / (length + 1), -1.0)
                here = torch.zeros_like(here).scatter_(0, worth.topk(slots).indices, True)
            cached = here
    return hits / total if total else math.nan


def _errors(block: MoEFFN, ffn: DenseFFN, own: Choices) -> dict[str, float]:
    """The error of three choices of neurons on what the block reads, and the block's own."""
    x, ids = torch.cat(own.inputs), torch.cat(own.ids)
    dtype = ffn.up.dtype
    hidden, down = ffn.hidden(x.to(dtype)), ffn.down.float()  # [T, F], [D, F]
    y, hidden = ffn.output(hidden).float(), hidden.float()
    weights = token_weights(y.norm(dim=1))
    idle = hidden - (weights @ hidden) / weights.sum()
    energy = idle.square() * down.square().sum(0)
    each = torch.arange(block.spec.choosable, device=x.device)[:, None]
    member = block.neurons_on(each) & ~block.neurons_on(each[:1, :0])  # [N, F], without the shared ones
    oracle = (energy @ member.t().float()).topk(ids.shape[1], dim=1).indices
    scale = float(weights @ y.square().sum(1)) or 1.0

    def lost(on: Tensor) -> float:
        return float(weights @ (idle.masked_fill(on, 0.0) @ down.t()).square().sum(1)) / scale

    on = block.neurons_on(ids)
    active = round(float(on.sum(1).double().mean()))
    free = torch.zeros_like(on).scatter_(1, energy.topk(active, dim=1).indices, True)
    router, best, single = lost(on), lost(block.neurons_on(oracle)), lost(free)
    put_out = block.with_choice(x, ids).float()
    return {
        "error_router": _rounded(router),
        "error_oracle": _rounded(best),
        "error_neurons": _rounded(single),
        "error_converted": _rounded(float(weights @ (put_out - y).square().sum(1)) / scale),
        "routing_share": _rounded((router - best) / router if router else 0.0),
        "granularity_share": _rounded((best - single) / router if router else 0.0),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
