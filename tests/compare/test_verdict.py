"""What is said of runs: a winner only where the data say so, ties called ties, and nothing hidden about choosing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mathverify.compare.reading import read_runs
from mathverify.compare.verdict import By, Outcome, Verdict, judge
from mathverify.compare.wording import rounded, sentences
from mathverify.config import EvaluateConfig, LoraConfig, TrainConfig
from mathverify.records import Status

from .conftest import Make, TestRows, config_of

ROWS = TestRows(400, 400)


def right(accuracy: float, seed: int = 0, base: np.ndarray | None = None, changed: float = 0.1) -> np.ndarray:
    """bool [400] with exactly this accuracy; like `base` in all but a share of its rows."""
    rng = np.random.default_rng(seed)
    made = rng.random(400) < accuracy if base is None else base.copy()
    for row in rng.permutation(400):
        short = round(accuracy * 400) - int(made.sum())
        if short == 0:
            break
        if made[row] != (short > 0):
            made[row] = short > 0
    if base is not None:
        swap = rng.permutation(400)[: int(changed * 400)]
        made[swap] = made[rng.permutation(swap)]
    return made


def verdict_of(places: Sequence[Path], **options: object) -> Verdict:
    (verdict,) = judge(read_runs(places), resamples=200, **options)  # type: ignore[arg-type]
    return verdict


def three(make: Make, *accuracies: float, validation: Sequence[float] = (0.9, 0.8, 0.7)) -> list[Path]:
    base = right(0.8)
    return [
        make(f"r{rank}", config_of(rank=rank), ROWS, right=right(accuracy, rank, base, 0.05), validation=v)
        for rank, accuracy, v in zip((64, 32, 16), accuracies, validation, strict=True)
    ]


def test_a_clear_winner_is_named(make: Make) -> None:
    verdict = verdict_of(three(make, 0.9, 0.8, 0.7))
    assert verdict.winner is not None and verdict.winner.params["lora.rank"] == 64
    first = sentences(verdict)[0]
    assert first.startswith("winner: rank=64 alpha=64 (90.0% on test) is better than each of the 2 others, closest")
    assert "rank=32 alpha=32 (-10.0 points [" in first and "p < 0.001" in first


def test_a_lead_that_may_be_luck_is_a_tie_with_what_would_settle_it(make: Make) -> None:
    verdict = verdict_of(three(make, 0.81, 0.80, 0.70))
    assert verdict.winner is None
    assert [versus.other.params["lora.rank"] for versus in verdict.ties] == [32]
    said = sentences(verdict)
    assert (
        "no winner: rank=64 alpha=64 (81.0% on test) is the best on validation, but a tie with 1 of 2 others" in said[0]
    )
    assert "to settle a difference of 1 points (rank=32 alpha=32): about" in said[1] and "(now 400)" in said[1]
    (tie,) = verdict.ties
    assert tie.needs is not None and tie.needs.rows is not None and tie.needs.rows > 400


def test_identical_runs_tie_and_nothing_can_settle_it(make: Make) -> None:
    same = right(0.8)
    places = [make(f"{rank}", config_of(rank=rank), ROWS, right=same) for rank in (16, 64)]
    verdict = verdict_of(places)
    (versus,) = verdict.versus
    assert (versus.difference, versus.p, versus.corrected, versus.outcome) == (0.0, 1.0, 1.0, Outcome.tie)
    assert verdict.reference is not None and verdict.reference.params["lora.rank"] == 16  # of equals the smaller
    assert any("no difference was seen" in line for line in sentences(verdict))


def test_the_choice_is_validations_and_test_may_contradict_it(make: Make) -> None:
    verdict = verdict_of(three(make, 0.70, 0.80, 0.72))
    assert verdict.winner is None
    assert (
        "rank=64 alpha=64 (70.0% on test) is the best on validation, but on test rank=32 alpha=32 is better"
        in sentences(verdict)[0]
    )


def test_optimism_is_validation_minus_test_of_the_chosen(make: Make) -> None:
    places = three(make, 0.80, 0.79, 0.78, validation=(0.88, 0.80, 0.80))
    places.append(make("pruned", config_of(rank=8), ROWS, status=Status.pruned))
    places.append(make("failed", config_of(rank=4), ROWS, status=Status.failed))
    selection = verdict_of(places).selection
    assert selection is not None
    assert selection.candidates == 4  # a pruned run was looked at on validation, a failed one was not
    assert selection.optimism == pytest.approx(0.08)
    assert selection.low is not None and selection.high is not None and selection.low < 0.08 < selection.high
    assert any(
        line.startswith("selection: the best of 4 on validation, 88.0% there and 80.0% on test: optimism +8.0 points [")
        for line in sentences(verdict_of(places))
    )


def test_without_validation_the_test_set_chooses_and_all_pairs_are_paid_for(make: Make) -> None:
    comparison = read_runs(three(make, 0.83, 0.80, 0.79))
    for run in comparison.runs:
        run.validation = None
    (verdict,) = judge(comparison, resamples=200)
    assert verdict.chosen_on == "test" and verdict.selection is None
    assert [v.corrected for v in verdict.versus] == [pytest.approx(min(1.0, 3 * v.p)) for v in verdict.versus]


def test_holm_is_over_all_comparisons(make: Make) -> None:
    """A difference that would pass alone (20 rows against 7, p = 0.02) does not when it is one of twelve looked at."""
    base = right(0.8)
    lower = base.copy()
    lower[np.flatnonzero(base)[:20]], lower[np.flatnonzero(~base)[:7]] = False, True
    alone = [
        make(f"{k}", config_of(rank=16 + k), ROWS, right=r, validation=0.9 - k / 100)
        for k, r in enumerate((base, lower))
    ]
    (versus,) = verdict_of(alone).versus
    assert versus.outcome is Outcome.worse and versus.p == versus.corrected < 0.02
    others = [make(f"{k}", config_of(rank=16 + k), ROWS, right=base, validation=0.8) for k in range(2, 13)]
    found = {v.other.params["lora.rank"]: v for v in verdict_of([*alone, *others]).versus}
    assert found[17].p == versus.p and found[17].corrected == pytest.approx(12 * versus.p)
    assert {v.outcome for v in found.values()} == {Outcome.tie}


def test_a_baseline_is_compared_with_all_others(make: Make) -> None:
    places = three(make, 0.9, 0.8, 0.7)
    comparison = read_runs(places)
    (verdict,) = judge(comparison, baseline=comparison.find("r32"), resamples=200)
    assert verdict.winner is None and verdict.selection is None
    assert {v.other.params["lora.rank"]: v.outcome.value for v in verdict.versus} == {64: "better", 16: "worse"}
    said = sentences(verdict)[0]
    assert said.startswith("against the baseline rank=32 alpha=32 (80.0% on test): better: rank=64 alpha=64 (+10.0")
    assert "worse: rank=16" in said


def seeded(make: Make, ranks: Sequence[int], gains: Sequence[float], seeds: int, luck: float) -> list[Path]:
    rng = np.random.default_rng(11)
    ease = rng.normal(size=400)
    return [
        make(
            f"{rank}-{seed}", config_of(rank=rank, seed=seed), ROWS, validation=0.8 + rank / 1000,
            right=rng.random(400) < 1 / (1 + np.exp(-(1.2 + gain + ease + luck * rng.normal()))),
        )
        for rank, gain in zip(ranks, gains, strict=True)
        for seed in range(seeds)
    ]  # fmt: skip


def test_with_seeds_settings_are_compared_not_runs(make: Make) -> None:
    verdict = verdict_of(seeded(make, (16, 64), (0.0, 1.2), 4, 0.1))
    assert verdict.by is By.configuration and len(verdict.entries) == 2
    assert verdict.winner is not None and verdict.winner.params == {"lora.rank": 64, "lora.alpha": 64.0}
    assert "on test over 4 seeds) is better than the other," in sentences(verdict)[0]
    low, high = verdict.intervals[verdict.winner]
    assert low < verdict.winner.mean < high


def test_lucky_seeds_make_no_winner_though_single_runs_differ(make: Make) -> None:
    places = seeded(make, (16, 64), (0.0, 0.3), 3, 1.0)
    verdict = verdict_of(places)
    assert verdict.winner is None
    assert any("seeds each (now 3)" in line for line in sentences(verdict))
    single = verdict_of(places, by=By.run)
    assert any(v.outcome is not Outcome.tie for v in single.versus)
    assert any("single runs" in line for line in sentences(single))


def test_a_single_seed_among_many_is_not_tested_and_forbids_a_winner(make: Make) -> None:
    places = seeded(make, (16, 64), (0.0, 1.2), 4, 0.1)
    places.append(make("alone", config_of(rank=8), ROWS, accuracy=0.6))
    verdict = verdict_of(places)
    assert [entry.params["lora.rank"] for entry in verdict.untested] == [8]
    assert verdict.winner is None
    said = "\n".join(sentences(verdict))
    assert (
        "not all could be tested" in said
        and "not tested (one seed says nothing of the luck of seeds; --by run compares single runs): rank=8" in said
    )


def test_how_a_run_is_judged_makes_no_other_configuration(make: Make) -> None:
    places = [
        make("a", config_of(seed=1), ROWS),
        make(
            "b",
            config_of(seed=2, evaluate=EvaluateConfig(resamples=500), train=TrainConfig(max_steps=100, eval_every=9)),
            ROWS,
        ),
    ]
    verdict = verdict_of(places)
    assert [len(entry.runs) for entry in verdict.entries] == [2]
    assert sentences(verdict)[0].startswith("the one configuration (") and "over 2 seeds" in sentences(verdict)[0]


def test_training_on_other_rows_is_said(make: Make) -> None:
    places = three(make, 0.9, 0.8, 0.7)
    record = places[0] / "result.json"
    record.write_text(record.read_text().replace("d" * 32, "e" * 32))
    assert any("differ in the rows or prompts" in note for note in verdict_of(places).notes)
    twin = make("twin", config_of(rank=64), ROWS, validation=0.6)  # the same settings on the rows that they had before
    verdict = verdict_of([*places, twin])
    assert {verdict.name(entry) for entry in verdict.entries} == {
        "run r64",
        "run twin",
        "rank=32 alpha=32",
        "rank=16 alpha=16",
    }


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_test_set_of_one_question_or_one_row_settles_nothing(make: Make, seeds: int) -> None:
    for rows in (TestRows(40, 1), TestRows(1, 1)):
        places = [
            make(f"{rows.rows}-{rank}-{seed}", config_of(rank=rank, seed=seed), rows, right=np.full(rows.rows, rank > 16))
            for rank in (16, 64) for seed in range(seeds)
        ]  # fmt: skip
        verdict = verdict_of(places)
        assert verdict.winner is None
        assert sentences(verdict)[0].startswith("no ")


def test_one_run_has_nothing_to_be_compared_with(make: Make) -> None:
    assert sentences(verdict_of([make("one")]))[0].endswith("nothing to compare it with")


def test_missing_predictions_leave_a_run_out_and_say_so(make: Make) -> None:
    places = three(make, 0.9, 0.8, 0.7)
    (places[1] / "predictions.parquet").unlink()
    (places[2] / "predictions.parquet").write_bytes(b"PAR1")
    verdict = verdict_of(places)
    assert verdict.winner is None and not verdict.versus
    assert sorted(run.label for run in verdict.missing) == ["r16", "r32"]
    assert all("predictions.parquet" in why and "\n" not in why for why in verdict.missing.values())


def test_runs_of_other_rows_are_never_paired(make: Make) -> None:
    """Neither those of another test set, nor one whose predictions hold other rows than its record says."""
    places = three(make, 0.9, 0.8, 0.7)
    other = make("elsewhere", config_of(rank=128), TestRows(seed=9))
    strange = make("strange", config_of(rank=256), TestRows(400, 400, seed=3))
    record = strange / "result.json"
    record.write_text(record.read_text().replace('"3-400-400"', '"0-400-400"'))
    verdicts = judge(read_runs([*places, other, strange]), resamples=200)
    assert [len(v.entries) for v in verdicts] == [4, 1]
    assert [run.label for run in verdicts[0].missing] == ["strange"]
    assert "not those of the other runs" in next(iter(verdicts[0].missing.values()))
    assert {v.other.params["lora.rank"] for v in verdicts[0].versus} == {32, 16}


def test_rows_are_matched_by_id_whatever_their_order(make: Make) -> None:
    import pyarrow.parquet as pq

    places = three(make, 0.85, 0.8, 0.75)
    before = verdict_of(places).versus
    path = places[1] / "predictions.parquet"
    table = pq.read_table(path)
    pq.write_table(table.take(np.random.default_rng(0).permutation(len(table))), path)
    after = verdict_of(places).versus
    assert [(v.difference, v.p, v.low, v.high) for v in after] == [(v.difference, v.p, v.low, v.high) for v in before]


def notes_of(make: Make, *trains: TrainConfig) -> list[str]:
    places = [make(f"n{i}", config_of(train=train), ROWS) for i, train in enumerate(trains)]
    return verdict_of(places).notes


def test_a_bigger_batch_that_saw_more_examples_is_said(make: Make) -> None:
    (note,) = notes_of(make, TrainConfig(batch_size=2, max_steps=100), TrainConfig(batch_size=8, max_steps=100))
    assert note.startswith("equal steps (100) but unequal examples: runs saw 800 to 3,200 (bigger batches saw more)")


def test_equal_examples_are_said_to_be_unequal_steps(make: Make) -> None:
    (note,) = notes_of(make, TrainConfig(batch_size=2, max_examples=1600), TrainConfig(batch_size=8, max_examples=1600))
    assert note.startswith("equal examples (1,600) but unequal steps: 50 to 200")


def test_equal_training_needs_no_note(make: Make) -> None:
    assert notes_of(make, TrainConfig(max_steps=50), TrainConfig(max_steps=50, eval_every=7)) == []


@pytest.mark.parametrize(
    ("number", "text"), [(7, "7"), (99, "99"), (101, "110"), (6318, "6,400"), (123_456, "130,000")]
)
def test_plans_are_rounded_up_to_two_digits(number: int, text: str) -> None:
    assert rounded(number) == text


def test_names_are_short_whatever_differs(make: Make) -> None:
    """Settings that only runs of another test set differ in name nothing here; long ones give way to the run."""
    wide = [
        LoraConfig(rank=8 * k, alpha=2.0 * k, dropout=k / 10, target_modules=["q_proj", "v_proj"][:k]) for k in (1, 2)
    ]
    places = [make(f"w{k}", config_of(lora=lora), ROWS) for k, lora in enumerate(wide)]
    places += [make(f"b{batch}", config_of(batch=batch), TestRows(seed=9)) for batch in (2, 4)]
    verdicts = judge(read_runs(places), resamples=100)
    names = [{verdict.name(entry) for entry in verdict.entries} for verdict in verdicts]
    assert names == [{"run w0", "run w1"}, {"batch_size=2", "batch_size=4"}]
