"""Configs that share a base -> trained, evaluated, recorded runs. A single run is the case of one config.

The engine knows nothing of folders, records or trackers; this is where they meet.
"""

from __future__ import annotations

import gc
import resource
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from mathverify.engine.budget import peak_bytes
from mathverify.engine.checkpoint import load_checkpoint, save_checkpoint, share_state
from mathverify.engine.evaluate import score
from mathverify.engine.generate import UNPARSED, generate_verdicts
from mathverify.engine.loop import train
from mathverify.engine.lora import Adapter
from mathverify.engine.pack import Pack
from mathverify.engine.passes import is_out_of_memory
from mathverify.engine.ranks import Begin, Ranks, Score
from mathverify.engine.trial import StepReport, Trial, TrialState
from mathverify.errors import CannotWrite, Interrupted, NoRoom
from mathverify.examples.sources import rows_fingerprint
from mathverify.judge import Judge, nobody
from mathverify.prepare import Workbench
from mathverify.progress import Progress
from mathverify.records import FolderState, RunRecord, Status
from mathverify.tokens.doctor import examine
from mathverify.tracking import Tracker, check_tracking, final_numbers, open_tracker


class Screen:
    """What a person sees of a pack while it runs; this one shows nothing."""

    def joined(self, run: Run) -> None:
        """One run begins to train, or goes on."""

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
    """One run of a pack, outside the engine: its folder, record, tracker, judge and times.

    seconds: by phase; what runs do together is shared among them, a round of steps by the tokens each has in it, a
    validation or test evenly, so that the sum over all runs is the time that passed. peak: bytes, of the whole process
    while the run was in it. most_beside: how many runs it shared a pack with, at most. error: what broke it, for who
    started it. Its record then says failed; after a disk that refused it stays as it was, and the run can be continued.
    """

    config: RunConfig
    folder: Path
    trial: Trial
    record: RunRecord
    tracker: Tracker
    identity: str
    lock: BaseFileLock
    judge: Judge = nobody
    seconds: dict[str, float] = field(default_factory=dict)
    reports: list[tuple[float, int]] = field(default_factory=list)
    peak: int = 0
    most_beside: int = 0
    error: Exception | None = None

    def spend(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """What happens within is this run's alone."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.spend(phase, time.perf_counter() - start)


def open_run(config: RunConfig, folder: Path, bench: Workbench, judge: Judge = nobody) -> Run | None:
    """A run ready to train, from its checkpoint if it has one; None when the folder holds it finished.

    Args:
        judge: asked after each validation during training whether to stop (prune) the run there.

    Raises:
        UserError: the folder holds another run, or cannot be written; the base has no such linears to adapt; memory is
            too small for it (NoRoom). Nothing in the folder has changed then.
    """
    check_tracking(config)
    examine(bench.tokenizer, config.prompt, config.train.loss)
    lock = records.lock_run_folder(folder)
    run = None
    try:
        if records.claim_run_folder(folder, config) is not FolderState.finished:
            run = _open_locked(config, folder, bench, judge, lock)
    finally:
        if run is None:
            lock.release()
    return run


def _open_locked(config: RunConfig, folder: Path, bench: Workbench, judge: Judge, lock: BaseFileLock) -> Run:
    record = RunRecord.begin(config)
    record.data_fingerprint, record.base_fingerprint = bench.data_fingerprint, bench.model.base.fingerprint
    record.device = device_name(bench.model.device)
    record.test_fingerprint = rows_fingerprint(bench.splits.test)
    record.notes["data"] = bench.report.to_plain()
    record.notes["memory"] = bench.budget.text
    identity = f"{record.fingerprint}/{bench.data_fingerprint}/{bench.model.base.fingerprint}"
    # Before anything is written: a checkpoint of other data or another base is refused, and its record stands.
    try:
        trial = Trial.start(config, bench.stores["train"], bench.verdicts, bench.model)
        costs = load_checkpoint(trial, folder / records.CHECKPOINT, identity)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise NoRoom(
            f"{folder}: out of memory for the run's adapter and optimizer: use a lower lora.rank, fewer "
            "lora.target_modules, optimizer=adamw_8bit or quantization=nf4"
        ) from error
    records.write_record(folder, record)
    tracker = open_tracker(config, folder, resume_step=None if costs is None else trial.step)
    return Run(config, folder, trial, record, tracker, identity, lock, judge, costs or {})


class PackRunner:
    """Trains and records the runs of one pack; implements the loop's Watcher.

    What goes wrong for one run ends that run only. Evaluating a run that is done takes place between two rounds and is
    charged to that run; the others' times stand still meanwhile.
    """

    def __init__(
        self,
        bench: Workbench,
        screen: Screen,
        stop: Callable[[], bool],
        follow: Callable[[], Run | None] = lambda: None,
        closed: Callable[[Run], None] = lambda run: None,
        ranks: Ranks | None = None,
    ) -> None:
        """
        Args:
            follow: asked for another run whenever one has ended, until it gives None. closed: told of each run that has
                ended, when its record is written and before `follow` is asked. ranks: the processes that share the
                work; the runs are then those that `run` is given.
        """
        self.bench, self.screen, self.stop, self.follow, self.closed = bench, screen, stop, follow, closed
        self.ranks = ranks or Ranks()
        self.open: dict[Trial, Run] = {}

    def run(self, runs: list[Run]) -> None:
        """Train, evaluate and record all of them, and those that follow.

        Args:
            runs: emptied, so that no list holds the memory of a run that has ended while others go on.

        Raises:
            Interrupted: a signal came; every unfinished run has its checkpoint and says `interrupted`.
            Exception: something broke the pack as a whole, such as memory that is too small for its smallest pass. A
                run that was alone has failed of it; several have their checkpoints, say `interrupted` and can be
                opened again in smaller packs.
        """
        pack = Pack(self.bench.model, self.bench.budget, self.ranks)
        while runs:
            pack.add(self._admit(runs.pop(0)))
        self.screen.phase("training")
        try:
            self._train(pack)
        except Interrupted:
            raise
        except Exception as error:
            self._break_up(pack, error)
            raise

    def _train(self, pack: Pack) -> None:
        self._share(pack.trials)
        try:
            train(pack, self, self.stop)
        except Interrupted:  # while runs were scored: between rounds; a trial keeps that its validation is due
            self._save_all(pack)
        if self.open:
            self._interrupt("stopped by a signal; the same command on this folder continues it")
            raise Interrupted

    def _share(self, trials: Sequence[Trial]) -> None:
        """The other processes' trials begin where these stand."""
        self.ranks.tell(Begin(self.bench.data_fingerprint, self.bench.model.base.fingerprint))
        self.ranks.together(lambda: None)
        for trial in trials:
            share_state(trial, self.ranks)

    # The loop's Watcher

    def stepped(self, reports: Sequence[tuple[Trial, StepReport]], seconds: Mapping[Trial, float]) -> None:
        for trial, spent in seconds.items():
            self.open[trial].spend("train", spent)
        for trial, report in reports:
            run = self.open[trial]
            speed = _speed(run, report.tokens)
            with self._guarding(run):
                run.tracker.log(report.step, _of_step(trial, report, speed))
                self.screen.stepped(run, report, speed)

    def evaluate(self, trials: Sequence[Trial]) -> None:
        runs = [self.open[trial] for trial in trials]
        with _shared(runs, "validate"):
            scores = self._scores("validation", [trial.adapter for trial in trials])
        for run, own in zip(runs, scores, strict=True):
            with self._guarding(run), run.timed("validate"):
                metrics = self._measure("validation", own, run.config).overall
                run.tracker.log(run.trial.step, metrics.flat("validation"))
                run.record.metrics.validation = metrics
                self.screen.validated(run, metrics)
                if reason := run.judge(run.trial.step, metrics.flat("validation")):
                    run.trial.state, run.trial.reason = TrialState.stopped, reason

    def checkpoint(self, trial: Trial) -> None:
        run = self.open[trial]
        with self._guarding(run), run.timed("checkpoint"):
            save_checkpoint(trial, run.folder / records.CHECKPOINT, run.identity, run.seconds)

    def ended(self, trials: Sequence[Trial]) -> None:
        runs = [self.open[trial] for trial in trials]
        for run in runs:
            if run.trial.state is TrialState.finished:
                self.checkpoint(run.trial)
        finished = [run for run in runs if run.trial.state is TrialState.finished]  # and could be saved
        for run in runs:
            if run not in finished:
                self._end_early(run)
        self._finish(finished)

    def followers(self) -> list[Trial]:
        if self.bench.model.device.type == "cuda":
            gc.collect()  # OmegaConf's swallowed errors are cycles of frames, which may hold runs that have ended
        return [self._admit(run) for run in iter(self.follow, None)]

    def _admit(self, run: Run) -> Trial:
        self._note_peak()
        self.open[run.trial] = run
        for one in self.open.values():
            one.most_beside = max(one.most_beside, len(self.open) - 1)
        self.screen.joined(run)
        return run.trial

    @contextmanager
    def _guarding(self, run: Run) -> Iterator[None]:
        """What breaks within (a full disk, a row that fits no pass) is this run's trouble only."""
        try:
            yield
        except Interrupted:
            raise
        except Exception as error:
            run.error = run.error or error
            run.trial.fail(str(error))

    # Ends

    def _save_all(self, pack: Pack) -> None:
        for trial in pack.running:
            self.checkpoint(trial)

    def _break_up(self, pack: Pack, error: Exception) -> None:
        if len(self.open) > 1:
            self._save_all(pack)
            self._interrupt(f"its pack broke up: {error}")
            return
        for run in list(self.open.values()):
            run.error = error
            self._close(run, Status.failed, str(error))

    def _interrupt(self, reason: str) -> None:
        """Every open run keeps its checkpoint; one that broke meanwhile ends with what it had."""
        for run in list(self.open.values()):
            if run.error is None:
                self._close(run, Status.interrupted, reason)
            else:
                self._drop(run)

    def _end_early(self, run: Run) -> None:
        """A failed or pruned run keeps what it has; its test set is not looked at."""
        if run.error is not None:
            self._drop(run)
        else:
            status = Status.failed if run.trial.state is TrialState.failed else Status.pruned
            self._close(run, status, run.trial.reason)

    def _finish(self, runs: Sequence[Run]) -> None:
        """Test is scored here, once; whatever was tuned was tuned on validation."""
        if not runs:
            return
        self.screen.phase("evaluating")
        adapters: list[Adapter | None] = [run.trial.adapter for run in runs]
        with _shared(runs, "evaluate"):
            validation = self._scores("validation", adapters)
            test = self._scores("test", adapters)
        if judged := [run for run in runs if run.config.evaluate.zero_shot]:
            with _shared(judged, "evaluate"):
                self._zero_shot()
        for run, own_validation, own_test in zip(runs, validation, test, strict=True):
            predictions: records.Predictions | None = None
            with self._guarding(run), run.timed("evaluate"):
                predictions = self._report(run, own_validation, own_test)
            if run.error is not None:
                self._drop(run)
            else:
                self._close(run, Status.completed, None, predictions)

    def _report(self, run: Run, validation: NDArray[np.float64], test: NDArray[np.float64]) -> records.Predictions:
        metrics = run.record.metrics
        labels = self.bench.stores["validation"].labels
        metrics.validation = self._measure("validation", validation, run.config).overall
        metrics.threshold = scoring.tune_threshold(validation, labels)
        found = self._measure("test", test, run.config, metrics.threshold)
        metrics.test, metrics.tuned, metrics.slices = found.overall, found.tuned, found.slices
        if run.config.evaluate.zero_shot:
            metrics.zero_shot = self._measure("test", self._zero_shot(), run.config).overall
        if run.config.evaluate.method is EvaluateMethod.generate:
            run.record.notes["generated"] = self._generate(run, test)
        predictions = self._predictions("test", test)
        records.write_predictions(run.folder / records.PREDICTIONS, predictions)
        save_adapter(run.trial.adapter, run.folder / "adapter", self.bench.model_path)
        return predictions

    def _close(
        self, run: Run, status: Status, reason: str | None, predictions: records.Predictions | None = None
    ) -> None:
        with self._guarding(run):
            self._write_end(run, status, reason)
            run.tracker.summarize(final_numbers(run.record))
            if predictions is not None:
                run.tracker.predictions(predictions)
                run.tracker.adapter(run.folder / "adapter")
        self._leave(run, status)

    def _drop(self, run: Run) -> None:
        """End a run that broke. One whose disk refused goes on where it stands once that is mended."""
        if isinstance(run.error, CannotWrite):
            self._leave(run, Status.failed)
        else:
            self._close(run, Status.failed, str(run.error))

    def _leave(self, run: Run, status: Status) -> None:
        """The run is over for this pack. A slow server must not hold the others up: see `uploads_in_background`."""
        del self.open[run.trial]
        run.tracker.finish(status)
        run.lock.release()
        self.screen.ended(run)
        self.closed(run)

    def _write_end(self, run: Run, status: Status, reason: str | None) -> None:
        self._note_peak()
        trial, costs = run.trial, run.record.costs
        run.record.status, run.record.reason, run.record.finished = status, reason, records.utc_now()
        costs.seconds = {phase: round(seconds, 3) for phase, seconds in run.seconds.items()}
        costs.tokens, costs.optimizer_steps, costs.examples_seen = trial.tokens, trial.step, trial.examples
        costs.tokens_per_second = trial.tokens / run.seconds["train"] if run.seconds.get("train") else None
        costs.peak_memory_bytes = run.peak
        costs.trainable_parameters = trial.adapter.flat.numel()
        if run.most_beside:
            run.record.notes["pack"] = {"most_runs_beside": run.most_beside}
        if self.ranks.size > 1:
            run.record.notes["processes"] = self.ranks.size
        # The record last: when it says completed, everything else is there.
        records.write_record(run.folder, run.record)

    def _note_peak(self) -> None:
        """Called whenever a run comes or goes, so that each run's peak is of the time that it was there."""
        peak = peak_memory(self.bench.model.device)
        for run in self.open.values():
            run.peak = max(run.peak, peak)
        if self.bench.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.bench.model.device)

    # Scores and metrics

    def _scores(self, split: str, adapters: Sequence[Adapter | None]) -> NDArray[np.float64]:
        bench, store = self.bench, self.bench.stores[split]
        total = int(store.lengths.sum()) * len(adapters)
        done = 0

        def progress(tokens: int) -> None:
            nonlocal done
            self._heed()
            done += tokens * self.ranks.size  # the others are about as far
            self.screen.scored(split, done, total)

        self.ranks.tell(Score(split, bare=adapters == [None]))
        return score(bench.model, adapters, store, bench.verdicts, bench.budget, progress, self.ranks)

    def _zero_shot(self) -> NDArray[np.float64]:
        """What the bare base says of the test set, asked once for all runs of this process on these rows."""
        if "test" not in self.bench.base_scores:
            self.bench.base_scores["test"] = self._scores("test", [None])[0]
        return self.bench.base_scores["test"]

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


@contextmanager
def _shared(runs: Sequence[Run], phase: str) -> Iterator[None]:
    """What happens within is done for all these runs alike."""
    start = time.perf_counter()
    try:
        yield
    finally:
        for run in runs:
            run.spend(phase, (time.perf_counter() - start) / len(runs))


def _of_step(trial: Trial, report: StepReport, speed: float) -> dict[str, float]:
    return {
        "train/loss": report.loss,
        "train/learning_rate": report.learning_rate,
        "train/grad_norm": report.grad_norm,
        "train/tokens_per_second": speed,
        "train/examples": trial.examples,
        "train/tokens": trial.tokens,
    }


def _speed(run: Run, tokens: int, window: int = 20) -> float:
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
    """Bytes: the most that tensors took on the GPU and what recorded passes hold; without a GPU, the most resident."""
    if device.type == "cuda":
        return peak_bytes(device)
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
