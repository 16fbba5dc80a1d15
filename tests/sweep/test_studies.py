"""The studies of sweeps/: each composes and can be planned; one runs for real on the embedded default."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.journeys.conftest import SMALL

STUDIES = sorted(file.stem for file in (Path(__file__).parents[2] / "sweeps").glob("*.yaml"))


def command(folder: Path, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_composes_and_is_planned_without_training(study: str, tmp_path: Path) -> None:
    done = command(tmp_path, "-m", "mathverify.train", "-m", f"sweep={study}", "hydra.sweeper.dry_run=true")
    assert done.returncode == 0, done.stderr
    assert f"study     {study} in multirun/{study}" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [["--help"], ["--cfg", "job"], ["sweep=rank_alpha_batch", "--cfg", "job"]])
def test_help_and_cfg_import_neither_optuna_nor_torch(flags: list[str], tmp_path: Path) -> None:
    code = f"""
import runpy, sys
sys.argv = ["train", *{flags!r}]
try:
    runpy.run_module("mathverify.train", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print("heavy:", sorted({{"optuna", "torch"}} & set(sys.modules)))
"""
    done = command(tmp_path, "-c", code)
    assert "heavy: []" in done.stdout, done.stdout[-500:] + done.stderr


def test_a_space_that_reaches_an_impossible_run_is_refused_before_it_starts(tmp_path: Path) -> None:
    done = command(tmp_path, "-m", "mathverify.train", "-m", "sweep=rank_grid", "train.max_steps=choice(4,400)")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "train.max_steps=4" in line
    assert "warmup_steps" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_missions_study_trains_its_trials_and_names_the_best(tmp_path: Path) -> None:
    small = [o for o in SMALL if not o.startswith("train.batch_size")]  # which is searched
    done = command(
        tmp_path, "-m", "mathverify.train", "-m", "sweep=rank_alpha_batch", *small,
        f"data.cache_dir='{tmp_path}/cache'", "hydra.sweeper.n_trials=2", timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    study = tmp_path / "multirun" / "rank_alpha_batch"
    trials = [folder for folder in study.iterdir() if folder.name.isdigit()]
    records = [json.loads((folder / "result.json").read_text()) for folder in trials]
    assert [record["status"] for record in records] == ["completed"] * 2
    results = yaml.safe_load((study / "optimization_results.yaml").read_text())
    accuracies = [record["metrics"]["validation"]["accuracy"] for record in records]
    assert results["best_value"] == max(a["value"] if isinstance(a, dict) else a for a in accuracies)
    assert set(results["best_params"]) == {"lora.rank", "lora.alpha", "train.batch_size"}


@pytest.mark.slow
def test_a_real_run_is_pruned_at_its_first_validation(tmp_path: Path) -> None:
    small = [o for o in SMALL if not o.startswith("train.batch_size")]
    done = command(
        tmp_path, "-m", "mathverify.train", "-m", "sweep=rank_alpha_batch", *small,
        f"data.cache_dir='{tmp_path}/cache'", "hydra.sweeper.n_trials=1", "hydra/sweeper/pruner=none",
        "hydra.sweeper.pruner._target_=optuna.pruners.ThresholdPruner", "+hydra.sweeper.pruner.lower=2.0", timeout=300,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]  # nothing completed
    record = json.loads((tmp_path / "multirun/rank_alpha_batch/0/result.json").read_text())
    assert record["status"] == "pruned"
    assert "pruned at step 2 by the threshold rule" in done.stdout
    assert "1 trials: 0 completed, 1 pruned, 0 failed" in done.stdout
