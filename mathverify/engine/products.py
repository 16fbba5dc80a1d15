"""The low-rank products of a pass: for linears that share their input, every adapter on its own rows only.

A decoder asks for five, in this order (x [rows, in], y [rows, out of all members], R the members' ranks summed):
    low  = scale * x A^T            `down`      [rows, R], before the base's product
    y   += low B^T                  `up`
    grad of low, and of B           `grad_up`
    grad of x, low-rank share       `spread`    [rows, in]
    grad of A                       `grad_down`
Two ways: `LoopProducts`, a product an adapter, for CPUs and for a single adapter; `GroupedProducts` (grouped.py), one
grouped GEMM for all of them. Gradients are added to the adapters' own float32 tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mathverify.engine.dropout import PassDropout, linear_key
from mathverify.engine.layout import Rows
from mathverify.engine.lora import Adapter


class Products(Protocol):
    """The low-rank products of some linears with one input, for all adapters of a pass. Members go by their place."""

    def down(self, x: Tensor, rows: Rows, dropout: PassDropout | None) -> Tensor:
        """scale * x A^T, members side by side: [rows, R]; R is the largest of the adapters'."""

    def up(self, y: Tensor, low: Tensor, rows: Rows, fresh: bool) -> None:
        """y += low B^T; with `fresh` y holds nothing yet and is written everywhere."""

    def grad_up(self, grad: Tensor, low: Tensor, rows: Rows) -> Tensor:
        """Gradient of x A^T from that of y (scale included), [rows, R]; B's is added where it belongs."""

    def spread(
        self, grad_low: Tensor, width: int, rows: Rows, dropout: PassDropout | None, into: Tensor | None = None
    ) -> Tensor:
        """The low-rank share of x's gradient, [rows, width]; added to `into` if given."""

    def grad_down(self, grad_low: Tensor, x: Tensor, rows: Rows, dropout: PassDropout | None) -> None:
        """A's gradient is added where it belongs."""


@dataclass(frozen=True)
class _Member:
    """One adapted linear within a group: its columns of y and of low, B [out, rank] and B's gradient."""

    name: str
    columns: slice
    ranks: slice
    b: Tensor
    b_grad: Tensor


@dataclass(frozen=True)
class _Share:
    """What one adapter has in a group: A of its members stacked [R, in], and A's gradient."""

    a: Tensor
    a_grad: Tensor
    scale: float
    members: list[_Member]

    @property
    def rank(self) -> int:
        return self.a.shape[0]


class LoopProducts:
    """One product per adapter: best on a CPU, and for one adapter anywhere."""

    def __init__(self, shares: Sequence[_Share | None], out: int) -> None:
        self._shares, self._out = shares, out
        self._rank = max(share.rank for share in shares if share is not None)

    def down(self, x: Tensor, rows: Rows, dropout: PassDropout | None) -> Tensor:
        low = x.new_empty(len(x), self._rank)
        for span, part in self._parts(rows, low):
            own = low[span]
            if part is None or part.rank < self._rank:
                own.zero_()
            if part is None:
                continue
            if dropout is None:
                torch.mm(x[span], part.a.t(), out=own[:, : part.rank])
            else:
                for member in part.members:
                    dropped = dropout.apply(x[span], span, linear_key(member.name))
                    torch.mm(dropped, part.a[member.ranks].t(), out=own[:, member.ranks])
            if part.scale != 1.0:
                own.mul_(part.scale)
        return low

    def up(self, y: Tensor, low: Tensor, rows: Rows, fresh: bool) -> None:
        for span, part in self._parts(rows, low):
            covered = 0 if part is None else sum(m.columns.stop - m.columns.start for m in part.members)
            if fresh and covered < self._out:
                y[span].zero_()
            for member in () if part is None else part.members:
                place = y[span, member.columns]
                torch.addmm(place, low[span, member.ranks], member.b.t(), beta=0.0 if fresh else 1.0, out=place)

    def grad_up(self, grad: Tensor, low: Tensor, rows: Rows) -> Tensor:
        grad_low = torch.empty_like(low)
        for span, part in self._parts(rows, low):
            if part is None:
                continue
            for member in part.members:
                own = grad[span, member.columns]
                torch.mm(own, member.b, out=grad_low[span, member.ranks])
                _add_product(member.b_grad, own.t(), low[span, member.ranks])
            if part.scale != 1.0:
                grad_low[span].mul_(part.scale)
        return grad_low

    def spread(
        self, grad_low: Tensor, width: int, rows: Rows, dropout: PassDropout | None, into: Tensor | None = None
    ) -> Tensor:
        out = grad_low.new_empty(len(grad_low), width) if into is None else into
        for span, part in self._parts(rows, grad_low):
            if into is None and (part is None or dropout is not None):
                out[span].zero_()
            if part is None:
                continue
            if dropout is None:
                own = out[span]
                torch.addmm(own, grad_low[span, : part.rank], part.a, beta=0.0 if into is None else 1.0, out=own)
            else:
                for member in part.members:
                    own = grad_low[span, member.ranks] @ part.a[member.ranks]
                    out[span].add_(dropout.apply(own, span, linear_key(member.name)))
        return out

    def grad_down(self, grad_low: Tensor, x: Tensor, rows: Rows, dropout: PassDropout | None) -> None:
        for span, part in self._parts(rows, grad_low):
            if part is None:
                continue
            if dropout is None:
                _add_product(part.a_grad, grad_low[span, : part.rank].t(), x[span])
                continue
            for member in part.members:
                dropped = dropout.apply(x[span], span, linear_key(member.name))
                _add_product(part.a_grad[member.ranks], grad_low[span, member.ranks].t(), dropped)

    def _parts(self, rows: Rows, low: Tensor) -> list[tuple[slice, _Share | None]]:
        return [
            (slice(span.start, span.end), None if span.slot is None else self._shares[span.slot]) for span in rows.spans
        ]


class LoopWeights:
    """Adapters' weights in the dtype of the passes, made once for all passes that share them.

    In float32 these are the adapters themselves, and a copy of a single one is small: both last.
    """

    def __init__(self, adapters: Sequence[Adapter | None], dtype: torch.dtype) -> None:
        self.lasting = dtype is torch.float32 or len(adapters) == 1
        self._adapters = adapters
        self._flats = [None if adapter is None else adapter.flat.detach().to(dtype) for adapter in adapters]
        self._made: dict[tuple[str, ...], LoopProducts | None] = {}

    def refresh(self) -> None:
        for adapter, flat in zip(self._adapters, self._flats, strict=True):
            if adapter is not None and flat is not None and flat.dtype is not adapter.flat.dtype:
                flat.copy_(adapter.flat)

    def products(self, names: tuple[str, ...], outs: tuple[int, ...]) -> Products | None:
        """The products of linears with one input, members in this order; None when no adapter targets any of them."""
        if names not in self._made:
            shares = [self._share(slot, names, outs) for slot in range(len(self._adapters))]
            some = any(share is not None for share in shares)
            self._made[names] = LoopProducts(shares, sum(outs)) if some else None
        return self._made[names]

    def _share(self, slot: int, names: tuple[str, ...], outs: tuple[int, ...]) -> _Share | None:
        adapter, flat = self._adapters[slot], self._flats[slot]
        own = [name for name in names if adapter is not None and name in adapter.pairs]
        if adapter is None or flat is None or not own:
            return None
        rank, width = adapter.lora.rank, adapter.shapes[own[0]][0]
        stacked = slice(adapter.places[own[0]][0], adapter.places[own[-1]][0] + rank * width)
        members: list[_Member] = []
        for name, column in zip(names, _starts(outs), strict=True):
            if name not in adapter.pairs:
                continue
            out = adapter.shapes[name][1]
            place = slice(adapter.places[name][1], adapter.places[name][1] + rank * out)
            low = len(members) * rank
            members.append(
                _Member(
                    name,
                    slice(column, column + out),
                    slice(low, low + rank),
                    flat[place].view(out, rank),
                    adapter.grad[place].view(out, rank),
                )
            )
        a, a_grad = (t[stacked].view(rank * len(own), width) for t in (flat, adapter.grad))
        return _Share(a, a_grad, adapter.lora.scale, members)


def _add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    """into += a b, whatever the dtype of the passes: a gradient is float32."""
    if a.dtype is into.dtype:
        into.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(into, a, b, out_dtype=into.dtype, out=into)
    else:
        into.add_(a @ b)


def _starts(outs: Sequence[int]) -> list[int]:
    starts, total = [], 0
    for out in outs:
        starts.append(total)
        total += out
    return starts


class Weights(Protocol):
    """What a pass's products are made from.

    lasting: worth keeping for the next round of the same adapters.
    """

    lasting: bool

    def refresh(self) -> None:
        """Take over the adapters' present numbers, in place where they last."""

    def products(self, names: tuple[str, ...], outs: tuple[int, ...]) -> Products | None:
        """See LoopWeights.products."""


def weights_of(adapters: Sequence[Adapter | None], dtype: torch.dtype, device: torch.device) -> Weights:
    """The adapters of coming passes, ready for their products; valid until an adapter changes."""
    grouped = device.type == "cuda" and dtype is torch.bfloat16 and sum(a is not None for a in adapters) > 1
    if grouped:
        from mathverify.engine.grouped import GroupedWeights

        return GroupedWeights(adapters, dtype, device)
    return LoopWeights(adapters, dtype)
