"""The studies of sweeps/: each says what it answers, can be planned, and runs on the embedded default."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from optuna.trial import TrialState

from .conftest import Sweep, small
from .ends import study_of

SWEEPS = Path(__file__).parents[2] / "sweeps"
STUDIES = sorted(file.stem for file in SWEEPS.glob("*.yaml"))
PLAIN = ["model=tiny", "data=arithmetic", "quantization=none", "optimizer=adamw", "train=default"]
COMMANDS = [
    (file.stem, line.partition("python -m mathverify.train -m ")[2])
    for file in sorted(SWEEPS.glob("*.yaml"))
    for line in file.read_text().splitlines()
    if "python -m mathverify.train -m " in line
]


def command(folder: Path, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


# Planning


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_opens_with_what_it_answers_and_what_it_costs(study: str) -> None:
    lines = (SWEEPS / f"{study}.yaml").read_text().splitlines()
    opening = " ".join(line.lstrip("# ") for line in lines[1:] if line.startswith("#"))
    assert re.match(r"[A-Z][^.?]*\? .*\b(Costs|costs) \d+ runs", opening)


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_composes_and_is_planned_without_training(study: str, sweep_here: Sweep) -> None:
    done = sweep_here(f"sweep={study}", "hydra.sweeper.dry_run=true")
    assert done.code == 0, done.out
    assert f"study     {study} in multirun/{study}" in done.out
    assert list(done.folder.iterdir()) == []


@pytest.mark.parametrize(("study", "arguments"), COMMANDS)
def test_every_command_in_a_studys_file_can_be_planned(study: str, arguments: str, sweep_here: Sweep) -> None:
    subprocess.run(["bash", "-n", "-c", f"python {arguments}"], check=True)  # it can be pasted
    done = sweep_here(*shlex.split(arguments), "hydra.sweeper.dry_run=true")
    assert done.code == 0, done.out
    assert f"sweep={study}" in done.out


@pytest.mark.parametrize(
    ("arguments", "points", "examples"),
    [
        (["sweep=rank_grid", "seed=range(1,9)"], 24, "6,400 a trial"),
        (["sweep=batch_grid", "seed=range(1,9)"], 24, "3,200 to 12,800 a trial, so not only what is searched differs"),
        (["sweep=batch_grid", "train.max_examples=6400"], 9, "6,400 a trial"),
    ],
)
def test_a_grid_takes_every_point_and_says_beforehand_who_sees_more_examples(
    arguments: list[str], points: int, examples: str, sweep_here: Sweep
) -> None:
    out = sweep_here(*arguments, "hydra.sweeper.dry_run=true").out
    assert f"budget    {points} trials" in out
    assert f"examples  {examples}" in out


@pytest.mark.parametrize(("most", "at_once"), [("2", 2), ("5", 3), ("null", 3)])
def test_the_plan_says_how_many_trials_there_may_be_in_a_pack(most: str, at_once: int, sweep_here: Sweep) -> None:
    limits = ["hydra.sweeper.n_jobs=3", f"hydra.launcher.max_trials={most}"]
    assert f", {at_once} at once, " in sweep_here("sweep=rank_grid", *limits, "hydra.sweeper.dry_run=true").out


def test_every_point_of_a_continuous_space_is_refused(sweep_here: Sweep) -> None:
    done = sweep_here("sweep=learning_rate", "hydra.sweeper.n_trials=null")
    assert done.code == 2
    assert "n_trials = null means every point" in done.out


@pytest.mark.parametrize("flag", ["dry_run=true", "dry_run=false"])
def test_a_folder_for_all_trials_is_refused_before_anything_is_made(flag: str, sweep_here: Sweep) -> None:
    done = sweep_here("sweep=rank_grid", "hydra.sweep.subdir=same", f"hydra.sweeper.{flag}")
    assert done.code == 2
    assert "hydra.sweep.subdir = same is the same for every trial: each needs a folder of its own" in done.out
    assert not list(done.folder.iterdir())


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


def test_a_mistyped_argument_of_the_sampler_is_one_line(sweep_here: Sweep) -> None:
    done = sweep_here("sweep=rank_alpha_batch", "+hydra.sweeper.sampler.n_startup_trails=3")
    assert done.code == 2
    (line,) = done.out.splitlines()
    assert "hydra.sweeper.sampler.n_startup_trails = 3" in line
    assert "did you mean n_startup_trials?" in line
    assert list(done.folder.iterdir()) == []


# Running


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES)
def test_every_study_trains_its_trials_on_the_embedded_default(study: str, sweep_here: Sweep) -> None:
    done = sweep_here(*small(f"sweep={study}", *PLAIN, "hydra.sweeper.n_trials=2"))
    assert done.code == 0, done.out[-3000:]
    trials = [t for t in study_of(done.folder / "multirun" / study, study).trials if t.state is TrialState.COMPLETE]
    assert len(trials) == 2
    for trial in trials:
        found = record(done.folder / "multirun" / study / str(trial.number))
        assert found["status"] == "completed"
        assert trial.values[0] == found["metrics"]["validation"]["accuracy"]["value"]
    results = yaml.safe_load((done.folder / "multirun" / study / "optimization_results.yaml").read_text())
    best = max(trials, key=lambda t: t.values[0]).values[0]
    assert best in [s["values"][0] for s in results.get("solutions", [{"values": [results.get("best_value")]}])]


@pytest.mark.slow
def test_the_rows_of_the_mission_keep_rank_alpha_and_batch_on_the_embedded_default(sweep_here: Sweep) -> None:
    ((_, arguments),) = [c for c in COMMANDS if c[0] == "seed_table"]
    done = sweep_here(*small(*shlex.split(arguments), "seed=1"))
    assert done.code == 0, done.out[-3000:]
    found = [record(folder.parent)["config"] for folder in done.folder.glob("multirun/seed_table/*/result.json")]
    rows = sorted((c["lora"]["rank"], c["lora"]["alpha"], c["train"]["batch_size"]) for c in found)
    assert rows == [(16, 32.0, 2), (64, 32.0, 2), (64, 32.0, 4)]
    assert {c["model"]["name"] for c in found} == {"tiny"}
    # Said before and after, since two rows differ in nothing else but the batch:
    assert "examples  16 to 32 a trial" in done.out
    assert "saw different numbers of examples: 16 (2 trials), 32 (1 trials)" in done.out


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "screen"), [("basic", "0/screen.txt"), ("pack", "screen.txt")])
def test_a_trial_is_one_line_and_the_rest_lies_in_a_file(launcher: str, screen: str, sweep_here: Sweep) -> None:
    done = sweep_here(*small("sweep=rank_grid", "seed=1", f"hydra/launcher={launcher}", "hydra.sweeper.n_jobs=1"))
    lines = done.out.splitlines()
    assert lines[8].startswith("cost      known after the first trial")
    table = lines.index("trial  state      parameters  steps  examples  value   seconds  reason")
    first, cost, *others = lines[9:table]
    trial = r"#\d  completed  lora=r\d\d  4 steps  0\.\d+  \| best 0\.\d+ \(#\d\)  "
    assert re.fullmatch(trial + r"\| 1/3 done, about .* left", first)
    assert re.fullmatch(r"cost      .* a trial so far; .* for the 2 left", cost)
    assert len(others) == 2
    assert re.fullmatch(trial + r"\| 2/3 done, about .* left", others[0])
    assert re.fullmatch(trial + r"\| 3/3 done", others[1])
    text = (done.folder / "multirun/rank_grid" / screen).read_text()
    assert "exact duplicates" in text
    assert "completed, accuracy" in text or "tuned threshold" in text


@pytest.mark.slow
def test_trials_of_a_study_are_one_group_of_the_tracker(sweep_here: Sweep) -> None:
    done = sweep_here(*small("sweep=rank_grid", "seed=1", "hydra.sweeper.n_trials=1"))
    config = yaml.safe_load((done.folder / "multirun/rank_grid/0/.hydra/config.yaml").read_text())
    assert config["tracking"]["group"] == "rank_grid"


@pytest.mark.slow
def test_the_best_trials_command_runs_it_again_on_its_own(sweep_here: Sweep, tmp_path: Path) -> None:
    done = sweep_here(*small("sweep=rank_alpha_batch", "hydra.sweeper.n_trials=1"))
    (again,) = [line.partition("run it again: ")[2] for line in done.out.splitlines() if "run it again: " in line]
    overrides = shlex.split(again)[3:]
    one = command(tmp_path, "-m", "mathverify.train", *overrides, "hydra.run.dir=again", timeout=200)
    assert one.returncode == 0, one.stderr[-2000:]
    first, second = record(tmp_path / "multirun/rank_alpha_batch/0"), record(tmp_path / "again")
    assert first["fingerprint"] == second["fingerprint"]
    np.testing.assert_allclose(
        first["metrics"]["test"]["brier"]["value"], second["metrics"]["test"]["brier"]["value"], rtol=1e-5
    )


@pytest.mark.slow
def test_a_real_run_is_pruned_at_its_first_validation(sweep_here: Sweep) -> None:
    done = sweep_here(
        *small("sweep=rank_alpha_batch", "hydra.sweeper.n_trials=1", "hydra/sweeper/pruner=none"),
        "hydra.sweeper.pruner._target_=optuna.pruners.ThresholdPruner", "+hydra.sweeper.pruner.lower=2.0",
    )  # fmt: skip
    assert done.code == 1, done.out[-2000:]  # nothing completed
    found = record(done.folder / "multirun/rank_alpha_batch/0")
    assert found["status"] == "pruned"
    assert found["costs"]["optimizer_steps"] == 2
    assert "pruned at step 2 by the threshold rule" in done.out
    assert "1 trials: 0 completed, 1 pruned, 0 failed" in done.out
    (trial,) = study_of(done.folder / "multirun/rank_alpha_batch", "rank_alpha_batch").trials
    assert trial.state is TrialState.PRUNED
    assert trial.intermediate_values == {2: found["metrics"]["validation"]["accuracy"]["value"]}


@pytest.mark.slow
def test_a_loss_that_is_not_finite_fails_that_trial_only(sweep_here: Sweep) -> None:
    done = sweep_here(*small("sweep=rank_grid", "lora=r16", "seed=1", "optimizer.learning_rate=choice(1e30,1e-4)"))
    assert done.code == 3, done.out[-2000:]
    assert "2 trials: 1 completed, 0 pruned, 1 failed" in done.out
    (failed,) = [t for t in study_of(done.folder / "multirun/rank_grid", "rank_grid").trials if t.values is None]
    assert failed.state is TrialState.FAIL
    assert failed.params == {"optimizer.learning_rate": 1e30}
    assert "loss is nan at step 2" in failed.user_attrs["reason"]
    assert done.out.count(failed.user_attrs["reason"]) == 2  # in its line and in the table


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [1, 3])
def test_out_of_memory_halves_the_passes_and_what_still_does_not_fit_is_infeasible(
    at_once: int, sweep_here: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from mathverify.engine.pack import Pack

    calm = Pack._one_pass

    def short_of_memory(self: Pack, trials: Any, *rest: Any) -> None:
        ranks = {trial.config.lora.rank for trial in trials}
        (segments,) = [given for given in rest if isinstance(given, list)]
        if 64 in ranks or (32 in ranks and sum(len(segment) for segment in segments) > 60):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        calm(self, trials, *rest)

    monkeypatch.setattr(Pack, "_one_pass", short_of_memory)
    done = sweep_here(*small("sweep=rank_grid", "seed=1", f"hydra.sweeper.n_jobs={at_once}"))
    assert done.code == 3, done.out[-2000:]
    trials = {t.params["lora"]: t for t in study_of(done.folder / "multirun/rank_grid", "rank_grid").trials}
    assert {name: t.state.name for name, t in trials.items()} == {"r16": "COMPLETE", "r32": "COMPLETE", "r64": "PRUNED"}
    assert {name: t.constraints["memory"] for name, t in trials.items()} == {"r16": 0.0, "r32": 0.0, "r64": 1.0}
    assert "3 trials: 2 completed, 0 pruned, 0 failed, 1 out of memory" in done.out
    assert "nothing is left to split" in trials["r64"].user_attrs["reason"]
