"""Configs that share a base -> trained, evaluated, recorded runs. A single run is the case of one config.

The engine knows nothing of folders, records or trackers; this is where they meet.
"""

from __future__ import annotations

import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from filelock import BaseFileLock
from numpy.typing import NDArray

from mathverify import records, scoring
from mathverify.config import EvaluateMethod, RunConfig
from mathverify.engine.adapter_file import save_adapter
from mathverify.engine.checkpoint import load_checkpoint, save_checkpoint
from mathverify.engine.evaluate import score
from mathverify.engine.generate import UNPARSED, generate_verdicts
from mathverify.engine.loop import train
from mathverify.engine.lora import Adapter
from mathverify.engine.pack import Pack
from mathverify.engine.trial import StepReport, Trial, TrialState
from mathverify.examples.sources import rows_fingerprint
from mathverify.prepare import Workbench
from mathverify.progress import Progress
from mathverify.records import FolderState, RunRecord, Status
from mathverify.tracking import Tracker, final_numbers, open_tracker


class Interrupted(Exception):
    """A signal asked the run to end; what was done is saved."""


class Screen:
    """What a person sees of a pack while it runs; this one shows nothing."""

    def phase(self, name: str) -> None:
        """A new phase begins: 'training', 'evaluating', ..."""

    def stepped(self, run: Run, report: StepReport, tokens_per_second: float) -> None:
        """One run took a step."""

    def scored(self, split: str, done: int, total: int) -> None:
        """So many of so many tokens of a split are scored."""

    def validated(self, run: Run, metrics: scoring.Metrics) -> None:
        """One run was scored on validation during training."""

    def ended(self, run: Run) -> None:
        """One run has its record."""


@dataclass(eq=False)
class Run:
    """One run of a pack, outside the engine: its folder, record, tracker and times."""

    config: RunConfig
    folder: Path
    trial: Trial
    record: RunRecord
    tracker: Tracker
    identity: str
    lock: BaseFileLock
    seconds: dict[str, float] = field(default_factory=dict)
    reports: list[tuple[float, int]] = field(default_factory=list)

    def spend(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds


def open_run(config: RunConfig, folder: Path, bench: Workbench) -> Run | None:
    """A run ready to train, from its checkpoint if it has one; None when the folder holds it finished.

    Raises:
        UserError: the folder holds another run, or cannot be written.
    """
    lock = records.lock_run_folder(folder)
    state = records.claim_run_folder(folder, config)
    if state is FolderState.finished:
        lock.release()
        return None
    record = RunRecord.begin(config)
    record.data_fingerprint, record.base_fingerprint = bench.data_fingerprint, bench.model.base.fingerprint
    record.device = device_name(bench.model.device)
    record.test_fingerprint = rows_fingerprint(bench.splits.test)
    record.notes["data"] = bench.report.to_plain()
    record.notes["memory"] = bench.plan
    trial = Trial.start(config, bench.stores["train"], bench.verdicts, bench.model)
    records.write_record(folder, record)
    identity = f"{record.fingerprint}/{bench.data_fingerprint}/{bench.model.base.fingerprint}"
    costs = load_checkpoint(trial, folder / records.CHECKPOINT, identity)
    tracker = open_tracker(config, folder, resume_step=None if costs is None else trial.step)
    return Run(config, folder, trial, record, tracker, identity, lock, costs or {})


Judge = Callable[[Run, scoring.Metrics], str | None]
"""Looks at a validation during training; returns the reason to stop (prune) the run there, or None to go on."""


class PackRunner:
    """Trains and records the runs of one pack; implements the loop's Watcher."""

    def __init__(
        self, bench: Workbench, screen: Screen, stop: Callable[[], bool], judge: Judge = lambda run, metrics: None
    ) -> None:
        self.bench, self.screen, self.stop, self.judge = bench, screen, stop, judge
        self.runs: dict[Trial, Run] = {}
        self._clock = time.perf_counter()

    def run(self, runs: Sequence[Run]) -> None:
        """Train, evaluate and record all of them.

        Raises:
            Interrupted: a signal came; every unfinished run has its checkpoint and says `interrupted`.
        """
        self.runs = {run.trial: run for run in runs}
        pack = Pack(self.bench.model, self.bench.budget)
        for run in runs:
            pack.add(run.trial)
        self.screen.phase("training")
        self._clock = time.perf_counter()
        try:
            train(pack, self, self.stop)
        except Interrupted:  # during a validation: between rounds, so every running trial can be saved as it stands
            for trial in pack.running:
                self.checkpoint(trial)
        if self.stop():
            self._interrupt([run for run in runs if run.record.status is Status.running])
        self._finish([run for run in runs if run.trial.state is TrialState.finished])

    # The loop's Watcher

    def stepped(self, trial: Trial, report: StepReport) -> None:
        run = self.runs[trial]
        now = time.perf_counter()
        run.spend("train", now - self._clock)
        self._clock = now
        speed = self._speed(run, report.tokens)
        run.tracker.log(
            report.step,
            {
                "train/loss": report.loss,
                "train/learning_rate": report.learning_rate,
                "train/grad_norm": report.grad_norm,
                "train/tokens_per_second": speed,
                "train/examples": trial.examples,
                "train/tokens": trial.tokens,
            },
        )
        self.screen.stepped(run, report, speed)

    def evaluate(self, trials: Sequence[Trial]) -> None:
        start = time.perf_counter()
        scores = self._scores("validation", [trial.adapter for trial in trials])
        for trial, own in zip(trials, scores, strict=True):
            run = self.runs[trial]
            metrics = self._measure("validation", own, run.config).overall
            run.tracker.log(trial.step, metrics.flat("validation"))
            run.record.metrics.validation = metrics
            self.screen.validated(run, metrics)
            if reason := self.judge(run, metrics):
                trial.state, trial.reason = TrialState.stopped, reason
            run.spend("validate", (time.perf_counter() - start) / len(trials))
        self._clock = time.perf_counter()

    def checkpoint(self, trial: Trial) -> None:
        run = self.runs[trial]
        save_checkpoint(trial, run.folder / records.CHECKPOINT, run.identity, run.seconds)

    def ended(self, trial: Trial) -> Trial | None:
        if trial.state is TrialState.failed:
            self._end_early(self.runs[trial], Status.failed)
        elif trial.state is TrialState.stopped:
            self._end_early(self.runs[trial], Status.pruned)
        else:
            self.checkpoint(trial)
        return None

    # Ends

    def _interrupt(self, runs: Sequence[Run]) -> None:
        for run in runs:
            self._close(run, Status.interrupted, "stopped by a signal; the same command on this folder continues it")
        raise Interrupted

    def _end_early(self, run: Run, status: Status) -> None:
        """A failed or pruned run keeps what it has; its test set is not looked at."""
        self._close(run, status, run.trial.reason)
        self.screen.ended(run)

    def _finish(self, runs: Sequence[Run]) -> None:
        """Test is scored here, once; whatever was tuned was tuned on validation."""
        if not runs:
            return
        self.screen.phase("evaluating")
        adapters: list[Adapter | None] = [run.trial.adapter for run in runs]
        start = time.perf_counter()
        try:
            validation = self._scores("validation", adapters)
            with_base = any(run.config.evaluate.zero_shot for run in runs)
            test = self._scores("test", [*adapters, None] if with_base else adapters)
            share = (time.perf_counter() - start) / len(runs)
            for place, run in enumerate(runs):
                run.spend("evaluate", share)
                self._report(run, validation[place], test[place], test[-1] if run.config.evaluate.zero_shot else None)
        except Interrupted:
            self._interrupt([run for run in runs if run.record.status is Status.running])

    def _report(
        self, run: Run, validation: NDArray[np.float64], test: NDArray[np.float64], zero: NDArray[np.float64] | None
    ) -> None:
        start = time.perf_counter()
        metrics = run.record.metrics
        labels = self.bench.stores["validation"].labels
        metrics.validation = self._measure("validation", validation, run.config).overall
        metrics.threshold = scoring.tune_threshold(validation, labels)
        found = self._measure("test", test, run.config, metrics.threshold)
        metrics.test, metrics.tuned, metrics.slices = found.overall, found.tuned, found.slices
        if zero is not None:
            metrics.zero_shot = self._measure("test", zero, run.config).overall
        if run.config.evaluate.method is EvaluateMethod.generate:
            run.record.notes["generated"] = self._generate(run, test)
        predictions = self._predictions("test", test)
        records.write_predictions(run.folder / records.PREDICTIONS, predictions)
        save_adapter(run.trial.adapter, run.folder / "adapter", self.bench.model_path)
        run.spend("evaluate", time.perf_counter() - start)
        self._close(run, Status.completed, None, predictions)
        self.screen.ended(run)

    def _close(
        self, run: Run, status: Status, reason: str | None, predictions: records.Predictions | None = None
    ) -> None:
        trial, costs = run.trial, run.record.costs
        run.record.status, run.record.reason, run.record.finished = status, reason, records.utc_now()
        costs.seconds = {phase: round(seconds, 3) for phase, seconds in run.seconds.items()}
        costs.tokens, costs.optimizer_steps, costs.examples_seen = trial.tokens, trial.step, trial.examples
        costs.tokens_per_second = trial.tokens / run.seconds["train"] if run.seconds.get("train") else None
        costs.peak_memory_bytes = peak_memory(self.bench.model.device)
        costs.trainable_parameters = trial.adapter.flat.numel()
        # The record last: when it says completed, everything else is there.
        records.write_record(run.folder, run.record)
        run.tracker.summarize(final_numbers(run.record))
        if predictions is not None:
            run.tracker.predictions(predictions)
            run.tracker.adapter(run.folder / "adapter")
        run.tracker.finish(status)
        run.lock.release()

    # Scores and metrics

    def _scores(self, split: str, adapters: Sequence[Adapter | None]) -> NDArray[np.float64]:
        bench, store = self.bench, self.bench.stores[split]
        total = int(store.lengths.sum()) * len(adapters)
        done = 0

        def progress(tokens: int) -> None:
            nonlocal done
            self._heed()
            done += tokens
            self.screen.scored(split, done, total)

        return score(bench.model, adapters, store, bench.verdicts, bench.budget, progress)

    def _heed(self) -> None:
        if self.stop():
            raise Interrupted

    def _measure(
        self, split: str, scores: NDArray[np.float64], config: RunConfig, threshold: float | None = None
    ) -> scoring.Evaluation:
        rows = getattr(self.bench.splits, split)
        return scoring.evaluate(
            scores,
            self.bench.stores[split].labels,
            rows.column("group").to_pylist(),
            rows.column("slice").to_pylist(),
            tuned_threshold=threshold,
            confidence=config.evaluate.confidence,
            resamples=config.evaluate.resamples,
        )

    def _predictions(self, split: str, scores: NDArray[np.float64]) -> records.Predictions:
        rows = getattr(self.bench.splits, split)
        ids, groups, slices = (rows.column(name).to_pylist() for name in ("id", "group", "slice"))
        return records.Predictions(ids, groups, slices, self.bench.stores[split].labels, scores)

    def _generate(self, run: Run, scores: NDArray[np.float64]) -> dict[str, Any]:
        """The mission's way beside ours, on the same rows: its accuracy, what could not be parsed, its seconds."""
        start = time.perf_counter()
        store = self.bench.stores["test"]
        verdicts = generate_verdicts(
            self.bench.model,
            run.trial.adapter,
            store,
            self.bench.tokenizer,
            run.config.evaluate.max_new_tokens,
            self.bench.budget,
            self._heed,
        )
        seconds = time.perf_counter() - start
        # What names neither verdict is wrong, whatever the label is.
        said = np.where(verdicts == UNPARSED, ~store.labels, verdicts == 1)
        groups = self.bench.splits.test.column("group").to_pylist()
        return {
            "metrics": scoring.measure_verdicts(said, store.labels, groups).to_plain(),
            "unparsed": int((verdicts == UNPARSED).sum()),
            "agrees_with_score": float(np.mean(verdicts == (scores > 0))),  # UNPARSED agrees with neither
            "seconds": round(seconds, 3),
        }

    def _speed(self, run: Run, tokens: int, window: int = 20) -> float:
        """Training tokens a second over the last steps."""
        run.reports.append((run.seconds["train"], tokens))
        del run.reports[: -window - 1]
        elapsed = run.reports[-1][0] - (run.reports[0][0] if len(run.reports) > 1 else 0.0)
        counted = run.reports[1:] if len(run.reports) > 1 else run.reports
        return sum(count for _, count in counted) / elapsed if elapsed > 0 else 0.0


def device_name(device: torch.device) -> str:
    """'cpu' or 'cuda:0 NVIDIA H200'."""
    return f"{device} {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most this process held on the GPU, or resident on a machine without one."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def interruptible(progress: Progress, stop: Callable[[], bool]) -> Progress:
    """The same progress, which raises Interrupted once `stop()` is true: long preparations end at their next report."""

    def report(what: str, done: int, total: int | None) -> None:
        if stop():
            raise Interrupted
        progress(what, done, total)

    return report


@contextmanager
def heeding_signals() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether SIGINT or SIGTERM has come; a second Ctrl-C ends at once."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
