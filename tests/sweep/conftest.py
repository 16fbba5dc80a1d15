"""What is swept here: a program of a few lines, of which every call is written down; and the embedded default, small."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import optuna
import pytest
import yaml
from optuna.trial import FrozenTrial

from mathverify import entry
from mathverify.sweep.storage import open_storage
from mathverify.train import task
from tests.journeys.conftest import SMALL

APP = """\
import os, sys, time
import hydra
from hydra.core.hydra_config import HydraConfig
from mathverify import entry
from mathverify.errors import UserError
from mathverify.judge import current_judge
from mathverify.sweep import plugin

plugin.register()
os.environ["HYDRA_FULL_ERROR"] = "1"


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def app(config):
    with open("calls.txt", "a") as file:
        device = os.environ.get("CUDA_VISIBLE_DEVICES")
        file.write(f"{HydraConfig.get().job.num} {config.x} {config.y} {device}\\n")
    time.sleep(config.seconds)
    if config.fail == "always" or config.fail == config.y:
        raise ValueError(f"no luck with y = {config.y}")
    if config.fail == "memory" and config.x > 5:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if config.fail == "report" and (reason := current_judge()(1, {"validation/accuracy": config.y})):
        print(reason)
    if config.fail == "undefined":
        return float("nan")
    if config.fail == "two":
        return config.x, config.y
    return config.x**2 + config.y


try:
    app()
except UserError as error:
    sys.exit(entry.report(error))
"""
CONFIG = """\
defaults:
  - _self_
  - override hydra/sweeper: optuna
x: 1.0
y: 2
fail: null
seconds: 0
"""


@dataclass
class Program:
    """The program in its own folder."""

    folder: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, *overrides: str, said: IO[str] | None = None) -> subprocess.Popen[str]:
        """Sweep; study `s`, seeded, unless the overrides say otherwise. said: a file instead of pipes for its words."""
        standard = ["hydra.sweeper.study_name=s", "hydra.sweeper.sampler.seed=1"]
        process = subprocess.Popen(
            [sys.executable, "app.py", "-m", *standard, *overrides],
            cwd=self.folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, start_new_session=True,
            stdout=said or subprocess.PIPE, stderr=said or subprocess.PIPE,
        )  # fmt: skip
        self.started.append(process)
        return process

    def end(self) -> None:
        """Leave no process behind, whatever a test came to."""
        for process in self.started:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def sweep(self, *overrides: str, code: int = 0, seconds: float = 180) -> str:
        """Sweep to the end; what it printed."""
        process = self.start(*overrides)
        out, err = process.communicate(timeout=seconds)
        assert process.returncode == code, out + err
        return out + err

    def run_plain(self, *overrides: str, code: int = 0) -> str:
        """Run the program with -m and nothing of ours added; what it printed."""
        done = subprocess.run(
            [sys.executable, "app.py", "-m", *overrides],
            cwd=self.folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, capture_output=True, timeout=180,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    @property
    def calls(self) -> list[tuple[int, float, str]]:
        """(job number, x, y) of every call so far."""
        file = self.folder / "calls.txt"
        rows = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
        return [(int(number), float(x), y) for number, x, y, *_ in rows]

    @property
    def devices(self) -> list[str]:
        """The visible devices of every call."""
        return [line.split()[3] for line in (self.folder / "calls.txt").read_text().splitlines()]

    def trials(self, study: str = "s") -> list[FrozenTrial]:
        """The study as its storage has it."""
        storage = open_storage(None, self.folder / "multirun" / study)
        return optuna.load_study(study_name=study, storage=storage).trials

    def trials_of(self, study: str, storage: str) -> list[FrozenTrial]:
        return optuna.load_study(study_name=study, storage=storage).trials

    def results(self, study: str = "s") -> dict[str, Any]:
        text = (self.folder / "multirun" / study / "optimization_results.yaml").read_text()
        found: dict[str, Any] = yaml.safe_load(text)
        return found


def make_program(folder: Path) -> Program:
    (folder / "conf").mkdir(parents=True)
    (folder / "app.py").write_text(APP)
    (folder / "conf" / "config.yaml").write_text(CONFIG)
    return Program(folder)


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    program = make_program(tmp_path / "program")
    yield program
    program.end()


# Trials of the embedded default


def small(*arguments: str) -> list[str]:
    """The arguments, and the smallest sizes for every setting that they leave open; the batch may be searched."""
    chosen = {argument.partition("=")[0] for argument in arguments} | {"train.batch_size"}
    return [*arguments, *(s for s in SMALL if s.partition("=")[0] not in chosen)]


@dataclass(frozen=True)
class Swept:
    """How a sweep ended: its exit code, what it printed, and where."""

    code: int
    out: str
    folder: Path


Sweep = Callable[..., Swept]


@pytest.fixture
def sweep_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Sweep]:
    """`python -m mathverify.train -m ...` in this process, in tmp_path, where the base is warm after the first trial.

    Not for several workers (n_jobs with Hydra's basic launcher), which are this process's own command again.
    """
    monkeypatch.chdir(tmp_path)
    handlers, level = logging.root.handlers[:], logging.root.level

    def run(*arguments: str) -> Swept:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["train", "-m", *arguments, f"data.cache_dir='{tmp_path}/cache'"])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # entry.main sets it for its own process
        code = 0
        try:
            entry.main(task)
        except SystemExit as end:
            code = int(end.code or 0)
        said = capfd.readouterr()
        return Swept(code, said.out + said.err, tmp_path)

    yield run
    logging.root.handlers[:], logging.root.level = handlers, level
