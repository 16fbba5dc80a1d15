"""Killed with -9 at any moment and continued, everything ends as if nothing had happened; a SIGTERM ends it in peace.

`python -m tests.faults.kills --times 100` does the first a hundred times.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from mathverify.records import Status, read_record

from .commands import OUT, Forked
from .kills import PACK, RUN, SWEEP, Scenario, finish, kill_often, scenarios, whole


@pytest.mark.long
def test_a_dozen_kills_at_random_moments_lose_repeat_and_tear_nothing() -> None:
    tally = kill_often(12, seed=7, chosen=scenarios(), say=lambda line: None)
    assert tally.kills == 12
    assert tally.ends >= 3
    assert len(tally.by_moment) > 3


@pytest.mark.slow
@pytest.mark.parametrize("scenario", [RUN, SWEEP, PACK], ids=lambda s: s.name)
def test_a_sigterm_in_a_step_ends_within_20_seconds_with_a_checkpoint(scenario: Scenario, tmp_path: Path) -> None:
    long = ["train.max_steps=4000", "train.eval_every=null", "train.checkpoint_every=null"]
    place = tmp_path / "place"
    place.mkdir()
    command = Forked([*scenario.arguments, *long, f"data.cache_dir='{tmp_path}/cache'"], place)
    deadline = time.monotonic() + 120
    while not any(file.read_text().count("train/loss") > 5 for file in place.glob(f"{scenario.runs}/metrics.jsonl")):
        assert command.ended(0.05) is None, (place / OUT).read_text()
        assert time.monotonic() < deadline
    command.signal(signal.SIGTERM)
    assert command.ended(20) == 130, (place / OUT).read_text()
    whole(scenario, place)
    folders = list(place.glob(scenario.runs))
    assert folders
    for folder in folders:
        assert read_record(folder).status is Status.interrupted
        assert len(list((folder / "checkpoint").iterdir())) == 1
    assert "ontinue with: python " in (place / OUT).read_text()


def test_what_must_not_happen_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself: with files written in place instead of renamed, a kill is noticed."""
    place = tmp_path / "place"
    place.mkdir()
    finish(RUN, place, Forked)
    whole(RUN, place)
    for name in ("result.json", "predictions.parquet", "metrics.jsonl", "adapter/adapter_model.safetensors"):
        file = place / "run" / name
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(Exception, match=r".+"):
            whole(RUN, place)
        file.write_bytes(content)
