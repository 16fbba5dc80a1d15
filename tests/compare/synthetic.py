"""Sweep folders made up through the real records: for pages of many runs without training any. Not measurements."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mathverify.entry import compose
from mathverify.examples.arithmetic import generate
from mathverify.records import Costs, Predictions, RunMetrics, RunRecord, Status, write_predictions, write_record
from mathverify.scoring import evaluate, measure

TEST_ROWS = 400
SHAPES = [
    (rank, alpha, batch, rate)
    for rank, alpha, batch, rate in itertools.product((4, 8, 16, 32, 64), (16, 32, 64), (2, 4, 8), (2e-4, 1e-3))
]


@cache
def rows(test_rows: int = TEST_ROWS) -> pa.Table:
    """Real generated rows, as a run with these settings would have been tested on."""
    return generate(200, 64, test_rows, 0).test


def sweep(
    folder: Path,
    runs: int,
    *,
    seeds: int = 2,
    states: Sequence[Status] = (Status.completed,),
    test_rows: int = TEST_ROWS,
    table: pa.Table | None = None,
    rename: Callable[[int], str] | None = None,
) -> Path:
    """`runs` run folders under `folder`; shapes spread over ranks, alphas, batch sizes and rates, `seeds` each."""
    spread = np.linspace(0, len(SHAPES) - 1, -(-runs // seeds)).round().astype(int)
    picks = [(SHAPES[shape], seed) for shape in spread for seed in range(1, seeds + 1)]
    for number, (shape, seed) in enumerate(picks[:runs]):
        state = states[number % len(states)]
        name = rename(number) if rename else str(number)
        run(folder / name, shape, seed, number=number, state=state, table=table, test_rows=test_rows)
    return folder


def run(
    folder: Path,
    shape: tuple[int, int, int, float],
    seed: int,
    *,
    number: int = 0,
    state: Status = Status.completed,
    table: pa.Table | None = None,
    test_rows: int = TEST_ROWS,
) -> None:
    """One run folder whose accuracy rises with rank and falls a little with batch size, with noise of its seed."""
    rank, alpha, batch, rate = shape
    table = rows(test_rows) if table is None else table
    config = compose(
        [f"lora.rank={rank}", f"lora.alpha={alpha}", f"train.batch_size={batch}", f"optimizer.learning_rate={rate}",
         f"seed={seed}", "train.max_steps=200", "data.train_rows=200", "data.validation_rows=64",
         f"data.test_rows={table.num_rows}", "tracking=none", "data.cache_dir=null"]
    )  # fmt: skip
    folder.mkdir(parents=True)
    random = np.random.default_rng([seed, rank, int(alpha), batch, int(rate * 1e6)])
    quality = 0.8 + 0.45 * np.log2(rank / 4) - 0.12 * np.log2(batch / 2) + 0.2 * (rate > 5e-4) + random.normal(0, 0.15)
    labels = table.column("is_correct").to_numpy(zero_copy_only=False)
    hardness = np.random.default_rng(7).normal(0, 1.1, len(labels))
    scores = np.where(labels, 1, -1) * (quality - hardness) + random.normal(0, 0.8, len(labels))
    groups, slices = table.column("group").to_pylist(), table.column("slice").to_pylist()
    steps = 200 if state is Status.completed else 80
    _curves(folder / "metrics.jsonl", steps, quality, batch, random, diverges=state is Status.failed)

    record = RunRecord.begin(config)
    record.status, record.device, record.test_fingerprint = state, "cpu", f"made-up-{table.num_rows}"
    record.started = f"2026-11-24T{10 + number // 60 % 14:02d}:{number % 60:02d}:00+00:00"
    record.finished = None if state is Status.running else record.started
    record.reason = {
        Status.failed: "the loss was not finite at step 80: lower optimizer.learning_rate",
        Status.pruned: "worse than the median at step 80",
        Status.interrupted: "stopped by a signal",
    }.get(state)
    seconds = steps * batch * (0.03 + rank * 3e-4) * random.uniform(0.9, 1.1)
    record.costs = Costs(
        seconds={"prepare": 3.0, "train": round(seconds, 2), "evaluate": 4.0},
        tokens=steps * batch * 4 * 90,
        tokens_per_second=steps * batch * 4 * 90 / seconds,
        peak_memory_bytes=int(6e8 + rank * 2e6 + batch * 4e7),
        optimizer_steps=steps,
        examples_seen=steps * batch * 4,
        trainable_parameters=rank * 12_000,
    )
    if state is Status.completed:
        found = evaluate(scores, labels, groups, slices, tuned_threshold=0.1, resamples=100)
        record.metrics = RunMetrics(found.overall, found.tuned, 0.1, found.slices)
        few = slice(0, 200)
        noisy = scores[few] + random.normal(0, 0.6, len(scores[few]))
        record.metrics.validation = measure(noisy, labels[few], groups[few], resamples=100)
        record.metrics.zero_shot = measure(random.normal(0, 1, len(labels)), labels, groups, resamples=100)
        ids = table.column("id").to_pylist()
        write_predictions(folder / "predictions.parquet", Predictions(ids, groups, slices, labels, scores))
    write_record(folder, record)


def _curves(path: Path, steps: int, quality: float, batch: int, random: np.random.Generator, *, diverges: bool) -> None:
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = 0.72 * np.exp(-step * quality / 150) + 0.05 + abs(random.normal(0, 0.05))
        broken = diverges and step == steps
        values = {"train/loss": None if broken else float(loss), "train/examples": step * batch * 4}
        lines.append({"step": step, "time": 1e9 + step, **values})
        if step % 20 == 0 and not broken:
            accuracy = float(np.clip(0.5 + 0.45 * (1 - np.exp(-step * quality / 80)) + random.normal(0, 0.01), 0, 1))
            bounds = {"_low": max(0.0, accuracy - 0.04), "_high": min(1.0, accuracy + 0.03), "": accuracy}
            lines.append(
                {"step": step, "time": 1e9 + step, **{f"validation/accuracy{k}": v for k, v in bounds.items()}}
            )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
