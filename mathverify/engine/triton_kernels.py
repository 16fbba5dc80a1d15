"""Triton kernels for CUDA; each is the twin of a torch function that says what it means. Imported on CUDA only.

add_norm, norm_grad, rotate, swiglu, swiglu_grad: elementwise.py. drop: dropout.py. quantize_rows: fp8.py.
pack_rows, add_rows: grouped.py.
"""
# ruff: noqa: N803 (compile-time constants are spelled in capitals, as Triton's users expect)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def _block(width: int) -> int:
    return int(triton.next_power_of_2(width))


def _warps(block: int) -> int:
    return 4 if block <= 2048 else 8 if block <= 8192 else 16


@triton.jit
def _add_norm(res, delta, weight, total, out, scale, width, eps, HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(res + row * width + at, mask=inside, other=0.0)
    if HAS_DELTA:
        x = (x.to(tl.float32) + tl.load(delta + row * width + at, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(total + row * width + at, x, mask=inside)
    wide = x.to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / width + eps)
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, (wide * inverse * w).to(x.dtype), mask=inside)
    tl.store(scale + row, inverse)


def add_norm(residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """elementwise.add_norm."""
    rows, width = residual.shape
    total = residual if delta is None else torch.empty_like(residual)
    out = torch.empty_like(residual)
    scale = torch.empty(rows, dtype=torch.float32, device=residual.device)
    block = _block(width)
    given = residual if delta is None else delta
    _add_norm[(rows,)](
        residual, given, weight, total, out, scale, width, eps, delta is not None, block, num_warps=_warps(block)
    )
    return total, out, scale


@triton.jit
def _norm_grad(grad, total, scale, weight, grad_total, width, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    place = row * width + at
    g = tl.load(grad + place, mask=inside, other=0.0)
    x = tl.load(total + place, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.load(scale + row)
    unit = x * inverse
    inner = g.to(tl.float32) * w
    share = inverse * (inner - unit * (tl.sum(inner * unit, axis=0) / width))
    before = tl.load(grad_total + place, mask=inside, other=0.0)
    tl.store(grad_total + place, (before.to(tl.float32) + share).to(before.dtype), mask=inside)
    tl.store(grad + place, (unit * w).to(g.dtype), mask=inside)


def norm_grad(grad: Tensor, total: Tensor, scale: Tensor, weight: Tensor, grad_total: Tensor) -> None:
    """elementwise.norm_grad."""
    rows, width = grad.shape
    block = _block(width)
    _norm_grad[(rows,)](grad, total, scale, weight, grad_total, width, block, num_warps=_warps(block))


@triton.jit
def _rotate(heads, cos, sin, stride, count, HALF: tl.constexpr, HEADS: tl.constexpr, SIGN: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    at = tl.arange(0, HALF)[None, :]
    inside = head < count
    first = heads + row * stride + head * (2 * HALF) + at
    c = tl.load(cos + row * (2 * HALF) + at)
    s = tl.load(sin + row * (2 * HALF) + at) * SIGN
    a = tl.load(first, mask=inside, other=0.0)
    b = tl.load(first + HALF, mask=inside, other=0.0)
    x, y = a.to(tl.float32), b.to(tl.float32)
    tl.store(first, (x * c - y * s).to(a.dtype), mask=inside)
    tl.store(first + HALF, (y * c + x * s).to(a.dtype), mask=inside)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    """elementwise.rotate; the head size must be a power of two."""
    rows, count, size = heads.shape
    assert heads.stride(1) == size
    _rotate[(rows,)](
        heads, cos, sin, heads.stride(0), count, size // 2, _block(count), -1.0 if inverse else 1.0, num_warps=4
    )


@triton.jit
def _swiglu(gate_up, out, inner, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < inner
    gate = tl.load(gate_up + row * 2 * inner + at, mask=inside, other=0.0)
    g = gate.to(tl.float32)
    u = tl.load(gate_up + row * 2 * inner + inner + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * inner + at, (g * tl.sigmoid(g) * u).to(gate.dtype), mask=inside)


def swiglu(gate_up: Tensor) -> Tensor:
    """elementwise.swiglu."""
    rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, inner)
    block = min(2048, _block(inner))
    _swiglu[(rows, triton.cdiv(inner, block))](gate_up, out, inner, block, num_warps=4)
    return out


@triton.jit
def _swiglu_grad(grad, gate_up, inner, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < inner
    wide = tl.load(grad + row * inner + at, mask=inside, other=0.0)
    d = wide.to(tl.float32)
    g = tl.load(gate_up + row * 2 * inner + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(gate_up + row * 2 * inner + inner + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    active = g * sigmoid
    tl.store(grad + row * inner + at, (active * u).to(wide.dtype), mask=inside)
    tl.store(gate_up + row * 2 * inner + at, (d * u * (sigmoid + active * (1.0 - sigmoid))).to(wide.dtype), mask=inside)
    tl.store(gate_up + row * 2 * inner + inner + at, (d * active).to(wide.dtype), mask=inside)


def swiglu_grad(grad: Tensor, gate_up: Tensor) -> None:
    """elementwise.swiglu_grad."""
    rows, inner = grad.shape
    block = min(2048, _block(inner))
    _swiglu_grad[(rows, triton.cdiv(inner, block))](grad, gate_up, inner, block, num_warps=4)


@triton.jit
def _mix(h):
    h = h ^ ((h >> 16) & 0xFFFF)
    h = h * 0x7FEB352D
    h = h ^ ((h >> 15) & 0x1FFFF)
    h = h * -2073254261
    return h ^ ((h >> 16) & 0xFFFF)


@triton.jit
def _drop(x, keys, thresholds, factors, out, linear, width, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row * width + at, mask=inside, other=0.0)
    start = _mix(tl.load(keys + row) ^ linear)
    hashed = _mix(start + at.to(tl.int32) * -1640531535)
    keep = ((hashed >> 8) & 0xFFFFFF) >= tl.load(thresholds + row)
    kept = tl.where(keep, value.to(tl.float32) * tl.load(factors + row), 0.0)
    tl.store(out + row * width + at, kept.to(value.dtype), mask=inside)


def drop(x: Tensor, keys: Tensor, thresholds: Tensor, factors: Tensor, linear: int) -> Tensor:
    """dropout.drop."""
    rows, width = x.shape
    out = torch.empty_like(x)
    block = min(2048, _block(width))
    _drop[(rows, triton.cdiv(width, block))](x, keys, thresholds, factors, out, linear, width, block, num_warps=4)
    return out


@triton.jit
def _quantize_rows(x, out, scales, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    most = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, WIDTH, BLOCK):
        at = start + tl.arange(0, BLOCK)
        most = tl.maximum(most, tl.abs(tl.load(x + row * stride + at, mask=at < WIDTH, other=0.0).to(tl.float32)))
    scale = tl.maximum(tl.max(most, axis=0), 1e-12) / 448.0
    tl.store(scales + row, scale)
    for start in range(0, WIDTH, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * stride + at, mask=at < WIDTH, other=0.0).to(tl.float32) / scale
        tl.store(out + row * WIDTH + at, value.to(tl.float8e4nv), mask=at < WIDTH)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp8.quantize_rows."""
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = min(8192, _block(width))
    _quantize_rows[(rows,)](x, out, scales, x.stride(0), width, block, num_warps=_warps(block))
    return out, scales


@triton.jit
def _move_rows(
    flats, offsets, rows, columns, strides, stack, most_rows, most_columns, stack_group, GIVE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    group = tl.program_id(0)
    own_rows, own_columns, stride = tl.load(rows + group), tl.load(columns + group), tl.load(strides + group)
    at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, column = at // most_columns, at % most_columns
    inside = at < most_rows.to(tl.int64) * most_columns
    owned = inside & (row < own_rows) & (column < own_columns)
    flat = tl.load(flats + group).to(tl.pointer_type(tl.float32)) + tl.load(offsets + group) + row * stride + column
    place = stack + group.to(tl.int64) * stack_group + at
    if GIVE:
        value = tl.load(place, mask=owned, other=0.0).to(tl.float32)
        tl.store(flat, tl.load(flat, mask=owned, other=0.0) + value, mask=owned)
    else:
        tl.store(place, tl.load(flat, mask=owned, other=0.0).to(stack.dtype.element_ty), mask=inside)


def _moved(flats: Tensor, table: Tensor, stack: Tensor, give: bool) -> None:
    groups, most_rows, most_columns = stack.shape
    block: Any = 1024
    _move_rows[(groups, triton.cdiv(most_rows * most_columns, block))](
        flats, table[0], table[1], table[2], table[3], stack, most_rows, most_columns, stack.stride(0), give, block,
        num_warps=4,
    )  # fmt: skip


def pack_rows(flats: Tensor, table: Tensor, stack: Tensor) -> None:
    """grouped.pack_rows."""
    _moved(flats, table, stack, give=False)


def add_rows(flats: Tensor, table: Tensor, stack: Tensor) -> None:
    """grouped.add_rows."""
    _moved(flats, table, stack, give=True)
