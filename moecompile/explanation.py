"""Explain: what moecompile would split in a model, and what stood in the way elsewhere. Nothing is changed or written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .capture import capture
from .costs import dense_costs
from .match import match
from .sites import FFNSite, Skipped


@dataclass(frozen=True)
class Explanation:
    """What a model holds.

    Attributes:
        model: the model's class.
        sites: its FFNs in the order of execution.
        skipped: candidates that cannot be split, with node and reason.
        costs: ``parameters``, ``ffn_parameters``, ``flops_per_token`` (of the FFNs), ``bytes``.
        dynamic: the dimensions of each input that stayed symbolic.
    """

    model: str
    sites: tuple[FFNSite, ...]
    skipped: tuple[Skipped, ...]
    costs: dict[str, int]
    dynamic: dict[str, tuple[int, ...]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {
            "model": self.model,
            "sites": [site.to_dict() for site in self.sites],
            "skipped": [skipped.to_dict() for skipped in self.skipped],
            "costs": self.costs,
            "dynamic": {name: list(axes) for name, axes in self.dynamic.items()},
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
        head = (
            f"{self.model}: {len(self.sites)} feed-forward networks, {self.costs['parameters'] / 1e6:.1f} M parameters, "
            f"{share:.0%} of them in the FFNs"
        )
        lines = [head, *lines] if self.sites else [f"{self.model}: no feed-forward network found"]
        lines += [f"graph only: {s.name}: {s.refusal}" for s in self.sites if not s.placement]
        lines += [f"skipped: {k.name}, node {k.node}: {k.reason}" for k in self.skipped]
        return "\n".join(lines)


def explain(model: nn.Module, example_inputs: Any = None) -> Explanation:
    """Capture a model and say which FFNs it has.

    Args:
        model: any module, looked at in its present mode (an active dropout is a reason to skip).
        example_inputs: as for :func:`moecompile.capture.capture`; guessed for transformers models.

    Raises:
        CaptureError: the model cannot be captured.
    """
    captured = capture(model, example_inputs)
    matched = match(captured)
    return Explanation(
        type(model).__name__, matched.sites, matched.skipped, dense_costs(model, matched.sites), dict(captured.dynamic)
    )
