"""Steps until every trial has ended: when to evaluate, when to checkpoint, when to stop. No screens, no files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from mathverify.engine.pack import Pack
from mathverify.engine.trial import StepReport, Trial, TrialState


class Watcher(Protocol):
    """What the loop tells the outside. Each is called between rounds, never within one."""

    def stepped(self, trial: Trial, report: StepReport) -> None:
        """After every optimizer step of a trial."""

    def evaluate(self, trials: Sequence[Trial]) -> None:
        """Trials that are due for validation now, together so that they share passes. May set a trial's state."""

    def checkpoint(self, trial: Trial) -> None:
        """A trial that is due to be saved."""

    def ended(self, trial: Trial) -> Trial | None:
        """Once for each trial that finished, stopped or failed; may return a trial that takes its place."""


def train(pack: Pack, watcher: Watcher, stop: Callable[[], bool] = lambda: False) -> None:
    """Run rounds until no trial is left running, or until `stop()` is true; then every running trial is saved."""
    open_trials = list(pack.trials)
    while True:
        _say_ended(pack, open_trials, watcher)
        if not pack.running:
            return
        if stop():
            for trial in pack.running:
                watcher.checkpoint(trial)
            return
        reports = pack.step()
        for trial, report in reports:
            watcher.stepped(trial, report)
        trials = [trial for trial, _ in reports]
        if due := [trial for trial in trials if _is_due(trial, trial.config.train.eval_every)]:
            watcher.evaluate(due)
        for trial in trials:
            if _is_due(trial, trial.config.train.checkpoint_every):
                watcher.checkpoint(trial)


def _is_due(trial: Trial, every: int | None) -> bool:
    return trial.state is TrialState.running and every is not None and trial.step % every == 0


def _say_ended(pack: Pack, open_trials: list[Trial], watcher: Watcher) -> None:
    for trial in [t for t in open_trials if t.state is not TrialState.running]:
        open_trials.remove(trial)
        pack.trials.remove(trial)
        if follower := watcher.ended(trial):
            pack.add(follower)
            open_trials.append(follower)
