"""The low-rank products of many adapters as grouped GEMMs: one launch for all of them (CUDA, bf16).

Adapters of one pass may differ in rank and in what they target; their weights are copied into stacks padded with zeros
to the largest rank (a multiple of 8, as torch's grouped_mm wants 16-byte rows); gradients are added back from there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from mathverify.engine.dropout import PassDropout, linear_key
from mathverify.engine.layout import Rows
from mathverify.engine.lora import Adapter


def pack_rows(flats: Tensor, table: Tensor, stack: Tensor) -> None:
    """Copy one matrix of each adapter into a stack, with zeros where an adapter has nothing.

    Args:
        flats: int64 [groups], addresses of the adapters' float32 tensors. table: int64 [4, groups]: offset in that
            tensor, rows, columns and row stride of each one's matrix. stack: [groups, rows, columns], contiguous.
    """
    from mathverify.engine import triton_kernels

    triton_kernels.pack_rows(flats, table, stack)


def add_rows(flats: Tensor, table: Tensor, stack: Tensor) -> None:
    """Add a stack's matrices to the adapters' float32 tensors; the inverse of `pack_rows`."""
    from mathverify.engine import triton_kernels

    triton_kernels.add_rows(flats, table, stack)


class GroupedWeights:
    """See products.LoopWeights; stacks are made once for all passes that share them."""

    def __init__(self, adapters: Sequence[Adapter | None], dtype: torch.dtype, device: torch.device) -> None:
        self.adapters, self.dtype, self.device = adapters, dtype, device
        self.rank = max((a.lora.rank + 7) // 8 * 8 for a in adapters if a is not None)
        address = [0 if a is None else a.flat.data_ptr() for a in adapters]
        grads = [0 if a is None else a.grad.data_ptr() for a in adapters]
        self.flats, self.grads = (torch.tensor(t, dtype=torch.int64, device=device) for t in (address, grads))
        self.scales = [1.0 if a is None else a.lora.scale for a in adapters]
        self._made: dict[tuple[str, ...], GroupedProducts | None] = {}

    def products(self, names: tuple[str, ...], outs: tuple[int, ...]) -> GroupedProducts | None:
        if names not in self._made:
            some = any(a is not None and name in a.pairs for a in self.adapters for name in names)
            self._made[names] = GroupedProducts(self, names, outs) if some else None
        return self._made[names]

    def table(self, name: str, letter: int) -> Tensor:
        """int64 [4, groups] of A (letter 0) or B (letter 1) of a linear, as `pack_rows` takes it."""
        columns = []
        for adapter in self.adapters:
            if adapter is None or name not in adapter.pairs:
                columns.append((0, 0, 0, 0))
                continue
            rows, width = adapter.pairs[name][letter].shape
            columns.append((adapter.places[name][letter], rows, width, width))
        return torch.tensor(columns, dtype=torch.int64).t().contiguous().to(self.device, non_blocking=True)


class GroupedProducts:
    """See products.Products. a: [groups, members x rank, in]. b: per member [groups, out, rank]."""

    def __init__(self, weights: GroupedWeights, names: tuple[str, ...], outs: tuple[int, ...]) -> None:
        self._w, self._names, self._outs = weights, names, outs
        groups, rank = len(weights.adapters), weights.rank
        width = next(a.shapes[n][0] for a in weights.adapters for n in names if a is not None and n in a.pairs)
        self._a_tables = [weights.table(name, 0) for name in names]
        self._b_tables = [weights.table(name, 1) for name in names]
        stacks = [torch.empty(groups, rank, width, dtype=weights.dtype, device=weights.device) for _ in names]
        for table, stack in zip(self._a_tables, stacks, strict=True):
            pack_rows(weights.flats, table, stack)
        self._a = stacks[0] if len(names) == 1 else torch.cat(stacks, dim=1)
        self._b = []
        for table, out in zip(self._b_tables, outs, strict=True):
            stack = torch.empty(groups, out, rank, dtype=weights.dtype, device=weights.device)
            pack_rows(weights.flats, table, stack)
            self._b.append(stack)

    def _ranks(self, member: int) -> slice:
        return slice(member * self._w.rank, (member + 1) * self._w.rank)

    def _columns(self, member: int) -> slice:
        start = sum(self._outs[:member])
        return slice(start, start + self._outs[member])

    def down(self, x: Tensor, rows: Rows, dropout: PassDropout | None) -> Tensor:
        low = x.new_empty(len(x), len(self._names) * self._w.rank)
        first, ends = rows.first, rows.ends(len(self._w.adapters))
        low[:first].zero_()
        if dropout is None:
            low[first:] = grouped_mm(x[first:], self._a.transpose(1, 2), offs=ends)
        else:
            span = slice(first, len(x))
            for member, name in enumerate(self._names):
                dropped = dropout.apply(x[span], span, linear_key(name))
                low[first:, self._ranks(member)] = grouped_mm(
                    dropped, self._a[:, self._ranks(member)].transpose(1, 2), offs=ends
                )
        self._scale(low, rows)
        return low

    def up(self, y: Tensor, low: Tensor, rows: Rows, fresh: bool) -> None:
        first, ends = rows.first, rows.ends(len(self._w.adapters))
        if fresh:
            y[:first].zero_()
        for member, b in enumerate(self._b):
            own = grouped_mm(low[first:, self._ranks(member)], b.transpose(1, 2), offs=ends)
            place = y[first:, self._columns(member)]
            place.copy_(own) if fresh else place.add_(own)

    def grad_up(self, grad: Tensor, low: Tensor, rows: Rows) -> Tensor:
        first, ends = rows.first, rows.ends(len(self._w.adapters))
        grad_low = torch.empty_like(low)
        for member, (b, table) in enumerate(zip(self._b, self._b_tables, strict=True)):
            own = grad[first:, self._columns(member)]
            grad_low[first:, self._ranks(member)] = grouped_mm(own, b, offs=ends)
            found = grouped_mm(own.t(), low[first:, self._ranks(member)], offs=ends)
            add_rows(self._w.grads, self._present(table, rows), found)
        self._scale(grad_low, rows)
        return grad_low

    def spread(self, grad_low: Tensor, width: int, rows: Rows, dropout: PassDropout | None) -> Tensor:
        first, ends = rows.first, rows.ends(len(self._w.adapters))
        if dropout is None:
            own = grouped_mm(grad_low[first:], self._a, offs=ends)
            return own if first == 0 else torch.cat([own.new_zeros(first, width), own])
        out = grad_low.new_zeros(len(grad_low), width)
        span = slice(first, len(grad_low))
        for member, name in enumerate(self._names):
            own = grouped_mm(grad_low[first:, self._ranks(member)], self._a[:, self._ranks(member)], offs=ends)
            out[first:] += dropout.apply(own, span, linear_key(name))
        return out

    def grad_down(self, grad_low: Tensor, x: Tensor, rows: Rows, dropout: PassDropout | None) -> None:
        first, ends = rows.first, rows.ends(len(self._w.adapters))
        span = slice(first, len(x))
        together = None if dropout is not None else grouped_mm(grad_low[first:].t(), x[first:], offs=ends)
        for member, (name, table) in enumerate(zip(self._names, self._a_tables, strict=True)):
            if together is None:
                assert dropout is not None
                dropped = dropout.apply(x[span], span, linear_key(name))
                found = grouped_mm(grad_low[first:, self._ranks(member)].t(), dropped, offs=ends)
            else:
                found = together[:, self._ranks(member)]
            add_rows(self._w.grads, self._present(table, rows), found)

    def _scale(self, low: Tensor, rows: Rows) -> None:
        if any(scale != 1.0 for scale in self._w.scales):
            low[rows.first :].mul_(rows.per_row(self._w.scales)[rows.first :, None])

    def _present(self, table: Tensor, rows: Rows) -> Tensor:
        """The table without adapters that have no rows in this pass: their products hold nothing."""
        if rows.has_all(len(self._w.adapters)):
            return table
        masked = table.clone()
        masked[1] *= rows.present(len(self._w.adapters))
        return masked
