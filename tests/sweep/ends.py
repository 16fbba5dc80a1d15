"""How the trials of a study ended, as plain data: equal for two studies that came to the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna

from mathverify.sweep.storage import open_storage


def study_of(folder: Path, name: str) -> optuna.Study:
    """A study in the journal of its folder."""
    return optuna.load_study(study_name=name, storage=open_storage(None, folder))


def ends(folder: Path, name: str) -> list[dict[str, Any]]:
    """Each trial's number, point, state, values and validations, and its run's metrics, steps and tokens.

    Left out is what may differ: seconds, dates, process ids.
    """
    found: list[dict[str, Any]] = []
    for trial in study_of(folder, name).trials:
        file = folder / str(trial.number) / "result.json"
        record = json.loads(file.read_text()) if file.exists() else {}
        found.append(
            {
                "number": trial.number,
                "params": trial.params,
                "state": trial.state.name,
                "values": trial.values,
                "validations": trial.intermediate_values,
                "reason": trial.user_attrs.get("reason"),
                "duplicate_of": trial.user_attrs.get("duplicate_of"),
                "metrics": record.get("metrics"),
                "steps": record.get("costs", {}).get("optimizer_steps"),
                "tokens": record.get("costs", {}).get("tokens"),
            }
        )
    return found
