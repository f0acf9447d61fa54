"""The norm before the head: found in any traceable language model, fitted to the dense model's next words, kept in plans."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import BY_NAME, FAMILIES, Family, batch_of
from torch import Tensor, nn

import moecompile
from moecompile.conversion import find_ffns
from moecompile.errors import PlanError
from moecompile.plans import NORM_FIT, MoEPlan
from moecompile.recipes import Calibrated
from moecompile.recipes.final_norm import FinalNorm, _Fit, find_final_norm, refit_final_norm
from moecompile.sites import DenseFFN
from moecompile.stream import Stream

PARAMETERS = {
    "llama": "model.norm.weight", "mistral": "model.norm.weight", "qwen2": "model.norm.weight", "qwen3": "model.norm.weight",
    "gemma3": "model.norm.weight", "phi3": "model.norm.weight", "gpt2": "transformer.ln_f.weight",
    "gpt_neox": "gpt_neox.final_layer_norm.weight", "opt": "model.decoder.final_layer_norm.weight",
    "bert": "cls.predictions.transform.LayerNorm.weight", "t5": "decoder.final_layer_norm.weight",
}  # fmt: skip
REFUSED = {"gemma2": "not those of a linear layer", "vit": "no logits"}
RECIPE = Calibrated(12, 2, 4)
NOTHING = lambda tokens: torch.zeros(len(tokens), dtype=torch.bool)  # noqa: E731


def found_in(model: nn.Module, batches: list[dict[str, Tensor]]) -> tuple[FinalNorm | str, Tensor]:
    """The norm of a model, and its states with every FFN dense."""
    captured, matched = find_ffns(model)
    found = find_final_norm(captured, getattr(model.config, "vocab_size", None))
    if isinstance(found, str):
        return found, torch.empty(0)
    stream = Stream(captured, matched.matches, batches, last=found.states)
    for match, _ in stream:
        ffn = DenseFFN.read(match.site, model)
        stream.feed(lambda rows, ffn=ffn: ffn.output(ffn.hidden(rows)))
    return found, stream.behind()


def speaking(family: Family = BY_NAME["llama"]) -> nn.Module:
    """A random model whose distributions of next words are far from even."""
    model = family.build(tie_word_embeddings=False)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(40)
        for name, parameter in model.named_parameters():
            if "down_proj" in name:
                parameter.mul_(20)
    return model


def calibration(count: int = 6) -> list[dict[str, Tensor]]:
    return [batch_of(BY_NAME["llama"], tokens=24, rows=4, seed=seed) for seed in range(count)]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_found_in_every_family(family: Family) -> None:
    """What is found makes the model's own logits."""
    model, batch = family.build(seed=2), batch_of(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() or "ln_f" in name:
                parameter.add_(torch.rand_like(parameter))
    found, states = found_in(model, [batch])
    if family.name in REFUSED:
        assert isinstance(found, str) and REFUSED[family.name] in found
        return
    assert isinstance(found, FinalNorm) and found.name == PARAMETERS[family.name]
    logits = _Fit(found, torch.float32)._logits(found.normalise(states), 1.0)
    with torch.no_grad():
        expected = model(**batch).logits.flatten(0, 1)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


class Tail(nn.Module):
    """One FFN, a norm, a head; ``kind`` says what is odd about it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.config = kind, type("Config", (), {"vocab_size": 50})()
        self.embed, self.up, self.down = nn.Embedding(50, 16), nn.Linear(16, 48), nn.Linear(48, 16)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 50)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.kind == "shared norm":
            x = self.norm(x)
        x = x + self.down(torch.relu(self.up(x)))
        h = x if self.kind == "no norm" else self.norm(x)
        logits = self.head(h)
        return torch.tanh(logits) if self.kind == "capped" else logits


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("shared norm", "no parameter of its own"),
        ("no norm", "does not read a norm"),
        ("capped", "not those of a linear layer"),
    ],
)
def test_what_cannot_be_fitted_says_why(kind: str, reason: str) -> None:
    torch.manual_seed(0)
    model, batches = Tail(kind), [torch.randint(0, 50, (4, 20)) for _ in range(3)]
    plan = moecompile.plan(model, RECIPE, batches)
    assert not plan.final_norm and reason in plan.config[NORM_FIT]["dense"]


def a_norm(words: int = 30, width: int = 8, offset: float = 0.0, bias: bool = False) -> FinalNorm:
    g = torch.Generator().manual_seed(0)
    gain = torch.rand(width, generator=g) + 0.5 - offset
    shift = torch.randn(width, generator=g) if bias else None
    head = torch.randn(words, width, generator=g)
    head_bias = torch.randn(words, generator=g) if bias else None
    return FinalNorm("norm.weight", None, lambda u: u, gain, offset, shift, 0.7 if bias else 1.0, head, head_bias)  # type: ignore[arg-type]


@pytest.mark.parametrize("bias", [False, True])
def test_the_gradient_is_that_of_the_divergence(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moecompile.recipes.final_norm._LOGITS", 30 * 5)  # several chunks
    g, found = torch.Generator().manual_seed(1), a_norm(bias=bias)
    u, dense = torch.randn(12, 8, generator=g), torch.randn(12, 8, generator=g)
    factors = torch.rand(8, generator=g).requires_grad_()
    fit = _Fit(found, torch.float32)
    value, gradient = fit.loss(u, dense, factors.detach())
    q, p = (fit._logits(*each).log_softmax(-1) for each in ((u, factors), (dense, 1.0)))
    expected = torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)
    expected.backward()
    assert value == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, factors.grad)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_stream_that_is_too_loud_is_turned_down(offset: float) -> None:
    """States that are a known factor of the dense ones, by channel: the gain becomes the dense one over it."""
    g, found = torch.Generator().manual_seed(1), a_norm(offset=offset)
    dense, louder = torch.randn(4000, 8, generator=g), 1.2 + 0.3 * torch.rand(8, generator=g)
    fit = _Fit(found, torch.float32)
    assert fit.one_factor(dense * 1.6, dense) == pytest.approx(1 / 1.6, rel=1e-2)
    refitted = refit_final_norm(found, dense * louder, dense, NOTHING(dense), g, torch.float32)
    assert refitted is not None and refitted.divergence[1] < 0.02 * refitted.divergence[0]
    torch.testing.assert_close(refitted.parameter + offset, (found.parameter + offset) / louder, rtol=0.05, atol=0.0)


def test_the_last_factor_comes_from_unseen_tokens() -> None:
    """Seen tokens are as loud as the dense ones, unseen ones twice as loud."""
    g, found = torch.Generator().manual_seed(1), a_norm()
    dense = torch.randn(4000, 8, generator=g)
    unseen = torch.arange(4000) % 8 == 0
    refitted = refit_final_norm(found, dense * (1.0 + unseen.float())[:, None], dense, unseen, g, torch.float32)
    assert refitted is not None and refitted.scale == pytest.approx(0.5, rel=0.03)


def test_layers_are_not_fitted_to_the_tokens_kept_for_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kept batch holds changes no layer, where the survey does not read it."""
    monkeypatch.setattr("moecompile.recipes.survey._some", lambda batches: batches[1:5])
    model, batches = speaking(), calibration(13)
    plans = []
    for seed in (200, 300):
        kept = {11: batch_of(BY_NAME["llama"], tokens=24, rows=4, seed=seed)}
        plans.append(moecompile.plan(model, RECIPE, [kept.get(index, batch) for index, batch in enumerate(batches)]))
    first, second = (plan.site_tensors("model.layers.0.mlp") for plan in plans)
    assert plans[0].to_dict()["sites"] == plans[1].to_dict()["sites"]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_nothing_to_gain_changes_nothing() -> None:
    g = torch.Generator().manual_seed(1)
    dense = torch.randn(300, 8, generator=g)
    assert refit_final_norm(a_norm(), dense, dense, NOTHING(dense), g, torch.float32) is None
    assert refit_final_norm(a_norm(), dense[:1], dense[:1], NOTHING(dense[:1]), g, torch.float32) is None


def test_module_and_graph_and_saved_plan_agree(tmp_path: Path) -> None:
    model, batches = speaking(), calibration()
    before = model.model.norm.weight.clone()
    plan = moecompile.plan(model, RECIPE, batches)
    fitted = plan.config[NORM_FIT]
    assert plan.final_norm == fitted["parameter"] == "model.norm.weight" and fitted["divergence"] < fitted["divergence_before"]
    plan.save(tmp_path / "plan.json")
    forms = [
        moecompile.convert(model, plan),
        moecompile.convert(model, plan, form="graph"),
        moecompile.convert(model, MoEPlan.load(tmp_path / "plan.json")),
    ]
    assert torch.equal(model.model.norm.weight, before)
    batch = batch_of(BY_NAME["llama"])
    with torch.no_grad():
        first, *others = (moe(**batch).logits for moe in forms)
        plain = moecompile.convert(model, plan.with_dense_norm("a test"))
        assert not torch.allclose(plain(**batch).logits, first, rtol=1e-3)
    for other in others:
        torch.testing.assert_close(other, first)
    moecompile.save(forms[0], tmp_path / "moe")
    assert torch.equal(moecompile.load(tmp_path / "moe").model.norm.weight, forms[0].model.norm.weight)


def test_the_fit_brings_the_model_nearer_to_the_dense_one() -> None:
    """On tokens that calibration did not see."""
    model, batches = speaking(), calibration()
    ids = batch_of(BY_NAME["llama"], tokens=24, rows=16, seed=99)

    def divergence(recipe: Calibrated) -> float:
        with torch.no_grad():
            p, q = (m(**ids).logits.log_softmax(-1).flatten(0, 1) for m in (model, moecompile.convert(model, recipe, batches)))
        return torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True).item()

    assert divergence(RECIPE) < divergence(replace(RECIPE, final_norm=False))


def test_all_experts_on_stays_the_dense_model_where_that_is_kept() -> None:
    model, batches = speaking(), calibration()
    moe = moecompile.convert(model, RECIPE, batches, keep_exact=True)
    assert not moe.moecompile_plan.final_norm
    batch = batch_of(BY_NAME["llama"])
    with torch.no_grad(), moecompile.using_top_k(moe, None):
        torch.testing.assert_close(moe(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-3)


def test_a_plan_of_another_model_is_refused() -> None:
    plan = moecompile.plan(speaking(), RECIPE, calibration())
    other = replace(plan.with_dense_norm(""), final_norm="model.missing.weight")
    with pytest.raises(PlanError, match="its values are not there"):
        other.validate()
    other = replace(other, tensors={**other.tensors, "model.missing.weight/gain": torch.ones(32)})
    with pytest.raises(PlanError, match=r"no parameter 'model\.missing\.weight'"):
        moecompile.convert(speaking(), other)
