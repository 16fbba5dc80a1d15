"""The same properties on a CUDA device: the CPU's results are the reference. Skipped where there is none."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mathverify.base import Base, load_base
from mathverify.config import LossKind, ModelConfig, OptimizerKind, QuantizationConfig, QuantizationKind, RunConfig
from mathverify.engine.evaluate import score
from mathverify.engine.model import PackedModel
from mathverify.engine.pack import Pack
from mathverify.engine.passes import TokenBudget
from mathverify.engine.trial import Trial, TrialState

from .conftest import VERDICTS, Rows, llama, random_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
Config = Callable[..., RunConfig]


def on_gpu(dtype: torch.dtype = torch.bfloat16) -> PackedModel:
    return PackedModel(Base(llama(dtype).cuda(), torch.device("cuda:0"), dtype, "random"))


def train(model: PackedModel, rows: Rows, configs: list[RunConfig], budget: int = 10**6) -> list[Trial]:
    pack = Pack(model, TokenBudget(budget))
    trials = [Trial.start(config, rows, VERDICTS, model) for config in configs]  # type: ignore[arg-type]
    for trial in trials:
        pack.add(trial)
    while pack.running:
        pack.step()
    return trials


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double().cpu(), b.double().cpu(), dim=0))


def gradient(model: PackedModel, rows: Rows, config: RunConfig, budget: int = 10**6) -> torch.Tensor:
    trial = Trial.start(config, rows, VERDICTS, model)  # type: ignore[arg-type]
    trial.adapter.flat.data.copy_(
        torch.randn(trial.adapter.flat.shape, generator=torch.Generator().manual_seed(1)) / 20
    )
    pack = Pack(model, TokenBudget(budget))
    pack._passes([trial], trial.segments(0))
    return trial.adapter.grad.clone() / trial.loss_scale


@pytest.mark.parametrize("loss", list(LossKind))
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_float32_gradients_equal_the_cpus(rows: Rows, config: Config, loss: LossKind, dropout: float) -> None:
    cpu = PackedModel(Base(llama(), torch.device("cpu"), torch.float32, "random"))
    settings = config(loss=loss, dropout=dropout)
    assert cosine(gradient(on_gpu(torch.float32), rows, settings), gradient(cpu, rows, settings)) > 0.99999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("budget", [10**6, 60])
def test_half_precision_gradients_follow_float32(rows: Rows, config: Config, dtype: torch.dtype, budget: int) -> None:
    """Through torch's variable-length attention, which float32 does not use."""
    reference = gradient(on_gpu(torch.float32), rows, config())
    assert cosine(gradient(on_gpu(dtype), rows, config(), budget), reference) > 0.999


def test_scores_do_not_depend_on_the_cutting(rows: Rows) -> None:
    model = on_gpu()
    whole = score(model, [None], rows, VERDICTS, TokenBudget(10**6))  # type: ignore[arg-type]
    singly = score(model, [None], rows, VERDICTS, TokenBudget(1))  # type: ignore[arg-type]
    reference = score(on_gpu(torch.float32), [None], rows, VERDICTS, TokenBudget(10**6))  # type: ignore[arg-type]
    rounding = np.abs(whole - reference).max()
    assert np.abs(whole - singly).max() <= rounding


@pytest.mark.parametrize("kind", list(QuantizationKind))
@pytest.mark.parametrize("optimizer", list(OptimizerKind))
def test_every_quantization_and_optimizer_trains(
    kind: QuantizationKind, optimizer: OptimizerKind, rows: Rows, config: Config, tmp_path: Path, fresh_bases: None
) -> None:
    llama().save_pretrained(tmp_path)
    settings = config(max_steps=40, rank=16)
    settings.device, settings.model = "cuda:0", ModelConfig(name="hf", path=str(tmp_path))
    settings.quantization, settings.optimizer.kind = QuantizationConfig(kind=kind), optimizer
    model = PackedModel(load_base(settings))
    trial = Trial.start(settings, rows, VERDICTS, model)  # type: ignore[arg-type]
    pack = Pack(model, TokenBudget(10**6))
    pack.add(trial)
    losses = [report.loss for _ in range(40) for _, report in pack.step()]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_a_trial_in_a_bf16_pack_ends_near_where_it_ends_alone(rows: Rows, config: Config) -> None:
    """bf16 products of other shapes round differently; after 20 steps adapters still point the same way."""
    model = on_gpu()
    configs = [
        config(seed=1, rank=4, dropout=0.1, max_steps=20, learning_rate=1e-3),
        config(seed=2, rank=16, batch_size=1, max_steps=20, learning_rate=1e-3),
        config(seed=3, rank=8, target_modules=["q_proj"], max_steps=10, learning_rate=1e-3),
    ]
    together = [trial.adapter.flat.clone() for trial in train(model, rows, configs)]
    for settings, packed in zip(configs, together, strict=True):
        (alone,) = train(model, rows, [settings])
        assert alone.state is TrialState.finished
        assert cosine(packed, alone.adapter.flat) > 0.999


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_recorded_run_has_the_bits_of_a_launched_one(
    rows: Rows, config: Config, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA graphs of passes against the same launches one by one, with scoring in between."""
    from mathverify.engine import replay

    model = on_gpu()
    settings = config(max_steps=30, dropout=dropout, max_grad_norm=0.5, rank=8)
    replayed: list[int] = []
    usual = torch.cuda.CUDAGraph.replay

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        replayed.append(1)
        usual(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)

    def run() -> tuple[torch.Tensor, np.ndarray]:
        pack = Pack(model, TokenBudget(10**6))
        trial = Trial.start(settings, rows, VERDICTS, model)  # type: ignore[arg-type]
        pack.add(trial)
        for _ in range(30):
            pack.step()
            scores = score(model, [trial.adapter], rows, VERDICTS, TokenBudget(200))  # type: ignore[arg-type]
        return trial.adapter.flat.clone(), scores

    adapter, scores = run()
    assert len(replayed) > 10
    replayed.clear()
    monkeypatch.setattr(replay, "Recorder", lambda device: lambda work: work)
    launched, launched_scores = run()
    assert not replayed
    assert torch.equal(adapter, launched)
    assert np.array_equal(scores, launched_scores)


def test_a_recorded_run_ends_near_one_without_rounding(
    rows: Rows, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, settings = on_gpu(), config(max_steps=30, rank=8, learning_rate=1e-3)
    (recorded,) = train(model, rows, [settings])
    monkeypatch.setattr(PackedModel, "replays", False)
    (plain,) = train(model, rows, [settings])
    assert cosine(recorded.adapter.flat, plain.adapter.flat) > 0.999


def test_work_that_cannot_be_recorded_leaves_torch_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from mathverify.engine import replay
    from mathverify.engine.layout import PassLayout, Segment

    monkeypatch.setattr(replay, "_cannot", set())
    device = torch.device("cuda:0")
    replays = replay.Replays(device)

    def waits(layout: PassLayout) -> torch.Tensor:
        float(layout.weights.sum())
        return layout.weights * 2

    for _ in range(4):
        found = replays.losses([Segment(np.arange(9, dtype=np.int32), True, weight=0.5)], waits)
        assert found.tolist() == [1.0]
    assert replays.did == {"launched": 4}
    assert device in replay._cannot
    cached = torch.empty(2**26, device=device)
    del cached
    before = torch.cuda.memory_reserved()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before - 2**28
    assert torch.rand(5, device=device).isfinite().all()


def test_kernels_equal_their_definitions_in_torch() -> None:
    """Each Triton kernel against the torch function of the same name, at odd sizes, in both number formats."""
    from mathverify.engine import elementwise as ew

    def both(work: Callable[..., object], *tensors: torch.Tensor, **options: object) -> None:
        on_cpu = [t.clone() for t in tensors]
        on_gpu = [t.cuda() for t in tensors]
        found, expected = work(*on_gpu, **options), work(*on_cpu, **options)
        pairs = list(zip(on_gpu, on_cpu, strict=True))
        returned: list[tuple[torch.Tensor, torch.Tensor]] = []
        if found is not None:
            made = ((t,) if isinstance(t, torch.Tensor) else t for t in (found, expected))
            returned = list(zip(*made, strict=True))
        for mine, theirs in [*pairs, *returned]:
            scale = theirs.float().abs().max() + 1e-6
            tolerance = 1e-5 if theirs.dtype is torch.float32 else 2**-7
            assert float((mine.float().cpu() - theirs.float()).abs().max() / scale) < tolerance, work

    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(0)

        def rand(*shape: int, dtype: torch.dtype = dtype, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        weight = rand(96) + 1
        both(ew.add_norm, rand(7, 96), rand(7, 96), weight, eps=1e-5)
        both(ew.norm_grad, rand(7, 96), rand(7, 96), rand(7, dtype=torch.float32).abs() + 0.5, weight, rand(7, 96))
        angles = torch.randn(7, 8, generator=generator).repeat(1, 2)
        for inverse in (False, True):
            both(ew.rotate, rand(7, 5, 16), angles.cos(), angles.sin(), inverse=inverse)
        both(ew.swiglu, rand(7, 2 * 3000))
        both(ew.swiglu_grad, rand(7, 3000), rand(7, 2 * 3000))


def test_8_bit_adamw_steps_as_bitsandbytes() -> None:
    """Codes differ where a number lies half way between two. Then parameters differ by less than a step."""
    from bitsandbytes.optim.adamw import AdamW8bit

    from mathverify.engine.adamw_8bit import FusedAdamW8bit

    torch.manual_seed(0)
    size, rate = 256 * 1000 + 77, 1e-3
    start = torch.randn(size, device="cuda") / 50
    theirs, ours = (torch.nn.Parameter(start.clone()) for _ in range(2))
    options: dict[str, Any] = {"lr": rate, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    optimizers = [AdamW8bit([theirs], **options), FusedAdamW8bit([ours], **options)]
    for step in range(5):
        theirs.grad = ours.grad = torch.randn(size, device="cuda") / 100 * (step != 2)
        for optimizer in optimizers:
            optimizer.step()
        different = (theirs - ours).detach().abs()
        assert float((different > 0.01 * rate).double().mean()) < 1e-3
        assert float(different.max()) < rate
        for code in ("state1", "state2"):
            a, b = (o.state[p][code] for o, p in zip(optimizers, (theirs, ours), strict=True))
            assert float((a != b).double().mean()) < 1e-3
    assert float((theirs - start).detach().abs().mean()) > rate


def test_fp8_products_on_the_matrix_units_equal_those_of_the_codes() -> None:
    from mathverify.engine.fp8 import quantize_rows, scaled_product

    x = torch.randn(50, 256, device="cuda", dtype=torch.bfloat16) * torch.logspace(-3, 3, 50, device="cuda")[:, None]
    w = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    for tensor in (x, w):
        found, expected = quantize_rows(tensor.to(torch.bfloat16)), quantize_rows(tensor.to(torch.bfloat16).cpu())
        assert torch.allclose(found[1].cpu(), expected[1])
        assert float((found[0].float().cpu() != expected[0].float()).float().mean()) < 0.01  # ties may round either way
    codes, scales = quantize_rows(w)
    on_gpu = scaled_product(x.to(torch.bfloat16), codes, scales).cpu().float()
    on_cpu = scaled_product(x.to(torch.bfloat16).cpu(), codes.cpu(), scales.cpu()).float()
    assert float((on_gpu - on_cpu).norm() / on_cpu.norm()) < 0.01


def test_grouped_products_equal_the_loop(rows: Rows, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixed ranks, targets, scales and dropout; a trial without rows in some passes; the bare base beside adapters."""
    from mathverify.engine import model as engine_model
    from mathverify.engine.products import LoopWeights

    model = on_gpu()
    configs = [
        config(seed=1, rank=5, dropout=0.2, alpha=3.0),
        config(seed=2, rank=16, batch_size=1),
        config(seed=3, rank=8, target_modules=["q_proj", "down_proj"], dropout=0.1, rslora=True),
    ]

    def gradients(budget: int) -> list[torch.Tensor]:
        trials = [Trial.start(settings, rows, VERDICTS, model) for settings in configs]  # type: ignore[arg-type]
        for trial in trials:
            trial.adapter.flat.data.normal_(0, 0.05, generator=torch.Generator("cuda").manual_seed(1))
        segments = [segment for slot, trial in enumerate(trials) for segment in trial.segments(slot)]
        Pack(model, TokenBudget(budget))._passes(trials, segments)
        scores = score(model, [None, *(t.adapter for t in trials)], rows, VERDICTS, TokenBudget(300))  # type: ignore[arg-type]
        return [trial.adapter.grad.clone() for trial in trials] + [torch.from_numpy(scores)]

    grouped = [gradients(budget) for budget in (10**6, 60)]
    monkeypatch.setattr(engine_model, "weights_of", lambda adapters, dtype, device: LoopWeights(adapters, dtype))
    looped = [gradients(budget) for budget in (10**6, 60)]
    for one, other in zip(grouped, looped, strict=True):
        for mine, theirs in zip(one[:-1], other[:-1], strict=True):
            assert cosine(mine, theirs) > 0.9995
        assert float((one[-1] - other[-1]).abs().max()) < 0.05


def test_the_fast_decoder_follows_transformers(rows: Rows, config: Config) -> None:
    fast, plain = on_gpu(), on_gpu()
    plain.fast = None
    for loss in LossKind:
        assert cosine(gradient(fast, rows, config(loss=loss)), gradient(plain, rows, config(loss=loss))) > 0.999


def test_a_real_out_of_memory_halves_the_budget_and_changes_nothing_else(config: Config) -> None:
    model = on_gpu(torch.float32)
    rows = random_rows(64, low=100, high=120)
    settings = config(batch_size=16, grad_accumulation=4, max_steps=2)
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    (calm,) = train(model, rows, [settings])
    peak = torch.cuda.max_memory_allocated() - before
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + peak * 0.6) / total)
    try:
        pack = Pack(model, TokenBudget(10**6))
        pressed = Trial.start(settings, rows, VERDICTS, model)  # type: ignore[arg-type]
        pack.add(pressed)
        while pack.running:
            pack.step()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert pack.budget.tokens < 64 * 120
    assert cosine(pressed.adapter.flat, calm.adapter.flat) > 0.99999
