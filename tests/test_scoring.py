"""Metrics and their intervals: right values, honest widths, and nothing that JSON cannot hold."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import binomtest
from sklearn import metrics as sk

from mathverify.errors import UserError
from mathverify.scoring import (
    CELLS,
    ECE_BINS,
    NAMES,
    Metrics,
    bootstrap,
    evaluate,
    measure,
    measure_verdicts,
    percentile_interval,
    tune_threshold,
    wilson,
)


def own_questions(rows: int) -> np.ndarray:
    return np.array([f"q{i}" for i in range(rows)])


def sample(rows: int, questions: int, seed: int, sharpness: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores with an effect shared by rows of a question, and labels true with probability expit(sharpness x score)."""
    rng = np.random.default_rng(seed)
    codes = np.arange(rows) if questions == rows else rng.integers(0, questions, rows)
    scores = 1.2 * rng.normal(size=codes.max() + 1)[codes] + rng.normal(size=rows)
    return scores, rng.random(rows) < expit(sharpness * scores), codes.astype(str)


def ece_by_loop(scores: np.ndarray, labels: np.ndarray) -> float:
    probability, total = expit(scores), 0.0
    edges = np.linspace(0, 1, ECE_BINS + 1)
    for k in range(ECE_BINS):
        last = k == ECE_BINS - 1
        inside = (probability >= edges[k]) & ((probability < edges[k + 1]) | last)
        if inside.any():
            total += inside.mean() * abs(probability[inside].mean() - labels[inside].mean())
    return total


@pytest.mark.parametrize("questions", [400, 60])
def test_point_values_are_scikit_learns(questions: int) -> None:
    scores, labels, groups = sample(400, questions, seed=1)
    scores = np.round(scores, 1)  # ties
    found, said = measure(scores, labels, groups, resamples=100), scores > 0
    expected = {
        "accuracy": sk.accuracy_score(labels, said),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, said),
        "auroc": sk.roc_auc_score(labels, scores),
        "f1": sk.f1_score(labels, said),
        "brier": sk.brier_score_loss(labels, expit(scores)),
        "ece": ece_by_loop(scores, labels),
        "base_rate": labels.mean(),
    }
    for name, value in expected.items():
        assert getattr(found, name).value == pytest.approx(value, abs=1e-12), name
    cells = [found.confusion[cell].value for cell in CELLS]
    tn, fp, fn, tp = sk.confusion_matrix(labels, said).ravel()
    assert cells == [tp, fp, fn, tn]


def test_bootstrap_replicates_are_scikit_learns_on_the_drawn_rows() -> None:
    scores, labels, groups = sample(60, 12, seed=2)
    scores = np.round(scores, 1)
    drawn = bootstrap(scores, labels, groups, resamples=5, seed=3)
    names = np.unique(groups)
    rng = np.random.default_rng(3)
    picks = rng.integers(0, len(names), (5, len(names)))
    for b in range(5):
        rows = np.concatenate([np.flatnonzero(groups == names[k]) for k in picks[b]])
        assert drawn["auroc"][b] == pytest.approx(sk.roc_auc_score(labels[rows], scores[rows]))
        assert drawn["accuracy"][b] == pytest.approx(sk.accuracy_score(labels[rows], scores[rows] > 0))
        assert drawn["brier"][b] == pytest.approx(sk.brier_score_loss(labels[rows], expit(scores[rows])))
        assert drawn["ece"][b] == pytest.approx(ece_by_loop(scores[rows], labels[rows]))


@pytest.mark.parametrize(("successes", "trials"), [(0, 5), (5, 5), (1, 1), (37, 100), (9999, 10000)])
def test_wilson_is_scipys(successes: int, trials: int) -> None:
    expected = binomtest(successes, trials).proportion_ci(method="wilson")
    assert wilson(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_delong_is_the_textbook_sum_when_no_question_repeats() -> None:
    scores, labels, groups = sample(80, 80, seed=4)
    right, wrong = scores[labels], scores[~labels]
    wins = (right[:, None] > wrong[None, :]) + 0.5 * (right[:, None] == wrong[None, :])
    variance = wins.mean(1).var(ddof=1) / len(right) + wins.mean(0).var(ddof=1) / len(wrong)
    value = wins.mean()
    half = 1.959963985 * math.sqrt(variance) / (value * (1 - value))
    centre = math.log(value / (1 - value))
    found = measure(scores, labels, groups, resamples=100).auroc
    assert (found.low, found.high) == pytest.approx((expit(centre - half), expit(centre + half)), abs=1e-6)
    assert "DeLong" in found.method and "clustered" not in found.method


@pytest.mark.parametrize(("rows", "questions", "sharpness"), [(300, 300, 1.0), (300, 40, 1.0), (300, 40, 0.5)])
def test_intervals_cover_the_truth(rows: int, questions: int, sharpness: float) -> None:
    """95% intervals hold the population's value in about 95 of 100 data sets (binomial bound below: 0.88 of 150)."""
    scores, labels, groups = sample(200_000, 200_000, seed=5, sharpness=sharpness)
    large = bootstrap(scores, labels, groups, resamples=1, auroc=False)
    truth = {name: float(large[name][0]) for name in NAMES if name != "auroc"}
    truth["auroc"] = sk.roc_auc_score(labels, scores)
    truth["ece"] = 0.0 if sharpness == 1.0 else ece_by_loop(scores, labels)
    covered = dict.fromkeys(NAMES, 0)
    for trial in range(150):
        found = measure(*sample(rows, questions, seed=1000 + trial, sharpness=sharpness), resamples=300)
        for name in NAMES:
            interval = getattr(found, name)
            covered[name] += interval.low - 2e-3 <= truth[name] <= interval.high + 2e-3
    floor = {"ece": 0.80}
    assert {k: v / 150 for k, v in covered.items() if v / 150 < floor.get(k, 0.88)} == {}


def test_a_clustered_interval_is_wider_when_rows_are_copies() -> None:
    """Five copies of each row are no more evidence: told the questions, the interval is that of the originals."""
    scores, labels, _ = sample(120, 120, seed=6)
    copies, groups = np.repeat(scores, 5), np.repeat(own_questions(120), 5)
    honest = measure(copies, np.repeat(labels, 5), groups)
    naive = measure(copies, np.repeat(labels, 5), own_questions(600))
    original = measure(scores, labels, own_questions(120))
    for name in ("accuracy", "balanced_accuracy", "auroc", "f1", "brier", "base_rate"):
        widths = [getattr(m, name).high - getattr(m, name).low for m in (honest, naive, original)]
        assert widths[0] > 1.7 * widths[1], name
        assert widths[0] == pytest.approx(widths[2], rel=0.15), name


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_the_order_of_rows_does_not_matter(seed: int) -> None:
    scores, labels, groups = sample(50, 15, seed=seed)
    order = np.random.default_rng(seed).permutation(50)
    a = measure(scores, labels, groups, resamples=200)
    b = measure(scores[order], labels[order], groups[order], resamples=200)
    assert numbers(a) == pytest.approx(numbers(b), abs=1e-9, nan_ok=True)


@given(st.integers(0, 10_000), st.floats(0.01, 50), st.floats(-20, 20))
@settings(max_examples=25, deadline=None)
def test_a_monotone_transform_leaves_auroc(seed: int, factor: float, shift: float) -> None:
    scores, labels, groups = sample(40, 12, seed=seed)
    if labels.all() or not labels.any():
        return
    before, after = (
        measure(s, labels, groups, resamples=100).auroc for s in (scores, np.sinh(scores) * factor + shift)
    )
    assert (before.value, before.low, before.high) == pytest.approx((after.value, after.low, after.high))
    flipped = measure(-scores, labels, groups, resamples=100).auroc
    assert before.value is not None and flipped.value == pytest.approx(1 - before.value)


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others() -> None:
    data = sample(100, 30, seed=7)
    assert measure(*data, seed=1) == measure(*data, seed=1)
    assert measure(*data, seed=1).brier != measure(*data, seed=2).brier


def test_replicates_of_two_runs_on_the_same_rows_are_paired() -> None:
    """A run against itself plus a constant advantage: the difference varies far less than either run."""
    scores, labels, groups = sample(300, 60, seed=8)
    better = scores + np.where(labels, 0.3, -0.3)
    a, b = (bootstrap(s, labels, groups, resamples=500, seed=5)["auroc"] for s in (scores, better))
    assert (b - a).std() < 0.6 * a.std()


@pytest.mark.parametrize("all_true", [True, False])
def test_one_class_leaves_null_and_a_reason_not_nan(all_true: bool) -> None:
    scores = np.linspace(-1, 1, 10)
    found = measure(scores, np.full(10, all_true), own_questions(10), resamples=100)
    for name in ("auroc", "balanced_accuracy"):
        assert getattr(found, name).value is None and "class" in getattr(found, name).reason
    json.dumps(found.to_plain(), allow_nan=False)


@pytest.mark.parametrize("questions", [40, 8])
def test_a_perfect_run_is_not_certain(questions: int) -> None:
    """All right on 40 rows: the interval still reaches below 1, further when the rows are few questions."""
    labels = np.arange(40) % 2 == 0
    groups = np.arange(40) % questions
    found = measure(np.where(labels, 3.0, -3.0), labels, groups.astype(str), resamples=200)
    for name in ("accuracy", "balanced_accuracy", "auroc", "f1"):
        interval = getattr(found, name)
        assert interval.value == interval.high == 1.0
        assert interval.low < (0.95 if questions == 40 else 0.80), (name, interval)


@given(
    st.integers(1, 12).flatmap(
        lambda n: st.tuples(
            st.lists(st.floats(-800, 800), min_size=n, max_size=n),
            st.lists(st.booleans(), min_size=n, max_size=n),
            st.lists(st.sampled_from(["a", "b", "c", "ü"]), min_size=n, max_size=n),
        )
    )
)
@settings(max_examples=150, deadline=None)
def test_any_finite_input_gives_json_and_ordered_intervals(
    data: tuple[list[float], list[bool], list[str]],
) -> None:
    found = evaluate(*data, slices=data[2], tuned_threshold=tune_threshold(*data[:2]), resamples=100)
    json.dumps(found.to_plain(), allow_nan=False)
    for metrics in (found.overall, found.tuned, *found.slices.values()):
        assert metrics is not None
        for interval in [getattr(metrics, name) for name in NAMES] + list(metrics.confusion.values()):
            if interval.value is None:
                assert interval.low is None and interval.high is None and interval.reason
            elif interval.low is not None:
                assert interval.low <= interval.value + 1e-12 and interval.value <= interval.high + 1e-12
                assert interval.method != "none"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_score_is_refused_by_row(bad: float) -> None:
    with pytest.raises(UserError, match=r"row 2 .*q2.*"):
        measure([0.0, 1.0, bad, 2.0], [True, False, True, False], own_questions(4))


@pytest.mark.parametrize(
    ("scores", "labels", "groups", "said"),
    [
        ([], np.array([], dtype=bool), [], "no rows"),
        ([1.0], [True, False], ["a"], "labels has 2 rows"),
        ([1.0], [True], ["a", "b"], "groups has 2 rows"),
        ([1.0], [1], ["a"], "labels have type"),
    ],
)
def test_bad_columns_are_refused_in_one_line(scores: list, labels: list, groups: list, said: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(UserError, match=said) as caught:
        measure(scores, labels, groups)
    assert "\n" not in str(caught.value)


@given(st.lists(st.tuples(st.floats(-5, 5) | st.sampled_from([0.0, 1.0, 1.0 + 2**-52]), st.booleans()), min_size=1))
@settings(max_examples=150, deadline=None)
def test_no_threshold_beats_the_tuned_one(rows: list[tuple[float, bool]]) -> None:
    scores, labels = np.array([s for s, _ in rows]), np.array([y for _, y in rows])
    tuned = tune_threshold(scores, labels)
    every = [*scores, scores.min() - 1, 0.0]
    best = max(np.mean((scores > t) == labels) for t in every)
    assert math.isfinite(tuned) and np.mean((scores > tuned) == labels) == best
    if np.mean((scores > 0) == labels) == best:
        assert tuned == 0.0


def test_slices_are_measured_as_if_alone() -> None:
    scores, labels, groups = sample(90, 30, seed=9)
    slices = [("sums", "fractions", None)[i % 3] for i in range(90)]
    found = evaluate(scores, labels, groups, slices, resamples=100)
    assert sorted(found.slices) == ["fractions", "sums"] and found.tuned is None
    rows = np.arange(90) % 3 == 0
    assert found.slices["sums"] == measure(scores[rows], labels[rows], groups[rows], resamples=100)


def test_bare_verdicts_have_accuracy_but_no_auroc() -> None:
    found = measure_verdicts([True, False, True], [True, True, True], own_questions(3), resamples=100)
    assert found.accuracy.value == pytest.approx(2 / 3)
    assert found.auroc.value is None and found.brier.value is None and found.ece.value is None


def test_few_questions_widen_the_percentile_interval() -> None:
    replicates = np.random.default_rng(0).normal(size=20_000)
    wide, usual = (percentile_interval(replicates, questions) for questions in (4, 10_000))
    assert wide[1] - wide[0] > 1.5 * (usual[1] - usual[0])
    with pytest.raises(ValueError, match="at least two"):
        percentile_interval(replicates, 1)


@pytest.mark.slow
def test_two_thousand_resamples_of_ten_thousand_rows_take_seconds() -> None:
    data = sample(10_000, 500, seed=10)
    began = time.process_time()
    bootstrap(*data, resamples=2000)
    assert time.process_time() - began < 8  # measured 1.7 s on one core of the reference machine


def numbers(metrics: Metrics) -> list[float]:
    intervals = [getattr(metrics, name) for name in NAMES] + list(metrics.confusion.values())
    return [math.nan if n is None else n for i in intervals for n in (i.value, i.low, i.high)]
