"""The data report: its counts are those of a plain count over the same rows."""

from __future__ import annotations

import io
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from mathverify.examples.report import data_report, lengths, shared_questions, survey
from mathverify.examples.schema import EXAMPLE_SCHEMA, Splits
from tests.examples.files import make_rows, read, write

ROW = st.fixed_dictionaries(
    {
        "question": st.sampled_from(["q", "qa", "Q2"]),
        "answer": st.sampled_from(["a", "1", "aa"]),
        "solution": st.sampled_from(["", "s"]),
        "is_correct": st.booleans(),
        "slice": st.sampled_from(["x", "y"]),
    }
)


def table(rows: list[dict[str, Any]]) -> pa.Table:
    full = [row | {"id": str(i), "group": row["question"]} for i, row in enumerate(rows)]
    return pa.Table.from_pylist(full, EXAMPLE_SCHEMA)


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(ROW, max_size=30))
def test_counts_are_those_of_a_plain_count(rows: list[dict[str, Any]]) -> None:
    got = survey(table(rows))
    labels = defaultdict(set)
    for row in rows:
        labels[row["question"], row["answer"]].add(row["is_correct"])
    both = {pair for pair, seen in labels.items() if len(seen) == 2}
    wholes = {(r["question"], r["answer"], r["solution"], r["is_correct"]) for r in rows}
    assert (got.rows, got.correct) == (len(rows), sum(r["is_correct"] for r in rows))
    assert got.questions == len({r["question"] for r in rows})
    assert got.duplicate_rows == len(rows) - len(wholes)
    assert got.contradictions == len(both)
    assert got.contradicting_rows == sum((r["question"], r["answer"]) in both for r in rows)
    assert got.empty_solutions == sum(not r["solution"] for r in rows)
    assert got.slices == Counter(r["slice"] for r in rows)


def test_lengths_are_the_quantiles() -> None:
    got = lengths(np.arange(1, 101, dtype=np.int32), cut=3)
    assert (got.minimum, got.median, got.maximum, got.cut) == (1, 50.5, 100, 3)
    assert 95 <= got.p95 <= 96
    assert lengths(np.empty(0, np.int32), 0).maximum == 0


def test_questions_in_two_splits_are_found() -> None:
    row = {"answer": "a", "solution": "", "is_correct": True, "slice": "all"}
    splits = Splits(*(table([row | {"question": q} for q in qs]) for qs in ("abc", "cd", "dce")))
    assert shared_questions(splits) == {
        "train and validation": 1,
        "train and test": 1,
        "validation and test": 2,
    }


def test_the_report_is_json_and_a_table_that_says_what_was_left_out(tmp_path: Path) -> None:
    rows = make_rows()
    rows[3]["answer"] = None
    rows[7] = rows[6] | {"is_correct": not rows[6]["is_correct"]}
    loaded = read(tmp_path, write(tmp_path / "rows.parquet", rows))
    spread = {name: lengths(np.arange(5, 25, dtype=np.int32), 2) for name in loaded.surveys}
    report = data_report(loaded.surveys, loaded.shared_questions, loaded.prepared, spread)
    plain = json.loads(json.dumps(report.to_plain()))
    assert sum(split["rows"] for split in plain["splits"].values()) == 119
    assert sum(split["contradictions"] for split in plain["splits"].values()) == 1
    out = io.StringIO()
    Console(file=out, width=200).print(report.render())
    text = out.getvalue()
    assert "1 rows dropped, answer is null or blank (rows 4)" in text
    assert "test: taken from train, by question" in text
    assert "5-24" in text
