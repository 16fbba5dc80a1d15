"""One W&B run and the thread that talks to it; and how all of a process's end. What is sent is the caller's business.

Ending: `close` hands the run its last word. Alone, it waits for the upload; within `uploads_in_background` it returns
at once, and the end of that block waits for all together. Either way the wait has an end: what is not through by then
stays in W&B's own files beside the run, and W&B's service process, which would wait for ever, is ended.
"""

from __future__ import annotations

import atexit
import queue
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mathverify.records import Status, read_json, write_json
from mathverify.tracking import service
from mathverify.tracking.service import Outage, Warnings, outages_become_one_warning

IDENTITY = "tracking.json"
START_SECONDS = 10.0  # for W&B to answer at all, before the run is kept offline
FINISH_SECONDS = 60.0  # for the rest to be uploaded at the end, before it is left to `wandb sync`
SLACK_SECONDS = 15.0  # for what W&B does itself around a start and an end
INTERRUPTED_SECONDS = 5.0  # instead of all of these after a signal: the process is to be gone soon


@dataclass(frozen=True)
class RunCard:
    """What a W&B run is called and filed under. Holds no secrets: whoever makes it has redacted it.

    id: fixed, such as a study's; None for one that is made once and kept in the folder.
    """

    project: str
    entity: str | None
    group: str | None
    name: str
    job_type: str
    tags: tuple[str, ...]
    config: Mapping[str, Any]
    id: str | None = None


class Mirror:
    """One W&B run and the thread that talks to it. Several live side by side in one process and share no state.

    The thread starts the run (online, or offline if the server does not answer), then takes one action after
    another from a queue. An action that fails is dropped with a warning: the numbers are in the run folder.
    """

    def __init__(
        self,
        card: RunCard,
        folder: Path,
        *,
        online: bool,
        start_seconds: float = START_SECONDS,
        finish_seconds: float = FINISH_SECONDS,
    ) -> None:
        self._card, self._folder, self._online = card, folder.absolute(), online
        self._start_seconds, self._finish_seconds = start_seconds, finish_seconds
        self._patience = 2 * start_seconds + finish_seconds + SLACK_SECONDS
        self._id = card.id or _run_id(folder)
        self._actions: queue.SimpleQueue[Callable[[Any], object] | Status] = queue.SimpleQueue()
        self._status: Status | None = None
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        with _Live.lock:
            self._before = _Live.enter(self)
            self._thread.start()

    def send(self, action: Callable[[Any], object]) -> None:
        """Have the thread do something with the W&B run, in turn. Returns at once."""
        self._actions.put(action)

    def close(self, status: Status) -> None:
        """End the run with its status; waits for the upload, but not within `uploads_in_background`."""
        if self._status is not None:
            return
        self._status = status
        self._actions.put(status)
        if not _Live.in_background:
            _settle([self])

    # The thread

    def _work(self) -> None:
        run = None
        with outages_become_one_warning(self._folder):
            run = self._start()
        if run is None:
            return
        while not isinstance(action := self._actions.get(), Status):
            with outages_become_one_warning(self._folder):
                action(run)
        with outages_become_one_warning(self._folder):
            run.summary["status"] = action.value
            run.tags = tuple(dict.fromkeys((*self._card.tags, action.value)))
            self._finish(run, action)

    def _finish(self, run: Any, status: Status) -> None:
        try:
            run.finish(exit_code=0 if status in (Status.completed, Status.pruned) else 1)
        except TimeoutError:
            Outage.note()
            raise

    def _start(self) -> Any:
        if self._before is not None:  # the same run again, begun while its last upload was on its way
            self._before._thread.join(self._before._patience)
        service.set_up(Warnings(self._folder))
        atexit.unregister(settle)
        atexit.register(settle)  # after W&B's own hook, so that it runs before it
        with _starting:  # one at a time: after the first failure the others of a pack need not try
            run = self._start_online() if self._online and not Outage.is_recent() else None
            run = run or self._init("offline")
        if not self._online:
            Warnings.say_offline(self._folder)
        return run

    def _start_online(self) -> Any:
        """The online run, or None when the server does not take it."""
        run = None
        with outages_become_one_warning(self._folder):
            run = self._init("online")
        if run is None:
            Outage.note()
            # W&B's service holds on to an id whose start failed (finishing it there hangs): take another
            for folder in self._folder.glob(f"wandb/run-*-{self._id}"):
                shutil.rmtree(folder, ignore_errors=True)  # it holds no numbers
            self._id = _run_id(self._folder, renew=True)
        return run

    def _init(self, mode: str) -> Any:
        import wandb

        card = self._card
        return wandb.init(
            project=card.project,
            entity=card.entity,
            group=card.group,
            name=card.name,
            tags=list(card.tags) or None,
            job_type=card.job_type,
            config=dict(card.config),
            id=self._id,
            resume="allow",
            reinit="create_new",
            dir=str(self._folder),
            settings=wandb.Settings(**service.settings(mode, self._start_seconds, self._finish_seconds)),
        )


_starting = threading.Lock()


class _Live:
    """The mirrors of this process that may be at work, and whether their ends are awaited together."""

    mirrors: list[Mirror] = []  # noqa: RUF012 - one list for the process
    depth = 0
    in_background = False
    lock = threading.RLock()

    @classmethod
    def enter(cls, mirror: Mirror) -> Mirror | None:
        """Count one in; returns an earlier one of the same W&B run that may not be done yet."""
        with cls.lock:
            cls.mirrors = [other for other in cls.mirrors if other._thread.is_alive()]
            before = [other for other in cls.mirrors if other._id == mirror._id]
            cls.mirrors.append(mirror)
        return before[-1] if before else None


@contextmanager
def uploads_in_background() -> Iterator[None]:
    """Within, a tracker's `finish` returns at once; the end of the (outermost) block waits for all of them together.

    The wait is as long as one run's alone, however many there are, and short after an interrupt. A tracker that nobody
    finished, because of an error, is ended as failed.
    """
    with _Live.lock:
        _Live.depth += 1
        _Live.in_background = True
    try:
        yield
    finally:
        with _Live.lock:
            _Live.depth -= 1
            _Live.in_background = outermost = _Live.depth > 0
        if not outermost:
            settle()


def settle() -> None:
    """End every W&B run of this process and wait for the uploads, within bounds."""
    with _Live.lock:
        mirrors = list(_Live.mirrors)
    for mirror in mirrors:
        if mirror._status is None:
            mirror._status = Status.failed
            mirror._actions.put(Status.failed)
    _settle(mirrors)


def _settle(mirrors: list[Mirror]) -> None:
    if any(mirror._status is Status.interrupted for mirror in mirrors):
        patience = INTERRUPTED_SECONDS
    else:
        patience = max((mirror._patience for mirror in mirrors), default=0.0)
    deadline = time.monotonic() + patience
    for mirror in mirrors:
        mirror._thread.join(max(0.0, deadline - time.monotonic()))
        if mirror._thread.is_alive():
            Warnings.once(mirror._folder, "it did not finish in time")
            Outage.note()
    with _Live.lock:
        _Live.mirrors = [mirror for mirror in _Live.mirrors if mirror not in mirrors]
        if not _Live.mirrors and Outage.since_set_up():
            service.end()


def _run_id(run_dir: Path, renew: bool = False) -> str:
    """The run's W&B id: made once, kept in the run folder, so that a continued run continues there too."""
    path = run_dir / IDENTITY
    if path.exists() and not renew:
        kept = read_json(path)
        if isinstance(kept, dict) and isinstance(kept.get("wandb_id"), str) and kept["wandb_id"].isalnum():
            return str(kept["wandb_id"])
    made = secrets.token_hex(4)
    write_json(path, {"wandb_id": made})
    return made
