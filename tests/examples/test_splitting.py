"""Splitting: whole questions, no question in two splits, the same whatever the order of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mathverify.config import DataConfig, DataSource
from mathverify.errors import UserError
from mathverify.examples.rows import question_group
from mathverify.examples.splitting import NOWHERE, SPLITS, choose, plan
from tests.examples.files import all_rows, make_rows, read, write


def config(**settings: Any) -> DataConfig:
    return DataConfig(source=DataSource.table, train="unused.csv", **settings)


def hashes(*groups: int) -> np.ndarray:
    return np.array(groups, np.uint64)


def groups_of(made: Any, groups: dict[str, np.ndarray]) -> list[set[int]]:
    """The groups of each split of a plan, in SPLITS' order."""
    found: list[set[int]] = [set(), set(), set()]
    for source, target in made.target.items():
        for group, index in zip(groups[source].tolist(), target.tolist(), strict=True):
            if index != NOWHERE:
                found[index].add(group)
    return found


GROUPS = st.lists(st.integers(0, 30), min_size=1, max_size=120)


@settings(max_examples=200, deadline=None)
@given(
    train=GROUPS,
    validation=st.none() | GROUPS,
    test=st.none() | GROUPS,
    seed=st.integers(0, 5),
    limit=st.none() | st.integers(1, 40),
)
def test_no_question_is_in_two_splits(
    train: list[int], validation: list[int] | None, test: list[int] | None, seed: int, limit: int | None
) -> None:
    given_splits = {"train": train, "validation": validation, "test": test}
    groups = {name: hashes(*rows) for name, rows in given_splits.items() if rows is not None}
    try:
        made = plan(groups, config(seed=seed, train_rows=limit, validation_rows=limit))
    except UserError:
        return
    a, b, c = groups_of(made, groups)
    assert not (a & b or a & c or b & c)
    for source, target in made.target.items():  # a question's rows stay together
        for group in set(groups[source].tolist()):
            assert len(set(target[groups[source] == group].tolist())) == 1
    if limit is not None:
        assert sum((target == 0).sum() for target in made.target.values()) <= limit
        assert sum((target == 1).sum() for target in made.target.values()) <= limit


@settings(max_examples=50, deadline=None)
@given(order=st.permutations(range(60)))
def test_the_order_of_rows_plays_no_part(order: list[int]) -> None:
    groups = np.arange(60, dtype=np.uint64) // np.uint64(3)
    chosen = config(validation_fraction=0.2, test_fraction=0.2)
    straight = plan({"train": groups}, chosen).target["train"]
    assert (plan({"train": groups[order]}, chosen).target["train"] == straight[order]).all()


def test_fractions_are_met_to_within_a_question() -> None:
    groups = np.repeat(np.arange(1000, dtype=np.uint64), 67)
    target = plan({"train": groups}, config(validation_fraction=0.1, test_fraction=0.3)).target["train"]
    sizes = [int((target == i).sum()) for i in range(len(SPLITS))]
    assert abs(sizes[1] - 6700) < 67 and abs(sizes[2] - 20100) < 67


def test_another_seed_is_another_split() -> None:
    groups = np.arange(1000, dtype=np.uint64)
    first, second = (plan({"train": groups}, config(seed=seed)).target["train"] for seed in (0, 1))
    shared = ((first == 2) & (second == 2)).sum()
    assert (first == 2).sum() == (second == 2).sum() == 20
    assert shared < 5


def test_given_rows_replace_the_fraction_of_a_taken_split() -> None:
    groups = np.repeat(np.arange(100, dtype=np.uint64), 3)
    target = plan({"train": groups}, config(test_rows=100, validation_rows=9)).target["train"]
    assert [(target == i).sum() for i in range(3)] == [300 - 99 - 9, 9, 99]


def test_a_question_too_large_for_what_is_left_is_passed_over() -> None:
    groups, counts = hashes(1, 2, 3), np.array([50, 4, 4])
    for seed in range(20):
        assert set(choose(groups, counts, 10, seed, "").tolist()) == {2, 3}


def test_files_that_share_questions_lose_them_from_train_and_say_so() -> None:
    groups = {"train": hashes(1, 1, 2, 3, 4), "validation": hashes(2, 5, 6), "test": hashes(3, 6)}
    made = plan(groups, config())
    assert groups_of(made, groups) == [{1, 4}, {2, 5}, {3, 6}]
    assert made.shared == [
        {"split": "validation", "shares_with": "test", "questions": 1, "rows_dropped": 1},
        {"split": "train", "shares_with": "test", "questions": 1, "rows_dropped": 1},
        {"split": "train", "shares_with": "validation", "questions": 1, "rows_dropped": 1},
    ]


def test_limits_below_any_question_and_too_few_questions_are_refused() -> None:
    groups = {"train": np.repeat(np.arange(9, dtype=np.uint64), 5)}
    with pytest.raises(UserError, match=r"data\.train_rows = 3 is less than any question's rows \(the fewest: 5\)"):
        plan(groups, config(train_rows=3))
    with pytest.raises(UserError, match=r"data\.test_rows = 4 is less"):
        plan(groups, config(test_rows=4))
    with pytest.raises(UserError, match=r"data\.test_rows = 45 takes all of train's 9 questions"):
        plan(groups, config(test_rows=45))
    with pytest.raises(UserError, match=r"data\.test: cannot be taken from train .* 1 question"):
        plan({"train": hashes(1, 1, 1)}, config())


def test_questions_that_differ_in_case_space_and_unicode_form_are_one() -> None:
    assert question_group("How  many\nÅpples?") == question_group(" how many åpples? ")
    assert question_group("How many apples?") != question_group("How many pears?")


def test_shared_questions_are_dropped_from_files_and_reported(tmp_path: Path) -> None:
    rows = make_rows()
    train, test = write(tmp_path / "train.csv", rows[:90]), write(tmp_path / "test.jsonl", rows[60:])
    loaded = read(tmp_path / "cache", train, test=str(test))
    assert loaded.prepared["shared"] == [{"split": "train", "shares_with": "test", "questions": 10, "rows_dropped": 30}]
    assert len(all_rows(loaded)) == 120
    assert loaded.splits.test.num_rows == 60
    assert set(loaded.shared_questions.values()) == {0}


def test_a_test_file_of_one_class_names_the_way_out(tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", make_rows())
    placeholder = [row | {"is_correct": True, "question": f"hidden {i}"} for i, row in enumerate(make_rows())]
    with pytest.raises(UserError, match=r"data\.test .*for test: .*True in all .*leave data\.test null"):
        read(tmp_path / "cache", train, test=str(write(tmp_path / "test.csv", placeholder)))
