"""Speed, memory and numerics of the engine on one GPU: Llama-3.1-8B's shape, random weights, verification-like lengths.

python -m tests.benchmarks.gpu --out OUT [--peers FOLDER] [--only NAME ...] [--tiny]

One command writes OUT/gpu.json and OUT/gpu.md: date, hardware, and a table whose ratios are between rows of this very
run. --peers: a folder with common.py, peer_trl.py and peer_unsloth.py, other trainers on the same work, run beside.
Lengths are log-normal (median 320, sigma 0.45, 64 to 2048 tokens), LoRA r64 on all seven linears, AdamW 8-bit.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from mathverify.base import Base
from mathverify.config import (
    LoraConfig,
    MemoryMode,
    OptimizerConfig,
    OptimizerKind,
    QuantizationKind,
    RunConfig,
    TrainConfig,
)
from mathverify.engine.budget import Lengths, peak_bytes, plan_budget
from mathverify.engine.evaluate import score
from mathverify.engine.generate import generate_verdicts
from mathverify.engine.model import PackedModel
from mathverify.engine.pack import Pack
from mathverify.engine.passes import TokenBudget
from mathverify.engine.ranks import place
from mathverify.engine.trial import Trial

VERDICTS: Any = SimpleNamespace(true_id=5, false_id=6)
GIB = 2**30

WARM, RECORDED = 8, 80
"""Untimed steps: until torch's allocator has seen most sizes, which a run of hundreds of steps does not notice; and until
most sizes of small passes have been recorded (engine/replay.py)."""

Row = dict[str, float]


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

    def ids(self, row: int) -> Any:
        return self.rows[row]

    def __len__(self) -> int:
        return len(self.rows)


def llama(tiny: bool, nf4: bool) -> Any:
    """A random Llama of the 8B's shape (or a small one), its linears in NF4 with double quantization if asked."""
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
    with torch.device(device()):
        model: Any = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=4096))
    torch.set_default_dtype(torch.float32)
    model.requires_grad_(False).eval()
    # As made, the first layers drown the embedding and 32 layers amplify any rounding beyond recognition. Scaled like
    # this (GPT-2's rule for residual branches) a signal passes through as in a trained model, which numerics needs.
    model.model.embed_tokens.weight.data.mul_(50.0)
    for layer in model.model.layers:
        for branch in (layer.self_attn.o_proj, layer.mlp.down_proj):
            branch.weight.data.mul_((2 * len(model.model.layers)) ** -0.5)
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
                setattr(model.model.get_submodule(parent), attribute, small.to(device()))
    return model


def base(tiny: bool, kind: QuantizationKind) -> PackedModel:
    """The same random weights, stored as `kind`."""
    model = llama(tiny, kind is QuantizationKind.nf4)
    quantization = kind if kind is QuantizationKind.fp8 else QuantizationKind.none
    packed = PackedModel(Base(model, torch.device(device()), torch.bfloat16, "random", quantization))
    clean()
    return packed


def config(batch: int, accumulation: int, seed: int = 0, **train: Any) -> RunConfig:
    return RunConfig(
        lora=LoraConfig(rank=64, alpha=64),
        optimizer=OptimizerConfig(kind=OptimizerKind.adamw_8bit, learning_rate=2e-4),
        train=TrainConfig(batch_size=batch, grad_accumulation=accumulation, max_steps=10**6, **train),
        seed=seed,
    )


def measure(model: PackedModel, configs: list[RunConfig], rows: Workload, steps: int, warm: int = WARM) -> Row:
    """A pack of these configs: seconds a round, real tokens a second, peak memory, and what the planner said of it."""
    clean()
    plan = plan_budget(model, configs, Lengths.of(rows.lengths))
    print("   ", plan.text, flush=True)
    clean()
    pack = Pack(model, TokenBudget(plan.tokens, plan.held))
    for own in configs:
        pack.add(Trial.start(own, rows, VERDICTS, model))  # type: ignore[arg-type]
    times, tokens, largest = [], 0, 0
    before = did(pack)
    for step in range(warm + steps):
        if step == warm:
            before = did(pack)
        start = time.perf_counter()
        done = sum(report.tokens for _, report in pack.step())
        synchronize()
        largest = max(largest, min(done, plan.tokens))
        if step >= warm:
            times.append(time.perf_counter() - start)
            tokens += done
    held, passes = 0 if pack.replays is None else pack.replays.held, did(pack)
    peak = peak_bytes(device()) if torch.cuda.is_available() else 0
    predicted = plan.fixed_bytes + (max(largest, held) + held) * plan.token_bytes
    del pack
    return {
        "step_s": sum(times) / steps,
        "tokens_per_s": tokens / sum(times),
        "peak_gib": peak / GIB,
        "planned_gib": predicted / GIB,
        "planned_over_measured": predicted / peak if peak else 0.0,
        **{f"passes_{what}": count - before[what] for what, count in passes.items()},
    }


def did(pack: Pack) -> Counter[str]:
    """How many small passes this process has launched, recorded and replayed so far."""
    return Counter() if pack.replays is None else Counter(pack.replays.did)


def evaluation(model: PackedModel, rows: Workload, budget: int = 32768) -> Row:
    clean()
    score(model, [None], rows, VERDICTS, TokenBudget(budget))  # type: ignore[arg-type]
    synchronize()
    start = time.perf_counter()
    score(model, [None], rows, VERDICTS, TokenBudget(budget))  # type: ignore[arg-type]
    synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0
    return {"tokens_per_s": float(rows.lengths.sum()) / seconds, "seconds": seconds, "peak_gib": peak}


def generation(model: PackedModel, rows: Workload) -> Row:
    """The mission's way on the same rows: up to 64 new tokens each, greedily, then a look at the text."""
    clean()
    tokenizer: Any = SimpleNamespace(pad_token_id=0, eos_token_id=2, batch_decode=lambda ids, **k: [""] * len(ids))
    start = time.perf_counter()
    generate_verdicts(model, None, rows, tokenizer, 64, TokenBudget(32768))  # type: ignore[arg-type]
    synchronize()
    seconds = time.perf_counter() - start
    return {"tokens_per_s": float(rows.lengths.sum()) / seconds, "seconds": seconds}


def gradient(model: PackedModel, rows: Workload) -> tuple[float, torch.Tensor]:
    """Loss and adapter gradient of one step, with an adapter that is not at its start."""
    trial = Trial.start(config(4, 4), rows, VERDICTS, model)  # type: ignore[arg-type]
    trial.adapter.flat.data.add_(
        torch.randn(trial.adapter.flat.shape, generator=torch.Generator(device()).manual_seed(1), device=device()) / 200
    )
    loss = Pack(model, TokenBudget(8192))._passes([trial], trial.segments(0))[0]
    return loss, trial.adapter.grad.cpu()


def ceiling() -> Row:
    """What the chip gives at most: bf16 TFLOP/s of a large product, TB/s of a large copy, on random data."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    big = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(big)
    product, copy = seconds_of(lambda: a @ b), seconds_of(lambda: other.copy_(big))
    return {"tflops": 2 * 8192**3 / product / 1e12, "copy_tb_s": 2 * big.numel() / copy / 1e12}


def sustained(rows: int = 5300) -> Row:
    """What the base's own products alone give for longer than a moment: all of a layer's, forward and input gradient,
    one after another for seconds, at the number of rows of a usual step. The bound is tokens/s if nothing else took time.
    """
    shapes = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
    weights = [torch.randn(out, into, device="cuda", dtype=torch.bfloat16) / 64 for out, into in shapes]
    inputs = [torch.randn(rows, into, device="cuda", dtype=torch.bfloat16) for _, into in shapes]
    grads = [torch.randn(rows, out, device="cuda", dtype=torch.bfloat16) for out, _ in shapes]

    def layer() -> None:
        for weight, x, grad in zip(weights, inputs, grads, strict=True):
            torch.mm(x, weight.t())
            torch.mm(grad, weight)

    flop = sum(4 * rows * out * into for out, into in shapes)
    rate = flop / seconds_of(layer, times=300)
    per_token = 31.04 * flop / rows  # of the last layer only keys and values are needed for every token
    return {"tflops": rate / 1e12, "bound_tokens_per_s": rate / per_token}


def seconds_of(work: Callable[[], object], times: int = 10) -> float:
    for _ in range(3):
        work()
    synchronize()
    start = time.perf_counter()
    for _ in range(times):
        work()
    synchronize()
    return (time.perf_counter() - start) / times


def profile(model: PackedModel, configs: list[RunConfig], rows: Workload) -> None:
    """Where the time of a round goes, by kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    pack = Pack(model, TokenBudget(32768))
    for own in configs:
        pack.add(Trial.start(own, rows, VERDICTS, model))  # type: ignore[arg-type]
    pack.step()
    pack.step()
    with profiled(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        pack.step()
        synchronize()
    print(seen.key_averages().table(sort_by="self_cuda_time_total", row_limit=32, max_name_column_width=90), flush=True)


def peers(folder: Path, steps: int, most_seconds: float) -> Iterator[tuple[str, Row]]:
    """Other trainers, each in a process of its own; the fastest settings first."""
    with tempfile.TemporaryDirectory() as own:
        small = small_steps(folder / "peer_unsloth.py", Path(own))
        for arguments in (
            ["common.py"],  # makes the checkpoint that the others load
            ["peer_unsloth.py", str(steps), "none"],
            [str(small), str(2 * steps), "none"],
            ["peer_trl.py", str(steps), "nockpt"],
            ["peer_unsloth.py", str(steps), "unsloth"],
            ["peer_trl.py", str(steps), "ckpt"],
        ):
            for line in peer_results(folder, arguments, most_seconds):
                result = json.loads(line)
                name = "peer " + result.pop("bench") + (SMALL_STEPS if arguments[0] == str(small) else "")
                yield name, {"tokens_per_s" if k == "real_tokens_per_s" else k: v for k, v in result.items()}


SMALL_STEPS = ", 4 examples a step"


def small_steps(script: Path, folder: Path) -> Path:
    """The peer's script with 4 examples a step instead of 16: what a trial of batch 4 is alone."""
    text = script.read_text()
    for before, after in (("gradient_accumulation_steps=4", "gradient_accumulation_steps=1"), ("16 *", "4 *")):
        assert before in text, f"{script}: no {before!r} in it"
        text = text.replace(before, after)
    changed = folder / script.name
    changed.write_text(text)
    return changed


def peer_results(folder: Path, arguments: list[str], most_seconds: float) -> list[str]:
    """The result lines of one script; what goes wrong is printed."""
    environment = {k: v for k, v in os.environ.items() if k != "OUT"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder.resolve()), environment.get("PYTHONPATH", "")])
    log, start = "", time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=most_seconds,
            env=environment,
        )
        log, end = done.stdout, f"ended with {done.returncode}"
    except subprocess.TimeoutExpired as late:
        log, end = (late.stdout or b"").decode(errors="replace"), "took too long"
    print(f"{arguments} {end} after {time.perf_counter() - start:.0f} s", flush=True)
    lines = [line.removeprefix("RESULT ") for line in log.splitlines() if line.startswith("RESULT ")]
    if not lines:
        print(log[-1500:], flush=True)
    return lines


class Report:
    """Results as they come: printed, and written so that a cut-short run keeps what it has."""

    def __init__(self, out: Path, command: str) -> None:
        self.out = out
        self.rows: dict[str, Row] = {}
        self.head = {
            "date": datetime.now(UTC).date().isoformat(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "torch": torch.__version__,
            "command": command,
        }

    def note(self, name: str, work: Callable[[], Row]) -> None:
        start = time.perf_counter()
        try:
            self.rows[name] = {key: round(value, 5) for key, value in work().items()}
        except Exception as error:  # one row's failure must not lose the others
            self.rows[name] = {}
            print(f"{name}: failed: {type(error).__name__}: {str(error)[:500]}", flush=True)
        print(f"{name:40s} {self.rows[name]}  ({time.perf_counter() - start:.1f} s)", flush=True)
        (self.out / "gpu.json").write_text(json.dumps(self.head | {"rows": self.rows}, indent=1))

    def get(self, name: str, key: str) -> float:
        return float(self.rows.get(name, {}).get(key, math.nan))

    def table(self) -> str:
        """Markdown: every row, then the ratios between them."""
        best_peer = max((r.get("tokens_per_s", 0.0) for n, r in self.rows.items() if n.startswith("peer ")), default=0)
        small = max((r.get("tokens_per_s", 0.0) for n, r in self.rows.items() if n.endswith(SMALL_STEPS)), default=0)
        pack, first, alone = (self.get(name, "tokens_per_s") for name in (PACK, ALONE_FIRST, ALONE))
        ratios = {
            "one run against the best peer of this run": _over(self.get(ONE, "tokens_per_s"), best_peer),
            "FP8 against the best peer of this run": _over(self.get(ONE_FP8, "tokens_per_s"), best_peer),
            "8 trials in one pass against one after another (training only), their first steps": _over(pack, first),
            "8 trials in one pass against one after another (training only)": _over(pack, alone),
            "8 trials in one pass against the best peer's tokens/s": _over(pack, best_peer),
            "8 trials in one pass against Unsloth, one after another": _over(pack, small),
            "scoring against generate-and-parse, same rows": _over(
                self.get(GENERATE, "seconds"), self.get(SCORE_SAME, "seconds")
            ),
        }
        lines = [
            f"{self.head['date']}, {self.head['device']}, torch {self.head['torch']}, `{self.head['command']}`",
            "",
            "| | real tokens/s | s/step | peak GiB | planned / measured peak |",
            "|---|---|---|---|---|",
        ]
        for name, row in self.rows.items():
            if "tokens_per_s" in row:
                cells = [
                    f"{row['tokens_per_s']:,.0f}",
                    f"{row['step_s']:.3f}" if "step_s" in row else "",
                    f"{row['peak_gib']:.1f}" if "peak_gib" in row else "",
                    f"{row['planned_over_measured']:.2f}" if "planned_over_measured" in row else "",
                ]
                lines.append(f"| {name} | {' | '.join(cells)} |")
        lines += ["", "| ratio | |", "|---|---|"]
        lines += [f"| {name} | {value:.2f}x |" for name, value in ratios.items() if math.isfinite(value)]
        lines += ["", "| base against bf16 | loss difference | gradient cosine |", "|---|---|---|"]
        for name, row in self.rows.items():
            if "gradient_cosine" in row:
                lines.append(f"| {name} | {row['loss_difference']:+.4f} | {row['gradient_cosine']:.4f} |")
        return "\n".join(lines) + "\n"


def _over(above: float, below: float) -> float:
    return above / below if below else math.nan


ONE, ONE_BF16, ONE_FP8 = "one run, nf4", "one run, bf16", "one run, fp8"
LEAN, ALONE, PACK = "one run, nf4, lean", "1 trial of batch 4", "8 trials of batch 4 in one pass"
ALONE_FIRST = "1 trial of batch 4, its first steps"
PACK_FP8 = "8 trials of batch 4 in one pass, fp8"
EVALUATE, EVALUATE_FP8 = "evaluation, nf4", "evaluation, fp8"
GENERATE, SCORE_SAME = "generate-and-parse, 64 rows", "scoring the same 64 rows"


def device() -> str:
    """The first GPU; of several processes that torchrun started each has its own."""
    return f"cuda:{place().local}" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clean() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--peer-seconds", type=float, default=400.0, help="most for one of them")
    parser.add_argument("--only", nargs="*", default=["nf4", "lean", "bf16", "fp8", "numerics", "generate"])
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the command")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--profile", action="store_true", help="where the time goes, by kernel")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(options.out, "python -m tests.benchmarks.gpu " + " ".join(sys.argv[1:]))
    if torch.cuda.is_available():
        report.note("ceiling", ceiling)
        report.note("base products alone, sustained", sustained)
    vocabulary = 512 if options.tiny else 128256
    rows, small = Workload(2000, vocabulary), Workload(400, vocabulary, seed=1)
    same = Workload(64, vocabulary, seed=2)
    one, eight = [config(4, 4)], [config(4, 1, seed=seed) for seed in range(8)]
    steps, parts = options.steps, set(options.only)
    reference: tuple[float, torch.Tensor] | None = None

    def numerics(model: PackedModel) -> Row:
        assert reference is not None
        loss, found = gradient(model, rows)
        cosine = torch.nn.functional.cosine_similarity(found.double(), reference[1].double(), dim=0)
        return {"loss_difference": loss - reference[0], "gradient_cosine": float(cosine)}

    if parts & {"bf16", "numerics"}:
        model = base(options.tiny, QuantizationKind.none)
        if "bf16" in parts:
            report.note(ONE_BF16, lambda: measure(model, one, rows, steps))
        if "numerics" in parts:
            reference = gradient(model, rows)
            report.note("numerics bf16, again", lambda: numerics(model))
        del model
        clean()
    if parts & {"nf4", "lean", "generate", "numerics"}:
        model = base(options.tiny, QuantizationKind.nf4)
        if "numerics" in parts:
            report.note("numerics nf4", lambda: numerics(model))
        if "lean" in parts:
            report.note(LEAN, lambda: measure(model, [config(4, 4, memory=MemoryMode.lean)], rows, 5))
        if "nf4" in parts:
            report.note(ONE, lambda: measure(model, one, rows, steps))
            report.note(ALONE_FIRST, lambda: measure(model, eight[:1], rows, steps))
            report.note(ALONE, lambda: measure(model, eight[:1], rows, 3 * steps, warm=RECORDED))
            report.note(PACK, lambda: measure(model, eight, rows, steps))
            report.note(EVALUATE, lambda: evaluation(model, small))
        if options.profile:
            profile(model, one, rows)
            profile(model, eight, rows)
        if "generate" in parts:
            report.note(SCORE_SAME, lambda: evaluation(model, same))
            report.note(GENERATE, lambda: generation(model, same))
        del model
        clean()
    if "fp8" in parts:
        model = base(options.tiny, QuantizationKind.fp8)
        if reference is not None:
            report.note("numerics fp8", lambda: numerics(model))
        report.note(ONE_FP8, lambda: measure(model, one, rows, steps))
        report.note(PACK_FP8, lambda: measure(model, eight, rows, steps))
        report.note(EVALUATE_FP8, lambda: evaluation(model, small))
        if options.profile:
            profile(model, one, rows)
        del model
        clean()
    if options.peers is not None:
        for name, row in peers(options.peers, 16, options.peer_seconds):
            report.note(name, lambda row=row: row)  # type: ignore[misc]
    text = report.table()
    (options.out / "gpu.md").write_text(text)
    print(text, flush=True)


if __name__ == "__main__":
    main()
