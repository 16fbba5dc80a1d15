"""Scores of adapters over a token store: one forward pass per example and adapter, whatever the cutting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from mathverify.engine.layout import PassLayout, Segment
from mathverify.engine.lora import Adapter
from mathverify.engine.model import PackedModel, Ready
from mathverify.engine.passes import TokenBudget, cut
from mathverify.engine.ranks import Ranks

if TYPE_CHECKING:
    from mathverify.tokens.store import TokenStore
    from mathverify.tokens.verdicts import VerdictTokens


def score(
    model: PackedModel,
    adapters: Sequence[Adapter | None],
    store: TokenStore,
    verdicts: VerdictTokens,
    budget: TokenBudget,
    progress: Callable[[int], None] | None = None,
    ranks: Ranks | None = None,
) -> NDArray[np.float64]:
    """Log-odds of True of every row under every adapter; None is the bare base (zero-shot).

    Args:
        progress: called with the number of tokens after each pass. ranks: processes that share the rows.

    Returns:
        float64 [adapters, rows], in the store's order.

    Raises:
        UserError: a single segment does not fit into memory.
    """
    ranks = ranks or Ranks()
    rows = ranks.share(store.lengths.tolist())

    def own() -> NDArray[np.float64]:
        scores = np.zeros((len(adapters), len(store)))  # a sum over processes finds each row scored by one of them
        scores[:, rows] = _score_rows(model, adapters, store, verdicts, budget, progress, rows)
        return scores.reshape(-1)

    return ranks.sum(own, len(adapters) * len(store)).reshape(len(adapters), len(store))


def _score_rows(
    model: PackedModel,
    adapters: Sequence[Adapter | None],
    store: TokenStore,
    verdicts: VerdictTokens,
    budget: TokenBudget,
    progress: Callable[[int], None] | None,
    rows: Sequence[int],
) -> NDArray[np.float64]:
    """float64 [adapters, len(rows)]: the scores of these rows."""
    work = [(slot, row) for slot in range(len(adapters)) for row in rows]
    scores = np.full(len(work), np.nan)
    lengths = [int(store.lengths[row]) for _, row in work]
    ready = budget.until_it_fits(lengths, lambda: model.ready(adapters))
    left = _passes(lengths, len(adapters), budget.tokens)
    while left:
        now = left[0]
        part = [work[i] for i in now]
        before = budget.tokens
        scores[now] = budget.until_it_fits(
            [int(store.lengths[row]) for _, row in part],
            lambda part=part: _score_part(model, ready, store, verdicts, part, budget.tokens),  # type: ignore[misc]
        )
        rest = [i for indices in left[1:] for i in indices]
        left = left[1:] if budget.tokens == before else _recut(rest, lengths, budget.tokens)
        if progress is not None:
            progress(sum(int(store.lengths[row]) for _, row in part))
    return scores.reshape(len(adapters), len(rows))


def _passes(lengths: list[int], adapters: int, budget: int) -> list[list[int]]:
    """Adapters share passes if the rows do not fill one; else each has passes of its own, the very ones it has alone.

    lengths: of all adapters' rows, adapter after adapter. Returns indices into them, pass by pass.
    """
    rows = len(lengths) // adapters
    if sum(lengths[:rows]) < budget:
        return cut(lengths, budget)
    own = cut(lengths[:rows], budget)
    return [[slot * rows + i for i in indices] for slot in range(adapters) for indices in own]


def _recut(rest: list[int], lengths: list[int], budget: int) -> list[list[int]]:
    return [[rest[i] for i in indices] for indices in cut([lengths[i] for i in rest], budget)]


def _score_part(
    model: PackedModel,
    ready: Ready,
    store: TokenStore,
    verdicts: VerdictTokens,
    part: Sequence[tuple[int, int]],
    budget: int,
) -> NDArray[np.float64]:
    segments = [
        Segment(store.ids(row), bool(store.labels[row]), None if ready.adapters[slot] is None else slot)
        for slot, row in part
    ]
    values = np.full(len(segments), np.nan)
    for indices in cut([len(s) for s in segments], budget):
        layout = PassLayout([segments[i] for i in indices], model.device)
        with torch.no_grad(), model.applying(ready, layout, training=False):
            found = layout.unsorted(model.scores(layout, verdicts.true_id, verdicts.false_id))
        values[indices] = found.double().cpu().numpy()
    return values
