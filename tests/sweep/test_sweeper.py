"""A sweep keeps its promises to any Hydra program: budget, resume, kill -9, failures, repetitions, results."""

from __future__ import annotations

import math
import re
import time
from pathlib import Path

import pytest
from optuna.trial import TrialState

from .conftest import Program, make_program

SPACE = ["x=interval(-5,5)", "y=choice(1,2,3)"]
Row = tuple[int, tuple[tuple[str, float], ...], float | None]


def rows(program: Program) -> list[Row]:
    return [(t.number, tuple(sorted(t.params.items())), t.value) for t in program.trials()]


def test_a_resumed_study_finishes_its_total_and_keeps_its_numbers(program: Program, tmp_path: Path) -> None:
    program.sweep(*SPACE, "hydra.sweeper.n_trials=3")
    program.sweep(*SPACE, "hydra.sweeper.n_trials=5")
    assert [number for number, _, _ in program.calls] == [0, 1, 2, 3, 4]
    program.sweep(*SPACE, "hydra.sweeper.n_trials=5")
    assert len(program.calls) == 5
    at_once = make_program(tmp_path / "at_once")
    at_once.sweep(*SPACE, "hydra.sweeper.n_trials=5")
    assert rows(program) == rows(at_once)
    assert {p.name for p in (program.folder / "multirun/s").iterdir() if p.is_dir()} == set("01234")


def test_a_best_value_is_left_with_its_parameters(program: Program) -> None:
    out = program.sweep(*SPACE, "hydra.sweeper.n_trials=4")
    values = {t.value: t.params for t in program.trials()}
    best = min(value for value in values if value is not None)
    assert program.results() == {"name": "optuna", "best_params": values[best], "best_value": best}
    assert best == pytest.approx(values[best]["x"] ** 2 + values[best]["y"])
    assert f"run it again: python app.py x={values[best]['x']!r} y={values[best]['y']}" in out
    assert "4 trials: 4 completed, 0 pruned, 0 failed" in out


def test_several_objectives_leave_the_pareto_front(program: Program) -> None:
    program.sweep(
        "x=choice(1,2,3)", "y=choice(1,2)", "+fail=two", "hydra.sweeper.direction=[minimize,maximize]",
        "hydra/sweeper/sampler=nsgaii", "hydra.sweeper.n_trials=6",
    )  # fmt: skip
    assert program.results() == {"name": "optuna", "solutions": [{"params": {"x": 1, "y": 2}, "values": [1, 2]}]}


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        (["x=interval(-5,6)", "y=choice(1,2,3)"], ["x", "-5 .. 5", "-5 .. 6"]),
        (["x=interval(-5,5)"], ["y", "{1, 2, 3}"]),
        ([*SPACE, "hydra.sweeper.direction=maximize"], ["minimize", "maximize"]),
        ([*SPACE, "seconds=0.001"], ["seconds", "0.001"]),
    ],
)
def test_a_study_made_of_something_else_is_refused_in_one_line(
    old_study: Program, changed: list[str], names: list[str]
) -> None:
    before = rows(old_study)
    out = old_study.sweep(*changed, "hydra.sweeper.n_trials=3", code=2)
    (line,) = [line for line in out.splitlines() if line.strip()]
    assert line.startswith("error: study s was made with ")
    assert all(name in line for name in names)
    assert rows(old_study) == before


@pytest.fixture(scope="module")
def old_study(tmp_path_factory: pytest.TempPathFactory) -> Program:
    program = make_program(tmp_path_factory.mktemp("old") / "program")
    program.sweep(*SPACE, "hydra.sweeper.n_trials=2")
    return program


def test_killed_outright_and_continued_it_ends_like_an_uninterrupted_study(program: Program, tmp_path: Path) -> None:
    slow = [*SPACE, "hydra.sweeper.n_trials=7", "seconds=0.15", "hydra.sweeper.sampler.n_startup_trials=3"]
    for kill_after in (2, 5):
        process = program.start(*slow)
        deadline = time.monotonic() + 30
        while len(program.calls) < kill_after and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        process.communicate()
    program.sweep(*slow)
    calm = make_program(tmp_path / "calm")
    calm.sweep(*slow)
    assert rows(program) == rows(calm)
    assert all(t.state is TrialState.COMPLETE for t in program.trials())
    assert len(program.calls) <= 7 + 2  # only what was cut short ran twice


def test_a_folder_with_trials_of_another_study_is_refused_and_left_alone(program: Program) -> None:
    program.sweep(*SPACE, "hydra.sweeper.n_trials=2")
    folder = program.folder / "multirun/s"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".flock"}
    other = [
        *SPACE,
        "hydra.sweeper.study_name=other",
        "hydra.sweep.dir=multirun/s",
        "hydra.sweeper.storage=sqlite:///o.db",
    ]
    for arguments in (other, [*other, "hydra.sweeper.dry_run=true"]):
        out = program.sweep(*arguments, code=2)
        (line,) = [line for line in out.splitlines() if line.strip()]
        assert line.startswith(f"error: {folder}: holds another study's trials (0, 1): choose another folder")
    assert {path: path.read_bytes() for path in before} == before
    (folder / "study.journal").unlink()
    (folder / ".study").unlink()
    assert "holds trials that are in no study (0, 1)" in program.sweep(*SPACE, code=2)
    assert not (folder / "study.journal").exists()


def test_a_dry_run_makes_no_database(program: Program) -> None:
    program.sweep(*SPACE, "hydra.sweeper.storage=sqlite:///o.db", "hydra.sweeper.dry_run=true")
    assert not (program.folder / "o.db").exists()
    program.sweep(*SPACE, "hydra.sweeper.storage=sqlite:///o.db", "hydra.sweeper.n_trials=2")
    out = program.sweep(
        *SPACE, "hydra.sweeper.storage=sqlite:///o.db", "hydra.sweeper.dry_run=true", "hydra.sweeper.n_trials=5"
    )
    assert "budget    5 trials, 2 done" in out
    assert re.search(r"cost      .* a trial so far; .* for the 3 left", out)


def test_a_torn_last_line_of_the_journal_is_cut_off(program: Program) -> None:
    program.sweep(*SPACE, "hydra.sweeper.n_trials=2")
    with (program.folder / "multirun/s/study.journal").open("a") as file:
        file.write('{"op_code": 5, "worker')
    program.sweep(*SPACE, "hydra.sweeper.n_trials=3")
    assert len(program.trials()) == 3


def test_points_that_mean_the_same_run_once(program: Program) -> None:
    program.sweep("x=choice(1,1.0,2)", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_trials=20")
    assert sorted(x for _, x, _ in program.calls) == [1, 2]


def test_asked_to_train_repetitions_it_does(program: Program) -> None:
    program.sweep("x=choice(1,2)", "hydra.sweeper.duplicates=train", "hydra.sweeper.n_trials=5")
    assert len(program.calls) == 5


def test_a_repetition_may_be_told_instead_of_run(program: Program) -> None:
    """Told, it takes a place of the budget with the earlier value; asked again, as by default, it does not."""
    program.sweep(
        "x=tag(log,int(interval(1,3)))", "y=choice(1,2)", "hydra.sweeper.duplicates=tell", "hydra.sweeper.n_trials=8"
    )
    trials = program.trials()
    assert len(program.calls) == len({(x, y) for _, x, y in program.calls}) < len(trials) == 8
    told = [t for t in trials if "duplicate_of" in t.user_attrs]
    assert told
    assert all(t.value == trials[t.user_attrs["duplicate_of"]].value for t in told)


def test_repeated_proposals_take_no_place_and_are_named(program: Program) -> None:
    out = program.sweep("x=choice(1,2,3,4,5,6)", "hydra/sweeper/sampler=random", "hydra.sweeper.n_trials=6")
    assert sorted(x for _, x, _ in program.calls) == [1, 2, 3, 4, 5, 6]
    turned_down = [t for t in program.trials() if "duplicate_of" in t.user_attrs]
    assert turned_down
    assert all(f"#{t.number} (as #{t.user_attrs['duplicate_of']})" in out for t in turned_down)
    assert "6 trials: 6 completed, 0 pruned, 0 failed" in out


def test_the_first_failures_being_all_alike_stop_the_sweep(program: Program) -> None:
    out = program.sweep(*SPACE, "+fail=always", "hydra.sweeper.n_trials=10", code=1)
    assert len(program.calls) == 3
    assert "stopped: the first 3 trials all failed for the same reason: ValueError: no luck" in out
    assert "ValueError" in (program.folder / "multirun/s/0/error.txt").read_text()


def test_a_failing_trial_does_not_end_the_sweep_and_says_why(program: Program) -> None:
    out = program.sweep("y=choice(1,2,3)", "fail=2", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_trials=3", code=3)
    assert len(program.calls) == 3
    (failed,) = [t for t in program.trials() if t.state is TrialState.FAIL]
    assert failed.params == {"y": 2}
    assert failed.user_attrs["reason"] == "ValueError: no luck with y = 2"
    assert out.count("no luck with y = 2") >= 2  # in its line and in the table
    assert "3 trials: 2 completed, 0 pruned, 1 failed" in out
    assert program.results()["best_params"] == {"y": 1}


def test_too_many_failures_stop_the_sweep(program: Program) -> None:
    program.sweep("y=choice(2,1,3)", "fail=2", "hydra.sweeper.max_failure_rate=0", "hydra.sweeper.n_trials=3", code=1)
    assert program.calls[-1][2] == "2"


def test_not_a_number_fails_its_trial(program: Program) -> None:
    program.sweep(*SPACE, "fail=undefined", "hydra.sweeper.n_trials=2", code=1)
    assert [t.user_attrs["reason"] for t in program.trials()] == [f"the objective is {math.nan}"] * 2


def test_a_dry_run_shows_the_plan_and_leaves_nothing(program: Program) -> None:
    out = program.sweep(*SPACE, "hydra.sweeper.dry_run=true")
    assert "nothing was started" in out
    assert "x in -5 .. 5; y in {1, 2, 3}" in out
    assert program.calls == []
    assert not (program.folder / "multirun").exists()


def test_an_interrupt_gives_the_trial_back_and_tells_how_to_go_on(program: Program) -> None:
    process = program.start(*SPACE, "hydra.sweeper.n_trials=3", "seconds=0.5")
    while len(program.calls) < 2:
        time.sleep(0.01)
    process.terminate()
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "continue with: python app.py -m" in out
    program.sweep(*SPACE, "hydra.sweeper.n_trials=3", "seconds=0.5")
    assert [t.state for t in program.trials()] == [TrialState.COMPLETE] * 3
    assert [number for number, _, _ in program.calls] == [0, 1, 1, 2]


def test_workers_side_by_side_share_the_budget_and_repeat_nothing(program: Program) -> None:
    program.sweep("x=range(1,5)", "y=choice(1,2)", "hydra.sweeper.n_trials=6", "hydra.sweeper.n_jobs=2")
    assert sorted(number for number, _, _ in program.calls) == sorted(t.number for t in program.trials() if t.values)
    assert len(program.calls) == len({(x, y) for _, x, y in program.calls}) == 6
