"""How many tokens a pass may have: planned from free memory before the run, halved if the plan was wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mathverify.config import MemoryMode, RunConfig
from mathverify.engine.model import PackedModel

CPU_TOKENS = 4096
"""On a CPU memory is rarely what limits a pass: this many tokens keep the cores busy without leaving the cache."""

MOST, MOST_LEAN = 65536, 8192
"""Tokens of the largest pass that is planned on a GPU: beyond these a pass gains no speed, and lean wants it small."""

RESERVE = 0.92
"""Share of the free memory that is planned for; the rest is for the allocator's rounding."""


@dataclass(frozen=True)
class BudgetPlan:
    """tokens: most tokens of a pass. text: the plan as a person reads it before the run."""

    tokens: int
    text: str


def plan_budget(model: PackedModel, config: RunConfig, longest: int) -> BudgetPlan:
    """Choose the token budget of a run.

    Args:
        longest: tokens of the longest segment; a pass is never planned smaller.

    On a GPU with room for a whole step of longest segments besides, dense copies of the quantised weights are kept.
    """
    model.recompute_activations(config.train.memory is MemoryMode.lean)
    step = config.train.examples_per_step * longest
    if config.train.token_budget is not None:
        return BudgetPlan(config.train.token_budget, f"{config.train.token_budget:,} tokens a pass, as asked")
    if model.device.type != "cuda":
        return BudgetPlan(max(CPU_TOKENS, longest), f"{max(CPU_TOKENS, longest):,} tokens a pass on the CPU")
    free, total = torch.cuda.mem_get_info(model.device)
    free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    fixed = adapter_bytes(model, config)
    per_token = activation_bytes(model, config)
    dense, kept = model.dense_bytes(), ""
    if dense and config.train.memory is MemoryMode.auto and free * RESERVE - fixed - dense > step * per_token:
        model.keep_dense()
        fixed, kept = fixed + dense, ", dequantised weights kept"
    fits = int((free * RESERVE - fixed) / per_token)
    tokens = max(longest, min(fits, step, MOST_LEAN if config.train.memory is MemoryMode.lean else MOST))
    needs = (total - free + fixed + min(tokens, step) * per_token) / 2**30
    return BudgetPlan(tokens, f"needs {needs:.1f} of {total / 2**30:.0f} GiB: {tokens:,} tokens a pass{kept}")


def adapter_bytes(model: PackedModel, config: RunConfig) -> int:
    """Bytes of a trial's float32 adapter and gradient, its optimizer state, and the checkpoint's working copy."""
    from mathverify.config import OptimizerKind
    from mathverify.engine.lora import targets

    shapes = model.host.shapes
    parameters = sum(config.lora.rank * sum(shapes[name]) for name in targets(shapes, config.lora))
    state = 8 if config.optimizer.kind is OptimizerKind.adamw else 2
    return parameters * (8 + state)


def activation_bytes(model: PackedModel, config: RunConfig) -> int:
    """Bytes that one token of a training pass keeps until its backward pass, for Llama-like decoders.

    Per layer: hidden-size tensors (two normalisations with their float32 copies, residuals, attention in and out),
    query/key/value with their rotated copies, and the MLP's three intermediate tensors; plus one low-rank product per
    adapted linear. Recomputed activations keep one hidden-size tensor a layer and one whole layer at a time.
    """
    shape: Any = model.base.model.config
    width = torch.finfo(model.base.dtype).bits // 8
    hidden, inner, layers = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers
    heads, kv = shape.num_attention_heads, getattr(shape, "num_key_value_heads", shape.num_attention_heads)
    head = getattr(shape, "head_dim", None) or hidden // heads
    normalised = 2 * (2 * hidden * width + 2 * hidden * 4)
    attention = width * (2 * (heads + 2 * kv) * head + 2 * hidden)
    mlp = width * 4 * inner
    low_rank = width * config.lora.rank * len(config.lora.target_modules)
    one_layer = normalised + attention + mlp + low_rank
    if config.train.memory is MemoryMode.lean:
        return int(layers * hidden * width + one_layer)
    return int(layers * one_layer)
