"""What routers do on a text: how alike adjacent layers choose, how long a choice lasts, and which token goes where.

Letters: W windows, S positions, L layers, N experts, K chosen. Read-ME's argument for one router (arXiv 2410.19123, section 2)
is that adjacent layers' choices tell each other; the mutual information between them measures that. The share of consecutive
tokens that keep an expert is what a cache of experts lives on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .apply import moe_blocks
from .block import MoEFFN
from .errors import InputError
from .parity import evaluating, outputs_of

_DISTANCES = (1, 2, 4, 8, 16, 32)  # a choice made again within so many tokens


@torch.no_grad()
def choices(model: nn.Module, windows: Tensor) -> dict[str, Tensor]:
    """Which experts each layer chooses: module path -> (W, S, K) int64; layers that choose nothing are left out.

    Args:
        model: a converted model that reads token ids.
        windows: (W, S) ids.

    Raises:
        InputError: no layer of the model chooses experts.
    """
    device = next(model.parameters()).device
    found = watched(model, ({"input_ids": rows.to(device)} for rows in windows.split(4)))
    if not found:
        raise InputError("no layer of this model chooses experts")
    return {name: torch.cat(own.ids).view(*windows.shape, -1).cpu() for name, own in found.items()}


@dataclass
class Choices:
    """What one layer chooses, sequence by sequence; where it reads a batch as one row of tokens, that is one sequence.

    Attributes:
        ids: (S, K) int64 each.
        inputs: (S, D) each; empty unless they were asked for.
    """

    ids: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def watched(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, inputs: bool = False, only: Collection[str] | None = None
) -> dict[str, Choices]:
    """What each layer that chooses experts chooses, by module path.

    Args:
        model: a converted model.
        batches: model inputs.
        inputs: keep what the layers read, too.
        only: paths of the layers to watch; None for all.
    """
    found: dict[str, Choices] = {}
    hooks = []
    for name, block in moe_blocks(model).items():
        if not block.chooses or (only is not None and name not in only):
            continue
        found[name] = Choices()

        def look(module: nn.Module, args: Any, own: Choices = found[name]) -> None:
            assert isinstance(module, MoEFFN)
            x = args[0].detach()
            ids, _ = module.choose(x.reshape(-1, x.shape[-1]))  # one at the front has decided for this step alone
            own.ids.extend(ids.reshape(-1, x.shape[-2], ids.shape[-1]))
            if inputs:
                own.inputs.extend(x.reshape(-1, x.shape[-2], x.shape[-1]))

        hooks.append(block.register_forward_pre_hook(look))
    try:
        with evaluating(model):
            for batch in batches if found else ():
                outputs_of(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def transitions(before: Tensor, after: Tensor, experts: int) -> Tensor:
    """(N, N) share of (expert here, expert there) among all pairs of chosen experts, from (W, S, K) choices of two layers."""
    a, b = before.flatten(0, 1), after.flatten(0, 1)
    pair = (a[:, :, None] * experts + b[:, None, :]).flatten()
    joint = torch.bincount(pair, minlength=experts * experts).double().view(experts, experts)
    return joint / joint.sum()


def mutual_information(joint: Tensor) -> float:
    """Bits that the expert of one layer tells about that of the other, from their joint distribution (N, N)."""
    rows, columns = joint.sum(1, keepdim=True), joint.sum(0, keepdim=True)
    known = joint > 0
    return float((joint[known] * (joint / (rows * columns).clamp_min(1e-300))[known].log2()).sum())


def entropy(shares: Tensor) -> float:
    """Bits, of a distribution (N,)."""
    known = shares[shares > 0]
    return float(-(known * known.log2()).sum())


def kept(chosen: Tensor) -> float:
    """Share of a token's experts that the token before it used, from (W, S, K)."""
    same = (chosen[:, 1:, :, None] == chosen[:, :-1, None, :]).any(-1)
    return float(same.double().mean())


def expected_kept(chosen: Tensor, experts: int) -> float:
    """What :func:`kept` would be if tokens were in random order."""
    rate = torch.bincount(chosen.flatten(), minlength=experts).double() / (chosen.shape[0] * chosen.shape[1])
    return float((rate * rate).sum() / chosen.shape[-1])


def reuse(chosen: Tensor, experts: int) -> list[float]:
    """Share of choices that are made again within 1, 2, 4, 8, 16 and 32 tokens; the last 32 of each window are not counted."""
    windows, length, _ = chosen.shape
    on = torch.zeros(windows, length, experts, dtype=torch.bool).scatter_(2, chosen, True)
    horizon = min(_DISTANCES[-1], length - 1)
    counted = on[:, : length - horizon]
    again = torch.zeros_like(counted)
    shares = []
    for distance in range(1, horizon + 1):
        again |= on[:, distance : distance + counted.shape[1]]
        if distance in _DISTANCES:
            shares.append(float((again & counted).sum() / counted.sum().clamp_min(1)))
    return shares


def routing_record(model: nn.Module, windows: Tensor, pieces: Sequence[str], text: str) -> dict[str, Any]:
    """Everything of this module about a model on a text, JSON-ready.

    Args:
        model: a converted model.
        windows: (W, S) ids; the first window is shown token by token.
        pieces: the first window's tokens as text.
        text: the text's name.
    """
    found = choices(model, windows)
    blocks = moe_blocks(model)
    names = list(found)
    layers, pairs = [], []
    for name, chosen in found.items():
        count = blocks[name].spec.choosable
        layers.append(
            {
                "site": name,
                "kept": round(kept(chosen), 5),
                "kept_by_chance": round(expected_kept(chosen, count), 5),
                "reuse": [round(share, 5) for share in reuse(chosen, count)],
            }
        )
    for here, there in pairwise(names):
        count = blocks[here].spec.choosable
        if blocks[there].spec.choosable != count:
            continue
        joint = transitions(found[here], found[there], count)
        own = entropy(joint.sum(0))
        bits = mutual_information(joint)
        likeliest = joint.max(1).values.sum()
        pairs.append(
            {
                "from": here,
                "to": there,
                "bits": round(bits, 5),
                "share": round(bits / own, 5) if own > 1e-9 else None,
                "likeliest_successor": round(float(likeliest), 5),
            }
        )
    middle = pairs[len(pairs) // 2] if pairs else None
    shown = None
    if middle is not None:
        first, second = str(middle["from"]), str(middle["to"])
        joint = transitions(found[first], found[second], blocks[first].spec.choosable)
        rows = joint / joint.sum(1, keepdim=True).clamp_min(1e-12)
        shown = {"from": first, "to": second, "rows": [[round(float(v), 4) for v in row] for row in rows]}
    aligned = all(torch.equal(found[name], found[names[0]]) for name in names[1:])
    return {
        "text": text,
        "tokens": windows.numel(),
        "aligned": aligned,
        "distances": list(_DISTANCES),
        "layers": layers,
        "adjacent": pairs,
        "transition": shown,
        "sample": {
            "site": names[0],
            "tokens": list(pieces),
            "experts": found[names[0]][0, :, 0].tolist(),
        },
    }
