"""Recipes of other papers: each splits as its paper says, and its router is the paper's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import BY_NAME, Family, batch_of
from torch import Tensor, nn

import moecompile
from moecompile.errors import InputError, PlanError
from moecompile.plans import MoEPlan
from moecompile.recipes import CMoE, ExpertWeaver, MoEfication, RandomSplit, Recipe
from moecompile.recipes.clusters import balanced_clusters
from moecompile.recipes.cmoe import mark, nearest
from moecompile.recipes.expertweaver import shared_slices, variation
from moecompile.recipes.moefication import fit_mlp
from moecompile.recipes.spectral import fit_spectral
from moecompile.sites import DenseFFN

LLAMA, OPT, GPT2 = BY_NAME["llama"], BY_NAME["opt"], BY_NAME["gpt2"]
SHAPES = [BY_NAME["phi3"], GPT2, BY_NAME["vit"]]  # gated and fused; plain, stored (in, out), with biases; no text
# 48 neurons in 8 slices of 6, half of them active
PEERS: dict[str, tuple[Recipe, str]] = {
    "cmoe": (CMoE(6, 2, 2), "representative"),
    "moefication": (MoEfication(8, 0, 4), "mlp"),
    "moefication, similarity": (MoEfication(8, 0, 4, "similarity"), "linear"),
    "expertweaver": (ExpertWeaver(6, 2, 2), "linear"),
    "random split": (RandomSplit(8, 0, 4), "linear"),
}


def batches_of(family: Family) -> list[dict[str, Tensor]]:
    rows = {"rows": 4} if family.name == "vit" else {"rows": 4, "tokens": 24}
    return [batch_of(family, seed=seed, **rows) for seed in (1, 2)]


def first_ffn(family: Family, batches: list[dict[str, Tensor]]) -> tuple[nn.Module, DenseFFN, Tensor]:
    """A model, its first FFN, and what that reads (T, D)."""
    dense = family.build()
    captured, matched = moecompile.conversion.find_ffns(dense)
    stream = moecompile.stream.Stream(captured, matched.matches, batches)
    return dense, DenseFFN.read(matched.sites[0], dense), stream.tokens(0, stream.inputs(0))


def router_of(dense: nn.Module, plan: MoEPlan, number: int = 0) -> nn.Module:
    router = list(moecompile.moe_blocks(moecompile.convert(dense, plan)).values())[number].router
    assert router is not None
    return router


@pytest.mark.parametrize("family", SHAPES, ids=lambda f: f.name)
@pytest.mark.parametrize("peer", PEERS)
def test_a_valid_balanced_split(family: Family, peer: str) -> None:
    """Every neuron has a place, slices are equal, half the neurons work, and with every expert on it is the dense model."""
    recipe, router = PEERS[peer]
    dense, batches = family.build(), batches_of(family)
    plan = moecompile.plan(dense, recipe, batches)
    for site in plan.sites:
        assert sorted([*site.shared, *(n for expert in site.experts for n in expert)]) == list(range(48))
        assert {len(expert) for expert in site.experts} == {6} and len(site.shared) % 6 == 0
        assert len(site.shared) // 6 + site.top_k == 4
        assert site.router == (router if site.top_k else "none")
    report = moecompile.verify(moecompile.convert(dense, plan), dense, batches[0])
    assert report.exact
    assert all(0.0 < row["top_k"] < 1.0 for row in report.layers)


@pytest.mark.parametrize("peer", PEERS)
def test_a_width_that_does_not_divide_drops_no_neuron(peer: str) -> None:
    recipe, _ = PEERS[peer]
    dense = LLAMA.build(intermediate_size=51)
    plan = moecompile.plan(dense, recipe, batches_of(LLAMA))
    for site in plan.sites:
        assert sorted([*site.shared, *(n for expert in site.experts for n in expert)]) == list(range(51))
        assert {len(expert) for expert in site.experts} <= {6, 7}
    assert moecompile.verify(moecompile.convert(dense, plan), dense, batches_of(LLAMA)[0]).exact


@pytest.mark.parametrize("peer", ["cmoe", "moefication", "expertweaver"])
def test_repeatable(peer: str) -> None:
    recipe, _ = PEERS[peer]
    dense, batches = LLAMA.build(), batches_of(LLAMA)
    first, second = (moecompile.plan(dense, recipe, batches, seed=3) for _ in range(2))
    assert first.to_dict() == second.to_dict()
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)


@pytest.mark.parametrize(
    "recipe",
    [CMoE(6, 2, 6), CMoE(6, 2, 0), MoEfication(8, 0, 8), ExpertWeaver(6, 2, 6), ExpertWeaver(6, 2, 0)],
    ids=str,
)
def test_nothing_to_choose_needs_no_router(recipe: Recipe) -> None:
    dense, batches = LLAMA.build(), batches_of(LLAMA)
    plan = moecompile.plan(dense, recipe, batches)
    share = plan.active_fraction
    for site in plan.sites:
        assert (site.router == "none") == (site.top_k in (0, len(site.experts)))
    assert share == pytest.approx(1.0 if recipe.top_k else 0.25)  # type: ignore[attr-defined]
    moecompile.convert(dense, plan)


# Clusters


def test_balanced_clusters_find_planted_groups() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(4) * 5
    group = torch.arange(4).repeat(6)
    points = centres[group] + 0.1 * torch.randn(24, 4, generator=generator)
    labels, means = balanced_clusters(points, points[:4], [6] * 4, 5)
    assert torch.equal(labels, group)
    torch.testing.assert_close(means, torch.stack([points[group == e].mean(0) for e in range(4)]))


def test_balanced_clusters_keep_their_sizes_against_the_data() -> None:
    """Nine points in one place and one elsewhere: sizes are still what was asked for."""
    points = torch.cat([torch.zeros(9, 2), torch.ones(1, 2)])
    labels, _ = balanced_clusters(points, torch.tensor([[0.0, 0.0], [1.0, 1.0]]), [5, 5], 5)
    assert labels.bincount().tolist() == [5, 5] and int(labels[9]) == 1


# CMoE


@pytest.mark.parametrize("family", [LLAMA, OPT], ids=lambda f: f.name)
def test_cmoe_shares_the_neurons_most_often_among_the_strongest(family: Family) -> None:
    batches = batches_of(family)
    dense, ffn, x = first_ffn(family, batches)
    plan = moecompile.plan(dense, CMoE(6, 2, 2, markers=5), batches)
    best = ffn.hidden(x).abs().argsort(dim=1, descending=True)[:, :5]
    rate = torch.bincount(best.flatten(), minlength=48)
    shared = list(plan.sites[0].shared)
    assert len(shared) == 12 and rate[shared].min() >= rate.topk(12).values.min()


@pytest.mark.parametrize("family", [LLAMA, OPT, GPT2], ids=lambda f: f.name)
def test_cmoe_scores_are_one_neurons_activation(family: Family) -> None:
    """score_e(x) = |h_r(x)| for one neuron r of expert e: gated, plain, with biases, stored either way."""
    batches = batches_of(family)
    dense, ffn, x = first_ffn(family, batches)
    with torch.no_grad():  # biases that matter
        for bias in (ffn.up_bias, ffn.gate_bias):
            if bias is not None:
                bias.normal_(generator=torch.Generator().manual_seed(1))
    plan = moecompile.plan(dense, CMoE(6, 2, 2), batches)
    router, hidden = router_of(dense, plan), ffn.hidden(x).abs()
    scores = router.scores(x).detach()  # type: ignore[operator]
    for number, expert in enumerate(plan.sites[0].experts):
        own = [neuron for neuron in expert if torch.equal(ffn.up[neuron], router.up[number])]  # type: ignore[index]
        assert len(own) == 1
        torch.testing.assert_close(scores[:, number], hidden[:, own[0]])


def test_cmoe_representative_is_nearest_to_the_clusters_mean() -> None:
    columns = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 1, 1]])
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    centres = torch.stack([columns[:3].mean(0), columns[3:].mean(0)])
    assert nearest(columns, centres, labels, torch.tensor([10, 11, 12, 20, 21, 22])).tolist() == [11, 21]


def test_cmoe_marks_a_tokens_strongest() -> None:
    _, ffn, x = first_ffn(LLAMA, batches_of(LLAMA))
    marked = mark(ffn, x, 7)
    assert marked.sum(1).unique().tolist() == [7.0]
    hidden = ffn.hidden(x).abs()
    assert bool(((hidden * marked).amax(1) == hidden.amax(1)).all())
    assert float(torch.where(marked > 0, hidden, torch.inf).amin(1).sub((hidden * (1 - marked)).amax(1)).min()) >= 0


def test_cmoe_sees_the_converted_prefix() -> None:
    """The second layer's plan depends on what the first one became."""
    batches = batches_of(LLAMA)
    dense = LLAMA.build()
    with torch.no_grad():  # so large that half of the first FFN missing changes what the second one reads
        dense.get_parameter("model.layers.0.mlp.down_proj.weight").mul_(2000)
    half = moecompile.plan(dense, CMoE(6, 2, 2), batches)
    whole = moecompile.plan(dense, CMoE(6, 2, 6), batches)
    assert half.sites[0].shared == whole.sites[0].shared
    assert (half.sites[1].shared, half.sites[1].experts) != (whole.sites[1].shared, whole.sites[1].experts)


def test_spectral_scores_of_full_rank_are_the_products_of_norms() -> None:
    _, ffn, x = first_ffn(LLAMA, batches_of(LLAMA))
    assert ffn.gate is not None
    experts = tuple(tuple(range(start, start + 6)) for start in range(0, 48, 6))
    fitted = fit_spectral(ffn, x, experts, 6)
    gate = x @ ffn.gate.t()
    share = (ffn.site.act(gate) / gate).square().mean(0).sqrt()
    for number, expert in enumerate(experts):
        index = list(expert)
        wanted = (gate * share)[:, index].norm(dim=1)
        torch.testing.assert_close((x @ fitted["gate"][number].t()).norm(dim=1), wanted, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            (x @ fitted["up"][number].t()).norm(dim=1), (x @ ffn.up[index].t()).norm(dim=1), atol=1e-5, rtol=1e-4
        )


def test_spectral_keeps_the_direction_that_the_tokens_have() -> None:
    """With tokens along one direction, rank 1 is enough; along it alone the scores are exact."""
    _, ffn, _ = first_ffn(LLAMA, batches_of(LLAMA))
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    tokens = torch.linspace(-1, 1, 40)[:, None] * direction
    experts = tuple(tuple(range(start, start + 6)) for start in range(0, 48, 6))
    fitted = fit_spectral(ffn, tokens, experts, 1)
    for number, expert in enumerate(experts):
        wanted = (tokens @ ffn.up[list(expert)].t()).norm(dim=1)
        torch.testing.assert_close((tokens @ fitted["up"][number].t()).norm(dim=1), wanted, atol=1e-4, rtol=1e-2)


def test_cmoe_with_a_spectral_router(tmp_path: Path) -> None:
    batches = batches_of(LLAMA)
    dense = LLAMA.build()
    plan = moecompile.plan(dense, CMoE(6, 2, 2, scores="spectral", rank=3), batches)
    assert [(site.router, site.router_rank) for site in plan.sites] == [("spectral", 3)] * 2
    assert plan.sites[0].experts == moecompile.plan(dense, CMoE(6, 2, 2), batches).sites[0].experts
    plan.save(tmp_path / "plan.json")
    assert MoEPlan.load(tmp_path / "plan.json").to_dict() == plan.to_dict()
    assert moecompile.verify(moecompile.convert(dense, plan), dense, batches[0]).exact


def test_a_spectral_router_is_refused_where_it_has_no_meaning() -> None:
    with pytest.raises(PlanError, match="needs a gated FFN without biases"):
        moecompile.plan(OPT.build(), CMoE(6, 2, 2, scores="spectral"), batches_of(OPT))


# MoEfication


def test_moefication_groups_neurons_of_like_gate_rows() -> None:
    dense = LLAMA.build()
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(8, 32, generator=generator)
    group = torch.arange(8).repeat(6)
    with torch.no_grad():  # alike in direction, not in length
        rows = centres[group] * torch.linspace(0.5, 2, 48)[:, None] + 0.02 * torch.randn(48, 32, generator=generator)
        dense.get_parameter("model.layers.0.mlp.gate_proj.weight").copy_(rows)
    plan = moecompile.plan(dense, MoEfication(8, 0, 4), batches_of(LLAMA))
    assert sorted(plan.sites[0].experts) == [tuple(range(e, 48, 8)) for e in range(8)]


def test_moefication_similarity_ranks_by_the_cosine() -> None:
    batches = batches_of(LLAMA)
    dense, ffn, x = first_ffn(LLAMA, batches)
    plan = moecompile.plan(dense, MoEfication(8, 0, 4, "similarity"), batches)
    assert ffn.gate is not None
    centres = torch.stack([ffn.gate[list(expert)].mean(0) for expert in plan.sites[0].experts])
    wanted = nn.functional.cosine_similarity(x[:, None], centres[None], dim=2).topk(4).indices.sort().values
    scores = router_of(dense, plan).scores(x)  # type: ignore[operator]
    assert torch.equal(scores.topk(4).indices.sort().values, wanted)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_moefication_mlp_learns_which_experts_are_active(scale: float) -> None:
    """Whatever the scale of the inputs, on tokens that it has not seen; a guess is right half of the time."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(8, 16, generator=generator)
    x = torch.randn(6000, 16, generator=generator)
    activity = torch.relu(x @ teacher.t())
    fitted = fit_mlp(scale * x[:5000], activity[:5000], 4, generator)
    scores = torch.tanh(scale * x[5000:] @ fitted["hidden"].t()) @ fitted["out"].t()
    chosen, wanted = scores.topk(4).indices, activity[5000:].topk(4).indices
    assert float((chosen[:, :, None] == wanted[:, None]).any(2).float().mean()) > 0.85


def test_moefication_mlp_is_what_the_block_computes() -> None:
    batches = batches_of(LLAMA)
    dense, _, x = first_ffn(LLAMA, batches)
    plan = moecompile.plan(dense, MoEfication(8, 0, 4), batches)
    tensors = plan.site_tensors(plan.sites[0].site.name)
    wanted = torch.tanh(x @ tensors["router.hidden"].t()) @ tensors["router.out"].t()
    torch.testing.assert_close(router_of(dense, plan).scores(x), wanted)  # type: ignore[operator]


# ExpertWeaver


@pytest.mark.parametrize("family", [LLAMA, GPT2], ids=lambda f: f.name)
def test_expertweaver_router_is_the_mean_row(family: Family) -> None:
    batches = batches_of(family)
    dense, ffn, _ = first_ffn(family, batches)
    plan = moecompile.plan(dense, ExpertWeaver(6, 2, 2), batches)
    rows = ffn.up if ffn.gate is None else ffn.gate
    tensors = plan.site_tensors(plan.sites[0].site.name)
    wanted = torch.stack([rows[list(expert)].mean(0) for expert in plan.sites[0].experts])
    torch.testing.assert_close(tensors["router.weight"], wanted)


def test_expertweaver_shares_more_where_neurons_are_steady() -> None:
    steady, varying = torch.full((48,), 0.01), torch.linspace(0.5, 2, 48)
    assert shared_slices([steady, varying], 2, 8, 4) == [4, 0]
    assert shared_slices([varying, varying], 2, 8, 4) == [2, 2]
    assert shared_slices([steady, varying], 0, 8, 2) == [0, 0]
    assert variation(torch.tensor([[0.0, 1.0], [0.0, 1.0]])).tolist() == [float("inf"), 0.0]  # what is never on is not steady
    assert shared_slices([steady, varying], 3, 8, 5) == [5, 0]  # never more than are active


def test_expertweaver_variation_is_across_contexts() -> None:
    profile = torch.tensor([[1.0, 1.0, -2.0], [1.0, 3.0, -2.2]])
    torch.testing.assert_close(variation(profile), torch.tensor([0.0, 0.5, 0.1 / 2.1]))


def test_expertweaver_clusters_neurons_that_are_active_together() -> None:
    """Neurons whose gates read one input, which is on in some sequences only, belong together."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(4, 24, bias=False), nn.Linear(4, 24), nn.Linear(24, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))

    torch.manual_seed(0)
    model = Gated()
    with torch.no_grad():
        model.gate.weight.copy_(torch.eye(4)[torch.arange(24) % 4] * torch.linspace(1, 2, 24)[:, None])
    batches = [4 * torch.rand(3, 20, 4) * (torch.rand(3, 1, 4) > 0.5) for _ in range(4)]
    plan = moecompile.plan(model, ExpertWeaver(4, 0, 2), batches)
    assert sorted(plan.sites[0].experts) == [tuple(range(e, 24, 4)) for e in range(4)]


def test_expertweaver_wants_several_sequences() -> None:
    with pytest.raises(InputError, match="at least two"):
        moecompile.plan(LLAMA.build(), ExpertWeaver(6, 2, 2), [batch_of(LLAMA, 24, 1)])


# Random split


def test_random_split_follows_the_seed_and_needs_no_data() -> None:
    dense = LLAMA.build()
    one, same, other = (moecompile.plan(dense, RandomSplit(8, 0, 4), seed=seed) for seed in (1, 1, 2))
    assert one.to_dict() == same.to_dict() != other.to_dict()
    assert one.sites[0].experts != one.sites[1].experts


# All of them


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (CMoE(0, 2, 0), "--experts is 0"),
        (CMoE(6, 2, 7), "--top-k is 7"),
        (CMoE(6, 0, 0), "no neuron at all"),
        (CMoE(markers=0), "--markers is 0"),
        (CMoE(rank=0), "--rank is 0"),
        (CMoE(scores="mlp"), "no scores 'mlp'"),
        (MoEfication(8, 2, 4), "no shared experts"),
        (MoEfication(8, 0, 4, "oracle"), "no scores 'oracle'"),
        (ExpertWeaver(6, -1, 2), "--shared is -1"),
        (RandomSplit(4, 0, 5), "--top-k is 5"),
    ],
)
def test_settings_that_make_no_sense(recipe: Recipe, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        recipe.check()


@pytest.mark.parametrize(
    "recipe", [CMoE(40, 20, 10), MoEfication(60, 0, 4), ExpertWeaver(40, 20, 4), RandomSplit(60, 0, 4)], ids=str
)
def test_more_slices_than_neurons(recipe: Recipe) -> None:
    with pytest.raises(PlanError, match="48 neurons; it cannot be cut into 60"):
        moecompile.plan(LLAMA.build(), recipe, batches_of(LLAMA))


@pytest.mark.parametrize("peer", [*PEERS, "cmoe, spectral"])
def test_saved_and_loaded(peer: str, tmp_path: Path) -> None:
    recipe = CMoE(6, 2, 2, scores="spectral", rank=2) if peer == "cmoe, spectral" else PEERS[peer][0]
    dense, batches = LLAMA.build(), batches_of(LLAMA)
    moe = moecompile.convert(dense, recipe, batches).eval()
    moe.save_pretrained(tmp_path / "moe")  # type: ignore[operator]
    with torch.no_grad():
        torch.testing.assert_close(moecompile.load(tmp_path / "moe")(**batches[0]).logits, moe(**batches[0]).logits)


CALIBRATED = ("--calibration-window", "32", "--calibration-tokens", "256")
COMMANDS: dict[str, tuple[str, ...]] = {
    "cmoe": ("--experts", "6", "--shared", "2", "--top-k", "2", "--markers", "5"),
    "moefication": ("--experts", "8", "--top-k", "4", "--scores", "similarity"),
    "expertweaver": ("--experts", "6", "--shared", "2", "--top-k", "2"),
    "random-split": ("--experts", "8", "--top-k", "4"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_command(name: str, dense_folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    from moecompile.cli import main

    out = tmp_path / "moe"
    options = ["--recipe", name, *COMMANDS[name], "--calibration", str(text), *CALIBRATED]
    assert main(["convert", str(dense_folder), str(out), *options, "--json", "--quiet"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["recipe"], result["router"], result["active_fraction"]) == (name, "layerwise", 0.5)
    assert result["parity_max_abs_error"] <= result["parity_tolerance"]
    assert main(["eval", str(out), "--text", str(text), "--window", "32", "--max-windows", "2", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["active_fraction"] == 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--recipe", "calibrated", "--scores", "mlp"), ("--scores", "calibrated")),
        (("--recipe", "moefication", "--markers", "3"), ("--markers", "moefication")),
        (("--recipe", "moefication", "--shared", "2"), ("--shared", "moefication")),
        (("--recipe", "cmoe", "--scores", "similarity"), ("similarity", "cmoe")),
        (("--recipe", "cmoe", "--scores", "magic"), ("--scores", "magic")),
        (("--recipe", "random-split", "--active-fraction", "0.5"), ("--active-fraction", "random-split")),
    ],
)
def test_command_refuses(
    options: tuple[str, ...], words: tuple[str, ...], dense_folder: Path, text: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from moecompile.cli import main

    assert main(["convert", str(dense_folder), str(tmp_path / "moe"), *options, "--calibration", str(text), "--quiet"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in error for word in words)
    assert not (tmp_path / "moe").exists()


def test_skip_scores_what_a_dense_prefix_scores() -> None:
    """The same positions; with every expert on, the same figure; and it is the mean loss of the positions behind the skip."""
    from moecompile.evaluate import perplexity

    dense = LLAMA.build()
    rows = torch.randint(3, 99, (3, 20), generator=torch.Generator().manual_seed(0))
    moe = moecompile.convert(dense, RandomSplit(8, 0, 8))
    skipped, prefixed = perplexity(moe, rows, skip=7), perplexity(moe, rows, dense_prefix=7)
    assert skipped["tokens"] == prefixed["tokens"] == 3 * 13
    assert skipped["perplexity"] == pytest.approx(prefixed["perplexity"], rel=1e-5)
    with torch.no_grad():
        logits = dense(input_ids=rows).logits[:, 6:-1]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 7:].flatten())
    assert skipped["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-5)
    with pytest.raises(InputError, match="--skip is 19"):
        perplexity(moe, rows, skip=19)
    with pytest.raises(InputError, match="give one of them"):
        perplexity(moe, rows, skip=3, dense_prefix=3)


def test_compiled_routers_choose_as_eager_ones() -> None:
    """Scores that no kernel knows are computed in front of it."""
    batches = batches_of(LLAMA)
    moe = moecompile.convert(LLAMA.build(), CMoE(6, 2, 2), batches).eval()
    with torch.no_grad():
        torch.testing.assert_close(moecompile.compile(moe)(**batches[0]).logits, moe(**batches[0]).logits)
