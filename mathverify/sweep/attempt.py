"""One try at a trial, in the process that runs it: claim it, beat, ask the pruner, say how it ended.

The process may be the sweeper's own or a job of any launcher; all it needs is the config that Hydra composed for it.
It writes its outcome into the study and leaves the telling to a sweeper, so that a job that outlives its sweeper loses
nothing and a trial is told once.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import TaskFunction
from omegaconf import DictConfig
from optuna.trial import FrozenTrial, TrialState

from mathverify.entry import TRIAL_VARIABLE
from mathverify.errors import CannotWrite, UserError
from mathverify.files import write_atomic
from mathverify.judge import judged_by
from mathverify.records import redact
from mathverify.sweep import outcome as outcomes
from mathverify.sweep.lease import give_device_back, leased_device
from mathverify.sweep.liveness import Heart, Worker
from mathverify.sweep.outcome import Outcome
from mathverify.sweep.settings import read_settings
from mathverify.sweep.storage import briefly, hidden_storage
from mathverify.sweep.study import Session, open_existing

INTERRUPTED = 130
ERROR_FILE = "error.txt"

_open: dict[str, Session] = {}


class TrialFailed(Exception):
    """A trial ended as failed; the study has the reason. Carries no frames, so that their tensors are freed."""


class Superseded(Exception):
    """This job was given up for dead and its trial handed to another."""


def remember(session: Session) -> None:
    """Let jobs that run in this process use the study that is open already."""
    _open[str(session.folder)] = session


@dataclass
class Attempt:
    """A try at one trial. token: what the study calls this try; another token there means it was taken over."""

    session: Session
    number: int
    token: str
    trial_id: int
    pruned: str | None = None

    @classmethod
    def of(cls, hydra: Any) -> Attempt | None:
        """The try that a job's config (its `hydra` part) belongs to; None for a job that is no trial."""
        mark = hydra.job.env_set.get(TRIAL_VARIABLE)
        if mark is None:
            return None
        number, _, token = mark.partition(":")
        folder = Path(hydra.runtime.cwd) / hydra.sweep.dir
        session = _open.get(str(folder)) or _reopen(hydra, folder)
        return cls(session, int(number), token, session.trial(int(number))._trial_id)

    def claim(self) -> None:
        """Say that this process now works on the trial.

        Raises:
            Superseded: another one does, or the trial has ended.
        """
        self.session.alone(self._claim)

    def _claim(self) -> None:
        trial = self._still_ours()
        me = Worker.this()
        if trial.user_attrs.get("owner") != me.to_plain() or trial.user_attrs.get("claimed") != self.token:
            self.session.mark(trial, owner=me.to_plain(), claimed=self.token)

    def _still_ours(self) -> FrozenTrial:
        trial = self._now()
        if trial.state is not TrialState.RUNNING or trial.user_attrs["attempt"]["token"] != self.token:
            raise Superseded(f"trial {self.number} was handed to another worker")
        return trial

    def beat(self) -> None:
        """A sign of life for those who cannot ask this machine's kernel."""
        self.session.storage.set_trial_user_attr(self.trial_id, "beat", time.time())

    def judge(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """Report a validation to the study; the reason to stop if the pruner says so.

        A database that does not answer now stops no training: the next validation may be reported.
        """
        with suppress(UserError), briefly():
            return self._judge(step, metrics)
        return self.pruned

    def _judge(self, step: int, metrics: Mapping[str, float]) -> str | None:
        settings, study = self.session.settings, self.session.study
        value = metrics.get(settings.report)
        if value is None or math.isnan(value) or len(self.session.directions) > 1:
            return None
        seen = self._now().intermediate_values
        if any(later > step for later in seen):  # passed before a kill, and judged good enough then
            return None
        if step not in seen:
            self.session.storage.set_trial_intermediate_value(self.trial_id, step, value)
        self.session.trials()  # also drops the cache, so that the pruner sees what other workers reported
        if settings.pruner is not None and study.pruner.prune(study, self._now()):
            name = type(study.pruner).__name__.removesuffix("Pruner").lower()
            self.pruned = f"pruned at step {step} by the {name} rule"
        return self.pruned

    def ended(self, outcome: Outcome) -> None:
        """Leave the outcome in the study, for a sweeper to tell.

        Raises:
            Superseded: this process was taken for dead meanwhile (its machine was cut off, say).
        """
        self.session.alone(lambda: self.session.mark(self._still_ours(), outcome=outcome.to_plain()))

    def returned(self, folder: Path, value: Any) -> Outcome:
        """The outcome of a task that came to its end in `folder` and returned `value`."""
        session = self.session
        count = len(session.directions)
        return outcomes.of_return(value, folder, session.settings.objective, count, self.pruned)

    def raised(self, folder: Path, error: BaseException) -> Outcome:
        """The outcome of a task that raised; the traceback is left in its folder."""
        if isinstance(error, Exception):
            text = str(redact("".join(traceback.format_exception(error))))
            folder.mkdir(parents=True, exist_ok=True)  # a refused run took its empty folder back
            write_atomic(folder / ERROR_FILE, text.encode())
        return outcomes.of_exception(error, folder)

    def released(self) -> None:
        """Interrupted by a signal: whoever comes next continues it, and it is no try that counts."""
        with suppress(UserError), briefly():
            self.session.alone(lambda: release(self.session, self._now(), self.token))

    def _now(self) -> FrozenTrial:
        return self.session.storage.get_trial(self.trial_id)


def release(session: Session, trial: FrozenTrial, token: str) -> None:
    """Give a trial back unharmed, if this try still has it."""
    attempt = trial.user_attrs.get("attempt", {})
    if trial.state is TrialState.RUNNING and attempt.get("token") == token and "outcome" not in trial.user_attrs:
        session.mark(trial, owner=None, attempt={"token": None, "count": attempt["count"] - 1})


def _reopen(hydra: Any, folder: Path) -> Session:
    keys = {key: value for key, value in hydra.sweeper.items() if not key.startswith("_")}
    if (hidden := hidden_storage()) is not None:
        keys["storage"] = hidden
    session = open_existing(read_settings(keys, Path(hydra.runtime.cwd)), folder)
    remember(session)
    return session


@dataclass
class TrialTask:
    """The user's task as a study's launchers run it. home: the sweeper's process, where an interrupt ends the sweep."""

    task: TaskFunction
    home: Worker

    def __call__(self, config: DictConfig) -> Any:
        hydra = HydraConfig.get()
        attempt = Attempt.of(hydra)
        if attempt is None:
            return self.task(config)
        attempt.claim()
        folder = Path(hydra.runtime.output_dir)
        try:
            outcome, returned = self._run(attempt, config, folder)
        except (KeyboardInterrupt, SystemExit):
            attempt.released()
            if Worker.this() == self.home:
                raise
            return None
        except CannotWrite:  # no fault of the trial's: it goes on when there is space again
            attempt.released()
            raise
        attempt.ended(outcome)
        if outcome.end is outcomes.End.failed:
            raise TrialFailed(outcome.reason)
        return returned

    def _run(self, attempt: Attempt, config: DictConfig, folder: Path) -> tuple[Outcome, Any]:
        """Run the task to an outcome; only interrupts come through."""
        session = attempt.session
        (folder / ERROR_FILE).unlink(missing_ok=True)
        try:
            with ExitStack() as stack:
                stack.enter_context(Heart(attempt.beat))
                if session.settings.lease_devices:
                    leased_device(config)
                    if Worker.this() != self.home:  # a launcher's process may live on with nothing to do
                        stack.callback(give_device_back)
                stack.enter_context(judged_by(attempt.judge))
                returned = self.task(config)
            return attempt.returned(folder, returned), returned
        except SystemExit as error:
            if error.code == INTERRUPTED:
                raise
            return attempt.raised(folder, error), None
        except CannotWrite:
            raise
        except Exception as error:
            return attempt.raised(folder, error), None
