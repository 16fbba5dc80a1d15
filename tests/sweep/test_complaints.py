"""What users of hydra-optuna-sweeper complain of (hydra and optuna issues by number): here each is a promise kept.

The trials are calls of a small program, so that the sweeper is what is tested; test_studies.py does the same on real
runs where the run has a part in it.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from optuna.trial import TrialState

from .conftest import Program, make_program

SPACE = ["x=interval(-5,5)", "y=choice(1,2,3)"]


def test_n_trials_is_the_total_on_resume_and_no_first_point_comes_again(program: Program) -> None:
    """hydra#3328, hydra#1679."""
    program.sweep(*SPACE, "hydra.sweeper.n_trials=3")
    program.sweep(*SPACE, "hydra.sweeper.n_trials=6")
    assert [number for number, _, _ in program.calls] == [0, 1, 2, 3, 4, 5]
    assert len({(x, y) for _, x, y in program.calls}) == 6


def test_one_trial_out_of_memory_does_not_end_the_sweep(program: Program) -> None:
    """hydra#1463."""
    out = program.sweep("x=choice(1,9,2)", "fail=memory", "hydra/sweeper/sampler=grid", code=3)
    assert sorted(x for _, x, _ in program.calls) == [1, 2, 9]
    assert "3 trials: 2 completed, 0 pruned, 0 failed, 1 out of memory" in out
    assert program.results()["best_params"] == {"x": 1}


def test_points_out_of_memory_are_avoided_instead_of_suggested_again(program: Program) -> None:
    """optuna#3472. Larger x is better here, and beyond 5 nothing fits: the sampler has to learn both."""
    program.sweep(
        "x=interval(0,10)", "y=1", "fail=memory", "hydra.sweeper.direction=maximize", "hydra.sweeper.n_trials=40",
        "hydra.sweeper.sampler.seed=0", "hydra.sweeper.stop_after_same_failures=40", code=3,
    )  # fmt: skip
    trials = program.trials()
    infeasible = [t.number for t in trials if t.constraints["memory"] > 0]
    assert all(trials[n].state is TrialState.PRUNED and trials[n].params["x"] > 5 for n in infeasible)
    early, late = (sum(first <= n < first + 10 for n in infeasible) for first in (0, 30))
    assert early >= 3  # drawn at random, about half of the space
    assert late <= 2
    assert max(t.value for t in trials if t.value is not None) > 4.5**2  # and yet the best that fits is found


@pytest.mark.parametrize("sampler", ["random", "tpe", "gp", "grid"])
def test_no_point_of_a_small_space_is_run_twice(sampler: str, program: Program) -> None:
    """optuna#2021."""
    out = program.sweep(
        "x=choice(1,2)", "y=choice(1,2,3)", f"hydra/sweeper/sampler={sampler}", "hydra.sweeper.n_trials=20"
    )
    assert len(program.calls) == len({(x, y) for _, x, y in program.calls}) == 6
    assert "all 6 points of the space are done" in out


def test_a_killed_sweep_leaves_no_zombie_that_runs_for_ever(program: Program) -> None:
    process = program.start(*SPACE, "hydra.sweeper.n_trials=3", "seconds=0.5")
    while len(program.calls) < 2:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert program.trials()[1].state is TrialState.RUNNING
    program.sweep(*SPACE, "hydra.sweeper.n_trials=3", "seconds=0.5")
    assert [t.state for t in program.trials()] == [TrialState.COMPLETE] * 3


def test_a_free_place_does_not_wait_for_the_slowest_of_a_batch(program: Program) -> None:
    """hydra#3091: x is how long a trial takes, and the slowest outlasts all others together."""
    program.sweep(
        "seconds=choice(4,0.1,0.11,0.12,0.13,0.14)", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_trials=6",
        "hydra.sweeper.n_jobs=2",
    )  # fmt: skip
    trials = program.trials()
    (slow,) = [t for t in trials if t.params["seconds"] == 4]
    started_meanwhile = [
        t.number
        for t in trials
        if t.number > slow.number and t.datetime_start and slow.datetime_complete
        and t.datetime_start < slow.datetime_complete
    ]  # fmt: skip
    assert len(started_meanwhile) == len(trials) - slow.number - 1


def test_trials_at_once_land_on_different_devices(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hydra#2757, hydra#3002."""
    monkeypatch.setenv("MATHVERIFY_DEVICES", "GPU-a,GPU-b")
    monkeypatch.setenv("MATHVERIFY_LEASES", str(tmp_path / "leases"))
    program.sweep(
        "y=choice(1,2,3,4)",
        "seconds=0.5",
        "hydra/sweeper/sampler=grid",
        "hydra.sweeper.n_trials=4",
        "hydra.sweeper.n_jobs=2",
    )
    assert set(program.devices) == {"GPU-a", "GPU-b"}


def test_a_worse_trial_is_pruned(program: Program) -> None:
    """hydra#1954, hydra#3201; the program reports y, smaller is better, as a run does its validations."""
    program.sweep(
        "y=choice(1,2,9)", "+fail=report", "hydra/sweeper/sampler=grid", "hydra.sweeper.sampler.seed=4",
        "hydra/sweeper/pruner=none", "hydra.sweeper.pruner._target_=optuna.pruners.ThresholdPruner",
        "+hydra.sweeper.pruner.upper=5", "hydra.sweeper.n_trials=3",
    )  # fmt: skip
    states = {t.params["y"]: t.state for t in program.trials()}
    assert states == {1: TrialState.COMPLETE, 2: TrialState.COMPLETE, 9: TrialState.PRUNED}
    (pruned,) = [t for t in program.trials() if t.state is TrialState.PRUNED]
    assert pruned.intermediate_values == {1: 9.0}


def test_the_same_study_elsewhere_proposes_the_same(program: Program, tmp_path: Path) -> None:
    other = make_program(tmp_path / "other")
    for one in (program, other):
        one.sweep(*SPACE, "hydra.sweeper.n_trials=4")
    assert program.calls == other.calls
