"""What the planner says and plans, on a device whose memory is made up.

Measured peaks stand beside it in the table of tests/benchmarks/gpu.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mathverify.base import Base, load_base
from mathverify.config import LossKind, MemoryMode, QuantizationConfig, QuantizationKind, RunConfig
from mathverify.engine import frozen
from mathverify.engine.budget import (
    RESERVE,
    BudgetPlan,
    Lengths,
    activation_bytes,
    adapter_bytes,
    copy_bytes,
    has_room_beside,
    plan_budget,
)
from mathverify.engine.model import LOGIT_ROWS, PackedModel
from mathverify.engine.pack import Pack
from mathverify.engine.passes import TokenBudget
from mathverify.engine.replay import MOST_ADDED, most_held
from mathverify.engine.trial import Trial
from mathverify.prepare import SHARE_FOR_ADAPTERS, _at_once

from .conftest import VERDICTS, Rows, llama, make_config

GIB = 2**30
Plan = Callable[..., BudgetPlan]


def step(batch_size: int = 4, **changes: Any) -> RunConfig:
    """A run of so many examples a step."""
    return make_config(batch_size=batch_size, grad_accumulation=1, **changes)


@pytest.fixture
def base(fresh_bases: None) -> PackedModel:
    """The tiny base in NF4."""
    return PackedModel(
        load_base(RunConfig(quantization=QuantizationConfig(kind=QuantizationKind.nf4, double_quant=True)))
    )


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch, base: PackedModel) -> Callable[..., Any]:
    """Within the block, the base lies on a GPU of `total` bytes, of which `free` are without what is kept dense."""
    monkeypatch.setattr(frozen, "_scratches", {})

    @contextmanager
    def there(free: int, total: int = 16 * GIB) -> Iterator[None]:
        def left(device: Any) -> tuple[int, int]:
            return free - (base.dense_bytes() if base.is_dense else 0), total

        cuda: Any = SimpleNamespace(
            empty_cache=lambda: None,
            mem_get_info=left,
            memory_reserved=lambda device: 0,
            memory_allocated=lambda device: 0,
        )
        with monkeypatch.context() as changed:
            changed.setattr("mathverify.engine.budget.torch", SimpleNamespace(cuda=cuda, float32=torch.float32))
            changed.setattr(base, "device", SimpleNamespace(type="cuda"))
            changed.setattr(base, "lend_head", lambda wanted: None)
            yield

    return there


@pytest.fixture
def plan(base: PackedModel, on_gpu: Callable[..., Any]) -> Plan:
    """Plans for that base there.

    mean, spread: of the rows' tokens; all have as many as the longest unless told.
    """

    def planned(
        config: RunConfig | list[RunConfig], free: int, longest: int = 100, trials: int = 1,
        mean: float | None = None, spread: float = 0.0, processes: int = 1, total: int = 16 * GIB,
    ) -> BudgetPlan:  # fmt: skip
        lengths = Lengths(longest, longest if mean is None else mean, spread)
        with on_gpu(free, total):
            return plan_budget(base, config if isinstance(config, list) else [config] * trials, lengths, processes)

    return planned


def bytes_for(plan: BudgetPlan, tokens: int, more: int = 0) -> int:
    """Free bytes in which passes of so many tokens fit as in `plan`, and `more` bytes that nothing is spared of."""
    return math.ceil((plan.fixed_bytes + tokens * plan.token_bytes) / RESERVE) + more


def test_with_room_a_pass_holds_a_whole_step_and_dense_weights_are_kept(plan: Plan) -> None:
    found = plan(step(), free=8 * GIB)
    assert found.tokens == 400
    assert found.text.startswith("needs 8.")  # what others take is counted as well
    assert found.text.endswith("of 16 GiB: 400 tokens a pass, dequantised weights kept")


def test_with_less_room_passes_are_smaller_and_never_smaller_than_the_longest_row(plan: Plan) -> None:
    roomy = plan(step(), free=8 * GIB)
    tight = plan(step(), free=bytes_for(roomy, 250))
    assert 150 < tight.tokens <= 250
    assert "kept" not in tight.text
    assert plan(step(), free=roomy.fixed_bytes).tokens == 100


def test_dense_weights_are_kept_where_a_usual_step_fits_beside_them_and_let_go_where_it_does_not(
    plan: Plan, base: PackedModel
) -> None:
    """A step of nothing but the longest rows hardly ever comes: then it is two passes."""
    room = bytes_for(plan(step(), free=8 * GIB), 250, base.dense_bytes())
    usual = plan(step(), free=room, mean=40.0, spread=10.0)  # 160 tokens and twice 20
    assert "dequantised weights kept" in usual.text
    assert base.is_dense
    assert 240 < usual.tokens <= 250
    assert usual.tokens * usual.token_bytes + usual.fixed_bytes + base.dense_bytes() <= room
    assert plan(step(), free=room, mean=40.0, spread=10.0) == usual  # whatever was kept before
    for mean, longest in ((60.0, 100), (40.0, 260)):
        assert "kept" not in plan(step(), free=room, mean=mean, spread=10.0, longest=longest).text
        assert not base.is_dense
    plan(step(), free=room, mean=40.0, spread=10.0)
    assert base.is_dense
    assert "kept" not in plan(step(memory=MemoryMode.lean), free=8 * GIB).text
    assert not base.is_dense


@pytest.mark.parametrize(
    ("room", "kept"), [(13500, True), (12000, False), (9000, True), (7500, True), (6000, False), (3050, False)]
)
def test_dense_weights_are_kept_where_they_save_more_than_smaller_passes_cost(
    plan: Plan, base: PackedModel, monkeypatch: pytest.MonkeyPatch, room: int, kept: bool
) -> None:
    """A step of 10,000 tokens, dense weights that take the room of 3,000: one pass against one, two against one, two
    against two, three against two, four against two, none at all."""
    many = step(batch_size=100)
    roomy = plan(many, free=64 * GIB, total=64 * GIB)
    dense = math.ceil(3000 * roomy.token_bytes / RESERVE)
    monkeypatch.setattr(base, "dense_bytes", lambda: dense)
    assert ("kept" in plan(many, free=bytes_for(roomy, room)).text) is kept


def test_the_buffer_for_dequantised_weights_is_counted_once_and_only_where_it_is_used(
    plan: Plan, base: PackedModel
) -> None:
    assert base.fast is not None
    buffer = 4 * max(group.frozen.in_features * group.frozen.out_features for group in base.fast.groups)
    dense, without = (plan(step(), free=free) for free in (8 * GIB, bytes_for(plan(step(), free=8 * GIB), 220)))
    assert "kept" in dense.text and "kept" not in without.text
    assert without.fixed_bytes == dense.fixed_bytes + buffer
    base.fast.groups[0].frozen.dense(torch.float32)
    held = frozen.scratch_held()
    assert held > 0
    assert plan(step(), free=bytes_for(dense, 220)).fixed_bytes == without.fixed_bytes - held
    base.keep_dense(True)
    assert frozen.scratch_held() == 0


def test_a_step_is_shared_by_processes(plan: Plan) -> None:
    assert [plan(step(6), free=8 * GIB, processes=count).tokens for count in (1, 2, 4)] == [600, 300, 200]


def test_a_lone_run_of_small_steps_leaves_room_for_recorded_passes(
    plan: Plan, base: PackedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They hold what the widest of them usually needs, beside what passes need that are not recorded."""
    rows = {"longest": 2000, "mean": 300.0, "spread": 150.0}
    without = plan(step(), free=8 * GIB, **rows)
    assert (without.tokens, without.held) == (8000, 0) and "recorded" not in without.text
    monkeypatch.setattr(PackedModel, "replays", True)
    found = plan(step(), free=8 * GIB, **rows)
    assert found.text.endswith(", dequantised weights kept, small passes recorded")
    assert found.tokens == 8000 + MOST_ADDED
    usual = 1200 + 2 * 300
    assert found.held == most_held(usual)
    assert usual < found.held < 1.5 * usual
    assert needed(found) - needed(without) == pytest.approx(found.held * found.token_bytes / GIB, abs=0.1)

    # Steps that are too large for it as a rule, several trials, a loss of every token.
    assert plan(step(), free=8 * GIB, longest=2000, mean=1100.0).held == 0
    assert plan(step(), free=8 * GIB, longest=2000, mean=1100.0, processes=2).held > 0
    assert plan(step(), free=8 * GIB, trials=2, **rows).held == 0
    assert plan(step(loss=LossKind.sequence), free=8 * GIB, **rows).held == 0

    # Just enough memory for a usual step beside it, and less: then passes have all there is.
    enough = max(2000, usual + MOST_ADDED)
    room = bytes_for(found, enough + found.held + 5, base.dense_bytes())
    tight = plan(step(), free=room, **rows)
    assert tight.held == found.held
    assert enough <= tight.tokens <= enough + 5
    tighter = plan(step(), free=room - math.ceil(10 * found.token_bytes / RESERVE), **rows)
    assert tighter.held == 0
    assert enough + found.held - 10 < tighter.tokens < enough + found.held


@pytest.mark.parametrize(("asked", "kept"), [(None, True), (10, True), (150, True), (10**6, True), (230, False)])
def test_dense_weights_beside_a_budget_that_was_asked_for(
    plan: Plan, base: PackedModel, asked: int | None, kept: bool
) -> None:
    """No pass is larger than a step: how much more was asked for says nothing. Here one has 200 or 240 tokens."""
    rows = {"longest": 60, "mean": 60.0 if asked == 230 else 50.0}
    room = bytes_for(plan(step(), free=8 * GIB), 210, base.dense_bytes())
    found = plan(step(token_budget=asked), free=room, **rows)
    assert ("kept" in found.text) is kept
    assert found.tokens == asked or asked is None


@pytest.mark.parametrize("length", [5, 20])
@pytest.mark.parametrize("asked", [None, 150, 200, 10**6])
def test_what_is_planned_to_be_recorded_is_and_nothing_else(
    plan: Plan, base: PackedModel, recording: list[str], monkeypatch: pytest.MonkeyPatch, length: int, asked: int | None
) -> None:
    """Rows of one length leave no room between a usual step and the largest."""
    kinds = np.random.default_rng(0).integers(7, 90, (40, length)).astype(np.int32)
    rows = Rows(list(kinds), kinds[:, -1] % 2 == 0)
    own = step(token_budget=asked, max_steps=6)
    found = plan(own, free=8 * GIB, longest=length)
    pack = Pack(base, TokenBudget(found.tokens, found.held))
    pack.add(Trial.start(own, rows, VERDICTS, base))  # type: ignore[arg-type]
    asked_for: list[tuple[int, int, bool]] = []

    def has_room(model: PackedModel, config: RunConfig, passes: int, tokens: int, planned: bool) -> bool:
        asked_for.append((passes, tokens, planned))
        return True

    monkeypatch.setattr("mathverify.engine.pack.has_room_beside", has_room)
    while pack.running:
        pack.step()
    fits = asked is None or 4 * length + MOST_ADDED <= asked
    assert (found.held > 0) is ("replayed" in recording) is fits
    if fits:
        ((passes, tokens, planned),) = asked_for
        assert (passes, planned) == (4 * length, True)
        assert tokens <= found.held


def test_what_was_not_planned_is_recorded_only_with_the_reserve_left(
    on_gpu: Callable[..., Any], base: PackedModel
) -> None:
    token = activation_bytes(base, [step()])
    for free, planned, found in [
        (900 * token, True, True), (899 * token, True, False),
        (math.ceil(900 * token / RESERVE), False, True), (900 * token, False, False),
    ]:  # fmt: skip
        with on_gpu(free):
            assert has_room_beside(base, step(), 600, 300, planned) is found
    assert has_room_beside(base, step(), 10**12, 10**12, False)  # on a CPU
    base.keep_dense(True)
    with on_gpu(900 * token):
        assert not has_room_beside(base, step(), 600, 300, True)
    with on_gpu(900 * token + base.dense_bytes()):
        assert has_room_beside(base, step(), 600, 300, True)


def test_how_many_runs_fit_at_once_does_not_depend_on_the_pack_before(
    on_gpu: Callable[..., Any], base: PackedModel
) -> None:
    configs = [step(seed=seed) for seed in range(8)]
    needed = adapter_bytes(base, configs[0])
    room = int(5.5 * needed / RESERVE / SHARE_FOR_ADAPTERS)
    for dense in (False, True, False):
        base.keep_dense(dense)
        with on_gpu(room):
            assert _at_once(base, configs) == 5


def needed(plan: BudgetPlan) -> float:
    """GiB, as the text says."""
    return float(plan.text.split()[1])


def test_usual_lengths() -> None:
    """Against drawn steps: rows like the mission's, log-normal."""
    draw = np.random.default_rng(0)
    rows = np.clip(np.exp(draw.normal(np.log(320), 0.45, 5000)), 64, 2048).astype(np.int32)
    lengths = Lengths.of(rows, 2049)
    assert lengths.longest == 2049
    for segments in (1, 4, 16, 64):
        sums = draw.choice(rows, (4000, segments)).sum(axis=1)
        assert 0.9 < (sums <= lengths.usual(segments)).mean() < 0.99
    assert Lengths.of(np.full(3, 7, np.int32)).usual(5) == 35
    assert Lengths(10, 9.0, 5.0).usual(2) == 20  # never more than there can be


def test_more_trials_need_more_and_a_budget_that_was_asked_for_is_taken(plan: Plan) -> None:
    one, eight = (plan(step(), free=8 * GIB, trials=trials) for trials in (1, 8))
    assert eight.tokens == 8 * one.tokens
    assert eight.fixed_bytes > one.fixed_bytes
    assert plan(step(token_budget=222), free=8 * GIB).tokens == 222
    larger = plan(step(token_budget=10**9), free=8 * GIB)  # than any step
    assert (larger.tokens, larger.text.split()[1]) == (10**9, one.text.split()[1])
    assert "kept" in larger.text


def test_a_budget_below_the_longest_row_says_what_becomes_of_it_and_is_planned_for(plan: Plan) -> None:
    small, fitting = (plan(step(token_budget=tokens), free=8 * GIB) for tokens in (1, 100))
    assert "1 tokens a pass, as asked; a longer row, up to 100, is a pass of its own" in small.text
    assert small.text.split(":")[0] == fitting.text.split(":")[0]  # needs as much


def test_a_loss_of_every_token_is_planned_with_its_logits(plan: Plan, base: PackedModel) -> None:
    labels, tokens = (plan(step(loss=loss), free=8 * GIB) for loss in (LossKind.label, LossKind.sequence))
    numbers = LOGIT_ROWS * base.head.out_features
    assert tokens.fixed_bytes - labels.fixed_bytes == numbers * (4 + 4 + 4 + 4)
    assert plan([step(), step(loss=LossKind.sequence)], free=8 * GIB).fixed_bytes > 2 * labels.fixed_bytes


def test_every_run_is_planned_as_large_as_the_largest_in_each_respect(plan: Plan) -> None:
    small, long, wide = (step(batch_size=1), step(), step(rank=16, batch_size=1))
    together = plan([small, long, wide], free=8 * GIB)
    assert together.tokens == 3 * 400
    assert together.fixed_bytes == plan([wide] * 3, free=8 * GIB).fixed_bytes


def test_lean_keeps_little_for_a_token_and_nothing_dense(plan: Plan) -> None:
    one, other = plan(step(memory=MemoryMode.lean), free=8 * GIB), plan(step(), free=8 * GIB)
    assert one.token_bytes < other.token_bytes
    assert "kept" not in one.text


def test_a_mixed_pack_is_planned_with_its_padding(plan: Plan) -> None:
    """Kernels for many adapters want one shape: the largest rank, on everything that any of them targets."""
    high, wide = step(rank=16, target_modules=["q_proj"]), step(rank=4, target_modules=["k_proj", "v_proj"])
    mixed, alike = plan([high, wide], free=8 * GIB), [plan([one] * 2, free=8 * GIB) for one in (high, wide)]
    assert mixed.token_bytes > max(one.token_bytes for one in alike)
    half = PackedModel(Base(llama(torch.bfloat16), torch.device("cpu"), torch.bfloat16, "random"))
    both = step(rank=16, target_modules=["q_proj", "k_proj", "v_proj"])
    assert copy_bytes(half, [high, wide]) == copy_bytes(half, [both]) > copy_bytes(half, [high])
