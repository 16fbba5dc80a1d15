"""What the tests of faults share: the real command inside this process, and the smallest run that it can be given."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.journeys.conftest import SMALL

ROOT = Path(__file__).parents[2]
TINY = [*SMALL, "data.cache_dir=cache", "train.threads=1"]
"""A run of four steps; rows and tokens are cached in the folder it is started from."""


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code and what it said."""

    code: int
    out: str
    err: str


Command = Callable[..., Ended]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """`python -m mathverify.train ARGUMENTS` as its `main()` inside this process, in tmp_path unless told otherwise.

    An exception that would end the real command with a traceback ends the test. What the process shares with the next
    command (working folder, environment) is put back.
    """

    def run(*arguments: str, cwd: Path = tmp_path) -> Ended:
        from mathverify import base, entry
        from mathverify.train import task

        environment = dict(os.environ)
        capfd.readouterr()
        with monkeypatch.context() as patch:
            patch.chdir(cwd)
            patch.setattr(sys, "argv", ["mathverify.train", *flags_first(arguments)])
            patch.setattr(entry, "_wants_traceback", False)
            # Work that takes long says so now and then; on a busy machine everything does.
            patch.setattr("mathverify.progress.SECONDS_BETWEEN_LINES", 1e9)
            try:
                entry.main(task)
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
            finally:
                for key in [key for key in base._warm if "my-model" in key]:
                    del base._warm[key]  # a process of its own would not have the last one's model
                for name in set(os.environ) - set(environment):
                    del os.environ[name]
                os.environ.update(environment)
        out, err = capfd.readouterr()
        return Ended(code, out, err)

    return run


def flags_first(arguments: Sequence[str]) -> list[str]:
    """Hydra takes flags before all overrides or behind them, not between."""
    return sorted(arguments, key=lambda argument: not argument.startswith("-"))


def in_a_process(*arguments: str, cwd: Path, **environment: str) -> Ended:
    """`python -m mathverify.train ARGUMENTS` as a user starts it."""
    done = subprocess.run(
        [sys.executable, "-m", "mathverify.train", *flags_first(arguments)],
        cwd=cwd, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return Ended(done.returncode, done.stdout, done.stderr)
