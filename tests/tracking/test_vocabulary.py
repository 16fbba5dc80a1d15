"""What W&B is told fits its tables and panels: flat names, plain numbers, each setting once, and no secrets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mathverify import scoring
from mathverify.config import (
    ColumnsConfig,
    DataConfig,
    DataSource,
    LoraConfig,
    QuantizationConfig,
    QuantizationKind,
    RunConfig,
    TrackingConfig,
    TrainConfig,
    to_plain,
)
from mathverify.records import RunRecord, Status
from mathverify.tracking.vocabulary import final_numbers, flat_config, flat_name, run_name

FULL = replace(
    RunConfig(),
    data=DataConfig(
        source=DataSource.table,
        train="rows.parquet",
        train_rows=5,
        columns=ColumnsConfig(answer="reply"),
        cache_dir="/c",
    ),
    train=TrainConfig(max_examples=100, eval_every=2, checkpoint_every=2, token_budget=512, threads=1),
)


def test_settings_are_numbers_flags_and_text_under_flat_names() -> None:
    config = replace(FULL, lora=LoraConfig(rank=16, alpha=32, rslora=True), seed=7)
    config.quantization = QuantizationConfig(QuantizationKind.nf4)
    flat = flat_config(config)
    assert all(key.replace("_", "").isalnum() for key in flat), "dots and spaces break W&B's filters"
    assert all(isinstance(value, int | float | str | bool) for value in flat.values())
    assert flat.items() >= {
        "rank": 16, "alpha": 32, "scale": 8.0, "rslora": True, "batch_size": 4, "grad_accumulation": 4,
        "examples_per_step": 16, "steps": 7, "max_examples": 100, "learning_rate": 2e-4, "optimizer": "adamw",
        "quantization": "nf4", "seed": 7, "data_seed": 0, "data_source": "table", "data_train": "rows.parquet",
        "data_columns_answer": "reply", "model_name": "tiny", "with_solution": False, "loss": "label",
    }.items()  # fmt: skip
    assert not {"tracking", "device", "data_cache_dir", "max_steps"} & set(flat)


def test_no_two_settings_share_a_name() -> None:
    def leaves(tree: dict[str, object], above: str = "") -> list[str]:
        found: list[str] = []
        for key, value in tree.items():
            found += leaves(value, f"{above}{key}.") if isinstance(value, dict) else [f"{above}{key}"]
        return found

    keys = [key for key in leaves(to_plain(FULL)) if not key.startswith("tracking.")]
    names = [flat_name(key) for key in keys]
    assert sorted(set(names)) == sorted(names)
    assert not {"scale", "examples_per_step", "steps", "study", "trial", "sampler"} & set(names)


@pytest.mark.parametrize(
    ("key", "name"),
    [("lora.rank", "rank"), ("lora", "lora"), ("seed", "seed"), ("data.seed", "data_seed"),
     ("quantization.kind", "quantization"), ("+data.columns.answer", "data_columns_answer")],
)  # fmt: skip
def test_a_searched_key_goes_by_the_name_of_its_setting(key: str, name: str) -> None:
    assert flat_name(key) == name


def test_only_a_trial_says_which_it_is() -> None:
    assert not {"study", "trial", "sampler"} & set(flat_config(RunConfig()))
    assert run_name(RunConfig()) == "r64-a64-b4"
    trial = replace(RunConfig(), tracking=TrackingConfig(group="s", trial=0, sampler="TPESampler"))
    assert flat_config(trial).items() >= {"study": "s", "trial": 0, "sampler": "TPESampler"}.items()
    assert run_name(trial) == "r64-a64-b4 #0"


def test_a_secret_in_a_setting_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "planted-token-value")
    config = replace(FULL, tracking=TrackingConfig(group="s", name="planted-token-value", trial=1))
    config.data.path = "postgresql://user:planted-password@host/data"
    told = f"{flat_config(config)} {run_name(config)}"
    assert "planted" not in told


def measured(shift: float) -> scoring.Metrics:
    labels = np.arange(40) % 2 == 0
    return scoring.measure(np.where(labels, 1.0, -1.0) + shift, labels, np.arange(40), resamples=100)


@pytest.mark.parametrize("status", [Status.completed, Status.pruned, Status.failed, Status.interrupted])
def test_the_number_that_selects_is_there_for_completed_runs_only(status: Status) -> None:
    record = RunRecord.begin(RunConfig())
    record.status, record.reason = status, "pruned at step 50" if status is Status.pruned else None
    record.metrics.validation = measured(0.0)
    record.costs.seconds = {"train": 2.0, "evaluate": 1.0}
    if status is Status.completed:
        record.metrics.test = record.metrics.slices["ages"] = measured(0.0)
    numbers = final_numbers(record)
    assert ("final_validation/accuracy" in numbers) == (status is Status.completed)
    assert numbers["seconds/all"] == 3.0
    assert numbers.get("reason") == record.reason
    if status is Status.completed:
        assert numbers.items() >= {"test/accuracy": 1.0, "test_slice/ages/accuracy": 1.0}.items()
        assert {"test/accuracy_low", "test/accuracy_high"} <= set(numbers)
        assert "test_slice/ages/brier" not in numbers, "hundreds of columns hide the few that matter"
