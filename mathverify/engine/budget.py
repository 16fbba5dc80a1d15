"""How many tokens a pass may have: planned from free memory before the run, halved if the plan was wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mathverify.config import LossKind, MemoryMode, OptimizerKind, RunConfig
from mathverify.engine.frozen import scratch_held
from mathverify.engine.lora import targets
from mathverify.engine.model import LOGIT_ROWS, PackedModel
from mathverify.engine.replay import MOST_ADDED, is_small, most_held

CPU_TOKENS = 4096
"""On a CPU memory is rarely what limits a pass: this many tokens keep the cores busy without leaving the cache."""

MOST, MOST_LEAN = 65536, 3072
"""Tokens of the largest pass that is planned on a GPU: beyond these a pass gains no speed, and lean wants it small."""

PASS, DEQUANTISED = 37, 22
"""Milliseconds of a pass beside those that go by its tokens, and of dequantising the base for it: an 8B model on an
H100 (tests/benchmarks/NOTES.md). What counts is their ratio."""

RESERVE = 0.92
"""Share of the free memory that is planned for; the rest is for the allocator's rounding."""


@dataclass(frozen=True)
class BudgetPlan:
    """tokens: most tokens of a pass. text: the plan as a person reads it before the run.

    fixed_bytes, token_bytes: a pass of n tokens needs fixed_bytes + n token_bytes on the device, everything that was
    there before included; 0 on a CPU. held: tokens of the widest recorded pass (replay.py) that there is room for
    besides, at token_bytes each; 0 if none are planned.
    """

    tokens: int
    text: str
    fixed_bytes: int = 0
    token_bytes: int = 0
    held: int = 0


@dataclass(frozen=True)
class Lengths:
    """Tokens of the segments that passes are made of. longest: of any. mean, spread: of those trained on, the mean and
    the standard deviation."""

    longest: int
    mean: float
    spread: float

    @classmethod
    def of(cls, trained: NDArray[np.int32], longest: int = 0) -> Lengths:
        """trained: tokens of the segments that are trained on [n], at least one. longest: of any other segment."""
        return cls(max(longest, int(trained.max())), float(trained.mean()), float(trained.std()))

    def usual(self, segments: int) -> int:
        """Tokens that so many segments seldom exceed: two standard deviations above their mean."""
        return min(segments * self.longest, math.ceil(segments * self.mean + 2 * math.sqrt(segments) * self.spread))


def plan_budget(model: PackedModel, configs: Sequence[RunConfig], lengths: Lengths, processes: int = 1) -> BudgetPlan:
    """Choose the token budget of runs that train together, and set the model up for it (dense copies, recomputed
    activations, the place of its head). Each run is taken to need what the largest of them does, and copies padded to
    what all of them have.

    Args:
        configs: of all of them, with the same `train.memory` and `train.token_budget`. lengths: of their segments; a
            pass is never planned smaller than the longest. processes: that share every step (torchrun).

    On a GPU dense copies of the quantised weights are kept where that saves more than the smaller passes beside them
    cost, for a usual step; and a lone run whose steps are small, with labels as its loss, leaves room for recorded
    passes.
    """
    first, trials, longest = configs[0].train, len(configs), lengths.longest
    lean = first.memory is MemoryMode.lean
    model.recompute_activations(lean)
    only_verdicts = all(config.train.loss is LossKind.label for config in configs)
    model.lend_head(lean and model.device.type == "cuda" and only_verdicts)
    asked = first.token_budget
    if model.device.type != "cuda":
        if asked is not None:
            return BudgetPlan(asked, _as_asked(asked, longest))
        return BudgetPlan(max(CPU_TOKENS, longest), f"{max(CPU_TOKENS, longest):,} tokens a pass on the CPU")

    segments = share_of_step(configs, processes) * trials
    step, usual = segments * longest, lengths.usual(segments)
    most = asked or (MOST_LEAN if lean else MOST)
    per_token = activation_bytes(model, configs)
    trained = max(adapter_bytes(model, config) - copy_bytes(model, [config]) for config in configs)
    fixed = trials * (trained + copy_bytes(model, configs)) + (0 if only_verdicts else logit_bytes(model))
    torch.cuda.empty_cache()
    free, total = device_memory(model)

    def room(bytes_: int) -> int:
        """Tokens of the passes that so many bytes hold beside what is fixed."""
        return int((bytes_ * RESERVE - fixed) / per_token)

    def needed_passes(tokens: int) -> int:
        return math.ceil(usual / max(longest, min(tokens, most)))

    dense = model.dense_bytes()
    beside = room(free - dense)
    keeps = dense > 0 and not lean and beside >= max(longest, min(usual, asked or 0))
    keeps = keeps and needed_passes(beside) * PASS <= needed_passes(room(free)) * (PASS + DEQUANTISED)
    model.keep_dense(keeps)
    if keeps:
        free -= dense
    else:
        fixed += scratch_bytes(model)
    held = 0
    small = trials == 1 and only_verdicts and is_small(math.ceil(segments * lengths.mean), asked or MOST)
    if small and model.replays and room(free) >= max(longest, min(usual + MOST_ADDED, most)) + most_held(usual):
        held = most_held(usual)
    largest = step + MOST_ADDED if held else step
    tokens = asked or max(longest, min(room(free) - held, largest, most))
    needed = total - free + fixed + (min(max(tokens, longest), step) + held) * per_token
    passes = f"{tokens:,} tokens a pass" if asked is None else _as_asked(asked, longest)
    more = ", dequantised weights kept" * keeps + ", small passes recorded" * (held > 0)
    text = f"needs {needed / 2**30:.1f} of {total / 2**30:.0f} GiB: {passes}{more}"
    return BudgetPlan(tokens, text, torch.cuda.memory_allocated(model.device) + fixed, per_token, held)


def needs(config: RunConfig) -> tuple[object, ...]:
    """What a plan takes from a run beside what all runs on one base share: the same for runs that it fits alike."""
    lora, run = config.lora, config.train
    modules = tuple(sorted(lora.target_modules))
    return lora.rank, modules, run.examples_per_step, run.loss, config.optimizer.kind, run.memory, run.token_budget


def share_of_step(configs: Sequence[RunConfig], processes: int) -> int:
    """Most segments of a run's step that one of the processes computes."""
    return math.ceil(max(config.train.examples_per_step for config in configs) / processes)


def device_memory(model: PackedModel) -> tuple[int, int]:
    """Bytes of the model's GPU that can be had, and all it has: also those that torch's allocator holds without using
    them (recorded passes' among them), and those of dense copies."""
    free, total = _free(model.device)
    return free + (model.dense_bytes() if model.is_dense else 0), total


def _free(device: torch.device) -> tuple[int, int]:
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total


def peak_bytes(device: torch.device | str) -> int:
    """The most that tensors took on a GPU, and what recorded passes hold, which between them does not count as
    allocated."""
    parts = torch.cuda.memory_snapshot()
    recorded: int = sum(part["total_size"] for part in parts if part["segment_pool_id"] != (0, 0))
    return torch.cuda.max_memory_allocated(device) + recorded


def has_room_beside(model: PackedModel, config: RunConfig, passes: int, tokens: int, planned: bool) -> bool:
    """Whether another `tokens` fit on the device beside passes of `passes` tokens; on a CPU they always do.

    planned: plan_budget has counted them. It has left a reserve, of which libraries have taken their share since.
    """
    if model.device.type != "cuda":
        return True
    free, _ = _free(model.device)
    return free * (1 if planned else RESERVE) >= (passes + tokens) * activation_bytes(model, [config])


def _as_asked(tokens: int, longest: int) -> str:
    larger = f"; a longer row, up to {longest:,}, is a pass of its own" if tokens < longest else ""
    return f"{tokens:,} tokens a pass, as asked{larger}"


def adapter_bytes(model: PackedModel, config: RunConfig) -> int:
    """Bytes of a trial: float32 adapter and gradient, optimizer state, and the copy in the passes' own dtype."""
    shapes = model.host.shapes
    parameters = sum(config.lora.rank * sum(shapes[name]) for name in targets(shapes, config.lora))
    state = 8 if config.optimizer.kind is OptimizerKind.adamw else 2
    return parameters * (8 + state) + copy_bytes(model, [config])


def copy_bytes(model: PackedModel, configs: Sequence[RunConfig]) -> int:
    """Bytes of each trial's copy in the passes' own dtype: padded to the largest rank, on all that any of them targets
    (see grouped.py)."""
    if model.base.dtype is torch.float32:
        return 0
    shapes = model.host.shapes
    names = {name for config in configs for name in targets(shapes, config.lora)}
    rank = max(config.lora.rank for config in configs)
    return rank * sum(sum(shapes[name]) for name in names) * model.base.dtype.itemsize


def scratch_bytes(model: PackedModel) -> int:
    """Bytes of the buffer that quantised weights are made dense in where no dense copies are kept: the largest group of
    linears with one input; without what it has already."""
    if model.fast is None or model.dense_bytes() == 0:
        return 0
    largest = max(g.frozen.in_features * g.frozen.out_features for g in model.fast.groups)
    return max(0, largest * model.base.dtype.itemsize - scratch_held())


def logit_bytes(model: PackedModel) -> int:
    """Bytes of the vocabulary-wide logits that a loss of every token works on at a time: as the head gives them, in
    float32, their cross-entropy and its gradient."""
    return LOGIT_ROWS * model.head.out_features * (model.base.dtype.itemsize + 12)


def activation_bytes(model: PackedModel, configs: Sequence[RunConfig]) -> int:
    """Bytes that one token of a training pass needs at the peak, for Llama-like decoders.

    What decoder.py keeps per layer: the residual stream twice, rotated query/key/value and attention's output with
    its log-sum-exp, gate and up, the adapters' low-rank activations; of the last layer, when only verdicts are
    trained, just the stream, keys and values. Working space: the widest moment of a layer's backward pass. Recomputed
    activations keep one hidden-size tensor a layer, and one whole layer at a time.
    """
    shape: Any = model.base.model.config
    width = model.base.dtype.itemsize
    hidden, inner, layers = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers
    heads, kv = shape.num_attention_heads, getattr(shape, "num_key_value_heads", shape.num_attention_heads)
    head = getattr(shape, "head_dim", None) or hidden // heads
    modules = {module for config in configs for module in config.lora.target_modules}
    ranks = max(config.lora.rank for config in configs) * len(modules)  # padded, as in copy_bytes
    one_layer = width * (2 * hidden + (2 * heads + 2 * kv) * head + 2 * inner + ranks) + 4 * (heads + 2)
    if model.fast is None:  # transformers' modules under autograd keep normalised rows and the MLP's products as well
        one_layer += width * (2 * inner + 4 * hidden) + 8 * hidden
    working = width * (inner + 4 * hidden) + 8 * head + 64
    if configs[0].train.memory is MemoryMode.lean:
        return int(layers * hidden * width + one_layer + working)
    only_verdicts = all(config.train.loss is LossKind.label for config in configs)
    whole_layers = layers - 1 if model.fast is not None and only_verdicts else layers
    return int(whole_layers * one_layer + working)
