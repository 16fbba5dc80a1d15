"""What a pack's runs share is made once, and planned for all of them; what is wrong with one is left to that one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mathverify import prepare as prepared
from mathverify.config import RunConfig
from mathverify.engine.budget import BudgetPlan
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


@pytest.mark.parametrize("processes", [1, 2])
def test_memory_is_planned_for_the_rows_that_are_trained_on_and_for_what_one_process_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """The longest row is the longest of all splits, and every segment has a verdict behind its prompt."""
    seen: list[tuple[Any, ...]] = []

    def plan(*arguments: Any) -> BudgetPlan:
        seen.append(arguments)
        return BudgetPlan(1234, "planned", held=56)

    monkeypatch.setattr(prepared, "plan_budget", plan)
    if processes > 1:
        for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))
    config, beside = (compose([*SMALL, f"data.cache_dir='{tmp_path}'", f"seed={seed}"]) for seed in (0, 1))
    bench = prepared.prepare(config, beside=[beside])
    ((model, configs, lengths, shared),) = seen
    trained = bench.stores["train"].lengths
    assert (model, configs, shared) == (bench.model, [config, beside], processes)
    assert lengths.longest == 1 + max(store.lengths.max() for store in bench.stores.values())
    assert (lengths.mean, lengths.spread) == (pytest.approx(trained.mean() + 1), pytest.approx(trained.std()))
    assert (bench.budget.tokens, bench.budget.held, bench.budget.text) == (1234, 56, "planned")
