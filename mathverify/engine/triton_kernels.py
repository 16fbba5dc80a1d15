"""Triton kernels for CUDA; each is the twin of a torch function that says what it means. Imported on CUDA only.

add_norm, norm_grad, rotate, swiglu, swiglu_grad: elementwise.py. drop: dropout.py. quantize_rows: fp8.py.
pack_rows, rows_times: grouped.py. columns_times says it itself. adamw_8bit: bitsandbytes' AdamW8bit on a CPU.
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
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
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
    _swiglu[(triton.cdiv(inner, block), rows)](gate_up, out, inner, block, num_warps=4)
    return out


@triton.jit
def _swiglu_grad(grad, gate_up, product, gate_up_grad, inner, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < inner
    wide = tl.load(grad + row * inner + at, mask=inside, other=0.0)
    d = wide.to(tl.float32)
    g = tl.load(gate_up + row * 2 * inner + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(gate_up + row * 2 * inner + inner + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    active = g * sigmoid
    gate_grad = d * u * (sigmoid + active * (1.0 - sigmoid))
    tl.store(product + row * inner + at, (active * u).to(wide.dtype), mask=inside)
    tl.store(gate_up_grad + row * 2 * inner + at, gate_grad.to(wide.dtype), mask=inside)
    tl.store(gate_up_grad + row * 2 * inner + inner + at, (d * active).to(wide.dtype), mask=inside)


def swiglu_grad(grad: Tensor, gate_up: Tensor) -> None:
    """elementwise.swiglu_grad."""
    rows, inner = grad.shape
    block = min(2048, _block(inner))
    # The same tensors twice: read and written through one argument it takes 690 us, through two 235 us (H200).
    _swiglu_grad[(triton.cdiv(inner, block), rows)](grad, gate_up, grad, gate_up, inner, block, num_warps=4)


@triton.jit
def _mix(h):
    h = h ^ ((h >> 16) & 0xFFFF)
    h = h * 0x7FEB352D
    h = h ^ ((h >> 15) & 0x1FFFF)
    h = h * -2073254261
    return h ^ ((h >> 16) & 0xFFFF)


@triton.jit
def _drop(x, keys, thresholds, factors, out, linear, width, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
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
    _drop[(triton.cdiv(width, block), rows)](x, keys, thresholds, factors, out, linear, width, block, num_warps=4)
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
def _pack_rows(
    flats, offsets, rows, columns, stack, most_rows, most_columns, stack_group, BLOCK: tl.constexpr
) -> None:  # fmt: skip
    group = tl.program_id(0)
    own_rows, own_columns = tl.load(rows + group), tl.load(columns + group)
    at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, column = at // most_columns, at % most_columns
    inside = at < most_rows.to(tl.int64) * most_columns
    owned = inside & (row < own_rows) & (column < own_columns)
    flat = (
        tl.load(flats + group).to(tl.pointer_type(tl.float32)) + tl.load(offsets + group) + row * own_columns + column
    )
    place = stack + group.to(tl.int64) * stack_group + at
    tl.store(place, tl.load(flat, mask=owned, other=0.0).to(stack.dtype.element_ty), mask=inside)


def pack_rows(flats: Tensor, table: Tensor, stack: Tensor) -> None:
    """grouped.pack_rows."""
    groups, most_rows, most_columns = stack.shape
    block: Any = 1024
    _pack_rows[(groups, triton.cdiv(most_rows * most_columns, block))](
        flats, table[0], table[1], table[2], stack, most_rows, most_columns, stack.stride(0), block, num_warps=4
    )


@triton.jit
def _rows_times(
    x, stack, out, tiles, scales, x_stride, stack_group, stack_k, stack_n, out_stride, inner, width,
    ADD: tl.constexpr, SCALED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    tile = tl.program_id(1)
    group, first, end = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    m = first + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows, columns = (m < end)[:, None], (n < width)[None, :]
    left = x + m[:, None].to(tl.int64) * x_stride + k[None, :]
    right = stack + group.to(tl.int64) * stack_group + k[:, None] * stack_k + n[None, :] * stack_n
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, inner, BLOCK_K):
        left_k = start + k < inner
        a = tl.load(left, mask=rows & left_k[None, :], other=0.0)
        b = tl.load(right, mask=columns & left_k[:, None], other=0.0)
        total = tl.dot(a, b, total)
        left += BLOCK_K
        right += BLOCK_K * stack_k
    if SCALED:
        total *= tl.load(scales + group)
    place = out + m[:, None].to(tl.int64) * out_stride + n[None, :]
    if ADD:
        total += tl.load(place, mask=rows & columns, other=0.0).to(tl.float32)
    tl.store(place, total.to(out.dtype.element_ty), mask=rows & columns)


def rows_times(
    x: Tensor, stack: Tensor, out: Tensor, tiles: Tensor, block_m: int, scales: Tensor | None = None, add: bool = False
) -> None:
    """grouped.rows_times."""
    inner, width = stack.shape[1:]
    # The best of eight shapes each on an H200, 11,340 rows of 8 adapters (tests/benchmarks/NOTES.md).
    block_n, block_k, warps, stages = (64, 128, 8, 3) if width <= 64 else (128, 32, 4, 4)
    _rows_times[(triton.cdiv(width, block_n), len(tiles))](
        x, stack, out, tiles, scales if scales is not None else x, x.stride(0), *stack.stride(), out.stride(0),
        inner, width, add, scales is not None, block_m, block_n, block_k, num_warps=warps, num_stages=stages,
    )  # fmt: skip


@triton.jit
def _columns_times(
    left, right, grads, offsets, ranks, ends, left_stride, right_stride, left_member, width, groups,
    TRANSPOSED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    member, group = tl.program_id(1), tl.program_id(2)
    rank = tl.load(ranks + member * groups + group)
    first = tl.load(ends + group - 1, mask=group > 0, other=0)
    end = tl.load(ends + group)
    if (rank > 0) & (end > first):
        # p counts the adapter's rank, q the wide side, whichever of the two is the matrix's row.
        p = tl.arange(0, BLOCK_P)
        q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        k = tl.arange(0, BLOCK_K)
        low = left + (first + k[None, :]).to(tl.int64) * left_stride + member * left_member + p[:, None]
        wide = right + (first + k[:, None]).to(tl.int64) * right_stride + q[None, :]
        total = tl.zeros([BLOCK_P, BLOCK_Q], dtype=tl.float32)
        for start in range(first, end, BLOCK_K):
            inside = start + k < end
            a = tl.load(low, mask=inside[None, :] & (p < rank)[:, None], other=0.0)
            b = tl.load(wide, mask=inside[:, None] & (q < width)[None, :], other=0.0)
            total = tl.dot(a, b, total)
            low += BLOCK_K * left_stride
            wide += BLOCK_K * right_stride
        flat = tl.load(grads + group).to(tl.pointer_type(tl.float32)) + tl.load(offsets + member * groups + group)
        if TRANSPOSED:
            place = flat + q[None, :].to(tl.int64) * rank + p[:, None]
        else:
            place = flat + p[:, None].to(tl.int64) * width + q[None, :]
        owned = (p < rank)[:, None] & (q < width)[None, :]
        tl.store(place, tl.load(place, mask=owned, other=0.0) + total, mask=owned)


def columns_times(
    low: Tensor, wide: Tensor, grads: Tensor, offsets: Tensor, ranks: Tensor, ends: Tensor, rank: int, width: int,
    transposed: bool,
) -> None:  # fmt: skip
    """Add low^T wide of every adapter, or its transpose, to its float32 gradient.

    Args:
        low: [rows, members x rank]. wide: [rows, width]. grads: int64 [groups], addresses. offsets, ranks: int64
            [members, groups], where each matrix starts in the gradient, and its rank (0: not there). ends: int32
            [groups], where each adapter's rows end. transposed: the matrix is [width, rank].
    """
    members, groups = ranks.shape
    block_p = max(16, _block(rank))
    _columns_times[(triton.cdiv(width, 128), members, groups)](
        low, wide, grads, offsets, ranks, ends, low.stride(0), wide.stride(0), rank, width, groups,
        transposed, block_p, 128, 64, num_warps=4 if block_p <= 64 else 8, num_stages=3,
    )  # fmt: skip


@triton.jit
def _dynamic_place(share, LOWEST: tl.constexpr):
    """Which number of bitsandbytes' dynamic map (Dettmers 2016, arXiv:1511.04561) is nearest, counted from its zero.

    The map has seven decades up to 1; each has twice as many equal steps as the one below it, whose centres are the
    numbers; then 1 itself. LOWEST: steps of the lowest decade. So the place is computed, not searched.
    """
    factor, count = share * 0.0, share * 0.0  # of the decade it lies in: steps a unit, steps
    here = share >= (0.05 + 0.225 / LOWEST) * 1e-6  # half way between zero and the first number
    for decade in tl.static_range(7):
        if decade > 0:  # half way between a decade's first number and the one below it
            here = share >= 10.0 ** (decade - 7) * (1.0 + 1.8 / (LOWEST * 2**decade))
        factor = tl.where(here, LOWEST * 2**decade / 0.9 / 10.0 ** (decade - 6), factor)
        count = tl.where(here, LOWEST * 2**decade, count)
    step = tl.maximum(tl.minimum(tl.floor(share * factor - count / 9.0), count - 1), 0.0)
    place = tl.where(count > 0, 1 + count - LOWEST + step, 0.0).to(tl.int32)
    return tl.where(share >= 1 - 0.225 / (LOWEST * 64), 1 + LOWEST * 127, place)


@triton.jit
def _adamw_8bit(
    parameter, grad, code1, code2, most1, most2, map1, map2, count, beta1, beta2, eps, rate, correction, keep,
    BLOCKS: tl.constexpr,
) -> None:  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * 256 + tl.arange(0, 256)[None, :]
    inside, real = at < count, block * 256 < count
    g = tl.load(grad + at, mask=inside, other=0.0)
    p = tl.load(parameter + at, mask=inside, other=0.0)
    first = tl.load(map1 + tl.load(code1 + at, mask=inside, other=127))  # 127: zero in the signed map
    second = tl.load(map2 + tl.load(code2 + at, mask=inside, other=0))
    first = first * tl.load(most1 + block, mask=real, other=0.0)[:, None]
    second = second * tl.load(most2 + block, mask=real, other=0.0)[:, None]
    first = first * beta1 + g * (1.0 - beta1)
    second = second * beta2 + g * g * (1.0 - beta2)
    p = p * keep - rate * (first / (tl.sqrt(second) / correction + eps))
    tl.store(parameter + at, p, mask=inside)

    size = tl.abs(first)
    largest1, largest2 = tl.max(size, axis=1), tl.max(second, axis=1)
    place1 = _dynamic_place(size / tl.where(largest1 > 0, largest1, 1.0)[:, None], 1)
    place2 = _dynamic_place(second / tl.where(largest2 > 0, largest2, 1.0)[:, None], 2)
    # There is no -1; and as with bitsandbytes what is below zero stays there.
    place1 = tl.where(first < 0, 127 - tl.maximum(tl.minimum(place1, 127), 1), 127 + place1)
    tl.store(code1 + at, place1.to(tl.uint8), mask=inside)
    tl.store(code2 + at, place2.to(tl.uint8), mask=inside)
    tl.store(most1 + block, largest1, mask=real)
    tl.store(most2 + block, largest2, mask=real)


def adamw_8bit(parameter: Tensor, grad: Tensor, state: dict[str, Any], options: dict[str, Any]) -> None:
    """One AdamW step (Loshchilov & Hutter 2019, arXiv:1711.05101) with block-wise 8-bit state (arXiv:2110.02861).

    Args:
        parameter, grad: float32, contiguous. state: bitsandbytes' (codes, maxima of blocks of 256, maps, step >= 1).
        options: lr, betas, eps, weight_decay.
    """
    (beta1, beta2), rate, step = options["betas"], options["lr"], state["step"]
    blocks = 4
    _adamw_8bit[(triton.cdiv(parameter.numel(), 256 * blocks),)](
        parameter, grad, state["state1"], state["state2"], state["absmax1"], state["absmax2"], state["qmap1"],
        state["qmap2"], parameter.numel(), beta1, beta2, options["eps"], rate / (1.0 - beta1**step),
        (1.0 - beta2**step) ** 0.5, 1.0 - rate * options["weight_decay"], blocks, num_warps=4,
    )  # fmt: skip
