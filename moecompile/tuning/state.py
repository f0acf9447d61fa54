"""A run's checkpoint: weights in training, AdamW's moments, the place in the data, the random numbers. No pickles.

``FOLDER/step-00000040/`` is written aside and renamed; older ones go once it is there. A run that is started again with the
same settings goes on from it, and ends bit for bit where it would have ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import CheckpointError, InputError
from ..files import explain_os_error, read_json, write_bytes, write_tensors
from .parallel import like, whole, world

STATE, TENSORS = "state.json", "tensors.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in a folder, or None."""
    found = sorted(path for path in folder.glob("step-*") if (path / STATE).is_file())
    return found[-1] if found else None


def throw_away(folder: Path) -> None:
    """Remove a run's checkpoints, what they say of the run last: large files take their time."""
    for path in folder.glob(f"*/{TENSORS}"):
        with contextlib.suppress(OSError):
            path.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def write_state(
    folder: Path, step: int, model: nn.Module, chosen: dict[str, str], optimizer: torch.optim.Optimizer, facts: dict[str, Any]
) -> None:
    """Write the checkpoint of a step; every process of a sharded run must call.

    Args:
        folder: where the run's checkpoints lie.
        step: steps that are done.
        model: with the parameters.
        chosen: names of those in training.
        optimizer: AdamW over them.
        facts: JSON-ready: settings, curve and what else the run has to know.

    Raises:
        CheckpointError: it cannot be written.
    """
    parameters = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {"rng/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    for name in chosen:
        tensors[f"value/{name}"] = whole(parameters[name]).cpu()
        state = optimizer.state.get(parameters[name])
        if state:  # none before its first step, where stages alternate
            for moment in _MOMENTS:
                tensors[f"{moment}/{name}"] = whole(state[moment]).cpu()
            tensors[f"step/{name}"] = torch.as_tensor(state["step"]).float().cpu().reshape(1)
    if world()[0] != 0:
        return
    target = folder / f"step-{step:08d}"
    aside = folder / f".{target.name}.part"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        write_tensors(aside / TENSORS, tensors)
        write_bytes(aside / STATE, json.dumps({**facts, "step": step}).encode())
        shutil.rmtree(target, ignore_errors=True)
        os.replace(aside, target)
        for old in folder.glob("step-*"):
            if old != target:
                shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise explain_os_error(error, target) from error


def read_state(
    path: Path, settings: dict[str, Any], model: nn.Module, chosen: dict[str, str], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Go back to a checkpoint: parameters, moments and random numbers are set; returns its facts.

    Raises:
        InputError: the checkpoint belongs to a run with other settings.
        CheckpointError: it cannot be read.
    """
    facts = read_json(path / STATE)
    check_settings(path.parent, facts["settings"], settings)
    parameters = dict(model.named_parameters())
    try:
        with safe_open(path / TENSORS, framework="pt") as file:
            stored = set(file.keys())
            for name in chosen:
                parameter = parameters[name]
                with torch.no_grad():
                    parameter.copy_(like(file.get_tensor(f"value/{name}"), parameter))
                if f"step/{name}" not in stored:
                    continue
                moments = {moment: like(file.get_tensor(f"{moment}/{name}"), parameter) for moment in _MOMENTS}
                taken = file.get_tensor(f"step/{name}")[0].to(parameter.device)
                optimizer.state[parameter] = {"step": taken, **moments}
            torch.set_rng_state(file.get_tensor("rng/cpu"))
            if torch.cuda.is_available() and "rng/cuda" in stored:
                torch.cuda.set_rng_state(file.get_tensor("rng/cuda"))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"the checkpoint {path} cannot be read: {error}") from error
    return facts


def check_settings(folder: Path, stored: dict[str, Any], settings: dict[str, Any]) -> None:
    """Refuse to go on with other settings.

    Raises:
        InputError: naming the first that differs.
    """
    for key in sorted(set(stored) | set(settings)):
        if stored.get(key) != settings.get(key):
            raise InputError(
                f"{folder} holds a run with another {key} ({stored.get(key)!r}, now {settings.get(key)!r}): give the same "
                "settings to go on with it, or --restart to begin anew"
            )
