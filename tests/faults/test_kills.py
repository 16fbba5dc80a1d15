"""Killed with -9 at any moment and continued, everything ends as if nothing had happened; a SIGTERM ends it in peace.

`python -m tests.faults.kills --times 100` does the first a hundred times.
"""

from __future__ import annotations

import json
import shlex
import signal
from pathlib import Path

import optuna
import pytest

from mathverify.records import Status, read_record
from mathverify.sweep.storage import open_storage

from .commands import OUT, Forked, OwnProcess
from .kills import PACK, RUN, SWEEP, finish, kill_often, scenarios, told, whole
from .sigterm import stop


@pytest.mark.long
def test_a_dozen_kills_at_random_moments_lose_repeat_and_tear_nothing() -> None:
    tally = kill_often(12, seed=7, chosen=scenarios(), say=lambda line: None)
    assert tally.kills == 12
    assert tally.ends >= 3
    assert len(tally.by_moment) > 3


def saved(folder: Path) -> int:
    """The step at which a run was stopped: its record, its metrics and its only checkpoint agree on it."""
    record = read_record(folder)
    assert record.status is Status.interrupted
    step = record.costs.optimizer_steps
    assert [file.name for file in (folder / "checkpoint").iterdir()] == [f"step-{step:06}.safetensors"]
    assert steps(folder) == list(range(1, step + 1))
    return step


def steps(folder: Path) -> list[int]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "train/loss" in line]


def go_on(place: Path) -> None:
    """Do as the last line says."""
    last = (place / OUT).read_text().splitlines()[-1]
    words = shlex.split(last.partition("ontinue with: ")[2])
    assert words[:3] == ["python", "-m", "mathverify.train"], last
    assert OwnProcess(words[3:], place).ended(300) == 0, (place / OUT).read_text()[-3000:]


@pytest.mark.slow
def test_a_sigterm_in_a_step_of_a_run_ends_within_20_seconds_with_a_checkpoint(tmp_path: Path) -> None:
    place = new(tmp_path)
    assert stop(RUN, place) < 20
    assert saved(place / "run") == 2  # the step under way was taken
    assert "stopped; the state is saved. Continue with: " in (place / OUT).read_text()
    whole(RUN, place)
    go_on(place)
    assert read_record(place / "run").status is Status.completed
    assert steps(place / "run") == [1, 2, 3]


@pytest.mark.long
def test_a_sigterm_in_a_step_of_a_sweep_ends_within_20_seconds_with_a_checkpoint(tmp_path: Path) -> None:
    place = new(tmp_path)
    assert stop(SWEEP, place) < 20
    folder = place / "multirun/s/0"
    assert saved(folder) == 2
    said = "interrupted: trial 0 is saved; 1 trials: 0 completed, 0 pruned, 0 failed, 1 running"
    assert said in (place / OUT).read_text().splitlines()
    assert given_back(place) == [0]
    whole(SWEEP, place)
    go_on(place)
    assert {number: state for number, (state, *_) in told(SWEEP, place).items()} == {0: "COMPLETE"}
    assert steps(folder) == [1, 2, 3]


@pytest.mark.long
def test_a_sigterm_in_a_step_of_a_pack_ends_within_20_seconds_with_all_its_checkpoints(tmp_path: Path) -> None:
    place = new(tmp_path)
    assert stop(PACK, place, at_once=2) < 20
    folders = [place / "multirun/s" / number for number in "01"]
    assert [saved(folder) for folder in folders] == [2, 2]
    said = "interrupted: trial 0, 1 is saved; 2 trials: 0 completed, 0 pruned, 0 failed, 2 running"
    assert said in (place / OUT).read_text().splitlines()
    assert given_back(place) == [0, 1]
    whole(PACK, place)
    go_on(place)
    assert {n: state for n, (state, *_) in told(PACK, place).items()} == {0: "COMPLETE", 1: "COMPLETE"}
    assert [steps(folder) for folder in folders] == [[1, 2, 3], [1, 2, 3]]


def new(tmp_path: Path) -> Path:
    (place := tmp_path / "place").mkdir()
    return place


def given_back(place: Path) -> list[int]:
    """Numbers of the trials that wait for whoever comes next; none of their tries counts."""
    trials = optuna.load_study(study_name="s", storage=open_storage(None, place / "multirun/s")).trials
    marks = {t.number: (t.user_attrs["owner"], t.user_attrs["attempt"]["count"]) for t in trials}
    return [number for number, (owner, count) in marks.items() if owner is None and count == 0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimization_results.yaml", "multirun.yaml", ".study"])
def test_the_next_start_of_a_study_removes_what_a_kill_left_in_its_folder(name: str, tmp_path: Path) -> None:
    place = new(tmp_path)
    event = {"event": "rename", "file": name, "count": 1, "when": "before"}
    assert Forked([*SWEEP.arguments, f"data.cache_dir='{tmp_path}/cache'"], place, event).ended(300) == -signal.SIGKILL
    folder = place / "multirun/s"
    (leftover,) = folder.glob(".*.tmp")
    assert leftover.name.startswith(f".{name}.")
    finish(SWEEP, place, Forked)
    assert not list(folder.glob(".*.tmp"))
    assert (folder / name).exists()


def test_what_must_not_happen_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself: with files written in place instead of renamed, a kill is noticed."""
    place = tmp_path / "place"
    place.mkdir()
    finish(RUN, place, Forked)
    whole(RUN, place)
    for name in ("result.json", "predictions.parquet", "metrics.jsonl", "adapter/adapter_model.safetensors"):
        file = place / "run" / name
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(Exception, match=r".+"):
            whole(RUN, place)
        file.write_bytes(content)
