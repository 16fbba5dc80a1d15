"""The low-rank products of many adapters in few launches: every kernel runs over all adapters' rows (CUDA, bf16).

Adapters of one pass may differ in rank and in what they target. Their weights are copied into stacks padded with zeros
to the largest rank (a multiple of 8: rows of 16 bytes); gradients go straight into the adapters' own float32 tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mathverify.engine import triton_kernels
from mathverify.engine.dropout import PassDropout, linear_key
from mathverify.engine.layout import Rows
from mathverify.engine.lora import Adapter

TILE = 128
"""Rows of one tile; a tile never spans two adapters."""


def pack_rows(flats: Tensor, table: Tensor, stack: Tensor) -> None:
    """Copy one matrix of each adapter into a stack, with zeros where an adapter has nothing.

    Args:
        flats: int64 [groups], addresses of the adapters' float32 tensors. table: int64 [3, groups]: offset in that
            tensor, rows and columns of each one's matrix. stack: [groups, rows, columns], contiguous.
    """
    triton_kernels.pack_rows(flats, table, stack)


def rows_times(
    x: Tensor, stack: Tensor, out: Tensor, rows: Rows, scales: Tensor | None = None, add: bool = False
) -> None:
    """out[i] (+)= scale_g x[i] stack[g] for every row i of every adapter g; rows of no adapter are left alone.

    Args:
        x: [rows, inner]. stack: [groups, inner, width]. out: [rows, width]. All with any strides between rows.
        scales: float32 [groups], 1 if None. add: add to `out` instead of writing it.
    """
    triton_kernels.rows_times(x, stack, out, rows.tiles(TILE), TILE, scales, add)


class GroupedWeights:
    """See products.LoopWeights; stacks are made once for all passes that share them, and let go after the round: they
    take as much memory as all adapters, which the optimizers' first step may need."""

    lasting = False

    def __init__(self, adapters: Sequence[Adapter | None], dtype: torch.dtype, device: torch.device) -> None:
        # Products know the adapters, not this: in a cycle they would outlive their round, gigabytes of them.
        self._adapters = _Adapters(adapters, dtype, device)
        self._made: dict[tuple[str, ...], GroupedProducts | None] = {}

    def refresh(self) -> None:
        self._made.clear()

    def products(self, names: tuple[str, ...], outs: tuple[int, ...]) -> GroupedProducts | None:
        if names not in self._made:
            some = any(a is not None for name in names for a in self._adapters.owners(name))
            self._made[names] = GroupedProducts(self._adapters, names, outs) if some else None
        return self._made[names]


class _Adapters:
    """The adapters of a pass by slot, as kernels find them: addresses of their tensors, scales, stacks of matrices."""

    def __init__(self, adapters: Sequence[Adapter | None], dtype: torch.dtype, device: torch.device) -> None:
        self.adapters, self.dtype, self.device = adapters, dtype, device
        self.rank = max((a.lora.rank + 7) // 8 * 8 for a in adapters if a is not None)
        self.flats = self.tensor([0 if a is None else a.flat.data_ptr() for a in adapters])
        self.grads = self.tensor([0 if a is None else a.grad.data_ptr() for a in adapters])
        scales = [1.0 if a is None else a.lora.scale for a in adapters]
        self.scales = None if set(scales) == {1.0} else torch.tensor(scales, device=device)

    def tensor(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self.device, non_blocking=True)

    def owners(self, name: str) -> list[Adapter | None]:
        """The adapters by slot, None for those that do not target this linear."""
        return [a if a is not None and name in a.pairs else None for a in self.adapters]

    def stack(self, name: str, letter: int, rows: int, columns: int) -> Tensor:
        """A (letter 0) or B (letter 1) of a linear, all adapters': [groups, rows, columns]."""
        owners = self.owners(name)
        shapes = [(0, 0) if a is None else tuple(a.pairs[name][letter].shape) for a in owners]
        offsets = [0 if a is None else a.places[name][letter] for a in owners]
        table = self.tensor([offsets, [s[0] for s in shapes], [s[1] for s in shapes]])
        stack = torch.empty(len(owners), rows, columns, dtype=self.dtype, device=self.device)
        pack_rows(self.flats, table, stack)
        return stack


class GroupedProducts:
    """See products.Products. a: [groups, members x rank, in]. b: per member [groups, out, rank]."""

    def __init__(self, weights: _Adapters, names: tuple[str, ...], outs: tuple[int, ...]) -> None:
        self._w, self._names, self._outs, self._rank = weights, names, outs, weights.rank
        width = next(a.shapes[n][0] for a in weights.adapters for n in names if a is not None and n in a.pairs)
        stacks = [weights.stack(name, 0, self._rank, width) for name in names]
        self._a = stacks[0] if len(names) == 1 else torch.cat(stacks, dim=1)
        self._b = [weights.stack(name, 1, out, self._rank) for name, out in zip(names, outs, strict=True)]
        owners = [weights.owners(name) for name in names]
        self._ranks = weights.tensor([[0 if a is None else a.lora.rank for a in own] for own in owners])
        self._places = [
            weights.tensor([[0 if a is None else a.places[n][letter] for a in own] for n, own in self._named(owners)])
            for letter in (0, 1)
        ]

    def _named(self, owners: list[list[Adapter | None]]) -> list[tuple[str, list[Adapter | None]]]:
        return list(zip(self._names, owners, strict=True))

    def _low(self, member: int) -> slice:
        return slice(member * self._rank, (member + 1) * self._rank)

    def _columns(self, member: int) -> slice:
        start = sum(self._outs[:member])
        return slice(start, start + self._outs[member])

    def down(self, x: Tensor, rows: Rows, dropout: PassDropout | None) -> Tensor:
        low = x.new_empty(len(x), len(self._names) * self._rank)
        low[: rows.first].zero_()
        if dropout is None:
            rows_times(x, self._a.transpose(1, 2), low, rows, self._w.scales)
            return low
        for member, name in enumerate(self._names):
            dropped = dropout.apply(x, slice(None), linear_key(name))
            own = self._a[:, self._low(member)].transpose(1, 2)
            rows_times(dropped, own, low[:, self._low(member)], rows, self._w.scales)
        return low

    def up(self, y: Tensor, low: Tensor, rows: Rows, fresh: bool) -> None:
        if fresh:
            y[: rows.first].zero_()
        for member, b in enumerate(self._b):
            own, place = low[:, self._low(member)], y[:, self._columns(member)]
            rows_times(own, b.transpose(1, 2), place, rows, add=not fresh)

    def grad_up(self, grad: Tensor, low: Tensor, rows: Rows) -> Tensor:
        grad_low = torch.empty_like(low)
        for member, b in enumerate(self._b):
            own = grad[:, self._columns(member)]
            rows_times(own, b, grad_low[:, self._low(member)], rows, self._w.scales)
            self._add_grads(1, low[:, self._low(member)], own, member, rows)
        return grad_low

    def spread(
        self, grad_low: Tensor, width: int, rows: Rows, dropout: PassDropout | None, into: Tensor | None = None
    ) -> Tensor:
        out = grad_low.new_empty(len(grad_low), width) if into is None else into
        if into is None:
            out[: rows.first if dropout is None else len(out)].zero_()
        if dropout is None:
            rows_times(grad_low, self._a, out, rows, add=into is not None)
            return out
        own = torch.zeros_like(out)
        for member, name in enumerate(self._names):
            rows_times(grad_low[:, self._low(member)], self._a[:, self._low(member)], own, rows)
            out += dropout.apply(own, slice(None), linear_key(name))
        return out

    def grad_down(self, grad_low: Tensor, x: Tensor, rows: Rows, dropout: PassDropout | None) -> None:
        if dropout is None:
            self._add_grads(0, grad_low, x, None, rows)
            return
        for member, name in enumerate(self._names):
            dropped = dropout.apply(x, slice(None), linear_key(name))
            self._add_grads(0, grad_low[:, self._low(member)], dropped, member, rows)

    def _add_grads(self, letter: int, low: Tensor, wide: Tensor, member: int | None, rows: Rows) -> None:
        """Add low^T wide (A: [rank, in]) or its transpose (B: [out, rank]) of every adapter to its gradient.

        member: which linear's; None for all of the group, which then share `wide`.
        """
        chosen = slice(None) if member is None else slice(member, member + 1)
        triton_kernels.columns_times(
            low[rows.first :],
            wide[rows.first :],
            self._w.grads,
            self._places[letter][chosen],
            self._ranks[chosen],
            rows.ends(len(self._w.adapters)),
            self._rank,
            wide.shape[1],
            transposed=letter == 1,
        )
