"""Where numbers go while a run trains: metrics.jsonl always, Weights & Biases beside it. Decides nothing about runs.

W&B is talked to from a thread of its own and may be slow, broken or absent: training never waits for it, and every
number is in the run folder first.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import netrc
import os
import queue
import secrets
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO
from urllib.parse import urlsplit

import numpy as np

from mathverify.config import RunConfig, TrackingKind, TrackingMode, to_plain
from mathverify.errors import UserError
from mathverify.files import cannot_write, write_atomic
from mathverify.records import Predictions, Status, read_json, redact, write_json

METRICS = "metrics.jsonl"
IDENTITY = "tracking.json"
STEP = "train/step"
Value = float | int | np.floating[Any] | np.integer[Any] | None

# (name or pattern, summary): how W&B keeps a metric's best, so that its runs table ranks without clicks.
DEFINITIONS = (
    ("train/*", None),
    ("validation/*", None),
    ("train/loss", "min"),
    ("validation/loss", "min"),
    ("validation/accuracy", "max"),
    ("validation/balanced_accuracy", "max"),
    ("validation/auroc", "max"),
    ("validation/brier", "min"),
    ("validation/ece", "min"),
)
START_SECONDS = 10.0  # for W&B to answer at all, before the run is kept offline
RETRY_SECONDS = 120.0  # after a start that failed, before another run of this process tries online again
FINISH_SECONDS = 60.0  # for the rest to be uploaded at the end, before it is left to `wandb sync`

log = logging.getLogger(__name__)


class Tracker:
    """Appends every logged number to metrics.jsonl. The base of the family, and all of it for tracking=none.

    Not for several threads at once; several trackers may live in one process.
    """

    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        self._path = run_dir / METRICS
        _keep_until(self._path, resume_step)
        self._file: TextIO | None = self._path.open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        """Write one line: step, time (Unix seconds) and the values; what is not finite is written as null.

        step: of the optimizer, never falling. Raises UserError when the disk refuses, ValueError after `finish`.
        """
        if self._file is None:
            raise ValueError("log() after finish()")
        line = json.dumps({"step": step, "time": round(time.time(), 3), **_finite(values)}, allow_nan=False)
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise cannot_write(self._path, error) from error

    def summarize(self, values: Mapping[str, Value | str]) -> None:
        """Final numbers of the run, e.g. test metrics; result.json is their home on disk."""

    def predictions(self, predictions: Predictions) -> None:
        """Test rows with scores; predictions.parquet is their home on disk."""

    def adapter(self, path: Path) -> None:
        """The trained adapter's folder."""

    def finish(self, status: Status = Status.completed) -> None:
        """Close. May be called more than once."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # nothing is buffered: every line was flushed
                self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        match error:
            case None:
                self.finish(Status.completed)
            case KeyboardInterrupt() | SystemExit():
                self.finish(Status.interrupted)
            case _:
                self.finish(Status.failed)


class WandbTracker(Tracker):
    """A Tracker that mirrors to W&B from its own thread: calls return at once, and failures become one warning."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        resume_step: int | None,
        *,
        job_type: str,
        online: bool,
        start_seconds: float,
        finish_seconds: float,
    ) -> None:
        super().__init__(run_dir, resume_step)
        self._mirror = _Mirror(config, run_dir, job_type, online, start_seconds, finish_seconds)

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        super().log(step, values)
        self._mirror.send(lambda run: run.log({STEP: step, **_finite(values)}, step=step))

    def summarize(self, values: Mapping[str, Value | str]) -> None:
        kept = {key: redact(value) for key, value in values.items()}
        self._mirror.send(lambda run: run.summary.update(kept))

    def predictions(self, predictions: Predictions) -> None:
        if rows := self._mirror.table_rows:
            self._mirror.send(lambda run: run.log({"predictions": _wandb_table(predictions, rows)}))

    def adapter(self, path: Path) -> None:
        if self._mirror.log_adapter:
            self._mirror.send(lambda run: _log_adapter(run, path))

    def finish(self, status: Status = Status.completed) -> None:
        super().finish(status)
        self._mirror.close(status)


def open_tracker(
    config: RunConfig,
    run_dir: Path,
    *,
    resume_step: int | None = None,
    job_type: str = "train",
    start_seconds: float = START_SECONDS,
    finish_seconds: float | None = None,
) -> Tracker:
    """The tracker that config.tracking asks for. Returns at once: W&B starts in the background.

    resume_step: the checkpoint's step; metrics.jsonl keeps lines up to it and drops later ones. None: a fresh start.
    finish_seconds: longest wait for uploads in `finish` (default 60; ten times that with an adapter to upload).
    Raises UserError when tracking.mode=online and no key is configured.
    """
    if config.tracking.kind is TrackingKind.none or os.environ.get("WANDB_MODE") == "disabled":
        return Tracker(run_dir, resume_step)
    if finish_seconds is None:
        finish_seconds = FINISH_SECONDS * (10 if config.tracking.log_adapter else 1)
    return WandbTracker(
        config,
        run_dir,
        resume_step,
        job_type=job_type,
        online=_goes_online(config.tracking.mode),
        start_seconds=start_seconds,
        finish_seconds=finish_seconds,
    )


def check_tracking(config: RunConfig) -> None:
    """Raise, before anything is written, the UserError of `open_tracker`: tracking.mode=online without a key."""
    if config.tracking.kind is TrackingKind.wandb and os.environ.get("WANDB_MODE") != "disabled":
        _goes_online(config.tracking.mode)


class _Mirror:
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
        self.table_rows = config.tracking.table_rows
        self.log_adapter = config.tracking.log_adapter
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
            _Warnings.once(self._run_dir, "it did not finish in time")
        self._thread = None

    def _work(self) -> None:
        run = None
        with _outages_become_one_warning(self._run_dir):
            run = self._start()
        if run is None:
            return
        while not isinstance(action := self._actions.get(), Status):
            with _outages_become_one_warning(self._run_dir):
                action(run)
        with _outages_become_one_warning(self._run_dir):
            run.summary["status"] = action.value
            run.finish(exit_code=0 if action in (Status.completed, Status.pruned) else 1)

    def _start(self) -> Any:
        import wandb

        quiet = wandb.Settings(silent=True)
        wandb.setup(settings=quiet)
        wandb.termsetup(quiet, _Warnings(self._run_dir))
        with _starting:  # one at a time: after the first failure the others of a pack need not try
            run = self._start_online() if self._online and not _Outage.is_recent() else None
            run = run or self._init("offline")
        if not self._online:
            _Warnings.say_offline(self._run_dir)
        return run

    def _start_online(self) -> Any:
        """The online run, or None when the server does not take it."""
        run = None
        with _outages_become_one_warning(self._run_dir):
            run = self._init("online")
        if run is None:
            _Outage.began = time.monotonic()
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
            group=redact(tracking.group),
            name=redact(self._config.name),
            tags=[redact(tag) for tag in tracking.tags] or None,
            job_type=self._job_type,
            config=redact(to_plain(self._config)),
            id=self._id,
            resume="allow",
            reinit="create_new",
            dir=str(self._run_dir),
            settings=wandb.Settings(**_settings(mode, self._start_seconds, self._finish_seconds)),
        )
        run.define_metric(STEP, hidden=True)
        for name, summary in DEFINITIONS:
            run.define_metric(name, step_metric=STEP, summary=summary)
        return run


_starting = threading.Lock()


class _Outage:
    """When a run of this process last failed to start online. Guarded by `_starting`."""

    began = -math.inf

    @classmethod
    def is_recent(cls) -> bool:
        return time.monotonic() - cls.began < RETRY_SECONDS


class _Warnings:
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
def _outages_become_one_warning(run_dir: Path) -> Iterator[None]:
    """W&B fails in many ways, by exceptions of many kinds; none may reach training."""
    try:
        yield
    except Exception as error:
        _Warnings.once(run_dir, error)


def _settings(mode: str, start_seconds: float, finish_seconds: float) -> dict[str, Any]:
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


def _goes_online(mode: TrackingMode) -> bool:
    match mode:
        case TrackingMode.offline:
            return False
        case TrackingMode.online if not _has_key():
            raise UserError(
                "tracking.mode = 'online' needs a W&B key: set WANDB_API_KEY, run `wandb login`, "
                "or use tracking.mode=offline"
            )
        case TrackingMode.online:
            return True
    return os.environ.get("WANDB_MODE", "online") == "online" and _has_key()


def _has_key() -> bool:
    """Whether a W&B key is configured, in the environment or in netrc for W&B's host. Never asks, never prints it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        if path and (file := Path(path).expanduser()).is_file():
            with contextlib.suppress(netrc.NetrcParseError, OSError, UnicodeDecodeError):
                hosts = netrc.netrc(file).hosts
                return host in hosts or host.split(":")[0] in hosts
    return False


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


def _keep_until(path: Path, resume_step: int | None) -> None:
    """Cut metrics.jsonl back to what the checkpoint knows: a continued run logs the later steps again."""
    if not path.exists():
        return
    kept = (
        [] if resume_step is None else [line for line in path.read_bytes().splitlines() if _is_up_to(line, resume_step)]
    )
    write_atomic(path, b"".join(line + b"\n" for line in kept))


def _is_up_to(line: bytes, step: int) -> bool:
    """False for a later step and for a torn line."""
    try:
        return int(json.loads(line)["step"]) <= step
    except (ValueError, KeyError, TypeError):
        return False


def _finite(values: Mapping[str, Value]) -> dict[str, Value]:
    """Plain numbers: NumPy scalars unwrapped, what JSON cannot hold as None."""
    plain = {key: value.item() if isinstance(value, np.generic) else value for key, value in values.items()}
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in plain.items()}


def _wandb_table(predictions: Predictions, rows: int) -> Any:
    """At most `rows` predictions, evenly spaced over the set, as a W&B table."""
    import wandb

    table = predictions.table()
    if table.num_rows > rows:
        table = table.take(np.linspace(0, table.num_rows - 1, rows).round().astype(np.int64))
    columns = table.to_pydict()
    return wandb.Table(columns=list(columns), data=[list(row) for row in zip(*columns.values(), strict=True)])


def _log_adapter(run: Any, path: Path) -> None:
    import wandb

    artifact = wandb.Artifact(f"adapter-{run.id}", type="adapter")
    artifact.add_dir(str(path))
    run.log_artifact(artifact)
