"""NF4, FP4 and int8 bases train on the CPU too, with the gradients of their own dense weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mathverify.base import load_base
from mathverify.config import ModelConfig, QuantizationConfig, QuantizationKind, RunConfig
from mathverify.engine.evaluate import score
from mathverify.engine.model import PackedModel
from mathverify.engine.pack import Pack
from mathverify.engine.passes import TokenBudget
from mathverify.engine.trial import Trial

from .conftest import VERDICTS, Rows, llama, train

Config = Callable[..., RunConfig]
QUANTIZED = [QuantizationKind.nf4, QuantizationKind.fp4, QuantizationKind.int8]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    return folder


def quantized_model(kind: QuantizationKind, checkpoint: Path, config: RunConfig) -> PackedModel:
    config.model = ModelConfig(name="hf", path=str(checkpoint))
    config.quantization = QuantizationConfig(kind=kind)
    return PackedModel(load_base(config))


def dense_twin(model: PackedModel) -> PackedModel:
    """A plain float32 model with the very weights that the quantised one stands for."""
    from mathverify.base import Base

    twin = llama()
    for name, linear in model.host.linears.items():
        make_dense = linear.frozen.dense_weight
        assert make_dense is not None
        twin.get_submodule(name).weight.data.copy_(make_dense(torch.float32))
    return PackedModel(Base(twin, model.device, torch.float32, "twin"))


def gradient(model: PackedModel, rows: Rows, config: RunConfig) -> torch.Tensor:
    trial = Trial.start(config, rows, VERDICTS, model)  # type: ignore[arg-type]
    trial.adapter.flat.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    pack = Pack(model, TokenBudget(10**6))
    pack._passes([trial], trial.segments(0))
    return trial.adapter.grad.clone()


@pytest.mark.parametrize("kind", QUANTIZED)
def test_gradients_are_right_also_after_an_evaluation(
    kind: QuantizationKind, checkpoint: Path, rows: Rows, config: Config, fresh_bases: None
) -> None:
    """On AVX512-BF16 CPUs bitsandbytes' own 4-bit linear repacks in evaluation and then gets gradients wrong."""
    model = quantized_model(kind, checkpoint, config())
    score(model, [None], rows, VERDICTS, TokenBudget(200))  # type: ignore[arg-type]
    ours = gradient(model, rows, config())
    reference = gradient(dense_twin(model), rows, config())
    cosine = torch.nn.functional.cosine_similarity(ours, reference, dim=0)
    assert cosine > 0.9999


@pytest.mark.parametrize("kind", QUANTIZED)
def test_training_lowers_the_loss_and_leaves_the_codes_unchanged(
    kind: QuantizationKind, checkpoint: Path, rows: Rows, config: Config, fresh_bases: None
) -> None:
    settings = config(max_steps=30, rank=8)
    model = quantized_model(kind, checkpoint, settings)
    before = {name: p.frozen.original.weight.data.clone() for name, p in model.host.linears.items()}
    assert all(value.dtype in (torch.uint8, torch.int8) for value in before.values())
    trial = Trial.start(settings, rows, VERDICTS, model)  # type: ignore[arg-type]
    pack = Pack(model, TokenBudget(10**6))
    pack.add(trial)
    losses = [report.loss for _ in range(30) for _, report in pack.step()]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert all(
        torch.equal(model.host.linears[name].frozen.original.weight.data, value) for name, value in before.items()
    )


@pytest.mark.parametrize(("kind", "tolerance"), [*((kind, 1e-5) for kind in QUANTIZED), (QuantizationKind.fp8, 4e-3)])
def test_a_trial_in_a_pack_equals_the_same_alone(
    kind: QuantizationKind, tolerance: float, checkpoint: Path, rows: Rows, config: Config, fresh_bases: None
) -> None:
    """Losses, relative, over 20 steps. FP8 rounds inputs: a sum's last bit can move a number by a whole step of it."""
    configs = [
        config(seed=1, rank=4, dropout=0.1, max_steps=20, learning_rate=1e-3),
        config(seed=2, rank=16, batch_size=1, max_steps=20, learning_rate=1e-3),
        config(seed=3, rank=8, target_modules=["q_proj"], max_steps=10, learning_rate=1e-3),
    ]
    model = quantized_model(kind, checkpoint, configs[0])

    for one, together in zip(configs, train(model, rows, configs), strict=True):
        assert together == pytest.approx(train(model, rows, [one])[0], rel=tolerance)


def test_a_base_is_loaded_once(checkpoint: Path, config: Config, fresh_bases: None) -> None:
    settings = config()
    settings.model = ModelConfig(name="hf", path=str(checkpoint))
    assert load_base(settings) is load_base(settings)


def test_keeping_dense_weights_changes_no_bit(checkpoint: Path, rows: Rows, config: Config, fresh_bases: None) -> None:
    model = quantized_model(QuantizationKind.nf4, checkpoint, config())
    before, scores = gradient(model, rows, config()), score(model, [None], rows, VERDICTS, TokenBudget(10**6))  # type: ignore[arg-type]
    assert model.dense_bytes() == sum(4 * inputs * outputs for inputs, outputs in model.host.shapes.values())
    for wanted in (True, False, True):
        model.keep_dense(wanted)
        assert model.is_dense is wanted
        assert torch.equal(gradient(model, rows, config()), before)
    assert (score(model, [None], rows, VERDICTS, TokenBudget(10**6)) == scores).all()  # type: ignore[arg-type]
