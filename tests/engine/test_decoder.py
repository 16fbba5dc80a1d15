"""The decoder that is written out does what transformers' modules do under autograd, for every architecture it takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mathverify.base import Base
from mathverify.config import LossKind, QuantizationKind, RunConfig
from mathverify.engine.decoder import ARCHITECTURES
from mathverify.engine.evaluate import score
from mathverify.engine.fp8 import quantize_rows, scaled_product
from mathverify.engine.lora import Adapter
from mathverify.engine.model import PackedModel
from mathverify.engine.pack import Pack
from mathverify.engine.passes import TokenBudget
from mathverify.engine.trial import Trial
from mathverify.errors import UserError

from .conftest import VERDICTS, VOCABULARY, Rows, make_config

SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def make(kind: str, fast: bool, quantization: QuantizationKind = QuantizationKind.none, **changes: Any) -> PackedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    extra: dict[str, Any] = {"sliding_window": None} if kind == "mistral" else {}
    base: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SHAPE | extra | changes)))
    for name, value in base.named_parameters():
        if "norm" in name or "bias" in name:
            value.data.normal_(1.0 if "norm" in name else 0.0, 0.1)  # as made they are 1 and 0: nothing would show
    model = PackedModel(
        Base(base.requires_grad_(False).eval(), torch.device("cpu"), torch.float32, "random", quantization)
    )
    assert model.fast is not None
    if not fast:
        model.fast = None
    return model


def adapter_of(trial: Trial) -> Adapter:
    trial.adapter.flat.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    return trial.adapter


def gradient(
    model: PackedModel, rows: Rows, configs: list[RunConfig], budget: int = 10**6
) -> tuple[list[float], list[Adapter]]:
    trials = [Trial.start(config, rows, VERDICTS, model) for config in configs]  # type: ignore[arg-type]
    adapters = [adapter_of(trial) for trial in trials]
    segments = [segment for slot, trial in enumerate(trials) for segment in trial.segments(slot)]
    return Pack(model, TokenBudget(budget))._passes(trials, segments), adapters


def assert_same_gradients(found: list[Adapter], expected: list[Adapter]) -> None:
    """Matrix by matrix: a wrong small one would not show in the whole."""
    for one, other in zip(found, expected, strict=True):
        for name, pair in one.pairs.items():
            for mine, theirs in zip(pair, other.pairs[name], strict=True):
                assert mine.grad is not None and theirs.grad is not None
                assert float((mine.grad - theirs.grad).norm()) <= 2e-5 * float(theirs.grad.norm()), name


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
@pytest.mark.parametrize("loss", list(LossKind))
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dropout": 0.3},
        {"target_modules": ["v_proj", "q_proj"], "alpha": 3.0},
        {"target_modules": ["down_proj", "up_proj", "k_proj"], "dropout": 0.1, "rslora": True},
    ],
)
def test_gradients_equal_transformers_under_autograd(
    rows: Rows, kind: str, loss: LossKind, changes: dict[str, Any]
) -> None:
    configs = [
        make_config(loss=loss, **changes),
        make_config(seed=1, loss=loss, rank=7, batch_size=1),
        make_config(seed=2, loss=loss, target_modules=["o_proj", "gate_proj"], dropout=0.2),
    ]
    losses, found = gradient(make(kind, fast=True), rows, configs, budget=70)
    expected_losses, expected = gradient(make(kind, fast=False), rows, configs)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_scores_equal_transformers(rows: Rows, kind: str) -> None:
    fast, plain = make(kind, fast=True), make(kind, fast=False)
    adapter = adapter_of(Trial.start(make_config(), rows, VERDICTS, fast))  # type: ignore[arg-type]
    found, expected = (
        score(model, [adapter, None], rows, VERDICTS, TokenBudget(90))  # type: ignore[arg-type]
        for model in (fast, plain)
    )
    assert np.abs(found - expected).max() < 1e-5
    assert np.abs(expected[0] - expected[1]).max() > 1e-3


def test_a_base_of_one_layer_works(rows: Rows) -> None:
    """The first layer is the last one, too."""
    _, found = gradient(make("llama", fast=True, num_hidden_layers=1), rows, [make_config()])
    _, expected = gradient(make("llama", fast=False, num_hidden_layers=1), rows, [make_config()])
    assert_same_gradients(found, expected)


def test_recomputed_activations_give_the_same_bits(rows: Rows) -> None:
    kept, lean = make("llama", fast=True), make("llama", fast=True)
    lean.recompute_activations(True)
    _, (one,) = gradient(kept, rows, [make_config(dropout=0.2)])
    _, (other,) = gradient(lean, rows, [make_config(dropout=0.2)])
    assert torch.equal(one.grad, other.grad)


def test_a_base_is_not_held_twice() -> None:
    model = make("llama", fast=True)
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for group in model.fast.groups  # type: ignore[union-attr]
        for tensor in (group.frozen.dense(torch.float32), *(one.original.weight for one in group.frozen.linears))
    }
    needed = sum(4 * one.frozen.in_features * one.frozen.out_features for one in model.host.linears.values())
    assert sum(held.values()) == needed


def test_other_architectures_run_through_transformers(rows: Rows) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    base: Any = GPTNeoXForCausalLM(GPTNeoXConfig(**shape, intermediate_size=64, max_position_embeddings=128))
    model = PackedModel(Base(base.requires_grad_(False).eval(), torch.device("cpu"), torch.float32, "random"))
    assert model.fast is None
    config = make_config(target_modules=["query_key_value"], max_steps=4)
    losses, (adapter,) = gradient(model, rows, [config])
    assert np.isfinite(losses[0])
    assert float(adapter.grad.norm()) > 0
    with pytest.raises(UserError, match="fp8 is not there for gpt_neox"):
        PackedModel(Base(base, torch.device("cpu"), torch.float32, "random", QuantizationKind.fp8))


def test_fp8_keeps_three_bits_of_mantissa_and_the_zero() -> None:
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 40)[:, None]
    x[3] = 0.0
    codes, scales = quantize_rows(x)
    back = codes.float() * scales[:, None]
    assert torch.equal(back[3], torch.zeros(64))
    # Half a step of three mantissa bits, or, below 2^-6 of the largest code, half a subnormal step.
    bound = torch.maximum(x.abs() / 16, scales[:, None] * 2**-10)
    assert bool(((back - x).abs() <= bound * 1.001).all())


def test_fp8_products_are_those_of_the_codes() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(9, 64, generator=generator), torch.randn(33, 64, generator=generator)
    (x_codes, x_scales), (w_codes, w_scales) = quantize_rows(x), quantize_rows(w)
    dense = (x_codes.double() * x_scales[:, None]) @ (w_codes.double() * w_scales[:, None]).t()
    assert torch.allclose(scaled_product(x, w_codes, w_scales).double(), dense, rtol=1e-5, atol=1e-5)
    alone = torch.cat([scaled_product(row[None], w_codes, w_scales) for row in x])
    assert torch.allclose(alone, scaled_product(x, w_codes, w_scales), rtol=1e-6, atol=1e-6)


def test_an_fp8_base_follows_the_dense_one(rows: Rows) -> None:
    losses, (found,) = gradient(make("llama", fast=True, quantization=QuantizationKind.fp8), rows, [make_config()])
    expected_losses, (expected,) = gradient(make("llama", fast=True), rows, [make_config()])
    assert losses[0] == pytest.approx(expected_losses[0], abs=0.02)
    assert losses[0] != expected_losses[0]
    assert float(torch.nn.functional.cosine_similarity(found.grad, expected.grad, dim=0)) > 0.99


def test_an_fp8_base_generates_with_its_own_weights(rows: Rows) -> None:
    """What generation runs through, transformers' modules, multiplies with the same codes made dense."""
    model = make("llama", fast=True, quantization=QuantizationKind.fp8)
    dense = make("llama", fast=True)
    for name, packed in model.host.linears.items():
        assert packed.frozen.is_quantized
        x = torch.randn(3, packed.frozen.in_features)
        reference = dense.host.linears[name].frozen(x)
        assert float((packed.frozen(x) - reference).norm()) < 0.05 * float(reference.norm())
