"""The engine's invariants: cutting and packing change nothing but the order of additions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mathverify.base import Base
from mathverify.config import LossKind, OptimizerKind, RunConfig, ScheduleKind
from mathverify.engine.evaluate import score
from mathverify.engine.model import PackedModel
from mathverify.engine.pack import Pack
from mathverify.engine.passes import TokenBudget
from mathverify.engine.trial import Trial, TrialState
from mathverify.errors import UserError

from .conftest import VERDICTS, Rows, llama, make_config, random_rows, train

Config = Callable[..., RunConfig]


def finals() -> list[torch.Tensor]:
    return [trial.adapter.flat.clone() for trial in train.trials]  # type: ignore[attr-defined]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("loss", list(LossKind))
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradients_are_the_same_however_a_step_is_cut(
    model: PackedModel, rows: Rows, config: Config, loss: LossKind, dropout: float
) -> None:
    grads = []
    for budget in (10**6, 60, 1):
        trial = Trial.start(config(loss=loss, dropout=dropout), rows, VERDICTS, model)  # type: ignore[arg-type]
        trial.adapter.flat.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
        pack = Pack(model, TokenBudget(budget))
        pack.add(trial)
        losses = pack._passes([trial], trial.segments(0))
        grads.append((losses[0], trial.adapter.grad.clone()))
    for loss_value, grad in grads[1:]:
        assert loss_value == pytest.approx(grads[0][0], rel=1e-6)
        assert relative(grad, grads[0][1]) < 1e-5


def test_packed_attention_equals_each_row_alone_in_plain_transformers(model: PackedModel, rows: Rows) -> None:
    from mathverify.engine.layout import PassLayout, Segment

    plain = llama()
    layout = PassLayout([Segment(rows.ids(i), True, None) for i in range(7)])
    with torch.no_grad():
        hidden = model.hidden(layout)
        for i, (start, end) in enumerate(zip(layout.offsets[:-1], layout.offsets[1:], strict=True)):
            ids = torch.from_numpy(layout.segments[i].ids.astype(np.int64))[None]
            assert torch.allclose(hidden[start:end], plain.model(ids).last_hidden_state[0], atol=1e-5)


def test_scores_equal_the_full_logits_of_plain_transformers(model: PackedModel, rows: Rows) -> None:
    plain = llama()
    packed = score(model, [None], rows, VERDICTS, TokenBudget(100))[0]  # type: ignore[arg-type]
    for i in range(len(rows)):
        with torch.no_grad():
            logits = plain(torch.from_numpy(rows.ids(i).astype(np.int64))[None]).logits[0, -1]
        assert packed[i] == pytest.approx(float(logits[5] - logits[6]), abs=1e-5)


def test_scores_do_not_depend_on_the_cutting(model: PackedModel, rows: Rows, config: Config) -> None:
    trial = Trial.start(config(), rows, VERDICTS, model)  # type: ignore[arg-type]
    trial.adapter.flat.data.normal_(0, 0.05)
    adapters = [None, trial.adapter]
    whole = score(model, adapters, rows, VERDICTS, TokenBudget(10**6))  # type: ignore[arg-type]
    singly = score(model, adapters, rows, VERDICTS, TokenBudget(1))  # type: ignore[arg-type]
    assert np.abs(whole - singly).max() < 1e-5
    assert np.abs(whole[0] - whole[1]).max() > 1e-3


TRIALS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 5),
        "rank": st.sampled_from([1, 2, 5, 16]),
        "alpha": st.sampled_from([2.0, 8.0, 16.0]),
        "dropout": st.sampled_from([0.0, 0.1, 0.5]),
        "rslora": st.booleans(),
        "target_modules": st.sampled_from([["q_proj"], ["q_proj", "v_proj"], ["down_proj", "o_proj", "k_proj"]]),
        "learning_rate": st.sampled_from([2e-4, 2e-3]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "max_grad_norm": st.sampled_from([None, 0.05]),
        "schedule": st.sampled_from(list(ScheduleKind)),
        "batch_size": st.integers(1, 4),
        "grad_accumulation": st.integers(1, 2),
        "max_steps": st.integers(2, 8),
        "loss": st.sampled_from(list(LossKind)),
    }
)


@settings(max_examples=12, deadline=None)
@given(st.lists(TRIALS, min_size=2, max_size=4), st.sampled_from([40, 200, 10**6]))
def test_a_trial_in_a_pack_ends_where_it_ends_alone(trials: list[dict[str, Any]], budget: int) -> None:
    model = PackedModel(Base(llama(), torch.device("cpu"), torch.float32, "random"))
    rows = random_rows(30)
    configs = [make_config(**trial) for trial in trials]
    together = train(model, rows, configs, budget)
    ends = finals()
    for config, curve, end in zip(configs, together, ends, strict=True):
        (alone,) = train(model, rows, [config])
        assert curve == pytest.approx(alone, rel=1e-5)
        assert relative(end, finals()[0]) < 1e-4


def test_a_pack_keeps_to_the_trial_alone_over_fifty_steps(model: PackedModel, rows: Rows, config: Config) -> None:
    configs = [
        config(seed=1, rank=4, max_steps=50, dropout=0.1, learning_rate=2e-3),
        config(seed=2, rank=16, batch_size=1, max_steps=50, max_grad_norm=0.1, learning_rate=2e-3),
        config(seed=3, rank=2, max_steps=20, learning_rate=2e-3),
    ]
    together = train(model, rows, configs, budget=150)
    for config_, curve in zip(configs, together, strict=True):
        (alone,) = train(model, rows, [config_])
        assert curve == pytest.approx(alone, rel=1e-5)


def test_training_learns_and_leaves_the_base_bitwise_unchanged(model: PackedModel, rows: Rows, config: Config) -> None:
    before = {name: value.clone() for name, value in model.base.model.state_dict().items()}
    (curve,) = train(model, rows, [config(max_steps=60, rank=8)])
    assert np.mean(curve[-10:]) < 0.6 * np.mean(curve[:5])
    after = model.base.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_same_seed_gives_the_same_bits(model: PackedModel, rows: Rows, config: Config) -> None:
    first = train(model, rows, [config(dropout=0.1)])
    end = finals()[0]
    assert train(model, rows, [config(dropout=0.1)]) == first
    assert torch.equal(finals()[0], end)


@pytest.mark.parametrize("kind", [OptimizerKind.adamw_8bit, OptimizerKind.paged_adamw_8bit])
def test_8_bit_adamw_follows_adamw(model: PackedModel, rows: Rows, config: Config, kind: OptimizerKind) -> None:
    (full,) = train(model, rows, [config(max_steps=30, rank=16)])
    full_end = finals()[0]
    (small,) = train(model, rows, [_with_optimizer(config(max_steps=30, rank=16), kind)])
    state = next(iter(train.trials[0].optimizer.state.values()))  # type: ignore[attr-defined]
    assert state["state1"].dtype == torch.uint8
    assert small[-1] == pytest.approx(full[-1], abs=0.1)
    assert relative(finals()[0], full_end) < 0.3


def _with_optimizer(config: RunConfig, kind: OptimizerKind) -> RunConfig:
    config.optimizer.kind = kind
    return config


def test_a_diverging_trial_leaves_and_the_others_do_not_notice(model: PackedModel, rows: Rows, config: Config) -> None:
    good = config(seed=1)
    (alone,) = train(model, rows, [good])
    alone_end = finals()[0]
    bad = config(seed=2, learning_rate=1e30, max_grad_norm=None)
    together, _ = train(model, rows, [good, bad])
    fine, failed = train.trials  # type: ignore[attr-defined]
    assert failed.state is TrialState.failed
    assert "at step" in failed.reason
    assert fine.state is TrialState.finished
    assert together == pytest.approx(alone, rel=1e-5)
    assert relative(finals()[0], alone_end) < 1e-5


def test_an_out_of_memory_halves_the_budget_and_changes_nothing_else(
    model: PackedModel, rows: Rows, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    (calm,) = train(model, rows, [config(dropout=0.2)])
    end = finals()[0]
    real = PackedModel.hidden
    seen: list[int] = []

    def crowded(self: PackedModel, layout: object, last_only: bool = False) -> torch.Tensor:
        seen.append(layout.tokens)  # type: ignore[attr-defined]
        if layout.tokens > 50:  # type: ignore[attr-defined]
            raise torch.OutOfMemoryError("injected")
        return real(self, layout, last_only)  # type: ignore[arg-type]

    monkeypatch.setattr(PackedModel, "hidden", crowded)
    (pressed,) = train(model, rows, [config(dropout=0.2)], budget=200)
    assert max(seen) > 50
    assert seen[-1] <= 50
    assert pressed == pytest.approx(calm, rel=1e-5)
    assert relative(finals()[0], end) < 1e-5


def test_a_segment_that_cannot_fit_is_said_in_one_line(
    model: PackedModel, rows: Rows, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: PackedModel, layout: object, last_only: bool = False) -> torch.Tensor:
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(PackedModel, "hidden", full)
    with pytest.raises(UserError, match=r"out of memory.*memory=lean"):
        train(model, rows, [config()])


def test_a_process_without_segments_says_in_one_line_that_memory_ran_out() -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("injected")

    with pytest.raises(UserError, match="out of memory"):
        TokenBudget(100).until_it_fits([], full)


@pytest.mark.parametrize("times", [1, 99])
def test_no_memory_for_the_adapters_of_an_evaluation_halves_the_budget_or_is_one_line(
    model: PackedModel, rows: Rows, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    calm = score(model, [None], rows, VERDICTS, TokenBudget(200))  # type: ignore[arg-type]
    real = PackedModel.ready
    failed = 0

    def crowded(self: PackedModel, adapters: Sequence[object]) -> object:
        nonlocal failed
        failed += 1
        if failed <= times:
            raise torch.OutOfMemoryError("injected")
        return real(self, adapters)  # type: ignore[arg-type]

    monkeypatch.setattr(PackedModel, "ready", crowded)
    budget = TokenBudget(200)
    if times == 1:
        assert np.allclose(score(model, [None], rows, VERDICTS, budget), calm, atol=1e-5)  # type: ignore[arg-type]
        assert budget.tokens == 100
    else:
        with pytest.raises(UserError, match=r"out of memory.*memory=lean"):
            score(model, [None], rows, VERDICTS, budget)  # type: ignore[arg-type]


def test_recomputed_activations_give_the_same_losses(model: PackedModel, rows: Rows, config: Config) -> None:
    (kept,) = train(model, rows, [config(dropout=0.2)])
    model.recompute_activations(True)
    (recomputed,) = train(model, rows, [config(dropout=0.2)])
    assert recomputed == pytest.approx(kept, rel=1e-6)


def test_float16_overflow_lowers_the_loss_scale_instead_of_failing(
    model: PackedModel, rows: Rows, config: Config
) -> None:
    trial = Trial.start(config(), rows, VERDICTS, model)  # type: ignore[arg-type]
    trial.loss_scale = 2.0**10
    trial.adapter.grad.fill_(math.inf)
    assert trial.update(0.7, 10) is None
    assert trial.state is TrialState.running
    assert trial.loss_scale == 2.0**9
    assert trial.step == 0
