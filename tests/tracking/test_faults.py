"""Whatever the network does to W&B, training goes on, one line warns, and the end comes soon. With the real client."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mathverify.config import RunConfig, TrackingConfig
from mathverify.errors import UserError
from mathverify.records import Status, read_record
from mathverify.tracking import WandbTracker, open_tracker, uploads_in_background
from mathverify.tracking.service import Outage
from tests.journeys.conftest import SMALL
from tests.loopback_wandb import KEY, LoopbackWandb

from .runs import ROOT, lines, planted_in, wandb_id

PROCESS = """
import logging, sys, time
from pathlib import Path
from mathverify.config import RunConfig
from mathverify.tracking import open_tracker, uploads_in_background
logging.basicConfig(level=logging.INFO, format="%(message)s")
steps, *folders = sys.argv[1:]
slowest = 0.0
with uploads_in_background():
    trackers = [open_tracker(RunConfig(), Path(folder), start_seconds=3, finish_seconds=3) for folder in folders]
    for step in range(1, int(steps) + 1):
        for tracker in trackers:
            before = time.monotonic()
            tracker.log(step, {"train/loss": 1 / step})
            slowest = max(slowest, time.monotonic() - before)
        time.sleep(0.1)
    for tracker in trackers:
        tracker.summarize({"test/accuracy": 0.5})
        tracker.finish()
print(slowest)
"""
EARLY = ["refuse", "401", "500", "html", "slow", "cut", "torn", "hang"]
LATE = ["401", "500", "html", "slow", "cut", "torn", "hang"]
QUICK = {("refuse", "early"), ("401", "early"), ("401", "late"), ("500", "late"), ("cut", "late"), ("hang", "late")}


@pytest.mark.parametrize(
    ("behaviour", "when"),
    [
        pytest.param(b, when, marks=pytest.mark.slow if (b, when) in QUICK else pytest.mark.long)
        for when, cases in (("early", EARLY), ("late", LATE))
        for b in cases
    ],
)
def test_a_fault_of_the_network_costs_one_warning_and_a_bounded_wait(
    server: LoopbackWandb, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, behaviour: str, when: str
) -> None:
    """A process with two runs ends well and soon, with all its numbers on disk, whatever the server does and when."""
    if behaviour == "refuse":
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    elif when == "early":
        server.behaviour = behaviour
    steps = 30 if when == "early" else 60
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", PROCESS, str(steps), *map(str, folders)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if when == "late":
        for folder in folders:
            wait_for_a_row(server, folder)
        server.behaviour = behaviour
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert float(out) < 0.5, "logging must not wait for the server"
    for folder in folders:
        assert [line["step"] for line in lines(folder)] == list(range(1, steps + 1))
        assert list(folder.glob("wandb/*run-*/*.wandb")), "W&B's own log is kept for wandb sync"
    said = err.strip().splitlines()
    # A slow server takes everything in the end, and one that answers 200, whatever the rest of it, says that it did.
    assert len(said) == 1 or (not said and (behaviour == "slow" or (behaviour in ("html", "torn") and when == "late")))
    assert all("W&B does not take everything" in line and "wandb sync" in line for line in said)
    assert planted_in(tmp_path) == []
    assert KEY not in out + err


def wait_for_a_row(server: LoopbackWandb, folder: Path) -> None:
    limit = time.monotonic() + 30
    while not (folder / "tracking.json").exists() and time.monotonic() < limit:
        time.sleep(0.05)
    assert server.wait_for_rows(wandb_id(folder), 1, seconds=30)


@pytest.mark.slow
def test_an_interrupted_run_does_not_wait_long_for_a_server_that_hangs(server: LoopbackWandb, tmp_path: Path) -> None:
    server.behaviour = "hang"
    began = time.monotonic()
    with uploads_in_background():
        tracker = open_tracker(RunConfig(), tmp_path)  # with the waits that users have
        tracker.log(1, {"train/loss": 0.5})
        tracker.finish(Status.interrupted)
    assert time.monotonic() - began < 15
    assert [line["step"] for line in lines(tmp_path)] == [1]


@pytest.mark.slow
@pytest.mark.parametrize("behaviour", ["ok", "hang"])
def test_eight_runs_side_by_side_keep_apart_and_end_together(
    server: LoopbackWandb, tmp_path: Path, behaviour: str
) -> None:
    """Each has its own numbers; the wait for a server that falls silent is one run's, not eight times it."""
    folders = [tmp_path / str(number) for number in range(8)]
    with uploads_in_background():
        trackers = []
        for folder in folders:
            folder.mkdir()
            config = replace(RunConfig(), seed=int(folder.name))
            trackers.append(open_tracker(config, folder, start_seconds=4, finish_seconds=4))
        for step in range(1, 11):
            for number, tracker in enumerate(trackers):
                tracker.log(step, {"train/loss": number + step / 100})
        for folder in folders:
            assert server.wait_for_rows(wandb_id(folder), 1, seconds=30)
        server.behaviour = behaviour
        began = time.monotonic()
        for tracker in trackers:
            tracker.summarize({"test/accuracy": 0.5})
            tracker.finish()
        assert time.monotonic() - began < 1, "an end is handed over, not waited for"
    assert time.monotonic() - began < 40
    assert len(server.run_ids) == 8
    for number, folder in enumerate(folders):
        assert [line["train/loss"] for line in lines(folder)] == [number + step / 100 for step in range(1, 11)]
        if behaviour == "ok":
            rows = [row for row in server.rows(wandb_id(folder)) if "train/loss" in row]
            assert [row["train/loss"] for row in rows] == [number + step / 100 for step in range(1, 11)]
            assert server.run(wandb_id(folder))["config"]["seed"] == number
            assert server.exits[wandb_id(folder)] == 0


def test_a_run_that_nobody_ended_is_ended_as_failed(server: LoopbackWandb, tmp_path: Path) -> None:
    with contextlib.suppress(UserError), uploads_in_background():
        open_tracker(RunConfig(), tmp_path, finish_seconds=20).log(1, {"train/loss": 0.5})
        raise UserError("no space left")
    assert server.summary[wandb_id(tmp_path)]["status"] == "failed"
    assert server.exits[wandb_id(tmp_path)] == 1


def test_after_an_outage_a_later_run_goes_online_again(
    server: LoopbackWandb, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A pack need not try one by one; a run of the same process some time later does."""
    server.behaviour = "401"
    for name, wait in (("first", 0.0), ("soon", 0.0), ("later", 1000.0)):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(Outage, "began", Outage.began - wait)
        asked = len(server.bodies)
        with open_tracker(RunConfig(), tmp_path / name, start_seconds=4, finish_seconds=20) as tracker:
            tracker.log(1, {"train/loss": 0.5})
        assert (len(server.bodies) > asked) == (name != "soon")
        server.behaviour = "ok"
    assert [row["train/loss"] for row in server.rows(wandb_id(tmp_path / "later")) if "train/loss" in row] == [0.5]


def test_a_failing_action_does_not_reach_training(
    server: LoopbackWandb, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = RunConfig(tracking=TrackingConfig(log_adapter=True))
    with open_tracker(config, tmp_path, finish_seconds=20) as tracker:
        assert isinstance(tracker, WandbTracker)
        tracker.adapter(tmp_path / "no-such-folder")
        tracker.log(1, {"train/loss": 0.5})
    assert [row["train/loss"] for row in server.rows(wandb_id(tmp_path)) if "train/loss" in row] == [0.5]
    assert len([r for r in caplog.records if r.name.startswith("mathverify.tracking")]) == 1


@pytest.mark.long
@pytest.mark.parametrize("what", ["a run", "a study"])
def test_a_command_ends_well_though_the_server_falls_silent(server: LoopbackWandb, tmp_path: Path, what: str) -> None:
    """As a user has it, with the waits that users have: the run or the study is complete, and one line warns."""
    overrides = [s for s in SMALL if not s.startswith("tracking")] + [f"data.cache_dir='{tmp_path}/cache'"]
    if what == "a run":
        overrides += ["hydra.run.dir=run"]
    else:
        overrides = ["-m", "sweep=rank_grid", "lora=r4", "hydra.sweeper.params={seed:'choice(1,2)'}", *overrides]
        overrides += ["hydra.sweeper.n_trials=2", "hydra.sweep.dir=study"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mathverify.train", *overrides], cwd=tmp_path, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    limit = time.monotonic() + 120
    while not server.run_ids:
        assert time.monotonic() < limit and process.poll() is None
        time.sleep(0.02)
    server.behaviour = "hang"
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, out + err
    folders = [tmp_path / "run"] if what == "a run" else [tmp_path / "study" / "0", tmp_path / "study" / "1"]
    for folder in folders:
        assert read_record(folder).status is Status.completed
        assert [line["step"] for line in lines(folder) if "train/loss" in line] == [1, 2, 3, 4]
    assert (out + err).count("W&B does not take everything") == 1
    assert planted_in(tmp_path) == []
    assert KEY not in out + err
