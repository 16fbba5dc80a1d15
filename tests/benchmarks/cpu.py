"""Speed on a CPU, on the embedded default: packs, a run beside transformers' Trainer with PEFT, tokenising, start-up.

python -m tests.benchmarks.cpu [--out FOLDER] [--repeat 3] [--only PART ...]

One command writes FOLDER/cpu-DATE.json and FOLDER/cpu-DATE.md: date, hardware, and a table whose ratios are between rows
of this very run. What is compared takes turns, and the best of all turns counts, so that a machine's moods hit both.
Both trainers train on the verdict alone (label loss), with the same rank, targets, optimizer, batch and rows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mathverify.config import RunConfig
from mathverify.engine.pack import Pack
from mathverify.engine.passes import TokenBudget
from mathverify.engine.trial import Trial
from mathverify.entry import compose
from mathverify.prepare import Workbench, prepare
from tests.benchmarks.startup import seconds_to_answer, seconds_to_first_step

Row = dict[str, float]
PARTS = ("pack", "trainer", "tokenise", "startup")
PACK, SINGLES = "8 runs of batch {batch}, r{rank}, as one pack", "8 runs of batch {batch}, r{rank}, one after another"
OURS, TRAINER = "one run, r64, 4 x 4 examples a step", "the same steps by transformers' Trainer and PEFT"
SHAPES = ((4, 16), (4, 64), (2, 16))
"""Micro-batch and rank of the packs that are measured; one micro-batch a step."""


# Packs


def configs(batch: int, rank: int) -> list[RunConfig]:
    """Eight runs that differ in seed and learning rate."""
    common = [f"train.batch_size={batch}", "train.grad_accumulation=1", "train.max_steps=100000"]
    return [
        compose([*common, f"lora.rank={rank}", f"seed={seed}", f"optimizer.learning_rate={(1 + seed) * 1e-4}"])
        for seed in range(8)
    ]


def rounds(bench: Workbench, runs: Sequence[RunConfig], steps: int) -> tuple[float, int]:
    """Seconds and tokens of `steps` rounds of a pack, after two that are not counted."""
    pack = Pack(bench.model, TokenBudget(bench.budget.tokens))
    for run in runs:
        pack.add(Trial.start(run, bench.stores["train"], bench.verdicts, bench.model))
    for _ in range(2):
        pack.step()
    start = time.perf_counter()
    tokens = sum(report.tokens for _ in range(steps) for _, report in pack.step())
    return time.perf_counter() - start, tokens


def packs(batch: int, rank: int, steps: int, repeat: int) -> dict[str, Row]:
    runs = configs(batch, rank)
    bench = prepare(runs[0], beside=runs[1:])
    together: list[float] = []
    singly: list[float] = []
    tokens = 0
    for _ in range(repeat):
        seconds, tokens = rounds(bench, runs, steps)
        together.append(seconds)
        singly.append(sum(rounds(bench, [run], steps)[0] for run in runs))
    return {
        name.format(batch=batch, rank=rank): {"seconds": min(times), "tokens_per_second": tokens / min(times)}
        for name, times in ((PACK, together), (SINGLES, singly))
    }


# Beside the Trainer


def beside_trainer(steps: int, repeat: int) -> dict[str, Row]:
    config = compose(["train.max_steps=100000"])
    bench = prepare(config)
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(repeat):
        seconds, tokens = rounds(bench, [config], steps)
        ours.append(tokens / seconds)
        theirs.append(trainer_speed(config, bench, steps))
    return {OURS: {"tokens_per_second": max(ours)}, TRAINER: {"tokens_per_second": max(theirs)}}


def trainer_speed(config: RunConfig, bench: Workbench, steps: int) -> float:
    """Real (unpadded) tokens a second of plain transformers + PEFT, after two steps that are not counted."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    lora = LoraConfig(
        r=config.lora.rank, lora_alpha=int(config.lora.alpha), lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
        target_modules=list(config.lora.target_modules),
    )  # fmt: skip
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(bench.model_path, dtype=torch.float32), lora)
    store, verdicts = bench.stores["train"], bench.verdicts
    seen = 0

    class Prompts(torch.utils.data.Dataset[dict[str, Any]]):
        def __len__(self) -> int:
            return len(store)

        def __getitem__(self, row: int) -> dict[str, Any]:
            return {"ids": store.ids(row), "verdict": verdicts.of(bool(store.labels[row]))}

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        nonlocal seen
        longest = 1 + max(len(row["ids"]) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for place, row in enumerate(rows):
            length = len(row["ids"])
            ids[place, :length] = torch.from_numpy(row["ids"].astype(np.int64))
            ids[place, length] = labels[place, length] = row["verdict"]
            mask[place, : length + 1] = 1
            seen += length
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    class Clock(TrainerCallback):
        """start: time and tokens after two steps; end: after the last."""

        def __init__(self) -> None:
            self.start, self.end = (0.0, 0), (0.0, 0)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                self.start = time.perf_counter(), seen
            self.end = time.perf_counter(), seen

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=config.train.batch_size,
            gradient_accumulation_steps=config.train.grad_accumulation, max_steps=steps + 2,
            learning_rate=config.optimizer.learning_rate, lr_scheduler_type="linear", optim="adamw_torch_fused",
            max_grad_norm=config.optimizer.max_grad_norm or 0.0, logging_strategy="no", save_strategy="no", report_to=[],
            use_cpu=True, remove_unused_columns=False, disable_tqdm=True, seed=config.seed,
        )  # fmt: skip
        Trainer(model=model, args=arguments, train_dataset=Prompts(), data_collator=collate, callbacks=[clock]).train()
    return (clock.end[1] - clock.start[1]) / (clock.end[0] - clock.start[0])


# Tokenising and start-up


def tokenising(repeat: int) -> dict[str, Row]:
    """Rows to a token store on disk, from a cold cache, solutions in the prompt."""
    from mathverify.examples.arithmetic import generate
    from mathverify.tokens.store import tokenize

    config = compose(["prompt=with_solution"])
    tokenizer, rows = prepare(config).tokenizer, generate(20_000, 2, 2, 0).train
    speeds: list[tuple[float, float]] = []
    for _ in range(repeat):
        with tempfile.TemporaryDirectory() as cache:
            start = time.perf_counter()
            store = tokenize(rows, tokenizer, config.prompt, Path(cache))
            seconds = time.perf_counter() - start
            speeds.append((len(store) / seconds, int(store.lengths.sum()) / seconds))
    best = max(speeds)
    return {"tokenising, 20,000 rows with solutions": {"rows_per_second": best[0], "tokens_per_second": best[1]}}


def startup(repeat: int) -> dict[str, Row]:
    work: dict[str, Callable[[], float]] = {
        "--help": lambda: seconds_to_answer("--help"),
        "--cfg job": lambda: seconds_to_answer("--cfg", "job"),
        "first training step": seconds_to_first_step,
    }
    rows: dict[str, Row] = {}
    for name, once in work.items():
        times = [once() for _ in range(repeat)]
        rows[f"start-up: {name}"] = {"seconds": min(times), "median_seconds": statistics.median(times)}
    return rows


# The report


def ratios(rows: dict[str, Row]) -> dict[str, float]:
    found: dict[str, float] = {}
    for batch, rank in SHAPES:
        pack, singles = (name.format(batch=batch, rank=rank) for name in (PACK, SINGLES))
        if pack in rows:
            found[f"pack of 8 against one after another, batch {batch}, r{rank}"] = (
                rows[singles]["seconds"] / rows[pack]["seconds"]
            )
    if OURS in rows:
        found["one run against Trainer and PEFT"] = rows[OURS]["tokens_per_second"] / rows[TRAINER]["tokens_per_second"]
    return found


def hardware() -> str:
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    return f"{name}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []


def table(about: dict[str, str], rows: dict[str, Row], found: dict[str, float]) -> str:
    lines = [f"{about['date']}, {about['hardware']}; load at the start {about['load']}", f"`{about['command']}`", ""]
    lines += ["| what | seconds | tokens/s |", "|---|---|---|"]
    for name, row in rows.items():
        seconds = f"{row['seconds']:.2f}" if "seconds" in row else ""
        speed = f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else ""
        lines.append(f"| {name} | {seconds} | {speed} |")
    lines += ["", "| ratio | |", "|---|---|", *(f"| {name} | {value:.2f} |" for name, value in found.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--repeat", type=int, default=3, help="turns of each part; the best counts")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of a turn")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as mathverify.train has it
    now = datetime.now(UTC)
    about = {
        "date": now.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "load": ", ".join(f"{load:.1f}" for load in os.getloadavg()),
        "command": " ".join(["python -m tests.benchmarks.cpu", *sys.argv[1:]]),
    }
    rows: dict[str, Row] = {}
    work: dict[str, list[Callable[[], dict[str, Row]]]] = {
        "pack": [lambda b=b, r=r: packs(b, r, options.steps, options.repeat) for b, r in SHAPES],  # type: ignore[misc]
        "trainer": [lambda: beside_trainer(options.steps, options.repeat)],
        "tokenise": [lambda: tokenising(options.repeat)],
        "startup": [lambda: startup(options.repeat)],
    }
    for part in options.only:
        for measure in work[part]:
            for name, row in measure().items():
                rows[name] = row
                print(f"{name:60s}", {key: round(value, 3) for key, value in row.items()}, flush=True)
    found = ratios(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"cpu-{about['date']}"
    file.with_suffix(".json").write_text(json.dumps({**about, "rows": rows, "ratios": found}, indent=1) + "\n")
    file.with_suffix(".md").write_text(table(about, rows, found))
    print(table(about, rows, found), flush=True)


if __name__ == "__main__":
    main()
