"""Teaching the router: targets by hand, losses by numbers, resuming, and experts that stay tied."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import dense_model, tokens
from pregating import SMALL, random_router

import moecompile
from moecompile import InputError
from moecompile.capture import capture
from moecompile.distil import (
    Distillation,
    agreement,
    distil,
    loss_of,
    probabilities,
    statistics,
)
from moecompile.match import match
from moecompile.pregate import PreGateSpec, PreGatingRouter
from moecompile.recipes import ReadMe
from moecompile.sites import DenseFFN
from moecompile.targets import Targets, amplitudes, collect_targets, overlaps
from moecompile.teaching import distil_front, router_targets
from moecompile.tied import largest_gap, sum_copies, tied_experts

TABLE = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))


def embed(ids: torch.Tensor) -> torch.Tensor:
    """Embeddings of a vocabulary of 40."""
    return TABLE[ids]


def easy(windows: int = 24, layers: int = 0) -> Targets:
    """The expert of a token is the token modulo 4; with layers, shifted by the layer."""
    ids = torch.randint(0, 40, (windows, 10), generator=torch.Generator().manual_seed(1))
    best = ids % 4 if not layers else (ids[..., None] + torch.arange(layers)) % 4
    return Targets(ids, (torch.nn.functional.one_hot(best, 4) * 50 + 100).to(torch.int16))


def test_overlaps_by_hand() -> None:
    hidden = torch.tensor([[4.0, -3.0, 0.1, 0.2], [0.0, 1.0, -9.0, 0.5]])
    member = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    assert overlaps(hidden, member, 0.5).tolist() == [[2.0, 1.0], [1.0, 2.0]]
    sparse = torch.tensor([[0.0, 3.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])  # behind a ReLU: what is off does not count
    assert overlaps(sparse, member, 0.5).tolist() == [[1.0, 1.0], [0.0, 0.0]]


def test_amplitudes_by_hand() -> None:
    hidden, down = torch.tensor([[3.0, 1.0, 0.0], [1.0, 1.0, 4.0]]), torch.tensor([[3.0, 5.0, 0.0], [4.0, 0.0, 2.0]])
    member = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert amplitudes(hidden, down, member).tolist() == [[5.0, 4.0], [5.0, 4.0]]


def test_the_router_learns_which_experts_matter() -> None:
    """Two of four by amplitude, in each of two layers."""
    ids = torch.randint(0, 40, (24, 10), generator=torch.Generator().manual_seed(1))
    place = (ids[..., None, None] + torch.arange(2)[:, None] + torch.arange(4)) % 4  # [W, S, L, N]
    targets = Targets(ids, torch.where(place < 2, 20_000, 5_000).to(torch.int16))
    options = Distillation(steps=200, batch=8, lr=1e-2, target="amplitude", top_k=2)
    torch.manual_seed(0)
    router = PreGatingRouter(PreGateSpec(4, 8, groups=2, width=16, heads=2, mlp_width=16))
    first = agreement(router, embed, targets, options)
    learnt = distil(router, embed, targets, options)
    best = 2 * 16 / (2 * 16 + 2)
    assert learnt["oracle_energy"] == pytest.approx(best, abs=1e-4) and learnt["loss_last"] < 0.8 * learnt["loss_first"]
    assert learnt["energy"] > first["energy"] + 0.2
    with pytest.raises(InputError, match="aligned ids learn overlaps"):
        captured = capture(dense_model())
        member = [torch.ones(64, 2)] * 2
        collect_targets(captured, match(captured).matches, [tokens(1, 4, 0)], member, aligned=True, target="amplitude")


@pytest.mark.parametrize("aligned", [True, False])
def test_targets_are_those_of_each_layer(aligned: bool) -> None:
    """Against hooks on the live model."""
    dense = dense_model()
    captured = capture(dense)
    matches = match(captured).matches
    generator = torch.Generator().manual_seed(0)
    members = [(torch.rand(64, 3, generator=generator) < 0.5).float() for _ in matches]
    batches = [{"input_ids": tokens(2, 12, seed)} for seed in range(3)]
    found = collect_targets(captured, matches, batches, members, aligned=aligned)
    inputs: list[torch.Tensor] = []
    for m in matches:
        dense.get_submodule(m.site.name).register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        for number, batch in enumerate(batches):
            inputs.clear()
            dense(**batch)
            parts = [
                overlaps(DenseFFN.read(m.site, dense).hidden(x.reshape(-1, 32)), member, 0.5).view(2, 12, 3)
                for m, x, member in zip(matches, inputs, members, strict=True)
            ]
            expected = sum(parts) if aligned else torch.stack(parts, dim=2)
            assert (found.overlap[2 * number : 2 * number + 2] - expected).abs().max() <= 1  # (ties in float32)
            assert torch.equal(found.ids[2 * number : 2 * number + 2], batch["input_ids"])


def test_probabilities_and_statistics() -> None:
    overlap = torch.tensor([[[[3, 1], [2, 4]]]], dtype=torch.int16).view(1, 2, 2)
    mean, scale = statistics(overlap)
    assert mean.tolist() == [2.5, 2.5] and scale == pytest.approx(1.0)
    p = probabilities(overlap, Distillation(temperature=1.0), mean, scale)
    torch.testing.assert_close(p, overlap.float().softmax(-1))
    assert probabilities(overlap, Distillation(temperature=0.0), mean, scale).tolist() == [[[1, 0], [0, 1]]]
    shifted = probabilities(overlap, Distillation(temperature=0.0, centred=True), torch.tensor([2.9, 0.0]), scale)
    assert shifted.tolist() == [[[0, 1], [0, 1]]]


def test_losses_by_hand() -> None:
    scores, wanted = torch.randn(2, 5, 4), torch.randn(2, 5, 4).softmax(-1)
    q = scores.softmax(-1)
    forward = (wanted * (wanted / q).log()).sum(-1).mean()
    torch.testing.assert_close(loss_of(scores, wanted, Distillation()), forward)
    torch.testing.assert_close(loss_of(scores, wanted, Distillation(reverse=True)), (q * (q / wanted).log()).sum(-1).mean())
    local = ((q[:, 1:] - q[:, :-1]) ** 2).sum(-1).mean()
    torch.testing.assert_close(loss_of(scores, wanted, Distillation(locality=2.0)), forward + 2 * local)
    even = torch.zeros(1, 4, 4)
    one_sided = torch.zeros(1, 4, 4)
    one_sided[..., 0] = 9.0
    uniform = torch.full((1, 4, 4), 0.25)
    extra = [
        float(loss_of(s, uniform, Distillation(balance=1.0)) - loss_of(s, uniform, Distillation())) for s in (even, one_sided)
    ]
    assert extra[0] == pytest.approx(1.0) and extra[1] == pytest.approx(4.0, rel=0.01)


@pytest.mark.parametrize("layers", [0, 3])
def test_an_easy_rule_is_learnt(layers: int) -> None:
    router = random_router(PreGateSpec(4, 8, groups=max(layers, 1), **{**SMALL, "width": 32, "mlp_width": 64}))
    before = agreement(router, embed, easy(layers=layers))["agreement"]
    result = distil(router, embed, easy(layers=layers), Distillation(steps=150, batch=8, lr=5e-3))
    assert before < 0.5 and result["agreement"] > 0.8 and result["constant_agreement"] < 0.5
    assert result["loss_last"] < 0.3 * result["loss_first"] and not router.training


def test_locality_makes_choices_last() -> None:
    kept = []
    for weight in (0.0, 30.0):
        router = random_router(PreGateSpec(4, 8, **SMALL))
        options = Distillation(steps=60, batch=8, lr=5e-3, locality=weight)
        kept.append(distil(router, embed, easy(), options)["same_as_previous"])
    assert kept[1] > kept[0] + 0.1


def test_resumed_training_is_the_same(tmp_path: Path) -> None:
    options = Distillation(steps=12, batch=4, lr=3e-3)
    routers = [random_router(PreGateSpec(4, 8, **SMALL)) for _ in range(2)]
    distil(routers[0], embed, easy(), options, seed=3)

    class Stop(Exception):
        pass

    class Interrupting(moecompile.distil.Progress):
        def over(self, items: Any, text: str, total: int | None = None) -> Any:
            for step in items:
                if step == 7:
                    raise Stop
                yield step

    state = tmp_path / "router.safetensors"
    with pytest.raises(Stop):
        distil(routers[1], embed, easy(), options, seed=3, state=state, save_every=3, progress=Interrupting())
    fresh = random_router(PreGateSpec(4, 8, **SMALL), seed=99)
    result = distil(fresh, embed, easy(), options, seed=3, state=state, save_every=3)
    for name, tensor in routers[0].state_dict().items():
        torch.testing.assert_close(fresh.state_dict()[name], tensor, rtol=1e-5, atol=1e-7)
    assert result["steps"] == 12 and "loss_first" in result
    with pytest.raises(InputError, match="another training"):
        distil(fresh, embed, easy(), options, seed=4, state=state)
    taught = easy()
    with pytest.raises(InputError, match="another training"):
        distil(fresh, embed, Targets(taught.ids, taught.overlap.roll(1, -1)), options, seed=3, state=state)
    state.write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read"):
        distil(fresh, embed, easy(), options, seed=3, state=state)


@pytest.mark.parametrize("changes", [{"steps": -1}, {"lr": 0.0}, {"active": 1.0}, {"balance": -1.0}, {"held": 1.0}])
def test_settings_that_make_no_sense(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Distillation(**changes).check()


def test_windows_of_two_lengths_are_refused() -> None:
    dense = dense_model()
    captured = capture(dense)
    batches = [{"input_ids": tokens(1, 8)}, {"input_ids": tokens(1, 9)}]
    with pytest.raises(InputError, match="one length"):
        collect_targets(captured, match(captured).matches, batches, [torch.ones(64, 2)] * 2, aligned=True)


# Tied experts


def overlapping() -> Any:
    """A read-me model whose experts share neurons."""
    data = {f"d{n}": [{"input_ids": tokens(2, 16, n)}] for n in range(3)}
    recipe = ReadMe(active_fraction=0.6, distillation=Distillation(steps=2), router_width=16, router_heads=2, router_mlp=16)
    model = moecompile.convert(dense_model(), recipe, data).train()
    block = next(iter(moecompile.moe_blocks(model).values()))
    held = block.neuron[block.neuron >= 0]
    assert len(held.unique()) < len(held)
    return model


def test_copies_stay_one_neuron() -> None:
    """Several AdamW steps leave copies equal to the last bit of float32; without tying they part."""
    for tied in (True, False):
        model = overlapping()
        assert largest_gap(model) == 0.0
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        with tied_experts(model) if tied else contextlib.nullcontext(0) as count:
            assert count == (4 if tied else 0)
            for seed in range(3):
                optimizer.zero_grad()
                model(input_ids=tokens(2, 12, seed), labels=tokens(2, 12, seed)).loss.backward()
                optimizer.step()
        assert largest_gap(model) == 0.0 if tied else largest_gap(model) > 1e-5


def test_the_sum_is_the_gradient_of_one_weight() -> None:
    """Against autograd through one dense matrix from which every expert is read."""
    model = overlapping()
    block = next(iter(moecompile.moe_blocks(model).values()))
    weight = torch.randn(block.spec.dense_width, block.spec.hidden_size, requires_grad=True)
    factor = torch.randn(block.experts.down_proj.shape)
    index = block.neuron.clamp_min(0)
    real = (block.neuron >= 0)[:, None, :]
    (weight[index].transpose(1, 2) * factor * real).sum().backward()
    block.experts.down_proj.grad = factor * real
    assert sum_copies(model) == 1
    expected = weight.grad[index].transpose(1, 2)
    torch.testing.assert_close(block.experts.down_proj.grad * real, expected * real)


@pytest.mark.parametrize("disjoint", [False, True])
def test_a_converted_model_is_taught_on(disjoint: bool) -> None:
    """In bfloat16: the router changes, nothing else does, and agreement on the training text rises."""
    data = {f"d{n}": [{"input_ids": tokens(4, 16, n) % 20 + 20 * n + 1} for _ in range(2)] for n in range(3)}
    dense = dense_model()
    changes: dict[str, Any] = {"disjoint": True, "experts": 6, "shared": 2, "top_k": 2} if disjoint else {}
    recipe = ReadMe(distillation=Distillation(steps=0), router_width=16, router_heads=2, router_mlp=16, **changes)
    moe = moecompile.convert(dense, recipe, data).to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in moe.state_dict().items()}
    targets = router_targets(moe, dense, [batch for part in data.values() for batch in part])
    first = distil_front(moe, targets, Distillation(steps=0))["agreement"]
    learnt = distil_front(moe, targets, Distillation(steps=80, batch=8, lr=5e-3))
    assert learnt["agreement"] > first + 0.1
    changed = {name for name, tensor in moe.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.startswith("pregate.router.") for name in changed)
    with pytest.raises(InputError, match="no pre-gating router"):
        router_targets(dense, dense, [])


def test_overlaps_of_many_layers_do_not_wrap() -> None:
    """Nine layers, one expert that holds every neuron: 9 x 4,096 is more than 16 bits hold."""
    dense = dense_model(num_hidden_layers=9, intermediate_size=8192)
    captured = capture(dense)
    matches = match(captured).matches
    member = torch.zeros(8192, 2)
    member[:, 0], member[:4096, 1] = 1, 1
    found = collect_targets(captured, matches, [tokens(1, 4, 0)], [member] * 9, aligned=True)
    assert int(found.overlap[..., 0].min()) >= 9 * 4096 > int(found.overlap[..., 1].max()) > 0
