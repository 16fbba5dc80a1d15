"""Runs reach W&B while they go on, keep apart and keep their identity, online or sent later. With the real client."""

from __future__ import annotations

import json
import logging
import math
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mathverify.config import LoraConfig, RunConfig, TrackingConfig
from mathverify.records import Status
from mathverify.tracking import open_tracker, uploads_in_background
from tests.loopback_wandb import KEY, LoopbackWandb

from .runs import PLANTED, lines, planted_in, predictions, wandb_id


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


def test_a_run_may_be_opened_again_while_its_upload_is_on_its_way(server: LoopbackWandb, tmp_path: Path) -> None:
    with uploads_in_background():
        for step in (1, 2):
            tracker = open_tracker(RunConfig(), tmp_path, resume_step=step - 1, finish_seconds=20)
            tracker.log(step, {"train/loss": float(step)})
            tracker.finish(Status.interrupted if step == 1 else Status.completed)
    assert [row["train/step"] for row in server.rows(wandb_id(tmp_path)) if "train/loss" in row] == [1, 2]
    assert server.run(wandb_id(tmp_path))["tags"] == ["completed"]


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
    program = shlex.quote(str(Path(sys.executable).with_name("wandb")))
    command = f"{program} sync {shlex.quote(str(tmp_path))}/*/wandb/offline-run-*"
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
