"""What a decoder does between its matrix products: normalise, rotate, gate. One definition in torch; Triton on CUDA.

The torch functions are what tests on a CPU check, and what the kernels of triton_kernels.py are checked against on a
GPU. Everything is computed in float32 and stored in the tensors' own dtype. Functions named *_grad work in place where
they say so, since what they overwrite is not needed again.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu


def add_norm(residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467) of residual + delta.

    Args:
        residual, delta: [rows, hidden]. weight: [hidden].

    Returns:
        residual + delta (the residual itself without a delta), the normalised rows, and 1 / rms, float32 [rows].
    """
    if residual.is_cuda:
        from mathverify.engine import triton_kernels

        return triton_kernels.add_norm(residual, delta, weight, eps)
    total = residual if delta is None else residual + delta
    wide = total.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1) + eps)
    return total, ((wide * scale[:, None]) * weight.float()).to(total.dtype), scale


def norm_grad(grad: Tensor, total: Tensor, scale: Tensor, weight: Tensor, grad_total: Tensor) -> None:
    """Backward of `add_norm`, in place: its share is added to `grad_total`, and `grad` becomes the normalised rows.

    Args:
        grad: of the normalised rows. total, scale: what add_norm returned. grad_total: of residual + delta so far.
    """
    if grad.is_cuda:
        from mathverify.engine import triton_kernels

        triton_kernels.norm_grad(grad, total, scale, weight, grad_total)
        return
    unit = total.float() * scale[:, None]
    inner = grad.float() * weight.float()
    grad_total += (scale[:, None] * (inner - unit * (inner * unit).mean(-1, keepdim=True))).to(grad_total.dtype)
    grad.copy_(unit * weight.float())


def rotate(heads: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> None:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) in place; `inverse` is also its backward.

    Args:
        heads: [rows, heads, head size], any row stride. cos, sin: float32 [rows, head size], both halves alike.
    """
    if heads.is_cuda:
        from mathverify.engine import triton_kernels

        triton_kernels.rotate(heads, cos, sin, inverse)
        return
    half = heads.shape[-1] // 2
    c, s = cos[:, None, :half], sin[:, None, :half] * (-1.0 if inverse else 1.0)
    first, second = heads[..., :half].float(), heads[..., half:].float()
    turned = first * c - second * s, second * c + first * s
    heads[..., :half].copy_(turned[0])
    heads[..., half:].copy_(turned[1])


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202). gate_up: [rows, 2 inner], gate first. Returns [rows, inner]."""
    if gate_up.is_cuda:
        from mathverify.engine import triton_kernels

        return triton_kernels.swiglu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return (silu(gate.float()) * up.float()).to(gate_up.dtype)


def swiglu_grad(grad: Tensor, gate_up: Tensor) -> None:
    """Backward of `swiglu`, in place: `gate_up` becomes its own gradient, and `grad` becomes silu(gate) * up."""
    if grad.is_cuda:
        from mathverify.engine import triton_kernels

        triton_kernels.swiglu_grad(grad, gate_up)
        return
    inner = grad.shape[-1]
    gate, up, wide = gate_up[:, :inner].float(), gate_up[:, inner:].float(), grad.float()
    sigmoid = torch.sigmoid(gate)
    active = gate * sigmoid
    # All three before the first is written: in float32 these are the tensors themselves, not copies.
    product, gate_grad, up_grad = active * up, wide * up * (sigmoid + active * (1.0 - sigmoid)), wide * active
    grad.copy_(product)
    gate_up[:, :inner].copy_(gate_grad)
    gate_up[:, inner:].copy_(up_grad)
