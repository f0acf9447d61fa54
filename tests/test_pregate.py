"""The router at the front: what it decides, both caches against the whole prefix, save and load."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import dense_model, tokens
from families import BY_NAME, FAMILIES
from pregating import SMALL, pregated_model, pregated_plan, random_router
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import moecompile
from moecompile import InputError, MatchError, PlanError
from moecompile.capture import capture
from moecompile.front import decide
from moecompile.plans import MoEPlan
from moecompile.pregate import PreGateSpec, PreGatingRouter, positions_of

CAUSAL = [family.name for family in FAMILIES if family.causal]
EXACT: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}


def decided(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    """The ids (B, S, ...) that blocks were given in a forward."""
    seen: list[Tensor] = []
    block = next(iter(moecompile.moe_blocks(model).values()))
    hook = block.register_forward_pre_hook(lambda module, args: seen.append(module.routing.plan.ids))
    with torch.no_grad():
        model(input_ids=ids, **inputs)
    hook.remove()
    return seen[0].unflatten(0, ids.shape)


# The router


def test_router_is_causal() -> None:
    router = random_router(PreGateSpec(5, 8, **SMALL))
    x = torch.randn(1, 9, 8)
    changed = x.clone()
    changed[:, 6:] = 1.0
    ours, theirs = router(x), router(changed)
    torch.testing.assert_close(ours[:6], theirs[:6])
    assert not torch.allclose(ours[6:], theirs[6:])


def test_router_knows_the_order_of_tokens() -> None:
    router = random_router(PreGateSpec(5, 8, **SMALL))
    x = torch.randn(1, 6, 8)
    swapped = x[:, [1, 0, 2, 3, 4, 5]]
    assert (router(x)[-1] - router(swapped)[-1]).abs().max() > 1e-3


@pytest.mark.parametrize(("groups", "shape"), [(1, (12, 5)), (3, (12, 3, 5))])
def test_scores_have_a_row_per_token(groups: int, shape: tuple[int, ...]) -> None:
    assert random_router(PreGateSpec(5, 8, groups=groups, **SMALL))(torch.randn(2, 6, 8)).shape == shape


def test_own_table_reads_ids() -> None:
    spec = PreGateSpec(5, 8, vocabulary=96, **SMALL)
    router = random_router(spec)
    assert router.proj is None and router(tokens(2, 6)).shape == (12, 5)


def test_paper_sizes_are_the_defaults() -> None:
    """About 18.0 M parameters at vocabulary 32000 and 7 experts (Read-ME, section 3)."""
    router = PreGatingRouter(PreGateSpec(7, 4096, vocabulary=32000))
    assert sum(p.numel() for p in router.parameters()) == pytest.approx(18.0e6, rel=0.01)


@pytest.mark.parametrize("changes", [{"experts": 0}, {"width": 18, "heads": 4}, {"vocabulary": -1}])
def test_sizes_that_make_no_sense_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(PlanError):
        PreGateSpec(**{"experts": 4, "input_width": 8, **changes})


def test_padding_rows_stay_finite() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    router = random_router(PreGateSpec(5, 8, **SMALL))
    x = torch.randn(2, 4, 8)
    scores = router(x, mask).view(2, 4, 5)
    assert torch.isfinite(scores).all()
    torch.testing.assert_close(scores[0, 2:], router(x[:1, 2:]).view(2, 5), **EXACT)
    assert positions_of(2, 4, 0, 4, mask, None, x.device).index.tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


# In a model


@pytest.mark.parametrize("aligned", [True, False])
def test_blocks_use_the_plan(aligned: bool) -> None:
    """The model's output is that of blocks with the router's choice put in by hand."""
    model, ids = pregated_model(aligned=aligned), tokens(2, 9)
    scores, _ = decide(model, {"input_ids": ids})
    chosen = scores.topk(2, dim=-1).indices
    assert len(chosen.flatten(0, -2).unique(dim=0)) > 3
    plain = moecompile.convert(dense_model(), moecompile.recipes.Contiguous(experts=6, shared=2, top_k=2)).eval()
    for number, block in enumerate(moecompile.moe_blocks(plain).values()):
        own = chosen if aligned else chosen[:, number]
        block.choose = lambda x, k=None, own=own: (own, torch.ones_like(own, dtype=x.dtype))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_dial_turned_in_the_middle() -> None:
    """The prompt by all experts still fills the router's cache."""
    model, ids = pregated_model(), tokens(1, 8)
    moecompile.set_top_k(model, None, phase="prefill")
    with torch.no_grad():
        cache = model(input_ids=ids[:, :7], use_cache=True).past_key_values
        chosen = decided(model, ids[:, 7:], past_key_values=cache)
    scores, _ = decide(model, {"input_ids": ids})
    assert torch.equal(chosen[0, -1].sort().values, scores[-1].topk(2).indices.sort().values)


def test_dial_of_single_layers() -> None:
    model, ids = pregated_model(), tokens(1, 8)
    moecompile.set_top_k(model, 3, layers=[0])
    assert decided(model, ids).shape[-1] == 3
    moecompile.set_top_k(model, None)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, dense_model()(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_encoder() -> None:
    model = pregated_model("bert")
    ids = tokens(2, 7)
    scores, _ = decide(model, {"input_ids": ids})
    assert torch.equal(decided(model, ids).flatten(0, 1), scores.topk(2, dim=-1).indices)


@pytest.mark.parametrize("name", ["t5", "vit"])
def test_models_without_one_text_are_refused(name: str) -> None:
    dense = BY_NAME[name].build()
    plan = moecompile.plan(dense, moecompile.recipes.Contiguous(experts=4, top_k=2))
    spec = PreGateSpec(4, 32, **SMALL)
    with pytest.raises(MatchError, match="token ids"):
        moecompile.convert(dense, plan.with_front(spec, {}))


def test_no_ids_and_foreign_caches_are_refused() -> None:
    model, ids = pregated_model(), tokens(1, 6)
    with pytest.raises(InputError, match="input_ids"):
        model(inputs_embeds=model.get_input_embeddings()(ids))
    foreign = dense_model()(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(InputError, match="another model"):
        model(input_ids=ids, past_key_values=foreign)
    with pytest.raises(PlanError, match="no routing plan"):
        next(iter(moecompile.moe_blocks(model).values()))(torch.randn(3, 32))


def test_plan_is_forgotten_behind_a_step() -> None:
    model = pregated_model()
    model(input_ids=tokens(1, 4))
    assert model.pregate.routing.plan is None


def test_router_learns_through_the_blocks() -> None:
    model = pregated_model(aligned=False).train()
    model(input_ids=tokens(2, 8), labels=tokens(2, 8)).loss.backward()
    assert model.pregate.router.head.weight.grad.abs().sum() > 0
    assert model.pregate.router.qkv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("name", "aligned"), [("gemma3", True), ("gpt2", False), ("opt", True)])
def test_round_trip(name: str, aligned: bool, tmp_path: Path) -> None:
    model = pregated_model(name, aligned)
    moecompile.save(model, tmp_path / "moe")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    ids = tokens(2, 7)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(loaded.generate(ids, eos_token_id=None, **GREEDY), model.generate(ids, eos_token_id=None, **GREEDY))
    assert loaded.moecompile_plan.router == "pregate"


def test_plan_round_trip(tmp_path: Path) -> None:
    plan = pregated_plan(dense_model(), aligned=False)
    plan.save(tmp_path / "plan.json")
    again = MoEPlan.load(tmp_path / "plan.json")
    assert again.to_dict() == plan.to_dict() and again.pregate == plan.pregate
    assert all(torch.equal(again.tensors[name], plan.tensors[name]) for name in plan.tensors)


def test_bad_plans_are_refused() -> None:
    plan = pregated_plan(dense_model())
    data = plan.to_dict()
    with pytest.raises(PlanError, match="scores"):
        MoEPlan.from_dict({**data, "pregate": {**data["pregate"], "experts": 5}})
    with pytest.raises(PlanError, match="has none"):
        MoEPlan.from_dict({name: value for name, value in data.items() if name != "pregate"})
    with pytest.raises(PlanError, match="layers"):
        MoEPlan.from_dict({**data, "pregate": {**data["pregate"], "groups": 3}})


def test_copies_are_independent() -> None:
    model = pregated_model()
    other = copy.deepcopy(model)
    moecompile.set_top_k(other, 5)
    assert model.pregate.routing.wanted() == 2 and other.pregate.routing.wanted() == 5
    block = next(iter(moecompile.moe_blocks(other).values()))
    assert block.routing is other.pregate.routing


@pytest.mark.parametrize("aligned", [True, False])
def test_export_is_one_graph_with_one_choice(aligned: bool) -> None:
    model, ids = pregated_model(aligned=aligned), tokens(3, 13)
    graph = capture(model).graph_module
    assert sum(node.target is torch.ops.aten.topk.default for node in graph.graph.nodes) == 1
    with torch.no_grad():
        ours = graph(input_ids=ids)
        torch.testing.assert_close(
            getattr(ours, "logits", ours[0] if isinstance(ours, tuple) else ours), model(ids).logits, **EXACT
        )


@pytest.mark.parametrize("aligned", [True, False])
def test_verify_looks_at_single_layers(aligned: bool) -> None:
    report = moecompile.verify(pregated_model(aligned=aligned), dense_model())
    assert report.exact and all(0 < row["top_k"] < 2 for row in report.layers)


def test_threads_have_decisions_of_their_own() -> None:
    model = pregated_model()
    texts = [tokens(1, 9, seed) for seed in range(2)]
    with torch.no_grad():
        alone = [model(input_ids=ids).logits for ids in texts]
    worst = [0.0, 0.0]

    def run(number: int) -> None:
        for _ in range(40):
            with torch.no_grad():
                ours = model(input_ids=texts[number]).logits
            worst[number] = max(worst[number], float((ours - alone[number]).abs().max()))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(worst) < 1e-4


def test_two_checkpointed_steps_before_one_backward() -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = pregated_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        losses = [model(input_ids=ids, labels=ids).loss for ids in (tokens(1, 20, 1), tokens(1, 20, 2))]
        sum(losses).backward()
        assert model.pregate.routing.plan is None
        copy.deepcopy(model)
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plainly = gradients(False)
    for name, gradient in gradients(True).items():
        if name in plainly:
            torch.testing.assert_close(gradient, plainly[name], rtol=1e-4, atol=1e-6, msg=name)


def test_packed_texts_are_decided_alone() -> None:
    """Positions that begin anew, no mask and no cache: how trainers put several texts into one row."""
    model, ids = pregated_model(), tokens(1, 10)
    index = torch.arange(5).repeat(2)[None]
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=index, use_cache=False).logits
        for part in (slice(0, 5), slice(5, 10)):
            alone = model(input_ids=ids[:, part], use_cache=False).logits
            torch.testing.assert_close(packed[:, part], alone, **EXACT)


def test_a_static_cache_with_a_mask_from_the_first_call() -> None:
    from transformers import StaticCache

    model, ids = pregated_model(), tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=16)
        ours = model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits
        theirs = model(input_ids=ids, attention_mask=mask).logits
    real = mask.bool()
    torch.testing.assert_close(ours[real], theirs[real], **EXACT)


def test_an_offloaded_cache_comes_round_to_its_first_layer() -> None:
    """After the last layer transformers fetches the next one, which is the router's; moving to another device needs one."""
    model, ids = pregated_model(), tokens(1, 4)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        cache.offloading, cache.only_non_sliding = True, True
        model.pregate._layer(cache)
        cache.offloading = False
        model(input_ids=ids, past_key_values=cache)
    fetched: list[int] = []
    for number, layer in enumerate(cache.layers[:-1]):
        layer.prefetch = lambda number=number: fetched.append(number)
    cache.layers[-1].prefetch()
    assert fetched == [0]
