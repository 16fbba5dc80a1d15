"""How many tokens a pass may have: planned from free memory before the run, halved if the plan was wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mathverify.config import LossKind, MemoryMode, OptimizerKind, RunConfig
from mathverify.engine.lora import targets
from mathverify.engine.model import PackedModel

CPU_TOKENS = 4096
"""On a CPU memory is rarely what limits a pass: this many tokens keep the cores busy without leaving the cache."""

MOST, MOST_LEAN = 65536, 3072
"""Tokens of the largest pass that is planned on a GPU: beyond these a pass gains no speed, and lean wants it small."""

RESERVE = 0.92
"""Share of the free memory that is planned for; the rest is for the allocator's rounding."""


@dataclass(frozen=True)
class BudgetPlan:
    """tokens: most tokens of a pass. text: the plan as a person reads it before the run.

    fixed_bytes, token_bytes: a pass of n tokens needs fixed_bytes + n token_bytes on the device, everything that was
    there before included; 0 on a CPU.
    """

    tokens: int
    text: str
    fixed_bytes: int = 0
    token_bytes: int = 0


def plan_budget(model: PackedModel, configs: Sequence[RunConfig], longest: int) -> BudgetPlan:
    """Choose the token budget of runs that train together; each is taken to need what the largest of them does, and
    copies padded to what all of them have.

    Args:
        configs: of all of them, with the same `train.memory` and `train.token_budget`. longest: tokens of the longest
            segment; a pass is never planned smaller.

    On a GPU with room for a whole step of longest segments besides, dense copies of the quantised weights are kept.
    """
    first, trials = configs[0].train, len(configs)
    lean = first.memory is MemoryMode.lean
    model.recompute_activations(lean)
    only_verdicts = all(config.train.loss is LossKind.label for config in configs)
    model.lend_head(lean and model.device.type == "cuda" and only_verdicts)
    asked = first.token_budget
    if model.device.type != "cuda":
        if asked is not None:
            return BudgetPlan(asked, _as_asked(asked, longest))
        return BudgetPlan(max(CPU_TOKENS, longest), f"{max(CPU_TOKENS, longest):,} tokens a pass on the CPU")
    step = max(config.train.examples_per_step for config in configs) * longest * trials
    torch.cuda.empty_cache()
    free, total = device_memory(model.device)
    trained = max(adapter_bytes(model, config) - copy_bytes(model, [config]) for config in configs)
    fixed = trials * (trained + copy_bytes(model, configs)) + scratch_bytes(model)
    per_token = activation_bytes(model, configs)
    dense, kept = model.dense_bytes(), ""
    if dense and not lean and free * RESERVE - fixed - dense > step * per_token:
        model.keep_dense()
        free -= dense
        fixed -= scratch_bytes(model)
        kept = ", dequantised weights kept"
    fits = int((free * RESERVE - fixed) / per_token)
    tokens = max(longest, min(fits, step, MOST_LEAN if lean else MOST)) if asked is None else asked
    beyond = fixed + min(max(tokens, longest), step) * per_token
    passes = f"{tokens:,} tokens a pass" if asked is None else _as_asked(asked, longest)
    text = f"needs {(total - free + beyond) / 2**30:.1f} of {total / 2**30:.0f} GiB: {passes}{kept}"
    return BudgetPlan(tokens, text, torch.cuda.memory_allocated(model.device) + fixed, per_token)


def device_memory(device: torch.device) -> tuple[int, int]:
    """Bytes of a GPU that are free, those that torch's allocator holds and does not use among them, and all it has."""
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total


def has_room_beside(model: PackedModel, config: RunConfig, passes: int, tokens: int) -> bool:
    """Whether another `tokens` fit on the device beside passes of `passes` tokens; on a CPU they always do."""
    if model.device.type != "cuda":
        return True
    free, _ = device_memory(model.device)
    return free * RESERVE >= (passes + tokens) * activation_bytes(model, [config])


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
    """Bytes of the buffer that quantised weights are made dense in: the largest group of linears with one input."""
    if model.fast is None or model.dense_bytes() == 0:
        return 0
    return max(g.frozen.in_features * g.frozen.out_features for g in model.fast.groups) * model.base.dtype.itemsize


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
