"""Two runs on the same test rows: the difference in accuracy, its interval, and whether it is real. Knows no seeds.

What is compared are two trained adapters; that another seed might have trained them otherwise is seeds.py's business.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mathverify.scoring import percentile_interval, resample_counts

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

LARGEST_EXACT = 20_000
"""Discordant rows up to which the distribution over questions is summed exactly; beyond, the normal law stands in."""


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Accuracy of the first run minus that of the second, with its interval at `confidence`.

    only_first, only_second: rows that only one of them judged right. mcnemar: exact p over rows. p: exact p over
    questions (`sign_flip`), which is McNemar's where no question repeats and the one to go by where some do.
    design_effect: variance over questions relative to independent rows; 1 where no question repeats.
    """

    rows: int
    questions: int
    only_first: int
    only_second: int
    difference: float
    low: float | None
    high: float | None
    confidence: float
    mcnemar: float
    p: float
    design_effect: float = 1.0


def compare_runs(
    first: ArrayLike,
    others: ArrayLike,
    codes: ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> list[PairedDifference]:
    """One run against each of several, on the same rows.

    Args:
        first: bool [n], which rows it judged right. others: bool [runs, n]. codes: int [n], the question of each row.

    Returns:
        For each of the others, first minus other. Intervals: question-clustered bootstrap of the difference (Davison &
        Hinkley 1997, section 3.8), expanded percentiles as in scoring.percentile_interval; all runs share the draws.
    """
    one, many, rows = np.asarray(first, bool), np.atleast_2d(np.asarray(others, bool)), np.asarray(codes)
    questions = int(rows.max()) + 1
    sizes = np.bincount(rows, minlength=questions).astype(np.float64)
    gaps = np.stack([np.bincount(rows, one.astype(float) - other, questions) for other in many]).astype(np.float64)
    drawn = _replicates(gaps, sizes, resamples, seed)
    found = []
    for gap, replicates, other in zip(gaps, drawn, many, strict=True):
        b, c = int((one & ~other).sum()), int((~one & other).sum())
        difference = float((b - c) / len(rows))
        low, high = (None, None) if questions < 2 else percentile_interval(replicates, questions, confidence)
        if low is not None and high is not None:
            low, high = min(low, difference), max(high, difference)
        p = mcnemar(b, c)
        by_question = sign_flip(gap) if questions < len(rows) else p
        effect = _design_effect(gap, sizes, b + c)
        found.append(
            PairedDifference(
                len(rows), questions, b, c, difference, low, high, confidence, p, by_question, effect
            )
        )  # fmt: skip
    return found


def _replicates(gaps: Floats, sizes: Floats, resamples: int, seed: int) -> Floats:
    """Differences of resampled questions, float64 [runs, resamples]: one product of matrices a chunk of draws."""
    parts = [(counts @ gaps.T) / (counts @ sizes)[:, None] for counts in resample_counts(len(sizes), resamples, seed)]
    drawn: Floats = np.concatenate(parts).T
    return drawn


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p of McNemar's test (1947, Psychometrika 12:153): discordant rows are fair coins under no
    difference."""
    from scipy.stats import binom

    discordant = only_first + only_second
    return min(1.0, 2.0 * float(binom.cdf(min(only_first, only_second), discordant, 0.5)))


def sign_flip(gaps: ArrayLike) -> float:
    """Two-sided p of the randomisation test over questions (Fisher 1935, The Design of Experiments, section 21).

    gaps: whole numbers [questions], rows of the question that only the first run judged right minus those that only the
    second did. Under no difference the runs' names could be exchanged within any question, so every gap is as likely
    with the other sign; the distribution of their sum is summed exactly. With one row a question this is McNemar's
    exact test; with several it is right where McNemar's, which takes rows for independent, claims too much.
    """
    from scipy.stats import binom, norm

    sizes = np.abs(np.rint(np.asarray(gaps, np.float64))).astype(np.int64)
    total, observed = int(sizes.sum()), abs(round(float(np.sum(gaps))))
    if total == 0:
        return 1.0
    if total > LARGEST_EXACT:
        return min(1.0, 2.0 * float(norm.sf(observed / math.sqrt(float(sizes @ sizes)))))
    chances = np.ones(1)  # of 0, 1, ... for the sum of gaps that fall to the first run
    for size, count in enumerate(np.bincount(sizes)):
        if size and count:
            spread = np.zeros(size * int(count) + 1)
            spread[::size] = binom.pmf(np.arange(count + 1), count, 0.5)
            chances = np.convolve(chances, spread)
    return min(1.0, 2.0 * float(chances[: (total - observed) // 2 + 1].sum()))


def holm(ps: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979, Scand. J. Stat. 6:65), in the order given.

    The chance that any true 'no difference' is called a difference stays below the level, however they depend.
    """
    order = np.argsort(np.asarray(ps, np.float64), kind="stable")
    corrected = np.empty(len(ps))
    worst = 0.0
    for place, index in enumerate(order):
        worst = max(worst, min(1.0, (len(ps) - place) * float(ps[index])))
        corrected[index] = worst
    return [float(p) for p in corrected]


def _design_effect(gap: Floats, sizes: Floats, discordant: int) -> float:
    """Variance of the difference over questions, relative to that of independent rows (Kish 1965, Survey Sampling)."""
    rows, questions = float(sizes.sum()), len(sizes)
    if questions == rows or questions < 2:
        return 1.0
    difference = float(gap.sum()) / rows
    alone = (discordant / rows - difference**2) / rows
    clustered = questions / (questions - 1) * float(((gap - difference * sizes) ** 2).sum()) / rows**2
    return clustered / alone if alone > 0 else 1.0
