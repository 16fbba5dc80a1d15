"""What a person sees: the progress of training and the closing table. Formats only; measures and writes nothing."""

from __future__ import annotations

import time
import unicodedata
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mathverify.records import RunRecord
from mathverify.scoring import Interval

PLAIN_SECONDS = 10.0  # between progress lines where there is no terminal


def printable(text: str) -> str:
    """Text of unknown origin (data sets, model names) with control characters written out, e.g. ESC as \\x1b.

    Terminals obey control characters, bidirectional overrides and the like; newlines are written out too.
    """
    return "".join(c if unicodedata.category(c) not in _UNPRINTABLE else _written_out(c) for c in text)


_UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def _written_out(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


class TrainingProgress:
    """A progress bar with step, loss, tokens/s and time left; sparse plain lines where there is no terminal.

    Use as a context manager; `update` after every step.
    """

    def __init__(self, steps: int, console: Console | None = None, description: str = "training") -> None:
        self._steps, self._description = steps, printable(description)
        self._console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._said = 0.0

    def __enter__(self) -> Self:
        self._began = self._said = time.monotonic()
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}", markup=False),
                TextColumn("{task.fields[rate]} tokens/s", markup=False),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(self._description, total=self._steps, loss="-", rate="-")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Show that `step` steps are done. loss: mean of the step; tokens_per_second: of training so far."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=f"{loss:.4f}", rate=f"{tokens_per_second:,.0f}")
            return
        now = time.monotonic()
        if step < self._steps and now - self._said < PLAIN_SECONDS:
            return
        self._said = now
        left = (now - self._began) / max(step, 1) * (self._steps - step)
        self._console.print(
            f"{self._description} {step}/{self._steps}  loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  "
            f"{_duration(left)} left",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def show_result(record: RunRecord, run_dir: object, console: Console | None = None) -> None:
    """Print the closing table of a run: metrics with intervals, costs, and where the run folder is."""
    console = console or Console()
    metrics, costs = record.metrics, record.costs
    table = Table(
        title=Text(printable(f"{record.name}: {record.status.value}")),
        show_header=False,
        title_justify="left",
    )
    table.add_column("what", overflow="fold")
    table.add_column("value", overflow="fold", min_width=len("0.000  [0.000, 0.000]"))
    if record.reason:
        table.add_row("reason", Text(printable(record.reason)))
    if metrics.test is not None:
        percent = f"{metrics.test.confidence:.0%}"
        table.add_row(f"test accuracy ({percent} interval)", _with_interval(metrics.test.accuracy))
        table.add_row("AUROC", _with_interval(metrics.test.auroc))
        table.add_row("Brier", _with_interval(metrics.test.brier))
        table.add_row("base rate", _with_interval(metrics.test.base_rate))
    if metrics.zero_shot is not None:
        table.add_row("zero-shot accuracy of the base", _with_interval(metrics.zero_shot.accuracy))
    if costs.seconds:
        phases = ", ".join(f"{printable(name)} {seconds:.1f}" for name, seconds in costs.seconds.items())
        table.add_row("seconds", f"{sum(costs.seconds.values()):.1f} ({phases})")
    if costs.tokens_per_second is not None:
        table.add_row("training tokens/s", f"{costs.tokens_per_second:,.0f}")
    console.print(table)
    console.print(Text(f"run folder: {printable(str(run_dir))}"), soft_wrap=True)


def _with_interval(interval: Interval) -> str:
    if interval.value is None:
        return f"undefined: {interval.reason}"
    if interval.low is None or interval.high is None:
        return f"{interval.value:.3f}"
    return f"{interval.value:.3f}  [{interval.low:.3f}, {interval.high:.3f}]"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
