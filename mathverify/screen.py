"""What a person sees of one run: the data, a bar while it trains, a small table at the end. Computes nothing."""

from __future__ import annotations

import contextlib
import io
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mathverify.engine.ranks import place
from mathverify.printable import as_override
from mathverify.printable import printable as printable
from mathverify.records import CHECKPOINT, RunRecord, Status, redact
from mathverify.run import Run, Screen
from mathverify.scoring import Interval, Metrics

if TYPE_CHECKING:
    from mathverify.config import RunConfig
    from mathverify.engine.trial import StepReport
    from mathverify.prepare import Workbench

SECONDS_BETWEEN_LINES = 10.0
"""Where there is no terminal to draw a bar on."""

SCREEN = "screen.txt"
"""What a study does not show: in a trial's folder what a run of its own would have, in a study's folder its packs."""


class RunScreen(Screen):
    """One run on stdout: a moving bar on a terminal, a line now and then elsewhere. label: what the bar begins with."""

    def __init__(self, config: RunConfig, folder: Path, console: Console | None = None, label: str = "") -> None:
        self.config, self.folder, self.label = config, folder, label
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._said = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._put_bar_away()

    def prepared(self, bench: Workbench) -> None:
        """The data report, and what the run will need."""
        self.console.print(bench.report.render())
        base = f"{self.config.model.name} on {bench.model.device}, {self.config.quantization.kind.value} quantization"
        self._say(f"base: {base}; {bench.budget.text}")
        if (size := place().size) > 1:
            self._say(f"{size} processes share each step and each evaluation")
        self._say(f"run:  {self.config.name}, {self.config.train.steps} steps, in {self.folder}")

    # Screen

    def phase(self, name: str) -> None:
        if name == "training" and self.console.is_terminal:
            self._bar = Progress(
                TextColumn(f"{self.label}step {{task.completed:.0f}}/{{task.total:.0f}}"),
                BarColumn(),
                TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s"),
                TimeRemainingColumn(),
                TextColumn("left  {task.fields[validation]}"),
                console=self.console,
                transient=True,
            )
            self._task = self._bar.add_task(
                "", total=self.config.train.steps, loss=float("nan"), speed=0.0, validation=""
            )
            self._bar.start()
        elif not self.console.is_terminal:
            self._say(f"{name} ...")

    def stepped(self, run: Run, report: StepReport, tokens_per_second: float) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=report.step, loss=report.loss, speed=tokens_per_second)
        elif time.monotonic() - self._said > SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            left = run.seconds["train"] / report.step * (run.trial.steps - report.step)
            self._say(
                f"step {report.step}/{run.trial.steps}  loss {report.loss:.3f}  {tokens_per_second:,.0f} tokens/s  "
                f"{left:.0f} s left"
            )

    def scored(self, split: str, done: int, total: int) -> None:
        if self._bar is not None and self._task is not None:
            if done < total:
                self._bar.update(self._task, validation=f"scoring {split} {done / total:.0%}")
        elif time.monotonic() - self._said > SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            self._say(f"scoring {split} {done / total:.0%}")

    def validated(self, run: Run, metrics: Metrics) -> None:
        said = f"validation {share(metrics.accuracy)}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, validation=said)
        else:
            self._say(f"step {run.trial.step}/{run.trial.steps}  {said}")

    def ended(self, run: Run) -> None:
        self._put_bar_away()

    # Last words

    def result(self, run: Run) -> float | None:
        """Print the final table. Returns validation accuracy, None when the run failed."""
        if run.record.status is Status.failed:
            self._say(f"failed: {run.record.reason}; what there is lies in {self.folder}")
            return None
        self.console.print(final_table(run.record, self.folder))
        return _validation_accuracy(run.record)

    def finished_before(self, record: RunRecord) -> float | None:
        """The folder holds this very run, finished: show its result again."""
        self.console.print("this run is already finished; its result:")
        self.console.print(final_table(record, self.folder))
        return _validation_accuracy(record)

    def interrupted(self) -> None:
        """A signal ended the run; say how to go on."""
        self._put_bar_away()
        words = [word for word in sys.argv[1:] if not word.startswith("hydra.run.dir=")]
        continuing = f"{shlex.join(words)} {as_override('hydra.run.dir', self.folder)}".strip()
        saved = "the state is saved" if (self.folder / CHECKPOINT).is_dir() else "no step was taken yet"
        size = place().size
        launcher = "python" if size == 1 else f"torchrun --nproc-per-node {size}"
        self._say(f"stopped; {saved}. Continue with: {launcher} -m mathverify.train {continuing}")

    def _say(self, line: str) -> None:
        self.console.print(printable(str(redact(line))), markup=False)

    def _put_bar_away(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class TrialScreen(RunScreen):
    """A run that is a trial of a study, which says a line about it: the rest goes to screen.txt in the trial's folder.

    On a terminal a bar shows how far it is, and leaves nothing behind.
    """

    def __init__(self, config: RunConfig, folder: Path, number: int, console: Console | None = None) -> None:
        super().__init__(config, folder, paper(folder / SCREEN))
        self._live = RunScreen(config, folder, console, label=f"#{number}  {config.name}  ")
        self._drawn = self._live.console.is_terminal

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)
        super().__exit__(kind, error, trace)
        self.console.file.close()

    def phase(self, name: str) -> None:
        super().phase(name)
        if self._drawn:
            self._live.phase(name)

    def stepped(self, run: Run, report: StepReport, tokens_per_second: float) -> None:
        super().stepped(run, report, tokens_per_second)
        if self._drawn:
            self._live.stepped(run, report, tokens_per_second)

    def scored(self, split: str, done: int, total: int) -> None:
        super().scored(split, done, total)
        if self._drawn:
            self._live.scored(split, done, total)

    def validated(self, run: Run, metrics: Metrics) -> None:
        super().validated(run, metrics)
        if self._drawn:
            self._live.validated(run, metrics)

    def ended(self, run: Run) -> None:
        super().ended(run)
        self._live.ended(run)

    def interrupted(self) -> None:
        """The study says how to go on."""
        self._say("stopped by a signal; the study's own command continues it")


def paper(path: Path) -> Console:
    """A console that appends to a file, which is made with the first word."""
    return Console(file=cast(TextIO, _LateFile(path)), width=120, highlight=False, soft_wrap=True)


class _LateFile(io.TextIOBase):
    """Appends to a file that is made when the first word is written, so that a refused run leaves none.

    What the disk refuses is dropped: nothing that counts is written here.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            if self._file is None:
                self._file = self._path.open("a", encoding="utf-8")
            self._file.write(text)
            self._file.flush()
        return len(text)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()


def final_table(record: RunRecord, folder: Path) -> Table:
    """The last lines of a run: quality with intervals, the base it started from, cost, and where everything is."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    metrics, costs = record.metrics, record.costs
    test, zero = metrics.test, metrics.zero_shot

    def row(name: str, value: str) -> None:
        table.add_row(Text(name, style="bold"), Text(printable(str(redact(value)))))

    if test is not None:
        row("accuracy", f"{share(test.accuracy)}, {test.rows:,} test rows of {test.questions:,} questions")
        row("AUROC", _number(test.auroc))
        row("Brier", _number(test.brier))
        row("base rate", share(test.base_rate))
    row("zero-shot", share(zero.accuracy) if zero is not None else "not measured")
    if metrics.tuned is not None:
        row("tuned threshold", f"{share(metrics.tuned.accuracy)} at log-odds {metrics.threshold:.2f}")
    if (generated := record.notes.get("generated")) is not None:
        accuracy = generated["metrics"]["accuracy"]
        row("by generation", f"{accuracy['value']:.1%}, {generated['unparsed']} unparsed, {generated['seconds']:.1f} s")
    phases = ", ".join(f"{phase} {spent:.1f}" for phase, spent in costs.seconds.items())
    row("seconds", f"{sum(costs.seconds.values()):.1f} ({phases})")
    row("tokens/s", f"{costs.tokens_per_second:,.0f} in training" if costs.tokens_per_second else "no training")
    row("run folder", str(folder))
    return table


def share(interval: Interval) -> str:
    """'98.9% [98.4%, 99.3%]'."""
    return _with_interval(interval, lambda x: f"{x:.1%}")


def _number(interval: Interval) -> str:
    return _with_interval(interval, lambda x: f"{x:.3f}")


def _with_interval(interval: Interval, spell: Callable[[float], str]) -> str:
    if interval.value is None:
        return f"undefined: {interval.reason}"
    if interval.low is None or interval.high is None:
        return spell(interval.value)
    return f"{spell(interval.value)} [{spell(interval.low)}, {spell(interval.high)}]"


def _validation_accuracy(record: RunRecord) -> float | None:
    return record.metrics.validation.accuracy.value if record.metrics.validation is not None else None
