"""The MoE block: the one definition that the rewritten graph and the live module share.

    y = shared(x) + sum over chosen e of (W_down,e act(W_gate,e x) * (W_up,e x) + c_e) + bias

c_e and bias carry the compensation for idle experts: each expert subtracts its own mean contribution, the bias holds the sum
of all of them, so the compensation vanishes when every expert is on. Letters: N experts, K chosen, D hidden, I expert width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .activations import Activation
from .errors import PlanError
from .ops import expert_ffn
from .pregate import KIND, Routing
from .routers import ROUTERS, cast, straight_through


@dataclass(frozen=True)
class BlockSpec:
    """The shape of one MoE block; everything needed to build it empty.

    Attributes:
        hidden_size: D.
        dense_width: F, all neurons.
        shared_width: neurons that are always on.
        experts: N.
        expert_width: I; experts with fewer neurons are padded with zero weights.
        top_k: K at conversion.
        gated: whether each neuron has a gate.
        activation: a name or expression of :mod:`moecompile.activations`.
        input_bias: whether gate and up projection have biases.
        bias: whether the block adds a vector (the dense bias, the idle experts' means).
        expert_bias: whether each expert subtracts its own mean.
        router: a kind of :data:`moecompile.routers.ROUTERS`, ``pregate`` (the decision comes from the front), or ``none``.
        keep_exact: whether the dense down projection is kept beside the refitted one.
        dropout: probability of the dropout behind the block.
        overlap: whether a neuron may stand in several experts; then one expert or all of them can be chosen.
        spare: how many of the experts, the last ones, no router chooses: they hold the neurons that are in no other.
        router_rank: R of a ``spectral`` router.
    """

    hidden_size: int
    dense_width: int
    shared_width: int
    experts: int
    expert_width: int
    top_k: int
    gated: bool
    activation: str
    input_bias: bool = False
    bias: bool = False
    expert_bias: bool = False
    router: str = "none"
    keep_exact: bool = False
    dropout: float = 0.0
    overlap: bool = False
    spare: int = 0
    router_rank: int = 0

    @property
    def choosable(self) -> int:
        """How many experts a router chooses among."""
        return self.experts - self.spare


class SharedExpert(nn.Module):
    """The neurons that are always on: a plain or gated FFN without output bias."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.act = Activation(spec.activation)
        wide = (spec.hidden_size, spec.shared_width)
        self.gate_proj = nn.Linear(*wide, bias=spec.input_bias) if spec.gated else None
        self.up_proj = nn.Linear(*wide, bias=spec.input_bias)
        self.down_proj = nn.Linear(spec.shared_width, spec.hidden_size, bias=False)

    def hidden(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, shared width), the down projection's input."""
        if self.gate_proj is None:
            return self.act(self.up_proj(x))
        return self.act(self.gate_proj(x)) * self.up_proj(x)

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        return self.down_proj(self.hidden(x))


class Experts(nn.Module):
    """The routed experts as 3-D parameters.

    Parameters: ``gate_up_proj`` (N, 2I, D) of a gated or ``up_proj`` (N, I, D) of a plain FFN, ``down_proj`` (N, D, I), and
    where they exist ``gate_up_bias``/``up_bias`` (N, G*I) and ``down_bias`` (N, D).
    """

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        n, i, d = spec.experts, spec.expert_width, spec.hidden_size
        self.act, self.gated = Activation(spec.activation), spec.gated
        rows = 2 * i if spec.gated else i
        name = "gate_up" if spec.gated else "up"
        self.register_parameter(f"{name}_proj", nn.Parameter(torch.zeros(n, rows, d)))
        self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(n, rows)) if spec.input_bias else None)
        self.down_proj = nn.Parameter(torch.zeros(n, d, i))
        self.down_bias = nn.Parameter(torch.zeros(n, d)) if spec.expert_bias else None

    @property
    def up(self) -> Tensor:
        """(N, G*I, D)."""
        return self.gate_up_proj if self.gated else self.up_proj  # type: ignore[return-value]

    @property
    def up_bias_or_none(self) -> Tensor | None:
        """(N, G*I) or None."""
        return self.gate_up_bias if self.gated else self.up_bias  # type: ignore[return-value]

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """(T, D), (T, K), (T, K) -> (T, D)."""
        up, down, up_bias, down_bias = self.up, self.down_proj, self.up_bias_or_none, self.down_bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            tensors = [x, weights, up, down, up_bias, down_bias]
            x, weights, up, down, up_bias, down_bias = [None if t is None else t.to(dtype) for t in tensors]  # type: ignore
        return expert_ffn(x, ids, weights, up, down, up_bias, down_bias, self.act.name, self.gated)


class ExactDown(nn.Module):
    """The dense down projection, kept beside a refitted one: (N, D, I), (D, shared width) and the dense bias (D,)."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.zeros(spec.experts, spec.hidden_size, spec.expert_width), requires_grad=False)
        shared = torch.zeros(spec.hidden_size, spec.shared_width)
        self.shared = nn.Parameter(shared, requires_grad=False) if spec.shared_width else None
        self.bias = nn.Parameter(torch.zeros(spec.hidden_size), requires_grad=False) if spec.bias else None


def _joined(first: Tensor | None, second: Tensor) -> Tensor:
    return second if first is None else torch.cat([first, second])


class MoEFFN(nn.Module):
    """A feed-forward network as shared neurons and routed experts; reads and returns (..., D).

    ``top_k`` may be set between calls, from 0 (shared neurons alone) to N (all of them, which is the dense FFN unless the
    plan changed weights and kept no exact copy). With all of them on there is nothing to route: the neurons are put back into
    their dense order, so that sums are taken as the dense model takes them (summed by expert, the logits of a real 135 M model
    were off by up to 1.8e-4, its own float32 noise).

    ``prefill_top_k`` is the same dial for whole sequences alone, None while they follow ``top_k``: input (..., L, D) with
    L > 1 is the prompt (prefill), L = 1 is decoding; input (T, D) has no sequences and follows ``top_k``.

    Buffers: ``place`` (F,) int64, where each dense neuron is stored: the shared ones first, then I places for each expert.
    Where experts overlap, ``neuron`` (N, I) int64 besides: which dense neuron each place holds, -1 for padding; ``place`` is
    then the first of a neuron's copies, and ``idle`` (D,) the sum of what idle neurons give at their means, each counted once.
    """

    place: Tensor
    neuron: Tensor | None

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        if spec.router not in ("none", KIND, *ROUTERS):
            raise PlanError(f"there is no router '{spec.router}'; there are: none, {KIND}, {', '.join(ROUTERS)}")
        self.spec = spec
        self.routing: Routing | None = Routing() if spec.router == KIND else None
        self.layer = 0
        self._top_k = spec.top_k
        self._prefill_top_k: int | None = None
        self.router = ROUTERS[spec.router].of(spec) if spec.router in ROUTERS else None
        self.experts = Experts(spec)
        self.shared = SharedExpert(spec) if spec.shared_width else None
        self.bias = nn.Parameter(torch.zeros(spec.hidden_size)) if spec.bias else None
        self.exact = ExactDown(spec) if spec.keep_exact else None
        self.register_buffer("place", torch.zeros(spec.dense_width, dtype=torch.long))
        copies = torch.full((spec.experts, spec.expert_width), -1, dtype=torch.long) if spec.overlap else None
        self.register_buffer("neuron", copies)
        summed = spec.overlap and spec.expert_bias
        self.idle = nn.Parameter(torch.zeros(spec.hidden_size), requires_grad=False) if summed else None

    def connect(self, routing: Routing, layer: int) -> None:
        """Read the decision of the router at the front, as layer ``layer`` of its plan."""
        self.routing, self.layer = routing, layer
        self._tell()

    def _tell(self) -> None:
        if self.routing is not None:
            self.routing.dials[self.layer] = (self._top_k, self._prefill_top_k, self.spec.experts)

    @property
    def routes(self) -> bool:
        """Whether a router, the block's own or the one at the front, chooses experts."""
        return self.router is not None or self.routing is not None

    @property
    def chooses(self) -> bool:
        """Whether there is a choice at the present top_k: a router, and neither none nor all of the experts."""
        return self.routes and 0 < self._top_k < self.spec.experts

    @property
    def top_k(self) -> int:
        """Experts chosen per token. Setting it sets prefill too."""
        return self._top_k

    @top_k.setter
    def top_k(self, k: int) -> None:
        self._check(k)
        self._top_k, self._prefill_top_k = k, None
        self._tell()

    @property
    def prefill_top_k(self) -> int | None:
        """Experts chosen per token of a whole sequence; None where it follows ``top_k``."""
        return self._prefill_top_k

    @prefill_top_k.setter
    def prefill_top_k(self, k: int | None) -> None:
        if k is not None:
            self._check(k)
        self._prefill_top_k = k
        self._tell()

    @property
    def dial(self) -> tuple[int, int | None]:
        """(top_k, prefill_top_k)."""
        return self._top_k, self._prefill_top_k

    def _check(self, k: int) -> None:
        if not 0 <= k <= self.spec.experts:
            raise PlanError(f"top_k is {k}; this block has {self.spec.experts} experts")
        if not 0 < k < self.spec.experts:
            return
        if not self.routes:
            raise PlanError(f"top_k is {k}, but this block has no router: only 0 or {self.spec.experts} can be had")
        if self.spec.overlap and k > 1:
            raise PlanError(f"top_k is {k}, but the experts overlap: only 0, 1 or {self.spec.experts} can be had")
        if k > self.spec.choosable:
            raise PlanError(
                f"top_k is {k}, but the router chooses among {self.spec.choosable}: at most that, or all {self.spec.experts}, "
                "can be had"
            )

    def choose(self, x: Tensor, top_k: int | None = None) -> tuple[Tensor, Tensor]:
        """Expert numbers and weights, (T, K) each, for tokens (T, D); K is ``top_k`` unless another is given."""
        k = self._top_k if top_k is None else top_k
        if k == self.spec.experts:
            everyone = torch.arange(self.spec.experts, device=x.device).expand(x.shape[0], -1)
            return everyone, torch.ones_like(everyone, dtype=x.dtype)
        if self.routing is not None and k > 0:
            ids, best = self.routing.of(self.layer, k)
            return ids, straight_through(ids, best, x.dtype)
        if self.router is None:
            nobody = torch.zeros(x.shape[0], 0, dtype=torch.long, device=x.device)
            return nobody, nobody.to(x.dtype)
        return self.router(x, k)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        prefill = self._prefill_top_k is not None and hidden_states.dim() > 2 and hidden_states.shape[-2] > 1
        k = self._prefill_top_k if prefill and self._prefill_top_k is not None else self._top_k
        x = hidden_states.reshape(-1, hidden_states.shape[-1])  # [T, D]
        y = self.dense_order(x) if k == self.spec.experts else self._chosen(x, k)
        y = nn.functional.dropout(y, self.spec.dropout, self.training) if self.spec.dropout else y
        return y.reshape(hidden_states.shape)

    def _chosen(self, x: Tensor, k: int) -> Tensor:
        """Shared neurons and k experts: (T, D) -> (T, D)."""
        return self.with_choice(x, *(self.choose(x, k) if k > 0 else ()))

    def with_choice(self, x: Tensor, ids: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Shared neurons and these experts (T, K), with weights (T, K) or 1: (T, D) -> (T, D)."""
        y = None if self.shared is None else self.shared(x)
        if ids is not None:
            routed = self.experts(x, ids, torch.ones_like(ids, dtype=x.dtype) if weights is None else weights)
            y = routed if y is None else y + routed
        if y is None:
            y = torch.zeros_like(x)
        return y if self.bias is None else y + cast(self.bias, y.dtype)

    def neurons_on(self, ids: Tensor) -> Tensor:
        """(T, F) bool in dense order: the neurons that work for tokens with these experts (T, K)."""
        spec, count = self.spec, ids.shape[0]
        on = torch.zeros(count, spec.experts, device=ids.device, dtype=torch.bool).scatter_(1, ids, True)
        always = torch.ones(count, spec.shared_width, device=ids.device, dtype=torch.bool)
        if self.neuron is None:
            return torch.cat([always, on.repeat_interleave(spec.expert_width, dim=1)], dim=1)[:, self.place]
        member = torch.zeros(spec.experts, spec.dense_width + 1, device=ids.device)  # the last column takes the padding
        member.scatter_(1, self.neuron % (spec.dense_width + 1), 1.0)
        shared = self.place < spec.shared_width
        return (on.float() @ member[:, :-1] > 0) | shared

    def dense_order(self, x: Tensor) -> Tensor:
        """Every neuron, in dense order: (T, D) -> (T, D)."""
        spec, experts, shared = self.spec, self.experts, self.shared
        halves = 2 if spec.gated else 1
        names = ("gate_proj", "up_proj") if spec.gated else ("up_proj",)
        rows = experts.up.unflatten(1, (halves, spec.expert_width))  # [N, G, I, D]
        biases = None if experts.up_bias_or_none is None else experts.up_bias_or_none.unflatten(1, (halves, spec.expert_width))
        pre: list[Tensor] = []
        for half, name in enumerate(names):
            own = None if shared is None else getattr(shared, name)
            weight = _joined(None if own is None else own.weight, rows[:, half].flatten(0, 1))[self.place]  # [F, D]
            bias = None if biases is None else _joined(None if own is None else own.bias, biases[:, half].flatten())[self.place]
            pre.append(nn.functional.linear(x, weight, bias))
        act = experts.act
        h = act(pre[0]) * pre[1] if spec.gated else act(pre[0])  # [T, F]
        kept: Tensor | None
        if self.exact is not None:
            routed, kept, bias = self.exact.experts, self.exact.shared, self.exact.bias
        else:
            routed, kept, bias = experts.down_proj, None if shared is None else shared.down_proj.weight, self.bias
            if bias is not None and self.idle is not None:
                bias = bias - self.idle
            elif bias is not None and experts.down_bias is not None:
                bias = bias + experts.down_bias.sum(0)
        columns = _joined(None if kept is None else kept.t(), routed.transpose(1, 2).flatten(0, 1))[self.place]  # [F, D]
        return nn.functional.linear(h, columns.t().contiguous(), bias)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        s = self.spec
        widths = f"D={s.hidden_size}, shared={s.shared_width}, experts={s.experts}x{s.expert_width}"
        prefill = "" if self._prefill_top_k is None else f", prefill_top_k={self._prefill_top_k}"
        return f"{widths}, top_k={self._top_k}{prefill}, {s.activation}"
