"""A disk that is full or read-only, for real: a small tmpfs that the test mounts. The last good state stands and goes on."""

from __future__ import annotations

import os
import subprocess
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mathverify.records import Status, read_predictions, read_record

from .conftest import TINY, Command
from .kills import (
    PACK,
    RUN,
    SPACE,
    STUDY,
    SWEEP,
    Scenario,
    end_of,
    finished,
    require_same,
    told,
    whole,
)

MIB = 1 << 20
LENGTH = ["lora=r4", "train.max_steps=40", "train.checkpoint_every=5", "train.eval_every=null"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of 16 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder))
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        why = f"a small file system cannot be mounted here ({done.stderr.strip()}): run as root"
        if os.environ.get("CI") == "true":
            pytest.fail(why)
        pytest.skip(why)


def fill(disk: Path) -> None:
    """Leave no page free."""
    with (disk / "filler").open("ab", buffering=0) as file:
        for size in (MIB, 4096):
            try:
                while file.write(b"\0" * size) == size:
                    pass
            except OSError:
                continue


def full_at(monkeypatch: pytest.MonkeyPatch, disk: Path, name: str, count: int) -> None:
    """The disk fills up just before the count-th call of a function."""
    import importlib

    module, _, path = name.partition(":")
    owner: Any = importlib.import_module(module)
    *above, last = path.split(".")
    for part in above:
        owner = getattr(owner, part)
    real: Callable[..., Any] = getattr(owner, last)
    calls = 0

    def filling(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            fill(disk)
        return real(*arguments, **named)

    monkeypatch.setattr(owner, last, filling)


MOMENTS = {
    "checkpoint": ("mathverify.run:save_checkpoint", 3, "checkpoint/step-000015.safetensors"),
    "metrics": ("mathverify.tracking:Tracker.log", 21, "metrics.jsonl"),
    "predictions": ("mathverify.records:write_predictions", 1, "predictions.parquet"),
    "adapter": ("mathverify.run:save_adapter", 1, "adapter_model.safetensors"),
    "result": ("mathverify.records:write_record", 2, "result.json"),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_space(
    moment: str, disk: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, count, names = MOMENTS[moment]
    run = [*TINY, *LENGTH, "hydra.run.dir=disk/run"]
    if moment == "metrics":  # nothing else is to be written before the line that no longer fits
        run.append("train.checkpoint_every=20")
    calm = command(*run, "hydra.run.dir=calm")
    assert calm.code == 0
    with monkeypatch.context() as patch:
        full_at(patch, disk, function, count)
        ended = command(*run)
    assert ended.code == 2, ended
    assert len(ended.err.strip().splitlines()) == 1, ended.err
    assert names in ended.err
    assert "No space left" in ended.err
    assert "free space" in ended.err
    for leftover in (disk / "run").rglob("*.tmp"):
        pytest.fail(f"{leftover} is left on the full disk")
    states = sorted(file.name for file in (disk / "run" / "checkpoint").iterdir())
    assert len(states) == (1 if moment == "metrics" else 2)
    if moment != "metrics":  # whose last line may be cut, until the run goes on
        whole(RUN, disk)
    assert read_record(disk / "run").status is Status.running
    (disk / "filler").unlink()
    assert command(*run).code == 0
    whole(RUN, disk)
    assert read_record(disk / "run").metrics == read_record(tmp_path / "calm").metrics
    ours, theirs = (read_predictions(folder / "predictions.parquet") for folder in (disk / "run", tmp_path / "calm"))
    assert ours.scores.tobytes() == theirs.scores.tobytes()


SWEEP_MOMENTS = {
    "checkpoint": ("mathverify.run:save_checkpoint", 5),
    "study": ("mathverify.sweep.storage:Journal.append_logs", 25),
    "metrics": ("mathverify.tracking:Tracker.log", 5),
    "predictions": ("mathverify.records:write_predictions", 2),
    "result": ("mathverify.records:write_record", 4),
    "new folder": ("mathverify.run:_open_locked", 3),
    "Hydra's files": ("hydra.core.utils:_save_config", 4),
    "last words": ("mathverify.sweep.report:write_results", 1),
}


@pytest.mark.long
@pytest.mark.parametrize("scenario", [SWEEP, PACK], ids=lambda scenario: scenario.name)
@pytest.mark.parametrize("moment", SWEEP_MOMENTS)
def test_a_full_disk_ends_a_sweep_and_costs_it_no_trial(
    moment: str, scenario: Scenario, disk: Path, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sweep, calm = [*scenario.arguments, f"data.cache_dir='{tmp_path}/cache'"], tmp_path / "calm"
    calm.mkdir()
    assert command(*sweep, cwd=calm).code == 0
    with monkeypatch.context() as patch:
        full_at(patch, disk, *SWEEP_MOMENTS[moment])
        ended = command(*sweep, cwd=disk)
    done = finished(scenario, disk)
    for attempt in (ended, command(*sweep, cwd=disk)):  # the disk is full still
        assert attempt.code == 2, attempt
        assert "No space left" in attempt.err
        assert "free space" in attempt.err
        assert len(attempt.err.strip().splitlines()) == 1, attempt.err
    whole(scenario, disk)
    assert {state for state, *_ in told(scenario, disk).values()} <= {"COMPLETE"}
    (disk / "filler").unlink()
    ended = command(*sweep, cwd=disk)
    assert ended.code == 0, ended
    assert "3 trials: 3 completed, 0 pruned, 0 failed" in ended.out
    assert done.items() <= finished(scenario, disk).items()
    require_same(scenario, end_of(scenario, disk), end_of(scenario, calm))


@pytest.mark.parametrize("launcher", ["basic", "pack"])
def test_a_full_disk_under_the_cache_ends_a_sweep_and_costs_it_no_trial(
    launcher: str, disk: Path, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sweep = [*STUDY, *TINY, *SPACE, f"hydra/launcher={launcher}", "data.cache_dir=disk/cache"]
    monkeypatch.setattr("mathverify.prepare._warm", OrderedDict())
    fill(disk)
    ended = command(*sweep)
    assert ended.code == 2, ended
    assert len(ended.err.strip().splitlines()) == 1, ended.err
    assert "disk/cache" in ended.err
    assert told(SWEEP, tmp_path) == {}
    (disk / "filler").unlink()
    ended = command(*sweep)
    assert "3 trials: 3 completed, 0 pruned, 0 failed" in ended.out


@pytest.mark.parametrize("launcher", ["basic", "pack"])
def test_tries_that_a_full_disk_ends_are_not_counted(
    launcher: str, disk: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The study lies elsewhere, where it can be written."""
    study = [*STUDY, *TINY, *SPACE, "hydra.sweeper.storage=journal://study.journal", "hydra.sweeper.max_attempts=1"]
    sweep = [*study, f"hydra/launcher={launcher}", "hydra.sweep.dir=disk/s"]
    assert command(*sweep, "hydra.sweeper.n_trials=1").code == 0
    for moment in ("hydra.core.utils:_save_config", "mathverify.run:_open_locked"):
        with monkeypatch.context() as patch:
            full_at(patch, disk, moment, 1)
            ended = command(*sweep)
        assert ended.code == 2, ended
        (disk / "filler").unlink()
    ended = command(*sweep)
    assert "3 trials: 3 completed, 0 pruned, 0 failed" in ended.out


@pytest.mark.parametrize("what", [["hydra.run.dir=disk/new"], ["-m", "hydra.sweep.dir=disk/grid"]])
def test_a_disk_that_is_full_already_is_told_before_anything_is_made(
    what: list[str], disk: Path, command: Command
) -> None:
    fill(disk)
    ended = command(*TINY, *what)
    assert ended.code == 2, ended
    assert len(ended.err.strip().splitlines()) == 1, ended.err
    for part in ("disk/", "No space left", "free space"):
        assert part in ended.err
    assert [item.name for item in disk.iterdir()] == ["filler"]


def test_a_disk_that_fills_up_under_hydras_own_files_is_one_line(
    disk: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        full_at(patch, disk, "hydra.core.utils:_save_config", 2)
        ended = command(*TINY, "hydra.run.dir=disk/run")
    assert ended.code == 2, ended
    assert len(ended.err.strip().splitlines()) == 1, ended.err
    for part in ("No space left", "free space", "hydra.run.dir"):
        assert part in ended.err
    (disk / "filler").unlink()
    assert command(*TINY, "hydra.run.dir=disk/run").code == 0


def test_a_full_disk_leaves_no_secret(disk: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra writes its files with it, and there is no room to write them without."""
    monkeypatch.setenv("MY_TOKEN", "not-for-anybody")
    with monkeypatch.context() as patch:
        full_at(patch, disk, "mathverify.entry:_redact_files", 1)
        command(*TINY, "name=not-for-anybody", "hydra.run.dir=disk/run")
    texts = [path.read_text("utf-8") for path in (disk / "run").rglob("*.yaml")]
    assert not any("not-for-anybody" in text for text in texts)


def test_a_full_disk_under_the_cache_is_told(disk: Path, command: Command) -> None:
    fill(disk)
    ended = command(*TINY, "data.cache_dir=disk/cache")
    assert ended.code == 2, ended
    assert len(ended.err.strip().splitlines()) == 1, ended.err
    assert "disk/cache" in ended.err
    assert "data.cache_dir" in ended.err
    assert [item.name for item in disk.rglob("*.tmp-*")] == []


@pytest.mark.parametrize("exists", [False, True], ids=["new", "with a run that was cut short"])
def test_a_read_only_run_folder_is_refused(exists: bool, disk: Path, command: Command) -> None:
    run = [*TINY, "lora=r4", "hydra.run.dir=disk/run"]
    if exists:
        assert command(*run, "train.checkpoint_every=2").code == 0
        (disk / "run" / "result.json").unlink()
    before = {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}
    mount("-o", "remount,ro", str(disk))
    ended = command(*run)
    mount("-o", "remount,rw", str(disk))
    assert ended.code == 2, ended
    assert len(ended.err.strip().splitlines()) == 1, ended.err
    for part in ("disk/run", "Read-only file system", "hydra.run.dir"):
        assert part in ended.err
    assert {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()} == before


def test_a_read_only_study_folder_is_refused(disk: Path, command: Command) -> None:
    mount("-o", "remount,ro", str(disk))
    ended = command(*STUDY, *TINY, *SPACE, "hydra.sweep.dir=disk/s")
    assert ended.code == 2, ended
    assert len(ended.err.strip().splitlines()) == 1, ended.err
    assert "disk/s" in ended.err
    assert "Read-only file system" in ended.err
