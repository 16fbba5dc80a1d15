"""Starting `python -m mathverify.train` so that it may be killed: as a process of its own, or forked from a warm one.

A forked command is the same main() in a process that has imported everything already: one second instead of five.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Protocol

from tests.faults.killer import Event, install

ROOT = Path(__file__).parents[2]
OUT = "out.txt"


class Running(Protocol):
    """A command that was started."""

    def ended(self, seconds: float) -> int | None:
        """Wait for so long; the exit code (negative: a signal's number), or None while it still runs."""

    def signal(self, number: int) -> None:
        """Send it a signal."""


class OwnProcess:
    """As a user starts it. What it says is appended to out.txt in its folder."""

    def __init__(self, arguments: Sequence[str], place: Path, event: Event | None = None) -> None:
        how = ["-m", "mathverify.train"] if not event else ["-m", "tests.faults.killer", json.dumps(event)]
        self._process = subprocess.Popen(
            [sys.executable, *how, *arguments],
            cwd=place, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=(place / OUT).open("ab"), stderr=subprocess.STDOUT,
        )  # fmt: skip

    def ended(self, seconds: float) -> int | None:
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def signal(self, number: int) -> None:
        self._process.send_signal(number)


class Forked:
    """The same, forked from a server that has imported everything and done nothing."""

    _context: ForkServerContext | None = None

    def __init__(self, arguments: Sequence[str], place: Path, event: Event | None = None) -> None:
        if Forked._context is None:
            os.environ["OMP_NUM_THREADS"] = "1"  # for the server, which is started with the first command
            Forked._context = multiprocessing.get_context("forkserver")
            Forked._context.set_forkserver_preload(["tests.faults.warm"])
        self._process = Forked._context.Process(target=_command, args=(list(arguments), str(place), event or {}))
        self._process.start()

    def ended(self, seconds: float) -> int | None:
        self._process.join(seconds)
        return self._process.exitcode

    def signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)


def _command(arguments: list[str], place: str, event: Event) -> None:
    os.chdir(place)
    out = os.open(OUT, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.argv = ["mathverify.train", *arguments]
    install(event)
    from mathverify import entry
    from mathverify.train import task

    entry.main(task)
