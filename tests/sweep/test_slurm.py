"""A study as jobs of a real Slurm, some of which are killed."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import suppress

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from mathverify.sweep.storage import open_storage

from ..services import PASSWORD, Postgres, Slurm, wait_until, with_password
from .conftest import Program

pytest.importorskip("submitit", reason="mathverify[slurm] is not installed")
pytestmark = pytest.mark.long

SPACE = ["x=interval(-5,5)", "y=choice(1,2,3)", "hydra/sweeper/sampler=random"]
BY_SLURM = ["hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=30", "hydra.launcher.cpus_per_task=1"]


@pytest.fixture
def cluster(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    """The cluster, as the commands that this test starts find it; empty afterwards."""
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    yield slurm
    with suppress(AssertionError):
        slurm("scancel", "--full", *slurm.jobs("pending,running"))


def check_trials(program: Program, trials: list[FrozenTrial], count: int) -> None:
    """Every trial of the budget is told once, with its own value."""
    assert [t.number for t in trials] == list(range(count))
    assert {t.state for t in trials} == {TrialState.COMPLETE}
    assert all(t.value == pytest.approx(t.params["x"] ** 2 + t.params["y"]) for t in trials)
    assert {number for number, _, _ in program.calls} == set(range(count))
    assert len({(x, y) for _, x, y in program.calls}) == count


def check_study(program: Program, count: int, cut_short: int) -> None:
    check_trials(program, program.trials(), count)
    assert len(program.calls) == count + cut_short


def wait_for_calls(program: Program, count: int) -> None:
    wait_until(lambda: len(program.calls) >= count, f"{count} jobs have begun", seconds=90)


def test_a_study_of_four_trials_as_slurm_jobs(program: Program, cluster: Slurm) -> None:
    before = set(cluster.jobs())
    program.sweep(*SPACE, *BY_SLURM, "hydra.sweeper.n_jobs=4", "hydra.sweeper.n_trials=4", seconds=120)
    check_study(program, 4, cut_short=0)
    # A job has told its outcome before Slurm has put it away.
    wait_until(lambda: not cluster.jobs("running,completing"), "all jobs have ended")
    jobs = {job: state for job, state in cluster.jobs().items() if job not in before}
    assert sorted(jobs.values()) == ["COMPLETED"] * 4


def test_a_job_killed_with_scancel_is_run_again_by_the_same_command(program: Program, cluster: Slurm) -> None:
    """The first command is killed too; the jobs that it had submitted go on, and leave their outcomes."""
    four = [*SPACE, *BY_SLURM, "hydra.sweeper.n_jobs=4", "hydra.sweeper.n_trials=4", "seconds=6"]
    process = program.start(*four)
    wait_for_calls(program, 4)
    running = sorted(cluster.jobs("running"))
    assert len(running) == 4
    process.kill()
    process.communicate()
    cluster("scancel", running[1])
    wait_until(lambda: not cluster.jobs("running,completing"), "all jobs have ended")
    out = program.sweep(*four, seconds=120)
    check_study(program, 4, cut_short=1)
    assert "4 trials: 4 completed, 0 pruned, 0 failed" in out


def test_a_running_command_takes_a_killed_job_over_itself(program: Program, cluster: Slurm) -> None:
    process = program.start(*SPACE, *BY_SLURM, "hydra.sweeper.n_jobs=4", "hydra.sweeper.n_trials=4", "seconds=6")
    wait_for_calls(program, 4)
    cluster("scancel", sorted(cluster.jobs("running"))[0])
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    check_study(program, 4, cut_short=1)


def test_an_interrupted_command_leaves_its_jobs_alone(program: Program, cluster: Slurm) -> None:
    """What runs goes on and counts; what was cancelled while it waited, of which submitit never hears, is run again."""
    four = [*SPACE, *BY_SLURM[:2], "hydra.launcher.cpus_per_task=2", "hydra.sweeper.n_jobs=4"]
    four += ["hydra.sweeper.n_trials=4", "seconds=4"]  # of four processors: two jobs at a time
    process = program.start(*four)
    wait_for_calls(program, 1)
    wait_until(lambda: bool(cluster.jobs("pending")), "a job waits", seconds=30)
    cluster("scancel", sorted(cluster.jobs("pending"))[-1])
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert "continue with:" in out
    program.sweep(*four, seconds=120)
    check_study(program, 4, cut_short=0)


def test_an_array_of_workers_shares_a_study(program: Program, cluster: Slurm, postgres: Postgres) -> None:
    """The same command as three jobs, one of them killed; they have nothing in common but the database."""
    words = [*SPACE, "hydra.sweeper.storage='${oc.env:STUDY_URL}'", "hydra.sweeper.n_trials=12", "seconds=1"]
    standard = ["hydra.sweeper.study_name=s", "hydra.sweeper.sampler.seed=1"]
    command = shlex.join([sys.executable, "app.py", "-m", *standard, *words])
    os.environ["STUDY_URL"] = url = postgres.database()
    try:
        where = ["--array=0-2", f"--chdir={program.folder}", f"--output={program.folder}/worker%a.txt"]
        cluster("sbatch", *where, "--cpus-per-task=1", "--wrap", command)
    finally:
        del os.environ["STUDY_URL"]
    wait_for_calls(program, 5)
    cluster("scancel", sorted(cluster.jobs("running"))[0])
    wait_until(lambda: not cluster.jobs("running,pending,completing"), "all workers have ended", seconds=90)
    trials = optuna.load_study(study_name="s", storage=open_storage(url, program.folder)).trials
    check_trials(program, trials, 12)
    assert len(program.calls) <= 13
    assert with_password(program.folder) == []


def test_a_database_password_reaches_the_jobs_and_no_file(program: Program, cluster: Slurm, postgres: Postgres) -> None:
    url = postgres.database()
    out = program.sweep(
        *SPACE, *BY_SLURM, f"hydra.sweeper.storage={url}", "hydra.sweeper.n_jobs=2", "hydra.sweeper.n_trials=2",
        seconds=120,
    )  # fmt: skip
    assert "2 trials: 2 completed" in out
    assert PASSWORD not in out
    assert list(program.folder.rglob("*_submitted.pkl"))
    assert with_password(program.folder) == []
