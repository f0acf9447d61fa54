"""Balance and diagnosis: the metrics by hand on small choices, the shares of the error on a tiny model, the report's page."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from tuning import batches, dense_model, front_pair, pair

import moecompile
from moecompile.balancing import routing
from moecompile.errors import InputError
from moecompile.recipes import Calibrated, Contiguous, Static
from moecompile.recipes.neurons import token_weights
from moecompile.report import render
from moecompile.sites import DenseFFN


def test_usage_entropy_and_dead_experts() -> None:
    ids = [torch.tensor([[0, 1], [0, 2], [0, 1], [0, 2]])]
    found = routing(ids, experts=4, top_k=2, segment=2)
    assert found["usage"] == [1.0, 0.5, 0.5, 0.0] and found["dead"] == 1
    assert found["entropy"] == pytest.approx(1.5 * math.log(2) / math.log(4), abs=1e-4)


def test_srp_is_the_best_f1_of_all_fixed_sets() -> None:
    generator = torch.Generator().manual_seed(0)
    experts, top_k, segment = 5, 2, 4
    ids = torch.rand(12, experts, generator=generator).topk(top_k, dim=1).indices
    best = 0.0
    for size in range(1, experts + 1):  # the same size for every segment, the best set of it for each
        hits = 0
        for part in ids.split(segment):
            hits += max(
                sum(int(e in row) for row in part.tolist() for e in on) for on in itertools.combinations(range(5), size)
            )
        best = max(best, 2 * hits / (len(ids) * (size + top_k)))
    assert routing([ids], experts, top_k, segment)["srp"] == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize(
    ("choices", "slots", "rate"),
    [
        ([0, 0, 0, 0], 1, 3 / 4),  # steady: one miss
        ([0, 1, 0, 1], 1, 1 / 4),  # keeps what it has where that is needed as soon
        ([0, 1, 0, 1], 2, 2 / 4),
        ([0, 1, 2, 0, 1, 2], 2, 2 / 6),  # looks ahead: least recently used alone would never hit
    ],
)
def test_sch_by_hand(choices: list[int], slots: int, rate: float) -> None:
    found = routing([torch.tensor(choices)[:, None]], experts=4, top_k=1, segment=3, cache=float(slots))
    assert found["sch_experts"] == slots and found["sch"] == pytest.approx(rate, abs=1e-4)


def test_steady_routing_is_consistent_and_random_routing_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(256, 16, generator=generator).topk(4, dim=1).indices
    steady = random[::16].repeat_interleave(16, 0)
    low, high = routing([random], 16, 4), routing([steady], 16, 4)
    assert high["srp"] == 1.0 and high["srp_size"] == 4 and low["srp"] < 0.7
    assert high["sch"] > 0.95 > low["sch"]


def test_shares_of_the_error() -> None:
    dense, moe = pair()
    found = moecompile.balance(moe, dense, [{"input_ids": rows} for rows in batches(2)])
    assert found["tokens"] == 2 * 4 * 24 and [layer["site"] for layer in found["layers"]] == [
        "model.layers.0.mlp",
        "model.layers.1.mlp",
    ]
    for layer in found["layers"]:
        assert layer["error_router"] >= layer["error_oracle"] >= layer["error_neurons"] > 0
        assert 0 <= layer["routing_share"] <= 1 and 0 <= layer["granularity_share"] <= 1
        assert sum(layer["usage"]) == pytest.approx(layer["top_k"], abs=1e-3)


def test_more_neurons_on_lose_less() -> None:
    dense = dense_model()
    moe = moecompile.convert(dense, Calibrated(experts=6, shared=2, top_k=5), batches(2))
    few = moecompile.balance(moe, dense, [{"input_ids": batches(1)[0]}])["layers"][0]["error_router"]
    dense, moe = pair()
    many = moecompile.balance(moe, dense, [{"input_ids": batches(1)[0]}])["layers"][0]["error_router"]
    assert few < many


@pytest.mark.parametrize("kind", ["own", "front", "overlapping"])
def test_the_errors_from_the_dense_weights_token_by_token(kind: str) -> None:
    """Each choice of neurons written out with plain loops; a router at the front decides for the layer, too."""
    dense, moe = pair() if kind == "own" else front_pair(kind == "front")
    rows = batches(1)[0][:2]
    found = moecompile.balance(moe, dense, [{"input_ids": rows}])["layers"]
    assert len(found) == 2
    for number, site in enumerate(moe.moecompile_plan.sites):
        block = moe.get_submodule(site.site.placement.block)
        seen: list[tuple[Tensor, Tensor, Tensor]] = []

        def look(module: Any, args: Any, out: Tensor, seen: list[Any] = seen) -> None:
            x = args[0].flatten(0, -2)
            seen.append((x, module.choose(x)[0], out.flatten(0, -2)))

        hook = block.register_forward_hook(look)
        with torch.no_grad():
            moe(input_ids=rows)
        hook.remove()
        x, ids, out = (t.detach() for t in seen[0])
        ffn = DenseFFN.read(site.site, dense)
        y, h, down = ffn.output(ffn.hidden(x)), ffn.hidden(x), ffn.down
        weights = token_weights(y.norm(dim=1))
        idle = h - weights @ h / weights.sum()
        energy = idle.square() * down.square().sum(0)
        choosable = [set(expert) for expert in site.choosable]

        def error(
            neurons: list[set[int]], idle: Tensor = idle, y: Tensor = y, w: Tensor = weights, down: Tensor = down
        ) -> float:
            lost = sum(
                float(w[t] * (down @ torch.stack([v * (j not in on) for j, v in enumerate(idle[t])])).square().sum())
                for t, on in enumerate(neurons)
            )
            return lost / float(w @ y.square().sum(1))

        always = set(site.shared)
        routed = [always.union(*(choosable[e] for e in row)) for row in ids.tolist()]
        best = []
        for t in range(len(x)):
            sums = [sum(float(energy[t, j]) for j in expert) for expert in choosable]
            best.append(always.union(*(choosable[e] for e in sorted(range(len(sums)), key=lambda e: -sums[e])[: ids.shape[1]])))
        active = round(sum(map(len, routed)) / len(routed))
        free = [set(energy[t].topk(active).indices.tolist()) for t in range(len(x))]
        layer = found[number]
        assert layer["error_router"] == pytest.approx(error(routed), rel=1e-4)
        assert layer["error_oracle"] == pytest.approx(error(best), rel=1e-4)
        assert layer["error_neurons"] == pytest.approx(error(free), rel=1e-4)
        own = float(weights @ (out - y).square().sum(1)) / float(weights @ y.square().sum(1))
        assert layer["error_converted"] == pytest.approx(own, rel=1e-4)
        assert layer["routing_share"] == pytest.approx(1 - error(best) / error(routed), abs=1e-4)


def test_layers_are_diagnosed_in_shares_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few inputs may be held, every layer is measured, with the same result."""
    dense, moe = pair()
    whole = moecompile.balance(moe, dense, [{"input_ids": batches(1)[0]}])
    monkeypatch.setattr("moecompile.balancing._HELD", 1)
    held: list[set[str]] = []
    watch = moecompile.routing.watched

    def watched(model: Any, given: Any, **more: Any) -> Any:
        held.append(set(more["only"]))
        return watch(model, given, **more)

    monkeypatch.setattr("moecompile.balancing.watched", watched)
    assert moecompile.balance(moe, dense, [{"input_ids": batches(1)[0]}]) == whole
    assert held == [{"model.layers.0.mlp"}, {"model.layers.1.mlp"}]


def test_models_without_a_choice() -> None:
    dense = dense_model()
    static = moecompile.convert(dense, Static(active_fraction=0.5), batches(2))
    assert moecompile.balance(static, dense, [{"input_ids": batches(1)[0]}])["layers"] == []
    whole = moecompile.convert(dense, Contiguous(experts=4))
    assert moecompile.balance(whole, None, [{"input_ids": batches(1)[0]}])["layers"] == []
    with pytest.raises(InputError, match="not converted"):
        moecompile.balance(dense, None, [{"input_ids": batches(1)[0]}])
    with pytest.raises(InputError, match="no batches"):
        moecompile.balance(static, None, [])


def test_the_report_shows_diagnosis_and_tuning() -> None:
    dense, moe = pair()
    done = moecompile.tune(moe, dense, batches(3))
    record = {
        "router": "layerwise",
        "diagnosis": moecompile.balance(moe, dense, [{"input_ids": rows} for rows in batches(2)]),
        "tuning": [{"curve": done.curve, "stage": ["router"], "tokens": 7531, "perplexity_before": 41.5, "config": {}}],
    }
    page = render(record)
    assert "Loss of run 1 against tokens" in page and "7,531" in page.replace("\u202f", ",").replace("\u2009", ",")
    assert "41.50" in page and "SRP, m = 16" in page and "granularity" in page
    bare = render({"router": "layerwise"})
    assert "has not been tuned" in bare and "has not been diagnosed" in bare
