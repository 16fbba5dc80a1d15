"""Rows and files for the tests of reading: the same labelled rows in every format."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mathverify.config import DataConfig, DataSource
from mathverify.examples.sources import Loaded, load

FORMATS = ("parquet", "jsonl", "csv", "jsonl.gz", "csv.gz")


def make_rows(questions: int = 40, each: int = 3) -> list[dict[str, Any]]:
    """`questions` questions with `each` proposed answers; texts hold commas, quotes, newlines and non-ASCII."""
    return [
        {
            "question": f'What is {q} + "{q}", roughly?\nSay it in €.',
            "answer": str(2 * q + a),
            "solution": f"{q} + {q} = {2 * q + a},\nso \\boxed{{{2 * q + a}}} ✓",
            "is_correct": a == 0,
        }
        for q in range(questions)
        for a in range(each)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows in the format that the path's ending names."""
    name = path.name
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=50)
        return path
    text = "".join(json.dumps(row) + "\n" for row in rows) if "jsonl" in name else _csv(rows)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def _csv(rows: list[dict[str, Any]]) -> str:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def read(cache: Path, train: Path | str, **settings: Any) -> Loaded:
    """Load a table data set with a cache of its own."""
    fractions = {"validation_fraction": 0.2, "test_fraction": 0.2}
    config = DataConfig(source=DataSource.table, train=str(train), cache_dir=str(cache), **(fractions | settings))
    return load(config)


def all_rows(loaded: Loaded) -> list[dict[str, Any]]:
    return [row for _, table in loaded.splits.items() for row in table.to_pylist()]


def write_many(path: Path, rows: int) -> None:
    """Many rows of the mission's size (about 740 bytes), parquet as one row group, or jsonl."""
    filler = [f"{i:07d} ".join(["step"] * 52) for i in range(997)]
    values = {
        "question": [f"question {i // 67} about {filler[i // 67 % 997][:180]}" for i in range(rows)],
        "answer": [str(i % 1000) for i in range(rows)],
        "solution": [f"{filler[i % 997]} {i}" for i in range(rows)],
        "is_correct": [i % 5 < 2 for i in range(rows)],
    }
    if path.suffix == ".parquet":
        pq.write_table(pa.table(values), path, row_group_size=rows)
        return
    with path.open("w") as file:
        for row in zip(*values.values(), strict=True):
            file.write(json.dumps(dict(zip(values, row, strict=True))) + "\n")
