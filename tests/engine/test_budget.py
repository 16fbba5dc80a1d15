"""What the planner says and plans, on a device whose memory is made up.

Measured peaks stand beside it in the table of tests/benchmarks/gpu.py.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mathverify.base import Base, load_base
from mathverify.config import LossKind, MemoryMode, QuantizationConfig, QuantizationKind, RunConfig
from mathverify.engine.budget import BudgetPlan, Lengths, copy_bytes, plan_budget
from mathverify.engine.model import PackedModel
from mathverify.engine.replay import MOST_TOKENS, most_held

from .conftest import llama, make_config

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
def plan(monkeypatch: pytest.MonkeyPatch, base: PackedModel) -> Plan:
    """Plans for that base as if it lay on a GPU of `total` bytes, of which `free` are free.

    mean, spread: of the rows' tokens; all have as many as the longest unless told.
    """

    def planned(
        config: RunConfig | list[RunConfig], free: int, total: int = 16 * GIB, longest: int = 100, trials: int = 1,
        mean: float | None = None, spread: float = 0.0, processes: int = 1,
    ) -> BudgetPlan:  # fmt: skip
        cuda: Any = SimpleNamespace(
            empty_cache=lambda: None,
            mem_get_info=lambda device: (free, total),
            memory_reserved=lambda device: 0,
            memory_allocated=lambda device: 0,
        )
        monkeypatch.setattr("mathverify.engine.budget.torch", SimpleNamespace(cuda=cuda, float32=torch.float32))
        monkeypatch.setattr(base, "device", SimpleNamespace(type="cuda"))
        monkeypatch.setattr(base, "lend_head", lambda wanted: None)
        lengths = Lengths(longest, longest if mean is None else mean, spread)
        return plan_budget(base, config if isinstance(config, list) else [config] * trials, lengths, processes)

    return planned


def test_with_room_a_pass_holds_a_whole_step_and_dense_weights_are_kept(plan: Plan) -> None:
    found = plan(step(), free=8 * GIB)
    assert found.tokens == 400
    assert found.text.startswith("needs 8.")  # what others take is counted as well
    assert found.text.endswith("of 16 GiB: 400 tokens a pass, dequantised weights kept")


def test_with_less_room_passes_are_smaller_and_never_smaller_than_the_longest_row(plan: Plan) -> None:
    roomy = plan(step(), free=8 * GIB)
    fixed, token = roomy.fixed_bytes, roomy.token_bytes
    tight = plan(step(), free=int((fixed + 250 * token) / 0.92))
    assert 150 < tight.tokens <= 250
    assert "kept" not in tight.text
    assert plan(step(), free=fixed).tokens == 100


def test_dense_weights_are_kept_where_a_usual_step_fits_beside_them_and_let_go_where_it_does_not(
    plan: Plan, base: PackedModel
) -> None:
    """A step of nothing but the longest rows hardly ever comes: then it is two passes."""
    of_100 = plan(step(), free=8 * GIB)
    room = int((of_100.fixed_bytes + 250 * of_100.token_bytes) / 0.92) + base.dense_bytes()
    usual = plan(step(), free=room, mean=40.0, spread=10.0)  # 160 tokens and three times 20
    assert "dequantised weights kept" in usual.text
    assert base.is_dense
    assert 220 < usual.tokens <= 250
    assert usual.tokens * usual.token_bytes + usual.fixed_bytes + base.dense_bytes() <= room
    for mean, longest in ((60.0, 100), (40.0, 260)):
        assert "kept" not in plan(step(), free=room, mean=mean, spread=10.0, longest=longest).text
        assert not base.is_dense
    plan(step(), free=room, mean=40.0, spread=10.0)
    assert "kept" not in plan(step(memory=MemoryMode.lean), free=8 * GIB).text
    assert not base.is_dense


def test_large_passes_do_without_room_for_larger_ones(plan: Plan, base: PackedModel) -> None:
    """What dequantising takes is little beside a pass of thousands of tokens, but more than still larger ones save."""
    many = step(batch_size=1000)
    roomy = plan(many, free=64 * GIB, total=64 * GIB)
    for tokens, kept in ((9000, True), (7000, False)):
        room = int((roomy.fixed_bytes + tokens * roomy.token_bytes) / 0.92) + base.dense_bytes()
        assert ("kept" in plan(many, free=room).text) is kept


def test_a_step_is_shared_by_processes(plan: Plan) -> None:
    assert [plan(step(6), free=8 * GIB, processes=count).tokens for count in (1, 2, 4)] == [600, 300, 200]


def test_a_lone_run_of_small_steps_leaves_room_for_recorded_passes(
    plan: Plan, base: PackedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They hold what the widest of them needs, beside what passes need that are not recorded."""
    without = plan(step(), free=8 * GIB, longest=2000, mean=300.0)
    assert "recorded" not in without.text
    monkeypatch.setattr(PackedModel, "replays", True)
    found = plan(step(), free=8 * GIB, longest=2000, mean=300.0)
    assert found.text.endswith(", dequantised weights kept, small passes recorded")
    assert found.tokens == without.tokens == 8000
    held = most_held(8000)
    assert MOST_TOKENS < held < 1.4 * MOST_TOKENS
    assert needed(found) - needed(without) == pytest.approx(
        held * found.token_bytes / GIB, abs=0.1
    )  # each of them in tenths
    # Steps that are too large for it as a rule, several trials, a loss of every token, too little memory.
    assert "recorded" not in plan(step(), free=8 * GIB, longest=2000, mean=1100.0).text
    assert "recorded" in plan(step(), free=8 * GIB, longest=2000, mean=1100.0, processes=2).text
    assert "recorded" not in plan(step(), free=8 * GIB, longest=2000, mean=300.0, trials=2).text
    assert "recorded" not in plan(step(loss=LossKind.sequence), free=8 * GIB, longest=2000, mean=300.0).text
    room = int((found.fixed_bytes + (held + 3000) * found.token_bytes) / 0.92) + base.dense_bytes()
    tight = plan(step(), free=room, longest=2000, mean=300.0)
    assert "recorded" in tight.text
    assert 2900 < tight.tokens <= 3000
    tighter = plan(step(), free=room - 2000 * found.token_bytes, longest=2000, mean=300.0)
    assert "recorded" not in tighter.text
    assert tighter.tokens > held


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
        assert (sums <= lengths.usual(segments)).mean() > 0.97
        assert lengths.usual(segments) < 1.8 * np.quantile(sums, 0.97)
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
