"""What a pack's runs share is made once, and planned for all of them; what is wrong with one is left to that one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mathverify import prepare as prepared
from mathverify.config import RunConfig
from mathverify.entry import compose
from tests.journeys.conftest import SMALL

SHAPES = {"layers.0.q_proj": (64, 64), "layers.0.v_proj": (64, 32)}
MODEL: Any = SimpleNamespace(host=SimpleNamespace(shapes=SHAPES))


def with_targets(*modules: str, **train: Any) -> RunConfig:
    config = RunConfig()
    config.lora.target_modules = list(modules)
    config.lora.rank = 4
    for name, value in train.items():
        setattr(config.train, name, value)
    return config


def test_a_run_whose_targets_the_base_lacks_is_left_out_of_the_planning() -> None:
    good, bad = with_targets("q_proj"), with_targets("nothing")
    assert prepared._possible(MODEL, [bad, good, good]) == [good, good]
    assert prepared._possible(MODEL, [bad]) == [bad]  # whose error the planner then raises


def test_rows_are_read_again_when_their_file_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet as pq

    from mathverify.examples.arithmetic import generate

    monkeypatch.setattr(prepared, "_warm", type(prepared._warm)())
    file = tmp_path / "train.parquet"
    columns = ["question", "answer", "solution", "is_correct"]
    small = [word for word in SMALL if not word.startswith("data")]
    config = compose(
        [*small, "data=table", f"data.train='{file}'", f"data.cache_dir='{tmp_path}'", "data.test_fraction=0.2",
         "data.validation_fraction=0.2"]
    )  # fmt: skip
    pq.write_table(generate(300, 2, 2, 0).train.select(columns), file)
    first = prepared.prepare(config)
    assert prepared.prepare(config).stores is first.stores
    pq.write_table(generate(280, 2, 2, 1).train.select(columns), file)
    second = prepared.prepare(config)
    assert second.data_fingerprint != first.data_fingerprint
