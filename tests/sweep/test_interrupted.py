"""Real training under a study, cut short: by signals, and by kill -9 at moments of nobody's choosing."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from .conftest import small
from .ends import ends, study_of

STUDY = "rank_alpha_batch"


def arguments(cache: Path, *more: str) -> list[str]:
    """The mission's study on the embedded default; trials of 60 steps validate at 20 and 40, where some are pruned."""
    chosen = ["train.max_steps=60", "train.eval_every=20", "data.validation_rows=64", "optimizer.learning_rate=1e-3"]
    return [f"sweep={STUDY}", *small(*chosen, *more), f"data.cache_dir='{cache}'"]


def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "mathverify.train", "-m", *overrides],
        cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    out, _ = process.communicate(timeout=400)
    assert process.returncode == code, out[-3000:]
    return out


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not what():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "launcher"), [(signal.SIGTERM, "pack"), (signal.SIGINT, "basic")])
def test_a_signal_saves_the_trial_and_the_line_shown_continues_the_study(
    number: signal.Signals, launcher: str, tmp_path: Path
) -> None:
    own = arguments(tmp_path / "cache", "hydra.sweeper.n_trials=1", f"hydra/launcher={launcher}")
    process = start(tmp_path, *own)
    metrics = tmp_path / "multirun" / STUDY / "0" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 3, process)
    process.send_signal(number)
    out = finish(process, 130)
    folder = metrics.parent
    assert json.loads((folder / "result.json").read_text())["status"] == "interrupted"
    assert any((folder / "checkpoint").iterdir())
    (trial,) = study_of(folder.parent, STUDY).trials
    assert trial.state is TrialState.RUNNING
    assert trial.user_attrs["owner"] is None
    said, continuing = out.splitlines()[-2:]
    assert said == "interrupted: trial 0 is saved; 1 trials: 0 completed, 0 pruned, 0 failed, 1 running"
    pasted = shlex.split(continuing.partition("continue with: ")[2])
    assert pasted[:4] == ["python", "-m", "mathverify.train", "-m"]
    first = len(metrics.read_text().splitlines())
    again = finish(start(tmp_path, *pasted[4:], "hydra.sweeper.max_attempts=1"))
    assert "1 trials: 1 completed" in again
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if "train/loss" in line]
    assert steps == list(range(1, 61))  # none twice: it went on from where it was saved
    assert first > 3


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["pack", "basic"])
def test_a_study_killed_at_random_moments_ends_as_one_that_was_not(launcher: str, tmp_path: Path) -> None:
    own = arguments(tmp_path / "cache", "hydra.sweeper.n_trials=7", f"hydra/launcher={launcher}")
    own += ["hydra.sweeper.pruner.n_startup_trials=2", "train.checkpoint_every=7"]
    begin = time.monotonic()
    finish(start(tmp_path / "calm", *own))
    seconds = time.monotonic() - begin
    calm = ends(tmp_path / "calm" / "multirun" / STUDY, STUDY)
    assert "PRUNED" in {trial["state"] for trial in calm}  # else a third of what can go wrong is not here
    moments = random.Random(f"{launcher}")
    kills = 0
    while kills < 4:
        process = start(tmp_path / "killed", *own)
        try:
            process.wait(timeout=5 + moments.random() * seconds / 2)
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        out = process.communicate()[0]
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, out[-3000:]
    finish(start(tmp_path / "killed", *own))
    assert kills
    assert ends(tmp_path / "killed" / "multirun" / STUDY, STUDY) == calm


CRASH = """
import os, sys
from mathverify.sweep.storage import Journal

left = int(sys.argv.pop())
append = Journal.append_logs

def crashing(self, logs):
    global left
    left -= 1
    if left == 0:
        with self._path.open("ab") as file:
            file.write(b'{"op_code": 4, "torn')
        os.kill(os.getpid(), 9)
    append(self, logs)

Journal.append_logs = crashing
sys.argv[0] = "app.py"
exec(compile(open("app.py").read(), "app.py", "exec"))
"""


@pytest.mark.long
def test_a_kill_within_any_write_of_the_study_loses_and_repeats_nothing(tmp_path: Path) -> None:
    """The command is killed in its first write, then in its second, ..., each torn; a call may be repeated, no end is."""
    from .conftest import make_program

    space = ["hydra.sweeper.study_name=s", "hydra.sweeper.sampler.seed=1", "hydra.sweeper.sampler.n_startup_trials=1",
             "x=interval(-5,5)", "y=choice(1,2)", "hydra.sweeper.n_trials=3",
             "hydra.sweeper.max_attempts=100"]  # fmt: skip
    calm, torn = make_program(tmp_path / "calm"), make_program(tmp_path / "torn")
    calm.run_plain(*space)
    (torn.folder / "crash.py").write_text(CRASH)
    writes = 0
    while True:
        writes += 1
        done = subprocess.run(
            [sys.executable, "crash.py", "-m", *space, str(writes)],
            cwd=torn.folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        if done.returncode != -9:
            assert done.returncode == 0, done.stdout + done.stderr
            break
        assert writes < 60
    assert writes > 8

    def rows(trials: list[optuna.trial.FrozenTrial]) -> list[tuple[Any, ...]]:
        return [(t.number, t.params, t.state, t.values) for t in trials]

    assert rows(torn.trials()) == rows(calm.trials())
    assert re.search(r"3 trials: 3 completed", done.stdout)
