"""Settings of a tuning run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..errors import InputError
from ..precision import PRECISIONS, compute_dtype

STAGES = ("router", "experts", "norms", "attention")


@dataclass(frozen=True)
class TuneConfig:
    """How a converted model is tuned.

    Attributes:
        stages: what is trained: ``router``, ``experts`` (all weights and biases of shared neurons and experts),
            ``norms``, ``attention`` (whatever else the layers hold).
        learning_rate: peak rate of AdamW for everything but the routers.
        router_rate: peak rate of the routers, relative to the root mean square of each router's own weights: the scores of
            two layers can differ a hundredfold in scale, and a choice depends on their order alone.
        front_rate: peak rate of a router at the front, a small transformer of its own (Read-ME's).
        rounds: 0 trains all stages together. R alternates as Read-ME does (arXiv 2410.19123): R rounds, in each first the
            routers alone, then the other stages; in either part the rate starts anew, and its peak falls from round to round.
            A router at the front then learns its distillation targets alone, without the student; routers of the layers learn
            as they do otherwise.
        router_share: with ``rounds``, the routers' share of each round's steps: Read-ME's 100 steps of 64 windows beside 200 of
            128 are a fifth of the tokens.
        round_decay: with ``rounds``, each round's peak rates over those of the round before (Read-ME's).
        warmup: share of the steps over which the rate rises linearly; then it falls to 0 along a cosine.
        weight_decay: AdamW's, of matrices (never of biases or norms).
        betas: AdamW's.
        clip: largest norm of all gradients together.
        label_weight: weight of the text's own next words (cross-entropy, nats) beside the KL of the logits (0: none).
        layer_weight: weight of the layer-wise error beside the KL of the logits (0: none).
        oracle_weight: weight of the loss of the layers' routers against the oracle choice (0: none).
        front_weight: weight of the distillation of a router at the front (:mod:`moecompile.distil`).
        straight_through: whether the layers' routers get a gradient through the chosen experts' weights.
        front_straight_through: the same for a router at the front. Off: SmolLM2-135M's with five aligned experts chose one of
            them for 98 to 100 % of the tokens of every domain after 24 steps.
        top_logits: how many of the teacher's largest logits are matched one by one; the rest is matched as one class.
        kl_stride: the distributions are matched at every n-th position alone, another residue in each step. The head is a third
            of a small model's work, and the layers' errors are matched everywhere.
        lora_rank: train low-rank updates of this rank in place of the experts' matrices (0: the matrices themselves).
        checkpointing: compute each layer again in the backward pass instead of keeping it.
        precision: ``bfloat16`` computes under autocast (weights and AdamW stay float32); ``auto``: bfloat16 on a GPU and on
            a CPU that multiplies it natively.
        save_every: steps between checkpoints.
        seed: of every random choice.
    """

    stages: tuple[str, ...] = ("router", "experts")
    learning_rate: float = 1e-4
    router_rate: float = 1e-3
    front_rate: float = 5e-4
    rounds: int = 0
    router_share: float = 0.2
    round_decay: float = 0.8
    warmup: float = 0.1
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    label_weight: float = 0.0
    layer_weight: float = 1.0
    oracle_weight: float = 0.0
    front_weight: float = 1.0
    straight_through: bool = True
    front_straight_through: bool = False
    top_logits: int = 128
    kl_stride: int = 1
    lora_rank: int = 0
    checkpointing: bool = False
    precision: str = "auto"
    save_every: int = 20
    seed: int = 0

    def check(self) -> None:
        """Refuse settings that make no sense.

        Raises:
            InputError: with what is wrong.
        """
        unknown = [stage for stage in self.stages if stage not in STAGES]
        if unknown or not self.stages:
            raise InputError(f"--stage is '{','.join(self.stages)}'; it is a list of {', '.join(STAGES)}")
        if self.precision not in PRECISIONS:
            raise InputError(f"--precision is '{self.precision}'; it can be {', '.join(PRECISIONS)}")
        for name in ("learning_rate", "router_rate", "front_rate", "round_decay", "clip"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"--{name.replace('_', '-')} is {value}; it must be above 0")
        for name in ("weight_decay", "label_weight", "layer_weight", "oracle_weight", "front_weight", "lora_rank", "rounds"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"--{name.replace('_', '-')} is {value}; it cannot be negative")
        if not 0 < self.router_share < 1:
            raise InputError(f"--router-share is {self.router_share}; it is a share of each round's steps, between 0 and 1")
        if self.rounds and ("router" not in self.stages or len(self.stages) < 2):
            raise InputError("--rounds alternates between the routers and the rest: --stage must name router and another one")
        if not 0 <= self.warmup <= 1:
            raise InputError(f"--warmup is {self.warmup}; it is a share of the steps, from 0 to 1")
        for name in ("top_logits", "kl_stride", "save_every"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")

    def dtype(self, device: torch.device) -> torch.dtype:
        """What the run computes in on a device."""
        return compute_dtype(self.precision, device)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready settings."""
        return {**asdict(self), "stages": list(self.stages), "betas": list(self.betas)}

    def schedule(self, step: int, steps: int) -> tuple[tuple[str, ...], float]:
        """Which stages train in a step (from 0), and the learning rate over its peak."""
        if not self.rounds:
            return self.stages, self.rate(step, steps)
        bounds = [number * steps // self.rounds for number in range(self.rounds + 1)]
        number = next(index for index in range(self.rounds) if step < bounds[index + 1])
        start, stop = bounds[number], bounds[number + 1]
        turn = start + min(stop - start - 1, max(1, round(self.router_share * (stop - start))))
        first = step < turn
        factor = self.rate(step - start, turn - start) if first else self.rate(step - turn, stop - turn)
        stages = ("router",) if first else tuple(stage for stage in self.stages if stage != "router")
        return stages, factor * self.round_decay**number

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step (from 0) over its peak: a linear rise, then a cosine to 0."""
        rise = math.ceil(self.warmup * steps)
        if step < rise:
            return (step + 1) / (rise + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
