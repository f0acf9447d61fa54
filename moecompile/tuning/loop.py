"""The training loop: :func:`tune`."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..apply import moe_blocks
from ..errors import InputError, MoECompileError
from ..front import front_of
from ..parity import evaluating
from ..progress import Progress
from ..tied import sum_copies
from .attention import use_blocks
from .config import TuneConfig
from .distiller import PARTS, Distiller
from .parallel import has_blocks, mean, part_of, shard, whole, world
from .state import latest, read_state, write_state
from .student import Inside, choose_parameters, layer_path, merge_updates, parameter_groups, ready_for_training
from .teacher import Teacher, check_head

Batch = Mapping[str, Tensor] | Tensor


@dataclass(frozen=True)
class Tuning:
    """What a run did.

    Attributes:
        steps: optimizer steps in all, also those before a resumption.
        tokens: tokens learned from.
        seconds: of training in all, checkpoints included.
        tokens_per_second: of this process's own steps; where none were left, of those before.
        parameters: numbers that were trained.
        curve: per step ``step, tokens, loss, kl, label, layers, router, gradient_norm, learning_rate``; without ``kl, label,
            layers`` where only a router at the front learned.
        resumed_from: the step that the run went on from, 0 for a fresh one.
    """

    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    parameters: int
    curve: list[dict[str, float]] = field(default_factory=list)
    resumed_from: int = 0


def tune(
    moe: nn.Module,
    dense: nn.Module,
    batches: Sequence[Batch],
    config: TuneConfig | None = None,
    *,
    steps: int | None = None,
    folder: str | Path | None = None,
    facts: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> Tuning:
    """Train a converted model, in place, to do what the dense one does.

    Args:
        moe: a converted causal language model of transformers, on its device.
        dense: the model that it was converted from, on the same device; it is not changed.
        batches: (B, L) token numbers, or inputs with ``input_ids`` and perhaps ``attention_mask``; step i takes batch
            i mod len(batches), so a lazy sequence reads only what is used.
        config: the settings.
        steps: how many; by default one for each batch.
        folder: where checkpoints are kept; one that is there already, with the same settings, is gone on from.
        facts: JSON-ready facts about the data that a resumption must share, as it must the weights that the run began with.
        progress: a bar with loss, tokens/s and time left; silent by default.
        on_step: called with the number of steps done and the newest row of the curve.

    Returns:
        What was done. The model is in the mode (train or eval) that it was in, in its own dtype.

    Raises:
        InputError: the settings, the models or a batch make no sense, or the folder holds another run.
        MoECompileError: the loss is no longer a number.
    """
    config, progress = config or TuneConfig(), progress or Progress()
    config.check()
    has_blocks(moe)
    steps = len(batches) if steps is None else steps
    if steps < 1 or len(batches) < 1:
        raise InputError("there is nothing to train on: not one batch")
    if steps < 2 * config.rounds:
        raise InputError(f"--rounds is {config.rounds}, but there are {steps} steps: a round takes two at least")
    device = next(moe.parameters()).device
    _check_routers(moe, config)
    start = {} if folder is None else {"model": _mark(moe)}  # what nobody goes on from needs none
    settings = json.loads(json.dumps({"config": config.to_dict(), "steps": steps, **start, **(facts or {})}))
    states = [(parameter, parameter.requires_grad, parameter.dtype) for parameter in moe.parameters()]
    frozen = [(parameter, parameter.requires_grad) for parameter in dense.parameters()]
    narrow: list[tuple[Tensor, torch.dtype]] = []
    with evaluating(moe, dense):
        check_head(moe, _inputs(batches[0], device))
        check_head(dense, _inputs(batches[0], device))
        try:
            chosen = choose_parameters(moe, config)
            narrow = _widened(moe, dense) if config.dtype(device) == torch.float32 else []
            run = _Run(moe, dense, chosen, config, device)
            result = run.train(batches, steps, settings, Path(folder) if folder is not None else None, progress, on_step)
        finally:
            merge_updates(moe)
            for parameter, wanted, dtype in states:
                parameter.data = parameter.data.to(dtype)
                parameter.requires_grad_(wanted)
            for tensor, dtype in narrow:
                tensor.data = tensor.data.to(dtype)
            for parameter, wanted in frozen:
                parameter.requires_grad_(wanted)
    return result


def _check_routers(moe: nn.Module, config: TuneConfig) -> None:
    """Refuse routers that are to learn and get no gradient.

    Raises:
        InputError: the settings leave them none.
    """
    if "router" not in config.stages:
        return
    if front_of(moe) is not None:
        if not config.front_weight and not config.front_straight_through:
            raise InputError("--stage router: --front-weight is 0, so that nothing would teach the router at the front")
    elif not config.straight_through and not config.oracle_weight:
        raise InputError("--stage router: with --no-straight-through and no --oracle-weight nothing would teach the routers")


def _mark(moe: nn.Module) -> str:
    """A short mark of the weights that a run starts from, by which a resumption knows them."""
    return f"{sum(float(parameter.detach().double().sum()) for parameter in moe.parameters()):.9e}"


def _widened(*models: nn.Module) -> list[tuple[Tensor, torch.dtype]]:
    """Models of bfloat16 or float16 in float32 from here on; the tensors that were narrow, and their types."""
    tensors = {id(tensor): tensor for model in models for tensor in (*model.parameters(), *model.buffers())}
    narrow = [(tensor, tensor.dtype) for tensor in tensors.values() if tensor.dtype in (torch.bfloat16, torch.float16)]
    for tensor, _ in narrow:
        tensor.data = tensor.data.float()
    return narrow


def _inputs(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """A batch on its device.

    Raises:
        InputError: it holds something else than ``input_ids`` and ``attention_mask``.
    """
    given = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    if "input_ids" not in given or set(given) - {"input_ids", "attention_mask"}:
        raise InputError(f"a batch has the inputs {', '.join(given)}; tuning takes input_ids and attention_mask")
    return {name: value.to(device) for name, value in given.items()}


class _Run:
    """One run: the models made ready, the optimizer, the loop."""

    def __init__(
        self, moe: nn.Module, dense: nn.Module, chosen: dict[str, str], config: TuneConfig, device: torch.device
    ) -> None:
        self.moe, self.chosen, self.config, self.device = moe, chosen, config, device
        rank, count = world()
        student = moe if count == 1 else copy.deepcopy(moe)
        teacher_model = dense if count == 1 else copy.deepcopy(dense)
        self.student = student
        self.inside = Inside()
        blocks = moe_blocks(student)
        self.main = rank == 0
        self.tied = any(block.neuron is not None for block in blocks.values())
        if self.tied and count > 1:
            raise InputError("experts that overlap are tuned by one process: a neuron's copies may lie on several")
        plan = moe.moecompile_plan  # type: ignore[union-attr]
        self.front = front_of(student) is not None
        oracle = config.oracle_weight > 0
        if self.front:  # in rounds its targets are asked for when it is its turn
            oracle = "router" in config.stages and config.front_weight > 0 and not config.rounds
        top_k = {path: block.top_k for path, block in blocks.items()}
        dtype = config.dtype(device)
        with contextlib.ExitStack() as undo:
            undo.callback(ready_for_training(student, config, self.inside))
            self.teacher = Teacher(teacher_model, plan, config.top_logits, config.layer_weight > 0, oracle)  # type: ignore[arg-type]
            undo.callback(self.teacher.close)
            undo.callback(use_blocks(student, teacher_model))
            self.distiller = Distiller(student, self.teacher, self.inside, top_k, config, dtype)
            if count > 1:
                shard(self.distiller, student, teacher_model, list(dict.fromkeys(map(layer_path, blocks))), device)
            groups = parameter_groups(student, chosen, config)
            self.parameters = [parameter for group in groups for parameter in group["params"]]
            self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=count == 1)
            self._undo = undo.pop_all()

    def train(
        self,
        batches: Sequence[Batch],
        steps: int,
        settings: dict[str, Any],
        folder: Path | None,
        progress: Progress,
        on_step: Callable[[int, dict[str, float]], None] | None,
    ) -> Tuning:
        """All steps that are not done yet; the result lands in the caller's model."""
        torch.manual_seed(self.config.seed)
        curve: list[dict[str, float]] = []
        first, before = 0, 0.0
        try:
            if folder is not None and (found := latest(folder)) is not None:
                facts = read_state(found, settings, self.student, self.chosen, self.optimizer)
                first, curve, before = facts["step"], facts["curve"], facts["seconds"]
                progress.say(f"going on from step {first} of {steps}")
            start, tokens = time.perf_counter(), int(curve[-1]["tokens"]) if curve else 0
            already = tokens
            with progress.bar("tuning", steps, first) as bar:
                for step in range(first, steps):
                    inputs = _inputs(batches[step % len(batches)], self.device)
                    tokens += int(inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel())
                    row = self._step(inputs, step, steps)
                    curve.append({"step": step + 1, "tokens": tokens, **row})
                    seconds = time.perf_counter() - start
                    bar.show(f"loss {row['loss']:.3f}, {(tokens - already) / seconds:.0f} tokens/s")
                    done = step + 1
                    if folder is not None and (done % self.config.save_every == 0 or done == steps):
                        facts = {"settings": settings, "curve": curve, "seconds": before + seconds}
                        write_state(folder, done, self.student, self.chosen, self.optimizer, facts)
                    if on_step is not None and self.main:
                        on_step(done, curve[-1])
            seconds = time.perf_counter() - start
            self._return()
        finally:
            self._undo.close()
        size = sum(parameter.numel() for parameter in self.parameters)
        rate = (tokens - already) / seconds if first < steps else tokens / before if before else 0.0
        return Tuning(steps, tokens, round(before + seconds, 3), round(rate, 2), size, curve, first)

    def _step(self, inputs: dict[str, Tensor], step: int, steps: int) -> dict[str, float]:
        stages, factor = self.config.schedule(step, steps)
        front_alone = self.front and self.config.rounds > 0 and stages == ("router",)
        losses = self.distiller({name: part_of(value) for name, value in inputs.items()}, step, front_alone)
        losses[0].backward()
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
            for parameter in group["params"] if group["stage"] not in stages else ():
                parameter.grad = None  # AdamW leaves it alone, moments and all
        if self.tied:
            sum_copies(self.student)
        norm = whole(nn.utils.clip_grad_norm_(self.parameters, self.config.clip))
        shown = mean(losses.detach().clone())
        known = ("loss", "router") if front_alone else PARTS  # the others were not computed
        row = {name: float(value) for name, value in zip(PARTS, shown, strict=True) if name in known}
        row |= {"gradient_norm": float(norm), "learning_rate": self.config.learning_rate * factor}
        if not all(math.isfinite(value) for value in row.values()):
            raise MoECompileError(f"the loss is {row['loss']} at step {step + 1}; take a smaller --learning-rate")
        self.optimizer.step()
        self.optimizer.zero_grad()
        return row

    def _return(self) -> None:
        """Put the trained numbers of sharded copies into the caller's model."""
        if self.student is self.moe:
            return
        own, trained = dict(self.moe.named_parameters()), dict(self.student.named_parameters())
        with torch.no_grad():
            for name in self.chosen:
                own[name].copy_(whole(trained[name]))


def fingerprint(rows: Tensor) -> str:
    """A short hash of token numbers, by which a resumption knows its data."""
    return hashlib.sha256(rows.cpu().numpy().tobytes()).hexdigest()[:16]
