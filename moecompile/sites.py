"""What a feed-forward network is, as data: the record that the matcher makes and everything after it reads.

Letters: D hidden size, F dense (intermediate) width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .activations import Activation
from .errors import PlanError


@dataclass(frozen=True)
class Projection:
    """One linear map inside an FFN, as a slice of a parameter.

    Attributes:
        weight: the parameter's name, as in ``named_parameters()``.
        bias: the bias parameter's name, or None.
        transposed: True where the parameter is stored (in, out), as in GPT-2's Conv1D; False for (out, in).
        rows: (start, stop, step) of the outputs that belong to this projection where several share one parameter
            (Phi-3's fused gate_up), or None for all.
    """

    weight: str
    bias: str | None = None
    transposed: bool = False
    rows: tuple[int, int, int] | None = None

    def read(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The (out, in) weight and the (out,) bias, as views of the tensors given by name."""
        weight = tensors[self.weight]
        weight = weight.t() if self.transposed else weight
        bias = tensors[self.bias] if self.bias else None
        if self.rows is not None:
            window = slice(*self.rows)
            weight, bias = weight[window], None if bias is None else bias[window]
        return weight, bias


@dataclass(frozen=True)
class Placement:
    """Where the MoE block goes in the live module.

    Attributes:
        block: the module that the MoE block replaces: the whole FFN, or its down projection.
        bypass: modules that become identities, so that the block reads the FFN's own input; empty when the whole FFN is
            one module.
    """

    block: str
    bypass: tuple[str, ...] = ()


@dataclass(frozen=True)
class FFNSite:
    """One feed-forward network: down(act(gate(x)) * up(x)) or down(act(up(x))).

    Attributes:
        name: the innermost module that holds all its projections.
        kind: ``gated`` or ``plain``.
        activation: a name or expression of :mod:`moecompile.activations`.
        hidden_size: D, the width of its input and output.
        intermediate_size: F, its number of neurons.
        gate: the projection under the activation of a gated FFN, None for a plain one.
        up: the other projection of a gated FFN; the only one of a plain one.
        down: the projection back to D.
        placement: where the block goes in the live module, or None when only the graph can be rewritten.
        refusal: why there is no placement.
        output_dropout: probability of the dropout that sits inside the replaced module behind the down projection.
    """

    name: str
    kind: str
    activation: str
    hidden_size: int
    intermediate_size: int
    gate: Projection | None
    up: Projection
    down: Projection
    placement: Placement | None = None
    refusal: str = ""
    output_dropout: float = 0.0

    @property
    def act(self) -> Activation:
        """The activation function."""
        return Activation(self.activation)

    @property
    def gated(self) -> bool:
        """Whether a second projection multiplies the activation."""
        return self.gate is not None

    @property
    def bias(self) -> bool:
        """Whether any of the projections has a bias."""
        return any(p is not None and p.bias is not None for p in (self.gate, self.up, self.down))

    @property
    def layout(self) -> str:
        """``fused`` (gate and up in one parameter), ``conv1d`` ((in, out) storage) or ``linear``."""
        if self.up.rows is not None:
            return "fused"
        return "conv1d" if self.up.transposed else "linear"

    @property
    def projections(self) -> tuple[Projection, ...]:
        """The projections that exist, in the order gate, up, down."""
        return tuple(p for p in (self.gate, self.up, self.down) if p is not None)

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-ready data, with the derived ``bias`` and ``layout``."""
        return {**asdict(self), "bias": self.bias, "layout": self.layout}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FFNSite:
        """The record from :meth:`to_dict`.

        Raises:
            PlanError: a field is missing or of the wrong form.
        """

        def projection(item: Mapping[str, Any] | None) -> Projection | None:
            if item is None:
                return None
            rows = item.get("rows")
            return Projection(item["weight"], item.get("bias"), bool(item.get("transposed")), tuple(rows) if rows else None)

        try:
            place = data.get("placement")
            up, down = projection(data["up"]), projection(data["down"])
            assert up is not None and down is not None
            return cls(
                name=str(data["name"]),
                kind=str(data["kind"]),
                activation=str(data["activation"]),
                hidden_size=int(data["hidden_size"]),
                intermediate_size=int(data["intermediate_size"]),
                gate=projection(data.get("gate")),
                up=up,
                down=down,
                placement=Placement(place["block"], tuple(place["bypass"])) if place else None,
                refusal=str(data.get("refusal", "")),
                output_dropout=float(data.get("output_dropout", 0.0)),
            )
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            raise PlanError(f"the plan's site record is not readable ({type(error).__name__}: {error})") from error


@dataclass(frozen=True)
class Skipped:
    """A candidate that looked like an FFN and is none that can be split.

    Attributes:
        name: the module around it.
        node: the graph node that stood in the way.
        reason: one sentence.
    """

    name: str
    node: str
    reason: str

    def to_dict(self) -> dict[str, str]:
        """JSON-ready data."""
        return asdict(self)


@dataclass(frozen=True)
class DenseFFN:
    """The tensors of one dense FFN, gathered from a model by a site's record.

    Shapes: gate and up (F, D), down (D, F), gate_bias and up_bias (F,), down_bias (D,); the gate of a plain FFN is None.
    """

    site: FFNSite
    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @classmethod
    def read(cls, site: FFNSite, model: nn.Module | Mapping[str, Tensor]) -> DenseFFN:
        """Gather the tensors (views, detached).

        Raises:
            PlanError: a parameter is missing or its shape is not the site's.
        """
        tensors = tensors_by_name(model) if isinstance(model, nn.Module) else model
        try:
            up, up_bias = site.up.read(tensors)
            down, down_bias = site.down.read(tensors)
            gate, gate_bias = site.gate.read(tensors) if site.gate else (None, None)
        except KeyError as error:
            raise PlanError(f"the model has no parameter {error} that site {site.name} names: plan and model differ") from None
        wide, narrow = (site.intermediate_size, site.hidden_size), (site.hidden_size, site.intermediate_size)
        if tuple(up.shape) != wide or tuple(down.shape) != narrow or (gate is not None and tuple(gate.shape) != wide):
            raise PlanError(f"site {site.name}: the model's projections are not {wide} and {narrow}: plan and model differ")
        parts = [None if t is None else t.detach() for t in (up, down, gate, gate_bias, up_bias, down_bias)]
        return cls(site, *parts)  # type: ignore[arg-type]

    def hidden(self, x: Tensor) -> Tensor:
        """The down projection's input: x (T, D) -> h (T, F)."""
        up = torch.nn.functional.linear(x, self.up, self.up_bias)
        if self.gate is None:
            return self.site.act(up)
        return self.site.act(torch.nn.functional.linear(x, self.gate, self.gate_bias)) * up

    def output(self, h: Tensor) -> Tensor:
        """h (T, F) -> y (T, D), with the bias of the down projection."""
        return torch.nn.functional.linear(h, self.down, self.down_bias)


def tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by every name they have (tied ones under each)."""
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named.update(model.named_buffers(remove_duplicate=False))
    return named
