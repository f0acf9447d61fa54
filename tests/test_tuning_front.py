"""Tuning models with a router at the front: what trains, copies that stay equal, alternating rounds, going on after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tuning import batches
from tuning import front_pair as pair

import moecompile
from moecompile.errors import InputError
from moecompile.front import decide, front_of
from moecompile.parity import evaluating
from moecompile.teaching import router_targets
from moecompile.tied import largest_gap
from moecompile.tuning import TuneConfig, Tuning
from moecompile.tuning.distiller import front_loss

ROUNDS = TuneConfig(
    stages=("router", "experts", "norms", "attention"), learning_rate=3e-3, front_rate=3e-3, rounds=2, save_every=3,
    precision="float32",
)  # fmt: skip


@pytest.fixture(autouse=True)
def float32_unless_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers are compared here, so ``auto`` is float32 also on a CPU with bfloat16."""
    monkeypatch.setattr("moecompile.precision.native_bfloat16", lambda: False)


def run(folder: Path | None, kill_at: int | None = None, disjoint: bool = False) -> tuple[Any, Tuning]:
    """Tune a fresh pair in rounds; with ``kill_at`` the process dies by SIGKILL once that many steps are done."""

    def on_step(done: int, row: dict[str, float]) -> None:
        if done == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    dense, moe = pair(disjoint)
    return moe, moecompile.tune(moe, dense, batches(10), ROUNDS, folder=folder, on_step=on_step)


def kl(moe: Any, dense: Any, rows: torch.Tensor) -> float:
    """KL(dense || moe) of whole logits."""
    with torch.no_grad(), evaluating(moe, dense):
        p, q = (model(input_ids=rows).logits.double().log_softmax(-1) for model in (dense, moe))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("disjoint", [False, True])
@pytest.mark.parametrize("changes", [{}, {"checkpointing": True}, {"front_straight_through": True}, {"rounds": 3}], ids=str)
def test_tuning_recovers_and_copies_stay_equal(disjoint: bool, changes: dict[str, Any]) -> None:
    dense, moe = pair(disjoint)
    seen = batches(4)
    before = sum(kl(moe, dense, rows) for rows in seen)
    names = set(moe.state_dict())
    config = TuneConfig(stages=("router", "experts", "norms"), learning_rate=3e-3, **changes)
    done = moecompile.tune(moe, dense, seen, config, steps=48)
    assert sum(kl(moe, dense, rows) for rows in seen) < 0.75 * before
    assert len(done.curve) == 48 and set(moe.state_dict()) == names
    assert disjoint or largest_gap(moe) == 0.0
    assert all(p.requires_grad for name, p in moe.named_parameters() if not name.endswith(".idle"))
    front = front_of(moe)
    assert front is not None and not {"end", "_plan"} & set(front.__dict__) and front.routing.plan is None


@pytest.mark.parametrize("disjoint", [False, True])
def test_the_loss_shown_is_the_real_kl(disjoint: bool) -> None:
    dense, moe = pair(disjoint)
    rows = batches(1)
    expected = kl(moe, dense, rows[0])
    done = moecompile.tune(moe, dense, rows, TuneConfig(layer_weight=0.0, top_logits=98))
    assert done.curve[0]["kl"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("disjoint", [False, True])
@pytest.mark.parametrize("source", ["straight_through", "distillation"])
def test_the_front_learns_from_either_source_and_from_nothing_else(disjoint: bool, source: str) -> None:
    def moved(config: TuneConfig) -> set[str]:
        dense, moe = pair(disjoint)
        before = {name: p.detach().clone() for name, p in moe.named_parameters()}
        moecompile.tune(moe, dense, batches(2), config)
        return {name for name, p in moe.named_parameters() if not torch.equal(p, before[name])}

    straight = source == "straight_through"
    own = moved(TuneConfig(stages=("router",), front_straight_through=straight, front_weight=0.0 if straight else 1.0))
    assert "pregate.router.head.weight" in own and all(name.startswith("pregate.router.") for name in own)
    with pytest.raises(InputError, match="nothing would teach the router"):
        moved(TuneConfig(stages=("router", "experts"), front_weight=0.0))


@pytest.mark.parametrize("disjoint", [False, True])
def test_the_targets_are_those_of_the_conversion(disjoint: bool) -> None:
    """A step of the router alone shows the loss that the targets of :mod:`moecompile.teaching` give."""
    dense, moe = pair(disjoint)
    rows = batches(1)[0]
    targets = router_targets(moe, dense, [{"input_ids": rows}], target="amplitude" if disjoint else "overlap")
    scores, _ = decide(moe, {"input_ids": rows})
    expected = front_loss(scores, targets.overlap.flatten(0, 1).float(), 2)
    done = moecompile.tune(moe, dense, [rows], TuneConfig(stages=("router", "experts"), rounds=1), steps=2)
    assert done.curve[0]["loss"] == pytest.approx(float(expected), rel=1e-3)  # amplitudes are kept in 16 bits
    assert "kl" not in done.curve[0] and done.curve[1]["kl"] > 0


def test_each_part_of_a_round_trains_its_own() -> None:
    dense, moe = pair()
    before = {name: p.detach().clone() for name, p in moe.named_parameters()}
    seen: list[set[str]] = []

    def on_step(done: int, row: dict[str, float]) -> None:
        seen.append({name for name, p in moe.named_parameters() if not torch.equal(p, before[name])})
        before.update({name: p.detach().clone() for name, p in moe.named_parameters()})

    moecompile.tune(moe, dense, batches(10), ROUNDS, on_step=on_step)
    for step, names in enumerate(seen):
        front = {name for name in names if name.startswith("pregate.router.")}
        assert names and (names == front if step in (0, 5) else not front), step


def test_the_schedule_of_rounds() -> None:
    config = TuneConfig(stages=("router", "experts"), rounds=2, router_share=0.3, warmup=0.0)
    rows = [config.schedule(step, 20) for step in range(20)]
    assert [stages == ("router",) for stages, _ in rows] == ([True] * 3 + [False] * 7) * 2
    factors = [factor for _, factor in rows]
    assert factors[0] == factors[3] == 1.0 and factors[10] == factors[13] == pytest.approx(0.8)
    assert factors[3:10] == sorted(factors[3:10], reverse=True)
    assert TuneConfig().schedule(3, 20) == (("router", "experts"), TuneConfig().rate(3, 20))
    for steps in (4, 5, 7, 23):
        parts = [config.schedule(step, steps)[0] for step in range(steps)]
        assert parts[0] == ("router",) and parts[-1] == ("experts",) and parts.count(("router",)) >= 2


@pytest.mark.parametrize("disjoint", [False, True])
def test_a_killed_run_ends_where_it_would_have(tmp_path: Path, disjoint: bool) -> None:
    """Killed in the second round; the checkpoint was written at its beginning."""
    whole, done = run(tmp_path / "whole", disjoint=disjoint)
    job = f"import test_tuning_front as t, pathlib; t.run(pathlib.Path({str(tmp_path / 'killed')!r}), 7, {disjoint})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])}
    killed = subprocess.run(
        [sys.executable, "-c", f"import torch; torch.set_num_threads(1); {job}"],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again, rest = run(tmp_path / "killed", disjoint=disjoint)
    assert rest.resumed_from == 6 and rest.curve == done.curve
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))


def test_a_checkpoint_before_the_experts_first_step(tmp_path: Path) -> None:
    """AdamW has no moments yet for what has not been trained."""
    dense, moe = pair()
    config = TuneConfig(stages=("router", "experts"), rounds=1, router_share=0.5, save_every=1, precision="float32")
    whole = moecompile.tune(moe, dense, batches(4), config)

    def stop(done: int, row: dict[str, float]) -> None:
        if done == 1:
            raise KeyboardInterrupt

    dense, again = pair()
    with pytest.raises(KeyboardInterrupt):
        moecompile.tune(again, dense, batches(4), config, folder=tmp_path, on_step=stop)
    dense, again = pair()
    rest = moecompile.tune(again, dense, batches(4), config, folder=tmp_path)
    assert rest.resumed_from == 1 and rest.curve == whole.curve
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), moe.parameters(), strict=True))


def test_bad_settings_are_refused() -> None:
    dense, moe = pair()
    for changes, steps in (
        ({"rounds": 2, "stages": ("experts",)}, 8),
        ({"rounds": 2, "stages": ("router",)}, 8),
        ({"rounds": 2}, 3),
        ({"rounds": 2, "router_share": 1.0}, 8),
        ({"rounds": -1}, 8),
        ({"lora_rank": 2}, 8),
    ):
        with pytest.raises(InputError, match="--"):
            moecompile.tune(moe, dense, batches(1), TuneConfig(**changes), steps=steps)  # type: ignore[arg-type]
