"""A router at the front of models that are none of transformers, and of graphs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import dense_model, without_inductor
from torch import Tensor, nn

import moecompile
from moecompile import InputError, MatchError
from moecompile.distil import Distillation
from moecompile.front import decide
from moecompile.recipes import ReadMe
from moecompile.teaching import distil_front, router_targets

SMALL: dict[str, Any] = {"router_width": 32, "router_heads": 2, "router_mlp": 32}
RECIPE = ReadMe(distillation=Distillation(steps=8), **SMALL)
VOCABULARY, LENGTH = 40, 16


class Mix(nn.Module):
    """Causal attention of two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, 16) -> (B, S, 16)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Feed(nn.Module):
    """A gated FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 48), nn.Linear(16, 48), nn.Linear(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, 16) -> (B, S, 16)."""
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Writer(nn.Module):
    """A language model of plain PyTorch, with an argument that no router could make sense of."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.words = nn.Embedding(LENGTH, 16), nn.Embedding(VOCABULARY, 16)
        self.mixes, self.feeds = (nn.ModuleList(kind() for _ in range(2)) for kind in (Mix, Feed))
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, text: Tensor, scale: float = 1.0, cache: Any = None) -> Tensor:
        """(B, S) -> (B, S, V)."""
        x = self.words(text.long()) + self.places(torch.arange(text.shape[1], device=text.device))
        for mix, feed in zip(self.mixes, self.feeds, strict=True):
            x = x + mix(x)
            x = x + feed(x)
        return self.head(x) * scale


class Masked(Writer):
    """The same with a mask of real tokens."""

    def forward(self, text: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        """(B, S), (B, S) -> (B, S, V)."""
        return super().forward(text) * attention_mask[..., None]


def writer(kind: type[Writer] = Writer) -> Writer:
    torch.manual_seed(0)
    return kind().eval()


def domains(wrap: Any = lambda ids: ids) -> dict[str, list[Any]]:
    """Two kinds of text: low and high numbers."""
    generator = torch.Generator().manual_seed(1)
    return {f"d{i}": [wrap(torch.randint(20 * i, 20 * i + 20, (3, LENGTH), generator=generator))] for i in range(2)}


@pytest.fixture(scope="module")
def plan() -> moecompile.MoEPlan:
    return moecompile.plan(writer(), RECIPE, domains())


def text() -> Tensor:
    return torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("form", ["module", "graph"])
@torch.no_grad()
def test_a_plain_model(plan: moecompile.MoEPlan, form: str) -> None:
    dense, ids = writer(), text()
    moe = moecompile.convert(dense, plan, domains(), form=form)
    y = moe(ids)
    assert (y - dense(ids)).abs().max() > 1e-3  # half of the neurons
    torch.testing.assert_close(moe(ids[:, :9]), y[:, :9], rtol=1e-5, atol=1e-5)  # what comes later does not matter
    assert moe.pregate.routing.plan is None
    scores, _ = decide(moe, ids)
    assert scores.shape == (ids.numel(), 2) and len(scores.argmax(1).unique()) == 2
    twin = copy.deepcopy(moe)
    assert torch.equal(twin(ids), y) and twin.pregate.routing is not moe.pregate.routing
    fast = without_inductor(moecompile.compile(moe))
    torch.testing.assert_close(fast(ids), y, rtol=1e-5, atol=1e-5)
    assert len(moecompile.last_graphs(fast)) == 1


@torch.no_grad()
def test_both_forms_compute_the_same(plan: moecompile.MoEPlan) -> None:
    live, graph = (moecompile.convert(writer(), plan, domains(), form=form) for form in ("module", "graph"))
    assert torch.equal(live(text()), graph(text()))
    bare = ReadMe(distillation=Distillation(steps=2), compensation="none", **SMALL)
    for form in ("module", "graph"):
        exact = moecompile.convert(writer(), bare, domains(), form=form)
        with moecompile.using_top_k(exact, None):
            torch.testing.assert_close(exact(text()), writer()(text()), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_transformers_model_as_a_graph() -> None:
    generator = torch.Generator().manual_seed(1)
    data = {f"d{i}": [{"input_ids": torch.randint(0, 60, (2, 12), generator=generator)}] for i in range(2)}
    made = moecompile.plan(dense_model(), RECIPE, data)
    live, graph = (moecompile.convert(dense_model(), made, data, form=form) for form in ("module", "graph"))
    ids = data["d0"][0]["input_ids"]
    torch.testing.assert_close(graph(input_ids=ids).logits, live(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_arguments(plan: moecompile.MoEPlan) -> None:
    moe, ids = moecompile.convert(writer(), plan, domains()), text()
    assert torch.equal(moe(text=ids, scale=0.5), moe(ids) * 0.5)
    with pytest.raises(InputError, match="does not know what 'cache' holds"):
        moe(ids, cache=(ids,))
    with pytest.raises(InputError, match="call the model with text"):
        moe(text=None)


@torch.no_grad()
def test_padding_changes_no_decision() -> None:
    def whole(ids: Tensor) -> dict[str, Tensor]:
        return {"text": ids, "attention_mask": torch.ones_like(ids)}

    moe = moecompile.convert(writer(Masked), RECIPE, domains(whole))
    ids = text()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    scores, real = decide(moe, {"text": ids, "attention_mask": mask})
    alone, _ = decide(moe, whole(ids[:1, 5:]))
    assert not real[:5].any() and real[5:].all()
    torch.testing.assert_close(scores[5:LENGTH], alone, rtol=1e-4, atol=1e-4)


def test_saving(plan: moecompile.MoEPlan, tmp_path: Path) -> None:
    moe = moecompile.convert(writer(), plan, domains())
    loaded = moecompile.load(moecompile.save(moe, tmp_path / "moe"), model=Writer())
    assert torch.equal(loaded(text()), moe(text()))


def test_teaching_goes_on(plan: moecompile.MoEPlan) -> None:
    dense = writer()
    moe = moecompile.convert(dense, plan, domains())
    batches = [ids for part in domains().values() for ids in part]
    before = moe.pregate.router.head.weight.clone()
    learnt = distil_front(moe, router_targets(moe, dense, batches), Distillation(steps=3))
    assert learnt and not torch.equal(moe.pregate.router.head.weight, before)


class Pair(Writer):
    """Reads two texts."""

    def forward(self, text: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        """(B, S), (B, S) -> (B, S, V)."""
        return super().forward(text) + self.head(self.words(other))


class Weighted(Writer):
    """Takes a tensor besides."""

    def forward(self, text: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        """(B, S), (B, S) -> (B, S, V)."""
        return super().forward(text) * weight[..., None]


class Seeing(Writer):
    """Embeds nothing."""

    def forward(self, pixels: Tensor) -> Tensor:  # type: ignore[override]
        """(B, S, 16) -> (B, S, 16)."""
        return self.feeds[1](self.feeds[0](pixels))


@pytest.mark.parametrize(
    ("kind", "wrap", "why"),
    [
        (Pair, lambda ids: (ids, ids.clone()), "embeds several of its inputs: other, text"),
        (Weighted, lambda ids: (ids, torch.ones(ids.shape)), "takes 'weight' besides token ids"),
        (Seeing, lambda ids: torch.randn(*ids.shape, 16), "embeds none of its inputs"),
    ],
)
def test_what_a_router_cannot_read(kind: type[Writer], wrap: Any, why: str) -> None:
    with pytest.raises(MatchError, match=why):
        moecompile.plan(writer(kind), RECIPE, domains(wrap))


def test_a_plan_of_another_kind_of_model(plan: moecompile.MoEPlan) -> None:
    from dataclasses import replace

    assert plan.pregate is not None
    with pytest.raises(MatchError, match="does not say where Writer takes them"):
        moecompile.convert(writer(), plan.with_front(replace(plan.pregate, argument=""), {}), domains())
