"""Steps until every trial has ended: when to evaluate, when to checkpoint, when to stop. No screens, no files."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from mathverify.engine.pack import Pack
from mathverify.engine.trial import StepReport, Trial, TrialState


class Watcher(Protocol):
    """What the loop tells the outside. Each is called between rounds, never within one, and may set a trial's state."""

    def stepped(self, reports: Sequence[tuple[Trial, StepReport]], seconds: dict[Trial, float]) -> None:
        """After every round.

        Args:
            reports: of the trials that made their step. seconds: the round's time, shared among all trials that were in
                it by their tokens.
        """

    def evaluate(self, trials: Sequence[Trial]) -> None:
        """Trials that are due for validation now, together so that they share passes."""

    def checkpoint(self, trial: Trial) -> None:
        """A trial that is due to be saved."""

    def ended(self, trials: Sequence[Trial]) -> None:
        """Trials that finished, stopped or failed, each once, those of one round together."""

    def followers(self) -> Sequence[Trial]:
        """Trials that take the places of those that ended, which nothing here holds by then."""


def train(pack: Pack, watcher: Watcher, stop: Callable[[], bool] = lambda: False) -> None:
    """Run rounds until no trial is left running, or until `stop()` is true; then every running trial is saved."""
    while True:
        _say_ended(pack, watcher)
        if not pack.running:
            return
        if stop():
            for trial in pack.running:
                watcher.checkpoint(trial)
            return
        if any(trial.validation_due for trial in pack.running):  # cut short when their checkpoints were saved
            _validate(pack, watcher)
        else:
            _round(pack, watcher)


def _round(pack: Pack, watcher: Watcher) -> None:
    start = time.perf_counter()
    reports = pack.step()
    seconds = time.perf_counter() - start
    watcher.stepped(reports, {trial: share * seconds for trial, share in pack.shares.items()})
    trials = [trial for trial, _ in reports]
    for trial in trials:
        trial.validation_due = _is_due(trial, trial.config.train.eval_every)
    _validate(pack, watcher)
    for trial in trials:
        if _is_due(trial, trial.config.train.checkpoint_every):
            watcher.checkpoint(trial)


def _validate(pack: Pack, watcher: Watcher) -> None:
    """Evaluate whoever is due; what cuts that short leaves them due, in their checkpoints too."""
    if due := [trial for trial in pack.running if trial.validation_due]:
        watcher.evaluate(due)
        for trial in due:
            trial.validation_due = False


def _is_due(trial: Trial, every: int | None) -> bool:
    return trial.state is TrialState.running and every is not None and trial.step % every == 0


def _say_ended(pack: Pack, watcher: Watcher) -> None:
    """Until nobody in the pack has ended: a trial that takes a free place may have nothing left to do either."""
    while _let_go(pack, watcher):
        _fill(pack, watcher)


def _let_go(pack: Pack, watcher: Watcher) -> bool:
    """Whether trials have ended. On return none of them is held: adapters and optimizer states are freed before those
    of followers are made."""
    ended = [trial for trial in pack.trials if trial.state is not TrialState.running]
    for trial in ended:
        pack.remove(trial)
    if ended:
        watcher.ended(ended)
    return bool(ended)


def _fill(pack: Pack, watcher: Watcher) -> None:
    for follower in watcher.followers():
        pack.add(follower)
