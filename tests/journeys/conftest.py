"""What the journeys share: the smallest honest run on the embedded default."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mathverify.entry import compose
from mathverify.records import RunRecord, read_record

SMALL = [
    "model=tiny",
    "data=arithmetic",
    "data.train_rows=96",
    "data.validation_rows=48",
    "data.test_rows=64",
    "train.batch_size=4",
    "train.grad_accumulation=2",
    "train.max_steps=4",
    "train.max_examples=null",
    "train.eval_every=2",
    "train.checkpoint_every=null",
    "optimizer.warmup_steps=1",
    "evaluate.resamples=100",
    "tracking=none",
]


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., RunRecord]:
    """Do a small run in a folder (tmp_path/run unless named) with further overrides; its record."""
    from mathverify.train import train_one

    def run(*overrides: str, folder: str = "run") -> RunRecord:
        train_one(compose([*SMALL, f"data.cache_dir='{tmp_path}/cache'", *overrides]), tmp_path / folder)
        return read_record(tmp_path / folder)

    return run
