"""A sweep from its first check to its last line: settings -> space -> preflight -> study -> trials -> report.

Exit codes: 0 all went well; 1 nothing completed or the failure policy stopped the sweep; 2 bad input; 3 the study is
done and some of its trials failed; 130 interrupted, the same command continues.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, runtime_checkable

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf, open_dict

from mathverify.config import RunConfig
from mathverify.errors import CannotWrite, UserError
from mathverify.files import cannot_write, is_full, write_atomic
from mathverify.records import redact
from mathverify.sweep import report
from mathverify.sweep.attempt import TrialTask, remember
from mathverify.sweep.composer import Composer
from mathverify.sweep.liveness import Heart, Worker
from mathverify.sweep.plugin import PACK_TARGET
from mathverify.sweep.proposals import Job, Nothing, Proposer, is_failure
from mathverify.sweep.settings import Settings, read_settings
from mathverify.sweep.space import Space, parse_space, quoted
from mathverify.sweep.storage import briefly, hidden_storage, hide_password, shown
from mathverify.sweep.study import Session, look_at_session, open_session
from mathverify.sweep.summary_run import sampler_name, send_summary
from mathverify.sweep.workers import is_worker, run_workers
from mathverify.tracking import uploads_in_background

POLL_SECONDS = 0.5
STOPPED, SOME_FAILED, INTERRUPTED = 1, 3, 130
DATED = "multirun/${now:%Y-%m-%d}/${now:%H-%M-%S}"
BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"


@runtime_checkable
class StreamingLauncher(Protocol):
    """A launcher that takes the next job whenever it has room, instead of waiting for a whole batch."""

    def stream(self, take: Callable[[], Job | None], settle: Callable[[Job, str | None], None]) -> None:
        """Run jobs until `take` gives None (nothing now) and none is left; `settle` each with its launch error or None.

        Jobs are composed with `load_sweep_config(config, job.overrides)` and run through attempt.Attempt.
        """


def sweep(
    keys: Mapping[str, Any], context: HydraContext, task: TaskFunction, config: DictConfig, arguments: Sequence[str]
) -> Any:
    """Run a study as hydra.sweeper's keys and the command line say.

    Raises:
        UserError: bad settings, space, study or storage.
        SystemExit: see the module's exit codes; not raised for 0.
    """
    settings = read_settings(keys)
    _hide_password(settings, config)
    if settings.dry_run:
        return _dry_run(settings, context, config, arguments)
    folder = study_folder(settings, config)
    space = parse_space(settings.params, arguments, context.config_loader, settings.is_grid)
    composer = Composer(context.config_loader, config, space)
    _require_budget(settings, space)
    _require_custom(settings)
    _require_folders(config)
    validated = 0 if is_worker() else composer.preflight()
    launcher = _launcher(context, task, config)  # before anything is made: it refuses settings of its own
    session = open_session(settings, space, directions(settings, config), composer.base(), folder)
    session.lanes = _lanes(settings, config)
    remember(session)
    if not is_worker():
        _write_multirun(config, session.folder)
        report.say(report.plan(session, composer, validated, _at_once(settings, config)))
    proposer = Proposer(session, composer, config, job_extras=lambda n: _job_extras(session, config, n))
    proposer.ended = lambda trial: report.say(report.trial_lines(session, trial))
    with uploads_in_background():
        try:
            with _interruptible():
                _run_all(proposer, launcher, config)
        except (KeyboardInterrupt, SystemExit):
            _interrupted(proposer)
        except CannotWrite:  # no trial's fault: those in hand go on when there is space, and no try is counted
            with suppress(UserError), briefly():
                proposer.give_back()
            raise
        return None if is_worker() else _close(session, proposer)


def _dry_run(settings: Settings, context: HydraContext, config: DictConfig, arguments: Sequence[str]) -> None:
    """Check everything and show the plan; leave nothing behind."""
    space = parse_space(settings.params, arguments, context.config_loader, settings.is_grid)
    composer = Composer(context.config_loader, config, space)
    _require_budget(settings, space)
    _require_custom(settings)
    _require_folders(config)
    validated = composer.preflight()
    folder = study_folder(settings, config)
    session = look_at_session(settings, space, directions(settings, config), composer.base(), folder)
    session.lanes = _lanes(settings, config)
    report.say(report.plan(session, composer, validated, _at_once(settings, config)))
    report.say("dry run: nothing was started (hydra.sweeper.dry_run=true)")


def _require_budget(settings: Settings, space: Space) -> None:
    if settings.n_trials is None and (space.size is None or settings.custom_search_space is not None):
        raise UserError(
            "hydra.sweeper.n_trials = null means every point of the space, and this space cannot be counted: "
            "give a number"
        )


def _require_custom(settings: Settings) -> None:
    if (custom := settings.custom_search_space) is not None:
        try:
            get_method(custom)
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"hydra.sweeper.custom_search_space = {custom}: no such function: {reason}") from None


def _require_folders(config: DictConfig) -> None:
    subdir = _raw_subdir(config)
    if OmegaConf.get_type(config) is RunConfig and "${" not in subdir:
        raise UserError(
            f"hydra.sweep.subdir = {subdir} is the same for every trial: each needs a folder of its own, "
            "use '${hydra.job.num}' or leave it out"
        )


def _raw_subdir(config: DictConfig) -> str:
    return str(OmegaConf.to_container(config.hydra.sweep, resolve=False)["subdir"])  # type: ignore[index,call-overload]


# Running


def _launcher(context: HydraContext, task: TaskFunction, config: DictConfig) -> Launcher:
    return Plugins.instance().instantiate_launcher(
        config=config, hydra_context=context, task_function=TrialTask(task, Worker.this())
    )


def _lanes(settings: Settings, config: DictConfig) -> int:
    """How many trials take their seconds at the same time."""
    return 1 if config.hydra.launcher.get("_target_") == PACK_TARGET else settings.n_jobs


def _at_once(settings: Settings, config: DictConfig) -> int:
    """How many trials run at the same time, at most."""
    most = config.hydra.launcher.get("max_trials") if config.hydra.launcher.get("_target_") == PACK_TARGET else None
    return settings.n_jobs if most is None else min(settings.n_jobs, most)


def _run_all(proposer: Proposer, launcher: Launcher, config: DictConfig) -> None:
    settings = proposer.session.settings
    basic = config.hydra.launcher.get("_target_") == BASIC
    if settings.n_jobs > 1 and basic and not is_worker():
        codes = run_workers(settings.n_jobs)
        if INTERRUPTED in codes:
            raise KeyboardInterrupt
        # Workers that died leave trials to take over, which the loop below does, in this process.
        proposer.problem = any(code == STOPPED for code in codes)
        if proposer.problem:
            return
    _quiet_launchers()
    with Heart(proposer.beat):
        if isinstance(launcher, StreamingLauncher):
            _stream(proposer, launcher)
        else:
            _batches(proposer, launcher, 1 if basic else settings.n_jobs)


def _stream(proposer: Proposer, launcher: StreamingLauncher) -> None:
    ended = False

    def take() -> Job | None:
        nonlocal ended
        job = proposer.take()
        ended = job is Nothing.over
        return job if isinstance(job, Job) else None

    while not ended:
        launcher.stream(take, lambda job, error: proposer.settle(job, error))
        if not ended:
            time.sleep(POLL_SECONDS)


def _batches(proposer: Proposer, launcher: Any, size: int) -> None:
    """Hydra's contract: a batch is launched and waited for. With a size of one, trial after trial."""
    said = False
    while True:
        jobs: list[Job] = []
        last: Job | Nothing = Nothing.waiting
        while len(jobs) < size and isinstance(last := proposer.take(), Job):
            jobs.append(last)
        if jobs:
            _launch(proposer, launcher, jobs)
        elif last is Nothing.over:
            return
        else:
            if not said:
                report.say("waiting for trials that other workers have in hand")
            said = True
            time.sleep(POLL_SECONDS)


def _launch(proposer: Proposer, launcher: Any, jobs: Sequence[Job]) -> None:
    try:
        returns: Sequence[JobReturn] = launcher.launch(
            [list(job.overrides) for job in jobs], initial_job_idx=jobs[0].number
        )
    except Exception as trouble:  # a launcher that lost a job raises; the study knows how each trial ended
        if isinstance(trouble, OSError) and is_full(trouble):  # under the files that Hydra writes for a job
            raise cannot_write(proposer.session.folder, trouble) from trouble
        words = " ".join(str(redact(str(trouble))).split())[:300]
        proposer.launch_failed(jobs, f"the launcher failed: {type(trouble).__name__}: {words}")
        return
    for place, job in enumerate(jobs):
        own = None
        if place < len(returns) and returns[place].status is JobStatus.FAILED:
            failure = returns[place]._return_value
            if isinstance(failure, CannotWrite):
                raise failure
            own = f"{type(failure).__name__}: {' '.join(str(redact(str(failure))).split())[:300]}"
        proposer.settle(job, own)


def _quiet_launchers() -> None:
    """Launchers announce every job; a trial's line says more."""
    for name in ("hydra._internal.core_plugins.basic_launcher", "hydra_plugins"):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends a sweep like Ctrl-C does; within a run the run's own handlers come first, and checkpoint."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Ends


def _interrupted(proposer: Proposer) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):  # the last words may be said in peace
        signal.signal(number, signal.SIG_IGN)
    try:
        with briefly():
            held = proposer.give_back()
            which = f"trial {', '.join(map(str, held))} is saved" if held else "all that was done is saved"
            last = f"{which}; {report.summary(proposer.session)}"
    except UserError as error:  # what could not be given back is found later to be nobody's
        last = str(error)
    if not is_worker():
        report.say(f"interrupted: {last}")
        report.say(f"continue with: {report.continuing_command()}")
    sys.exit(INTERRUPTED)


def _close(session: Session, proposer: Proposer) -> dict[str, Any]:
    """The last lines, optimization_results.yaml, and the exit code."""
    results = report.write_results(session)
    report.say(report.closing(session, report.program()))
    trials = session.trials()
    failed = any(is_failure(trial) for trial in trials)
    completed = "best_value" in results or bool(results.get("solutions"))
    report.say(f"{report.summary(session)}; {proposer.why}" if proposer.why else report.summary(session))
    send_summary(session, proposer.config, report.program())
    if proposer.problem or not completed:
        sys.exit(STOPPED)
    if failed:
        sys.exit(SOME_FAILED)
    return results


# Where and how


def study_folder(settings: Settings, config: DictConfig) -> Path:
    """The sweep folder: multirun/NAME instead of Hydra's dated default if the study has a name, to be found again."""
    dated = OmegaConf.to_container(config.hydra.sweep, resolve=False)["dir"] == DATED  # type: ignore[index,call-overload]
    if dated and settings.study_name:
        folder = Path("multirun") / settings.study_name
        with open_dict(config):
            config.hydra.sweep.dir = str(folder)
        return folder
    return Path(config.hydra.sweep.dir)


def directions(settings: Settings, config: DictConfig) -> tuple[str, ...]:
    """As set; by default a run of ours is maximised (accuracy) and another program's value minimised."""
    if settings.directions is not None:
        return settings.directions
    if settings.objective:
        raise UserError("hydra.sweeper.objective needs hydra.sweeper.direction: maximize or minimize, one for each")
    return ("maximize",) if OmegaConf.get_type(config) is RunConfig else ("minimize",)


def _job_extras(session: Session, config: DictConfig, number: int) -> list[str]:
    """What a trial's job is told besides its point: where to work, and to which study it belongs."""
    extras = [f"hydra.sweep.dir={quoted(str(session.folder))}"]
    if _raw_subdir(config) == "${hydra.job.num}":
        extras.append(f"hydra.sweep.subdir={quoted(str(number))}")  # a batch's own numbering may have gaps
    if session.settings.study_name is None:
        extras.append(f"hydra.sweeper.study_name={quoted(session.name)}")
    if hidden_storage() is not None:
        extras.append(f"hydra.sweeper.storage={quoted(shown(session.settings.storage))}")
    if OmegaConf.get_type(config) is RunConfig and config.tracking.group is None:
        extras.append(f"tracking.group={quoted(session.name)}")
    if OmegaConf.get_type(config) is RunConfig:
        extras += [f"tracking.trial={number}", f"tracking.sampler={sampler_name(session)}"]
    return extras


def _hide_password(settings: Settings, config: DictConfig) -> None:
    """Keep a storage URL's password out of every config that Hydra writes; jobs get it through their environment."""
    if not hide_password(settings.storage):
        return
    with open_dict(config):
        config.hydra.sweeper.storage = shown(settings.storage)
        kept = [o for o in config.hydra.overrides.hydra if not o.lstrip("+").startswith("hydra.sweeper.storage")]
        config.hydra.overrides.hydra = kept


def _write_multirun(config: DictConfig, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "multirun.yaml", str(redact(OmegaConf.to_yaml(config))).encode())
