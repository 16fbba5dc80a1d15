"""One run shared out by torchrun over two processes, as a user has it: it ends where a run alone ends, and cleanly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mathverify.records import RunRecord, Status, read_predictions, read_record

from .conftest import SMALL

ROOT = Path(__file__).parents[2]
LENGTH = ["train.max_steps=30", "train.checkpoint_every=5", "train.threads=1"]


def torchrun(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """Two processes on the CPU, whose temporary files would lie in cwd/tmp."""
    (cwd / "tmp").mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(cwd / "tmp")}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mathverify.train"]
    return subprocess.Popen(
        [sys.executable, *launch, *arguments],
        cwd=cwd, env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_steps(folder: Path, process: subprocess.Popen[str], count: int) -> None:
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 150
    while not (metrics.exists() and metrics.read_text().count("train/loss") > count):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def lines_of(folder: Path) -> dict[int, dict[str, Any]]:
    """metrics.jsonl's training lines by step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "train/loss" in line}


@pytest.mark.long
def test_a_shared_run_that_was_stopped_and_continued_ends_where_one_alone_does(
    train: Callable[..., RunRecord], tmp_path: Path
) -> None:
    whole = train(*LENGTH, folder="whole")
    arguments = [*SMALL, *LENGTH, "hydra.run.dir=shared", f"data.cache_dir='{tmp_path}/cache'"]
    before = {path.name for path in tmp_path.iterdir()} | {"shared", "tmp"}
    process = torchrun(*arguments, cwd=tmp_path)
    wait_for_steps(tmp_path / "shared", process, 7)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert "Continue with: torchrun --nproc-per-node 2 -m mathverify.train" in out
    stopped = read_record(tmp_path / "shared")
    assert stopped.status is Status.interrupted
    assert 7 < stopped.costs.optimizer_steps < 30
    process = torchrun(*arguments, cwd=tmp_path)
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert out.count("evaluating ...") == 1
    record = read_record(tmp_path / "shared")
    assert record.notes["processes"] == 2
    assert record.costs.tokens == whole.costs.tokens
    ours, alone = lines_of(tmp_path / "shared"), lines_of(tmp_path / "whole")
    assert list(ours) == list(alone) == list(range(1, 31))
    losses = [[line["train/loss"] for line in lines.values()] for lines in (ours, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    scores = [read_predictions(tmp_path / name / "predictions.parquet").scores for name in ("shared", "whole")]
    assert np.abs(scores[0] - scores[1]).max() < 1e-4
    assert record.metrics.test is not None
    assert whole.metrics.test is not None
    assert record.metrics.test.accuracy == whole.metrics.test.accuracy
    # The second process left nothing: not in the working folder, the run folder or where temporary files go.
    assert {path.name for path in tmp_path.iterdir()} == before
    assert {p.name for p in (tmp_path / "shared").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()} | {
        ".hydra"
    }
    assert [path for path in (tmp_path / "tmp").rglob("*") if path.is_file()] == []


@pytest.mark.long
def test_a_process_that_is_killed_ends_the_run_and_the_same_command_continues(tmp_path: Path) -> None:
    arguments = [*SMALL, *LENGTH, "hydra.run.dir=shared", f"data.cache_dir='{tmp_path}/cache'"]
    process = torchrun(*arguments, cwd=tmp_path)
    wait_for_steps(tmp_path / "shared", process, 7)
    second = children(process.pid)[1]
    os.kill(second, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert read_record(tmp_path / "shared").status in (Status.failed, Status.interrupted)
    told = [line for line in errors.splitlines() if line.startswith("error:")]
    assert len(told) == 1
    assert "another process of this run is gone" in told[0]
    assert f'File "{ROOT}/mathverify' not in errors  # the traceback is torchrun's
    process = torchrun(*arguments, cwd=tmp_path)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert read_record(tmp_path / "shared").status is Status.completed


def children(pid: int) -> list[int]:
    """Processes that a process started, in order."""
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["-m", "seed=1,2"], "for a sweep start one worker a GPU instead"),
        (["lora.rank=0"], "lora.rank"),
        (["device=cuda:1"], "use device=auto"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments: list[str], line: str, tmp_path: Path) -> None:
    process = torchrun(*arguments, cwd=tmp_path)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1  # torchrun's own
    told = [text for text in errors.splitlines() if text.startswith("error:")]
    assert len(told) == 1
    assert line in told[0]
    assert {path.name for path in tmp_path.iterdir()} == {"tmp"}


@pytest.mark.slow
def test_help_is_given_once(tmp_path: Path) -> None:
    process = torchrun("--help", cwd=tmp_path)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert out.count("Fine-tune LoRA adapters") == 1


@pytest.mark.slow
def test_an_unknown_flag_is_told_once(tmp_path: Path) -> None:
    process = torchrun("--cgf", "job", cwd=tmp_path)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.count("unrecognized arguments: --cgf") == 1
