"""Run folders as real runs leave them, made in milliseconds: shared by the tests of tables, statistics and report."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mathverify import scoring
from mathverify.config import LoraConfig, RunConfig, TrackingConfig, TrackingKind, TrainConfig
from mathverify.records import PREDICTIONS, Costs, Predictions, RunRecord, Status, write_predictions, write_record

Floats = np.ndarray


@dataclass
class TestRows:
    """A labelled test set that runs share. questions < rows: some questions have several rows."""

    __test__ = False

    rows: int = 200
    questions: int = 200
    seed: int = 0
    slices: Sequence[str | None] = ("sums", "clocks")
    labels: np.ndarray = field(init=False)
    groups: list[str] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.labels = rng.random(self.rows) < 0.5
        codes = np.arange(self.rows) if self.questions == self.rows else rng.integers(0, self.questions, self.rows)
        self.groups = [f"test-q{code}" for code in codes]

    def scores(self, right: Floats, sharpness: float = 2.0) -> Floats:
        """Log-odds that are right exactly where `right` is true."""
        rng = np.random.default_rng([self.seed, 1])
        size = 0.1 + sharpness * rng.random(self.rows)
        scores: Floats = np.where(self.labels == right, size, -size)
        return scores

    def predictions(self, scores: Floats) -> Predictions:
        slices = [self.slices[i % len(self.slices)] for i in range(self.rows)]
        return Predictions([f"test-{i}" for i in range(self.rows)], self.groups, slices, self.labels, scores)


def config_of(rank: int = 16, seed: int = 0, batch: int = 4, steps: int = 100, **parts: Any) -> RunConfig:
    config = RunConfig(
        lora=LoraConfig(rank=rank, alpha=float(rank)),
        train=TrainConfig(batch_size=batch, max_steps=steps),
        tracking=TrackingConfig(kind=TrackingKind.none),
        seed=seed,
    )
    return replace(config, **parts)


Make = Callable[..., Path]


def make_run(
    folder: Path,
    config: RunConfig | None = None,
    rows: TestRows | None = None,
    *,
    accuracy: float = 0.8,
    right: Floats | None = None,
    validation: float | None = None,
    status: Status = Status.completed,
    reason: str | None = None,
    started: int = 0,
    curve_points: int = 10,
    resamples: int = 100,
    with_predictions: bool = True,
    metrics: scoring.Evaluation | None = None,
) -> Path:
    """Write a run folder; returns it.

    accuracy: chance of each row to be right, unless `right` (bool [rows]) says which are. validation: accuracy there,
    the test's unless given. started: seconds after the first run. metrics: to spare computing them for many runs.
    """
    config, rows = config or config_of(), rows or TestRows()
    if right is None:
        rng = np.random.default_rng([config.seed, config.lora.rank, config.train.batch_size, 7])
        right = rng.random(rows.rows) < accuracy
    scores = rows.scores(np.asarray(right, dtype=bool))
    predictions = rows.predictions(scores)
    record = RunRecord.begin(config)
    record.status, record.reason, record.device = status, reason, "cpu"
    begun = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=started)
    record.started = begun.isoformat(timespec="seconds")
    record.data_fingerprint = "d" * 32
    record.test_fingerprint = f"{rows.seed}-{rows.rows}-{rows.questions}"
    record.base_fingerprint = "b" * 16
    steps, examples = config.train.steps, config.train.steps * config.train.examples_per_step
    record.costs = Costs(
        seconds={"prepare": 1.0, "train": 0.1 * steps, "evaluate": 2.0},
        tokens=examples * 20,
        tokens_per_second=examples * 20 / (0.1 * steps),
        peak_memory_bytes=2**30 + config.lora.rank * 2**20,
        optimizer_steps=steps,
        examples_seen=examples,
        trainable_parameters=config.lora.rank * 15360,
    )
    if status in (Status.completed, Status.pruned):
        found = metrics or scoring.evaluate(
            scores, rows.labels, rows.groups, predictions.slices, tuned_threshold=0.05, resamples=resamples
        )
        aimed = found.overall.accuracy.value if validation is None else validation
        assert aimed is not None
        low, high = scoring.wilson(aimed * 500, 500)
        record.metrics.validation = replace(
            found.overall, rows=500, questions=500, accuracy=scoring.Interval(aimed, low, high, "Wilson")
        )
        if status is Status.completed:
            record.finished = (begun + timedelta(seconds=30)).isoformat(timespec="seconds")
            record.metrics.test, record.metrics.slices, record.metrics.tuned = found.overall, found.slices, found.tuned
            record.metrics.threshold = 0.05
    folder.mkdir(parents=True, exist_ok=True)
    write_record(folder, record)
    if status is Status.completed and with_predictions:
        write_predictions(folder / PREDICTIONS, predictions)
    _write_curve(folder, steps, curve_points)
    return folder


def _write_curve(folder: Path, steps: int, points: int) -> None:
    lines = []
    for step in sorted({int(x) for x in np.linspace(1, steps, points)}):
        values: dict[str, float] = {"train/loss": 0.69 * 0.99**step, "train/learning_rate": 1e-4}
        if step % 2 == 0:
            values["validation/accuracy"] = 0.5 + 0.3 * step / steps
        lines.append(json.dumps({"step": step, "time": 1.7e9 + step, **values}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make_run` with folders named below tmp_path."""

    def made(name: str, *arguments: Any, **named: Any) -> Path:
        return make_run(tmp_path / name, *arguments, **named)

    return made
