"""Who comes and goes in a pack is nobody else's business: late comers, early leavers, failures, shared evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mathverify.base import Base
from mathverify.config import LossKind, OptimizerKind, RunConfig
from mathverify.engine.evaluate import score
from mathverify.engine.layout import PassLayout
from mathverify.engine.loop import train
from mathverify.engine.model import PackedModel
from mathverify.engine.pack import Pack
from mathverify.engine.passes import TokenBudget
from mathverify.engine.trial import StepReport, Trial, TrialState

from .conftest import VERDICTS, Rows, llama, make_config, random_rows
from .test_pack import TRIALS, relative


class Crew:
    """A watcher that keeps every trial's losses and hands out a follower for each place that becomes free."""

    def __init__(self, model: PackedModel, rows: Rows, configs: Sequence[RunConfig], places: int, budget: int) -> None:
        self.trials = [Trial.start(config, rows, VERDICTS, model) for config in configs]  # type: ignore[arg-type]
        self.losses: dict[Trial, list[float]] = {trial: [] for trial in self.trials}
        self.waiting = self.trials[places:]
        self.free = 0
        self.rounds: list[list[Trial]] = []
        self.shares: list[float] = []
        pack = Pack(model, TokenBudget(budget))
        for trial in self.trials[:places]:
            pack.add(trial)
        train(pack, self)

    def stepped(self, reports: Sequence[tuple[Trial, StepReport]], seconds: dict[Trial, float]) -> None:
        self.rounds.append([trial for trial, _ in reports])
        self.shares.append(sum(seconds.values()))
        for trial, report in reports:
            self.losses[trial].append(report.loss)

    def evaluate(self, trials: Sequence[Trial]) -> None: ...

    def checkpoint(self, trial: Trial) -> None: ...

    def ended(self, trials: Sequence[Trial]) -> None:
        self.free += len(trials)

    def followers(self) -> list[Trial]:
        came, self.waiting = self.waiting[: self.free], self.waiting[self.free :]
        self.free -= len(came)
        return came


def with_kind(kind: OptimizerKind, **changes: Any) -> RunConfig:
    config = make_config(**changes)
    config.optimizer.kind = kind
    return config


def small_model() -> PackedModel:
    return PackedModel(Base(llama(), torch.device("cpu"), torch.float32, "random"))


@settings(max_examples=12, deadline=None)
@given(st.lists(TRIALS, min_size=3, max_size=5), st.integers(1, 2), st.sampled_from([40, 200, 10**6]))
def test_a_follower_in_a_freed_place_ends_where_it_ends_alone(
    trials: list[dict[str, Any]], places: int, budget: int
) -> None:
    model, rows = small_model(), random_rows(30)
    configs = [make_config(**trial) for trial in trials]
    crew = Crew(model, rows, configs, places, budget)
    for config, trial in zip(configs, crew.trials, strict=True):
        alone = Crew(model, rows, [config], 1, 10**6)
        assert trial.state is TrialState.finished
        assert crew.losses[trial] == pytest.approx(alone.losses[alone.trials[0]], rel=1e-5)
        assert relative(trial.adapter.flat, alone.trials[0].adapter.flat) < 1e-4


@settings(max_examples=8, deadline=None)
@given(st.lists(TRIALS, min_size=2, max_size=3), st.sampled_from(OptimizerKind))
def test_8_bit_optimizers_keep_to_the_trial_alone_too(trials: list[dict[str, Any]], kind: OptimizerKind) -> None:
    """Coarser: a state next to a rounding edge may fall on the other side of it."""
    model, rows = small_model(), random_rows(30)
    configs = [with_kind(kind if n % 2 == 0 else OptimizerKind.adamw, **trial) for n, trial in enumerate(trials)]
    crew = Crew(model, rows, configs, 2, 10**6)
    for config, trial in zip(configs, crew.trials, strict=True):
        alone = Crew(model, rows, [config], 1, 10**6)
        assert crew.losses[trial] == pytest.approx(alone.losses[alone.trials[0]], rel=1e-4)


def test_over_fifty_steps_with_comers_and_goers_losses_keep_to_the_trial_alone(rows: Rows) -> None:
    common = {"learning_rate": 2e-3, "dropout": 0.1}
    configs = [
        make_config(seed=1, rank=4, max_steps=20, **common),
        make_config(seed=2, rank=16, batch_size=1, max_steps=50, max_grad_norm=0.1, **common),
        make_config(seed=3, rank=2, max_steps=50, loss=LossKind.sequence, **common),
        make_config(seed=4, rank=8, max_steps=50, grad_accumulation=1, **common),
    ]
    model = small_model()
    crew = Crew(model, rows, configs, 3, 150)
    late = crew.trials[3]
    assert [late in together for together in crew.rounds].index(True) == 20
    for config, trial in zip(configs, crew.trials, strict=True):
        alone = Crew(model, rows, [config], 1, 10**6)
        assert crew.losses[trial] == pytest.approx(alone.losses[alone.trials[0]], rel=1e-5)


@pytest.mark.parametrize("rate", [1e20, 1e30])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_trial_that_diverges_changes_no_bit_of_the_others(rows: Rows, rate: float, dropout: float) -> None:
    """Beside one that takes as many steps over the same rows and then leaves in peace: passes have the same cut."""
    model = small_model()

    def others(bad: RunConfig) -> tuple[Trial, list[Trial], list[list[float]]]:
        good = [make_config(seed=seed, rank=rank, dropout=dropout, max_steps=8) for seed, rank in ((1, 4), (2, 7))]
        crew = Crew(model, rows, [good[0], bad, good[1]], 3, 200)
        first, middle, last = crew.trials
        return middle, [first, last], [crew.losses[first], crew.losses[last]]

    wild: dict[str, Any] = {"seed": 5, "max_grad_norm": None, "rank": 4}
    failed, beside_failure, losses = others(make_config(learning_rate=rate, max_steps=50, **wild))
    assert failed.state is TrialState.failed
    assert failed.reason is not None
    assert f"at step {failed.step + 1}" in failed.reason
    calm, beside_calm, calm_losses = others(make_config(learning_rate=1e-4, max_steps=failed.step + 1, **wild))
    assert calm.state is TrialState.finished
    assert losses == calm_losses
    for one, other in zip(beside_failure, beside_calm, strict=True):
        assert torch.equal(one.adapter.flat, other.adapter.flat)


def test_the_time_of_a_round_is_shared_by_tokens_among_all_that_were_in_it(rows: Rows) -> None:
    model = small_model()
    pack = Pack(model, TokenBudget(10**6))
    trials = [
        Trial.start(config, rows, VERDICTS, model)  # type: ignore[arg-type]
        for config in (make_config(seed=1, batch_size=1), make_config(seed=2, batch_size=4), make_config(seed=3))
    ]
    for trial in trials:
        pack.add(trial)
    trials[2].loss_scale = math.nan  # fails in this round
    tokens = [sum(len(s) for s in trial.segments(0)) for trial in trials]
    assert [trial for trial, _ in pack.step()] == trials[:2]
    assert [pack.shares[trial] for trial in trials] == pytest.approx([t / sum(tokens) for t in tokens])


@pytest.mark.parametrize("budget", [100, 10**6])
def test_scores_of_several_adapters_are_those_of_each_alone(rows: Rows, budget: int) -> None:
    """Bitwise where the rows fill a pass: each adapter then has the passes that it has alone."""
    model = small_model()
    adapters = []
    for seed, rank in ((1, 4), (2, 16), (3, 2)):
        trial = Trial.start(make_config(seed=seed, rank=rank), rows, VERDICTS, model)  # type: ignore[arg-type]
        trial.adapter.flat.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(seed))
        adapters.append(trial.adapter)
    together = score(model, [*adapters, None], rows, VERDICTS, TokenBudget(budget))  # type: ignore[arg-type]
    for own, adapter in zip(together, [*adapters, None], strict=True):
        alone = score(model, [adapter], rows, VERDICTS, TokenBudget(budget))[0]  # type: ignore[arg-type]
        assert np.abs(own - alone).max() < 1e-5
        assert budget > 100 or np.array_equal(own, alone)


def test_adapters_share_a_pass_if_their_rows_do_not_fill_one(
    model: PackedModel, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[int | None]] = []
    real = PackedModel.hidden

    def counted(self: PackedModel, layout: PassLayout, last_only: bool = False) -> torch.Tensor:
        seen.append({segment.slot for segment in layout.segments})
        return real(self, layout, last_only)

    monkeypatch.setattr(PackedModel, "hidden", counted)
    adapters = [
        Trial.start(make_config(seed=seed), rows, VERDICTS, model).adapter  # type: ignore[arg-type]
        for seed in range(3)
    ]
    tokens = int(rows.lengths.sum())
    score(model, adapters, rows, VERDICTS, TokenBudget(3 * tokens))  # type: ignore[arg-type]
    assert seen == [{0, 1, 2}]
    seen.clear()
    score(model, adapters, rows, VERDICTS, TokenBudget(tokens))  # type: ignore[arg-type]
    assert seen == [{0}, {1}, {2}]
