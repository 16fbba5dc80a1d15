"""Two runs on the same rows: exact where it says exact, covering as often as it says, and fair to both."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from mathverify.compare.paired import LARGEST_EXACT, compare_runs, holm, mcnemar, sign_flip


def verdicts(rows: int, questions: int, seed: int, gain: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two runs that are right on easy questions together; the first is better by `gain` in probability."""
    rng = np.random.default_rng(seed)
    codes = np.arange(rows) if questions == rows else rng.integers(0, questions, rows)
    _, codes = np.unique(codes, return_inverse=True)
    ease = 0.55 + 0.4 * rng.random(codes.max() + 1)
    lean = 0.25 * (rng.random(codes.max() + 1) - 0.5)  # of a question towards one of the runs
    one = rng.random(rows) < np.clip(ease + lean + gain, 0, 1)[codes]
    two = rng.random(rows) < np.clip(ease - lean, 0, 1)[codes]
    return one, two, codes


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (5, 5), (3, 12), (40, 17), (0, 30)])
def test_mcnemar_is_the_exact_binomial_test(b: int, c: int) -> None:
    expected = binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert mcnemar(b, c) == pytest.approx(expected, abs=1e-12)
    assert sign_flip(np.repeat([1, -1, 0], [b, c, 9])) == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
def test_sign_flips_are_all_counted(gaps: list[int]) -> None:
    sums = [
        abs(sum(s * g for s, g in zip(signs, gaps, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(gaps))
    ]
    expected = np.mean([total >= abs(sum(gaps)) for total in sums])
    assert sign_flip(gaps) == pytest.approx(expected, abs=1e-12)


def test_the_normal_law_takes_over_without_a_step() -> None:
    """A few more flips that cancel change p little, whichever side of the limit they end on."""
    gaps = np.repeat([1, -1, 2, -2], [2600, 2440, 3700, 3700])
    assert np.abs(gaps).sum() <= LARGEST_EXACT
    more = np.append(gaps, np.repeat([2, -2], 100 + (LARGEST_EXACT - np.abs(gaps).sum()) // 4))
    assert np.abs(more).sum() > LARGEST_EXACT
    assert 0.1 < sign_flip(gaps) < 0.9
    assert sign_flip(more) == pytest.approx(sign_flip(gaps), abs=0.02)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_monotone_bounded_and_blind_to_order(ps: list[float]) -> None:
    corrected = holm(ps)
    assert all(p <= q <= min(1.0, len(ps) * p + 1e-12) for p, q in zip(ps, corrected, strict=True))
    by_p = sorted(zip(ps, corrected, strict=True))
    assert all(a[1] <= b[1] for a, b in itertools.pairwise(by_p))
    assert holm(ps[::-1]) == corrected[::-1]


def test_holm_is_the_textbooks() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@given(st.integers(0, 2**32 - 1), st.sampled_from([60, 25]))
@settings(max_examples=25, deadline=None)
def test_swapping_two_runs_flips_the_sign_and_order_does_not_matter(seed: int, questions: int) -> None:
    one, two, codes = verdicts(60, questions, seed)
    (ahead,) = compare_runs(one, two, codes, resamples=200)
    (behind,) = compare_runs(two, one, codes, resamples=200)
    assert behind.difference == -ahead.difference
    assert (behind.only_first, behind.only_second) == (ahead.only_second, ahead.only_first)
    assert behind.p == ahead.p and behind.mcnemar == ahead.mcnemar
    assert ahead.low is not None and ahead.high is not None and behind.low is not None and behind.high is not None
    assert ahead.low <= ahead.difference <= ahead.high
    assert (-behind.high, -behind.low) == pytest.approx((ahead.low, ahead.high), abs=1e-9)
    order = np.random.default_rng(seed).permutation(60)
    _, renumbered = np.unique(codes[order], return_inverse=True)
    (shuffled,) = compare_runs(one[order], two[order], renumbered, resamples=200)
    assert shuffled == ahead


def test_identical_runs_tie() -> None:
    one, _, codes = verdicts(100, 40, 1)
    (same,) = compare_runs(one, one, codes, resamples=100)
    assert (same.difference, same.low, same.high, same.p, same.mcnemar) == (0.0, 0.0, 0.0, 1.0, 1.0)


def test_many_runs_get_what_each_gets_alone() -> None:
    one, two, codes = verdicts(300, 120, 2)
    three = ~two
    assert compare_runs(one, [two, three], codes) == [*compare_runs(one, two, codes), *compare_runs(one, three, codes)]


@pytest.mark.parametrize("questions", [400, 120])
def test_the_interval_covers_and_the_test_holds_its_level(questions: int) -> None:
    """Of a true difference of 5 points. McNemar's, which takes rows for independent, is too sure where questions repeat
    and the runs lean differently on them; the test over questions is not."""
    covered, simulations = 0, 300
    rejected = {"rows": 0, "questions": 0}
    rng = np.random.default_rng(questions)
    for _ in range(simulations):
        codes = np.arange(400) if questions == 400 else np.sort(rng.integers(0, questions, 400))
        _, codes = np.unique(codes, return_inverse=True)
        lean = 0.9 * (rng.random(codes.max() + 1) - 0.5)[codes]
        one, two = rng.random(400) < 0.5 + lean, rng.random(400) < 0.5 - lean
        better = one | (rng.random(400) < 0.1)  # a tenth of what it would get wrong: 0.1 x 0.5
        (gained,) = compare_runs(better, two, codes, resamples=400)
        assert gained.low is not None and gained.high is not None
        covered += gained.low <= 0.05 <= gained.high
        (none,) = compare_runs(one, two, codes, resamples=100)
        rejected["rows"] += none.mcnemar < 0.05
        rejected["questions"] += none.p < 0.05
    assert 0.92 <= covered / simulations <= 0.985, covered / simulations
    assert 0.01 <= rejected["questions"] / simulations <= 0.08, rejected
    if questions < 400:
        assert rejected["rows"] / simulations > 0.12, rejected
        assert none.design_effect > 1.3
