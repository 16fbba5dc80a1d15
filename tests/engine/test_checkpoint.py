"""A run that was cut off and continued ends bitwise where it would have ended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mathverify.config import OptimizerKind, RunConfig
from mathverify.engine.checkpoint import KEPT, load_checkpoint, save_checkpoint
from mathverify.engine.model import PackedModel
from mathverify.engine.pack import Pack
from mathverify.engine.passes import TokenBudget
from mathverify.engine.trial import Trial, TrialState
from mathverify.errors import UserError

from .conftest import VERDICTS, Rows

Config = Callable[..., RunConfig]


def start(model: PackedModel, rows: Rows, config: RunConfig) -> Trial:
    return Trial.start(config, rows, VERDICTS, model)  # type: ignore[arg-type]


def steps(model: PackedModel, trial: Trial, count: int) -> None:
    pack = Pack(model, TokenBudget(10**6))
    pack.add(trial)
    for _ in range(count):
        pack.step()


@pytest.mark.parametrize("kind", list(OptimizerKind))
def test_a_resumed_trial_ends_bitwise_where_the_uninterrupted_one_does(
    model: PackedModel, rows: Rows, config: Config, kind: OptimizerKind, tmp_path: Path
) -> None:
    settings = config(max_steps=8, dropout=0.1, rank=16)
    settings.optimizer.kind = kind
    whole = start(model, rows, settings)
    steps(model, whole, 8)
    first = start(model, rows, settings)
    steps(model, first, 3)
    save_checkpoint(first, tmp_path, "me", {"seconds": 1.5})
    second = start(model, rows, settings)
    assert load_checkpoint(second, tmp_path, "me") == {"seconds": 1.5}
    assert (second.step, second.examples, second.tokens) == (3, first.examples, first.tokens)
    steps(model, second, 5)
    assert second.state is TrialState.finished
    assert torch.equal(second.adapter.flat, whole.adapter.flat)


def test_a_torn_checkpoint_is_passed_over_for_the_previous_one(
    model: PackedModel, rows: Rows, config: Config, tmp_path: Path
) -> None:
    trial = start(model, rows, config())
    for _ in range(KEPT + 1):
        steps(model, trial, 1)
        newest = save_checkpoint(trial, tmp_path, "me", {})
    assert len(list(tmp_path.iterdir())) == KEPT
    newest.write_bytes(newest.read_bytes()[:-100])
    again = start(model, rows, config())
    load_checkpoint(again, tmp_path, "me")
    assert again.step == trial.step - 1


def test_another_runs_checkpoint_is_refused(model: PackedModel, rows: Rows, config: Config, tmp_path: Path) -> None:
    save_checkpoint(start(model, rows, config()), tmp_path, "me", {})
    with pytest.raises(UserError, match="another run"):
        load_checkpoint(start(model, rows, config()), tmp_path, "you")


def test_a_checkpoint_with_nan_is_refused(model: PackedModel, rows: Rows, config: Config, tmp_path: Path) -> None:
    trial = start(model, rows, config())
    trial.adapter.flat.data[7] = torch.nan
    save_checkpoint(trial, tmp_path, "me", {})
    with pytest.raises(UserError, match="not finite"):
        load_checkpoint(start(model, rows, config()), tmp_path, "me")


def test_no_checkpoint_is_no_error(model: PackedModel, rows: Rows, config: Config, tmp_path: Path) -> None:
    assert load_checkpoint(start(model, rows, config()), tmp_path / "none", "me") is None
