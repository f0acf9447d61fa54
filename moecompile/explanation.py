"""Explain: what moecompile would split in a model or has split and compiled, and what stood in the way elsewhere. Nothing is
changed or written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .apply import moe_blocks
from .capture import capture
from .compiled import Compilation
from .costs import dense_costs, floor_seconds, moe_costs, stock_costs
from .errors import CaptureError, InputError
from .inspection import lowering
from .match import match
from .records import GraphRecord
from .sites import FFNSite, Skipped
from .stock import all_experts, chosen, using_moecompile_experts, width_of


@dataclass(frozen=True)
class Explanation:
    """What a model holds.

    Attributes:
        model: the model's class.
        sites: its FFNs in the order of execution.
        skipped: candidates that cannot be split, with node and reason.
        costs: ``parameters``, ``ffn_parameters``, ``flops_per_token`` (of the FFNs), ``bytes``; of a converted model those of
            :func:`moecompile.costs.moe_costs`; ``floor``, the device's (:func:`moecompile.costs.floor_seconds`).
        dynamic: the dimensions of each input that stayed symbolic.
        blocks: the MoE blocks of a converted model, and the experts of one of transformers: ``name``, and their shape in words.
        layers: of a compiled model, what became of each MoE layer in each graph compiled so far.
        notes: of a compiled model, what was left alone or fell back, and why.
    """

    model: str
    sites: tuple[FFNSite, ...]
    skipped: tuple[Skipped, ...]
    costs: dict[str, Any]
    dynamic: dict[str, tuple[int, ...]]
    blocks: tuple[dict[str, str], ...] = ()
    layers: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {
            "model": self.model,
            "sites": [site.to_dict() for site in self.sites],
            "skipped": [skipped.to_dict() for skipped in self.skipped],
            "costs": self.costs,
            "dynamic": {name: list(axes) for name, axes in self.dynamic.items()},
            "blocks": list(self.blocks),
            "layers": list(self.layers),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        rows = [("site", "kind", "activation", "D", "F", "bias", "layout", "live module")]
        for s in self.sites:
            live = "yes" if s.placement else "graph only"
            rows.append(
                (
                    s.name,
                    s.kind,
                    s.activation,
                    str(s.hidden_size),
                    str(s.intermediate_size),
                    "yes" if s.bias else "no",
                    s.layout,
                    live,
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        share = self.costs["ffn_parameters"] / max(1, self.costs["parameters"])
        head = f"{self.model}: {len(self.sites)} feed-forward networks, {self.costs['parameters'] / 1e6:.1f} M parameters"
        if self.blocks:
            count = f"{len(self.blocks)} MoE block{'' if len(self.blocks) == 1 else 's'}"
            text = [f"{self.model}: {count}, {self.costs['parameters'] / 1e6:.1f} M parameters"]
            text += [f"  {block['name']}: {block['shape']}" for block in self.blocks]
            text += lines if self.sites else []
        else:
            text = (
                [f"{head}, {share:.0%} of them in the FFNs", *lines]
                if self.sites
                else [f"{self.model}: no feed-forward network {'of its own ' if self.layers else ''}found"]
            )
        text += [f"graph only: {s.name}: {s.refusal}" for s in self.sites if not s.placement]
        text += [f"skipped: {k.name}, node {k.node}: {k.reason}" for k in self.skipped]
        for graph in dict.fromkeys(layer["graph"] for layer in self.layers):
            here = [layer for layer in self.layers if layer["graph"] == graph]
            kinds = Counter(
                "{backend} kernel, top_k {top_k}, {weight_format} weights, router {router}".format(**x) for x in here
            )
            text += [f"compiled graph {graph}: {count} layers: {kind}" for kind, count in kinds.items()]
        text += [f"note: {note}" for note in self.notes]
        return "\n".join([*text, *self._cost_lines()])

    def _cost_lines(self) -> list[str]:
        costs, floor = self.costs, self.costs["floor"]
        if not costs["flops_per_token"]:  # nothing that is counted: no FFN, no experts
            return [f"costs: {costs['bytes'] / 2**20:.1f} MiB of weights"]
        dense = f" (dense {costs['flops_per_token_dense'] / 1e6:.1f})" if "flops_per_token_dense" in costs else ""
        flops, speed = f"{costs['flops_per_token'] / 1e6:.1f} MFLOP per token in the FFNs", floor["bytes_per_second"] / 1e9
        device = f"floor of this device ({speed:.1f} GB/s, {floor['flops_per_second'] / 1e9:.0f} GFLOP/s)"
        read = f"decoding reads {floor['decode_bytes'] / 2**20:.1f} MiB per token"
        return [
            f"costs: {costs['bytes'] / 2**20:.1f} MiB of weights, {flops}{dense}",
            f"{device}: {read}: {floor['decode_seconds'] * 1e3:.2f} ms at least",
        ]


def _stock_shape(model: nn.Module, experts: nn.Module) -> str:
    count, hidden, width = width_of(experts)
    top_k = chosen(model, experts)
    return f"D={hidden}, experts={count}x{width}, top_k={'unknown' if top_k is None else top_k}, {type(experts).__name__}"


def _notes(records: Iterable[GraphRecord]) -> Iterator[str]:
    for record in records:
        yield from record.notes
        if record.fallback:
            yield f"graph {record.number} runs in eager mode: {record.fallback}"


def explain(model: nn.Module, example_inputs: Any = None) -> Explanation:
    """Say which FFNs a model has, which MoE blocks, and what became of them where it is compiled.

    Args:
        model: any module, looked at in its present mode (an active dropout is a reason to skip).
        example_inputs: as for :func:`moecompile.capture.capture`; guessed for transformers models.

    Raises:
        CaptureError: the model cannot be captured, and is not converted.
        InputError: a function has no modules to look at.
    """
    found = getattr(model, "_moecompile", None)
    compilation = found if isinstance(found, Compilation) else None
    module = compilation.target if compilation is not None else model
    if not isinstance(module, nn.Module):
        raise InputError(f"explain takes a module, not {type(model).__name__}; last_graphs says what became of a function")
    blocks, experts = moe_blocks(module), all_experts(module)
    sites: tuple[FFNSite, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    dynamic: dict[str, tuple[int, ...]] = {}
    try:
        with using_moecompile_experts(module):  # transformers' eager ones cannot be captured
            captured = capture(module, example_inputs)
        matched = match(captured)
        sites, dynamic = matched.sites, dict(captured.dynamic)
        # A block's router and shared expert are linear layers too, and no news.
        skipped = tuple(k for k in matched.skipped if not any(k.name.startswith(name) for name in (*blocks, *experts)))
    except CaptureError:
        if not blocks and not experts and compilation is None:
            raise
    costs: dict[str, Any] = dict(dense_costs(module, sites))
    plan = getattr(module, "moecompile_plan", None)
    if blocks and plan is not None:
        dense = dense_costs(module, [planned.site for planned in plan.sites])
        costs = moe_costs(module, list(blocks.values()), dense)
        del costs["parameters_dense"], costs["bytes_dense"]
    for name, value in stock_costs(module).items():
        costs[name] += value
    costs["floor"] = floor_seconds(module, "same" if compilation is None else compilation.options.weights)
    return Explanation(
        type(module).__name__,
        tuple(site for site in sites if not any(site.name.startswith(name) for name in blocks)),
        skipped,
        costs,
        dynamic,
        (
            *({"name": name, "shape": block.extra_repr()} for name, block in blocks.items()),
            *({"name": name, "shape": _stock_shape(module, each)} for name, each in experts.items()),
        ),
        tuple(lowering(compilation)) if compilation is not None else (),
        tuple(_notes(compilation.records)) if compilation is not None else (),
    )
