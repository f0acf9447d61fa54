"""Tuning: its gradients are right, it recovers, it goes on after a kill, several processes do what one does."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from tuning import LENGTH, ROWS, batches, dense_model, pair, run

import moecompile
from moecompile.apply import moe_blocks
from moecompile.choice import centred_scores, oracle_loss
from moecompile.errors import InputError
from moecompile.parity import evaluating
from moecompile.products import blocked
from moecompile.recipes import Calibrated
from moecompile.tuning import TuneConfig, share_tensors
from moecompile.tuning.data import Windows

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def float32_unless_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers are compared here, so ``auto`` is float32 also on a CPU with bfloat16."""
    monkeypatch.setattr("moecompile.precision.native_bfloat16", lambda: False)


def test_centred_scores_are_positive_for_the_chosen_alone() -> None:
    scores = torch.randn(40, 9, generator=torch.Generator().manual_seed(0)) * 1000
    ids, centred = centred_scores(scores, 4)
    assert ((centred > 0).sum(1) == 4).all() and (centred.gather(1, ids) > 0).all()
    torch.testing.assert_close(centred_scores(scores * 1e-3, 4)[1], centred)


def test_oracle_loss_prefers_the_oracle_and_forgives_ties() -> None:
    amplitudes = torch.tensor([[3.0, 2.0, 1.0, 0.5]]).expand(5, -1)
    right, wrong = torch.tensor([[2.0, 1.0, -1.0, -2.0]]), torch.tensor([[2.0, -1.0, 1.0, -2.0]])
    assert oracle_loss(right.expand(5, -1), amplitudes, 2) < oracle_loss(wrong.expand(5, -1), amplitudes, 2)
    tie = torch.tensor([[3.0, 1.5 + 1e-6, 1.5, 0.5]])
    assert float((oracle_loss(right, tie, 2) - oracle_loss(wrong, tie, 2)).abs()) < 1e-5


@pytest.mark.parametrize("source", ["straight_through", "oracle"])
def test_routers_learn_from_either_source_and_from_nothing_else(source: str) -> None:
    dense, moe = pair()
    before = {name: p.detach().clone() for name, p in moe.named_parameters()}
    straight = source == "straight_through"
    config = TuneConfig(stages=("router",), straight_through=straight, oracle_weight=0.0 if straight else 1.0)
    moecompile.tune(moe, dense, batches(2), config)
    moved = {name for name, p in moe.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(".router." in name for name in moved)
    assert {name.split(".router")[0] for name in moved} == set(moe_blocks(moe))  # in every layer
    dense, moe = pair()
    with pytest.raises(InputError, match="nothing would teach the routers"):
        moecompile.tune(moe, dense, batches(2), TuneConfig(stages=("router", "experts"), straight_through=False))


# Recovery


def kl(moe: Any, dense: Any, rows: Tensor) -> float:
    """KL(dense || moe) of whole logits."""
    with torch.no_grad(), evaluating(moe, dense):
        p, q = (model(input_ids=rows).logits.double().log_softmax(-1) for model in (dense, moe))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"checkpointing": True},
        {"lora_rank": 4},
        {"kl_stride": 3},
        {"stages": ("router", "experts", "norms")},
        {"stages": ("router", "experts", "norms", "attention")},
        {"label_weight": 0.1},  # the text is random: more of it teaches against the teacher
        {"precision": "bfloat16"},
        {"layer_weight": 0.0, "oracle_weight": 0.1},
    ],
    ids=lambda changes: "-".join(changes) or "default",
)
def test_tuning_recovers(changes: dict[str, Any]) -> None:
    dense, moe = pair()
    kept = {name: p.detach().clone() for name, p in dense.named_parameters()}
    seen = batches(4)
    before = sum(kl(moe, dense, rows) for rows in seen)
    names, modes = set(moe.state_dict()), [module.training for module in moe.modules()]
    done = moecompile.tune(moe, dense, seen, TuneConfig(learning_rate=3e-3, **changes), steps=60)
    after = sum(kl(moe, dense, rows) for rows in seen)
    assert after < 0.75 * before
    assert done.tokens == 60 * ROWS * LENGTH and len(done.curve) == 60 and done.parameters > 0
    assert set(moe.state_dict()) == names and [module.training for module in moe.modules()] == modes
    assert all(p.requires_grad for p in moe.parameters()) and not any("forward" in m.__dict__ for m in moe.modules())
    assert all(torch.equal(p, kept[name]) for name, p in dense.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for model in (moe, dense) for m in model.modules())


def test_the_loss_shown_is_the_real_kl() -> None:
    dense, moe = pair()
    rows = batches(1)
    expected = kl(moe, dense, rows[0])
    done = moecompile.tune(moe, dense, rows, TuneConfig(layer_weight=0.0, top_logits=98))
    assert done.curve[0]["kl"] == pytest.approx(expected, rel=1e-3)


def test_checkpointed_layers_give_the_same_numbers() -> None:
    curves = []
    for flag in (False, True):
        dense, moe = pair()
        config = TuneConfig(checkpointing=flag, oracle_weight=0.1)
        curves.append([row["loss"] for row in moecompile.tune(moe, dense, batches(3), config).curve])
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)


def test_padding_does_not_count() -> None:
    rows = batches(1)[0]
    padded = {"input_ids": torch.cat([rows, torch.zeros_like(rows)], 1)}
    padded["attention_mask"] = torch.cat([torch.ones_like(rows), torch.zeros_like(rows)], 1)
    losses = []
    for batch in (rows, padded):
        dense, moe = pair()
        losses.append(moecompile.tune(moe, dense, [batch], TuneConfig(oracle_weight=0.1)).curve[0])
    for part in ("loss", "kl", "layers", "router", "tokens"):
        assert losses[0][part] == pytest.approx(losses[1][part], rel=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt", "phi3", "gpt_neox"])
def test_other_families(family: str) -> None:
    dense, moe = pair(family)
    rows = batches(1)
    expected = kl(moe, dense, rows[0])
    done = moecompile.tune(moe, dense, rows, TuneConfig(oracle_weight=0.1, top_logits=98), steps=3)
    assert done.curve[0]["kl"] == pytest.approx(expected, rel=1e-2, abs=1e-5)
    assert all(done.curve[0][part] > 0 for part in ("layers", "router"))


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_model_trains_in_float32_and_stays_narrow(dtype: torch.dtype, precision: str) -> None:
    dense, moe = (model.to(dtype) for model in pair())
    before = [{name: p.clone() for name, p in model.named_parameters()} for model in (dense, moe)]
    done = moecompile.tune(moe, dense, batches(2), TuneConfig(precision=precision, learning_rate=1e-3))
    assert done.steps == 2
    for model, old in zip((dense, moe), before, strict=True):
        assert all(p.dtype == dtype for p in model.parameters())
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, old[name])}
        assert (not changed) if model is dense else changed


def test_auto_is_bfloat16_where_the_cpu_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert TuneConfig().dtype(cpu) == torch.float32 and TuneConfig().dtype(cuda) == torch.bfloat16
    monkeypatch.setattr("moecompile.precision.native_bfloat16", lambda: True)
    assert TuneConfig().dtype(cpu) == torch.bfloat16 and TuneConfig(precision="float32").dtype(cpu) == torch.float32


def test_bfloat16_gives_the_losses_of_float32() -> None:
    curves = []
    for precision in ("float32", "bfloat16"):
        dense, moe = pair()
        config = TuneConfig(precision=precision, label_weight=0.3, learning_rate=1e-3)
        curves.append(moecompile.tune(moe, dense, batches(4), config, steps=12).curve)
    for exact, rounded in zip(*curves, strict=True):
        assert rounded["kl"] == pytest.approx(exact["kl"], rel=0.05)
        assert rounded["label"] == pytest.approx(exact["label"], rel=0.01)
        assert rounded["layers"] == pytest.approx(exact["layers"], rel=0.05)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_by_blocks_is_attention(groups: int) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 4, 300, 8, dtype=torch.float64, requires_grad=True)  # 300: two blocks and a part
    key, value = (torch.randn(2, groups, 300, width, dtype=torch.float64, requires_grad=True) for width in (8, 6))
    own = blocked(query, key, value, 0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(own, expected)
    upstream = torch.randn_like(own)
    for mine, reference in zip(
        torch.autograd.grad(own, (query, key, value), upstream),
        torch.autograd.grad(expected, (query, key, value), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference)


def test_the_text_itself_can_be_learned_from() -> None:
    dense, moe = pair()
    rows = batches(1)
    with torch.no_grad(), evaluating(moe):
        logits = moe(input_ids=rows[0]).logits[:, :-1]
        expected = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[0][:, 1:].flatten()))
    first = moecompile.tune(moe, dense, rows, TuneConfig(label_weight=0.5, layer_weight=0.0)).curve[0]
    assert first["label"] == pytest.approx(expected, rel=1e-4)
    assert first["loss"] == pytest.approx(first["kl"] + 0.5 * first["label"], rel=1e-5)


def test_a_model_without_routing_can_be_tuned() -> None:
    """The controls: a pruned model, and the dense one as a converted model with everything on."""
    for share in (0.5, 1.0):
        dense = dense_model()
        kept = moecompile.convert(
            dense, moecompile.recipes.Static(active_fraction=share), [{"input_ids": rows} for rows in batches(2, 11)]
        )
        seen = batches(2)
        config = TuneConfig(stages=("experts", "attention"), learning_rate=1e-3, label_weight=1.0)
        curve = moecompile.tune(kept, dense, seen, config, steps=20).curve
        assert sum(row["label"] for row in curve[-2:]) < sum(row["label"] for row in curve[:2])


def test_shared_tensors_are_held_once() -> None:
    dense, moe = pair()
    logits = dense(input_ids=batches(1)[0]).logits
    saved = share_tensors(moe, dense)
    own = {p.data_ptr() for p in moe.parameters()}
    ffn = {p.data_ptr() for name, p in dense.named_parameters() if ".mlp." in name}
    assert {p.data_ptr() for p in dense.parameters()} - ffn <= own and not ffn & own
    assert saved == sum(p.numel() * 4 for name, p in dense.named_parameters() if ".mlp." not in name)
    assert torch.equal(dense(input_ids=batches(1)[0]).logits, logits)
    with pytest.raises(InputError, match="not the one"):
        share_tensors(moe, dense_model(seed=5))


def test_a_model_whose_attention_was_tuned_is_still_that_dense_models() -> None:
    from moecompile.cli.tune import _stages

    changes = {"vocab_size": 99, "num_attention_heads": 16, "head_dim": 16}  # most of what is left is attention's
    dense = dense_model(**changes)
    moe = moecompile.convert(dense, Calibrated(6, 2, 2, precision="float32"), [{"input_ids": r} for r in batches(4, 11)])
    stages = ("experts", "attention", "norms")
    moecompile.tune(moe, dense, batches(2), TuneConfig(stages=stages, learning_rate=1e-3))
    with pytest.raises(InputError, match="not the one"):
        share_tensors(moe, copy.deepcopy(dense), TuneConfig())
    tuned = _stages({"tuning": [{"stage": ["router"]}, {"stage": list(stages)}]})
    assert tuned == {"router", *stages} and share_tensors(moe, dense, TuneConfig(), tuned) > 0
    with pytest.raises(InputError, match="not the one"):
        share_tensors(moe, dense_model(seed=5, **changes), TuneConfig(), tuned)


def test_the_dense_model_can_be_asked_between_the_steps() -> None:
    dense, moe = pair()
    rows = batches(1)[0]
    padded = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
    padded["attention_mask"][:, -4:] = 0
    asked = []

    def on_step(done: int, row: dict[str, float]) -> None:
        asked.append(dense(input_ids=rows[:1, :7]).logits.shape)

    moecompile.tune(moe, dense, [padded], TuneConfig(oracle_weight=0.1), steps=2, on_step=on_step)
    assert len(asked) == 2


def test_a_model_in_training_with_dropout() -> None:
    dense, moe = pair("gpt2")
    for model in (dense, moe):
        model.train()
        assert any(isinstance(each, torch.nn.Dropout) and each.p > 0 for each in model.modules())
    assert moecompile.tune(moe, dense, batches(1)).steps == 1 and moe.training


def test_bad_settings_leave_the_model_as_it_was() -> None:
    dense = dense_model()
    kept = moecompile.convert(dense, moecompile.recipes.Static(), [{"input_ids": rows} for rows in batches(2, 11)])
    names = {name for name, _ in kept.named_parameters()}
    with pytest.raises(InputError, match="nothing of the kind"):
        moecompile.tune(kept, dense, batches(1), TuneConfig(lora_rank=2))
    assert {name for name, _ in kept.named_parameters()} == names and all(p.requires_grad for p in kept.parameters())


# Resumption


def trained(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    (state,) = folder.glob("step-*")
    return load_file(state / "tensors.safetensors")


@pytest.mark.parametrize("rank", [0, 3])
def test_a_killed_run_ends_where_it_would_have(rank: int, tmp_path: Path) -> None:
    whole, done = run(tmp_path / "whole", lora_rank=rank)
    command = [sys.executable, str(HERE / "tuning.py"), str(tmp_path / "killed"), "5", str(rank)]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["step-00000003"]  # of save_every 3
    again, rest = run(tmp_path / "killed", lora_rank=rank)
    assert rest.resumed_from == 3 and rest.curve == done.curve
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))
    first, second = trained(tmp_path / "whole"), trained(tmp_path / "killed")
    assert set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("rank", [0, 3])
def test_a_finished_run_is_not_gone_on_from_with_the_model_that_it_made(rank: int, tmp_path: Path) -> None:
    dense, moe = pair()
    config = TuneConfig(stages=("experts",), learning_rate=3e-3, lora_rank=rank)
    moecompile.tune(moe, dense, batches(2), config, folder=tmp_path)
    made = {name: p.detach().clone() for name, p in moe.named_parameters()}
    with pytest.raises(InputError, match="another model"):
        moecompile.tune(moe, dense, batches(2), config, folder=tmp_path)
    assert all(torch.equal(p, made[name]) for name, p in moe.named_parameters())


def test_a_run_without_steps_left_gives_what_it_made(tmp_path: Path) -> None:
    """Killed between its last checkpoint and its end."""
    whole, done = run(tmp_path, steps=3)
    again, rest = run(tmp_path, steps=3)
    assert rest.resumed_from == 3 and rest.curve == done.curve and rest.tokens_per_second > 0
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))


def test_another_run_is_not_gone_on_from(tmp_path: Path) -> None:
    run(tmp_path, steps=3)
    with pytest.raises(InputError, match="--restart"):
        run(tmp_path, steps=4)


# Several processes


@pytest.mark.parametrize("rank", [0, 3])
def test_two_processes_do_what_one_does(rank: int, tmp_path: Path) -> None:
    """Also after one was killed at a step behind the last checkpoint, which ends the other."""
    config = TuneConfig(
        learning_rate=3e-3, oracle_weight=0.1, checkpointing=True, save_every=2, precision="float32", lora_rank=rank
    )  # fmt: skip
    script = tmp_path / "job.py"
    script.write_text(
        "import json, os, signal, sys, torch, moecompile\n"
        "torch.set_num_threads(1)\n"
        "from tuning import batches, pair\n"
        "from moecompile.tuning.parallel import process_group, world\n"
        "def on_step(done, row):\n"
        "    if done == int(sys.argv[2]):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "dense, moe = pair()\n"
        f"config = moecompile.{config!r}\n"
        "with process_group(torch.device('cpu')):\n"
        "    done = moecompile.tune(moe, dense, batches(4), config, folder=sys.argv[1], on_step=on_step)\n"
        "    if world()[0] == 0:\n"
        "        total = [float(p.detach().double().abs().sum()) for p in moe.parameters()]\n"
        "        made = {'curve': done.curve, 'total': total, 'world': world()[1], 'first': done.resumed_from}\n"
        "        print(json.dumps(made))\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]), "OMP_NUM_THREADS": "1"}

    def job(folder: str, kill_at: int) -> dict[str, Any]:
        command = [*launch, str(tmp_path / folder), str(kill_at)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
        assert (done.returncode == 0) == (kill_at == 0), done.stderr[-3000:]
        return json.loads(done.stdout.strip().splitlines()[-1]) if kill_at == 0 else {}

    two = job("state", 0)
    assert two["world"] == 2 and two["first"] == 0
    dense, moe = pair()
    one = moecompile.tune(moe, dense, batches(4), config)
    for own, other in zip(one.curve, two["curve"], strict=True):
        for part in ("loss", "kl", "layers", "router", "tokens", "gradient_norm"):
            assert own[part] == pytest.approx(other[part], rel=2e-3), (part, own["step"])
    total = [float(p.detach().double().abs().sum()) for p in moe.parameters()]
    assert total == pytest.approx(two["total"], rel=1e-3)
    stored = trained(tmp_path / "state")  # whole tensors, from shards
    if not rank:
        own = dict(moe.named_parameters())
        assert all(stored[f"value/{name}"].shape == own[name].shape for name in own if f"value/{name}" in stored)
    job("killed", 3)
    rest = job("killed", 0)
    assert rest["first"] == 2 and rest["curve"] == two["curve"] and rest["total"] == two["total"]


# Bad input, data


def test_bad_settings_are_refused() -> None:
    dense, moe = pair()
    for changes in ({"stages": ("heads",)}, {"learning_rate": -1.0}, {"warmup": 2.0}, {"save_every": 0}, {"precision": "int8"}):
        with pytest.raises(InputError, match="--"):
            moecompile.tune(moe, dense, batches(1), TuneConfig(**changes))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no MoE block"):
        moecompile.tune(dense, dense, batches(1))
    with pytest.raises(InputError, match="not one batch"):
        moecompile.tune(moe, dense, [])
    with pytest.raises(InputError, match="takes input_ids"):
        moecompile.tune(moe, dense, [{"input_ids": batches(1)[0], "labels": batches(1)[0]}])
    with pytest.raises(InputError, match=r"linear head|head's product"):
        moecompile.tune(moe, torch.nn.Linear(2, 2), batches(1))
    exact = moecompile.convert(
        dense, moecompile.recipes.Calibrated(experts=6, shared=2, top_k=2), batches(2), keep_exact=True
    )  # fmt: skip
    for stages in (("router", "experts"), ("norms",), ("router", "attention")):
        with pytest.raises(InputError, match="--stage router"):
            moecompile.tune(exact, dense, batches(1), TuneConfig(stages=stages))


def test_a_loss_that_is_no_number_stops_the_run() -> None:
    dense, moe = pair()
    with torch.no_grad():
        next(iter(moe_blocks(moe).values())).experts.down_proj.fill_(float("nan"))
    with pytest.raises(moecompile.MoECompileError, match="the loss is nan"):
        moecompile.tune(moe, dense, batches(1))


def test_windows_are_dealt_equally_and_read_again() -> None:
    parts = [torch.full((5, 4), 1.0), torch.full((2, 4), 2.0)]
    rows = Windows(parts, 4, 3, seed=0)
    assert len(rows) == 4 and rows[0].shape == (3, 4)
    seen = torch.cat([rows[i] for i in range(len(rows))])[:, 0]
    assert [int((seen == value).sum()) for value in (1, 2)] == [6, 6]
    assert torch.equal(rows.order, Windows(parts, 4, 3, seed=0).order)
    assert not torch.equal(rows.order, Windows(parts, 4, 3, seed=1).order)


def test_windows_are_dealt_by_weights_from_the_first_on() -> None:
    parts = [torch.full((5, 4), 1.0), torch.full((40, 4), 2.0), torch.full((9, 4), 3.0)]
    rows = Windows(parts, 16, 3, seed=0, weights=[3, 2, 1])
    assert len(rows) == 16
    seen = torch.cat([rows[i] for i in range(len(rows))])[:, 0]
    for count in (6, 12, 24, 48):
        assert [int((seen[:count] == value).sum()) for value in (1, 2, 3)] == [count // 2, count // 3, count // 6]
    assert rows.order[: 2 * 5].bincount(minlength=5)[:5].tolist() == [1] * 5  # a file is read whole before it is read again


def test_the_rate_rises_and_falls() -> None:
    config = TuneConfig(warmup=0.2)
    rates = [config.rate(step, 50) for step in range(50)]
    assert rates.index(max(rates)) == 10 and rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) == 1.0 and 0 < rates[-1] < 0.01
