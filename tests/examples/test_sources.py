"""Loading: every source gives splits that share no question, and the generated rows need no file."""

from __future__ import annotations

import pytest

from mathverify.config import DataConfig
from mathverify.examples.sources import load, rows_fingerprint


def test_generated_rows_are_splits_like_any_other() -> None:
    pytest.importorskip("mathverify.examples.arithmetic")
    config = DataConfig(train_rows=300, validation_rows=60, test_rows=90)
    loaded = load(config)
    assert set(loaded.shared_questions.values()) == {0}
    assert [table.num_rows for _, table in loaded.splits.items()] == [300, 60, 90]
    for survey in loaded.surveys.values():
        assert 0.3 < survey.share_correct < 0.7
        assert len(survey.slices) > 1
    assert load(config).fingerprint == loaded.fingerprint
    assert load(DataConfig(train_rows=300, validation_rows=60, test_rows=90, seed=1)).fingerprint != loaded.fingerprint


def test_a_fingerprint_is_of_the_rows_and_not_of_their_chunks() -> None:
    import pyarrow as pa

    from tests.tokens.test_store import table

    rows = table(20)
    chunked = pa.concat_tables([rows.slice(0, 3), rows.slice(3, 0), rows.slice(3, 9), rows.slice(12)])
    assert chunked["id"].num_chunks > rows["id"].num_chunks
    assert rows_fingerprint(chunked) == rows_fingerprint(rows)
    assert rows_fingerprint(rows.slice(1)) != rows_fingerprint(rows)
    assert rows_fingerprint(rows.take(list(range(19, -1, -1)))) != rows_fingerprint(rows)
