"""The shape of a row and of a data set, as Arrow; no reading and no generating here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

EXAMPLE_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("question", pa.string(), nullable=False),
        pa.field("answer", pa.string(), nullable=False),
        pa.field("solution", pa.string(), nullable=False),
        pa.field("is_correct", pa.bool_(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("slice", pa.string(), nullable=False),
    ]
)
"""Columns of every split, whatever its source.

id: unique in the data set. group: examples that share a question share a group; a group is never split.
slice: the named part of the evaluation set that the row is reported under. solution may be empty.
"""


@dataclass(frozen=True, slots=True)
class Example:
    """One proposed answer to one question, and whether it is correct."""

    id: str
    question: str
    answer: str
    solution: str
    is_correct: bool
    group: str
    slice: str


@dataclass(frozen=True)
class Splits:
    """Train, validation and test rows (each an EXAMPLE_SCHEMA table) that share no group."""

    train: pa.Table
    validation: pa.Table
    test: pa.Table

    def items(self) -> Iterator[tuple[str, pa.Table]]:
        """Yield (split name, rows) in the order train, validation, test."""
        yield "train", self.train
        yield "validation", self.validation
        yield "test", self.test


def iter_examples(rows: pa.Table, batch_rows: int = 4096) -> Iterator[Example]:
    """Yield the rows of an EXAMPLE_SCHEMA table one by one, holding at most `batch_rows` as Python objects."""
    for batch in rows.to_batches(max_chunksize=batch_rows):
        columns = [batch.column(name).to_pylist() for name in EXAMPLE_SCHEMA.names]
        for values in zip(*columns, strict=True):
            yield Example(*values)
