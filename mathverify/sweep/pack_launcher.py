"""`hydra/launcher=pack`: jobs that share a base train together, in one process and in passes over that one base.

plugin.py is what Hydra sees. Jobs come as a batch (Hydra's grid) or as a stream (our sweeper); a job becomes a ticket
(ticket.py), tickets on one base a pack (packs.py). Imports torch only when there is something to train.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, configure_log, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from mathverify.errors import Interrupted, UserError
from mathverify.printable import as_override
from mathverify.sweep.attempt import INTERRUPTED, TrialTask
from mathverify.sweep.grouping import by_base, difference, in_common
from mathverify.sweep.lease import leased_device
from mathverify.sweep.report import say
from mathverify.sweep.ticket import Ticket, require_shared_process

if TYPE_CHECKING:
    from mathverify.pack_screen import PackScreen
    from mathverify.sweep.proposals import Job


def require_possible(max_trials: int | None, task: TaskFunction, config: DictConfig) -> None:
    """Raise UserError for a setting that cannot work, or a task that is not mathverify.train's."""
    if max_trials is not None and max_trials < 1:
        raise UserError(f"hydra.launcher.max_trials = {max_trials} is not possible: use a whole number >= 1, or null")
    if not is_ours(task):
        raise UserError("hydra/launcher=pack trains runs of mathverify.train only: use hydra/launcher=basic")
    require_shared_process(config)


def is_ours(task: Any) -> bool:
    """Whether a Hydra task is mathverify.train's, whose work a pack can do."""
    task = task.task if isinstance(task, TrialTask) else task
    code, ours = getattr(task, "__code__", None), find_spec("mathverify.train")
    assert ours is not None
    assert ours.origin is not None
    return code is not None and Path(code.co_filename).resolve() == Path(ours.origin).resolve()


def launch(
    overrides: Sequence[Sequence[str]], first: int, most: int | None, context: HydraContext, config: DictConfig
) -> list[JobReturn]:
    """A batch: all jobs are known, so they are sorted by base.

    Raises:
        SystemExit: with code 130 after a signal; what was done is saved.
    """
    _hydras_own_logging(config)
    folder = Path(str(config.hydra.sweep.dir))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return _batch(overrides, first, most, context, config)
    except KeyboardInterrupt:  # before anything trained, or for the second time
        say(f"stopped. {_continuing(folder)}")
        sys.exit(INTERRUPTED)


def _batch(
    overrides: Sequence[Sequence[str]], first: int, most: int | None, context: HydraContext, config: DictConfig
) -> list[JobReturn]:
    tickets = [Ticket.of(first + place, own, config, context) for place, own in enumerate(overrides)]
    groups = [[tickets[i] for i in group] for group in by_base([ticket.config for ticket in tickets])]
    queue = iter([ticket for group in groups for ticket in group])

    def planned(screen: PackScreen) -> None:
        base = groups[0][0].config
        common = f"which share {in_common()}" if len(groups[0]) > 1 else ""
        whys = [common, *(difference(group[0].config, base) for group in groups[1:])]
        screen.planned([([t.number for t in group], why) for group, why in zip(groups, whys, strict=True)])

    def stopped(screen: PackScreen) -> None:
        screen.say(f"stopped; what was done is saved. {_continuing(Path(str(config.hydra.sweep.dir)))}")

    _work(lambda: next(queue, None), most, config, at_first=planned, if_stopped=stopped)
    return [ticket.job for ticket in tickets if ticket.job is not None]


def _continuing(folder: Path) -> str:
    """How to go on with a grid in its folder."""
    words = [word for word in sys.argv[1:] if not word.startswith("hydra.sweep.dir=")]
    continuing = f"{shlex.join(words)} {as_override('hydra.sweep.dir', folder)}"
    return f"Continue with: python -m mathverify.train {continuing}"


def stream(
    take: Callable[[], Job | None],
    settle: Callable[[Job, str | None], None],
    most: int | None,
    context: HydraContext,
    config: DictConfig,
) -> None:
    """Jobs as they come, at most the study's n_jobs at once. The study says what becomes of them; words about packs go
    to a file in its folder.

    Raises:
        SystemExit: with code 130 after a signal; what was done is saved.
    """

    def next_ticket() -> Ticket | None:
        while (job := take()) is not None:
            try:
                return Ticket.of(job.number, job.overrides, config, context, partial(settle, job))
            except UserError as error:
                settle(job, str(error))
        return None

    n_jobs = config.hydra.sweeper.get("n_jobs", 1)
    _work(next_ticket, n_jobs if most is None else min(n_jobs, most), config, of_a_study=True)


def _work(
    take: Callable[[], Ticket | None],
    most: int | None,
    config: DictConfig,
    at_first: Callable[[PackScreen], None] = lambda screen: None,
    if_stopped: Callable[[PackScreen], None] = lambda screen: None,
    of_a_study: bool = False,
) -> None:
    setup_globals()
    ticket = take()
    if ticket is None:
        return
    if of_a_study and config.hydra.sweeper.get("lease_devices", True):
        leased_device(ticket.composed)  # for the whole process, and while a signal still ends it at once
    # From here on it is heavy.
    from mathverify.pack_screen import PackScreen
    from mathverify.run import heeding_signals
    from mathverify.screen import SCREEN, paper
    from mathverify.sweep.packs import Packs
    from mathverify.tracking import uploads_in_background

    begun = [ticket]
    words = paper(Path(ticket.composed.hydra.sweep.dir) / SCREEN) if of_a_study else None
    with uploads_in_background(), heeding_signals() as stop, PackScreen(words=words) as screen:
        at_first(screen)
        try:
            Packs(lambda: begun.pop() if begun else take(), most, screen, stop).run()
        except Interrupted:
            if_stopped(screen)
            sys.exit(INTERRUPTED)
        finally:
            _hydras_own_logging(config)


def _hydras_own_logging(config: DictConfig) -> None:
    """Each job sets its own up."""
    configure_log(config.hydra.hydra_logging, config.hydra.verbose)
