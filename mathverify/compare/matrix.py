"""Many runs on the same test rows as one array: who judged which row right. The ground of all paired statistics."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mathverify.compare.reading import RunView
from mathverify.errors import UserError
from mathverify.records import PREDICTIONS, read_prediction_table

if TYPE_CHECKING:
    import pyarrow

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RightTable:
    """runs: in the order of the rows of `right`, bool [runs, n]: the verdict (score > 0) is the label.

    codes: int64 [n], the question of each test row, 0 to questions - 1. Rows are in order of their ids.
    """

    runs: list[RunView]
    right: NDArray[np.bool_]
    codes: NDArray[np.int64]

    @property
    def rows(self) -> int:
        return len(self.codes)

    @functools.cached_property
    def sizes(self) -> Floats:
        """Rows of each question, float64 [questions]."""
        sizes: Floats = np.bincount(self.codes).astype(np.float64)
        return sizes

    @property
    def questions(self) -> int:
        return len(self.sizes)

    def of(self, runs: Sequence[RunView]) -> NDArray[np.bool_]:
        """bool [runs, n]: the rows of `right` of these runs."""
        chosen: NDArray[np.bool_] = self.right[[self.place[run] for run in runs]]
        return chosen

    @functools.cached_property
    def place(self) -> dict[RunView, int]:
        """Which row of `right` is a run's."""
        return {run: index for index, run in enumerate(self.runs)}


def right_table(runs: Sequence[RunView]) -> tuple[RightTable, dict[RunView, str]]:
    """Read the predictions of runs that share a test set.

    Returns:
        The table of those that could be read, and for each of the others one line that says why not. A run whose rows
        are not those of most other runs is among the others.
    """
    failed: dict[RunView, str] = {}
    read: list[tuple[RunView, NDArray[np.bool_], str]] = []
    rows: dict[str, pyarrow.Table] = {}
    for run in runs:
        try:
            right, key = _read(run, rows)
        except UserError as error:
            failed[run] = str(error)
        else:
            read.append((run, right, key))
    keys = [key for _, _, key in read]
    common = max(keys, key=keys.count) if keys else ""
    for run, _, key in read:
        if key != common:
            failed[run] = f"{run.folder / PREDICTIONS}: its rows are not those of the other runs: not compared"
    kept = [(run, right) for run, right, key in read if key == common]
    codes = _codes(rows[common]) if kept else np.empty(0, np.int64)
    right = np.stack([right for _, right in kept]) if kept else np.empty((0, 0), bool)
    return RightTable([run for run, _ in kept], right, codes), failed


def _read(run: RunView, rows: dict[str, pyarrow.Table]) -> tuple[NDArray[np.bool_], str]:
    """Which rows the run judged right, in order of ids, and the key of its rows in `rows` (added when new).

    Runs of one test set hold equal columns, which Arrow sees at once; only the first of them is sorted by Python.
    """
    import pyarrow as pa
    import pyarrow.compute

    path = run.folder / PREDICTIONS
    table = read_prediction_table(path)
    _check(path, table)
    order = pa.compute.sort_indices(table["id"])
    table = table.take(order)
    about = table.select(["id", "group", "is_correct"]).combine_chunks().replace_schema_metadata(None)
    key = next((key for key, known in rows.items() if known.equals(about)), None)
    if key is None:
        key = str(len(rows))
        if len(set(about["id"].to_pylist())) < len(about):
            raise UserError(f"{path}: an id stands in several rows, so rows cannot be paired: give ids that differ")
        rows[key] = about
    said = _numbers(table["score"], pa.float64()) > 0
    return said == _numbers(table["is_correct"], pa.uint8()), key


def _numbers(column: pyarrow.ChunkedArray, kind: pyarrow.DataType) -> NDArray[Any]:
    """A column as NumPy sees it; by DLPack, since Arrow's own to_numpy imports pandas."""
    array = column.cast(kind).combine_chunks()
    numbers: NDArray[Any] = np.from_dlpack(array)
    return numbers


def _check(path: object, table: pyarrow.Table) -> None:
    import pyarrow as pa

    wanted = {"id": _is_text, "group": _is_text, "is_correct": pa.types.is_boolean, "score": pa.types.is_floating}
    for name, fits in wanted.items():
        if not fits(table[name].type):
            raise UserError(f"{path}: column {name} is {table[name].type}: run the evaluation again")
    if len(table) == 0 or any(table[name].null_count for name in ("id", "group", "is_correct", "score")):
        raise UserError(f"{path}: has no rows, or nulls where none belong: run the evaluation again")


def _is_text(kind: pyarrow.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _codes(about: pyarrow.Table) -> NDArray[np.int64]:
    _, codes = np.unique(np.array(about["group"].to_pylist(), dtype=str), return_inverse=True)
    numbered: NDArray[np.int64] = codes.astype(np.int64)
    return numbered


def per_question(right: NDArray[np.bool_], codes: NDArray[np.int64]) -> Floats:
    """bool [runs, n] -> how many rows of each question each run judged right, float64 [runs, questions]."""
    if right.shape[1] and codes.max() + 1 == len(codes):
        sums = np.empty(right.shape)
        sums[:, codes] = right
        return sums
    return np.stack([np.bincount(codes, row, codes.max() + 1) for row in right.astype(np.float64)])
