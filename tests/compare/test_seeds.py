"""Configurations over seeds: no false alarms from lucky seeds or lucky questions, and real differences found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from mathverify.compare.paired import compare_runs
from mathverify.compare.power import needs_of_runs, needs_of_seeded, power_of
from mathverify.compare.reading import read_runs
from mathverify.compare.seeds import PAIR_FROM, compare_seeded, configurations, mean_interval

from .conftest import Make, config_of


class World:
    """Answers of two settings trained with several seeds: log-odds of being right are the sum of a base, the setting,
    the luck of the seed, the ease of the question and what the seed makes of the question."""

    def __init__(self, seed: int, *, luck: float, lean: float = 0.7, ease: float = 1.5, shared: float = 0.0) -> None:
        self.rng = np.random.default_rng(seed)
        self.luck, self.lean, self.ease, self.shared = luck, lean, ease, shared

    def draw(self, seeds: int, questions: int, gain: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        rng = self.rng
        ease = self.ease * rng.normal(size=questions)
        lean = self.lean * rng.normal(size=(2, 1, questions))  # of a setting on a question
        luck = self.luck * rng.normal(size=(2, seeds, 1))
        luck[1] = self.shared * luck[0] + np.sqrt(1 - self.shared**2) * luck[1]
        quirk = 0.7 * rng.normal(size=(2, seeds, questions))
        chance = expit(1.5 + np.array([gain, 0.0])[:, None, None] + ease + lean + luck + quirk)
        right = rng.random(chance.shape) < chance
        return right[0].astype(float), right[1].astype(float)


def false_alarms(world: World, seeds: int, *, paired: bool, simulations: int = 400, questions: int = 250) -> float:
    sizes = np.ones(questions)
    ps = [compare_seeded(*world.draw(seeds, questions), sizes, paired=paired).p for _ in range(simulations)]
    return float(np.mean(np.array(ps) < 0.05))


@pytest.mark.parametrize(
    ("seeds", "paired"), [(2, False), (3, False), (8, False), (PAIR_FROM, True), (8, True)]
)  # fmt: skip
@pytest.mark.parametrize("luck", [0.0, 0.2, 0.4])
def test_the_level_holds_with_little_and_much_luck(seeds: int, paired: bool, luck: float) -> None:
    """400 simulations at 5%: false alarms below 9%, which a true rate of 6% passes and one of 12% does not."""
    assert false_alarms(World(seeds, luck=luck), seeds, paired=paired) < 0.09


def test_few_pairs_would_not_hold_it() -> None:
    """Why pairing begins at PAIR_FROM seeds."""
    assert false_alarms(World(3, luck=0.2), 2, paired=True, simulations=800) > 0.07


def test_it_is_not_merely_shy() -> None:
    """Where the luck of the seed dominates, the level is used, not just kept."""
    assert false_alarms(World(1, luck=0.5), 6, paired=True) >= 0.02
    assert false_alarms(World(1, luck=0.5), 6, paired=False) >= 0.02


def test_seeds_that_help_both_sides_are_worth_pairing() -> None:
    world, sizes = World(2, luck=0.5, shared=0.9), np.ones(250)
    drawn = [world.draw(6, 250, gain=0.35) for _ in range(150)]
    found = {p: np.mean([compare_seeded(a, b, sizes, paired=p).p < 0.05 for a, b in drawn]) for p in (True, False)}
    assert found[True] > found[False] + 0.15, found


def test_taking_runs_for_settings_would_raise_false_alarms() -> None:
    """Why the seeds count: two single runs of equal settings often differ 'significantly' where luck is large."""
    world, codes = World(3, luck=0.5), np.arange(400)
    wrong = []
    for _ in range(200):
        a, b = world.draw(1, 400)
        wrong.append(compare_runs(a[0] > 0, b[0] > 0, codes, resamples=100)[0].p < 0.05)
    assert np.mean(wrong) > 0.15


def test_intervals_cover_the_true_difference_and_mean() -> None:
    """Truth: the mean over many seeds and questions of the same world."""
    world = World(4, luck=0.3)
    a, b = world.draw(300, 20_000, gain=0.3)
    gap, mean = float(a.mean() - b.mean()), float(a.mean())
    inside, around, simulations = 0, 0, 300
    for _ in range(simulations):
        a, b = world.draw(5, 300, gain=0.3)
        found = compare_seeded(a, b, np.ones(300), paired=False)
        inside += found.low <= gap <= found.high
        low, high = mean_interval(a, np.ones(300))
        around += low <= mean <= high
    assert 0.92 <= inside / simulations <= 0.99, inside
    assert 0.92 <= around / simulations <= 0.99, around


@given(st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=40, deadline=None)
def test_swapping_configurations_flips_the_sign(seed: int, paired: bool) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 4, 30).astype(float)
    a, b = (rng.binomial(sizes.astype(int), 0.7, (4, 30)).astype(float) for _ in range(2))
    one, two = (compare_seeded(x, y, sizes, paired=paired) for x, y in ((a, b), (b, a)))
    assert one.difference == pytest.approx(-two.difference, abs=1e-12) and one.p == pytest.approx(two.p, rel=1e-9)
    assert (one.low, one.high) == pytest.approx((-two.high, -two.low), abs=1e-12)
    assert one.low <= one.difference <= one.high
    order = rng.permutation(30)
    again = compare_seeded(a[:, order], b[:, order], sizes[order], paired=paired)
    assert again.p == pytest.approx(one.p, rel=1e-6)


def test_the_difference_is_that_of_means_over_rows_where_questions_differ_in_size() -> None:
    sizes = np.array([1.0, 5.0, 2.0])
    a, b = np.array([[1, 4, 2], [0, 5, 1]], float), np.array([[0, 5, 2], [1, 1, 1]], float)
    found = compare_seeded(a, b, sizes, paired=True)
    assert found.difference == pytest.approx(a.sum() / 16 - b.sum() / 16)


def test_identical_configurations_tie() -> None:
    a, _ = World(5, luck=0.3).draw(4, 100)
    for paired in (True, False):
        same = compare_seeded(a, a, np.ones(100), paired=paired)
        assert same.difference == 0 and same.p == 1.0
        assert same.low <= 0 <= same.high


def test_agreement_of_all_seeds_on_few_questions_proves_little() -> None:
    found = compare_seeded(np.ones((3, 2)), np.zeros((3, 2)), np.ones(2), paired=True)
    assert found.p == 0.5 and found.low < 0.3


def test_the_rows_of_connors_formula_settle_four_of_five() -> None:
    """At 80% power the test over as many rows as it names finds the difference in about 80% of studies."""
    rng = np.random.default_rng(6)

    def study(rows: int) -> tuple[np.ndarray, np.ndarray]:
        both, gain = rng.random(rows), 0.04
        one = both < 0.8
        two = np.where(rng.random(rows) < 0.15, rng.random(rows) < 0.8 - gain / 0.15, one)
        return one, two

    pilot = compare_runs(*study(200_000), np.arange(200_000), resamples=100)[0]
    rows = needs_of_runs(pilot, 0.05).rows
    assert rows is not None
    found = [compare_runs(*study(rows), np.arange(rows), resamples=100)[0].p < 0.05 for _ in range(250)]
    assert 0.72 <= np.mean(found) <= 0.87, (rows, np.mean(found))


@pytest.mark.parametrize("paired", [True, False])
def test_the_seeds_it_asks_for_settle_four_of_five(paired: bool) -> None:
    """Components from one large study; the predicted power is met by simulated studies of that size."""
    world, gain, questions = World(7, luck=0.35), 0.55, 400
    a, b = world.draw(200, 5000, gain=gain)
    large = compare_seeded(a, b, np.ones(5000), paired=paired)
    seeds = next(s for s in range(2, 60) if power_of(large.difference, large.components, s, questions, 0.05) >= 0.8)
    found = [
        compare_seeded(*world.draw(seeds, questions, gain=gain), np.ones(questions), paired=paired).p < 0.05
        for _ in range(250)
    ]
    assert 0.70 <= np.mean(found) <= 0.90, (seeds, np.mean(found))


def test_needs_name_what_helps() -> None:
    """Where seeds scatter, rows alone do not settle it; where both are scarce, it takes both."""
    scattered = compare_seeded(*World(8, luck=0.6).draw(3, 2000, gain=0.2), np.ones(2000), paired=False)
    needs = needs_of_seeded(scattered, 2000, 0.05)
    assert needs.seeds is not None and needs.seeds > 3
    assert needs.rows is None
    scarce = compare_seeded(*World(20, luck=0.6).draw(2, 60, gain=0.4), np.ones(60), paired=False)
    needs = needs_of_seeded(scarce, 60, 0.05)
    assert needs.rows is needs.seeds is None and needs.both is not None
    rows, seeds = needs.both
    assert power_of(scarce.difference, scarce.components, seeds, rows, 0.05) >= 0.8
    assert power_of(scarce.difference, scarce.components, seeds - 1, rows - 30, 0.05) < 0.8
    nothing = compare_seeded(np.ones((2, 9)), np.ones((2, 9)), np.ones(9), paired=True)
    assert needs_of_seeded(nothing, 9, 0.05).seeds is None


def test_more_power_needs_more() -> None:
    one, two = (np.random.default_rng(i).random(500) < 0.7 + 0.04 * i for i in (0, 1))
    (found,) = compare_runs(one, two, np.arange(500))
    rows = [needs_of_runs(found, 0.05, power).rows for power in (0.5, 0.8, 0.95)]
    stricter = needs_of_runs(found, 0.005).rows
    assert None not in rows and rows == sorted(set(rows), key=lambda r: r or 0)
    assert stricter is not None and rows[1] is not None and stricter > rows[1]


def test_configurations_are_runs_equal_but_for_the_seed(make: Make, tmp_path: Path) -> None:
    for rank in (16, 64):
        for seed in (2, 1):
            make(f"{rank}-{seed}", config_of(rank=rank, seed=seed), accuracy=0.7 + rank / 640)
    found = configurations(read_runs([tmp_path]).runs)
    assert [c.params for c in found] == [{"lora.rank": r, "lora.alpha": float(r)} for r in (16, 64)]
    assert [c.seeds for c in found] == [[1, 2], [1, 2]]
    accuracies = [run.accuracy.value or 0.0 for run in found[0].runs if run.accuracy is not None]
    assert found[0].mean == pytest.approx(np.mean(accuracies))
    assert found[0].spread == pytest.approx(np.std(accuracies, ddof=1))
