"""The spec of one generated MoE block kernel: everything that is compiled into it. T (tokens) and K (chosen) are not."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

DTYPES = ("float32", "bfloat16", "float16")
WEIGHT_FORMATS = (*DTYPES, "int8")
ROUTINGS = ("linear", "given")
SCORES = ("none", "softmax", "sigmoid")


@dataclass(frozen=True)
class BlockKernelSpec:
    """One MoE FFN block: shared neurons, routed experts, router and biases.

        y_t = shared(x_t) + sum_k w_tk (W2_e h_e + b2_e) + bias,  h = act(G x + bg) * (U x + bu)

    Attributes:
        hidden_size: D.
        expert_width: I.
        shared_width: S, 0 for none.
        experts: N.
        gated: whether there is a gate projection.
        activation: a name or expression of :mod:`moecompile.activations`.
        dtype: type of x and y.
        weight_format: type in which the weight matrices are stored; ``int8`` has a float32 scale for each row.
        routing: ``linear``, scores are computed from a router weight (N, D), or ``given``, ids (T, K) come in.
        score: what a chosen expert is weighted with; ``none`` is 1. With given routing the weights come in.
        normalise: whether the weights are divided by their sum over the chosen.
        weighted: with given routing, whether weights (T, K) come in too; otherwise they are 1.
        up_bias: whether experts have input biases (N, G*I).
        down_bias: whether experts have output biases (N, D).
        shared_bias: whether the shared neurons have input biases (S,).
        output_bias: whether there is a bias (D,).
        router_bias: whether the router has a bias (N,).
        bias_dtype: type of all biases but the router's.
        router_dtype: type of the router's weight and bias.

    Raises:
        ValueError: a field holds what no kernel has.
    """

    hidden_size: int
    expert_width: int
    shared_width: int
    experts: int
    gated: bool
    activation: str
    dtype: str = "float32"
    weight_format: str = "float32"
    routing: str = "linear"
    score: str = "none"
    normalise: bool = False
    weighted: bool = False
    up_bias: bool = False
    down_bias: bool = False
    shared_bias: bool = False
    output_bias: bool = False
    router_bias: bool = False
    bias_dtype: str = "float32"
    router_dtype: str = "float32"

    def __post_init__(self) -> None:
        choices = (
            ("dtype", DTYPES),
            ("bias_dtype", DTYPES),
            ("router_dtype", DTYPES),
            ("weight_format", WEIGHT_FORMATS),
            ("routing", ROUTINGS),
            ("score", SCORES),
        )
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is '{getattr(self, name)}'; there are: {', '.join(allowed)}")
        if min(self.hidden_size, self.expert_width, self.experts) < 1 or self.shared_width < 0:
            raise ValueError("sizes must be positive")

    @property
    def name(self) -> str:
        """A name for people and files; different specs have different ones."""
        digest = hashlib.sha256(repr(self).encode()).hexdigest()[:8]
        shape = f"d{self.hidden_size}_s{self.shared_width}_e{self.experts}x{self.expert_width}"
        return f"moe_block_{shape}_{self.dtype}_{self.weight_format}_{self.routing}_{digest}"

    @property
    def linear(self) -> bool:
        """Whether the kernel routes by itself."""
        return self.routing == "linear"

    @property
    def quantised(self) -> bool:
        """Whether weights carry scales."""
        return self.weight_format == "int8"

    @property
    def weights(self) -> tuple[str, ...]:
        """The arguments that stay the same from call to call."""
        return tuple(name for _, name in self.arguments if name not in CALL_ARGUMENTS)

    @property
    def arguments(self) -> tuple[tuple[str, str], ...]:
        """(C++ type, name) of every argument of the kernel, in order."""
        value, bias, weight, router = (
            CPP_TYPES[name] for name in (self.dtype, self.bias_dtype, self.weight_format, self.router_dtype)
        )
        shared, gate = self.shared_width > 0, self.gated and self.shared_width > 0
        table = (
            (True, f"{value}*", "out"),  # [T, D]
            (True, f"const {value}*", "x"),  # [T, D]
            (self.linear, f"const {router}*", "router_weight"),  # [N, D]
            (self.linear and self.router_bias, f"const {router}*", "router_bias"),  # [N]
            (not self.linear, "const int64_t*", "given_ids"),  # [T, K]
            (not self.linear and self.weighted, "const float*", "given_weights"),  # [T, K]
            (True, f"const {weight}*", "up"),  # [N, G*I, D]
            (True, f"const {weight}*", "down"),  # [N, I, D]
            (shared and self.gated, f"const {weight}*", "shared_gate"),  # [S, D]
            (shared, f"const {weight}*", "shared_up"),  # [S, D]
            (shared, f"const {weight}*", "shared_down"),  # [S, D]
            (self.quantised, "const float*", "up_scale"),  # [N, G*I]
            (self.quantised, "const float*", "down_scale"),  # [N, I]
            (self.quantised and gate, "const float*", "shared_gate_scale"),  # [S]
            (self.quantised and shared, "const float*", "shared_up_scale"),  # [S]
            (self.quantised and shared, "const float*", "shared_down_scale"),  # [S]
            (self.up_bias, f"const {bias}*", "up_bias"),  # [N, G*I]
            (self.down_bias, f"const {bias}*", "down_bias"),  # [N, D]
            (self.shared_bias and gate, f"const {bias}*", "shared_gate_bias"),  # [S]
            (self.shared_bias and shared, f"const {bias}*", "shared_up_bias"),  # [S]
            (self.output_bias, f"const {bias}*", "bias"),  # [D]
            (True, "const int64_t*", "bound"),  # addresses of the weights, in this order
            (True, "int64_t", "tokens"),
            (True, "int64_t", "top_k"),
            (True, "int64_t", "threads"),
        )
        return tuple((kind, name) for present, kind, name in table if present)


# Arguments of a kernel that belong to one call; the others are a block's weights.
CALL_ARGUMENTS = ("out", "x", "given_ids", "given_weights", "bound", "tokens", "top_k", "threads")
CPP_TYPES = {"float32": "float", "bfloat16": "at::BFloat16", "float16": "at::Half", "int8": "int8_t"}
