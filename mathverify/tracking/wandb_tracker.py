"""The tracker that mirrors a run to W&B, and the choice of a run's tracker."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mathverify.config import RunConfig, TrackingKind
from mathverify.records import Predictions, Status, redact
from mathverify.tracking.account import goes_online, is_disabled
from mathverify.tracking.local import Tracker, Value, finite
from mathverify.tracking.mirror import FINISH_SECONDS, START_SECONDS, Mirror, RunCard
from mathverify.tracking.vocabulary import DEFINITIONS, RUN_JOB, STEP, flat_config, run_name, run_tags


class WandbTracker(Tracker):
    """A Tracker that mirrors to W&B from a thread of its own: calls return at once, failures become one warning."""

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
        self._settings = config.tracking
        self._mirror = Mirror(
            run_card(config, job_type),
            run_dir,
            online=online,
            start_seconds=start_seconds,
            finish_seconds=finish_seconds,
        )
        self._mirror.send(_define_metrics)

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        super().log(step, values)
        self._mirror.send(lambda run: run.log({STEP: step, **finite(values)}, step=step))

    def summarize(self, values: Mapping[str, Value | str]) -> None:
        kept = {key: redact(value) for key, value in values.items()}
        self._mirror.send(lambda run: run.summary.update(kept))

    def predictions(self, predictions: Predictions) -> None:
        if rows := self._settings.table_rows:
            self._mirror.send(lambda run: run.log({"predictions": _table(predictions, rows)}))

    def adapter(self, path: Path) -> None:
        if self._settings.log_adapter:
            self._mirror.send(lambda run: _log_adapter(run, path))

    def finish(self, status: Status = Status.completed) -> None:
        super().finish(status)
        self._mirror.close(status)


def run_card(config: RunConfig, job_type: str) -> RunCard:
    """How a run is filed in W&B."""
    tracking = config.tracking
    return RunCard(
        project=tracking.project,
        entity=tracking.entity,
        group=None if tracking.group is None else str(redact(tracking.group)),
        name=run_name(config),
        job_type=job_type,
        tags=run_tags(config),
        config=flat_config(config),
    )


def open_tracker(
    config: RunConfig,
    run_dir: Path,
    *,
    resume_step: int | None = None,
    job_type: str = RUN_JOB,
    start_seconds: float = START_SECONDS,
    finish_seconds: float | None = None,
) -> Tracker:
    """The tracker that config.tracking asks for. Returns at once: W&B starts in the background.

    resume_step: the checkpoint's step; metrics.jsonl keeps lines up to it and drops later ones. None: a fresh start.
    finish_seconds: longest wait for uploads in `finish` (default 60; ten times that with an adapter to upload).
    Raises UserError when tracking.mode=online and no key is configured.
    """
    if config.tracking.kind is TrackingKind.none or is_disabled():
        return Tracker(run_dir, resume_step)
    if finish_seconds is None:
        finish_seconds = FINISH_SECONDS * (10 if config.tracking.log_adapter else 1)
    return WandbTracker(
        config,
        run_dir,
        resume_step,
        job_type=job_type,
        online=goes_online(config.tracking.mode),
        start_seconds=start_seconds,
        finish_seconds=finish_seconds,
    )


def check_tracking(config: RunConfig) -> None:
    """Raise, before anything is written, the UserError of `open_tracker`: tracking.mode=online without a key."""
    if config.tracking.kind is TrackingKind.wandb and not is_disabled():
        goes_online(config.tracking.mode)


def _define_metrics(run: Any) -> None:
    run.define_metric(STEP, hidden=True)
    for name, summary in DEFINITIONS:
        run.define_metric(name, step_metric=STEP, summary=summary)


def _table(predictions: Predictions, rows: int) -> Any:
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
