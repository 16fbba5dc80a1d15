"""AdamW for an adapter, with state in 32 bits or 8."""

from __future__ import annotations

from typing import Any

import torch

from mathverify.config import OptimizerConfig, OptimizerKind
from mathverify.engine.lora import Adapter


def make_optimizer(adapter: Adapter, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW over the adapter's one flat tensor (Loshchilov & Hutter 2019, arXiv:1711.05101).

    8-bit state is block-wise (Dettmers et al. 2022, arXiv:2110.02861). Paged state exists on CUDA only; on the CPU
    paged_adamw_8bit is adamw_8bit.
    """
    flat = adapter.flat.requires_grad_(False)
    parameter = torch.nn.Parameter(flat)
    parameter.grad = adapter.grad
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.betas[0], config.betas[1]),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.kind is OptimizerKind.adamw:
        return torch.optim.AdamW([parameter], fused=True, **options)
    if config.kind is OptimizerKind.paged_adamw_8bit and flat.is_cuda:
        from bitsandbytes.optim.adamw import PagedAdamW8bit

        paged: torch.optim.Optimizer = PagedAdamW8bit([parameter], **options)
        return paged
    from mathverify.engine.adamw_8bit import FusedAdamW8bit

    return FusedAdamW8bit([parameter], **options)
