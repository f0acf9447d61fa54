"""Models that look like what the passes rewrite, and are not: the numbers stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from moecompile.passes import run_passes
from moecompile.passes.pipeline import inference_passes
from torch import Tensor, nn

from moecompile.capture import capture
from moecompile.ops import expert_ffn

N, D, WIDTH, K = 4, 16, 8, 2


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Each test traces anew."""
    torch._dynamo.reset()


class Routed(nn.Module):
    """A router, experts and a gated FFN beside; subclasses say how they go together."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(D, N)
        self.up, self.down = nn.Parameter(torch.randn(N, 2 * WIDTH, D) * 0.3), nn.Parameter(torch.randn(N, D, WIDTH) * 0.3)
        self.g, self.u, self.d = nn.Linear(D, 12, bias=False), nn.Linear(D, 12, bias=False), nn.Linear(12, D, bias=False)
        self.one = nn.Parameter(torch.full((1,), 3.0))

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return expert_ffn(x, ids, weights, self.up, self.down, None, None, "silu", True)

    def shared(self, x: Tensor) -> Tensor:
        return self.d(nn.functional.silu(self.g(x)) * self.u(x))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        best, ids = torch.topk(self.router(x), K, dim=-1, sorted=False)
        return ids, torch.ones_like(best)

    def softmax(self, x: Tensor) -> tuple[Tensor, Tensor]:
        best, ids = torch.topk(self.router(x).softmax(-1), K, dim=-1)
        return ids, best


def copied(self: Any, x: Tensor) -> Tensor:
    y = x.to(torch.float32, copy=True)
    y.add_(1)
    return self.experts(x, *self.route(x)) * y


def reinterpreted(self: Any, x: Tensor) -> Tensor:
    return self.experts(x, *self.route(x)) + x.view(torch.int32).float() * 1e-9


def ones_assigned(self: Any, x: Tensor) -> Tensor:
    ids, weights = self.route(x)
    weights[:, 1] = 0.5
    return self.experts(x, ids, weights)


def ones_scaled(self: Any, x: Tensor) -> Tensor:
    ids, weights = self.route(x)
    weights.mul_(0.5)
    return self.experts(x, ids, weights)


def scores_masked(self: Any, x: Tensor) -> Tensor:
    scores = self.router(x)
    scores[:, 0] = -100.0
    best, ids = torch.topk(scores, K, dim=-1)
    return self.experts(x, ids, torch.ones_like(best))


def tokens_scaled_behind_router(self: Any, x: Tensor) -> Tensor:
    h = x + 0
    ids, weights = self.route(h)
    h.mul_(-2)
    return self.experts(h, ids, weights)


def tokens_scaled_behind_shared(self: Any, x: Tensor) -> Tensor:
    h = x + 0
    y = self.shared(h)
    h.mul_(2)
    return self.experts(h, *self.route(h)) + y


def two_routes_of_changed_tokens(self: Any, x: Tensor) -> Tensor:
    h = x + 0
    y = self.experts(h, *self.route(h))
    h.mul_(-2)
    return y + self.experts(h, *self.route(h))


def divided_down(self: Any, x: Tensor) -> Tensor:
    ids, best = self.softmax(x)
    return self.experts(x, ids, torch.div(best, best.sum(-1, keepdim=True), rounding_mode="floor"))


def one_number_added(self: Any, x: Tensor) -> Tensor:
    return self.experts(x, *self.route(x)) + self.one


def half_scores(self: Any, x: Tensor) -> Tensor:
    best, ids = torch.topk(self.router(x).softmax(-1).half(), K, dim=-1)
    return self.experts(x, ids, best.float())


def rounded_tokens(self: Any, x: Tensor) -> Tensor:
    """The router reads tokens rounded to a quarter: half of these choices are another one without rounding."""
    _, ids = torch.topk(self.router((x * 0.3 + 50).bfloat16().float()), 1, dim=-1)
    return self.experts(x, ids, torch.ones(ids.shape))


CASES = [
    copied, reinterpreted, ones_assigned, ones_scaled, scores_masked, tokens_scaled_behind_router, tokens_scaled_behind_shared,
    two_routes_of_changed_tokens, divided_down, one_number_added, half_scores, rounded_tokens,
]  # fmt: skip


@pytest.mark.parametrize("origin", ["dynamo", "export"])
@pytest.mark.parametrize("case", CASES, ids=lambda f: f.__name__)
def test_near_misses_keep_their_numbers(case: Any, origin: str) -> None:
    model = type(case.__name__, (Routed,), {"forward": case})().eval()
    x = torch.randn(40, D, generator=torch.Generator().manual_seed(1))
    if case is rounded_tokens:
        with torch.no_grad():
            model.router.bias.copy_(-(torch.full((1, D), 50.0) @ model.router.weight.t())[0])

    def behind(graph_module: Any, _: Any) -> Any:
        return run_passes(graph_module, inference_passes()).graph_module.forward

    with torch.no_grad():
        expected = model(x.clone())
        if origin == "dynamo":
            ours = torch.compile(model, backend=behind)(x.clone())
        else:
            ours = behind(capture(model, (x.clone(),)).graph_module, None)(x.clone())
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
