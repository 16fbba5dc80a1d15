"""Cutting work into passes of at most N tokens; what fits is a matter of tokens, never of examples."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from mathverify.errors import UserError

Result = TypeVar("Result")


class TokenBudget:
    """Most tokens of one pass. A real out-of-memory halves it, if nothing else can be spared; for the same runs it
    never grows again.

    held: tokens of the widest recorded pass that memory was planned for, beside passes of `tokens` (see budget.py).
    text: how it was planned, for a person. spare: called when memory runs out: lets go of what passes can do without,
    and tells whether there was anything.
    """

    def __init__(self, tokens: int, held: int = 0, text: str = "") -> None:
        self.spare: Callable[[], bool] = lambda: False
        self.renew(tokens, held, text)

    def renew(self, tokens: int, held: int, text: str) -> None:
        """Other runs come, for which it was planned anew."""
        self.tokens, self.held, self.text = tokens, held, text

    def until_it_fits(self, lengths: Sequence[int], work: Callable[[], Result]) -> Result:
        """Call `work`, which cuts its passes by this budget, again while memory runs out: first with what can be spared
        let go of, then with half the tokens.

        Args:
            lengths: tokens of the segments at work; a pass cannot be smaller than the longest.

        Raises:
            UserError: out of memory with a single segment.
        """
        while True:
            try:
                return work()
            except RuntimeError as error:  # torch.OutOfMemoryError is one, and other libraries have only words for it
                if not is_out_of_memory(error):
                    raise
            # Behind the handler: the error's traceback holds on to the tensors of the pass that did not fit.
            if not self.spare():
                self._halve(max(lengths, default=0), sum(lengths))
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _halve(self, longest: int, total: int) -> None:
        if min(self.tokens, total) <= longest:
            raise UserError(
                f"out of memory with {self.tokens} tokens a pass and a segment of {longest}: nothing is left to split; "
                "use train.memory=lean, a smaller prompt.max_length, quantization=nf4 or fewer trials at once"
            )
        self.tokens = max(longest, min(self.tokens, total) // 2)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch, its CPU allocator or a CUDA library says that memory ran out."""
    words = ("can't allocate memory", "ALLOC_FAILED", "out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def cut(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Split segments into passes, longest first so that an out-of-memory comes early.

    Args:
        lengths: tokens of each segment. budget: most tokens of a pass; a segment longer than it gets its own pass.

    Returns:
        Indices into `lengths`, pass by pass; each index once.
    """
    passes: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not passes or lengths[index] > room:
            passes.append([])
            room = budget
        passes[-1].append(index)
        room -= lengths[index]
    return passes
