"""Recipes: what each chooses on statistics that are known, and what the refit promises."""

from __future__ import annotations

import pytest
import torch
from families import BY_NAME, FAMILIES, Family, batch_of
from torch import Tensor, nn

import moecompile
from moecompile.errors import InputError, PlanError
from moecompile.plans import DOWN, MEANS
from moecompile.recipes import Calibrated, Contiguous, Flap, Static
from moecompile.recipes.drift import clipped
from moecompile.recipes.neurons import Activity, choose_shared, group_neurons, token_weights
from moecompile.recipes.refit import idle_means, refit_down
from moecompile.recipes.routing import fit_router, route
from moecompile.sites import DenseFFN
from moecompile.stream import Stream


class FFN(nn.Module):
    """A ReLU FFN behind a residual."""

    def __init__(self, d: int = 6, f: int = 16) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d, f), nn.Linear(f, d)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def data(count: int = 6, d: int = 6) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    return [torch.randn(2, 20, d, generator=g) for _ in range(count)]


def hidden_of(model: FFN, batches: list[Tensor]) -> Tensor:
    x = torch.cat([b.reshape(-1, b.shape[-1]) for b in batches])
    return torch.relu(model.up(x)).detach()


def test_static_keeps_the_highest_energy() -> None:
    torch.manual_seed(0)
    model, batches = FFN(), data()
    h, w = hidden_of(model, batches), model.down.weight.detach()
    energy = h.square().mean(0) * w.square().sum(0)
    plan = moecompile.plan(model, Static(0.25), batches)
    assert set(plan.sites[0].shared) == set(energy.topk(4).indices.tolist())
    assert plan.sites[0].top_k == 0


def test_flap_ranks_over_all_layers() -> None:
    torch.manual_seed(0)
    model, batches = nn.Sequential(FFN(), FFN()), data()
    with torch.no_grad():
        model[1].down.weight[:, :3] *= 50  # a few neurons of the second layer outweigh the rest of their layer
    plan = moecompile.plan(model, Flap(0.5, plain_statistics=True), batches)
    h = hidden_of(model[0], batches)
    score = h.var(0, unbiased=False) * model[0].down.weight.detach().square().sum(0)
    first = plan.sites[0]
    assert set(first.shared) == set(score.topk(len(first.shared)).indices.tolist())
    assert sum(len(s.shared) for s in plan.sites) == 16 and len(plan.sites[1].shared) < len(first.shared)
    idle = list(first.experts[0])
    torch.testing.assert_close(plan.site_tensors(first.site.name)[MEANS][idle], h.mean(0)[idle])


def test_flap_is_not_led_by_a_few_outlier_tokens() -> None:
    """A neuron that is silent but for a sink token has the largest plain variance; weighted, it is pruned."""
    torch.manual_seed(0)
    model, batches = FFN(), data()
    with torch.no_grad():
        model.up.weight[5], model.up.bias[5] = torch.tensor([1.0, 0, 0, 0, 0, 0]), -50.0
    batches[0][0, 0, 0] = 400.0
    plain = moecompile.plan(model, Flap(0.25, plain_statistics=True), batches).sites[0]
    weighted = moecompile.plan(model, Flap(0.25), batches).sites[0]
    assert 5 in plain.shared and 5 not in weighted.shared


def test_a_refit_for_a_mask_of_ones_changes_nothing() -> None:
    torch.manual_seed(0)
    h, w, b = torch.randn(80, 7), torch.randn(5, 7), torch.randn(5)
    weights = torch.rand(80)

    def ones(start: int, stop: int) -> Tensor:
        return torch.ones(stop - start, 7)

    means = idle_means(h, ones, weights)
    assert torch.equal(means, torch.zeros(7))
    down, constant = refit_down(h, ones, means, w, b, h @ w.t() + b, weights)
    torch.testing.assert_close(down, w, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(constant, torch.zeros(5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_a_refit_minimises_its_objective(ridge: float) -> None:
    """Against torch's least squares on the stacked system; and it beats the means alone."""
    torch.manual_seed(1)
    t, f, d = 300, 6, 4
    h, w = torch.randn(t, f) @ torch.randn(f, f), torch.randn(d, f)
    keep = (torch.rand(t, f) < 0.6).float()
    weights, target = torch.rand(t) + 0.1, h @ w.t()

    def mask(start: int, stop: int) -> Tensor:
        return keep[start:stop]

    means = idle_means(h, mask, weights)
    down, constant = refit_down(h, mask, means, w, None, target, weights, ridge)
    z = torch.cat([keep * (h - means), torch.ones(t, 1)], 1).double()
    gap = (target - w @ means - z[:, :f].float() @ w.t()).double()
    root = weights.double().sqrt()[:, None]
    penalty = (ridge * (z * root).square().sum(0)).sqrt()
    penalty[-1] = 0
    system = torch.cat([z * root, torch.diag(penalty)])
    delta = torch.linalg.lstsq(system, torch.cat([gap * root, torch.zeros(f + 1, d).double()])).solution.float()
    torch.testing.assert_close(down, w + delta[:f].t(), atol=2e-3, rtol=1e-3)

    def loss(weight: Tensor, shift: Tensor) -> float:
        out = (keep * (h - means)) @ weight.t() + weight @ means + shift
        return float((weights[:, None] * (out - target).square()).sum())

    assert loss(down, constant) < 0.9 * loss(w, torch.zeros(d))


def test_grouping_finds_planted_experts() -> None:
    """Neurons driven by the same input direction belong together; every neuron is dealt out once."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(600, 4, generator=g)
    groups = torch.arange(4).repeat(6)
    hidden = torch.relu(x[:, groups] + 0.05 * torch.randn(600, 24, generator=g))
    down, weights = torch.ones(3, 24), torch.ones(600)
    activity = Activity.of(x, hidden, down, weights)
    experts = group_neurons(activity, torch.tensor([], dtype=torch.long), [6] * 4, g)
    assert sorted(n for e in experts for n in e) == list(range(24))
    assert sorted(sorted(e) for e in experts) == [list(range(k, 24, 4)) for k in range(4)]


def test_shared_neurons_include_those_that_sinks_need() -> None:
    torch.manual_seed(0)
    hidden = torch.rand(400, 30) + 0.5
    hidden[:, 7] = 0.0
    hidden[::100, 7] = 5000.0  # silent but on a few outlier tokens, whose whole output it is
    down = torch.ones(2, 30)
    weights = token_weights((hidden @ down.t()).norm(dim=1))
    x = torch.randn(400, 5)
    assert 7 in choose_shared(x, hidden, down, Activity.of(x, hidden, down, weights), 2, 0.5, weights).tolist()
    assert float(weights[0]) < 0.01 < float(weights[1])


@pytest.mark.parametrize(("on", "expected"), [(0.5, 3), (0.0, 0), (1.0, None)])
def test_shared_neurons_are_those_of_which_routing_would_lose_most(on: float, expected: int | None) -> None:
    """Neuron 0 has the largest energy, but the input tells when it fires; nothing tells it of neuron 3."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 4, generator=g)
    hidden = torch.cat([2 * torch.relu(x[:, :3]), torch.relu(torch.randn(2000, 1, generator=g)) * 1.9], 1)
    hidden[:, 1:3] *= 0.3
    down, weights = torch.ones(2, 4), torch.ones(2000)
    chosen = choose_shared(x, hidden, down, Activity.of(x, hidden, down, weights), 1, on, weights).tolist()
    assert len(chosen) == 1 and (expected is None or chosen == [expected])


def test_router_finds_the_expert_that_fires() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 6, generator=g)
    hidden = torch.relu(x).repeat_interleave(2, dim=1)
    experts = [[2 * e, 2 * e + 1] for e in range(6)]
    weight, bias = fit_router(x, hidden, torch.ones(1, 12), experts, torch.ones(2000))
    best = torch.relu(x).argmax(1)
    assert float((route(x, weight, bias, 1).float().argmax(1) == best).float().mean()) > 0.7
    assert route(x, weight, bias, 3).sum(1).unique().tolist() == [3]
    assert not route(x, weight, bias, 0).any()


def test_corrections_are_clipped_per_token() -> None:
    y = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    out = clipped(torch.tensor([[1.0, 0.0], [300.0, 400.0]]), y)
    torch.testing.assert_close(out[0], torch.tensor([1.0, 0.0]))
    assert float(out[1].norm()) == pytest.approx(4.0, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_calibrated_on_every_family(family: Family) -> None:
    """It beats the same number of neurons in stored order, routed without data, on tokens that it has not seen."""
    dense = family.build()
    rows = {"rows": 8} if family.name == "vit" else {"rows": 8, "tokens": 40}
    batches = [batch_of(family, seed=s, **rows) for s in range(1, 7)]
    ours = moecompile.verify(moecompile.convert(dense, Calibrated(6, 2, 2), batches), dense, batch_of(family, seed=9))
    blind = moecompile.verify(moecompile.convert(dense, Contiguous(6, 2, 2)), dense, batch_of(family, seed=9))
    mean = lambda report: sum(row["top_k"] for row in report.layers) / len(report.layers)  # noqa: E731
    assert mean(ours) < 0.8 * mean(blind)


def test_calibrated_is_repeatable_and_seeded() -> None:
    family = BY_NAME["llama"]
    dense, batches = family.build(), [batch_of(family, 40, 8)]
    first, second = (moecompile.plan(dense, Calibrated(6, 2, 2), batches, seed=5) for _ in range(2))
    assert first.to_dict() == second.to_dict()
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)


def test_calibrated_with_all_or_no_experts_on() -> None:
    family = BY_NAME["llama"]
    dense, batches = family.build(), [batch_of(family, 40, 8)]
    everything = moecompile.convert(dense, Calibrated(4, 2, 4), batches)
    assert moecompile.verify(everything, dense, batches[0]).exact
    nothing = moecompile.plan(dense, Calibrated(4, 2, 0), batches)
    assert nothing.router == "none" and DOWN in nothing.sites[0].fitted


def test_stream_reproduces_the_model() -> None:
    """Fed with dense outputs, the stream's inputs are the ones that the model's own FFNs get."""
    family = BY_NAME["gemma2"]
    dense = family.build()
    batches = [batch_of(family, seed=1), batch_of(family, tokens=5, rows=2, seed=2)]
    captured, matched = moecompile.conversion.find_ffns(dense)
    seen: list[list[Tensor]] = []
    hooks = [
        dense.get_submodule(m.site.name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        for m in matched.matches
    ]
    with torch.no_grad():
        for batch in batches:
            dense(**batch)
    for hook in hooks:
        hook.remove()
    stream = Stream(captured, matched.matches, batches)
    for number, (match, inputs) in enumerate(stream):
        ffn = DenseFFN.read(match.site, dense)
        for index, value in enumerate(inputs):
            torch.testing.assert_close(value, seen[index * len(matched.matches) + number])
        stream.feed(lambda rows, ffn=ffn: ffn.output(ffn.hidden(rows)))


def test_padding_is_left_out_of_the_statistics() -> None:
    family = BY_NAME["llama"]
    dense = family.build()
    short = batch_of(family, tokens=6, rows=3)
    padded = {
        "input_ids": torch.cat([short["input_ids"], torch.full((3, 4), 50)], 1),
        "attention_mask": torch.ones(3, 10, dtype=torch.long),
    }
    padded["attention_mask"][:, 6:] = 0
    plain = moecompile.plan(dense, Static(0.5, "means"), [short])
    masked = moecompile.plan(dense, Static(0.5, "means"), [padded], example_inputs=padded)
    assert [s.shared for s in plain.sites] == [s.shared for s in masked.sites]
    for name, tensor in plain.tensors.items():
        torch.testing.assert_close(tensor, masked.tensors[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (Calibrated(experts=0), "--experts is 0"),
        (Calibrated(shared=-1), "--shared is -1"),
        (Calibrated(experts=4, top_k=5), "--top-k is 5"),
        (Contiguous(experts=4, shared=0, top_k=0), "no neuron at all"),
        (Calibrated(experts=40, shared=20), "cannot be cut into 60"),
        (Calibrated(drift=2.0), "drift is 2.0"),
        (Static(0.0), "above 0"),
        (Static(0.5, "magic"), "no compensation 'magic'"),
        (Flap(1.5), "at most 1"),
    ],
)
def test_numbers_that_make_no_sense(recipe, reason: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(PlanError, match=reason):
        moecompile.plan(BY_NAME["llama"].build(), recipe, [batch_of(BY_NAME["llama"], 40, 4)])


def test_recipes_that_look_at_data_want_some() -> None:
    with pytest.raises(InputError, match="needs calibration data"):
        moecompile.plan(BY_NAME["llama"].build(), Calibrated(4, 2, 2))


def test_calibration_with_other_inputs_is_refused() -> None:
    with pytest.raises(InputError, match="does not have the inputs"):
        moecompile.plan(
            BY_NAME["llama"].build(), Static(), [{"tokens": torch.zeros(2, 3)}], example_inputs=batch_of(BY_NAME["llama"])
        )


def test_filter_fn_leaves_layers_dense() -> None:
    dense = BY_NAME["llama"].build()
    moe = moecompile.convert(dense, Contiguous(4), filter_fn=lambda module, name: "layers.1" in name)
    assert list(moecompile.moe_blocks(moe)) == ["model.layers.1.mlp"]
    with pytest.raises(moecompile.MatchError, match="filter_fn leaves no"):
        moecompile.convert(dense, Contiguous(4), filter_fn=lambda module, name: False)


def test_batches_may_be_bare_tensors() -> None:
    family = BY_NAME["llama"]
    dense, batch = family.build(), batch_of(family, 20, 4)
    by_name = moecompile.plan(dense, Static(), [batch])
    bare = moecompile.plan(dense, Static(), [batch["input_ids"]])
    assert by_name.to_dict() == bare.to_dict()
    moe = moecompile.convert(dense, bare)
    assert moecompile.verify(moe, dense, batch["input_ids"]).exact


def test_batches_from_a_tokenizer_with_padding(tokenizer) -> None:  # type: ignore[no-untyped-def]
    dense = BY_NAME["llama"].build()
    batch = tokenizer(
        ["the router sends every token", "some of its experts and never looks back"], return_tensors="pt", padding=True
    )
    batch.pop("token_type_ids", None)
    moe = moecompile.convert(dense, Calibrated(4, 2, 2), [batch])
    assert moecompile.verify(moe, dense, batch).exact is False
    assert len(moecompile.moe_blocks(moe)) == 2


@pytest.mark.parametrize(("precision", "allowed"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_fitted_outputs_are_the_blocks_own(precision: str, allowed: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the recipe feeds to the next layer is what the finished block computes."""
    family = BY_NAME["opt"]
    dense, batches = family.build(), [batch_of(family, 40, 8)]
    checked: list[float] = []
    honest = Stream.feed

    def feed(self, ffn, outputs=None):  # type: ignore[no-untyped-def]
        x = self.tokens(self._position, [state[self.matches[self._position].x] for state in self._states])
        with torch.no_grad():
            checked.append(float((ffn(x) - outputs).norm() / outputs.norm()))
        honest(self, ffn, outputs)

    monkeypatch.setattr(Stream, "feed", feed)
    moecompile.plan(dense, Calibrated(6, 2, 2, precision=precision), batches)
    assert len(checked) == 6 and max(checked) < allowed  # two layers: surveyed, then both streams
