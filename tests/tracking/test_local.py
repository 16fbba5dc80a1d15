"""Every number is in metrics.jsonl as soon as it is logged, also when the process is killed."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from mathverify.tracking import Tracker, open_tracker

from .runs import OFF, ROOT, lines


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
