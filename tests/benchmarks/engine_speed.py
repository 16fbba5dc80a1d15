"""Speed and memory of the engine on one GPU: Llama-3.1-8B's shape, random weights, verification-like lengths.

python -m tests.benchmarks.engine_speed --out OUT [--tiny]     one command, writes OUT/engine_speed.json and a table

Lengths are log-normal (median 320, sigma 0.45, 64 to 2048 tokens), 16 examples a step unless a row says otherwise.
Only ratios between rows of one run of this command mean anything.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from mathverify.base import Base
from mathverify.config import LoraConfig, MemoryMode, OptimizerConfig, OptimizerKind, RunConfig, TrainConfig
from mathverify.engine.budget import plan_budget
from mathverify.engine.evaluate import score
from mathverify.engine.kernels import use_liger
from mathverify.engine.model import PackedModel
from mathverify.engine.pack import Pack
from mathverify.engine.passes import TokenBudget
from mathverify.engine.trial import Trial

VERDICTS = SimpleNamespace(true_id=5, false_id=6)


class Workload:
    """Random rows of verification-like lengths; stands in for a token store."""

    def __init__(self, rows: int, vocabulary: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        lengths = (
            torch.exp(torch.randn(rows, generator=generator) * 0.45 + math.log(320)).round().long().clamp(64, 2048)
        )
        self.rows = [torch.randint(10, vocabulary, (int(n),), generator=generator).int().numpy() for n in lengths]
        self.lengths = np.array([len(row) for row in self.rows], dtype=np.int32)
        self.labels = np.arange(rows) % 2 == 0

    def ids(self, row: int) -> np.ndarray:
        return self.rows[row]

    def __len__(self) -> int:
        return len(self.rows)


def llama(tiny: bool, device: str, nf4: bool) -> Any:
    """A random Llama of the 8B's shape (or a small one), its decoder linears in NF4 with double quantization if asked."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = (
        {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}
        if tiny
        else {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 8}
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model: Any = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=4096))
    torch.set_default_dtype(torch.float32)
    model.requires_grad_(False).eval()
    if nf4:
        from bitsandbytes.nn.modules import Linear4bit, Params4bit

        for name, linear in list(model.model.named_modules()):
            if isinstance(linear, torch.nn.Linear):
                small = Linear4bit(
                    linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
                small.weight = Params4bit(
                    linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
                )
                parent, _, attribute = name.rpartition(".")
                setattr(model.model.get_submodule(parent), attribute, small.to(device))
    return model


def config(
    batch: int, accumulation: int, rank: int = 64, seed: int = 0, memory: MemoryMode = MemoryMode.auto
) -> RunConfig:
    return RunConfig(
        lora=LoraConfig(rank=rank, alpha=64),
        optimizer=OptimizerConfig(kind=OptimizerKind.adamw_8bit, learning_rate=2e-4),
        train=TrainConfig(batch_size=batch, grad_accumulation=accumulation, max_steps=10**6, memory=memory),
        seed=seed,
    )


def measure(
    model: PackedModel, configs: list[RunConfig], rows: Workload, steps: int, warm: int = 3
) -> dict[str, float]:
    """Seconds a round and real tokens a second of a pack of these configs, and the peak memory of training it."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    # As asked, so that the planner does not keep dense weights by itself: each row says what it measures.
    asked = replace(configs[0], train=replace(configs[0].train, token_budget=32768))
    plan = plan_budget(model, asked, 2048)
    pack = Pack(model, TokenBudget(plan.tokens))
    for own in configs:
        pack.add(Trial.start(own, rows, VERDICTS, model))  # type: ignore[arg-type]
    times, tokens, most = [], 0, 0
    for step in range(warm + steps):
        start = time.perf_counter()
        reports = pack.step()
        torch.cuda.synchronize()
        most = max(most, sum(report.tokens for _, report in reports))
        if step >= warm:
            times.append(time.perf_counter() - start)
            tokens += sum(report.tokens for _, report in reports)
    peak = torch.cuda.max_memory_allocated() / 2**30
    print("   ", plan.text, flush=True)
    del pack
    gc.collect()
    return {
        "step_s": sum(times) / steps,
        "tokens_per_s": tokens / sum(times),
        "peak_gib": peak,
        "most_tokens_a_round": most,
    }


def evaluation(model: PackedModel, rows: Workload) -> dict[str, float]:
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    score(model, [None], rows, VERDICTS, TokenBudget(32768))  # type: ignore[arg-type]
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {"tokens_per_s": float(rows.lengths.sum()) / seconds, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def ceiling() -> dict[str, float]:
    """bf16 TFLOP/s of a large product on random data: what the chip gives at most."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        a @ b
    torch.cuda.synchronize()
    return {"tflops": 2 * 8192**3 * 10 / (time.perf_counter() - start) / 1e12}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the command")
    parser.add_argument("--steps", type=int, default=15)
    options = parser.parse_args()
    results: dict[str, dict[str, float]] = {}

    def note(name: str, work: Callable[[], dict[str, float]]) -> None:
        try:
            results[name] = work()
        except Exception as error:  # one row's failure must not lose the others
            results[name] = {}
            print(f"{name}: failed: {type(error).__name__}: {str(error)[:300]}", flush=True)
        print(f"{name:44s}", {key: round(value, 3) for key, value in results[name].items()}, flush=True)
        (options.out / "engine_speed.json").write_text(
            json.dumps({"device": name_of_device(), "rows": results}, indent=1)
        )

    note("ceiling", ceiling)
    start = time.perf_counter()
    model = PackedModel(Base(llama(options.tiny, "cuda", nf4=True), torch.device("cuda:0"), torch.bfloat16, "random"))
    print(f"model ready in {time.perf_counter() - start:.1f} s", flush=True)
    rows = Workload(2000, 512 if options.tiny else 128256)
    one = [config(4, 4)]
    eight = [config(4, 1, seed=seed) for seed in range(8)]
    small = Workload(200, 512 if options.tiny else 128256, seed=1)
    note("one run, r64, 16 examples", lambda: measure(model, one, rows, options.steps))
    note("evaluation, nf4", lambda: evaluation(model, small))
    note("one run, lean", lambda: measure(model, [config(4, 4, memory=MemoryMode.lean)], rows, 5))
    if use_liger(model):
        note("one run, liger", lambda: measure(model, one, rows, options.steps))
    model.keep_dense()
    note("one run, dense weights kept", lambda: measure(model, one, rows, options.steps))
    note("evaluation, dense weights kept", lambda: evaluation(model, small))
    note("one trial of batch 4", lambda: measure(model, eight[:1], rows, options.steps))
    note("pack of 8 trials of batch 4", lambda: measure(model, eight, rows, options.steps))


def name_of_device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main()
