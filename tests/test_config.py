"""RunConfig: checked when made, and the same after a trip through JSON."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mathverify.config import LoraConfig, RunConfig, TrainConfig, from_plain, to_plain
from mathverify.errors import UserError


def test_a_config_survives_json() -> None:
    config = RunConfig(seed=3, train=TrainConfig(max_examples=100), lora=LoraConfig(rank=8, target_modules=["q_proj"]))
    assert from_plain(json.loads(json.dumps(to_plain(config)))) == config


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(UserError, match=r"lora\.rnk.*rank, alpha"):
        from_plain({"lora": {"rnk": 3}})


@given(st.integers(1, 10**6), st.integers(1, 64), st.integers(1, 64))
def test_max_examples_are_seen_and_less_than_a_step_more(examples: int, batch: int, accumulation: int) -> None:
    config = TrainConfig(batch_size=batch, grad_accumulation=accumulation, max_examples=examples)
    seen = config.steps * config.examples_per_step
    assert examples <= seen < examples + config.examples_per_step


@given(st.integers(1, 256), st.floats(0.1, 512))
def test_rslora_keeps_the_scale_times_root_rank_larger(rank: int, alpha: float) -> None:
    plain, stabilised = LoraConfig(rank=rank, alpha=alpha), LoraConfig(rank=rank, alpha=alpha, rslora=True)
    assert math.isclose(stabilised.scale, plain.scale * math.sqrt(rank))


def test_a_run_is_named_by_what_distinguishes_it() -> None:
    assert RunConfig().name == "r64-a64-b4"
