"""Places -> runs: what `compare` knows of every run before it looks at a single prediction. Judges nothing.

A run's result.json is read once, at the start; predictions and curves only when asked for, and they are not kept.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from mathverify.errors import UserError
from mathverify.records import (
    NOT_OF_THE_RESULT,
    PREDICTIONS,
    RESULT,
    Costs,
    Predictions,
    RunRecord,
    Status,
    read_predictions,
    read_record,
    redact,
)
from mathverify.scoring import Interval, Metrics

METRICS = "metrics.jsonl"
ERROR_FILE = "error.txt"
Curve = list[tuple[int, float]]
"""(optimizer step, value) of one logged number, in the order of steps."""


class State(Enum):
    """How a run stands. killed: its record says running, but no process holds its folder. unreadable: see `error`."""

    completed = "completed"
    running = "running"
    interrupted = "interrupted"
    killed = "killed"
    pruned = "pruned"
    failed = "failed"
    unreadable = "unreadable"


@dataclass(eq=False)
class RunView:
    """One run as its folder shows it. Two views are equal only if they are the same object.

    label: shortest ending of the folder's path that no other run has. error: why it failed, was cut short or cannot be
    read; one line. settings: the config that decides the result, flat ('lora.rank'); empty when unreadable.
    params: those of the settings that differ between the runs compared. test, tuned, validation, zero_shot: as in
    records.RunMetrics. fingerprint: of settings, data and base; equal for runs that should come out equal. ground: of
    data and base alone. test_set: what tells its test rows from others; None when unknown. repeats: the run that has
    the same fingerprint and was here first. trial: number in the study it was read from.
    """

    folder: Path
    state: State
    error: str | None = None
    label: str = ""
    name: str = ""
    seed: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    test: Metrics | None = None
    tuned: Metrics | None = None
    validation: Metrics | None = None
    zero_shot: Metrics | None = None
    threshold: float | None = None
    costs: Costs = field(default_factory=Costs)
    started: str = ""
    device: str | None = None
    fingerprint: str = ""
    ground: str = ""
    test_set: str | None = None
    repeats: RunView | None = None
    trial: int | None = None

    @property
    def accuracy(self) -> Interval | None:
        """On the test set at threshold 0; None without a finished evaluation."""
        return None if self.test is None else self.test.accuracy

    @property
    def validation_accuracy(self) -> float | None:
        """The last one: at the end, or where the run was cut short."""
        return None if self.validation is None else self.validation.accuracy.value

    @property
    def seconds(self) -> float | None:
        """All phases together."""
        return sum(self.costs.seconds.values()) if self.costs.seconds else None

    @property
    def counts(self) -> bool:
        """Whether it has a place in statistics: completed, scored on test, and no repetition of another run."""
        scored = self.accuracy is not None and self.accuracy.value is not None
        return self.state is State.completed and scored and self.repeats is None

    def record(self) -> RunRecord:
        """The whole result.json, read again. Raises UserError as `read_record`."""
        return read_record(self.folder)

    def predictions(self) -> Predictions:
        """The test rows and what the run said of them, read from disk. Raises UserError when missing or torn."""
        return read_predictions(self.folder / PREDICTIONS)

    def curve(self, *names: str) -> dict[str, Curve]:
        """Logged numbers by name ('train/loss', 'validation/accuracy'), of all names if none is given.

        A torn last line and nulls (what was not finite) are left out; empty when there is no metrics.jsonl.
        """
        curves: dict[str, Curve] = {}
        for line in _lines(self.folder / METRICS):
            step = line.get("step")
            for key, value in line.items():
                wanted = key not in ("step", "time") and (not names or key in names)
                if wanted and isinstance(step, int) and isinstance(value, int | float) and math.isfinite(value):
                    curves.setdefault(key, []).append((step, float(value)))
        return curves


@dataclass
class Comparison:
    """Runs that are looked at together. varying: config keys that differ. problems: one line for each place or folder
    that gave nothing."""

    runs: list[RunView]
    varying: list[str]
    problems: list[str] = field(default_factory=list)

    @property
    def test_sets(self) -> dict[str, list[RunView]]:
        """Runs that count, by test set; only runs of one test set may be compared pairwise. Largest set first."""
        sets: dict[str, list[RunView]] = {}
        for run in self.runs:
            if run.counts:
                sets.setdefault(run.test_set or "unknown", []).append(run)
        return dict(sorted(sets.items(), key=lambda item: -len(item[1])))

    def find(self, place: str) -> RunView:
        """The run that a user means by a path, a label or a name. Raises UserError when none or several fit."""
        real = os.path.realpath(place)
        found = [r for r in self.runs if os.path.realpath(r.folder) == real]
        found = found or [r for r in self.runs if r.label == place.strip("/")]
        found = found or [r for r in self.runs if r.name == place]
        found = found or [r for r in self.runs if os.path.realpath(r.folder).endswith(f"/{place.strip('/')}")]
        if len(found) == 1:
            return found[0]
        known = ", ".join(run.label for run in self.runs[:8]) + (", ..." if len(self.runs) > 8 else "")
        what = f"fits {len(found)} of the runs" if found else "is none of the runs"
        raise UserError(f"{place}: {what}: give the folder of one of those compared ({known})")


def read_runs(places: Sequence[str | Path]) -> Comparison:
    """Read everything that is known of the runs in these places.

    Args:
        places: run folders, folders of runs in any depth, or study URLs (see studies.py).

    Raises:
        UserError: not a single run was found; says what each place lacks.
    """
    runs: dict[str, RunView] = {}
    problems: list[str] = []
    for place in places:
        try:
            for run in _runs_of(str(place)):
                runs.setdefault(os.path.realpath(run.folder) + ("" if run.folder.exists() else f"#{run.trial}"), run)
        except UserError as error:
            problems.append(str(error))
    if not runs:
        raise UserError("; ".join(problems) or "no runs given: name run folders, sweep folders or study URLs")
    views = list(runs.values())
    _mark_repeats(views)
    _label(views)
    varying = varying_keys(views)
    for run in views:
        run.params = {key: run.settings[key] for key in varying if key in run.settings}
    return Comparison(views, varying, problems)


def _runs_of(place: str) -> Iterator[RunView]:
    if "://" in place:
        from mathverify.compare.studies import runs_of_study

        yield from runs_of_study(place)
        return
    path = Path(place)
    if path.name == RESULT and path.is_file():
        path = path.parent
    if not path.is_dir():
        raise UserError(f"{place}: no such folder: give a run folder, a folder of runs, or a study URL")
    found = False
    for folder in _run_folders(path):
        found = True
        yield read_run(folder)
    if not found:
        raise UserError(
            f"{place}: holds no run (no {RESULT} in it, at any depth): give a folder that "
            "`python -m mathverify.train` made"
        )


def _run_folders(top: Path) -> Iterator[Path]:
    """Folders with a result.json, or with the error of a trial that did not get that far; in natural order."""
    try:
        entries = {entry.name: entry for entry in os.scandir(top)}
    except OSError:
        return
    if RESULT in entries or ERROR_FILE in entries:
        yield top
        return
    for name in sorted(entries, key=_natural):
        entry = entries[name]
        if name.startswith(".") or not entry.is_dir():
            continue
        if not entry.is_symlink() or (top / name / RESULT).exists():  # links are followed to runs, not into trees
            yield from _run_folders(top / name)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key under which 2 comes before 10."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdigit() and part.isascii() else (1, 0, part) for part in parts if part]


def read_run(folder: Path) -> RunView:
    """The view of one folder; what is wrong with it is in the view, not raised."""
    if not (folder / RESULT).exists():
        return RunView(folder, State.failed, _last_line(folder / ERROR_FILE))
    try:
        record = read_record(folder)
    except UserError as error:
        return RunView(folder, State.unreadable, str(error))
    return RunView(
        folder=folder,
        state=_state(folder, record.status),
        error=None if record.reason is None else " ".join(record.reason.split()),
        name=record.name,
        seed=record.seed,
        settings=settings_of(record.config),
        test=record.metrics.test,
        tuned=record.metrics.tuned,
        validation=record.metrics.validation,
        zero_shot=record.metrics.zero_shot,
        threshold=record.metrics.threshold,
        costs=record.costs,
        started=record.started,
        device=record.device,
        fingerprint=f"{record.fingerprint}/{record.data_fingerprint}/{record.base_fingerprint}",
        ground=f"{record.data_fingerprint}/{record.base_fingerprint}",
        test_set=_test_set(record),
    )


def _state(folder: Path, status: Status) -> State:
    if status is Status.running:
        return State.running if _is_held(folder / ".lock") else State.killed
    return State(status.value)


def _is_held(lock: Path) -> bool:
    """Whether a process holds a run folder's lock. Asks with a shared lock that is let go at once."""
    try:
        handle = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return True  # not ours to know
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def _test_set(record: RunRecord) -> str | None:
    """What tells one set of test rows from another."""
    if record.test_fingerprint is not None:
        return record.test_fingerprint
    # Records from before test_fingerprint: the training rows, and what the test set looks like from outside.
    test = record.metrics.test
    if record.data_fingerprint is None or test is None:
        return record.data_fingerprint
    return f"{record.data_fingerprint}/{test.rows}/{test.questions}/{test.base_rate.value}"


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """A record's config, flat, without what decides only where and how fast a run goes."""
    ignored = tuple(f"{part}.{name}" if part else name for part, names in NOT_OF_THE_RESULT.items() for name in names)
    flat = _flat(config, "")
    return {k: v for k, v in flat.items() if not any(k == i or k.startswith(f"{i}.") for i in ignored)}


def _flat(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def varying_keys(runs: Sequence[RunView]) -> list[str]:
    """Settings that differ between runs, in the order of the config; the seed last, since it is what is averaged over.
    Runs without settings (unreadable) do not count."""
    settings = [run.settings for run in runs if run.settings]
    keys = dict.fromkeys(key for one in settings for key in one)
    spelt = [{key: json.dumps(value, sort_keys=True) for key, value in one.items()} for one in settings]
    varying = [key for key in keys if len({one.get(key) for one in spelt}) > 1]
    return sorted(varying, key=lambda key: key == "seed")


def _mark_repeats(runs: Sequence[RunView]) -> None:
    """The first completed run of equals stands; without one, none is a repetition: each is a try at the same run."""
    first: dict[str, RunView] = {}
    for run in sorted(runs, key=lambda run: run.started):
        if run.fingerprint and run.state is State.completed:
            standing = first.setdefault(run.fingerprint, run)
            run.repeats = None if standing is run else standing


def _label(runs: Sequence[RunView]) -> None:
    """As many of the path's last parts as it takes to tell the runs apart, the same number for all of one depth."""
    paths = {run: Path(os.path.realpath(run.folder)).parts for run in runs}
    depth = dict.fromkeys(runs, 1)
    for _ in range(max(len(parts) for parts in paths.values())):
        seen: dict[tuple[str, ...], list[RunView]] = {}
        for run in runs:
            seen.setdefault(paths[run][-depth[run] :], []).append(run)
        clashing = [run for same in seen.values() if len(same) > 1 for run in same]
        if not clashing:
            break
        for run in clashing:
            depth[run] += 1
    for run in runs:
        run.label = str(redact("/".join(paths[run][-depth[run] :]).lstrip("/"))) or str(run.folder)


def _last_line(path: Path) -> str:
    """The last line of a traceback: what went wrong."""
    try:
        lines = path.read_text("utf-8", "replace").strip().splitlines()
    except OSError as error:
        return f"{path}: not readable ({error.strerror})"
    return " ".join(str(redact(lines[-1])).split())[:500] if lines else "it left no reason"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSON-lines file; lines that are no such thing (a torn last one) are passed over."""
    try:
        file = path.open("rb")
    except OSError:
        return
    with file:
        for line in file:
            try:
                parsed = json.loads(line, parse_constant=lambda name: None)
            except (ValueError, RecursionError):
                continue
            if isinstance(parsed, dict):
                yield parsed
