"""Attention of few queries: the kernel's numbers, what the pass lowers, what it leaves alone and why."""

from __future__ import annotations

import math

import pytest
import torch
from compiling import plain, tokens, without_inductor
from moecompile.codegen import operators
from moecompile.passes import run_passes
from moecompile.passes.pipeline import inference_passes
from torch import Tensor

import moecompile
from moecompile import attention
from moecompile.ops import expert_ffn

needs_compiler = pytest.mark.skipif(operators.available() is not None, reason=str(operators.available()))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expected(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention written out in float64; 0 where nothing may be read."""
    n = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(n, 1), v.double().repeat_interleave(n, 1)
    scores = q @ k.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    return (scores.softmax(-1).nan_to_num(0.0) @ v).transpose(1, 2)


SHAPES = [  # B, H, G, L, S, E, E'
    (1, 9, 3, 1, 129, 64, 64),
    (2, 4, 4, 1, 5, 37, 37),
    (1, 8, 1, 3, 700, 16, 80),
    (3, 2, 1, 8, 256, 64, 19),
    (1, 14, 2, 1, 257, 128, 128),
    (1, 1, 1, 1, 1, 3, 3),
]


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    operators.load()
    batch, heads, groups, queries, keys, width, values = shape
    q = random(batch, queries, heads, width, seed=1).to(dtype).transpose(1, 2)  # as models have it
    k = random(batch, groups, keys, width, seed=2).to(dtype)
    v = random(batch, groups, keys + 2, values, seed=3).to(dtype)[:, :, 1:-1]
    near = 2e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    may = random(batch, 1, queries, keys, seed=4) > 0
    may[..., 0, :1] = True
    for mask in (None, may, random(1, heads, 1, keys, seed=5), random(queries, keys, seed=6).to(dtype)):
        ours = attention.attend(q, k, v, mask, 0.3, False)
        assert ours.dtype == dtype and ours.is_contiguous() and ours.shape == (batch, queries, heads, values)
        torch.testing.assert_close(ours.double(), expected(q, k, v, mask, 0.3), rtol=near, atol=near)


PROMPTS = [  # B, H, G, L, S, E, E', causal
    (1, 9, 3, 300, 300, 64, 64, True),
    (2, 2, 1, 33, 33, 6, 24, True),
    (1, 4, 2, 40, 129, 128, 128, False),
    (2, 2, 2, 9, 9, 34, 70, True),
    (1, 1, 1, 48, 20, 16, 16, True),
    (1, 1, 1, 16, 1, 4, 3, False),
]


@needs_compiler
@pytest.mark.parametrize("shape", PROMPTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    operators.load()
    batch, heads, groups, queries, keys, width, values, causal = shape
    q = random(batch, queries, heads, width, seed=1).to(dtype).transpose(1, 2)
    k = random(batch, groups, keys, width, seed=2).to(dtype)
    v = random(batch, groups, keys + 2, values, seed=3).to(dtype)[:, :, 1:-1]
    mask = torch.ones(queries, keys, dtype=torch.bool).tril() if causal else None
    near = 2e-4 if dtype == torch.float32 else 3 * torch.finfo(dtype).eps
    for loud in (1, 30):  # 30: the largest score moves from piece to piece
        ours = attention.attend(q * loud, k, v, None, 0.3, bool(causal))
        torch.testing.assert_close(ours.double(), expected(q * loud, k, v, mask, 0.3), rtol=near, atol=near)


@needs_compiler
def test_extremes() -> None:
    operators.load()
    q, k, v = random(1, 2, 2, 8), random(1, 2, 600, 8, seed=1), random(1, 2, 600, 8, seed=2)
    nothing = torch.zeros(1, 1, 2, 600, dtype=torch.bool)
    nothing[..., 1, 300:] = True  # the first query reads nothing, the second nothing of the first pieces
    torch.testing.assert_close(attention.attend(q, k, v, nothing, 1.0, False), expected(q, k, v, nothing, 1.0).float())
    big = q * 1e4  # scores whose exponentials overflow
    torch.testing.assert_close(attention.attend(big, k, v, None, 1.0, False), expected(big, k, v, None, 1.0).float())
    k[0, 0, 599, 0] = math.nan
    y = attention.attend(q, k, v, None, 1.0, False)
    assert y[:, :, 0].isnan().all() and y[:, :, 1].isfinite().all()


@needs_compiler
def test_operands_the_kernel_does_not_take() -> None:
    operators.load()
    q, k, v = random(1, 2, 1, 6), random(1, 2, 6, 5, seed=1).transpose(-1, -2), random(1, 2, 5, 6, seed=2)
    torch.testing.assert_close(attention.attend(q, k, v, None, 1.0, False), expected(q, k, v, None, 1.0).float())
    double = [each.double() for each in (q, k, v)]
    torch.testing.assert_close(attention.attend(*double, None, 1.0, False), expected(*double, None, 1.0))
    with pytest.raises(RuntimeError):
        attention.attend(q, k[..., :5], v, None, 1.0, False)


def test_schema() -> None:
    q, k, v = random(2, 4, 1, 8), random(2, 2, 7, 8, seed=1), random(2, 2, 7, 8, seed=2)
    torch.library.opcheck(attention.attend, (q, k, v, None, 0.5, True))
    torch.library.opcheck(attention.attend, (q, k, v, random(2, 1, 1, 7) > 0, 0.5, False))


def nodes(record: object) -> list[object]:
    return [node for node in record.graph_module.graph.nodes if node.target is attention.attend]  # type: ignore[attr-defined]


def generated(model: object, batch: int, **first: Tensor) -> list[Tensor]:
    """Logits of a prompt and of three decoded tokens; ``first`` may hold a padding mask."""
    mask = first.get("attention_mask")
    out = model(input_ids=tokens(batch, 12), use_cache=True, **first)  # type: ignore[operator]
    found = [out.logits]
    for seed in range(3):
        if mask is not None:
            mask = torch.cat([mask, torch.ones(batch, 1, dtype=mask.dtype)], 1)
            first = {"attention_mask": mask}
        out = model(input_ids=tokens(batch, 1, seed), past_key_values=out.past_key_values, use_cache=True, **first)  # type: ignore[operator]
        found.append(out.logits)
    return found


@needs_compiler
@pytest.mark.parametrize("padded", [False, True])
def test_a_model_with_its_cache(padded: bool) -> None:
    moe = plain()
    fast = without_inductor(moecompile.compile(moe, verify=True))
    batch, first = (3, {"attention_mask": torch.ones(3, 12, dtype=torch.long)}) if padded else (1, {})
    if padded:
        first["attention_mask"][0, :5] = 0
    with torch.no_grad():
        for a, b in zip(generated(fast, batch, **first), generated(moe, batch, **first), strict=True):
            a, b = (a[:, 5:], b[:, 5:]) if padded and a.shape[1] > 1 else (a, b)
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    prefill, decode = moecompile.last_graphs(fast)
    assert not nodes(prefill)  # its length is symbolic: torch's own
    found = nodes(decode)
    assert len(found) == 2
    for node in found:  # keys as they are in the cache, not repeated for each head
        assert node.args[1].meta["example_value"].shape[1] == 2  # type: ignore[attr-defined]


class Attentive(torch.nn.Module):
    """Attention of some form beside a routed FFN."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.up, self.down = form, torch.nn.Parameter(random(3, 8, 8)), torch.nn.Parameter(random(3, 8, 4))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options = {"causal": {"is_causal": True}, "dropout": {"dropout_p": 0.5}}.get(self.form, {})
        if self.form == "three dimensions":
            q, k, v = q[0], k[0], v[0]
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options).reshape(-1, 8)
        ids = torch.zeros(y.shape[0], 1, dtype=torch.long)
        return y + expert_ffn(y, ids, torch.ones_like(ids, dtype=y.dtype), self.up, self.down, None, None, "silu", True)


@needs_compiler
@pytest.mark.parametrize(
    ("form", "queries", "count", "reason"),
    [
        ("plain", 1, 1, ""),
        ("plain", operators.MOST_QUERIES + 1, 0, ""),
        ("causal", 2, 0, ""),
        ("dropout", 1, 0, "it has dropout"),
        ("three dimensions", 1, 0, "do not have four dimensions"),
        ("float64", 1, 0, "no CPU kernel for float64"),
    ],
)
def test_what_stays(form: str, queries: int, count: int, reason: str) -> None:
    net = Attentive(form).to(torch.float64 if form == "float64" else torch.float32)
    inputs = [random(1, 2, length, 8, seed=length).to(net.up.dtype) for length in (queries, 9, 9)]
    with torch.no_grad():
        graph_module = torch.export.export(net, tuple(inputs)).module(check_guards=False)
        result = run_passes(graph_module, inference_passes())
        if form != "dropout":
            torch.testing.assert_close(result.graph_module(*inputs), net(*inputs), rtol=1e-5, atol=1e-5)
    assert len(nodes(result)) == count
    notes = [note for note in result.notes if note.startswith("lower_attention")]
    assert any(reason in note for note in notes) if reason else not notes


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise operators.Unavailable("there is no working C++ compiler")

    monkeypatch.setattr(operators, "load", missing)
    inputs = [random(1, 2, length, 8, seed=length) for length in (1, 9, 9)]
    graph_module = torch.export.export(Attentive("plain"), tuple(inputs)).module(check_guards=False)
    result = run_passes(graph_module, inference_passes())
    assert not nodes(result)
    assert any("attention stays torch's: there is no working C++ compiler" in note for note in result.notes)


@needs_compiler
def test_bfloat16_prompts_are_verified() -> None:
    moe = plain().bfloat16()
    fast = without_inductor(moecompile.compile(moe, verify=True))
    with torch.no_grad():
        for length in (12, 70):
            ours, theirs = fast(input_ids=tokens(1, length)).logits, moe(input_ids=tokens(1, length)).logits
            assert float((ours - theirs).norm() / theirs.norm()) < 0.05
    assert len(nodes(moecompile.last_graphs(fast)[0])) == (2 if operators.pairs() else 0)
