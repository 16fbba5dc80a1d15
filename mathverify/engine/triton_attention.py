"""Causal attention inside packed segments as Triton kernels, forward and backward (CUDA, half precision).

FlashAttention-2's algorithm (Dao 2023, arXiv:2307.08691) for segments of a few hundred tokens, where general kernels
spend most of their time on tiles that hold little. Key-value heads are shared without copies, gradients of query, key
and value go into one tensor, and nothing is added by atomics: the same input gives the same bits. attention.py has the
same in torch.
"""
# ruff: noqa: N803 (compile-time constants are spelled in capitals, as Triton's users expect)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mathverify.engine.layout import PassLayout

TILE = 64
"""Rows of one tile; a tile never spans two segments."""
_LOG2_E = 1.4426950408889634
_kernel = triton.jit(do_not_specialize=["tokens"])
"""Every pass has its own number of tokens: it must not mean a compilation of its own."""


@_kernel
def _forward(
    q, k, v, out, lse, tiles, q_row, kv_row, out_row, tokens, scale,
    SHARED: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    begin, start, end = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    m = start + tl.arange(0, TILE)
    d = tl.arange(0, SIZE)
    kv = (head // SHARED) * SIZE
    query = tl.load(q + m[:, None].to(tl.int64) * q_row + head * SIZE + d[None, :], mask=(m < end)[:, None], other=0.0)
    most = tl.full([TILE], float("-inf"), dtype=tl.float32)
    total = tl.zeros([TILE], dtype=tl.float32)
    result = tl.zeros([TILE, SIZE], dtype=tl.float32)
    for first in range(begin, start + TILE, TILE):
        n = first + tl.arange(0, TILE)
        inside = n < end
        key = tl.load(k + n[None, :].to(tl.int64) * kv_row + kv + d[:, None], mask=inside[None, :], other=0.0)
        scores = tl.dot(query, key) * scale
        scores = tl.where((m[:, None] >= n[None, :]) & inside[None, :], scores, float("-inf"))
        larger = tl.maximum(most, tl.max(scores, axis=1))
        weights = tl.exp2(scores - larger[:, None])
        shrink = tl.exp2(most - larger)
        total = total * shrink + tl.sum(weights, axis=1)
        value = tl.load(v + n[:, None].to(tl.int64) * kv_row + kv + d[None, :], mask=inside[:, None], other=0.0)
        result = tl.dot(weights.to(value.dtype), value, result * shrink[:, None])
        most = larger
    place = out + m[:, None].to(tl.int64) * out_row + head * SIZE + d[None, :]
    tl.store(place, (result / total[:, None]).to(out.dtype.element_ty), mask=(m < end)[:, None])
    tl.store(lse + head.to(tl.int64) * tokens + m, most + tl.log2(total), mask=m < end)


@_kernel
def _row_products(out, grad, delta, out_row, grad_row, tokens, SIZE: tl.constexpr, ROWS: tl.constexpr) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    d = tl.arange(0, SIZE)
    inside = row < tokens
    place = row[:, None].to(tl.int64)
    a = tl.load(out + place * out_row + head * SIZE + d[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    b = tl.load(grad + place * grad_row + head * SIZE + d[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    tl.store(delta + head.to(tl.int64) * tokens + row, tl.sum(a * b, axis=1), mask=inside)


@_kernel
def _query_grad(
    q, k, v, grad, lse, delta, q_grad, tiles, q_row, kv_row, grad_row, out_row, tokens, scale, plain_scale,
    SHARED: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    begin, start, end = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    m = start + tl.arange(0, TILE)
    d = tl.arange(0, SIZE)
    rows = (m < end)[:, None]
    kv = (head // SHARED) * SIZE
    query = tl.load(q + m[:, None].to(tl.int64) * q_row + head * SIZE + d[None, :], mask=rows, other=0.0)
    out_grad = tl.load(grad + m[:, None].to(tl.int64) * grad_row + head * SIZE + d[None, :], mask=rows, other=0.0)
    own_lse = tl.load(lse + head.to(tl.int64) * tokens + m, mask=m < end, other=0.0)
    own_delta = tl.load(delta + head.to(tl.int64) * tokens + m, mask=m < end, other=0.0)
    result = tl.zeros([TILE, SIZE], dtype=tl.float32)
    for first in range(begin, start + TILE, TILE):
        n = first + tl.arange(0, TILE)
        inside = n < end
        place = n[:, None].to(tl.int64) * kv_row + kv + d[None, :]
        key = tl.load(k + place, mask=inside[:, None], other=0.0)
        value = tl.load(v + place, mask=inside[:, None], other=0.0)
        scores = tl.dot(query, tl.trans(key)) * scale
        seen = (m[:, None] >= n[None, :]) & inside[None, :]
        weights = tl.where(seen, tl.exp2(scores - own_lse[:, None]), 0.0)
        spread = tl.dot(out_grad, tl.trans(value))
        inner = weights * (spread - own_delta[:, None])
        result = tl.dot(inner.to(key.dtype), key, result)
    place = q_grad + m[:, None].to(tl.int64) * out_row + head * SIZE + d[None, :]
    tl.store(place, (result * plain_scale).to(q_grad.dtype.element_ty), mask=rows)


@_kernel
def _key_value_grad(
    q, k, v, grad, lse, delta, k_grad, v_grad, tiles, q_row, kv_row, grad_row, out_row, tokens, scale, plain_scale,
    SHARED: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    tile, shared = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    n = start + tl.arange(0, TILE)
    d = tl.arange(0, SIZE)
    rows = (n < end)[:, None]
    place = n[:, None].to(tl.int64) * kv_row + shared * SIZE + d[None, :]
    key = tl.load(k + place, mask=rows, other=0.0)
    value = tl.load(v + place, mask=rows, other=0.0)
    k_total = tl.zeros([TILE, SIZE], dtype=tl.float32)
    v_total = tl.zeros([TILE, SIZE], dtype=tl.float32)
    for one in range(SHARED):
        head = shared * SHARED + one
        for first in range(start, end, TILE):
            m = first + tl.arange(0, TILE)
            inside = m < end
            query = tl.load(
                q + m[:, None].to(tl.int64) * q_row + head * SIZE + d[None, :], mask=inside[:, None], other=0.0
            )
            out_grad = tl.load(
                grad + m[:, None].to(tl.int64) * grad_row + head * SIZE + d[None, :], mask=inside[:, None], other=0.0
            )
            own_lse = tl.load(lse + head.to(tl.int64) * tokens + m, mask=inside, other=0.0)
            own_delta = tl.load(delta + head.to(tl.int64) * tokens + m, mask=inside, other=0.0)
            scores = tl.dot(key, tl.trans(query)) * scale
            seen = (m[None, :] >= n[:, None]) & inside[None, :]
            weights = tl.where(seen, tl.exp2(scores - own_lse[None, :]), 0.0)
            v_total = tl.dot(weights.to(query.dtype), out_grad, v_total)
            spread = tl.dot(value, tl.trans(out_grad))
            inner = weights * (spread - own_delta[None, :])
            k_total = tl.dot(inner.to(query.dtype), query, k_total)
    place = n[:, None].to(tl.int64) * out_row + shared * SIZE + d[None, :]
    tl.store(k_grad + place, (k_total * plain_scale).to(k_grad.dtype.element_ty), mask=rows)
    tl.store(v_grad + place, v_total.to(v_grad.dtype.element_ty), mask=rows)


def forward(q: Tensor, k: Tensor, v: Tensor, packed: PassLayout, scaling: float) -> tuple[Tensor, Tensor]:
    """Attention's output [tokens, heads, size], and the base-2 log-sum-exp of its scores, float32 [heads, tokens].

    Args:
        q: [tokens, heads, size]. k, v: [tokens, shared heads, size]. Heads lie side by side, rows at any stride.
    """
    tokens, heads, size = q.shape
    out = q.new_empty(tokens, heads, size)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    tiles = packed.tiles(TILE)
    _forward[(len(tiles), heads)](
        q, k, v, out, lse, tiles, q.stride(0), k.stride(0), out.stride(0), tokens, scaling * _LOG2_E,
        heads // k.shape[1], size, TILE, num_warps=4, num_stages=1,
    )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, packed: PassLayout, scaling: float
) -> Tensor:
    """Gradients of q, k and v side by side: [tokens, heads + 2 shared heads, size]."""
    tokens, heads, size = q.shape
    shared = k.shape[1]
    whole = q.new_empty(tokens, heads + 2 * shared, size)
    delta = torch.empty_like(lse)
    _row_products[(triton.cdiv(tokens, 32), heads)](
        out, grad, delta, out.stride(0), grad.stride(0), tokens, size, 32, num_warps=4
    )
    tiles = packed.tiles(TILE)
    q_grad, k_grad, v_grad = whole.split([heads, shared, shared], dim=1)
    strides = q.stride(0), k.stride(0), grad.stride(0), whole.stride(0), tokens, scaling * _LOG2_E, scaling
    _key_value_grad[(len(tiles), shared)](
        q, k, v, grad, lse, delta, k_grad, v_grad, tiles, *strides, heads // shared, size, TILE, num_warps=4,
        num_stages=1,
    )  # fmt: skip
    _query_grad[(len(tiles), heads)](
        q, k, v, grad, lse, delta, q_grad, tiles, *strides, heads // shared, size, TILE, num_warps=4, num_stages=2
    )
    return whole
