"""Small passes of one adapter as CUDA graphs: recorded once for each size, then launched as a whole.

A pass of an 8B model is a few thousand launches. Python needs 0.1 to 0.3 s for them, as the host's cores go, and a GPU
less than that for a pass of up to some 4,000 tokens: it would wait. A graph holds fixed shapes, and every pass has
another number of tokens; so passes are rounded up with segments that weigh nothing. That changes a result no more than
another cutting into passes does. A pass that is not recorded (yet) is rounded up all the same: when a size is recorded
makes no difference to a bit of the result.

Graphs share memory, which is laid out for the first of them. One of a larger pass finds no place in it and takes more,
so that a few dozen sizes in the order of their coming would hold several times what one pass needs. Therefore a pass
with room to spare is recorded first, and what still is larger begins anew.

What records is an argument: on a CPU, tests let it call the work again, which shows that what a graph reads is
overwritten as it should be.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mathverify.engine.layout import PassLayout, Segment
from mathverify.engine.passes import is_out_of_memory

log = logging.getLogger(__name__)
Work = Callable[[], Tensor]
PassWork = Callable[[PassLayout], Tensor]
Record = Callable[[Work], Work]
"""Takes work on tensors that stay where they are, and returns what does it again."""

MOST_TOKENS = 4096
"""Of a pass that is rounded up and recorded: with more, the GPU is slower than the launches (an 8B model)."""

MOST_GRAPHS = 64
"""Sizes that are kept. Besides the memory that they share each takes some megabytes, the host's and the device's."""

BEFORE = 1
"""Times that a size must have come before it is recorded: that costs as much as launching, and what came twice comes
again."""

ROOM = 0.25
"""Share of tokens that the first pass to be recorded has in addition to those of a real one."""

SEGMENTS = 4
"""Segments are rounded up to a multiple of this."""

MOST_ADDED = SEGMENTS + 127
"""Most tokens that rounding adds."""

_cannot: set[torch.device] = set()
"""Devices on which recording failed, and not for memory: it would fail again for every run of this process."""


def is_small(tokens: int, budget: int) -> bool:
    """Whether a pass of so many tokens is rounded up and recorded, where passes may have up to `budget`."""
    return tokens <= min(MOST_TOKENS, budget - MOST_ADDED)


def most_held(tokens: int) -> int:
    """Tokens of the widest pass that is recorded, if small ones have up to `tokens`."""
    return _with_room(min(tokens, MOST_TOKENS) + MOST_ADDED)


def _with_room(tokens: int) -> int:
    """Tokens of the pass that memory is laid out for when one of so many is recorded: ROOM more, a multiple of 128."""
    return -(-tokens * round(100 * (1 + ROOM)) // (100 * 128)) * 128


def rounded(segments: Sequence[Segment]) -> list[Segment]:
    """These segments of one slot, and behind them at least one that weighs nothing, so that sizes repeat.

    Tokens become a multiple of 64 up to 2,048 and of 128 above, segments one of SEGMENTS.
    """
    count = -(-(len(segments) + 1) // SEGMENTS) * SEGMENTS - len(segments)
    tokens = sum(len(segment) for segment in segments) + count
    step = 64 if tokens <= 2048 else 128
    lengths = [1] * (count - 1) + [1 + -tokens % step]
    ids = segments[0].ids
    slot = segments[0].slot
    return [*segments, *(Segment(ids[:1].repeat(length), False, slot, 0.0) for length in lengths)]


class Replays:
    """The recorded passes of one adapter, by size.

    recorder: makes what records; all that one of them made shares memory. has_room: whether there is memory for a pass
    of so many tokens beside those that are not recorded, if what is recorded were let go of. Sizes without room are
    launched one by one, and everything is when recording fails. did: how many passes were launched, recorded and
    replayed.
    """

    def __init__(
        self,
        device: torch.device,
        has_room: Callable[[int], bool] = lambda tokens: True,
        recorder: Callable[[torch.device], Record] | None = None,
    ) -> None:
        self._device, self._has_room, self._recorder = device, has_room, recorder or Recorder
        self._seen: Counter[tuple[int, int]] = Counter()
        self._recorded: dict[tuple[int, int], tuple[PassLayout, Work]] = {}
        self._widest: _Widest | None = None
        self._no_room = sys.maxsize  # tokens of the narrowest pass that there was none for
        self._given_up = device in _cannot
        self.did: Counter[str] = Counter()

    def losses(self, segments: Sequence[Segment], work: PassWork) -> Tensor:
        """What `work` returns for these segments, [segments].

        Args:
            segments: of one slot, at most MOST_TOKENS. work: from the layout of a pass to something for each of its
                segments, and whatever else it does on the device; of segments without weight it must leave no trace.
                Given the same sizes, it must launch the same. Either it is called, or what it launched when it was
                recorded is launched again.
        """
        wanted = rounded(segments)
        size = sum(len(segment) for segment in wanted), len(wanted)
        if size in self._recorded:
            self.did["replayed"] += 1
            layout, replay = self._recorded[size]
            layout.become(PassLayout(wanted, "cpu", steady=True))
            return replay()[: len(segments)]
        self.did["launched"] += 1
        layout = PassLayout(wanted, self._device, steady=True)
        found = work(layout)[: len(segments)]
        self._seen[size] += 1
        if self._seen[size] > BEFORE and len(self._recorded) < MOST_GRAPHS and not self._given_up:
            # Behind the real pass, which has put the layout's tensors in place and loaded all kernels.
            self._keep(size, layout, work)
        return found

    def _keep(self, size: tuple[int, int], layout: PassLayout, work: PassWork) -> None:
        try:
            if self._widest is None or size[0] > self._widest.tokens:
                wanted = _with_room(layout.tokens)
                if wanted >= self._no_room or not self._has_room(wanted):
                    self._no_room = min(wanted, self._no_room)
                    return
                self._let_go()
                self._widest = _Widest.of(layout, work, self._recorder(self._device))
            self._recorded[size] = layout, self._widest.record(lambda: work(layout))
            self.did["recorded"] += 1
            return
        except RuntimeError as error:
            # What breaks recording off is behind the word that it was broken off.
            cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            reason = "out of memory" if is_out_of_memory(cause) else (str(cause).splitlines() or ["?"])[0]
            if not is_out_of_memory(cause):
                _cannot.add(self._device)
        # Behind the handler, since the error's traceback holds on to tensors.
        self._give_up(reason)

    @property
    def held(self) -> int:
        """Tokens of the widest recorded pass, whose memory all of them share; 0 if there is none."""
        return 0 if self._widest is None else self._widest.tokens

    def make_room(self) -> bool:
        """Memory ran out: let go of what was recorded, and record no more; whether there was anything."""
        had = self._widest is not None
        if had:
            self._give_up("out of memory")
        return had

    def _give_up(self, reason: str) -> None:
        self._let_go()
        self._given_up = True
        log.warning("small passes are launched one by one from now on, which is slower: %s", reason)

    def _let_go(self) -> None:
        """All at once: newer versions of torch free what graphs of one stream share when the first of them goes."""
        self._recorded.clear()
        self._widest = None


@dataclass(frozen=True)
class _Widest:
    """The first that a recorder recorded, which the memory of the others is laid out for. Kept, never done again."""

    tokens: int
    record: Record
    again: Work

    @classmethod
    def of(cls, layout: PassLayout, work: PassWork, record: Record) -> _Widest:
        """layout: of a pass that was done; the widest has the same segments, the last of them longer."""
        tokens = _with_room(layout.tokens)
        *own, last = (replace(segment, weight=0.0) for segment in layout.segments)
        longer = replace(last, ids=last.ids[:1].repeat(tokens - layout.tokens + len(last)))
        widest = PassLayout([*own, longer], layout.device, steady=True)
        work(widest)  # puts the layout's tensors in place and loads the kernels of its size; without weight, in vain
        return cls(tokens, record, record(lambda: work(widest)))


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Where graphs are recorded; one for a device, since cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(device)


class Recorder:
    """Records CUDA graphs that share memory: one is through before the next begins, and what one returns is to be used
    before the next one starts."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def __call__(self, work: Work) -> Work:
        if self._pool is None:
            torch.cuda.empty_cache()  # while it records, the allocator cannot fall back on what it has cached
            self._pool = torch.cuda.graph_pool_handle()
        stream, current = _stream(self._device), torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        stream.wait_stream(current)
        with _no_collection(), torch.cuda.stream(stream):
            # Other threads (NCCL's, W&B's) may go on meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = work()
            finally:
                self._end(graph)
        current.wait_stream(stream)

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        try:
            graph.capture_end()
        except RuntimeError:
            # When recording was broken off torch 2.11 goes on as if it recorded: its allocator frees nothing, and its
            # generator of random numbers refuses to draw any until another recording has come to its end.
            with suppress(Exception):
                index = torch.cuda.current_device() if self._device.index is None else self._device.index
                torch._C._cuda_endAllocateToPool(index, self._pool)
                torch._C._cuda_releasePool(index, self._pool)
            with suppress(Exception):
                number = torch.zeros(1, device=self._device)
                whole = torch.cuda.CUDAGraph()
                whole.capture_begin(capture_error_mode="thread_local")
                number.add_(1)
                whole.capture_end()
            raise


@contextmanager
def _no_collection() -> Iterator[None]:
    """What the garbage collector frees might not be freed while a graph is recorded."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
