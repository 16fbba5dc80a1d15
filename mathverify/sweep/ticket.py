"""A job on its way through a pack: what Hydra and a study do around a task, cut in two at the task.

Between `begin` and `end` lies the training, which a pack does for many tickets at once. What a job leaves behind, and
how its trial ends in a study, is as with Hydra's basic launcher and attempt.TrialTask. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, run_job
from hydra.types import HydraContext
from omegaconf import DictConfig, open_dict

from mathverify import entry
from mathverify.config import RunConfig
from mathverify.errors import CannotWrite, RunFailed, UserError, without_frames
from mathverify.files import cannot_write
from mathverify.judge import Judge, nobody
from mathverify.sweep.attempt import ERROR_FILE, Attempt, Superseded, TrialFailed
from mathverify.sweep.grouping import base_key
from mathverify.sweep.outcome import End


def require_shared_process(config: DictConfig) -> None:
    """Raise UserError for what Hydra does to a job's process, which runs of a pack have in common."""
    if config.hydra.job.chdir:
        raise UserError(
            "hydra.job.chdir=true: runs of a pack share one process and its working folder: "
            "use hydra.job.chdir=false, or hydra/launcher=basic"
        )
    if own := [str(name) for name in config.hydra.job.env_set if name != entry.TRIAL_VARIABLE]:
        raise UserError(
            f"hydra.job.env_set sets {', '.join(own)}: runs of a pack share one process and its environment: "
            "set it in the shell instead, or use hydra/launcher=basic"
        )


@dataclass(eq=False)
class Ticket:
    """A job: its number, its config as composed, and whom to tell when it has come back.

    settle: called once with None, or with why the job came to nothing before its trial was claimed. job: what Hydra
    gets back, once it has begun. folder: the run's. attempt: in a study, once the trial is claimed.
    """

    number: int
    composed: DictConfig
    context: HydraContext
    settle: Callable[[str | None], None]
    config: RunConfig
    job: JobReturn | None = None
    folder: Path = field(default_factory=Path)
    attempt: Attempt | None = None

    @classmethod
    def of(
        cls,
        number: int,
        overrides: Sequence[str],
        master: DictConfig,
        context: HydraContext,
        settle: Callable[[str | None], None] = lambda error: None,
    ) -> Ticket:
        """Compose a job's config; nothing is written yet.

        Raises:
            UserError: the config is impossible.
        """
        composed = context.config_loader.load_sweep_config(master, list(overrides))
        with open_dict(composed):
            composed.hydra.job.id = composed.hydra.job.num = number
        require_shared_process(composed)  # a swept preset may bring settings of Hydra's own
        return cls(number, composed, context, settle, entry.to_run_config(composed))

    @property
    def base(self) -> str:
        """Equal for tickets that can train together."""
        return base_key(self.config)

    @property
    def has_begun(self) -> bool:
        return self.job is not None

    @property
    def judge(self) -> Judge:
        return nobody if self.attempt is None else self.attempt.judge

    def begin(self) -> bool:
        """Make the job's folder as Hydra does, and claim its trial; False when that failed, and the job has ended.

        Raises:
            CannotWrite: the disk refuses; the job has not begun.
        """
        context = HydraContext(self.context.config_loader, cast(Any, _OnlyStart(self.context.callbacks)))
        try:
            job = run_job(
                task_function=self._opened,
                config=self.composed,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
                hydra_context=context,
            )
        except OSError as error:
            raise cannot_write(Path(self.composed.hydra.runtime.output_dir), error) from error
        if isinstance(job._return_value, CannotWrite):
            raise job._return_value
        self.job = job
        if self.job.status is JobStatus.FAILED:
            self.end(error=self.job._return_value)
            return False
        return True

    def _opened(self, config: DictConfig) -> None:
        """Where Hydra would run the task."""
        hydra = HydraConfig.get()
        self.folder = Path(hydra.runtime.output_dir)
        attempt = Attempt.of(hydra)
        if attempt is not None:
            attempt.claim()
            self.attempt = attempt
            (self.folder / ERROR_FILE).unlink(missing_ok=True)
        self.config = entry.to_run_config(config)

    def end(self, value: float | None = None, error: Exception | None = None, is_told: bool = False) -> None:
        """The run is over: it came to `value`, or broke with `error`.

        Args:
            is_told: the screen has said of what it broke.

        Raises:
            CannotWrite: `error` is one, and the trial of a study: the sweep cannot go on, the trial can.
        """
        assert self.job is not None
        if isinstance(error, CannotWrite) and self.attempt is not None:
            self.attempt.released()  # no fault of the trial's: it goes on when there is space again
            raise error
        self.job.return_value, self.job.status = value, JobStatus.COMPLETED
        if error is not None:
            error = entry.told(error) if is_told else error
            entry.refuse(self.folder, error, is_trial=self.attempt is not None)
            self.job = _Told(**vars(self.job))
            self.job.return_value, self.job.status = _for_hydra(error), JobStatus.FAILED
        if self.attempt is not None:
            outcome = (
                self.attempt.returned(self.folder, value) if error is None else self.attempt.raised(self.folder, error)
            )
            try:
                self.attempt.ended(outcome)
                if outcome.end is End.failed:
                    self.job.return_value, self.job.status = TrialFailed(outcome.reason), JobStatus.FAILED
            except Superseded as late:  # whoever has the trial now says how it ends
                self.job.return_value, self.job.status = late, JobStatus.FAILED
        if error is not None:  # Hydra keeps it until the whole sweep is done
            if self.attempt is None:
                entry.show_traceback(error)
            without_frames(error)
        self.context.callbacks.on_job_end(config=self.composed, job_return=self.job)
        self.settle(str(error) if error is not None and self.attempt is None else None)

    def release(self) -> None:
        """Interrupted: whoever comes next continues it."""
        if self.attempt is not None:
            self.attempt.released()


class _Told(JobReturn):
    """A job that failed, for Hydra, which raises its error once all jobs are done. Says nothing more about it."""

    @property
    def return_value(self) -> Any:
        if self.status is JobStatus.FAILED:
            raise self._return_value
        return self._return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value


def _for_hydra(error: Exception) -> Exception:
    """What ends the command in the end: exit code 2 for a user's error, 1 for any other, whose traceback was shown."""
    return error if isinstance(error, UserError | RunFailed) else entry.told(RunFailed(entry.one_line(error)))


class _OnlyStart:
    """Hydra's callbacks for a job whose end comes later."""

    def __init__(self, callbacks: Any) -> None:
        self._callbacks = callbacks

    def on_job_start(self, **facts: Any) -> None:
        self._callbacks.on_job_start(**facts)

    def on_job_end(self, **facts: Any) -> None:
        """Said by Ticket.end."""
