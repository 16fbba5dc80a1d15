"""Numbers that are not finite: the trial ends failed with step and cause, and the others of its pack do not notice, bitwise.

What holds exactly: a trial that fails leaves after the round in which it failed, and up to then and from then on the others
compute, to the bit, what they compute beside a trial that leaves at the same step for any other reason. (A pack that keeps
all its trials adds in another order, so there it is a tolerance: tests/engine/test_pack.py.)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mathverify.config import LossKind
from mathverify.engine.model import PackedModel
from mathverify.engine.pack import Pack
from mathverify.engine.passes import TokenBudget
from mathverify.engine.trial import Trial, TrialState
from mathverify.records import Status, read_record
from tests.engine.conftest import VERDICTS, Rows, config, make_config, model, random_rows, rows

from .conftest import TINY, Command

__all__ = ["config", "model", "rows"]  # fixtures

FAILS_AT = 3
Spoil = Callable[[Trial], None]


def _nan_weights(trial: Trial) -> None:
    trial.adapter.flat.data[::7] = torch.nan


def _infinite_weights(trial: Trial) -> None:
    trial.adapter.flat.data[::7] = torch.inf


def _huge_weights(trial: Trial) -> None:
    """Finite, but their products are not."""
    trial.adapter.flat.data.fill_(1e30)


def _pack(
    model: PackedModel, rows: Rows, loss: LossKind, spoil: Spoil | None, budget: int
) -> tuple[list[Trial], list[list[float]]]:
    """Three trials; the middle one is spoilt before step FAILS_AT, or (without `spoil`) leaves in that round unspoilt."""
    settings = [dict(rank=4), dict(rank=8, batch_size=2), dict(rank=2, dropout=0.1)]  # noqa: C408
    configs = [make_config(seed, max_steps=6, loss=loss, **s) for seed, s in enumerate(settings)]  # type: ignore[arg-type]
    trials = [Trial.start(c, rows, VERDICTS, model) for c in configs]  # type: ignore[arg-type]
    pack = Pack(model, TokenBudget(budget))
    for trial in trials:
        pack.add(trial)
    curves: list[list[float]] = [[] for _ in trials]
    for step in range(1, 7):
        if step == FAILS_AT and spoil is not None:
            spoil(trials[1])
        for trial, report in pack.step():
            curves[trials.index(trial)].append(report.loss)
        if step == FAILS_AT and spoil is None:
            trials[1].state = TrialState.stopped
    return trials, curves


@pytest.mark.parametrize("budget", [10**6, 60], ids=["one pass", "many passes"])
@pytest.mark.parametrize("loss", list(LossKind))
@pytest.mark.parametrize("spoil", [_nan_weights, _infinite_weights, _huge_weights])
def test_a_trial_with_numbers_that_are_not_finite_leaves_and_the_others_keep_every_bit(
    model: PackedModel, rows: Rows, loss: LossKind, spoil: Spoil, budget: int
) -> None:
    calm, calm_curves = _pack(model, rows, loss, None, budget)
    trials, curves = _pack(model, rows, loss, spoil, budget)
    assert trials[1].state is TrialState.failed
    assert trials[1].reason is not None
    assert f"at step {FAILS_AT}" in trials[1].reason
    assert "nan" in trials[1].reason or "inf" in trials[1].reason
    for place in (0, 2):
        assert trials[place].state is TrialState.finished
        assert curves[place] == calm_curves[place]
        assert torch.equal(trials[place].adapter.flat, calm[place].adapter.flat)


@pytest.mark.parametrize(("loss", "grad"), [(torch.nan, 0.0), (torch.inf, 0.0), (0.5, torch.nan), (0.5, -torch.inf)])
def test_a_loss_or_gradient_that_is_not_finite_changes_no_weight(
    model: PackedModel, rows: Rows, loss: float, grad: float
) -> None:
    trial = Trial.start(make_config(), rows, VERDICTS, model)  # type: ignore[arg-type]
    before = trial.adapter.flat.clone()
    trial.adapter.grad[5] = grad
    assert trial.update(loss, 10) is None
    assert trial.state is TrialState.failed
    assert trial.reason is not None
    assert "at step 1" in trial.reason
    assert ("loss is" if grad == 0.0 else "gradient norm is") in trial.reason
    assert torch.equal(trial.adapter.flat, before)


def test_a_learning_rate_of_a_million_fails_with_step_and_cause(command: Command, tmp_path: Path) -> None:
    ended = command(*TINY, "lora=r4", "optimizer.learning_rate=1e6", "train.max_steps=30", "hydra.run.dir=run")
    assert ended.code == 1, ended
    record = read_record(tmp_path / "run")
    assert record.status is Status.failed
    assert record.reason is not None
    assert "at step" in record.reason
    assert ended.err.strip() == f"error: {record.reason}"
    json.loads((tmp_path / "run" / "result.json").read_text(), parse_constant=pytest.fail)  # no NaN in it


@pytest.mark.parametrize("key", ["adapter", "exp_avg", "exp_avg_sq"])
def test_a_checkpoint_with_numbers_that_are_not_finite_is_refused(key: str, command: Command, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    run = [*TINY, "lora=r4", "train.checkpoint_every=2", "hydra.run.dir=run"]
    assert command(*run).code == 0
    folder = tmp_path / "run"
    plain = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(plain | {"status": "interrupted"}))
    for file in (folder / "checkpoint").iterdir():
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
        tensors[key][3] = torch.nan
        save_file(tensors, file, metadata)
    ended = command(*run)
    assert ended.code == 2, ended
    assert len(ended.err.strip().splitlines()) == 1
    for part in ("checkpoint/step-", "not finite", "remove the file"):
        assert part in ended.err


def test_nan_among_rows_of_other_trials_does_not_reach_scores(model: PackedModel) -> None:
    """Evaluation shares passes between adapters, too."""
    from mathverify.engine.evaluate import score

    rows: Any = random_rows(30)
    trials = [Trial.start(make_config(seed), rows, VERDICTS, model) for seed in (0, 1)]  # type: ignore[arg-type]
    for trial in trials:
        trial.adapter.flat.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    adapters = [trials[0].adapter, trials[1].adapter, None]
    calm = score(model, adapters, rows, VERDICTS, TokenBudget(10**6))  # type: ignore[arg-type]
    trials[1].adapter.flat.data.fill_(torch.nan)
    spoilt = score(model, adapters, rows, VERDICTS, TokenBudget(10**6))  # type: ignore[arg-type]
    assert (spoilt[[0, 2]] == calm[[0, 2]]).all()
