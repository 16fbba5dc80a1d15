"""Numbers reach metrics.jsonl always and W&B while the run goes on; an outage costs one warning and no hang.

The W&B tests use the real client against a loopback server.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mathverify.config import LoraConfig, RunConfig, TrackingConfig, TrackingKind, TrackingMode
from mathverify.errors import UserError
from mathverify.records import Predictions, Status
from mathverify.tracking import Tracker, WandbTracker, account, open_tracker, uploads_in_background
from mathverify.tracking.service import Outage, Warnings
from tests.loopback_wandb import KEY, LoopbackWandb

ROOT = Path(__file__).resolve().parents[1]
OFF = RunConfig(tracking=TrackingConfig(kind=TrackingKind.none))
PLANTED = {
    "HF_TOKEN": "hf_PlantedPlantedPlanted0123",
    "MY_SERVICE_KEY": "planted-service-key-value",
    "DB_PASSWORD": "planted-db-password",
    "PLAIN_ENVIRONMENT": "planted-environment-value",
}


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def predictions(rows: int) -> Predictions:
    ids = [str(i) for i in range(rows)]
    return Predictions(ids, ids, ["sums"] * rows, np.arange(rows) % 2 == 0, np.linspace(-2, 2, rows))


@pytest.fixture
def calm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No W&B settings of the machine, and no outage remembered from another test."""
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(Warnings, "_warned", False)
    monkeypatch.setattr(Outage, "began", -math.inf)
    monkeypatch.setattr(Warnings, "_said_offline", False)
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()  # it keeps the first server and login for the whole process


@pytest.fixture
def server(calm: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackWandb]:
    with LoopbackWandb() as loopback:
        point_at(loopback, monkeypatch)
        yield loopback


def point_at(loopback: LoopbackWandb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", loopback.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)


def wandb_id(folder: Path) -> str:
    return str(json.loads((folder / "tracking.json").read_text())["wandb_id"])


def planted_in(folder: Path) -> list[str]:
    """Files of the folder that hold a planted secret, in plain or as the key itself."""
    needles = [value.encode() for value in (*PLANTED.values(), KEY)]
    files = [p for p in folder.rglob("*") if p.is_file()]
    return [str(p) for p in files if any(needle in p.read_bytes() for needle in needles)]


# metrics.jsonl


def test_every_number_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    with open_tracker(OFF, tmp_path) as tracker:
        assert type(tracker) is Tracker
        tracker.log(1, {"train/loss": np.float32(0.5), "train/tokens": 3})
        assert lines(tmp_path)[0].items() >= {"step": 1, "train/loss": 0.5, "train/tokens": 3}.items()
        tracker.log(2, {"train/loss": math.nan, "train/grad_norm": math.inf})
        assert lines(tmp_path)[1].items() >= {"step": 2, "train/loss": None, "train/grad_norm": None}.items()
    with pytest.raises(ValueError, match="after finish"):
        tracker.log(3, {})


def test_a_kill_loses_no_logged_line(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        from mathverify.config import *
        from mathverify.tracking import open_tracker
        config = RunConfig(tracking=TrackingConfig(kind=TrackingKind.none))
        tracker = open_tracker(config, Path(sys.argv[1]))
        for step in range(1, 41): tracker.log(step, {"train/loss": 1 / step})
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 41))


def test_a_continued_run_has_each_step_once(tmp_path: Path) -> None:
    """Steps after the checkpoint, and a line torn by a kill, are dropped and logged again."""
    with open_tracker(OFF, tmp_path) as tracker:
        for step in range(1, 8):
            tracker.log(step, {"train/loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "train/lo')
    with open_tracker(OFF, tmp_path, resume_step=5) as tracker:
        for step in range(6, 10):
            tracker.log(step, {"train/loss": float(step)})
    assert [(line["step"], line["train/loss"]) for line in lines(tmp_path)] == [(k, float(k)) for k in range(1, 10)]
    open_tracker(OFF, tmp_path).finish()
    assert lines(tmp_path) == []  # a fresh start keeps nothing


def test_without_tracking_wandb_is_not_imported(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from mathverify.config import *; import mathverify.tracking as t;"
        "config = RunConfig(tracking=TrackingConfig(kind=TrackingKind.none));"
        "t.open_tracker(config, Path(sys.argv[1])).finish(); print('wandb' in sys.modules, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]


# Online or offline


@pytest.mark.parametrize("host", ["api.wandb.ai", "wandb.example.org"])
def test_a_key_in_netrc_counts_for_its_host_only(
    calm: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, host: str
) -> None:
    assert not account.goes_online(TrackingMode.auto)
    (tmp_path / "netrc").write_text(f"machine {host}\n  login user\n  password {KEY}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert account.goes_online(TrackingMode.auto) == (host == "api.wandb.ai")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert account.goes_online(TrackingMode.auto) == (host == "wandb.example.org")
    assert not account.goes_online(TrackingMode.offline)


def test_online_without_a_key_is_refused_with_the_remedy(calm: None, tmp_path: Path) -> None:
    config = RunConfig(tracking=TrackingConfig(mode=TrackingMode.online))
    with pytest.raises(UserError, match=r"WANDB_API_KEY.*wandb login.*offline"):
        open_tracker(config, tmp_path)


def test_wandbs_own_switches_are_honoured(calm: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert not account.goes_online(TrackingMode.auto)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with open_tracker(RunConfig(), tmp_path) as tracker:
        assert type(tracker) is Tracker


# With the real client


def test_a_pack_streams_while_it_runs_and_leaves_no_secret(server: LoopbackWandb, tmp_path: Path) -> None:
    """Two trials of one process: their history arrives before either ends; names, metrics, table and adapter too."""
    ranks, folders, trackers = (16, 64), [], []
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    for rank in ranks:
        settings = TrackingConfig(
            group="study", tags=["tiny", PLANTED["MY_SERVICE_KEY"]], log_adapter=True, table_rows=5
        )
        config = replace(RunConfig(lora=LoraConfig(rank=rank)), tracking=settings)
        config.data.path = f"postgresql://u:{PLANTED['DB_PASSWORD']}@h/d"
        folder = tmp_path / f"run{rank}"
        folder.mkdir()
        folders.append(folder)
        trackers.append(open_tracker(config, folder, finish_seconds=20))
    ids = [wandb_id(folder) for folder in folders]
    assert len(set(ids)) == 2
    for step in range(1, 11):
        for tracker, rank in zip(trackers, ranks, strict=True):
            tracker.log(step, {"train/loss": rank / step, "train/learning_rate": 1e-4, "train/tokens_per_second": 9.0})
    for run_id in ids:
        assert server.wait_for_rows(run_id, 9, seconds=20), "history must arrive while the run goes on"
    assert not server.exits
    for tracker, rank in zip(trackers, ranks, strict=True):
        tracker.log(10, {"validation/accuracy": 0.5, "validation/loss": math.nan})
        tracker.summarize({"test/accuracy": rank / 100, "test/accuracy_low": 0.1})
        tracker.predictions(predictions(50))
        tracker.adapter(tmp_path / "adapter")
        tracker.finish(Status.completed)
    for run_id, rank, folder in zip(ids, ranks, folders, strict=True):
        assert server.exits[run_id] == 0
        rows = [row for row in server.rows(run_id) if "train/loss" in row]
        assert [row["train/step"] for row in rows] == list(range(1, 11))
        assert [row["_step"] for row in rows] == list(range(1, 11))
        assert [row["train/loss"] for row in rows] == [rank / step for step in range(1, 11)]
        assert server.summary[run_id]["test/accuracy"] == rank / 100
        assert server.summary[run_id]["status"] == "completed"
        assert server.summary[run_id]["validation/accuracy"] == {"max": 0.5, "last": 0.5}
        assert [line["train/loss"] for line in lines(folder) if "train/loss" in line] == [r["train/loss"] for r in rows]
        first = next(u for u in server.upserts if u.get("name") == run_id)
        assert first["displayName"] == f"r{rank}-a64-b4" and first["groupName"] == "study"
        assert first["jobType"] == "train" and "tiny" in first["tags"]
        assert json.loads(first["config"])["rank"]["value"] == rank
    tables = [body for path, body in server.uploads.items() if "predictions" in path and path.endswith(".table.json")]
    assert tables and all(len(json.loads(t)["data"]) == 5 for t in tables)
    assert any(body == b"weights" for body in server.uploads.values())
    assert planted_in(tmp_path) == []
    assert not [b for b in server.bodies if any(v.encode() in b for v in (*PLANTED.values(), KEY))]


def test_a_continued_run_keeps_its_identity(server: LoopbackWandb, tmp_path: Path) -> None:
    for resume_step in (None, 3):
        with open_tracker(RunConfig(), tmp_path, resume_step=resume_step, finish_seconds=20) as tracker:
            for step in range((resume_step or 0) + 1, 6):
                tracker.log(step, {"train/loss": float(step)})
    assert server.run_ids == [wandb_id(tmp_path)]
    steps = [row["train/step"] for row in server.rows(wandb_id(tmp_path)) if "train/loss" in row]
    assert steps == [1, 2, 3, 4, 5], "W&B has each step once"
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]


def test_without_a_key_the_run_is_kept_offline_and_one_line_says_where(
    calm: None, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "mathverify.tracking")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with open_tracker(RunConfig(), tmp_path / name, finish_seconds=20) as tracker:
            tracker.log(1, {"train/loss": 0.5})
        assert list((tmp_path / name / "wandb").glob("offline-run-*/*.wandb"))
    said = [r.getMessage() for r in caplog.records if r.name.startswith("mathverify.tracking")]
    assert len(said) == 1 and str(tmp_path / "a" / "wandb") in said[0] and "wandb sync" in said[0]
    printed = capfd.readouterr()
    assert printed.out == "" and "wandb" not in printed.err.lower()


# Faults of the network

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


def test_a_run_may_be_opened_again_while_its_upload_is_on_its_way(server: LoopbackWandb, tmp_path: Path) -> None:
    with uploads_in_background():
        for step in (1, 2):
            tracker = open_tracker(RunConfig(), tmp_path, resume_step=step - 1, finish_seconds=20)
            tracker.log(step, {"train/loss": float(step)})
            tracker.finish(Status.interrupted if step == 1 else Status.completed)
    assert [row["train/step"] for row in server.rows(wandb_id(tmp_path)) if "train/loss" in row] == [1, 2]
    assert server.run(wandb_id(tmp_path))["tags"] == ["completed"]


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


@pytest.mark.slow
def test_offline_runs_are_sent_later_and_land_in_their_group(
    server: LoopbackWandb, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With W&B's own command: two trials of a study, one of them pruned, the other interrupted and continued."""
    monkeypatch.delenv("WANDB_API_KEY")
    for trial in (3, 4):
        settings = TrackingConfig(group="study", trial=trial, sampler="TPESampler", tags=["night"])
        config = replace(RunConfig(lora=LoraConfig(rank=8 * trial)), tracking=settings)
        (tmp_path / str(trial)).mkdir()
        first = Status.pruned if trial == 4 else Status.interrupted
        parts: list[tuple[int | None, range, Status]] = [(None, range(1, 6), first)]
        if trial == 3:
            parts.append((4, range(5, 9), Status.completed))
            time.sleep(1.1)  # W&B names its folders by the second
        for resume_step, steps, status in parts:
            tracker = open_tracker(config, tmp_path / str(trial), resume_step=resume_step, finish_seconds=20)
            for step in steps:
                tracker.log(step, {"train/loss": 1 / step})
            tracker.summarize({"test/accuracy": 0.75} if status is Status.completed else {"reason": status.value})
            tracker.finish(status)
    assert not server.bodies, "offline means offline"
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    command = f"{Path(sys.executable).with_name('wandb')} sync {tmp_path}/*/wandb/offline-run-*"
    subprocess.run(command, shell=True, check=True, capture_output=True, timeout=60, cwd=tmp_path)
    assert len(server.run_ids) == 2
    for trial, tags, last in ((3, ["night", "completed"], 8), (4, ["night", "pruned"], 5)):
        run_id = wandb_id(tmp_path / str(trial))
        run, rows = server.run(run_id), [row for row in server.rows(run_id) if "train/loss" in row]
        assert (run["groupName"], run["jobType"], run["tags"]) == ("study", "train", tags)
        assert run["config"].items() >= {"rank": 8 * trial, "trial": trial, "sampler": "TPESampler"}.items()
        # What was logged again after the checkpoint may be there twice, with the same value.
        assert {row["train/step"]: row["train/loss"] for row in rows} == {k: 1 / k for k in range(1, last + 1)}
    assert server.summary[wandb_id(tmp_path / "3")]["test/accuracy"] == 0.75
    assert server.summary[wandb_id(tmp_path / "3")]["status"] == "completed"


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
