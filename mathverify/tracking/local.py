"""Every logged number, in metrics.jsonl of the run folder, as it comes. The base of all trackers; knows no W&B."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import numpy as np

from mathverify.files import cannot_write, write_atomic
from mathverify.records import Predictions, Status

METRICS = "metrics.jsonl"
Value = float | int | np.floating[Any] | np.integer[Any] | None


class Tracker:
    """Appends every logged number to metrics.jsonl. The base of the family, and all of it for tracking=none.

    Not for several threads at once; several trackers may live in one process.
    """

    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        self._path = run_dir / METRICS
        _keep_until(self._path, resume_step)
        self._file: TextIO | None = self._path.open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        """Write one line: step, time (Unix seconds) and the values; what is not finite is written as null.

        step: of the optimizer, never falling. Raises CannotWrite when the disk refuses, ValueError after `finish`.
        """
        if self._file is None:
            raise ValueError("log() after finish()")
        line = json.dumps({"step": step, "time": round(time.time(), 3), **finite(values)}, allow_nan=False)
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise cannot_write(self._path, error) from error

    def summarize(self, values: Mapping[str, Value | str]) -> None:
        """Final numbers of the run, e.g. test metrics; result.json is their home on disk."""

    def predictions(self, predictions: Predictions) -> None:
        """Test rows with scores; predictions.parquet is their home on disk."""

    def adapter(self, path: Path) -> None:
        """The trained adapter's folder."""

    def finish(self, status: Status = Status.completed) -> None:
        """Close. May be called more than once."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # nothing is buffered: every line was flushed
                self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        match error:
            case None:
                self.finish(Status.completed)
            case KeyboardInterrupt() | SystemExit():
                self.finish(Status.interrupted)
            case _:
                self.finish(Status.failed)


def finite(values: Mapping[str, Value]) -> dict[str, Value]:
    """Plain numbers: NumPy scalars unwrapped, what JSON cannot hold as None."""
    plain = {key: value.item() if isinstance(value, np.generic) else value for key, value in values.items()}
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in plain.items()}


def _keep_until(path: Path, resume_step: int | None) -> None:
    """Cut metrics.jsonl back to what the checkpoint knows: a continued run logs the later steps again."""
    if not path.exists():
        return
    kept = (
        [] if resume_step is None else [line for line in path.read_bytes().splitlines() if _is_up_to(line, resume_step)]
    )
    write_atomic(path, b"".join(line + b"\n" for line in kept))


def _is_up_to(line: bytes, step: int) -> bool:
    """False for a later step and for a torn line."""
    try:
        return int(json.loads(line)["step"]) <= step
    except (ValueError, KeyError, TypeError):
        return False
