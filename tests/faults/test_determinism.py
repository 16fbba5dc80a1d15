"""The same seed twice gives the same result.json metrics, to the last bit (CPU, same number of threads)."""

from __future__ import annotations

import pytest

from .conftest import TINY, Command
from .determinism import twice


@pytest.mark.slow
def test_two_processes_with_one_seed_end_alike() -> None:
    found = twice("cpu", ["lora.dropout=0.1", "train.max_steps=12"])
    assert found["metrics_equal"]
    assert found["weights_equal"]
    assert set(found["largest_difference"].values()) == {0.0}


@pytest.mark.parametrize(
    "change", ["train.loss=sequence", "quantization=nf4", "optimizer=adamw_8bit", "train.token_budget=100"]
)
def test_other_ways_to_train_are_as_reproducible(change: str, command: Command, tmp_path: object) -> None:
    from pathlib import Path

    from mathverify.records import read_record

    place = Path(str(tmp_path))
    for name in ("a", "b"):
        assert command(*TINY, change, "lora.dropout=0.1", f"hydra.run.dir={name}").code == 0
    first, second = read_record(place / "a"), read_record(place / "b")
    assert first.metrics == second.metrics
    weights = [(place / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]


@pytest.mark.gpu
def test_on_a_gpu_two_runs_differ_by_little() -> None:
    """How much is measured by `python -m tests.faults.determinism --device cuda`; here only that it stays small."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert twice("cuda")["largest_difference"]["accuracy"] < 0.05
