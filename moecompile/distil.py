"""Teaching a pre-gating router which experts the dense model would use.

    target(t) = softmax over experts of the overlap |M0(t) ∩ M_i| / temperature,    loss = KL(target || softmax(scores))

M0(t) holds the neurons that the dense model activates most on token t (the top half by |activation|), M_i those of expert i.
With aligned ids the overlaps of all layers are summed. Read-ME (arXiv 2410.19123), section 3.2. The router sees token t itself
and what stands before it: at decode time the token is known before layer 0 runs, so the target is that of the same position.

With a decision per layer and several experts of many, ``target="amplitude"`` learns the choice itself (choice.py) from how much
each expert matters, a_e = sqrt(sum_{j in e} (h_j - mean_j)^2 |w_j|^2), as the routers of the layers can.

Targets are computed once and kept as 16-bit numbers; training then reads embeddings and targets alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .choice import captured_share, centred_scores, oracle_loss
from .errors import InputError
from .files import write_tensors
from .pregate import PreGatingRouter
from .progress import Progress
from .targets import TARGETS, Targets


@dataclass(frozen=True)
class Distillation:
    """How to train the router.

    Attributes:
        steps: optimizer steps.
        batch: windows per step.
        lr: peak learning rate of AdamW, linear warm-up over a twentieth of the steps, then cosine to zero.
        weight_decay: of AdamW.
        temperature: in standard deviations of the overlaps (around each token's mean); raw counts, as in the paper, make the
            softmax a one-hot vector. 0 trains on the one-hot vector itself.
        centred: measure each expert's overlap against its own mean, so that no expert is chosen for being typical.
        active: share of a layer's neurons that counts as activated.
        reverse: KL(softmax(scores) || target) instead.
        balance: weight of the load-balance term N * sum_i f_i P_i (Fedus et al. 2021, arXiv 2101.03961).
        locality: weight of the mean squared difference between consecutive tokens' probabilities.
        held: share of the windows that is measured on and not trained on.
        target: ``overlap`` (the paper's), or ``amplitude``: a logistic loss against the ``top_k`` experts that matter most, for
            decisions per layer.
        top_k: with ``amplitude``, how many experts are chosen.
    """

    steps: int = 100
    batch: int = 8
    lr: float = 5e-4
    weight_decay: float = 0.01
    temperature: float = 0.25
    centred: bool = False
    active: float = 0.5
    reverse: bool = False
    balance: float = 0.0
    locality: float = 0.0
    held: float = 0.1
    target: str = "overlap"
    top_k: int = 1

    def check(self) -> None:
        """Refuse numbers that make no sense.

        Raises:
            InputError: with what is wrong.
        """
        if self.steps < 0 or self.batch < 1 or not self.lr > 0 or not 0 < self.active < 1 or not 0 <= self.held < 1:
            raise InputError(f"the router cannot be trained with these settings: {self}")
        if min(self.weight_decay, self.temperature, self.balance, self.locality) < 0:
            raise InputError(f"the router cannot be trained with negative weights: {self}")
        if self.target not in TARGETS or self.top_k < 1:
            raise InputError(f"the router's target is '{self.target}' of {self.top_k}; it can be {' or '.join(TARGETS)}")


def probabilities(overlap: Tensor, options: Distillation, mean: Tensor, scale: float) -> Tensor:
    """(..., N) counts -> (..., N) targets; ``mean`` (N,) or (L, N) and ``scale`` from :func:`statistics`. Amplitudes stay."""
    if options.target == "amplitude":
        return overlap.float()
    z = overlap.float() - mean if options.centred else overlap.float()
    if options.temperature == 0:
        return nn.functional.one_hot(z.argmax(-1), z.shape[-1]).float()
    return (z / (options.temperature * scale)).softmax(-1)


def statistics(overlap: Tensor) -> tuple[Tensor, float]:
    """Each expert's mean overlap, (N,) or (L, N), and the standard deviation around each token's mean."""
    total = torch.zeros(overlap.shape[2:], dtype=torch.float64, device=overlap.device)
    square, count = 0.0, 0
    for part in overlap.split(16):
        wide = part.double()
        total += wide.sum((0, 1))
        square += float((wide - wide.mean(-1, keepdim=True)).square().sum())
        count += part.numel()
    return (total / (overlap.shape[0] * overlap.shape[1])).float(), max(math.sqrt(square / max(count, 1)), 1e-6)


def distil(
    router: PreGatingRouter,
    embed: Callable[[Tensor], Tensor],
    targets: Targets,
    options: Distillation | None = None,
    *,
    seed: int = 0,
    state: str | Path | None = None,
    save_every: int = 50,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a router, in place.

    Args:
        router: on its device, in float32.
        embed: what the router reads for (B, S) ids; not trained.
        targets: from :func:`collect_targets`.
        options: how.
        seed: of the order of the windows. Step n reads the same windows whether or not the training was interrupted.
        state: a file that holds parameters and optimizer every ``save_every`` steps; an existing one is gone on from.
        progress: shows the steps.

    Returns:
        ``steps, windows, loss_first, loss_last`` (means over a tenth of the steps) and :func:`agreement` on held-out windows.

    Raises:
        InputError: the settings make no sense, or the state belongs to another training.
    """
    options = options or Distillation()
    options.check()
    progress = progress or Progress()
    kept, held = targets.split(options.held, seed)
    mean, scale = statistics(kept.overlap)
    path = None if state is None else Path(state)
    options_of = {"seed": seed, "targets": _mark(kept, mean, scale), **asdict(options), **router.spec.to_dict()}
    identity = json.dumps(options_of, sort_keys=True)
    device = next(router.parameters()).device
    mean = mean.to(device)
    decayed = [p for p in router.parameters() if p.dim() > 1]
    plain = [p for p in router.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95))
    first, losses = _resume(path, router, optimizer, identity)
    router.train()
    for step in progress.over(range(first, options.steps), "router training"):
        rate = min((step + 1) / max(1, options.steps // 20), 0.5 + 0.5 * math.cos(math.pi * step / options.steps))
        for group in optimizer.param_groups:
            group["lr"] = options.lr * rate
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(kept.ids), (options.batch,), generator=generator)
        with torch.no_grad():
            tokens = embed(kept.ids[rows].to(device))
            wanted = probabilities(kept.overlap[rows].to(device), options, mean, scale)
        loss = loss_of(router(tokens).view_as(wanted), wanted, options)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(router.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if path is not None and ((step + 1) % save_every == 0 or step + 1 == options.steps):
            _save(path, router, optimizer, identity, step + 1, losses)
    router.eval()
    tenth = max(1, len(losses) // 10)
    result: dict[str, Any] = {"steps": options.steps, "windows": len(kept.ids)}
    if losses:
        result["loss_first"] = round(sum(losses[:tenth]) / tenth, 5)
        result["loss_last"] = round(sum(losses[-tenth:]) / tenth, 5)
    if len(held.ids):
        result.update(agreement(router, embed, held, options, mean))
    return result


def _mark(targets: Targets, mean: Tensor, scale: float) -> str:
    """A short mark of what is learned, by which a resumption knows its targets."""
    found = hashlib.sha256(targets.ids.cpu().contiguous().numpy().tobytes())
    found.update(repr((tuple(targets.overlap.shape), scale, mean.flatten().tolist())).encode())
    return found.hexdigest()[:16]


def loss_of(scores: Tensor, wanted: Tensor, options: Distillation) -> Tensor:
    """KL, or the logistic loss of amplitudes, with the optional terms; scores and targets (B, S, N) or (B, S, L, N)."""
    log_q = scores.log_softmax(-1)
    q = log_q.exp()
    if options.target == "amplitude":
        loss = oracle_loss(centred_scores(scores, options.top_k)[1], wanted, options.top_k)
    else:
        log_p = wanted.clamp_min(1e-9).log()
        loss = (q * (log_q - log_p) if options.reverse else wanted * (log_p - log_q)).sum(-1).mean()
    if options.balance:
        experts = scores.shape[-1]
        chosen = nn.functional.one_hot(scores.argmax(-1), experts).float().mean((0, 1))
        loss = loss + options.balance * experts * (chosen * q.mean((0, 1))).sum(-1).mean()
    if options.locality:
        loss = loss + options.locality * (q[:, 1:] - q[:, :-1]).square().sum(-1).mean()
    return loss


@torch.no_grad()
def agreement(
    router: PreGatingRouter,
    embed: Callable[[Tensor], Tensor],
    targets: Targets,
    options: Distillation | None = None,
    mean: Tensor | None = None,
) -> dict[str, float]:
    """How often a router chooses as the oracle does, the expert with the largest overlap.

    Args:
        mean: each expert's mean overlap where the options are centred; of these targets themselves by default.

    Returns:
        ``agreement`` (share of tokens, over all layers), ``constant_agreement`` (of the best constant choice),
        ``same_as_previous`` and ``oracle_same_as_previous`` (share of consecutive tokens with the same expert), ``tokens``; of
        amplitudes also ``energy`` and ``oracle_energy``, what the chosen experts and the best ones have of their squares.
    """
    options = options or Distillation()
    mean = statistics(targets.overlap)[0] if mean is None else mean.cpu()
    device = next(router.parameters()).device
    hits = same = oracle_same = total = pairs = 0
    energy = torch.zeros(2, dtype=torch.float64)
    counts = torch.zeros(targets.overlap.shape[2:])
    was_training = router.training
    router.eval()
    for ids, overlap in zip(targets.ids.split(4), targets.overlap.split(4), strict=True):
        scores = router(embed(ids.to(device))).view(overlap.shape).cpu()
        chosen = scores.argmax(-1)
        if options.target == "amplitude":
            energy += torch.stack(captured_share(scores.topk(options.top_k, dim=-1).indices, overlap)).double()
        z = overlap.float() - mean.cpu() if options.centred else overlap.float()
        best = z.argmax(-1)
        counts += nn.functional.one_hot(best, overlap.shape[-1]).float().sum((0, 1))
        hits += int((chosen == best).sum())
        same += int((chosen[:, 1:] == chosen[:, :-1]).sum())
        oracle_same += int((best[:, 1:] == best[:, :-1]).sum())
        total += best.numel()
        pairs += best[:, 1:].numel()
    router.train(was_training)
    shares = [round(float(value) / total, 5) for value in energy] if options.target == "amplitude" else []
    return {
        **dict(zip(("energy", "oracle_energy"), shares, strict=False)),
        "agreement": round(hits / total, 5),
        "constant_agreement": round(float(counts.max(-1).values.sum()) / total, 5),
        "same_as_previous": round(same / max(pairs, 1), 5),
        "oracle_same_as_previous": round(oracle_same / max(pairs, 1), 5),
        "tokens": targets.ids.numel(),
    }


def _save(
    path: Path, router: PreGatingRouter, optimizer: torch.optim.Optimizer, identity: str, step: int, losses: Sequence[float]
) -> None:
    tensors: dict[str, Tensor] = {"losses": torch.tensor(losses, dtype=torch.float64)}
    for name, parameter in router.named_parameters():
        tensors[f"parameter/{name}"] = parameter.detach()
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{key}/{name}"] = optimizer.state[parameter][key]
    tensors = {name: tensor.contiguous().cpu().clone() for name, tensor in tensors.items()}
    write_tensors(path, tensors, metadata={"identity": identity, "step": str(step)})


def _resume(
    path: Path | None, router: PreGatingRouter, optimizer: torch.optim.Optimizer, identity: str
) -> tuple[int, list[float]]:
    """The step to go on from, and the losses so far."""
    if path is None or not path.is_file():
        return 0, []
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("identity") != identity:
                raise InputError(f"{path} is the state of another training; remove it to start anew")
            step = int(metadata["step"])
            with torch.no_grad():
                for name, parameter in router.named_parameters():
                    parameter.copy_(file.get_tensor(f"parameter/{name}"))
                    optimizer.state[parameter] = {
                        "step": torch.tensor(float(step)),
                        **{key: file.get_tensor(f"{key}/{name}").to(parameter) for key in ("exp_avg", "exp_avg_sq")},
                    }
            return step, file.get_tensor("losses").tolist()
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{path} cannot be read as the state of a router's training: {error}") from error
