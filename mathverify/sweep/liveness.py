"""Who works on a trial, and whether that process lives. Optuna's own heartbeat needs study.optimize; ours does not."""

from __future__ import annotations

import functools
import math
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mathverify.sweep.storage import patience

BEAT_SECONDS = 10.0


@dataclass(frozen=True)
class Worker:
    """A process: machine (boot and process namespace), id, and its start in clock ticks, since ids are reused."""

    machine: str
    pid: int
    started: int
    node: str = ""

    @classmethod
    def this(cls) -> Worker:
        """The process that calls."""
        pid = os.getpid()
        return cls(_machine(), pid, _start_ticks(pid) or 0, socket.gethostname())

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Worker:
        return cls(plain["machine"], plain["pid"], plain["started"], plain.get("node", ""))

    def to_plain(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def is_here(self) -> bool:
        """Whether it is, or was, a process of this machine, so that the kernel can be asked about it."""
        return self.machine == _machine()

    @property
    def runs_here(self) -> bool:
        """Only for a worker of this machine: the very process is there and not a zombie."""
        return _start_ticks(self.pid) == self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.node}"


@functools.cache
def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux: no way to tell two machines apart for sure, so nobody is ever `here`
        return f"{socket.gethostname()}/{os.getpid()}/{time.time_ns()}"


def _start_ticks(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat; None when there is no such process or it only waits to be reaped."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if after_name[0] in "ZX" else int(after_name[19])


class Watch:
    """Judges workers of other machines by whether their beat changes on this process's own clock.

    No clock is compared between machines, so skew does no harm; the price is that a worker seen for the first time is
    taken for alive until `dead_after` seconds have passed without a change. Silence while the storage itself did not
    answer is nobody's: `last_outage` says when that was, on the same clock.
    """

    def __init__(
        self,
        dead_after: float,
        last_outage: Callable[[], float] = lambda: -math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.dead_after, self._last_outage, self._clock = dead_after, last_outage, clock
        self._seen: dict[tuple[int, str], tuple[Any, float]] = {}

    def is_alive(self, trial: int, worker: Worker, beat: Any) -> bool:
        """Whether the worker of a trial lives; `beat` is what it wrote last."""
        if worker.is_here:
            return worker.runs_here
        now = self._clock()
        key = (trial, f"{worker.machine}/{worker.pid}/{worker.started}")
        last = self._seen.get(key)
        if last is None or last[0] != beat:
            self._seen[key] = (beat, now)
            return True
        return now - max(last[1], self._last_outage()) < self.dead_after


class Heart:
    """A thread that calls `beat` every few seconds while it is entered; errors of the storage do not stop the work."""

    def __init__(self, beat: Callable[[], None], seconds: float = BEAT_SECONDS) -> None:
        self._beat, self._seconds = beat, seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)

    def __enter__(self) -> Heart:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self._seconds):
            try:
                with patience(0):  # so that the end of the work never waits for a beat
                    self._beat()
            except Exception:  # the next beat may get through; if none does, others take the trial over
                continue
