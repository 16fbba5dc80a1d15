"""What a person sees of runs that train together: a bar for each on a terminal, a line for what matters.

Computes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from mathverify.records import RunRecord, Status, redact
from mathverify.run import Run, Screen
from mathverify.scoring import Metrics
from mathverify.screen import SECONDS_BETWEEN_LINES, printable, share

if TYPE_CHECKING:
    from mathverify.config import RunConfig
    from mathverify.engine.trial import StepReport
    from mathverify.prepare import Workbench


class PackScreen(Screen):
    """Runs are called by the numbers of their jobs.

    words: where the lines go if not to the console; a study says a line about each trial itself.
    """

    def __init__(self, console: Console | None = None, words: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.words = words or self.console
        self._said = time.monotonic()
        self._shown_data: set[str] = set()
        self._numbers: dict[Run, int] = {}
        self._latest: dict[Run, StepReport] = {}
        self._bars: Progress | None = None
        self._tasks: dict[Run, TaskID] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    # The planner's words

    def planned(self, groups: Sequence[tuple[Sequence[int], str]]) -> None:
        """Which runs train together. groups: (numbers of the runs, why just these)."""
        for place, (numbers, why) in enumerate(groups, start=1):
            self.say(f"pack {place}: {_runs(numbers)}" + (f", {why}" if why else ""))

    def prepared(self, bench: Workbench, config: RunConfig, numbers: Sequence[int]) -> None:
        """A pack is ready: the data report, once, the base, and who trains on it at first."""
        if bench.data_fingerprint not in self._shown_data:
            self._shown_data.add(bench.data_fingerprint)
            self.words.print(bench.report.render())
        base = f"{config.model.name} on {bench.model.device}, {config.quantization.kind.value} quantization"
        self.say(f"base: {base}; {bench.budget.text}")
        self.say(f"together on it: {_runs(numbers)}")

    def opened(self, run: Run, number: int) -> None:
        """A run is ready to join: what it is called from here on, until it has ended."""
        self._numbers[run] = number

    def waits(self, number: int, why: str) -> None:
        """A run cannot take the free place."""
        self.say(f"run {number} waits for the next pack: {why}")

    def finished_before(self, number: int, record: RunRecord) -> None:
        """A run's folder holds it finished."""
        self.say(f"run {number} ({record.name}) is already {record.status.value}{_quality(record)}")

    # Screen

    def joined(self, run: Run) -> None:
        trial = run.trial
        where = f"step {trial.step}/{trial.steps}" if trial.step else f"{trial.steps} steps"
        self.say(f"run {self._numbers[run]} ({run.config.name}): {where}, in {run.folder}")
        if self.console.is_terminal:
            self._tasks[run] = self._progress().add_task(
                str(self._numbers[run]),
                total=trial.steps,
                completed=trial.step,
                loss=float("nan"),
                speed=0.0,
                validation="",
            )

    def stepped(self, run: Run, report: StepReport, tokens_per_second: float) -> None:
        self._latest[run] = report
        if run in self._tasks:
            self._progress().update(self._tasks[run], completed=report.step, loss=report.loss, speed=tokens_per_second)
        elif run is next(reversed(self._latest)) and time.monotonic() - self._said > SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            where = ", ".join(
                f"{self._numbers[run]} at {latest.step}/{run.trial.steps} loss {latest.loss:.3f}"
                for run, latest in self._latest.items()
            )
            self.say(f"{where}; {tokens_per_second:,.0f} tokens/s")

    def validated(self, run: Run, metrics: Metrics) -> None:
        said = f"validation {share(metrics.accuracy)}"
        if run in self._tasks:
            self._progress().update(self._tasks[run], validation=said)
        else:
            self.say(f"run {self._numbers[run]} step {run.trial.step}/{run.trial.steps}  {said}")

    def ended(self, run: Run) -> None:
        self._latest.pop(run, None)
        if run in self._tasks:
            self._progress().remove_task(self._tasks.pop(run))
        record = run.record
        if run.error is not None or record.status is Status.failed:
            said = f"failed: {run.error or record.reason}"
        else:
            reason = f": {record.reason}" if record.reason else ""
            said = f"{record.status.value}{reason}{_quality(record)}"
        self.say(f"run {self._numbers.pop(run)} ({record.name}) {said}; {sum(run.seconds.values()):.1f} s its share")

    def say(self, line: str) -> None:
        self.words.print(printable(str(redact(line))), markup=False)

    def _progress(self) -> Progress:
        if self._bars is None:
            self._bars = Progress(
                TextColumn("{task.description} step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(),
                TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s"),
                TimeRemainingColumn(),
                TextColumn("left  {task.fields[validation]}"),
                console=self.console,
                transient=True,
            )
            self._bars.start()
        return self._bars


def _runs(numbers: Sequence[int]) -> str:
    return f"run{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def _quality(record: RunRecord) -> str:
    """', accuracy 98.9% [98.4%, 99.3%] on test'; of validation where test was not looked at."""
    if (test := record.metrics.test) is not None:
        return f", accuracy {share(test.accuracy)} on test"
    if (validation := record.metrics.validation) is not None:
        return f", accuracy {share(validation.accuracy)} on validation"
    return ""
