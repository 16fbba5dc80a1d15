"""Passes that are recorded once a size: what is not recorded, rounded up or refused for memory must not be noticed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mathverify.base import Base
from mathverify.config import RunConfig
from mathverify.engine import replay
from mathverify.engine.evaluate import score
from mathverify.engine.layout import PassLayout, Segment
from mathverify.engine.model import PackedModel
from mathverify.engine.pack import Pack, _Kept
from mathverify.engine.passes import TokenBudget
from mathverify.engine.ranks import Ranks
from mathverify.engine.replay import Replays, Work, rounded
from mathverify.engine.trial import Trial

from .conftest import VERDICTS, Rows, llama

Config = Callable[..., RunConfig]
CPU = torch.device("cpu")


def segments(lengths: list[int], start: int = 0) -> list[Segment]:
    return [
        Segment(np.arange(start, start + n, dtype=np.int32), i % 2 == 0, 0, 0.1 * (i + 1), start + i)
        for i, n in enumerate(lengths)
    ]


def launched(
    model: PackedModel, rows: Rows, config: RunConfig, budget: int = 10**6
) -> tuple[list[float], torch.Tensor]:
    """Losses of all steps and the final adapter."""
    trial = Trial.start(config, rows, VERDICTS, model)  # type: ignore[arg-type]
    pack = Pack(model, TokenBudget(budget))
    pack.add(trial)
    losses = [report.loss for _ in range(config.train.steps) for _, report in pack.step()]
    return losses, trial.adapter.flat.clone()


@given(st.lists(st.integers(1, 900), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_rounding_adds_segments_without_weight_behind_the_others(lengths: list[int]) -> None:
    own = segments(lengths)
    more = rounded(own)
    total = sum(len(s) for s in more)
    assert more[: len(own)] == own
    assert all(s.weight == 0 and s.slot == 0 and len(s) >= 1 for s in more[len(own) :])
    assert len(more) > len(own) and len(more) % 4 == 0 and len(more) - len(own) <= 4
    assert total % 64 == 0 and total - sum(lengths) <= 4 + (64 if total <= 2048 else 128)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=12), st.randoms())
@settings(max_examples=40, deadline=None)
def test_a_layout_becomes_another_of_the_same_size(lengths: list[int], random: Any) -> None:
    """All that a graph reads: after `become`, every tensor is that of the other pass."""
    own = rounded(segments(lengths))
    room = sum(lengths)
    others = list(lengths)
    random.shuffle(others)
    cut = random.randint(0, room - len(lengths))  # some tokens less in total, which the padding makes up for
    others[0] = max(1, others[0] - cut)
    other = segments(others, start=7)
    missing = sum(len(s) for s in own) - sum(others)
    extra = len(own) - len(other)
    other += [Segment(np.zeros(1, dtype=np.int32), False, 0, 0.0)] * (extra - 1)
    other += [Segment(np.zeros(missing - extra + 1, dtype=np.int32), False, 0, 0.0)]
    names = ["ids", "positions", "starts", "last", "one_each", "token_keys", "weights", "signs", "slots"]
    here, there = PassLayout(own, steady=True), PassLayout(other, steady=True)
    for name in names:
        getattr(here, name)
    here.tiles(64)
    here.become(there)
    for name in names:
        assert torch.equal(getattr(here, name), getattr(there, name)), name
    assert torch.equal(here.tiles(64), there.tiles(64))
    tiles = here.tiles(64)
    held = tiles[tiles[:, 2] > 0]
    covered = torch.cat([torch.arange(int(start), min(int(start) + 64, int(end))) for _, start, end in held])
    assert torch.equal(covered, torch.arange(there.tokens))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("budget", [10**6, 220])
def test_a_recorded_run_equals_a_launched_one(
    model: PackedModel, rows: Rows, config: Config, recording: list[str], monkeypatch: pytest.MonkeyPatch,
    dropout: float, budget: int,
) -> None:  # fmt: skip
    """Losses and the final adapter, while some passes are replayed, some recorded and some too large for it."""
    own = config(max_steps=24, dropout=dropout, max_grad_norm=0.05)
    losses, adapter = launched(model, rows, own, budget)
    assert "replayed" in recording
    recording.clear()
    monkeypatch.setattr(PackedModel, "replays", False)
    plain_losses, plain_adapter = launched(model, rows, own, budget)
    assert not recording
    assert losses == pytest.approx(plain_losses, rel=1e-5)
    assert float((adapter - plain_adapter).norm() / plain_adapter.norm()) < 1e-4


def test_a_size_is_recorded_when_it_comes_for_the_second_time_and_replayed_from_then_on() -> None:
    calls: list[str] = []

    def record(work: Work) -> Work:
        calls.append("record")

        def again() -> torch.Tensor:
            calls.append("replay")
            return work()

        return again

    def work(layout: PassLayout) -> torch.Tensor:
        calls.append("work")
        return layout.weights * layout.signs

    replays = Replays(CPU, recorder=lambda device: record)
    for round_number in range(5):
        own = segments([30, 15 + round_number, 10])
        expected = torch.tensor([s.weight * (1 if s.label else -1) for s in own])
        assert torch.allclose(replays.losses(own, work), expected)
    # A pass with room to spare is done and recorded before the first.
    assert calls == ["work", "work", "work", "record", "record", "replay", "work", "replay", "work", "replay", "work"]


def test_the_first_that_is_recorded_has_room_and_what_is_larger_begins_anew() -> None:
    """Each recorder's memory is laid out by its first pass, so none of its later ones may be larger. While it records
    nothing may be copied from the host: what a pass reads is there by then."""
    recorded: list[list[int]] = []
    under_way: list[bool] = []

    def recorder(device: torch.device) -> Callable[[Work], Work]:
        recorded.append([])

        def record(work: Work) -> Work:
            under_way.append(True)
            recorded[-1].append(len(work()))
            under_way.clear()
            return work

        return record

    def tokens(layout: PassLayout) -> torch.Tensor:
        names = ["ids", "weights", "token_keys"]
        if under_way:
            assert all(name in vars(layout) for name in names)
            assert layout._tiles is not None
        if layout.tokens in (896, 1280):  # what only makes room leaves no trace
            assert not layout.weights.any()
        for name in names:
            getattr(layout, name)
        layout.tiles(64)
        return layout.ids[0]

    replays = Replays(CPU, recorder=recorder)
    for length in (500, 500, 560, 560, 300, 300, 500, 800, 800, 500, 500, 700, 700):
        replays.losses(segments([length, 100]), tokens)
    assert recorded == [[896, 640, 704, 448], [1280, 960, 640, 832]]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("not permitted")])
def test_recording_that_fails_is_given_up_and_told_once(
    error: Exception, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "_cannot", set())
    tries: list[int] = []

    def record(work: Work) -> Work:
        tries.append(1)
        raise error

    replays = Replays(CPU, recorder=lambda device: record)
    for _ in range(6):
        assert torch.equal(replays.losses(segments([5, 6]), lambda layout: layout.weights), torch.tensor([0.1, 0.2]))
    assert len(tries) == 1
    reason = "out of memory" if isinstance(error, torch.OutOfMemoryError) else "not permitted"
    said = f"small passes are launched one by one from now on, which is slower: {reason}"
    assert [r.getMessage() for r in caplog.records] == [said]
    # What is wrong with the device is wrong for the next run too; memory may be there again.
    again = Replays(CPU, recorder=lambda device: record)
    for _ in range(6):
        again.losses(segments([5, 6]), lambda layout: layout.weights)
    assert len(tries) == (2 if isinstance(error, torch.OutOfMemoryError) else 1)


@pytest.mark.parametrize("where", ["step", "validation"])
def test_out_of_memory_lets_go_of_what_was_recorded_before_passes_become_smaller(
    model: PackedModel, rows: Rows, config: Config, recording: list[str], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    own = config(max_steps=20)
    expected, adapter = launched(model, rows, own)
    recording.clear()
    pack = Pack(model, TokenBudget(1000))
    trial = Trial.start(own, rows, VERDICTS, model)  # type: ignore[arg-type]
    pack.add(trial)
    losses = [report.loss for _ in range(16) for _, report in pack.step()]
    assert "replayed" in recording
    real = PackedModel.scores
    failed: list[bool] = []

    def crowded(self: PackedModel, *arguments: Any) -> torch.Tensor:
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("injected")
        return real(self, *arguments)

    with monkeypatch.context() as changed:
        changed.setattr(PackedModel, "scores", crowded)
        if where == "validation":
            score(model, [trial.adapter], rows, VERDICTS, pack.budget)  # type: ignore[arg-type]
        recording.clear()
        losses += [report.loss for _ in range(4) for _, report in pack.step()]
    assert failed and recording in ([], ["replayed"])  # what was tried when memory ran out, if that was a replay
    assert pack.replays is not None and pack.replays.held == 0
    assert pack.budget.tokens == 1000
    assert losses == pytest.approx(expected, rel=1e-5)
    assert float((trial.adapter.flat - adapter).norm() / adapter.norm()) < 1e-4
    # Nothing is left to let go of: now passes become smaller.
    failed.clear()
    with monkeypatch.context() as changed:
        changed.setattr(PackedModel, "scores", crowded)
        score(model, [trial.adapter], rows, VERDICTS, pack.budget)  # type: ignore[arg-type]
    assert pack.budget.tokens < 1000


def test_a_budget_does_not_hold_the_pack_that_it_was_for(model: PackedModel, rows: Rows, config: Config) -> None:
    budget = TokenBudget(1000)
    pack = weakref.ref(Pack(model, budget))
    assert pack() is None
    assert not budget.spare()


@pytest.mark.parametrize("processes", [1, 3])
def test_room_is_asked_for_beside_the_largest_pass_of_a_process(
    model: PackedModel, rows: Rows, config: Config, recording: list[str], monkeypatch: pytest.MonkeyPatch,
    processes: int,
) -> None:  # fmt: skip
    asked: list[tuple[int, bool]] = []

    def has_room(model: PackedModel, config: RunConfig, passes: int, tokens: int, planned: bool) -> bool:
        asked.append((passes, planned))
        return False

    monkeypatch.setattr("mathverify.engine.pack.has_room_beside", has_room)
    for budget, planned in ((TokenBudget(10**6, 10**6), True), (TokenBudget(300), False)):
        ranks = Ranks()
        ranks.size = processes
        pack = Pack(model, budget, ranks)
        pack.add(Trial.start(config(max_steps=8), rows, VERDICTS, model))  # type: ignore[arg-type]
        while pack.running:
            pack.step()
        whole = -(-6 // processes) * int(rows.lengths.max())
        assert set(asked) == {(min(budget.tokens, whole), planned)}
        asked.clear()
    assert "recorded" not in recording


def test_nothing_is_recorded_or_said_where_there_is_no_room(caplog: pytest.LogCaptureFixture) -> None:
    asked: list[int] = []

    def has_room(tokens: int) -> bool:
        asked.append(tokens)
        return False

    replays = Replays(CPU, has_room, lambda device: pytest.fail("recorded"))
    for _ in range(5):
        replays.losses(segments([300, 400]), lambda layout: layout.weights)
    assert asked == [896]  # once for what did not fit, and for what is larger
    assert not replays.make_room()
    assert not caplog.records
    assert replays.did == {"launched": 5}


def test_a_size_without_room_leaves_what_was_recorded() -> None:
    asked: list[int] = []

    def has_room(tokens: int) -> bool:
        asked.append(tokens)
        return tokens <= 1000

    replays = Replays(CPU, has_room, lambda device: lambda work: work)
    for length in (300, 300, 900, 900, 900, 300, 350, 350, 1200, 1200):
        replays.losses(segments([length, 200]), lambda layout: layout.weights)
    assert asked == [640, 1536]
    assert replays.held == 640
    assert replays.did == {"launched": 9, "recorded": 2, "replayed": 1}


def test_recorded_passes_see_what_a_half_precision_adapter_has_become(
    rows: Rows, config: Config, recording: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes in bfloat16 read a copy of the adapter; a graph reads the one it was recorded with."""
    half = PackedModel(Base(llama(torch.bfloat16), CPU, torch.bfloat16, "random"))
    own = config(max_steps=12)
    losses, adapter = launched(half, rows, own)
    assert recording.count("replayed") > 2
    fresh = PackedModel.ready
    monkeypatch.setattr(
        Pack, "_ready", lambda pack, trials: _Kept(fresh(half, [t.adapter for t in trials]), Replays(CPU))
    )
    expected, plain = launched(half, rows, own)
    assert losses == pytest.approx(expected, rel=1e-2)
    assert float((adapter - plain).norm() / plain.norm()) < 0.1


def test_passes_are_recorded_on_a_gpu_in_half_precision_with_a_fast_decoder_and_dense_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, single = (PackedModel(Base(llama(d), CPU, d, "random")) for d in (torch.bfloat16, torch.float32))
    assert [one.replays for one in (model, single)] == [False, False]
    for one in (model, single):
        monkeypatch.setattr(one, "device", torch.device("cuda:0"))
    assert [one.replays for one in (model, single)] == [True, False]
    rotary = model.decoder.rotary_emb
    changes: list[tuple[Any, str, Any]] = [
        (rotary, "rope_type", "dynamic"),
        (model.fast, "recompute", True),
        (type(model), "is_dense", False),
        (model, "fast", None),
    ]
    for part, name, value in changes:
        with monkeypatch.context() as changed:
            changed.setattr(part, name, value)
            assert not model.replays, name
        assert model.replays
