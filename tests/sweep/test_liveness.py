"""Workers on different machines: a live one keeps its trial however long it takes, a dead one's is taken over."""

from __future__ import annotations

import math
import os
import signal
import subprocess
from typing import IO

import optuna
import pytest
from optuna.trial import TrialState

from mathverify.sweep.liveness import Watch, Worker
from mathverify.sweep.storage import open_storage

from ..services import Postgres, wait_until
from .conftest import Program

HERE = Worker.this()
ELSEWHERE = Worker("another machine", 1, 1, "node2")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_worker_elsewhere_is_dead_once_its_beat_has_stood_still_long_enough() -> None:
    clock = Clock()
    watch = Watch(60, clock=clock)
    assert watch.is_alive(0, ELSEWHERE, 1.0)
    clock.now += 59
    assert watch.is_alive(0, ELSEWHERE, 1.0)
    assert watch.is_alive(0, ELSEWHERE, 2.0)  # whatever its clock says: it changed
    clock.now += 59
    assert watch.is_alive(0, ELSEWHERE, 2.0)
    assert watch.is_alive(1, ELSEWHERE, 2.0)  # another trial of it has a beat of its own
    clock.now += 2
    assert not watch.is_alive(0, ELSEWHERE, 2.0)
    assert watch.is_alive(1, ELSEWHERE, 2.0)
    assert watch.is_alive(0, Worker("another machine", 1, 2, "node2"), 2.0)  # its successor is seen for the first time


def test_nobody_is_dead_for_a_silence_of_the_storage() -> None:
    """While it did not answer nobody could beat; everyone has the full time anew."""
    clock = Clock()
    outage = [-math.inf]
    watch = Watch(60, lambda: outage[0], clock)
    assert watch.is_alive(0, ELSEWHERE, 1.0)
    clock.now += 300
    outage[0] = clock.now - 1
    assert watch.is_alive(0, ELSEWHERE, 1.0)
    clock.now += 58
    assert watch.is_alive(0, ELSEWHERE, 1.0)
    clock.now += 2
    assert not watch.is_alive(0, ELSEWHERE, 1.0)


def test_a_worker_here_is_asked_for_at_the_kernel() -> None:
    watch = Watch(60, clock=Clock())
    assert watch.is_alive(0, HERE, None)
    child = subprocess.Popen(["sleep", "60"])
    dead = Worker(HERE.machine, child.pid, HERE.started + 1)  # the id of a live process that began at another time
    assert not watch.is_alive(0, dead, None)
    child.kill()
    child.wait()
    assert not watch.is_alive(0, Worker(HERE.machine, child.pid, HERE.started), None)


# Two machines of one study


@pytest.fixture
def two_machines(program: Program) -> Program:
    """Processes believe to be on the machine that MACHINE names, and beat often; values tell who found them."""
    app = program.folder / "app.py"
    plain = "return config.x**2 + config.y\n"
    assert plain in app.read_text()
    app.write_text(
        "import os\nfrom mathverify.sweep import liveness\n\n"
        "liveness._machine = lambda: os.environ['MACHINE']\n"
        "liveness.Heart.__init__.__defaults__ = (0.2,)\n\n"
        + app.read_text().replace(plain, "return config.x**2 + config.y + 1000 * (os.environ['MACHINE'] == 'b')\n")
    )
    return program


def on(machine: str, program: Program, *overrides: str, said: IO[str] | None = None) -> subprocess.Popen[str]:
    os.environ["MACHINE"] = machine
    try:
        return program.start(
            "x=interval(-5,5)", "y=choice(1,2,3)", "hydra.sweeper.n_trials=1", "hydra.sweeper.dead_after=2",
            *overrides, said=said,
        )  # fmt: skip
    finally:
        del os.environ["MACHINE"]


def ended(process: subprocess.Popen[str], code: int = 0) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, out + err
    return out + err


def begun(program: Program, count: int) -> None:
    wait_until(lambda: len(program.calls) >= count, f"{count} trials have begun", poll=0.02)


def finder(program: Program, storage: str | None = None) -> str:
    """The machine whose value the study has."""
    opened = open_storage(storage, program.folder / "multirun/s")
    (trial,) = optuna.load_study(study_name="s", storage=opened).trials
    assert trial.state is TrialState.COMPLETE
    by_a = trial.params["x"] ** 2 + trial.params["y"]
    assert trial.value is not None
    assert trial.value in (pytest.approx(by_a), pytest.approx(by_a + 1000))
    return "a" if trial.value < 900 else "b"


@pytest.mark.slow
def test_a_long_trial_stays_with_its_worker_on_another_machine(two_machines: Program) -> None:
    first = on("a", two_machines, "seconds=7")
    begun(two_machines, 1)
    second = on("b", two_machines, "seconds=7")
    assert "waiting for trials that other workers have in hand" in ended(second)
    ended(first)
    assert len(two_machines.calls) == 1
    assert finder(two_machines) == "a"


@pytest.mark.slow
def test_a_trial_of_a_dead_worker_on_another_machine_is_taken_over(two_machines: Program) -> None:
    first = on("a", two_machines, "seconds=1")
    begun(two_machines, 1)
    first.kill()
    first.communicate()
    second = on("b", two_machines, "seconds=1")
    assert "waiting for trials that other workers have in hand" in ended(second)
    assert len(two_machines.calls) == 2
    assert finder(two_machines) == "b"


@pytest.mark.long
def test_a_worker_that_was_suspended_and_robbed_tells_nothing(two_machines: Program, postgres: Postgres) -> None:
    """As under Slurm's preemption by suspension: it wakes up, finishes, and finds that its trial is another's.

    In a database, since a suspended process keeps a file's lock, which it may just have for its beat.
    """
    storage = f"hydra.sweeper.storage={(url := postgres.database())}"
    first = on("a", two_machines, "seconds=3", storage)
    begun(two_machines, 1)
    first.send_signal(signal.SIGSTOP)
    second = on("b", two_machines, "seconds=3", storage)
    begun(two_machines, 2)
    first.send_signal(signal.SIGCONT)
    ended(first)
    ended(second)
    assert len(two_machines.calls) == 2
    assert finder(two_machines, url) == "b"
