"""A disk that is full or read-only, for real: a small tmpfs that the test mounts. The last good state stands and goes on."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mathverify.records import Status, read_predictions, read_record

from .conftest import TINY, Command
from .kills import RUN, SPACE, STUDY, whole

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


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["mathverify.run:save_checkpoint", "mathverify.sweep.storage:Journal.append_logs"])
def test_a_full_disk_ends_a_sweep_and_costs_it_no_trial(
    moment: str, disk: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = [*STUDY, *TINY, *SPACE, "train.checkpoint_every=2", "hydra.sweep.dir=disk/s"]
    with monkeypatch.context() as patch:
        full_at(patch, disk, moment, 4 if "run" in moment else 25)
        ended = command(*sweep)
    assert ended.code == 2, ended
    assert "No space left" in ended.err
    assert len(ended.err.strip().splitlines()) == 1, ended.err
    assert command(*sweep).code == 2  # the disk is full still
    (disk / "filler").unlink()
    ended = command(*sweep)
    assert ended.code == 0, ended
    assert "3 trials: 3 completed, 0 pruned, 0 failed" in ended.out


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
