"""Kernel specs: everything that a kernel of an expert FFN depends on, and what it must cost at least.

Letters: T tokens, N experts, K chosen, D hidden, I expert width; G = 3 matrices for a gated FFN, 2 for a plain one.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertKernelSpec:
    """One grouped expert FFN.

    Attributes:
        hidden_size: D.
        expert_width: I.
        experts: N.
        top_k: K.
        gated: whether there is a gate projection.
        activation: a name or expression of :mod:`moecompile.activations`.
        element_bytes: bytes per weight.
    """

    hidden_size: int
    expert_width: int
    experts: int
    top_k: int
    gated: bool
    activation: str
    element_bytes: int = 4

    @property
    def matrices(self) -> int:
        """G."""
        return 3 if self.gated else 2

    def flops(self, tokens: int) -> int:
        """Multiply-adds count as two: 2 G T K D I."""
        return 2 * self.matrices * tokens * self.top_k * self.hidden_size * self.expert_width

    def active_experts(self, tokens: int) -> float:
        """Expected number of different experts that T tokens choose, uniform routing: N (1 - (1 - K/N)^T)."""
        if not self.experts:
            return 0.0
        return self.experts * (1.0 - (1.0 - self.top_k / self.experts) ** tokens)

    def weight_bytes(self, tokens: int) -> float:
        """Bytes of expert weights that T tokens must read."""
        return self.active_experts(tokens) * self.matrices * self.hidden_size * self.expert_width * self.element_bytes

    def floor_seconds(self, tokens: int, flops_per_second: float, bytes_per_second: float) -> float:
        """No kernel can be faster: the larger of compute time and weight-reading time."""
        return max(self.flops(tokens) / flops_per_second, self.weight_bytes(tokens) / bytes_per_second)
