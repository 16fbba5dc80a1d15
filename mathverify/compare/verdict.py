"""What may be said of runs that share a test set: winner or tie, what would settle it, and how far choosing flatters.

The contender is chosen on validation, so that the test set judges a choice that it did not make; then it is compared
with every other, and the p-values are corrected for their number (Holm). With a baseline, that is compared instead.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from mathverify.compare.matrix import RightTable, per_question, right_table
from mathverify.compare.paired import compare_runs, holm
from mathverify.compare.power import Needs, needs_of_runs, needs_of_seeded
from mathverify.compare.reading import Comparison, RunView, State, varying_keys
from mathverify.compare.seeds import Configuration, compare_configurations, configurations, mean_interval, spelt
from mathverify.scoring import Interval

LONGEST_NAME = 48
"""Characters of settings that may stand for an entry in a sentence."""


class By(Enum):
    """What is compared: adapters as they came out, or settings over their seeds; auto: settings where there are any
    with several seeds."""

    auto = "auto"
    run = "run"
    configuration = "configuration"


class Outcome(Enum):
    """Of another against the reference. tie: the data do not tell them apart."""

    better = "better"
    worse = "worse"
    tie = "tie"


@dataclass(frozen=True)
class Versus:
    """Accuracy of `other` minus that of the reference. p: of this comparison alone; corrected: for all of them.

    low, high: interval of this comparison alone; None with a single question. only_other, only_reference: rows that
    only one of them judged right; None for configurations. needs: what would settle a tie.
    """

    other: Configuration
    difference: float
    low: float | None
    high: float | None
    p: float
    corrected: float
    outcome: Outcome
    needs: Needs | None = None
    only_other: int | None = None
    only_reference: int | None = None


@dataclass(frozen=True)
class Selection:
    """What choosing on validation promised and what the test set says. candidates: how many there were to choose from.

    optimism: validation minus test accuracy of the chosen one, with the interval of two independent accuracies (Zou &
    Donner 2008, Stat. Med. 27:1693) at the runs' own confidence.
    """

    candidates: int
    validation: float
    test: float
    optimism: float
    low: float | None
    high: float | None


@dataclass
class Verdict:
    """All that is said of one test set. entries: what was compared, best on test first. reference: the contender or the
    baseline; None when nothing can be compared. versus: the others against it. untested: why an entry is in no test.
    missing: why a run's predictions are not there. intervals: of the means of configurations that have several seeds.
    """

    test_set: str
    by: By
    confidence: float
    entries: list[Configuration]
    rows: int = 0
    questions: int = 0
    reference: Configuration | None = None
    is_baseline: bool = False
    chosen_on: str = "validation"
    versus: list[Versus] = field(default_factory=list)
    untested: dict[Configuration, str] = field(default_factory=dict)
    selection: Selection | None = None
    notes: list[str] = field(default_factory=list)
    missing: dict[RunView, str] = field(default_factory=dict)
    intervals: dict[Configuration, tuple[float, float]] = field(default_factory=dict)

    def name(self, entry: Configuration) -> str:
        """What tells an entry from the others: its settings if these are short, else where it stands in its table."""
        said = spelt(entry.params)
        if said and len(said) <= LONGEST_NAME and self._spelt[said] == 1:
            return said
        if self.by is By.run:
            return f"run {entry.runs[0].label}"
        return f"configuration #{self.entries.index(entry) + 1}" if len(self.entries) > 1 else "the one configuration"

    @functools.cached_property
    def _spelt(self) -> Counter[str]:
        """How many entries have the same settings: those that differ in rows or base alone."""
        return Counter(spelt(entry.params) for entry in self.entries)

    @property
    def winner(self) -> Configuration | None:
        """The contender if it is better than every other, and every other could be tested."""
        beaten = all(versus.outcome is Outcome.worse for versus in self.versus)
        return self.reference if self.versus and beaten and not self.untested and not self.is_baseline else None

    @property
    def ties(self) -> list[Versus]:
        return [versus for versus in self.versus if versus.outcome is Outcome.tie]


def judge(
    comparison: Comparison,
    *,
    baseline: RunView | None = None,
    by: By = By.auto,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> list[Verdict]:
    """One verdict for each test set, the one with most runs first."""
    verdicts = []
    for test_set, runs in comparison.test_sets.items():
        candidates = [r for r in comparison.runs if (r.test_set or "unknown") == test_set and _was_candidate(r)]
        own = baseline if baseline in runs else None
        verdicts.append(_judge(test_set, runs, candidates, own, by, confidence, resamples, seed))
    return verdicts


def _was_candidate(run: RunView) -> bool:
    return run.state in (State.completed, State.pruned) and run.repeats is None and run.validation_accuracy is not None


def _judge(
    test_set: str,
    runs: list[RunView],
    candidates: list[RunView],
    baseline: RunView | None,
    by: By,
    confidence: float,
    resamples: int,
    seed: int,
) -> Verdict:
    by = _level(runs, by)
    entries = _entries(runs, by)
    entries.sort(key=lambda entry: -entry.mean)
    verdict = Verdict(test_set, by, confidence, entries, notes=training_notes(runs))
    table, verdict.missing = right_table(runs)
    verdict.rows, verdict.questions = table.rows, table.questions if table.rows else 0
    able = [entry for entry in entries if not _why_untested(entry, table, by)]
    verdict.untested = {e: why for e in entries if (why := _why_untested(e, table, by))}
    if by is By.configuration:
        for entry in able:
            sums = per_question(table.of(entry.runs), table.codes)
            verdict.intervals[entry] = mean_interval(sums, table.sizes, confidence)
    if baseline is not None:
        verdict.is_baseline = True
        verdict.reference = next(entry for entry in entries if baseline in entry.runs)
    elif able:
        verdict.reference, verdict.chosen_on = _choose(able)
        verdict.selection = _selection(verdict.reference, len(_entries(candidates, by)))
    if verdict.reference in able:
        others = [entry for entry in able if entry is not verdict.reference]
        verdict.versus = _against(verdict, others, table, resamples, seed)
    return verdict


def _level(runs: Sequence[RunView], by: By) -> By:
    if by is not By.auto:
        return by
    settings = configurations(runs)
    return By.configuration if any(len(c.runs) > 1 for c in settings) else By.run


def _entries(runs: Sequence[RunView], by: By) -> list[Configuration]:
    """What is compared, named by the settings that differ between these runs."""
    entries = configurations(runs) if by is By.configuration else [Configuration([r], dict(r.params)) for r in runs]
    varying = varying_keys(runs)
    for entry in entries:
        entry.params = {key: value for key, value in entry.params.items() if key in varying}
    return entries


def _why_untested(entry: Configuration, table: RightTable, by: By) -> str:
    """Empty when it can be tested."""
    if any(run not in table.place for run in entry.runs):
        return "predictions are missing"
    if by is By.configuration and len(entry.runs) < 2:
        return "one seed says nothing of the luck of seeds; --by run compares single runs"
    if by is By.configuration and table.questions < 2:
        return "a single question says nothing of other questions"
    return ""


def _choose(entries: Sequence[Configuration]) -> tuple[Configuration, str]:
    """The best on validation, of equals the one with fewer trained parameters; on test only where there is no other
    way, which the correction then pays for."""

    def size(entry: Configuration) -> int:
        return entry.runs[0].costs.trainable_parameters or 0

    if all(entry.validation is not None for entry in entries):
        return max(entries, key=lambda e: (e.validation or 0.0, -size(e))), "validation"
    return max(entries, key=lambda e: (e.mean, -size(e))), "test"


def _against(
    verdict: Verdict, others: list[Configuration], table: RightTable, resamples: int, seed: int
) -> list[Versus]:
    reference, alpha = verdict.reference, 1.0 - verdict.confidence
    if reference is None or not others:
        return []
    # A contender chosen on the test set itself might have met any pair: all of them are paid for.
    pairs = len(others) * (len(others) + 1) // 2 if verdict.chosen_on == "test" and not verdict.is_baseline else None
    level = alpha / (pairs or len(others))
    if verdict.by is By.configuration:
        found = [_seeded(entry, reference, table, verdict.confidence, level) for entry in others]
    else:
        found = _single(others, reference, table, verdict.confidence, level, resamples, seed)
    ps = [versus.p for versus in found]
    corrected = holm(ps) if pairs is None else [min(1.0, pairs * p) for p in ps]
    return [_concluded(versus, p, alpha) for versus, p in zip(found, corrected, strict=True)]


def _concluded(versus: Versus, corrected: float, alpha: float) -> Versus:
    outcome = Outcome.tie
    if corrected < alpha and versus.difference != 0:
        outcome = Outcome.better if versus.difference > 0 else Outcome.worse
    return Versus(
        versus.other, versus.difference, versus.low, versus.high, versus.p, corrected, outcome,
        versus.needs if outcome is Outcome.tie else None, versus.only_other, versus.only_reference,
    )  # fmt: skip


def _seeded(
    entry: Configuration, reference: Configuration, table: RightTable, confidence: float, alpha: float
) -> Versus:
    found = compare_configurations(entry, reference, table, confidence)
    needs = needs_of_seeded(found, table.rows, alpha)
    return Versus(entry, found.difference, found.low, found.high, found.p, found.p, Outcome.tie, needs)


def _single(
    others: list[Configuration],
    reference: Configuration,
    table: RightTable,
    confidence: float,
    alpha: float,
    resamples: int,
    seed: int,
) -> list[Versus]:
    (own,) = table.of(reference.runs)
    right = table.of([entry.runs[0] for entry in others])
    found = compare_runs(own, right, table.codes, confidence=confidence, resamples=resamples, seed=seed)
    return [
        Versus(
            entry, -one.difference + 0.0, _negative(one.high), _negative(one.low), one.p, one.p, Outcome.tie,
            needs_of_runs(one, alpha), one.only_second, one.only_first,
        )
        for entry, one in zip(others, found, strict=True)
    ]  # fmt: skip


def _negative(bound: float | None) -> float | None:
    return None if bound is None else -bound + 0.0


def _selection(chosen: Configuration, candidates: int) -> Selection | None:
    if chosen.validation is None:
        return None
    of_validation = [run.validation.accuracy for run in chosen.runs if run.validation is not None]
    of_test = [run.accuracy for run in chosen.runs if run.accuracy is not None]
    (v, v_low, v_high), (t, t_low, t_high) = _mean_interval(of_validation), _mean_interval(of_test)
    if None in (v_low, v_high, t_low, t_high):
        return Selection(candidates, v, t, v - t, None, None)
    low = v - t - math.hypot(v - (v_low or 0.0), (t_high or 0.0) - t)
    high = v - t + math.hypot((v_high or 0.0) - v, t - (t_low or 0.0))
    return Selection(candidates, v, t, v - t, low, high)


def _mean_interval(found: Sequence[Interval]) -> tuple[float, float | None, float | None]:
    """Mean of accuracies on the same rows, and of their bounds: not too narrow however they depend."""

    def mean(bounds: Sequence[float | None]) -> float | None:
        return None if None in bounds else sum(bound or 0.0 for bound in bounds) / len(bounds)

    value = mean([one.value for one in found])
    return value or 0.0, mean([one.low for one in found]), mean([one.high for one in found])


def training_notes(runs: Sequence[RunView]) -> list[str]:
    """Where runs did not get the same training or the same machine, a difference may be that."""
    examples = {run.costs.examples_seen for run in runs}
    steps = {run.costs.optimizer_steps for run in runs}
    notes = []
    if len(examples) > 1 and not _rounded_up(runs):
        how = " (bigger batches saw more)" if _bigger_saw_more(runs) else ""
        equal = f"equal steps ({_count(steps)}) but " if len(steps) == 1 else ""
        notes.append(
            f"{equal}unequal examples: runs saw {_count(examples)}{how}, so part of a difference may be more data; "
            "train.max_examples=N gives every run the same"
        )
    elif len(steps) > 1:
        notes.append(
            f"equal examples ({_count(examples)}) but unequal steps: {_count(steps)}, bigger batches taking fewer, so "
            "part of a difference may be more updates; train.max_steps=N holds steps equal"
        )
    if len({run.ground for run in runs}) > 1:
        notes.append("runs differ in the rows or prompts they were trained on, or in the base (data, prompt, model)")
    devices = {run.device for run in runs}
    if len(devices) > 1:
        notes.append("runs were made on different devices: their seconds and tokens/s are no comparison of settings")
    return notes


def _rounded_up(runs: Sequence[RunView]) -> bool:
    """Whether all were given the same number of examples, which whole steps round up differently."""
    given = {run.settings.get("train.max_examples") for run in runs}
    return len(given) == 1 and given != {None}


def _bigger_saw_more(runs: Sequence[RunView]) -> bool:
    """Whether examples grow with examples a step, throughout."""
    seen: dict[int, list[int]] = {}
    for run in runs:
        if (size := _examples_per_step(run)) is not None:
            seen.setdefault(size, []).append(run.costs.examples_seen)
    ordered = [seen[size] for size in sorted(seen)]
    return len(ordered) > 1 and all(max(a) < min(b) for a, b in itertools.pairwise(ordered))


def _examples_per_step(run: RunView) -> int | None:
    batch, accumulation = (run.settings.get(f"train.{name}") for name in ("batch_size", "grad_accumulation"))
    return batch * accumulation if isinstance(batch, int) and isinstance(accumulation, int) else None


def _count(numbers: set[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
