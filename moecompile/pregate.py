"""The pre-gating router: one causal transformer block over token ids decides for every layer before the first one runs.

    h0 = E x        e: the model's own frozen input embedding of the token, or a table of the router's own
    h1 = h0 + Attention(RMSNorm(h0))          causal, RoPE, keys and values kept in the model's own cache
    h2 = h1 + W2 silu(W1 RMSNorm(h1))
    scores = W RMSNorm(h2) + b                (T, N) for all layers (aligned ids), or (T, L, N), a decision per layer

Read-ME (Cai et al. 2024, arXiv 2410.19123), section 3. Letters: B batch, S positions, T = B * S tokens, L layers, N experts,
K chosen, E embedding width, W router width.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import PlanError

KIND = "pregate"  # as plans and blocks name it


@dataclass(frozen=True)
class PreGateSpec:
    """The shape of a pre-gating router; everything needed to build it empty.

    Attributes:
        experts: N, how many experts it scores.
        input_width: E, the width of the model's input embeddings.
        groups: 1 for aligned ids (one decision for all layers), else L, a decision for each layer.
        vocabulary: 0 to read the model's own frozen embeddings through a projection; else the rows of a table of its own.
        width: W.
        heads: attention heads; W / heads must be even, for RoPE.
        mlp_width: of the two-matrix SiLU MLP.
        rope_theta: base of the rotary angles.
        eps: of RMSNorm.
        argument, embedding: where token ids come in, and the parameter that embeds them
            (:class:`moecompile.reading.TokenInput`); empty for a transformers model, which says so itself.
    """

    experts: int
    input_width: int
    groups: int = 1
    vocabulary: int = 0
    width: int = 512
    heads: int = 4
    mlp_width: int = 512
    rope_theta: float = 10000.0
    eps: float = 1e-6
    argument: str = ""
    embedding: str = ""

    def __post_init__(self) -> None:
        sizes = (self.experts, self.input_width, self.groups, self.width, self.heads, self.mlp_width)
        if min(sizes) < 1 or self.vocabulary < 0:
            raise PlanError(f"the pre-gating router's sizes must be at least 1: {self}")
        if self.width % (2 * self.heads):
            raise PlanError(f"the pre-gating router's width {self.width} must be a multiple of twice its {self.heads} heads")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PreGateSpec:
        """The spec from :meth:`to_dict`.

        Raises:
            PlanError: it is not readable.
        """
        try:
            kinds: dict[str, Any] = {"rope_theta": float, "eps": float, "argument": str, "embedding": str}
            return cls(**{name: kinds.get(name, int)(value) for name, value in data.items()})
        except (TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"the plan's pre-gating router is not readable ({type(error).__name__}: {error})") from error


@dataclass(frozen=True)
class Positions:
    """Where the new tokens stand and what each may look at.

    Attributes:
        index: (B or 1, S) int64 positions, padding not counted.
        allowed: (B or 1, 1, S, keys) bool, or a float mask that is added to the attention scores.
    """

    index: Tensor
    allowed: Tensor


def positions_of(
    batch: int,
    length: int,
    past: Any,
    keys: Any,
    mask: Tensor | None,
    index: Tensor | None,
    device: torch.device,
    packed: bool = False,
) -> Positions:
    """Positions and causal mask of ``length`` new tokens behind ``past`` others.

    Args:
        batch: B.
        length: S.
        past: tokens in the cache, an int; of a static cache a 0-d int64 tensor.
        keys: how many keys attention will see: past + S, or the size of a static cache.
        mask: (B, past + S) of real tokens, a ready (B, 1, S, keys) mask, or None.
        index: (B or 1, S) positions as the model was given them; used where the mask does not tell them.
        device: where to compute.
        packed: whether positions that begin anew begin another text, as transformers has it without a mask and a cache.

    Returns:
        With a two-dimensional mask, positions count real tokens, so that a left-padded row decides as it would alone.
    """
    place = torch.arange(length, device=device) + past  # [S], in the cache
    if mask is not None and mask.dim() == 4:
        return Positions(place[None] if index is None else index, mask)
    allowed = (torch.arange(keys, device=device)[None] <= place[:, None])[None, None]  # [1, 1, S, keys]
    if mask is None and index is not None and packed:
        text = nn.functional.pad((index[:, 1:] != index[:, :-1] + 1).long().cumsum(-1), (1, 0))  # [B or 1, S]
        return Positions(index, allowed & (text[:, None, :, None] == text[:, None, None, :]))
    if mask is None:
        return Positions(place[None] if index is None else index, allowed)
    real = mask.to(torch.bool)
    index = (real.long().cumsum(-1) - 1).clamp_min(0)[:, -length:]
    if isinstance(past, Tensor):  # of a static cache, places that are not filled yet
        real = nn.functional.pad(real, (0, keys - real.shape[-1]), value=True)
    itself = (torch.arange(keys, device=device)[None] == place[:, None])[None, None]  # a row of padding alone has no softmax
    return Positions(index, (allowed & real[:, None, None, :]) | itself)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in float32. Parameters: weight (W,)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., W) -> (..., W), dtype of x."""
        wide = x.float() if x.dtype != torch.float64 else x
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def rotate(x: Tensor, index: Tensor, theta: float) -> Tensor:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864), the two halves of each head as pairs.

    Args:
        x: (B, heads, S, C).
        index: (B or 1, S) positions.
        theta: base of the angles.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = index[:, None, :, None].to(torch.float32) * frequency  # [B, 1, S, C/2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


class PreGatingRouter(nn.Module):
    """The router itself. It knows no model: it reads embeddings (or ids, with a table of its own) and gives scores."""

    def __init__(self, spec: PreGateSpec) -> None:
        super().__init__()
        self.spec = spec
        w = spec.width
        self.table = nn.Embedding(spec.vocabulary, w) if spec.vocabulary else None
        self.proj = None if spec.vocabulary else nn.Linear(spec.input_width, w, bias=False)
        self.input_norm = RMSNorm(spec.input_width, spec.eps) if self.proj is not None else None
        self.attn_norm, self.mlp_norm, self.out_norm = (RMSNorm(w, spec.eps) for _ in range(3))
        self.qkv, self.out = nn.Linear(w, 3 * w, bias=False), nn.Linear(w, w, bias=False)
        self.up, self.down = nn.Linear(w, spec.mlp_width, bias=False), nn.Linear(spec.mlp_width, w, bias=False)
        self.head = nn.Linear(w, spec.groups * spec.experts)
        nn.init.zeros_(self.head.bias)

    def hidden(self, tokens: Tensor, positions: Positions, cache: Any = None) -> Tensor:
        """The block's output.

        Args:
            tokens: (B, S, E) embeddings; (B, S) ids with a table of its own.
            positions: of these tokens.
            cache: a layer of a transformers cache; its keys and values grow by these tokens.

        Returns:
            (B, S, W).
        """
        if self.table is not None:
            h = self.table(tokens)
        else:
            assert self.proj is not None and self.input_norm is not None
            # rows of an embedding table differ in norm by an order of magnitude between frequent and rare tokens
            h = self.proj(self.input_norm(tokens.to(self.proj.weight.dtype)))
        batch, length, width = h.shape
        heads = self.spec.heads
        qkv = self.qkv(self.attn_norm(h)).view(batch, length, 3, heads, width // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, S, C] each
        q, k = (rotate(x, positions.index, self.spec.rope_theta) for x in (q, k))
        if cache is not None:
            k, v = cache.update(k, v)
        allowed = positions.allowed if positions.allowed.dtype == torch.bool else positions.allowed.to(q.dtype)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        h = h + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return h + self.down(nn.functional.silu(self.up(self.mlp_norm(h))))

    def scores(self, hidden: Tensor) -> Tensor:
        """(B, S, W) -> (T, N) for aligned ids or (T, L, N), in float32 at least: the higher the likelier chosen."""
        x = self.out_norm(hidden).reshape(-1, self.spec.width)  # [T, W]
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        kind = x.device.type  # a region of its own only where it does something: export makes a subgraph of it
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext():
            scores = nn.functional.linear(x.to(wide), self.head.weight.to(wide), self.head.bias.to(wide))
        return scores if self.spec.groups == 1 else scores.view(-1, self.spec.groups, self.spec.experts)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scores of whole sequences, (T, N) or (T, L, N); no cache.

        Args:
            tokens: as for :meth:`hidden`.
            mask: (B, S) of real tokens, or None.
        """
        batch, length = tokens.shape[:2]
        positions = positions_of(batch, length, 0, length, mask, None, tokens.device)
        return self.scores(self.hidden(tokens, positions))


class RoutingPlan:
    """The decision for every layer of one step.

    Attributes:
        ids: (T, K) int64 for all layers, or (T, L, K); the best expert first.
        best: the scores of the chosen, of the same shape, where gradients are to flow to the router; else None.
    """

    def __init__(self, ids: Tensor, best: Tensor | None = None) -> None:
        self.ids, self.best = ids, best
        self._views: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}

    def of(self, layer: int, k: int) -> tuple[Tensor, Tensor | None]:
        """(T, k) ids and scores of one layer; with aligned ids, all layers get the same tensors.

        Raises:
            PlanError: fewer were decided.
        """
        aligned = self.ids.dim() == 2
        key = (0 if aligned else layer, k)
        if key not in self._views:
            if k > self.ids.shape[-1]:
                raise PlanError(f"the routing plan holds {self.ids.shape[-1]} experts per token; the layer wants {k}")
            parts = [self.ids] if self.best is None else [self.ids, self.best]
            parts = parts if aligned else [part[:, layer] for part in parts]
            parts = parts if k == self.ids.shape[-1] else [part[:, :k] for part in parts]
            self._views[key] = (parts[0], parts[1] if len(parts) > 1 else None)
        return self._views[key]


class Routing:
    """What the router at the front and the blocks behind it share: the present plan, and how many experts each block wants.

    Attributes:
        dials: (top_k, prefill_top_k, N) of each layer.
    """

    def __init__(self) -> None:
        self.dials: dict[int, tuple[int, int | None, int]] = {}
        self._last: RoutingPlan | None = None
        self._own = threading.local()

    @property
    def plan(self) -> RoutingPlan | None:
        """The decision of the step that this thread is computing; None between steps. A thread without one of its own, such as
        those in which autograd computes layers again, has the last."""
        if torch.compiler.is_compiling():  # compilers trace one step, and know no threads
            return self._last
        own: RoutingPlan | None = getattr(self._own, "plan", None)
        return self._last if own is None else own

    @plan.setter
    def plan(self, plan: RoutingPlan | None) -> None:
        self._last = plan
        if not torch.compiler.is_compiling():
            self._own.plan = plan

    def __getstate__(self) -> dict[str, Any]:
        """Copies begin between steps."""
        return {"dials": self.dials}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.dials = state["dials"]

    def wanted(self) -> int:
        """The largest number of experts that any layer chooses; 0 where each computes all or none."""
        most = 0
        for k, prefill, experts in self.dials.values():
            for value in (k, prefill):
                if value is not None and value < experts:
                    most = max(most, value)
        return most

    def of(self, layer: int, k: int) -> tuple[Tensor, Tensor | None]:
        """The plan's choice for one layer.

        Raises:
            PlanError: no step is being computed.
        """
        plan = self.plan
        if plan is None:
            raise PlanError(
                "there is no routing plan: the pre-gating router decides when the whole model is called, not one of its layers"
            )
        return plan.of(layer, k)
