"""A study as jobs of a real Slurm, some of which are killed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

import pytest
from optuna.trial import TrialState

from ..services import PASSWORD, Postgres, Slurm, wait_until
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


def check_study(program: Program, count: int, cut_short: int) -> None:
    trials = program.trials()
    assert [t.number for t in trials] == list(range(count))
    assert {t.state for t in trials} == {TrialState.COMPLETE}
    assert all(t.value == pytest.approx(t.params["x"] ** 2 + t.params["y"]) for t in trials)
    calls = Counter(number for number, _, _ in program.calls)
    assert set(calls) == set(range(count))
    assert sum(calls.values()) == count + cut_short
    assert len({(x, y) for _, x, y in program.calls}) == count


def wait_for_calls(program: Program, count: int) -> None:
    wait_until(lambda: len(program.calls) >= count, f"{count} jobs have begun", seconds=90)


def test_a_study_of_four_trials_as_slurm_jobs(program: Program, cluster: Slurm) -> None:
    before = set(cluster.jobs())
    program.sweep(*SPACE, *BY_SLURM, "hydra.sweeper.n_jobs=4", "hydra.sweeper.n_trials=4", seconds=120)
    check_study(program, 4, cut_short=0)
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


def test_a_database_password_reaches_the_jobs_and_no_file(program: Program, cluster: Slurm, postgres: Postgres) -> None:
    url = postgres.database()
    out = program.sweep(
        *SPACE, *BY_SLURM, f"hydra.sweeper.storage={url}", "hydra.sweeper.n_jobs=2", "hydra.sweeper.n_trials=2",
        seconds=120,
    )  # fmt: skip
    assert "2 trials: 2 completed" in out
    assert PASSWORD not in out
    written = [path for path in program.folder.rglob("*") if path.is_file()]
    assert any(re.search(r"_submitted\.pkl$", path.name) for path in written)
    assert [path for path in written if PASSWORD.encode() in path.read_bytes()] == []
