"""Runs that belong together share a group in W&B without being told: a plain grid by its folder."""

from __future__ import annotations

import hydra
import pytest
from omegaconf import OmegaConf

from mathverify.entry import Preflight, config_dir, register_schema


def overrides_of(*overrides: str) -> list[str]:
    """What Hydra's sweeper is handed after the preflight."""
    register_schema()
    with hydra.initialize_config_dir(config_dir(), version_base="1.3"):
        config = hydra.compose("config", overrides=list(overrides), return_hydra_config=True)
        OmegaConf.set_readonly(config.hydra, False)
        config.hydra.overrides.task = [one for one in overrides if not one.startswith("hydra.")]
        Preflight().on_multirun_start(config)
        return list(config.hydra.overrides.task)


@pytest.mark.parametrize(
    ("folder", "group"),
    [("multirun/2026-11-25/10-00-00", "2026-11-25-10-00-00"), ("grid", "grid"), ("it's/a grid", "it\\'s-a grid")],
)
def test_a_grids_runs_are_grouped_by_its_folder(folder: str, group: str) -> None:
    quoted = folder.replace("'", "\\'")
    assert overrides_of("seed=1", f"hydra.sweep.dir='{quoted}'")[-1] == f"tracking.group='{group}'"


def test_a_group_that_is_set_stays() -> None:
    assert overrides_of("seed=1", "tracking.group=mine", "hydra.sweep.dir=grid") == ["seed=1", "tracking.group=mine"]
