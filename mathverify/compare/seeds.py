"""Configurations: runs that are equal but for the seed. Their mean, spread, and comparisons that count the luck of it.

The question here is which *setting* is better, not which adapter: training again with another seed is part of what may
come out otherwise, and so are the questions of the test set. Both are drawn at random, and they cross: every run is
judged on the same questions. That is the design of multi-reader multi-case studies, and their analysis is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mathverify.compare.matrix import RightTable, per_question
from mathverify.compare.reading import RunView

Floats = NDArray[np.float64]

PAIR_FROM = 5
"""Shared seeds from which on two configurations are compared seed by seed.

False alarms at 5% in 3,000 simulated studies each (250 and 1,500 questions, little to much luck; tests/compare/
test_seeds.py has the world): paired 9-13% with two seeds, 5-8% with three, 5-7% with five, 5-6% with eight; unpaired
4-7% with two and 4-6% with more. So few pairs are not trusted.
"""


@dataclass(eq=False)
class Configuration:
    """Runs equal but for the seed, in order of seeds. params: the settings that differ between configurations.

    A run that is looked at on its own is a configuration of one, its seed among the params.
    """

    runs: list[RunView]
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs if run.seed is not None]

    @property
    def accuracies(self) -> Floats:
        """Test accuracies, float64 [seeds]."""
        return _values([run.accuracy.value for run in self.runs if run.accuracy is not None])

    @property
    def mean(self) -> float:
        return float(self.accuracies.mean())

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds (n - 1); None with one seed."""
        return float(self.accuracies.std(ddof=1)) if len(self.runs) > 1 else None

    @property
    def validation(self) -> float | None:
        """Mean validation accuracy; None where a run has none."""
        found = [run.validation_accuracy for run in self.runs]
        return None if None in found else float(_values(found).mean())


def spelt(params: Mapping[str, Any]) -> str:
    """'rank=16 alpha=32': the last part of each key is enough where it is unique."""
    names = short_names(list(params))
    return " ".join(f"{names[key]}={value_text(value)}" for key, value in params.items())


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Each key's last part where no other key ends alike, else the whole key."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: end if last.count(end) == 1 else key for key, end in zip(keys, last, strict=True)}


def value_text(value: Any) -> str:
    """A setting as a person writes it on the command line."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
        case list() | dict():
            return json.dumps(value, ensure_ascii=False)
        case _:
            return str(value)


def _values(found: Sequence[float | None]) -> Floats:
    return np.array([value for value in found if value is not None], np.float64)


ASIDE = ("seed", "evaluate.", "train.eval_every")
"""Settings (beginnings of their keys) that make no other configuration: the seed, and how often and how finely it is
judged."""


def configurations(runs: Sequence[RunView]) -> list[Configuration]:
    """Group runs by all settings but the seed, and by data and base; in order of first appearance."""
    groups: dict[str, list[RunView]] = {}
    for run in runs:
        rest = {key: value for key, value in run.settings.items() if not key.startswith(ASIDE)}
        groups.setdefault(json.dumps([rest, run.ground], sort_keys=True), []).append(run)
    made = []
    for members in groups.values():
        ordered = sorted(members, key=lambda run: (run.seed is None, run.seed or 0))
        made.append(Configuration(ordered, {k: v for k, v in members[0].params.items() if not k.startswith(ASIDE)}))
    return made


@dataclass(frozen=True, slots=True)
class Components:
    """Variance of a mean over crossed seeds and questions, by source, for one seed and one question each.

    seeds: of training again. questions: of the questions drawn. both: what is left, rows within included.
    The estimate from S seeds and Q questions has variance seeds / S + questions / Q + both / (S Q).
    arms: 1 when seeds are paired (or there is one configuration), 2 when each configuration has seeds of its own.
    """

    seeds: float
    questions: float
    both: float
    arms: int = 1


@dataclass(frozen=True, slots=True)
class SeededDifference:
    """Mean accuracy of the first configuration minus that of the second, with its interval at `confidence`.

    paired: over shared seeds; else each side has its own. degrees: of freedom, of Student's t. p: two-sided.
    """

    difference: float
    low: float
    high: float
    confidence: float
    p: float
    degrees: float
    paired: bool
    first_seeds: int
    second_seeds: int
    questions: int
    components: Components


def compare_seeded(
    first: ArrayLike, second: ArrayLike, sizes: ArrayLike, *, paired: bool, confidence: float = 0.95
) -> SeededDifference:
    """Compare two configurations that were trained with several seeds and judged on the same questions.

    Args:
        first, second: [seeds, questions], rows of each question that each seed's run judged right. With `paired` the
            same row of both is the same seed. At least two seeds each. sizes: [questions], rows of each question.

    Returns:
        The difference of the means, tested by the two-way random-effects analysis of variance of multi-reader
        multi-case studies, seeds for readers and questions for cases (Dorfman, Berbaum & Metz 1992, Invest. Radiol.
        27:723; Obuchowski & Rockette 1995, Commun. Stat. Simul. 24:285), with Hillis's degrees of freedom (2007, Stat.
        Med. 26:596). Unpaired: the seeds' variance is added up over both sides, with Satterthwaite's degrees of freedom
        (1946, Biometrics Bull. 2:110); if the same seeds help both sides, that errs on the side of 'no difference'.
        `compare_configurations` chooses between the two.

        Chosen over a crossed bootstrap of seeds and questions (Owen 2007, Ann. Appl. Stat. 1:386), which with three to
        ten seeds lacks Student's t and counts the interaction three times; and over a test on the seeds' means alone,
        which would take a lucky choice of questions for a better setting.

    Raises:
        ValueError: fewer than two seeds or questions on a side, or unequal seeds though paired.
    """
    one, two, rows = (np.asarray(x, np.float64) for x in (first, second, sizes))
    if min(len(one), len(two), len(rows)) < 2 or (paired and len(one) != len(two)):
        raise ValueError(f"{len(one)} and {len(two)} seeds, {len(rows)} questions: at least two each, pairs complete")
    difference = float((one.sum() / len(one) - two.sum() / len(two)) / rows.sum())
    if paired:
        parts = _mean_squares(one - two, rows)
        variance, degrees = parts.variance, parts.degrees
        components = parts.components
    else:
        variance, degrees, components = _two_arms(one, two, rows)
    low, high, p = _student(difference, variance, degrees, confidence, len(rows))
    return SeededDifference(
        difference, low, high, confidence, p, degrees, paired, len(one), len(two), len(rows), components
    )


def compare_configurations(
    first: Configuration, second: Configuration, table: RightTable, confidence: float = 0.95
) -> SeededDifference:
    """Two configurations of at least two seeds each, paired over the seeds that both have if these are enough.

    Pairing leaves out the seeds that only one side has; it is done when at least PAIR_FROM are shared and at most a
    quarter of either side's is left out. table: holds all their runs.
    """
    shared = sorted(set(first.seeds) & set(second.seeds))
    paired = len(shared) >= max(PAIR_FROM, 0.75 * max(len(first.runs), len(second.runs)))
    one, two = (
        per_question(table.of([run for run in side.runs if not paired or run.seed in shared]), table.codes)
        for side in (first, second)
    )
    return compare_seeded(one, two, table.sizes, paired=paired, confidence=confidence)


def mean_interval(sums: ArrayLike, sizes: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of one configuration's mean accuracy over seeds and questions, by the same analysis of variance.

    sums: [seeds, questions], rows judged right; at least two of each.
    """
    matrix, rows = np.asarray(sums, np.float64), np.asarray(sizes, np.float64)
    mean = float(matrix.sum() / len(matrix) / rows.sum())
    parts = _mean_squares(matrix, rows)
    low, high, _ = _student(mean, parts.variance, parts.degrees, confidence, len(rows))
    return max(0.0, low), min(1.0, high)


@dataclass(frozen=True, slots=True)
class _MeanSquares:
    """Of a two-way layout without replication: S seeds, Q questions."""

    seeds: float
    questions: float
    both: float
    s: int
    q: int

    @property
    def excess(self) -> float:
        """What questions add beyond the interaction; not below 0."""
        return max(self.questions - self.both, 0.0)

    @property
    def variance(self) -> float:
        """Of the grand mean, both factors random."""
        return (self.seeds + self.excess) / (self.s * self.q)

    @property
    def degrees(self) -> float:
        """Hillis's (2007), for one contrast."""
        return (self.seeds + self.excess) ** 2 / (self.seeds**2 / (self.s - 1)) if self.seeds > 0 else math.inf

    @property
    def components(self) -> Components:
        return Components(
            max(0.0, (self.seeds - self.both) / self.q), max(0.0, (self.questions - self.both) / self.s), self.both
        )


def _mean_squares(sums: Floats, sizes: Floats) -> _MeanSquares:
    """sums: [S, Q]. Questions of unequal size enter as the linear part of a ratio: means are means over rows."""
    s, q = sums.shape
    overall = sums.sum() / s / sizes.sum()
    y = overall + q / sizes.sum() * (sums - overall * sizes)
    by_seed, by_question = y.mean(axis=1), y.mean(axis=0)
    rest = y - by_seed[:, None] - by_question[None, :] + overall
    return _MeanSquares(
        q * float(((by_seed - overall) ** 2).sum()) / (s - 1),
        s * float(((by_question - overall) ** 2).sum()) / (q - 1),
        float((rest**2).sum()) / ((s - 1) * (q - 1)),
        s,
        q,
    )


def _two_arms(one: Floats, two: Floats, sizes: Floats) -> tuple[float, float, Components]:
    """Variance, degrees of freedom and components when each side has seeds of its own."""
    a, b, q = _mean_squares(one, sizes), _mean_squares(two, sizes), len(sizes)
    per_question = [q / sizes.sum() * (x.mean(axis=0) - x.sum() / len(x) / sizes.sum() * sizes) for x in (one, two)]
    gap = per_question[0] - per_question[1]
    inner = a.both / (a.s * q) + b.both / (b.s * q)
    shared = max(float((gap**2).sum()) / (q - 1) / q - inner, 0.0)
    of_a, of_b = a.seeds / (a.s * q), b.seeds / (b.s * q)
    variance = of_a + of_b + shared
    below = of_a**2 / (a.s - 1) + of_b**2 / (b.s - 1)
    seeds = max(0.0, (a.seeds - a.both) / q) + max(0.0, (b.seeds - b.both) / q)
    return variance, variance**2 / below if below > 0 else math.inf, Components(seeds, shared * q, a.both + b.both, 2)


def _student(
    value: float, variance: float, degrees: float, confidence: float, questions: int
) -> tuple[float, float, float]:
    """Interval and two-sided p of a value with an estimated variance."""
    from scipy.stats import norm, t

    if variance <= 0:  # all seeds agree on all questions: only another draw of questions could say otherwise
        half = 1.0 - (1.0 - confidence) ** (1.0 / questions)
        return value - half, value + half, 1.0 if value == 0 else min(1.0, 2.0 * 0.5**questions)
    law = norm if math.isinf(degrees) else t(degrees)
    error = math.sqrt(variance)
    half = float(law.isf((1 - confidence) / 2)) * error
    return value - half, value + half, float(2 * law.sf(abs(value) / error))
