"""One pass: segments laid end to end, and which tokens belong to which segment and which trial. No model here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Segment:
    """One example's tokens in a pass.

    ids: int32 [length]. slot: which adapter of the pass applies, None for the bare base. weight: factor of this
    segment's loss in its trial's step loss. label: the verdict. key: where dropout masks of its tokens come from.
    """

    ids: NDArray[np.int32]
    label: bool
    slot: int | None = 0
    weight: float = 1.0
    key: int = 0

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens start..end-1 of a pass, all of one adapter (or of none)."""

    slot: int | None
    start: int
    end: int


class Rows:
    """Which rows of a matrix belong to which adapter; rows of none come first, then adapter after adapter."""

    def __init__(self, spans: list[Span], device: torch.device) -> None:
        self.spans, self.device = spans, device
        self._ends: torch.Tensor | None = None
        self._tiles: torch.Tensor | None = None

    @property
    def first(self) -> int:
        """The first row that an adapter applies to."""
        return self.spans[0].end if self.spans[0].slot is None else 0

    def ends(self, slots: int) -> torch.Tensor:
        """int32 [slots]: where each adapter's rows end, counted from `first`; one without rows repeats the last."""
        if self._ends is None:
            ends = np.zeros(slots, dtype=np.int32)
            for span in self.spans:
                if span.slot is not None:
                    ends[span.slot] = span.end - self.first
            values = torch.from_numpy(np.maximum.accumulate(ends))
            self._ends = values.to(self.device, non_blocking=True)
        return self._ends

    def tiles(self, size: int) -> torch.Tensor:
        """int32 [tiles, 3]: slot, first row and end of tiles of at most `size` rows, each within one adapter."""
        if self._tiles is None:
            cut = [
                (span.slot, start, min(start + size, span.end))
                for span in self.spans
                if span.slot is not None
                for start in range(span.start, span.end, size)
            ]
            values = torch.tensor(cut, dtype=torch.int32)
            self._tiles = values.to(self.device, non_blocking=True)
        return self._tiles

    def per_row(self, values: Sequence[float]) -> torch.Tensor:
        """float32 [rows]: for each row the value of its adapter, 1 for rows of none."""
        if len(self.spans) == 1:  # made on the device: a CUDA graph can hold that, and not a copy from the host
            (span,) = self.spans
            value = 1.0 if span.slot is None else float(values[span.slot])
            return torch.full((span.end - span.start,), value, device=self.device)
        parts = [
            np.full(span.end - span.start, 1.0 if span.slot is None else values[span.slot], dtype=np.float32)
            for span in self.spans
        ]
        return torch.from_numpy(np.concatenate(parts)).to(self.device, non_blocking=True)


class PassLayout:
    """Segments of one pass, ordered by slot so that each adapter's tokens are contiguous.

    ids, positions: int64 [1, tokens]. starts: int32 [segments + 1], running token offsets. last: int64 [segments],
    the index of each segment's last token.

    steady: the shapes of all tensors, and `longest`, are to depend on the numbers of tokens and segments only.
    """

    def __init__(self, segments: Sequence[Segment], device: torch.device | str = "cpu", steady: bool = False) -> None:
        assert segments, "a pass has at least one segment"
        slots = [-1 if segment.slot is None else segment.slot for segment in segments]
        self.order = sorted(range(len(segments)), key=slots.__getitem__)
        self.segments = [segments[i] for i in self.order]
        self.device = torch.device(device)
        lengths = np.array([len(s) for s in self.segments], dtype=np.int64)
        self.lengths = lengths
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.tokens = int(self.offsets[-1])
        self.steady = steady
        self.longest = self.tokens if steady else int(lengths.max())
        self.spans = self._spans(self.offsets)
        self._tiles: torch.Tensor | None = None
        self._tile_size = 0

    def _spans(self, offsets: NDArray[np.int64]) -> list[Span]:
        spans: list[Span] = []
        for segment, start, end in zip(self.segments, offsets[:-1], offsets[1:], strict=True):
            if spans and spans[-1].slot == segment.slot:
                spans[-1] = Span(segment.slot, spans[-1].start, int(end))
            else:
                spans.append(Span(segment.slot, int(start), int(end)))
        return spans

    @cached_property
    def token_rows(self) -> Rows:
        """Rows of matrices with one row a token."""
        return Rows(self.spans, self.device)

    @cached_property
    def segment_rows(self) -> Rows:
        """Rows of matrices with one row a segment."""
        return Rows(self._spans(np.arange(len(self.segments) + 1)), self.device)

    def _tensor(self, values: NDArray[np.generic], dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(dtype).to(self.device, non_blocking=True)

    @cached_property
    def ids(self) -> torch.Tensor:
        return self._tensor(np.concatenate([s.ids for s in self.segments]), torch.int64)[None]

    @cached_property
    def positions(self) -> torch.Tensor:
        return self._tensor(self._positions, torch.int64)[None]

    @cached_property
    def _positions(self) -> NDArray[np.int64]:
        positions: NDArray[np.int64] = np.arange(self.tokens) - np.repeat(self.offsets[:-1], self.lengths)
        return positions

    @cached_property
    def starts(self) -> torch.Tensor:
        return self._tensor(self.offsets, torch.int32)

    @cached_property
    def last(self) -> torch.Tensor:
        return self._tensor(self.offsets[1:] - 1, torch.int64)

    @cached_property
    def weights(self) -> torch.Tensor:
        """float32 [segments]."""
        return self._tensor(np.array([s.weight for s in self.segments]), torch.float32)

    @cached_property
    def signs(self) -> torch.Tensor:
        """float32 [segments]: 1 where the label is True, else -1."""
        return self._tensor(np.array([1.0 if s.label else -1.0 for s in self.segments]), torch.float32)

    @cached_property
    def slots(self) -> torch.Tensor:
        """int64 [segments]; -1 for the bare base."""
        return self._tensor(np.array([-1 if s.slot is None else s.slot for s in self.segments]), torch.int64)

    @cached_property
    def padded_index(self) -> torch.Tensor:
        """int64 [tokens]: where each token goes in a [segments x longest] grid."""
        rows = np.repeat(np.arange(len(self.segments)), self.lengths)
        return self._tensor(rows * self.longest + self._positions, torch.int64)

    @cached_property
    def padded_mask(self) -> torch.Tensor:
        """bool [segments, longest]: which places of that grid hold a token."""
        return self._tensor(np.arange(self.longest)[None] < self.lengths[:, None], torch.bool)

    def tiles(self, size: int) -> torch.Tensor:
        """int32 [tiles, 3]: its segment's first token, first token and segment's end of tiles of `size` tokens.

        In a steady layout there are as many as there could be; those that hold nothing are 0, 0, 0.
        """
        if self._tiles is None:
            self._tile_size = size
            counts = -(-self.lengths // size)
            begins, ends = np.repeat(self.offsets[:-1], counts), np.repeat(self.offsets[1:], counts)
            inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            tiles = np.stack([begins, begins + inside * size, ends], axis=1)
            if self.steady:
                most = self.tokens // size + len(self.segments)
                tiles = np.concatenate([tiles, np.zeros((most - len(tiles), 3), dtype=tiles.dtype)])
            self._tiles = self._tensor(tiles, torch.int32)
        return self._tiles

    @cached_property
    def one_each(self) -> torch.Tensor:
        """int32 [segments + 1]: running offsets of one row a segment."""
        return self._tensor(np.arange(len(self.segments) + 1), torch.int32)

    @cached_property
    def token_keys(self) -> torch.Tensor:
        """int32 [tokens]: a number for each token that depends on its segment's key and its position only."""
        keys = np.array([s.key for s in self.segments], dtype=np.uint64)
        mixed = np.repeat(keys, self.lengths) * np.uint64(0x9E3779B1) + self._positions.astype(np.uint64)
        return self._tensor((mixed & np.uint64(0xFFFFFFFF)).astype(np.uint32).view(np.int32), torch.int32)

    def become(self, other: PassLayout) -> None:
        """Take over another steady pass of as many tokens and segments, all of one slot: the tensors that are there
        are overwritten in place, for CUDA graphs that read them. Only tensors follow, not `segments` and the like."""
        assert self.steady
        assert other.steady
        assert len(self.segments) == len(other.segments)
        assert self.spans == other.spans
        for name, own in list(vars(self).items()):
            if isinstance(own, torch.Tensor):
                theirs = other.tiles(self._tile_size) if name == "_tiles" else getattr(other, name)
                own.copy_(theirs, non_blocking=True)

    def unsorted(self, values: torch.Tensor) -> torch.Tensor:
        """Per-segment values [segments, ...] back in the order in which the segments were given."""
        back = torch.empty(len(self.order), dtype=torch.int64)
        back[torch.tensor(self.order)] = torch.arange(len(self.order))
        return values[back.to(values.device)]
