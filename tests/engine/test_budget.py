"""What the planner says and plans, on a device whose memory is made up.

Measured peaks stand beside it in the table of tests/benchmarks/gpu.py.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mathverify.base import Base, load_base
from mathverify.config import MemoryMode, QuantizationConfig, QuantizationKind, RunConfig
from mathverify.engine.budget import BudgetPlan, copy_bytes, plan_budget
from mathverify.engine.model import PackedModel

from .conftest import llama, make_config

GIB = 2**30
Plan = Callable[..., BudgetPlan]


def step(batch_size: int = 4, **changes: Any) -> RunConfig:
    """A run of so many examples a step."""
    return make_config(batch_size=batch_size, grad_accumulation=1, **changes)


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, fresh_bases: None) -> Plan:
    """Plans for the tiny base in NF4 as if it lay on a GPU of `total` bytes, of which `free` are free."""
    model = PackedModel(
        load_base(RunConfig(quantization=QuantizationConfig(kind=QuantizationKind.nf4, double_quant=True)))
    )

    def planned(
        config: RunConfig | list[RunConfig], free: int, total: int = 16 * GIB, longest: int = 100, trials: int = 1
    ) -> BudgetPlan:
        cuda: Any = SimpleNamespace(
            empty_cache=lambda: None,
            mem_get_info=lambda device: (free, total),
            memory_reserved=lambda device: 0,
            memory_allocated=lambda device: 0,
        )
        monkeypatch.setattr("mathverify.engine.budget.torch", SimpleNamespace(cuda=cuda, float32=torch.float32))
        monkeypatch.setattr(model, "device", SimpleNamespace(type="cuda"))
        monkeypatch.setattr(model, "lend_head", lambda wanted: None)
        monkeypatch.setattr(model, "keep_dense", lambda: None)
        return plan_budget(model, config if isinstance(config, list) else [config] * trials, longest)

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


def test_more_trials_need_more_and_a_budget_that_was_asked_for_is_taken(plan: Plan) -> None:
    one, eight = (plan(step(), free=8 * GIB, trials=trials) for trials in (1, 8))
    assert eight.tokens == 8 * one.tokens
    assert eight.fixed_bytes > one.fixed_bytes
    assert plan(step(token_budget=222), free=8 * GIB).tokens == 222


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
