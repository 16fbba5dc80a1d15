"""What it would take: how many test rows or seeds would settle a difference of the size seen. Plans, proves nothing.

A difference seen is itself uncertain, so these numbers are what to plan the next study with, not more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from mathverify.compare.paired import PairedDifference
from mathverify.compare.seeds import Components, SeededDifference

MOST_ROWS, MOST_SEEDS = 100_000_000, 10_000
"""What is not settled with these is called out of reach."""


@dataclass(frozen=True, slots=True)
class Needs:
    """Rows or seeds in all (not on top) that would settle the difference with `power`, the other held as it is.

    rows: of the test set, with as many questions in proportion; None when out of reach that way. seeds: of each
    configuration; None when out of reach, or when no seeds were compared. both: (rows, seeds), grown in proportion,
    where neither alone does it.
    """

    rows: int | None
    seeds: int | None
    power: float
    both: tuple[int, int] | None = None


def needs_of_runs(found: PairedDifference, alpha: float, power: float = 0.8) -> Needs:
    """Rows for McNemar's test: Connor (1987, Biometrics 43:207), times the design effect of repeated questions.

    n = (z(alpha / 2) sqrt(psi) + z(power) sqrt(psi - delta^2))^2 / delta^2, psi being the share of discordant rows and
    delta the difference.
    """
    from scipy.stats import norm

    delta, psi = abs(found.difference), (found.only_first + found.only_second) / found.rows
    if delta == 0:
        return Needs(None, None, power)
    root = norm.isf(alpha / 2) * math.sqrt(psi) + norm.isf(1 - power) * math.sqrt(max(psi - delta**2, 0.0))
    rows = math.ceil((float(root) / delta) ** 2 * max(found.design_effect, 1.0))
    return Needs(rows if rows <= MOST_ROWS else None, None, power)


def needs_of_seeded(found: SeededDifference, rows: int, alpha: float, power: float = 0.8) -> Needs:
    """Rows and seeds for the test of seeds.compare_seeded, from the components of variance that it found.

    The smallest number at which the noncentral t has the power (Obuchowski 1995, Acad. Radiol. 2:522, plans
    multi-reader studies so).

    Args:
        rows: of the test set now; more rows are taken to be more questions of the same size.
    """
    seeds = min(found.first_seeds, found.second_seeds)
    per_question = rows / found.questions

    def enough(s: int, q: int) -> bool:
        return power_of(found.difference, found.components, s, q, alpha) >= power

    if found.difference == 0:
        return Needs(None, None, power)
    more_seeds = _smallest(lambda s: enough(s, found.questions), seeds, MOST_SEEDS)
    more_questions = _smallest(lambda q: enough(seeds, q), found.questions, int(MOST_ROWS / per_question))
    both = None
    if more_seeds is None and more_questions is None:
        s = _smallest(lambda s: enough(s, found.questions * s // seeds), seeds, MOST_SEEDS)
        both = None if s is None else (math.ceil(rows * s / seeds), s)
    more_rows = None if more_questions is None else math.ceil(more_questions * per_question)
    return Needs(more_rows, more_seeds, power, both)


def power_of(difference: float, components: Components, seeds: int, questions: int, alpha: float) -> float:
    """Chance that a study of so many seeds (of each side) and questions calls a true difference of this size."""
    from scipy.stats import nct, norm, t

    of_seeds = components.seeds / seeds + components.both / (seeds * questions)
    variance = of_seeds + components.questions / questions
    if variance <= 0:
        return 1.0
    degrees = variance**2 / (of_seeds**2 / (components.arms * (seeds - 1))) if of_seeds > 0 else math.inf
    shift = abs(difference) / math.sqrt(variance)
    if degrees > 1e4 or shift > 30:  # the noncentral t is the normal here, and scipy's loses digits
        return float(norm.sf(norm.isf(alpha / 2) - shift))
    return float(nct.sf(t.isf(alpha / 2, degrees), degrees, shift))


def _smallest(enough: Callable[[int], bool], least: int, most: int) -> int | None:
    """The smallest number from `least` on that is enough, by doubling and halving; None when `most` is not."""
    high = least
    while not enough(high):
        if high >= most:
            return None
        high = min(2 * high, most)
    low = max(least, high // 2)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return high
