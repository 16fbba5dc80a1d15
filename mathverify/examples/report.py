"""The data report: what a person should know of their rows before training on them. Counts only; changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from mathverify.examples.rows import hash64
from mathverify.examples.schema import Splits

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class Survey:
    """What one split's rows are, before any tokenizer.

    duplicate_rows: rows beyond the first of those equal in question, answer, solution and label. contradictions:
    (question, answer) pairs that occur with both labels (not always an error: the label may judge the solution
    too), contradicting_rows the rows they have. slices: rows of each.
    """

    rows: int
    correct: int
    questions: int
    duplicate_rows: int
    contradictions: int
    contradicting_rows: int
    empty_solutions: int
    slices: dict[str, int]

    @property
    def share_correct(self) -> float:
        return self.correct / self.rows if self.rows else float("nan")


@dataclass(frozen=True)
class Lengths:
    """Tokens of a split's prompts (verdict not counted), and how many rows had their solution cut to fit."""

    minimum: int
    median: float
    p95: float
    maximum: int
    cut: int


@dataclass(frozen=True)
class DataReport:
    """All that is reported of a data set. shared_questions: '<split> and <split>' -> questions in both (0 if sound).

    prepared: what reading and splitting left out and why, as `Loaded.prepared` has it.
    """

    splits: dict[str, Survey]
    lengths: dict[str, Lengths]
    shared_questions: dict[str, int]
    prepared: dict[str, Any] = field(default_factory=dict)

    def to_plain(self) -> dict[str, Any]:
        plain = asdict(self)
        for name, survey in self.splits.items():
            plain["splits"][name]["share_correct"] = survey.share_correct
        return plain

    def render(self) -> Group:
        """The report for a screen: a rich table with a column for each split, and a line for each thing left out."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table("", *self.splits, title="data", title_justify="left")
        for label, cells in self._lines():
            table.add_row(label, *cells)
        return Group(table, *(Text(remark) for remark in self.remarks()))

    def _lines(self) -> list[tuple[str, list[str]]]:
        every = self.splits.values()
        lines = [
            ("rows", [f"{s.rows:,}" for s in every]),
            ("correct", [f"{s.share_correct:.1%}" for s in every]),
            ("questions", [f"{s.questions:,}" for s in every]),
            ("exact duplicates", [f"{s.duplicate_rows:,}" for s in every]),
            (
                "both labels",
                [f"{s.contradictions:,} ({s.contradicting_rows:,} rows)" for s in every],
            ),
            ("empty solutions", [f"{s.empty_solutions:,}" for s in every]),
        ]
        if self.lengths:
            shown = [self.lengths[name] for name in self.splits]
            lines += [
                ("tokens, median", [f"{n.median:,.0f}" for n in shown]),
                ("tokens, 95th %", [f"{n.p95:,.0f}" for n in shown]),
                ("tokens, range", [f"{n.minimum:,}-{n.maximum:,}" for n in shown]),
                ("solutions cut", [f"{n.cut:,}" for n in shown]),
            ]
        return lines

    def remarks(self) -> list[str]:
        """One printable line for each thing left out or suspicious."""
        lines = []
        for drop in self.prepared.get("dropped", []):
            named = ", ".join(str(row) for row in drop["rows"]) + (", ..." if drop["count"] > len(drop["rows"]) else "")
            lines.append(f"{drop['split']}: {drop['count']:,} rows dropped, {drop['reason']} (rows {named})")
        for shared in self.prepared.get("shared", []):
            lines.append(
                f"{shared['split']}: {shared['rows_dropped']:,} rows dropped, their {shared['questions']:,} questions "
                f"are in {shared['shares_with']} too"
            )
        for split, rows in self.prepared.get("limited", {}).items():
            lines.append(f"{split}: {rows:,} rows left out by data.{split}_rows")
        for split in self.prepared.get("taken", []):
            lines.append(f"{split}: taken from train, by question")
        lines += [f"{pair}: {n:,} questions in both" for pair, n in self.shared_questions.items() if n]
        return lines


def survey(rows: pa.Table) -> Survey:
    """Count one split (an EXAMPLE_SCHEMA table). Holds 24 bytes a row beside one batch."""
    pairs, wholes, groups = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
    slices: dict[str, int] = {}
    correct = empty = 0
    for batch in rows.to_batches(max_chunksize=4096):
        pair, whole = _hashes(batch)
        pairs.append(pair)
        wholes.append(whole)
        groups.append(group_hashes(batch))
        correct += pc.sum(batch.column("is_correct")).as_py() or 0
        empty += pc.sum(pc.equal(batch.column("solution"), "")).as_py() or 0
        for entry in pc.value_counts(batch.column("slice")).to_pylist():
            slices[entry["values"]] = slices.get(entry["values"], 0) + entry["counts"]
    labels = np.concatenate([np.empty(0, bool), *(c.to_numpy(zero_copy_only=False) for c in rows["is_correct"].chunks)])
    contradictions, contradicting = _contradictions(np.concatenate(pairs), labels)
    return Survey(
        rows=rows.num_rows,
        correct=int(correct),
        questions=len(np.unique(np.concatenate(groups))),
        duplicate_rows=rows.num_rows - len(np.unique(np.concatenate(wholes))),
        contradictions=contradictions,
        contradicting_rows=contradicting,
        empty_solutions=int(empty),
        slices=dict(sorted(slices.items())),
    )


def _hashes(batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of (question, answer) and of (question, answer, solution, label): uint64 [rows] each."""
    pairs, wholes = np.empty(batch.num_rows, np.uint64), np.empty(batch.num_rows, np.uint64)
    names = ("question", "answer", "solution", "is_correct")
    columns = [batch.column(name).to_pylist() for name in names]
    for row, (question, answer, solution, label) in enumerate(zip(*columns, strict=True)):
        digest = xxhash.xxh3_64(f"{len(question)}/{len(answer)}/{question}{answer}".encode())
        pairs[row] = digest.intdigest()
        digest.update(f"{label:d}{solution}".encode())
        wholes[row] = digest.intdigest()
    return pairs, wholes


def _contradictions(pairs: np.ndarray, labels: np.ndarray) -> tuple[int, int]:
    """How many distinct pairs occur with both labels, and how many rows those pairs have."""
    both = np.intersect1d(pairs[labels], pairs[~labels])
    return len(both), int(np.isin(pairs, both).sum())


def group_hashes(batch: pa.RecordBatch) -> np.ndarray:
    """uint64 [rows]: the hash of each row's group."""
    coded = batch.column("group").dictionary_encode()
    hashes: np.ndarray = hash64(coded.dictionary.to_pylist())[coded.indices.to_numpy()]
    return hashes


def shared_questions(splits: Splits) -> dict[str, int]:
    """For each pair of splits, how many groups are in both."""
    groups = {}
    for name, rows in splits.items():
        hashes = [group_hashes(batch) for batch in rows.to_batches(max_chunksize=4096)]
        groups[name] = np.unique(np.concatenate([np.empty(0, np.uint64), *hashes]))
    pairs = (("train", "validation"), ("train", "test"), ("validation", "test"))
    return {f"{a} and {b}": len(np.intersect1d(groups[a], groups[b])) for a, b in pairs}


def lengths(tokens: np.ndarray, cut: int) -> Lengths:
    """Summary of prompt lengths. tokens: int [rows]."""
    if not len(tokens):
        return Lengths(0, 0.0, 0.0, 0, cut)
    median, p95 = np.quantile(tokens, [0.5, 0.95])
    return Lengths(int(tokens.min()), float(median), float(p95), int(tokens.max()), cut)


def data_report(
    surveys: Mapping[str, Survey],
    shared: Mapping[str, int],
    prepared: Mapping[str, Any],
    tokens: Mapping[str, Lengths] | None = None,
) -> DataReport:
    """Put a report together from `Loaded`'s parts and, where known, token lengths by split."""
    return DataReport(dict(surveys), dict(tokens or {}), dict(shared), dict(prepared))
