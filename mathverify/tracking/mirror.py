"""One W&B run and the thread that talks to it. What is sent is the caller's business."""

from __future__ import annotations

import queue
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mathverify.config import RunConfig, to_plain
from mathverify.records import Status, read_json, redact, write_json
from mathverify.tracking.service import Outage, Warnings, outages_become_one_warning, settings
from mathverify.tracking.vocabulary import DEFINITIONS, STEP

IDENTITY = "tracking.json"
START_SECONDS = 10.0  # for W&B to answer at all, before the run is kept offline
FINISH_SECONDS = 60.0  # for the rest to be uploaded at the end, before it is left to `wandb sync`


class Mirror:
    """One W&B run and the thread that talks to it.

    The thread starts the run (online, or offline if the server does not answer), then takes one action after
    another from a queue. An action that fails is dropped with a warning: the numbers are in the run folder.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        job_type: str,
        online: bool,
        start_seconds: float,
        finish_seconds: float,
    ) -> None:
        self._config, self._run_dir, self._job_type = config, run_dir.absolute(), job_type
        self._online, self._start_seconds, self._finish_seconds = online, start_seconds, finish_seconds
        self._id = _run_id(run_dir)
        self._actions: queue.SimpleQueue[Callable[[Any], object] | Status] = queue.SimpleQueue()
        self._thread: threading.Thread | None = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def send(self, action: Callable[[Any], object]) -> None:
        self._actions.put(action)

    def close(self, status: Status) -> None:
        """End the run with its status; waits no longer than starting (online, then offline) and uploading may take."""
        if self._thread is None:
            return
        self._actions.put(status)
        self._thread.join(2 * self._start_seconds + self._finish_seconds + 15.0)
        if self._thread.is_alive():
            Warnings.once(self._run_dir, "it did not finish in time")
        self._thread = None

    def _work(self) -> None:
        run = None
        with outages_become_one_warning(self._run_dir):
            run = self._start()
        if run is None:
            return
        while not isinstance(action := self._actions.get(), Status):
            with outages_become_one_warning(self._run_dir):
                action(run)
        with outages_become_one_warning(self._run_dir):
            run.summary["status"] = action.value
            run.finish(exit_code=0 if action in (Status.completed, Status.pruned) else 1)

    def _start(self) -> Any:
        import wandb

        quiet = wandb.Settings(silent=True)
        wandb.setup(settings=quiet)
        wandb.termsetup(quiet, Warnings(self._run_dir))
        with _starting:  # one at a time: after the first failure the others of a pack need not try
            run = self._start_online() if self._online and not Outage.is_recent() else None
            run = run or self._init("offline")
        if not self._online:
            Warnings.say_offline(self._run_dir)
        return run

    def _start_online(self) -> Any:
        """The online run, or None when the server does not take it."""
        run = None
        with outages_become_one_warning(self._run_dir):
            run = self._init("online")
        if run is None:
            Outage.began = time.monotonic()
            # W&B's service holds on to an id whose start failed (finishing it there hangs): take another
            for folder in self._run_dir.glob(f"wandb/run-*-{self._id}"):
                shutil.rmtree(folder, ignore_errors=True)  # it holds no numbers
            self._id = _run_id(self._run_dir, renew=True)
        return run

    def _init(self, mode: str) -> Any:
        import wandb

        tracking = self._config.tracking
        run = wandb.init(
            project=tracking.project,
            entity=tracking.entity,
            group=tracking.group,
            name=redact(self._config.name),
            tags=[redact(tag) for tag in tracking.tags] or None,
            job_type=self._job_type,
            config=redact(to_plain(self._config)),
            id=self._id,
            resume="allow",
            reinit="create_new",
            dir=str(self._run_dir),
            settings=wandb.Settings(**settings(mode, self._start_seconds, self._finish_seconds)),
        )
        run.define_metric(STEP, hidden=True)
        for name, summary in DEFINITIONS:
            run.define_metric(name, step_metric=STEP, summary=summary)
        return run


_starting = threading.Lock()
"""Guards `Outage` too."""


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
