"""A small random Llama and random rows: enough to state every property of the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mathverify.base import Base
from mathverify.config import LoraConfig, OptimizerConfig, RunConfig, TrainConfig
from mathverify.engine import replay
from mathverify.engine.model import PackedModel
from mathverify.engine.pack import Pack
from mathverify.engine.passes import TokenBudget
from mathverify.engine.replay import Work
from mathverify.engine.trial import Trial

VERDICTS = SimpleNamespace(true_id=5, false_id=6)
VOCABULARY = 97


@dataclass
class Rows:
    """A token store of random rows; labels are a function of the tokens, so there is something to learn."""

    rows: list[np.ndarray]
    labels: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self.rows], dtype=np.int32)

    def ids(self, row: int) -> np.ndarray:
        return self.rows[row]

    def __len__(self) -> int:
        return len(self.rows)


def random_rows(count: int, seed: int = 0, low: int = 5, high: int = 24) -> Rows:
    rng = np.random.default_rng(seed)
    rows = [rng.integers(7, VOCABULARY, rng.integers(low, high)).astype(np.int32) for _ in range(count)]
    return Rows(rows, np.array([row[-1] % 2 == 0 for row in rows]))


def llama(dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    from transformers import LlamaConfig as Config
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    config = Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(dtype).requires_grad_(False).eval()


@pytest.fixture
def model() -> PackedModel:
    return PackedModel(Base(llama(), torch.device("cpu"), torch.float32, "random"))


@pytest.fixture
def rows() -> Rows:
    return random_rows(60)


def make_config(seed: int = 0, **changes: Any) -> RunConfig:
    """RunConfig of a small trial; keyword arguments replace parts of lora, optimizer and train by their names."""

    def part(kind: type, **defaults: Any) -> Any:
        known = {k: v for k, v in changes.items() if k in kind.__dataclass_fields__}  # type: ignore[attr-defined]
        return kind(**(defaults | known))

    return RunConfig(
        lora=part(LoraConfig, rank=4, alpha=8.0),
        optimizer=part(OptimizerConfig, learning_rate=1e-2, warmup_steps=1),
        train=part(TrainConfig, batch_size=3, grad_accumulation=2, max_steps=6),
        seed=seed,
    )


@pytest.fixture
def config() -> Callable[..., RunConfig]:
    return make_config


def train(model: PackedModel, rows: Rows, configs: Sequence[RunConfig], budget: int = 10**6) -> list[list[float]]:
    """Train the configs as one pack; each trial's loss curve, then its final flat parameters as `.final`."""
    pack = Pack(model, TokenBudget(budget))
    trials = [Trial.start(config, rows, VERDICTS, model) for config in configs]  # type: ignore[arg-type]
    for trial in trials:
        pack.add(trial)
    curves: dict[Trial, list[float]] = {trial: [] for trial in trials}
    while pack.running:
        for trial, report in pack.step():
            curves[trial].append(report.loss)
    train.trials = trials  # type: ignore[attr-defined]
    return [curves[trial] for trial in trials]


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Passes are recorded on the CPU too: what was recorded is called again. Returns what happened."""
    happened: list[str] = []

    def record(work: Work) -> Work:
        happened.append("recorded")

        def again() -> torch.Tensor:
            happened.append("replayed")
            return work()

        return again

    monkeypatch.setattr(PackedModel, "replays", True)
    monkeypatch.setattr(replay, "Recorder", lambda device: record)
    return happened


@pytest.fixture
def fresh_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    """No base is warm yet."""
    monkeypatch.setattr("mathverify.base._warm", {})
