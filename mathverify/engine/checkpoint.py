"""A trial's state on disk: one safetensors file a checkpoint, the previous good one kept. No pickle.

Everything random is a function of (seed, step), so parameters, optimizer state and a few counters are the whole state,
and a resumed trial takes the very steps it would have taken.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mathverify.engine.ranks import Ranks
from mathverify.engine.tensor_file import save_tensors
from mathverify.engine.trial import Trial, TrialState
from mathverify.errors import UserError

KEPT = 2


def save_checkpoint(trial: Trial, folder: Path, identity: str, costs: dict[str, float]) -> Path:
    """Write `folder/step-NNNNNN.safetensors` and remove all but the last KEPT.

    Args:
        identity: what the state belongs to (config, data and base); checked when it is loaded.
        costs: seconds and the like spent so far, given back by `load_checkpoint`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state, tensors = _state(trial)
    state |= {"identity": identity, "costs": costs}
    file = folder / f"step-{trial.step:06d}.safetensors"
    save_tensors(file, tensors, {"state": json.dumps(state)})
    for old in _files(folder)[KEPT:]:
        old.unlink(missing_ok=True)
    return file


def load_checkpoint(trial: Trial, folder: Path, identity: str) -> dict[str, float] | None:
    """Put `trial` where the newest readable checkpoint stands; None when there is none.

    Returns:
        The costs that were saved with it.

    Raises:
        UserError: the checkpoint belongs to another run, or holds a number that is not finite.
    """
    for file in _files(folder):
        try:
            state, tensors = _read(file)
        except (OSError, SafetensorError, ValueError, KeyError):
            continue  # torn by something other than us: the previous one is kept for this
        if state["identity"] != identity:
            raise UserError(
                f"{file}: belongs to another run (config, data or base differ): use another run folder, or remove it"
            )
        _restore(trial, state, tensors, str(file))
        return dict(state["costs"])
    return None


def _files(folder: Path) -> list[Path]:
    """Checkpoints, newest first."""
    return sorted(folder.glob("step-*.safetensors"), reverse=True) if folder.is_dir() else []


def _read(file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with safe_open(file, framework="pt") as opened:
        state = json.loads(opened.metadata()["state"])
        return state, {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a dict)


def _restore(trial: Trial, state: dict[str, Any], tensors: dict[str, torch.Tensor], where: str) -> None:
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values() if tensor.is_floating_point())
    adapter = tensors.pop("adapter")
    if adapter.shape != trial.adapter.flat.shape or not finite:
        raise UserError(f"{where}: its adapter has the wrong size or numbers that are not finite: remove the file")
    trial.adapter.flat.data.copy_(adapter)
    trial.step, trial.examples, trial.tokens = state["step"], state["examples"], state["tokens"]
    trial.loss_scale = state["loss_scale"]
    trial.validation_due = state.get("validation_due", False)  # absent in files of earlier versions
    trial.state = TrialState.finished if trial.step >= trial.steps else TrialState.running
    (parameter,) = trial.optimizer.param_groups[0]["params"]
    slots = trial.optimizer.state[parameter]
    for key, value in tensors.items():
        slots[key] = value.to(parameter.device)  # the fused optimizer's step counter too
    slots.update(state["optimizer"])


def share_state(trial: Trial, ranks: Ranks) -> None:
    """Put the trial of every process where the leader's stands."""
    if ranks.size == 1:
        return
    state, tensors = ranks.spread(*_state(trial), trial.adapter.flat.device)
    if ranks.rank > 0:
        _restore(trial, state, dict(tensors), "the leading process's state")


def _state(trial: Trial) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Counters, and tensors by name."""
    tensors, numbers = _optimizer_state(trial)
    tensors["adapter"] = trial.adapter.flat
    state = {
        "step": trial.step,
        "examples": trial.examples,
        "tokens": trial.tokens,
        "loss_scale": trial.loss_scale,
        "validation_due": trial.validation_due,
        "optimizer": numbers,
    }
    return state, tensors


def _optimizer_state(trial: Trial) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    (parameter,) = trial.optimizer.param_groups[0]["params"]
    slots = trial.optimizer.state.get(parameter, {})
    tensors = {key: value for key, value in slots.items() if isinstance(value, torch.Tensor)}
    numbers = {key: value for key, value in slots.items() if isinstance(value, int | float)}
    return tensors, numbers
