"""Tuning's hand-written gradients are those of the plain formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from moecompile.block import BlockSpec, Experts
from moecompile.routers import LinearRouter
from moecompile.tuning.experts import chosen_experts
from moecompile.tuning.loss import Head, head_loss, relative_error, top_log_probabilities
from moecompile.tuning.norms import closed_form
from moecompile.tuning.scores import training_scores


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("tokens", [1, 23])
@pytest.mark.parametrize("all_from", [0.0, 1.1], ids=["all", "chosen"])
def test_experts_in_training_are_the_reference(
    gated: bool, biased: bool, tokens: int, all_from: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moecompile.tuning.experts._ALL_FROM_ELSE", all_from)
    for module in ("ops", "tuning.experts"):  # the reference multiplies each expert's own tokens
        monkeypatch.setattr(f"moecompile.{module}.NARROW", 0)
    torch.manual_seed(0)
    spec = BlockSpec(
        hidden_size=10, dense_width=25, shared_width=0, experts=5, expert_width=5, top_k=3, gated=gated,
        activation="silu" if gated else "gelu", input_bias=biased, bias=True, expert_bias=biased,
    )  # fmt: skip
    experts = Experts(spec).double()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(tokens, 10, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(tokens, 3, dtype=torch.float64, requires_grad=True)
    ids = torch.rand(tokens, 4).topk(3, dim=1).indices  # expert 4 is never chosen
    inputs = [x, weights, *experts.parameters()]
    upstream = torch.randn(tokens, 10, dtype=torch.float64)
    expected, own = experts(x, ids, weights), chosen_experts(experts, x, ids, weights)
    torch.testing.assert_close(own, expected)
    for mine, reference in zip(
        torch.autograd.grad(own, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("label_weight", [0.0, 0.7])
def test_head_loss_is_that_of_whole_logits(
    cap: float | None, biased: bool, label_weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moecompile.tuning.loss._CHUNK_BYTES", 4 * 50 * 16)  # 16 positions at a time, of 37
    torch.manual_seed(0)
    weight, bias = torch.randn(50, 8, dtype=torch.float64), torch.randn(50, dtype=torch.float64) if biased else None
    head = Head(weight, bias, cap)
    teacher = torch.randn(37, 8, dtype=torch.float64)
    student = torch.randn(37, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(50, (37,))
    labels[[3, 20, 36]] = -1

    def log_softmax(hidden: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(hidden, weight, bias)
        return (logits if cap is None else cap * torch.tanh(logits / cap)).log_softmax(-1)

    p, log_q = log_softmax(teacher).exp(), log_softmax(student)
    for count in (49, 6):
        ids, logp = top_log_probabilities(teacher, head, count)
        own, label = head_loss(student, head, ids, logp, labels, label_weight)
        if count == 49:  # the class "everything else" is one word
            expected = (p * (p.log() - log_q)).sum(1).mean()
        else:
            rest_p, rest_q = 1 - p.gather(1, ids).sum(1), 1 - log_q.gather(1, ids).exp().sum(1)
            inner = (p.gather(1, ids) * (p.gather(1, ids).log() - log_q.gather(1, ids))).sum(1)
            expected = (inner + rest_p * (rest_p / rest_q).log()).mean()
        if label_weight:
            cross = torch.nn.functional.nll_loss(log_q, labels, ignore_index=-1)
            torch.testing.assert_close(label.double(), cross.detach(), rtol=1e-5, atol=1e-6)
            expected = expected + label_weight * cross
        torch.testing.assert_close(own.double(), expected, rtol=1e-5, atol=1e-6)
        (mine,) = torch.autograd.grad(own, student)
        (reference,) = torch.autograd.grad(expected, student, retain_graph=True)
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weight_too", [True, False])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm])
def test_rms_norm_in_closed_form(kind: type[nn.Module], weight_too: bool) -> None:
    torch.manual_seed(0)
    norm = kind(24, eps=1e-5)
    nn.init.normal_(norm.weight, std=0.5).requires_grad_(weight_too)
    x = (torch.randn(2, 7, 24) * torch.logspace(-3, 2, 7)[:, None]).requires_grad_(True)
    own = closed_form(norm)
    assert own is not None
    inputs, upstream = [x, norm.weight] if weight_too else [x], torch.randn(2, 7, 24)
    torch.testing.assert_close(own(x), norm(x))
    for mine, reference in zip(
        torch.autograd.grad(own(x), inputs, upstream), torch.autograd.grad(norm(x), inputs, upstream), strict=True
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4)
    low = x.detach().bfloat16().requires_grad_(True)
    assert torch.equal(own(low), norm(low)) and own(low).dtype == norm(low).dtype


class _GatedRMSNorm(nn.Module):
    """As of Bamba and other models with Mamba layers: without a gate it is a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.randn(24)), 1e-6

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        x = x if gate is None else x * nn.functional.silu(gate)
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


def test_a_norm_with_a_gate_goes_on_to_read_it() -> None:
    torch.manual_seed(0)
    norm = _GatedRMSNorm()
    x, gate = torch.randn(2, 3, 24, requires_grad=True), torch.randn(2, 3, 24)
    own = closed_form(norm)
    assert own is not None
    torch.testing.assert_close(own(x, gate), norm(x, gate))
    torch.testing.assert_close(own(x, gate=gate), norm(x, gate))
    torch.testing.assert_close(own(x), norm(x))


class _Another(nn.Module):
    """What calls itself a norm and computes something else."""

    def __init__(self, formula: str) -> None:
        super().__init__()
        self.weight, self.eps, self.formula = nn.Parameter(torch.ones(8)), 1e-5, formula

    def forward(self, x: Tensor) -> Tensor:
        if self.formula == "gated":
            raise TypeError("a gate is missing")
        scale = (
            x.abs().mean(-1, keepdim=True) if self.formula == "absolute" else x.float().square().mean(-1, keepdim=True).sqrt()
        )
        return x / (scale + self.eps) * self.weight + (0.5 if self.formula == "shifted" else 0.0)


@pytest.mark.parametrize("module", [*map(_Another, ("gated", "absolute", "shifted")), nn.LayerNorm(8), nn.Linear(8, 8)])
def test_other_norms_stay_as_they_are(module: nn.Module) -> None:
    assert closed_form(module) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relative_error_is_its_formula(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    target = torch.randn(9, 16) * torch.logspace(-2, 3, 9)[:, None]
    own = (target + torch.randn(9, 16)).to(dtype).requires_grad_(True)
    expected = ((own.float() - target).square().sum(-1) / target.square().sum(-1)).mean()
    found = relative_error(own, target)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(3 * found, own), torch.autograd.grad(3 * expected, own))


def test_scores_are_the_routers_own_and_their_gradient_is_multiplied_in_bfloat16() -> None:
    torch.manual_seed(0)
    router = LinearRouter(32, 12)
    nn.init.normal_(router.weight), nn.init.normal_(router.bias)
    x, upstream = torch.randn(50, 32, requires_grad=True), torch.randn(50, 12)
    inputs = [x, router.weight, router.bias]
    expected = router.scores(x)
    reference = torch.autograd.grad(expected, inputs, upstream)
    with torch.autocast("cpu", torch.bfloat16):
        found = training_scores(router, x)
    assert torch.equal(found, expected)
    for mine, theirs in zip(torch.autograd.grad(found, inputs, upstream), reference, strict=True):
        assert mine.dtype == torch.float32 and float((mine - theirs).norm() / theirs.norm()) < 0.01
    torch.testing.assert_close(torch.autograd.grad(training_scores(router, x), inputs, upstream), reference)
