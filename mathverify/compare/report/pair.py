"""The tables of two chosen runs, A and B, for figures on paper; page.js makes the same ones for the page."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mathverify.compare.report.facts import Facts, Row
from mathverify.compare.report.rows import aligned
from mathverify.records import Predictions
from mathverify.scoring import wilson


def pair_tables(facts: Facts, a: int, b: int) -> dict[str, list[Row]]:
    """The data sets named pair_*, and roc of all runs."""
    sides = [("A", a), ("B", b)] if a != b else [("A", a)]
    edges = facts.score_edges
    scores = [
        {"side": side, "answer": f"{kind} answers", "from": edges[k], "to": edges[k + 1], "rows": count}
        for side, run in sides
        for kind, counts in facts.scores[run].items()
        for k, count in enumerate(counts)
    ]

    def marked(of: dict[int, list[Row]]) -> list[Row]:
        return [row | {"side": side} for side, run in sides for row in of[run]]

    return {
        "pair_scores": scores,
        "pair_calibration": marked(facts.calibration),
        "pair_roc": marked(facts.roc),
        "pair_slices": marked(facts.slice_accuracy),
        "pair_difference": differences(facts.predictions[a], facts.predictions[b], facts.confidence),
    }


def differences(first: Predictions, second: Predictions, confidence: float = 0.95) -> list[Row]:
    """First minus second in points of accuracy, over all rows and in each slice; none if rows are not the same."""
    scores = aligned(second, first)
    if scores is None:
        return []
    gaps = ((first.scores > 0) == first.labels).astype(int) - ((scores > 0) == first.labels)
    codes = np.unique(np.asarray(first.groups), return_inverse=True)[1]
    names = np.asarray([name or "" for name in first.slices])
    parts = [("all rows", np.ones(len(gaps), bool)), *((str(n), names == n) for n in np.unique(names) if n)]
    return [
        {"slice": name, "place": place, **_difference(gaps[chosen], codes[chosen], confidence)}
        for place, (name, chosen) in enumerate(parts)
    ]


def _difference(gaps: NDArray[np.int_], codes: NDArray[Any], confidence: float) -> Row:
    """Mean of gaps in points, with a normal interval whose variance is summed by question (Wilson's for none when no
    row differs)."""
    from scipy.stats import norm

    of = np.unique(codes, return_inverse=True)[1]
    sums, sizes = np.bincount(of, gaps), np.bincount(of)
    n, clusters, mean = len(gaps), len(sizes), float(gaps.mean())
    half: float | None = None
    if not gaps.any():
        half = wilson(0, clusters, confidence)[1]
    elif clusters > 1:
        variance = float(((sums - mean * sizes) ** 2).sum()) * clusters / (clusters - 1)
        half = float(norm.isf((1 - confidence) / 2)) * math.sqrt(variance) / n
    low, high = (None, None) if half is None else (100 * (mean - half), 100 * (mean + half))
    counts = {"only_a": int((gaps > 0).sum()), "only_b": int((gaps < 0).sum()), "rows": n}
    return {"difference": 100 * mean, "low": low, "high": high, **counts}
