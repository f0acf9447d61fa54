"""Conversion in bfloat16: what is multiplied in it, what is not, and what comes of it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from families import BY_NAME, batch_of
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import moecompile
from moecompile.errors import PlanError
from moecompile.plans import DOWN, ROUTER
from moecompile.precision import compute_dtype, product
from moecompile.products import attention, replacement
from moecompile.recipes import Calibrated
from moecompile.recipes.refit import idle_means, neuron_mask, refit_down

CPU = torch.device("cpu")


@pytest.mark.parametrize("native", [True, False])
def test_auto_is_bfloat16_where_the_device_multiplies_it(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moecompile.precision.native_bfloat16", lambda: native)
    assert compute_dtype("auto", CPU) == (torch.bfloat16 if native else torch.float32)
    assert compute_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert compute_dtype("float32", torch.device("cuda")) == torch.float32
    assert compute_dtype("bfloat16", CPU) == torch.bfloat16


def test_a_product_is_rounded_to_its_type_and_float32_outside() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(9, 50), torch.randn(50, 7)
    assert torch.equal(product(a, b, torch.float32), a @ b)
    reduced = product(a, b, torch.bfloat16)
    assert reduced.dtype == torch.float32 and 0 < float((reduced - a @ b).abs().max()) < 0.1


@pytest.mark.parametrize("form", ["none", "causal", "rows", "heads", "plain"])
def test_attention_in_products_is_attention(form: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 4, 20, 16) for _ in range(3))
    mask: dict[str, Any] = {
        "none": {},
        "causal": {"is_causal": True},
        "rows": {"attn_mask": (torch.rand(3, 1, 20, 20) < 0.5) | torch.eye(20, dtype=torch.bool)},
        "heads": {"attn_mask": (torch.rand(3, 4, 20, 20) < 0.5) | torch.eye(20, dtype=torch.bool)},
        "plain": {"attn_mask": torch.ones(20, 20, dtype=torch.bool).tril()},
    }
    own = attention(q, k, v, **mask[form], scale=0.3)
    assert own.dtype == torch.bfloat16
    torch.testing.assert_close(
        own.float(), scaled_dot_product_attention(q, k, v, **mask[form], scale=0.3), atol=0.03, rtol=0.03
    )


@pytest.mark.parametrize("form", ["a row of nothing", "floats", "groups"])
def test_other_attention_is_left_to_torch(form: str) -> None:
    """Exactly torch's numbers, so its own kernel ran."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 6, 8) for _ in range(3))
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    mask[2] = False
    options: dict[str, Any] = {"attn_mask": mask if form == "a row of nothing" else torch.randn(6, 6)}
    if form == "groups":
        k, v, options = k[:, :2], v[:, :2], {"enable_gqa": True}
    own, expected = attention(q, k, v, **options), scaled_dot_product_attention(q, k, v, **options)
    assert torch.equal(own, expected) and bool(own.isfinite().all())


def test_only_attention_in_bfloat16_on_a_cpu_is_replaced() -> None:
    target = torch.ops.aten.scaled_dot_product_attention.default
    assert replacement(target, torch.bfloat16, CPU) is attention
    assert replacement(target, torch.float32, CPU) is target
    assert replacement(target, torch.bfloat16, torch.device("cuda")) is target
    assert replacement(torch.ops.aten.linear.default, torch.bfloat16, CPU) is torch.ops.aten.linear.default


def test_a_refit_in_bfloat16_reaches_the_float32_one() -> None:
    torch.manual_seed(2)
    tokens, width, hidden = 3000, 24, 8
    h, down = torch.randn(tokens, width) @ torch.randn(width, width) / 5, torch.randn(hidden, width)
    chosen = torch.zeros(tokens, 4, dtype=torch.bool).scatter_(1, torch.rand(tokens, 4).topk(2).indices, True)
    mask = neuron_mask(chosen, [list(range(5 * e, 5 * e + 5)) for e in range(4)], width)
    weights, target = torch.rand(tokens) + 0.1, h @ down.t()
    means = idle_means(h, mask, weights)

    def error(dtype: torch.dtype) -> float:
        fitted, constant = refit_down(h, mask, means, down, None, target, weights, dtype=dtype)
        own = ((h - means) * mask(0, tokens)) @ fitted.t() + fitted @ means + constant
        return float((weights[:, None] * (own - target).square()).sum())

    assert error(torch.bfloat16) == pytest.approx(error(torch.float32), rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
def test_a_conversion_in_bfloat16_loses_as_much_as_one_in_float32(family: str) -> None:
    kind = BY_NAME[family]
    dense = kind.build()
    rows = {"rows": 8} if family == "vit" else {"rows": 8, "tokens": 40}
    batches = [batch_of(kind, seed=seed, **rows) for seed in range(1, 9)]
    errors, plans = {}, {}
    for precision in ("float32", "bfloat16"):
        plans[precision] = moecompile.plan(dense, Calibrated(6, 2, 2, precision=precision), batches)
        report = moecompile.verify(moecompile.convert(dense, plans[precision]), dense, batch_of(kind, seed=99))
        errors[precision] = sum(row["top_k"] for row in report.layers) / len(report.layers)
        assert plans[precision].config["precision"] == precision
    assert errors["bfloat16"] == pytest.approx(errors["float32"], rel=0.05)
    name = plans["float32"].sites[0].site.name
    assert not torch.equal(*(plan.site_tensors(name)[DOWN] for plan in plans.values()))
    assert all(tensor.dtype == torch.float32 for tensor in plans["bfloat16"].site_tensors(name).values())


def test_auto_leaves_a_model_in_its_own_other_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moecompile.precision.native_bfloat16", lambda: True)

    class FFN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.relu(self.up(x)))

    torch.manual_seed(0)
    for dtype, resolved in ((torch.float32, "bfloat16"), (torch.float64, "float32")):
        plan = moecompile.plan(FFN().to(dtype), Calibrated(4, 2, 2), [torch.randn(8, 20, 6, dtype=dtype)])
        assert plan.config["precision"] == resolved and f"{ROUTER}weight" in plan.sites[0].fitted


def test_a_precision_that_is_none_is_refused() -> None:
    with pytest.raises(PlanError, match="--precision is 'float8'; it can be auto, float32, bfloat16"):
        Calibrated(precision="float8").check()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_commands_keep_the_memory_that_they_free() -> None:
    """In a process of its own: the resident size right after a large tensor is let go of, without and with the setting."""
    code = """
import sys, torch
from moecompile.memory import keep_freed
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
if sys.argv[1] == "keep" and not keep_freed():
    sys.exit(7)
before = resident()
tensor = torch.ones(64 << 20)
del tensor
print(resident() - before)
"""
    found = {}
    for how in ("keep", "leave"):
        done = subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=False)
        if done.returncode == 7:
            pytest.skip("the C library is another")
        assert done.returncode == 0, done.stderr
        found[how] = int(done.stdout)
    assert found["keep"] > 200 << 20 > found["leave"]
