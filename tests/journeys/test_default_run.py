"""The embedded default keeps what the README says of it: it learns to verify, from a base at chance, and rank matters."""

from __future__ import annotations

from pathlib import Path

import pytest

from mathverify.entry import compose
from mathverify.records import RunMetrics, read_record
from mathverify.train import train_one


def default_run(tmp_path: Path, *overrides: str) -> RunMetrics:
    train_one(compose([*overrides, "tracking=none", f"data.cache_dir='{tmp_path}/cache'"]), tmp_path / "run")
    return read_record(tmp_path / "run").metrics


@pytest.mark.slow
def test_the_default_run_verifies_from_a_base_at_chance(tmp_path: Path) -> None:
    metrics = default_run(tmp_path, "lora=r64")
    assert metrics.test is not None
    assert metrics.zero_shot is not None
    assert metrics.test.accuracy.value is not None
    assert metrics.test.accuracy.value >= 0.85
    assert metrics.test.accuracy.low is not None
    assert metrics.test.accuracy.low > 0.80
    assert metrics.zero_shot.accuracy.value == pytest.approx(0.5, abs=0.05)


@pytest.mark.long
def test_rank_4_learns_visibly_less_in_the_same_steps(tmp_path: Path) -> None:
    metrics = default_run(tmp_path, "lora=r4")
    assert metrics.test is not None
    assert metrics.test.accuracy.high is not None
    assert metrics.test.accuracy.high < 0.85
