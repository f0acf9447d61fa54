"""The operators: against a plain loop, through gradcheck and opcheck, in odd shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moecompile import ops
from moecompile.activations import Activation
from moecompile.ops import NARROW, expert_ffn, expert_ffn_backward


def case(t: int, n: int, k: int, d: int, i: int, gated: bool, bias: bool, dtype=torch.float64, seed: int = 0):  # type: ignore[no-untyped-def]
    """Random operands of one call, in the order of the operator's arguments."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    ids = torch.stack([torch.randperm(n, generator=g)[:k] for _ in range(t)]) if t else torch.zeros(0, k, dtype=torch.long)
    rows = 2 * i if gated else i
    return (
        draw(t, d),
        ids,
        draw(t, k),
        draw(n, rows, d),
        draw(n, d, i),
        draw(n, rows) if bias else None,
        draw(n, d) if bias else None,
    )


def by_hand(x, ids, weights, up, down, up_bias, down_bias, activation: str, gated: bool) -> Tensor:  # type: ignore[no-untyped-def]
    """One token and one expert at a time, in float64."""
    act = Activation(activation)
    wide = [None if v is None else v.double() for v in (x, weights, up, down, up_bias, down_bias)]
    x, weights, up, down, up_bias, down_bias = wide
    out = torch.zeros_like(x)
    for t in range(x.shape[0]):
        for slot in range(ids.shape[1]):
            e = int(ids[t, slot])
            pre = up[e] @ x[t] + (0 if up_bias is None else up_bias[e])
            width = down.shape[2]
            h = act(pre[:width]) * pre[width:] if gated else act(pre)
            out[t] += weights[t, slot] * (down[e] @ h + (0 if down_bias is None else down_bias[e]))
    return out


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 9),
    st.integers(1, 7),
    st.data(),
    st.integers(1, 6),
    st.one_of(st.integers(1, 5), st.integers(NARROW, NARROW + 2)),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["silu", "gelu_tanh", "relu", "mul(x, sigmoid(mul(x, 1.702)))"]),
)
def test_forward_is_the_sum_by_hand(t: int, n: int, data, d: int, i: int, gated: bool, bias: bool, activation: str) -> None:  # type: ignore[no-untyped-def]
    k = data.draw(st.integers(0, n))
    operands = case(t, n, k, d, i, gated, bias)
    torch.testing.assert_close(expert_ffn(*operands, activation, gated), by_hand(*operands, activation, gated))


@pytest.mark.parametrize("bias", [False, True])
def test_many_tokens_go_in_parts(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow experts are multiplied all together, so many tokens at a time."""
    operands = case(23, 7, 3, 5, 4, True, bias)
    monkeypatch.setattr(ops, "_TOKENS", 8)
    torch.testing.assert_close(expert_ffn(*operands, "silu", True), by_hand(*operands, "silu", True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("width", [8, NARROW])
def test_low_precision(dtype: torch.dtype, tokens: int, width: int) -> None:
    operands = case(tokens, 6, 3, 16, width, True, True, dtype)
    ours, exact = expert_ffn(*operands, "silu", True), by_hand(*operands, "silu", True)
    assert ours.dtype == dtype
    scale = exact.abs().max()
    assert float((ours.double() - exact).abs().max() / scale) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 7])
def test_gradients(gated: bool, bias: bool, tokens: int) -> None:
    x, ids, *rest = case(tokens, 4, 2, 3, 2, gated, bias)
    leaves = [v.requires_grad_() for v in (x, *rest) if v is not None]

    def run(x, weights, up, down, *biases):  # type: ignore[no-untyped-def]
        return expert_ffn(x, ids, weights, up, down, *(biases or (None, None)), "gelu_tanh", gated)

    assert torch.autograd.gradcheck(run, leaves)


def test_only_wanted_gradients_are_computed() -> None:
    x, ids, weights, up, down, _, _ = case(5, 4, 2, 3, 2, True, False)
    grads = expert_ffn_backward(
        x, x, ids, weights, up, down, None, None, "silu", True, [True, False, False, True, False, False]
    )
    assert [g.numel() > 0 for g in grads] == [True, False, False, True, False, False]


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias: bool) -> None:
    operands = case(5, 4, 2, 3, 2, True, bias, torch.float32)
    wanted = [v.requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v for v in operands]
    torch.library.opcheck(expert_ffn, (*wanted, "silu", True))


def test_an_expert_named_twice_counts_twice() -> None:
    x, ids, weights, up, down, *_ = case(6, 4, 2, 8, 16, True, False)
    ids[:, 1] = ids[:, 0]
    once = ops.every_expert(x, ids[:, :1], weights.sum(1, keepdim=True), up, down, None, None, "silu", True)
    torch.testing.assert_close(ops.every_expert(x, ids, weights, up, down, None, None, "silu", True), once)


def test_operands_that_do_not_fit_are_refused() -> None:
    x, ids, weights, up, down, _, _ = case(5, 4, 2, 3, 2, True, False)
    with pytest.raises(ValueError, match="do not fit"):
        expert_ffn(x[:, :2], ids, weights, up, down, None, None, "silu", True)


@pytest.mark.parametrize("chosen", [0, 2])
@pytest.mark.parametrize("count", [1, 9])
def test_strides_are_those_that_compilers_are_told(chosen: int, count: int) -> None:
    """Compiled code reads results by the strides of the fake ones."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, ids, weights, *rest = case(count, 5, chosen, 6, 4, True, False)
    x, weights = x.t().contiguous().t(), weights.t().contiguous().t()
    forward, backward = (
        (x, ids, weights, *rest, "silu", True),
        (x * 2, x, ids, weights, *rest, "silu", True, [True] * 4 + [False] * 2),
    )
    with FakeTensorMode() as mode:
        told = [[mode.from_tensor(a) if isinstance(a, Tensor) else a for a in call] for call in (forward, backward)]
        fakes = [expert_ffn(*told[0]), *expert_ffn_backward(*told[1])]
    real = [expert_ffn(*forward), *expert_ffn_backward(*backward)]
    assert [(f.shape, f.stride()) for f in fakes] == [(r.shape, r.stride()) for r in real]
