"""Routers: which experts each token uses.

A router is a module whose ``forward(x, k)`` takes tokens (T, D) and returns expert numbers (T, k) int64 and their weights
(T, k) in the dtype of x. To add one, subclass :class:`Router` and register its kind in :data:`ROUTERS`; a recipe then names
the kind in the plan and stores its tensors under the router's parameter names. Only ``linear`` goes into the compiled kernels;
the others are computed by torch operators in front of them.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .activations import Activation

if TYPE_CHECKING:
    from .block import BlockSpec


def straight_through(ids: Tensor, best: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(T, K) weights that are 1; with the chosen experts' scores (T, K), their gradient is that of the sigmoid."""
    weights = torch.ones_like(ids, dtype=dtype)
    if best is None:
        return weights
    p = torch.sigmoid(best).to(dtype)
    return weights + (p - p.detach())


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A cast that leaves no node in a graph where it does nothing."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


class Router(nn.Module):
    """Base of all routers: scores the experts, keeps the k best, binary gates.

    The FFN was split by neurons, so a chosen expert's output is added as it is (weight 1). While training, the weight is
    1 + p - stop_gradient(p) with p the sigmoid of the expert's score: the value stays 1, the router still gets a gradient
    (straight-through, Bengio et al. 2013, arXiv 1308.3432).
    """

    @classmethod
    def of(cls, spec: BlockSpec) -> Router:
        """An empty router for a block of this shape."""
        raise NotImplementedError

    def scores(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, N), the higher the likelier chosen."""
        raise NotImplementedError

    def forward(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(T, D) -> expert numbers (T, k) and weights (T, k)."""
        scores = self.scores(x)
        best, ids = torch.topk(scores, k, dim=-1, sorted=False)
        learning = self.training and torch.is_grad_enabled()
        return ids, straight_through(ids, best if learning else None, x.dtype)


class LinearRouter(Router):
    """scores = x W^T + b, computed in float32 at least.

    Parameters: weight (N, D), bias (N,).
    """

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_experts))

    @classmethod
    def of(cls, spec: BlockSpec) -> LinearRouter:
        """An empty router for a block of this shape."""
        return cls(spec.hidden_size, spec.experts)

    def scores(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, N)."""
        dtype = _wide(x)
        with _exact(x):
            return linear(cast(x, dtype), cast(self.weight, dtype), cast(self.bias, dtype))


class RepresentativeRouter(Router):
    """scores = |act(x G^T + g) * (x U^T + u)|: the activation of the one neuron that stands for each expert, as in CMoE
    (arXiv 2502.04416). In a plain FFN a neuron is act(x U^T + u), and so is its score.

    Parameters: up (N, D), in a gated FFN gate (N, D), and where its projections have biases up_bias, gate_bias (N,).
    """

    def __init__(self, hidden_size: int, num_experts: int, gated: bool, activation: str, input_bias: bool) -> None:
        super().__init__()
        self.act = Activation(activation)
        shape = (num_experts, hidden_size)
        self.up = nn.Parameter(torch.zeros(shape))
        self.up_bias = nn.Parameter(torch.zeros(num_experts)) if input_bias else None
        self.gate = nn.Parameter(torch.zeros(shape)) if gated else None
        self.gate_bias = nn.Parameter(torch.zeros(num_experts)) if gated and input_bias else None

    @classmethod
    def of(cls, spec: BlockSpec) -> RepresentativeRouter:
        """An empty router for a block of this shape."""
        return cls(spec.hidden_size, spec.experts, spec.gated, spec.activation, spec.input_bias)

    def scores(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, N)."""
        dtype = _wide(x)
        with _exact(x):
            x = x.to(dtype)
            up = linear(x, self.up.to(dtype), None if self.up_bias is None else self.up_bias.to(dtype))
            if self.gate is None:
                return self.act(up).abs()
            gate = linear(x, self.gate.to(dtype), None if self.gate_bias is None else self.gate_bias.to(dtype))
            return (self.act(gate) * up).abs()


class SpectralRouter(Router):
    """scores = |P_e x| |Q_e x|: low-rank estimates of what each expert's gate and up projections put out (gated FFNs alone).

    Parameters: gate (N, R, D) and up (N, R, D), fitted by :mod:`moecompile.recipes.spectral`.
    """

    def __init__(self, hidden_size: int, num_experts: int, rank: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(num_experts, rank, hidden_size))
        self.up = nn.Parameter(torch.zeros(num_experts, rank, hidden_size))

    @classmethod
    def of(cls, spec: BlockSpec) -> SpectralRouter:
        """An empty router for a block of this shape."""
        return cls(spec.hidden_size, spec.experts, spec.router_rank)

    def scores(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, N)."""
        dtype = _wide(x)
        with _exact(x):
            x = x.to(dtype)
            shape = self.gate.shape[:2]
            gate = linear(x, self.gate.to(dtype).flatten(0, 1)).unflatten(1, shape)  # [T, N, R]
            up = linear(x, self.up.to(dtype).flatten(0, 1)).unflatten(1, shape)
            return (gate.square().sum(-1) * up.square().sum(-1)).sqrt()


class MLPRouter(Router):
    """scores = tanh(x W1^T) W2^T, as in MoEfication (arXiv 2110.01786).

    Parameters: hidden (N, D), out (N, N).
    """

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.hidden = nn.Parameter(torch.zeros(num_experts, hidden_size))
        self.out = nn.Parameter(torch.zeros(num_experts, num_experts))

    @classmethod
    def of(cls, spec: BlockSpec) -> MLPRouter:
        """An empty router for a block of this shape."""
        return cls(spec.hidden_size, spec.experts)

    def scores(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, N)."""
        dtype = _wide(x)
        with _exact(x):
            return linear(torch.tanh(linear(x.to(dtype), self.hidden.to(dtype))), self.out.to(dtype))


def _wide(x: Tensor) -> torch.dtype:
    """What scores are computed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _exact(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """No autocast; a region of its own only where it does something, because export makes a subgraph of it."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


# kind, as the plan names it -> class; "none" is for plans that choose nothing (no routed expert, or all of them).
ROUTERS: dict[str, type[Router]] = {
    "linear": LinearRouter,
    "representative": RepresentativeRouter,
    "spectral": SpectralRouter,
    "mlp": MLPRouter,
}
