"""Frozen weights and activations as 8-bit floats with a scale a row, for Hopper's and newer matrix units.

Row i of x times row j of W is scale_i scale_j times the product of their codes. A row's scale depends on that row
alone, so a token's result does not depend on what else is in the pass.
Format e4m3 (Micikevicius et al. 2022, arXiv:2209.05433): largest number 448.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 448.0


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, width] -> codes, float8_e4m3fn [rows, width], and scales, float32 [rows], with x = codes * scale."""
    if x.is_cuda:
        from mathverify.engine import triton_kernels

        return triton_kernels.quantize_rows(x)
    wide = x.float()
    scales = wide.abs().amax(-1).clamp(min=1e-12) / LARGEST
    return (wide / scales[:, None]).to(torch.float8_e4m3fn), scales


def scaled_product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """x W^T with x quantised row by row on the way.

    Args:
        x: [rows, in], any float dtype. codes, scales: W [out, in] as `quantize_rows` gives it.

    Returns:
        [rows, out] in x's dtype. On a CPU the codes are multiplied as float32: the same numbers up to rounding, slowly.
    """
    x_codes, x_scales = quantize_rows(x)
    if not x.is_cuda:
        return ((x_codes.float() @ codes.float().t()) * x_scales[:, None] * scales[None, :]).to(x.dtype)
    return torch._scaled_mm(
        x_codes, codes.t(), scale_a=x_scales[:, None], scale_b=scales[None, :], out_dtype=x.dtype, use_fast_accum=True
    )
