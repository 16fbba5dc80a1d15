"""What the W&B runs of a process share: W&B's service process, the memory of an outage, one warning for all of them."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shlex
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mathverify.records import redact
from mathverify.tracking.local import METRICS

RETRY_SECONDS = 120.0  # after a start that failed, before another run of this process tries online again

log = logging.getLogger(__name__)


class Outage:
    """When a run of this process last failed to start online, or to be uploaded in time."""

    began = -math.inf
    _is_new = False

    @classmethod
    def note(cls) -> None:
        cls.began, cls._is_new = time.monotonic(), True

    @classmethod
    def is_recent(cls) -> bool:
        return time.monotonic() - cls.began < RETRY_SECONDS

    @classmethod
    def since_set_up(cls) -> bool:
        """Whether there was one in the lifetime of the service process that is there now."""
        return cls._is_new

    @classmethod
    def is_over_for_the_service(cls) -> None:
        cls._is_new = False


class Warnings:
    """Turns W&B's complaints, from any thread of this process, into one warning a process.

    An instance stands in for W&B's terminal: its silent mode hands over what it would have printed.
    """

    _lock = threading.Lock()
    _warned = False
    _said_offline = False

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    def info(self, msg: str) -> None:
        pass

    def warning(self, msg: str) -> None:
        if "Fatal error while uploading" in msg or "Timed out finishing" in msg:
            self.once(self._run_dir, msg)

    error = warning

    @classmethod
    def once(cls, run_dir: Path, cause: object) -> None:
        with cls._lock:
            first, cls._warned = not cls._warned, True
        if first:
            said = " ".join(str(redact(str(cause))).split())[:300]
            log.warning(
                "W&B does not take everything (%s). Training goes on; all numbers are in %s, "
                "and what W&B missed can be sent later: %s",
                said,
                run_dir / METRICS,
                _sync_command(run_dir),
            )  # fmt: skip

    @classmethod
    def say_offline(cls, run_dir: Path) -> None:
        with cls._lock:
            first, cls._said_offline = not cls._said_offline, True
        if first:
            log.info("W&B: offline, in %s; to send it later: %s", run_dir / "wandb", _sync_command(run_dir))


def _sync_command(run_dir: Path) -> str:
    return f"wandb sync {shlex.quote(str(run_dir / 'wandb'))}/*run-*"


@contextlib.contextmanager
def outages_become_one_warning(run_dir: Path) -> Iterator[None]:
    """W&B fails in many ways, by exceptions of many kinds; none may reach training."""
    try:
        yield
    except Exception as error:
        Warnings.once(run_dir, error)


def set_up(terminal: Warnings | None) -> None:
    """Have W&B's service process running, for this process alone; what it would print goes to `terminal` or nowhere."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its own telemetry, which complains aloud of outages
    import wandb

    quiet = wandb.Settings(silent=True)
    wandb.setup(settings=quiet)
    os.environ.pop("WANDB_SERVICE", None)  # child processes are to have a service of their own
    wandb.termsetup(quiet, terminal)


def end() -> None:
    """End W&B's service process at once: asked to end, it would wait for a server that does not answer.

    What it has not uploaded is in its files. A later run of this process gets a new one.
    """
    import wandb
    from wandb.sdk import wandb_setup

    connection: Any = wandb_setup.singleton()._connection
    with contextlib.suppress(AttributeError):  # none was started, or W&B has changed: then its own way has to do
        connection._proc._process.kill()
    teardown = threading.Thread(target=_tear_down, args=(wandb,), name="wandb-teardown", daemon=True)
    teardown.start()
    teardown.join(5.0)
    Outage.is_over_for_the_service()


def _tear_down(wandb: Any) -> None:
    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()


def settings(mode: str, start_seconds: float, finish_seconds: float) -> dict[str, Any]:
    """W&B settings: bounded waits, and nothing captured that we did not log (console, code, git, machine, packages)."""
    request = max(1.0, min(10.0, start_seconds / 2))
    retries = {
        "retry_max": 5,
        "retry_wait_min_seconds": 0.5,
        "retry_wait_max_seconds": 5.0,
        "timeout_seconds": request,
    }
    return {
        "mode": mode,
        "silent": True,
        "console": "off",
        "save_code": False,
        "disable_code": True,
        "disable_git": True,
        "disable_job_creation": True,
        "x_disable_meta": True,
        "x_disable_stats": True,
        "x_disable_machine_info": True,
        "x_save_requirements": False,
        "host": "",
        "init_timeout": start_seconds,
        "finish_timeout": finish_seconds,
        "finish_timeout_raises": True,
        "x_transaction_log_flush_interval": 1.0,  # its 15 s lose the end of a killed offline run
        "x_file_stream_transmit_interval": 2.0,
        **{f"x_graphql_{key}": value for key, value in retries.items()},
        **{f"x_file_stream_{key}": value for key, value in retries.items()},
        "x_file_transfer_retry_max": 5,
    }
