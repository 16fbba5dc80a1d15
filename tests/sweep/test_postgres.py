"""Workers that share a study in a real PostgreSQL (or a journal file), which are killed, and whose database restarts."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages._rdb.models import StudyModel
from optuna.trial import FrozenTrial, TrialState

from mathverify.errors import UserError
from mathverify.records import read_record
from mathverify.sweep import attempt as attempts
from mathverify.sweep import storage as storages
from mathverify.sweep.outcome import End, Outcome
from mathverify.sweep.settings import read_settings
from mathverify.sweep.storage import alone, hide_password, open_storage, patience, shown
from mathverify.sweep.study import open_existing

from ..services import PASSWORD, Postgres, postgres_server, wait_until, with_password
from .conftest import Program, Sweep, small

ROOT = Path(__file__).parents[2]
SPACE = ["x=interval(-5,5)", "y=choice(1,2,3)", "hydra/sweeper/sampler=random"]


@pytest.fixture
def own_postgres() -> Iterator[Postgres]:
    """A server that this test alone restarts."""
    with postgres_server() as server:
        yield server


def trials_in(storage: str | None, program: Program) -> list[FrozenTrial]:
    opened = open_storage(storage, program.folder / "multirun/s")
    return optuna.load_study(study_name="s", storage=opened).trials


def several(program: Program, count: int, *overrides: str) -> list[subprocess.Popen[str]]:
    """The same command `count` times; what each says goes to its own file, as a full pipe would stop it."""
    workers = []
    for place in range(count):
        with (program.folder / f"worker{place}.txt").open("w") as said:
            workers.append(program.start(*SPACE, *overrides, said=said))
    return workers


def finish(program: Program, workers: list[subprocess.Popen[str]], killed: set[int], seconds: float) -> None:
    for place, worker in enumerate(workers):
        worker.wait(seconds)
        said = (program.folder / f"worker{place}.txt").read_text()
        assert worker.returncode == (-signal.SIGKILL if place in killed else 0), said
        assert "Traceback" not in said


def check_each_once(program: Program, trials: list[FrozenTrial], count: int, cut_short: int) -> None:
    """Every trial of the budget is told once, with its own value, and only what was cut short ran a second time."""
    assert [t.number for t in trials] == list(range(count))
    assert {t.state for t in trials} == {TrialState.COMPLETE}
    assert all(t.value == pytest.approx(t.params["x"] ** 2 + t.params["y"]) for t in trials)
    calls = Counter(number for number, _, _ in program.calls)
    assert set(calls) == set(range(count))
    assert sum(calls.values()) <= count + cut_short
    points = {(x, y) for _, x, y in program.calls}
    assert len(points) == count


def wait_for_calls(program: Program, count: int) -> None:
    wait_until(lambda: len(program.calls) >= count, f"{count} trials have begun", seconds=240, poll=0.02)


@pytest.mark.long
@pytest.mark.parametrize("where", ["postgres", "sqlite"])
def test_four_workers_start_one_study_at_once_and_one_is_killed(
    program: Program, where: str, request: pytest.FixtureRequest
) -> None:
    if where == "postgres":
        url = request.getfixturevalue("postgres").database()
    else:
        url = f"sqlite:///{program.folder}/study.db"
    workers = several(program, 4, f"hydra.sweeper.storage={url}", "hydra.sweeper.n_trials=24", "seconds=0.3")
    wait_for_calls(program, 8)
    workers[1].kill()
    finish(program, workers, {1}, 120)
    check_each_once(program, trials_in(url, program), 24, cut_short=1)


@pytest.mark.long
@pytest.mark.parametrize("where", ["postgres", "journal"])
def test_eight_workers_200_trials_two_killed_and_the_database_restarted(
    program: Program, where: str, request: pytest.FixtureRequest
) -> None:
    server: Postgres | None = request.getfixturevalue("own_postgres") if where == "postgres" else None
    url = server.database() if server is not None else None
    storage = [f"hydra.sweeper.storage={url}"] if url is not None else []
    workers = several(program, 8, *storage, "hydra.sweeper.n_trials=200", "seconds=0.02")
    for victim, how in [(0, signal.SIGINT), (5, signal.SIGQUIT)]:
        wait_for_calls(program, 30 + 14 * victim)
        workers[victim].kill()
        wait_for_calls(program, 60 + 14 * victim)
        if server is not None:
            server.restart(how)
    finish(program, workers, {0, 5}, 300)
    check_each_once(program, trials_in(url, program), 200, cut_short=2)


@pytest.mark.long
def test_a_worker_that_loses_the_lock_writes_nothing_more(postgres: Postgres, tmp_path: Path) -> None:
    """Fencing: between losing its connection and beginning anew, a section's writes come to nothing."""
    url = postgres.database()
    database = url.rpartition("/")[2]
    study = optuna.create_study(storage=open_storage(url, tmp_path), study_name="s")
    storage: Any = study._storage._backend  # type: ignore[attr-defined]
    others_turn: list[int] = []
    tries: list[int] = []

    def other() -> None:
        alone(open_storage(url, tmp_path), "s", tmp_path, lambda: others_turn.append(len(study.trials)))

    def section() -> int:
        tries.append(len(tries))
        if len(tries) == 1:
            storage.set_study_user_attr(study._study_id, "before", 1)
            postgres.sql(
                f"SELECT pg_terminate_backend(pid) FROM pg_locks JOIN pg_stat_activity USING (pid) "
                f"WHERE locktype = 'advisory' AND datname = '{database}' AND granted"
            )
            thread = threading.Thread(target=other)
            thread.start()
            thread.join(30)
            assert others_turn, "the lock of a lost connection is free"
            for _ in range(2):  # Optuna itself tries a second time
                with pytest.raises(optuna.exceptions.StorageInternalError):
                    storage.set_study_user_attr(study._study_id, "after", 1)
        study.ask()
        return len(tries)

    assert alone(storage, "s", tmp_path, section) == 2
    assert study.user_attrs == {"before": 1}
    assert len(study.trials) == 1


@pytest.mark.long
@pytest.mark.parametrize("within_a_section", [True, False])
def test_a_connection_cut_between_two_queries_of_one_read_is_an_outage_too(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, within_a_section: bool
) -> None:
    """Optuna swallows the error of a read's second query and tries another on the same connection."""
    url = postgres.database()
    study = optuna.create_study(storage=open_storage(url, tmp_path), study_name="s")
    study.ask()
    plain = StudyModel.find_or_raise_by_id
    cut: list[bool] = []

    def cutting(*arguments: Any, **named: Any) -> Any:
        found = plain(*arguments, **named)
        if not cut:
            cut.append(True)
            name = url.rpartition("/")[2]
            postgres.sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
        return found

    monkeypatch.setattr(StudyModel, "find_or_raise_by_id", cutting)
    if within_a_section:
        storage: Any = study._storage._backend  # type: ignore[attr-defined]
        assert alone(storage, "s", tmp_path, lambda: len(study.get_trials())) == 1
    else:
        assert len(study.get_trials()) == 1
    assert cut


CUTTING = """
import os, psycopg
from mathverify.sweep import study
plain, cut = study.Session.mark, []

def mark(self, trial, **marks):
    for key, value in marks.items():
        if key == os.environ["CUT_AT"] and trial.number == 1 and not cut:
            cut.append(key)
            with psycopg.connect(os.environ["STUDY_URL"]) as connection:
                connection.execute("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'")
            print("cut at", key, flush=True)
        plain(self, trial, **{key: value})

study.Session.mark = mark
"""


@pytest.mark.long
@pytest.mark.parametrize("at", ["job", "owner", "attempt", "claimed", "outcome"])
def test_wherever_a_section_is_cut_it_begins_anew_and_every_trial_runs_once(
    program: Program, postgres: Postgres, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """Half a proposal is no trial of anybody's: neither waited for, nor run twice."""
    monkeypatch.setenv("STUDY_URL", url := postgres.database())
    monkeypatch.setenv("CUT_AT", at)
    app = program.folder / "app.py"
    app.write_text(CUTTING + app.read_text())
    out = program.sweep(*SPACE, "hydra.sweeper.storage='${oc.env:STUDY_URL}'", "hydra.sweeper.n_trials=3")
    assert f"cut at {at}" in out
    check_each_once(program, trials_in(url, program), 3, cut_short=0)


@pytest.mark.long
def test_a_worker_that_stands_still_within_a_section_is_cut_off(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Suspended, or its machine gone: the others go on, and what it would write when it wakes up comes to nothing."""
    assert storages._LOCK_SETTINGS.count("'5min'") == 2
    monkeypatch.setattr(storages, "_LOCK_SETTINGS", storages._LOCK_SETTINGS.replace("5min", "1s"))
    url = postgres.database()
    study = optuna.create_study(storage=open_storage(url, tmp_path), study_name="s")
    storage: Any = study._storage._backend  # type: ignore[attr-defined]
    order: list[str] = []

    def other() -> None:
        alone(open_storage(url, tmp_path), "s", tmp_path, lambda: order.append("another works"))

    def sleepy() -> None:
        order.append("sleeps")
        if order.count("sleeps") == 1:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join(30)
        study.ask()
        order.append("done")

    alone(storage, "s", tmp_path, sleepy)
    assert order == ["sleeps", "another works", "sleeps", "done"]
    assert len(study.trials) == 1


@pytest.mark.long
def test_a_section_shuts_out_another_process_until_it_ends(postgres: Postgres, tmp_path: Path) -> None:
    url = postgres.database()
    first, second = open_storage(url, tmp_path), open_storage(url, tmp_path)
    order: list[str] = []

    def slow() -> None:
        order.append("first in")
        time.sleep(0.5)
        order.append("first out")

    thread = threading.Thread(target=lambda: alone(first, "s", tmp_path, slow))
    thread.start()
    wait_until(lambda: bool(order), "the first is in", poll=0.01)
    alone(second, "another study", tmp_path, lambda: order.append("another study"))
    alone(second, "s", tmp_path, lambda: order.append("second"))
    thread.join()
    assert order == ["first in", "another study", "first out", "second"]


@pytest.mark.long
def test_a_database_that_stays_away_ends_the_sweep_with_one_line(
    own_postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = own_postgres.database()
    study = optuna.create_study(storage=open_storage(url, tmp_path), study_name="s")
    own_postgres.stop()
    with pytest.raises(UserError, match=r"does not answer .*the same command again, which continues"), patience(1):
        _ = study.trials
    with pytest.raises(UserError, match=r"cannot be opened \(.*connection.*\): see that it runs"):
        open_storage(url, tmp_path)
    assert time.monotonic() - storages.last_outage() < 10
    own_postgres.start()
    assert study.trials == []


@pytest.mark.long
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda url: url.replace(PASSWORD, "other-planted-7"), "password authentication failed"),
        (lambda url: url.replace("/study_", "/no_study_"), "does not exist"),
        (lambda url: url.replace("127.0.0.1", "no-such-host.invalid"), "no-such-host|translate|resolve"),
        (lambda url: "nosuchdb://me:" + PASSWORD + "@h/d", "nosuchdb"),
    ],
)
def test_a_database_that_refuses_is_one_line_at_once(
    program: Program, postgres: Postgres, wrong: Any, says: str
) -> None:
    url = wrong(postgres.database())
    out = program.sweep(*SPACE, f"hydra.sweeper.storage={url}", "hydra.sweeper.n_trials=1", code=2)
    (line,) = [line for line in out.splitlines() if line.strip()]
    assert re.search(r"^error: hydra.sweeper.storage = \S+ cannot be opened \(", line)
    assert re.search(says, line)
    assert PASSWORD not in out
    assert "other-planted-7" not in out
    assert not (program.folder / "multirun").exists()


@pytest.mark.long
def test_a_database_that_is_away_holds_up_no_training(
    program: Program, own_postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A validation that cannot be reported is left out; a trial's end is waited for."""
    url = own_postgres.database()
    program.sweep(*SPACE, f"hydra.sweeper.storage={url}", "hydra.sweeper.n_trials=1")
    monkeypatch.setattr(attempts, "briefly", lambda: patience(0.2))
    keys = {"storage": url, "study_name": "s", "sampler": {"_target_": "optuna.samplers.RandomSampler"}}
    session = open_existing(read_settings(keys), program.folder / "multirun/s")
    trial = session.study.ask()
    session.mark(trial, attempt={"token": "t", "count": 1})
    attempt = attempts.Attempt(session, trial.number, "t", trial._trial_id)
    attempt.claim()
    own_postgres.stop()
    assert attempt.judge(1, {"validation/accuracy": 0.5}) is None
    attempt.released()  # nobody to tell: it is found later
    ending = threading.Thread(target=attempt.ended, args=[Outcome(End.completed, [0.5])])
    ending.start()
    time.sleep(1)
    own_postgres.start()
    ending.join(60)
    attempt.judge(2, {"validation/accuracy": 0.75})
    told = session.trial(trial.number)
    assert told.intermediate_values == {2: 0.75}
    assert told.user_attrs["outcome"]["values"] == [0.5]


@pytest.mark.long
def test_a_sweep_can_be_interrupted_while_its_database_is_away(program: Program, own_postgres: Postgres) -> None:
    url = own_postgres.database()
    words = [*SPACE, f"hydra.sweeper.storage={url}", "hydra.sweeper.n_trials=4", "seconds=0.5"]
    process = program.start(*words)
    wait_for_calls(program, 2)
    own_postgres.stop()
    time.sleep(2)  # by now it tries in vain
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert "continue with: " in out
    assert "Traceback" not in out + err
    own_postgres.start()
    program.sweep(*words)
    check_each_once(program, trials_in(url, program), 4, cut_short=1)


@pytest.mark.long
def test_two_packs_on_one_study_one_of_them_killed(postgres: Postgres, tmp_path: Path) -> None:
    """mathverify.train's own runs, two at once in each of two processes; what the dead one had is continued."""
    url = postgres.database()
    words = small(
        "lora=choice(r4,r16)", "seed=choice(1,2,3)", "hydra/sweeper=optuna", "hydra/sweeper/sampler=grid",
        "hydra/launcher=pack", "hydra.sweeper.n_jobs=2", "hydra.sweeper.n_trials=6", "hydra.sweeper.study_name=s",
        "hydra.sweeper.storage='${oc.env:STUDY_URL}'", f"data.cache_dir='{tmp_path}/cache'",
    )  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "STUDY_URL": url, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mathverify.train", "-m", *words]
    workers = []
    for place in range(2):
        with (tmp_path / f"worker{place}.txt").open("w") as said:
            workers.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=said, stderr=said))
    folder = tmp_path / "multirun/s"
    try:
        wait_until(lambda: len(list(folder.glob("*/metrics.jsonl"))) >= 3, "both packs train", seconds=240, poll=0.05)
        workers[0].kill()
        assert workers[1].wait(400) == 0, (tmp_path / "worker1.txt").read_text()
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    trials = optuna.load_study(study_name="s", storage=open_storage(url, folder)).trials
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 6
    assert len({tuple(sorted(t.params.items())) for t in trials}) == 6
    assert all(read_record(folder / str(t.number)).metrics.validation.accuracy.value == t.value for t in trials)  # type: ignore[union-attr]
    assert with_password(tmp_path) == []


# Passwords


@pytest.mark.long
@pytest.mark.parametrize(
    ("way", "jobs"), [("override", 1), ("override", 2), ("environment", 1), ("config", 1), ("mapping", 1)]
)
def test_a_password_is_in_no_file_and_no_word(program: Program, postgres: Postgres, way: str, jobs: int) -> None:
    url = postgres.database()
    storage: list[str] = []
    match way:
        case "override":
            storage = [f"hydra.sweeper.storage={url}"]
        case "environment":
            os.environ["STUDY_URL"] = url
            storage = ["hydra.sweeper.storage='${oc.env:STUDY_URL}'"]
        case "config":
            config = program.folder / "conf/config.yaml"
            config.write_text(config.read_text() + f"hydra:\n  sweeper:\n    storage: {url}\n")
        case "mapping":
            target = "_target_:optuna.storages.RDBStorage"
            driver = url.replace("postgresql:", "postgresql+psycopg:")
            storage = [f"hydra.sweeper.storage={{{target},url:'{driver}'}}"]
    words = [*SPACE, *storage, "+fail=2", "hydra.sweeper.n_trials=4", f"hydra.sweeper.n_jobs={jobs}"]
    words += ["hydra.sweeper.stop_after_same_failures=4"]
    try:
        out = program.sweep(*words, code=3)
    finally:
        os.environ.pop("STUDY_URL", None)
    (program.folder / "out.txt").write_text(out)
    kept = [program.folder / "conf/config.yaml"] if way == "config" else []
    assert with_password(program.folder) == kept
    assert (program.folder / "multirun/s/0/.hydra/hydra.yaml").exists()
    assert (program.folder / "multirun/s/multirun.yaml").exists()
    assert any((program.folder / "multirun/s").glob("*/error.txt"))
    assert len(trials_in(url, program)) == 4


@pytest.mark.long
def test_a_run_of_ours_has_no_password_either(
    postgres: Postgres, sweep_here: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mathverify.train itself, two runs in one pack: result.json, W&B's offline files, checkpoints and all words."""
    keep_environment(monkeypatch)
    url = postgres.database()
    swept = sweep_here(
        *small("lora=choice(r4,r16)", "hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_trials=2",
               "hydra.sweeper.study_name=s", f"hydra.sweeper.storage={url}", "hydra.sweeper.n_jobs=2",
               "tracking=wandb", "tracking.mode=offline", "hydra/launcher=pack")
    )  # fmt: skip
    assert swept.code == 0, swept.out
    assert PASSWORD not in swept.out
    assert with_password(swept.folder) == []
    names = {path.name for path in swept.folder.rglob("*")}
    assert {"result.json", "hydra.yaml", "overrides.yaml", "multirun.yaml", "checkpoint"} <= names
    assert any(name.endswith(".wandb") for name in names)


@pytest.mark.long
def test_an_interrupt_names_no_password(program: Program, postgres: Postgres) -> None:
    url = postgres.database()
    process = program.start(*SPACE, f"hydra.sweeper.storage={url}", "hydra.sweeper.n_trials=3", "seconds=0.5")
    wait_for_calls(program, 2)
    process.terminate()
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "continue with:" in out
    assert PASSWORD not in out + err
    assert with_password(program.folder) == []


def keep_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what a sweep in this process does to it."""
    for name in (storages.STORAGE_VARIABLE, storages.PASSWORD_VARIABLE, storages.PLAIN_VARIABLE):
        monkeypatch.setenv(name, "")


@pytest.mark.parametrize(
    ("storage", "secret"),
    [
        ("postgresql://me:secret-4@host/db", "secret-4"),
        ("postgresql://me:se/cr:et@4@host:5432/db", "se/cr:et@4"),
        ("postgresql+psycopg://me:s%2Fcret-4@host/db", "s%2Fcret-4"),
        ("mysql://me:secret '4\"@host/db", "secret '4\""),
        ({"_target_": "optuna.storages.RDBStorage", "url": "postgresql://me:se/cret4@host/db"}, "se/cret4"),
        ("postgresql://host/db?user=me&password=secret-4", "secret-4"),
    ],
)
def test_a_storage_is_shown_without_its_password(
    storage: str | dict[str, Any], secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_environment(monkeypatch)
    assert secret not in shown(storage)
    assert "host" in shown(storage)
    assert hide_password(storage)
    assert storages.hidden_storage() == storage
    assert not hide_password(None)  # the next sweep of this process
    assert storages.hidden_storage() is None


@pytest.mark.parametrize(
    "storage", [None, "journal:///tmp/a:b@c/study.journal", "sqlite:///study.db", "postgresql://host/db"]
)
def test_a_storage_without_a_password_is_left_alone(storage: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_environment(monkeypatch)
    assert not hide_password(storage)
    assert storages.hidden_storage() is None
    assert shown(storage) == (storage or "journal file")
