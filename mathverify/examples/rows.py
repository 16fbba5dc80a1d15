"""Raw columns -> checked EXAMPLE_SCHEMA rows, batch by batch; every complaint names file, column, row and remedy.

Reading files is table.py's and hub.py's business; this is what they share.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from mathverify.config import DataConfig, NullAnswers
from mathverify.errors import UserError
from mathverify.examples.schema import EXAMPLE_SCHEMA

MAX_FIELD_BYTES = 1 << 20
"""Longest question, answer or solution. A mission row has ~735 bytes in all; a megabyte is a mistake in the file."""

BATCH_ROWS = 2048
NAMED_ROWS = 20
TEXT_COLUMNS = ("question", "answer", "solution", "id", "group", "slice")
REQUIRED = ("question", "answer", "is_correct")
LABEL_WORDS = {
    "true": True,
    "false": False,
    "yes": True,
    "no": False,
    "y": True,
    "n": False,
    "t": True,
    "f": False,
}
LABEL_WORDS |= {"1": True, "0": False, "1.0": True, "0.0": False}


@dataclass(frozen=True)
class RawBatch:
    """Consecutive rows of a source. `start` is the first one's number, counting from 1.

    columns: among TEXT_COLUMNS (string, nulls allowed) and is_correct (bool, nulls allowed).
    """

    start: int
    columns: Mapping[str, pa.Array]


@dataclass(frozen=True)
class Source:
    """One file or hub split to be read: `where` names it in messages, `fingerprint` stands for its content.

    batches() reads it from the beginning; total: its number of rows, None if not known before reading.
    """

    where: str
    split: str
    fingerprint: str
    batches: Callable[[], Iterator[RawBatch]]
    total: int | None = None


@dataclass
class Drops:
    """Rows left out for one reason: how many, and the first few of them by number."""

    split: str
    reason: str
    count: int = 0
    rows: list[int] = field(default_factory=list)

    def add(self, numbers: Sequence[int]) -> None:
        self.count += len(numbers)
        self.rows.extend(numbers[: NAMED_ROWS - len(self.rows)])


def show(value: object, limit: int = 60) -> str:
    """A value for an error text: quoted, control characters escaped, shortened."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= limit else text[:limit] + "..."


def find_columns(config: DataConfig, present: Sequence[str], where: str) -> dict[str, str]:
    """Which of a file's columns is which of ours: {our name: theirs}. Raises UserError if a needed one is missing.

    `data.columns` renames; an empty name there says that the file has no such column (solution, id).
    """
    twice = sorted({name for name in present if list(present).count(name) > 1})
    if twice:
        raise UserError(f"{where}: column {show(twice[0])} appears more than once: rename or remove one of them")
    names = {name: config.renamed.get(name, name) for name in (*REQUIRED, "solution", "id")}
    found = {}
    for ours, theirs in names.items():
        if theirs in present:
            found[ours] = theirs
        elif ours in REQUIRED or (theirs and ours in config.renamed):
            raise UserError(_missing(where, ours, theirs, present))
    for ours, chosen in (("group", config.group_column), ("slice", config.slice_column)):
        if chosen is not None:
            if chosen not in present:
                has = ", ".join(show(name) for name in present)
                raise UserError(f"{where}: no column {show(chosen)} (data.{ours}_column); it has {has}")
            found[ours] = chosen
    return found


def _missing(where: str, ours: str, theirs: str, present: Sequence[str]) -> str:
    close = [name for name in present if name.strip().casefold() == theirs.strip().casefold()]
    listed = ", ".join(show(name) for name in present[:20])
    suggestion = close[0] if close else "<its name there>"
    return f"{where}: no column {show(theirs)}; it has {listed or 'none'}: set data.columns.{ours}={suggestion}"


def label_of(value: Any, map_labels: bool) -> bool | None:
    """A label cell as a boolean; None stays None. Raises ValueError for anything that is not True or False.

    With `map_labels`, also true/false, yes/no, y/n, t/f and 1/0 in any case.
    """
    if value is None or isinstance(value, bool):
        return value
    if map_labels:
        known = LABEL_WORDS.get(str(value).strip().casefold())
        if known is not None:
            return known
    raise ValueError(value)


def bad_label(where: str, column: str, row: int, value: object, map_labels: bool) -> UserError:
    """The error of a label that is not a boolean."""
    remedy = "use true/false, yes/no or 1/0" if map_labels else "make it a boolean, or set data.map_labels=true"
    return UserError(f"{where}: column {show(column)}, row {row}: {show(value)} is not a boolean label: {remedy}")


def question_group(question: str) -> str:
    """The group of a question: 16 hex digits of its text without regard to case, spacing and Unicode form."""
    plain = " ".join(unicodedata.normalize("NFKC", question).casefold().split())
    return xxhash.xxh3_64_hexdigest(plain.encode("utf-8"))


def hash64(texts: Sequence[str]) -> np.ndarray:
    """xxh3-64 of each text: uint64 [n]."""
    return np.fromiter((xxhash.xxh3_64_intdigest(t.encode("utf-8")) for t in texts), dtype=np.uint64, count=len(texts))


class RowChecker:
    """Turns one source's raw batches into EXAMPLE_SCHEMA batches, in order, counting what it leaves out.

    Raises UserError on null labels, null or blank questions, null ids, duplicate ids (in `finish`), over-long
    fields, and on answers that are null or blank if data.null_answers is refuse (else those rows are dropped).
    """

    def __init__(self, source: Source, config: DataConfig, prefix_ids: bool = False) -> None:
        self.where = source.where
        self._prefix = f"{source.split}/" if prefix_ids else ""  # each of several files may number from 0
        self.split = source.split
        self.config = config
        self.dropped = Drops(source.split, "answer is null or blank")
        self.read = 0
        self.null_solutions = 0
        self._id_hashes: list[np.ndarray] = []

    def check(self, raw: RawBatch) -> pa.RecordBatch:
        columns = dict(raw.columns)
        rows = len(columns["question"])
        self.read += rows
        for name in ("question", "answer", "solution"):
            self._refuse_long(name, columns.get(name), raw.start)
        remedy = "remove the row or give it a label"
        self._refuse_where(pc.is_null(columns["is_correct"]), "is_correct", raw.start, "the label is null", remedy)
        self._refuse_where(_blank(columns["question"]), "question", raw.start, "null or blank", "remove the row")
        columns["solution"] = self._solutions(columns.get("solution"), rows)
        columns["id"] = self._ids(columns.get("id"), raw.start, rows)
        columns["group"] = self._groups(columns.get("group"), columns["question"], raw.start)
        given = columns.get("slice")
        columns["slice"] = _constant("all", rows) if given is None else pc.fill_null(given, "(none)")
        batch = pa.RecordBatch.from_arrays([columns[name] for name in EXAMPLE_SCHEMA.names], EXAMPLE_SCHEMA.names)
        return self._without_missing_answers(batch, raw.start).cast(EXAMPLE_SCHEMA)

    def finish(self) -> None:
        """Check what only the whole source shows: that ids are unique and that there was a row at all."""
        if self.read == 0:
            raise UserError(f"{self.where}: has no rows: give a file with labelled rows")
        if not self._id_hashes:
            return
        hashes = np.concatenate(self._id_hashes)
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
        if len(same):
            first, second = int(order[same[0]]) + 1, int(order[same[0] + 1]) + 1
            raise UserError(
                f"{self.where}: column {show(self.config.renamed.get('id', 'id'))}, rows {first} and {second}: "
                f"{len(same)} duplicate ids: make ids unique, or set data.columns.id='' to number the rows instead"
            )

    def _refuse_where(self, bad: pa.Array, column: str, start: int, what: str, remedy: str) -> None:
        if pc.any(bad).as_py():
            row = start + int(pc.index(bad, True).as_py())
            theirs = self.config.renamed.get(column, column)
            raise UserError(f"{self.where}: column {show(theirs)}, row {row}: {what}: {remedy}")

    def _refuse_long(self, name: str, column: pa.Array | None, start: int) -> None:
        if column is not None:
            long = pc.fill_null(pc.greater(pc.binary_length(column), MAX_FIELD_BYTES), False)
            what = f"longer than {MAX_FIELD_BYTES:,} bytes"
            self._refuse_where(long, name, start, what, "shorten the text or remove the row")

    def _solutions(self, given: pa.Array | None, rows: int) -> pa.Array:
        if given is None:
            self.null_solutions += rows
            return _constant("", rows)
        self.null_solutions += given.null_count
        return pc.fill_null(given, "")

    def _ids(self, given: pa.Array | None, start: int, rows: int) -> pa.Array:
        if given is None:
            return pa.array([f"{self.split}-{row:07d}" for row in range(start, start + rows)], pa.string())
        self._refuse_where(_blank(given), "id", start, "the id is null or blank", "give every row an id")
        ids = given.to_pylist()
        self._id_hashes.append(hash64(ids))
        return pa.array([self._prefix + name for name in ids], pa.string()) if self._prefix else given

    def _groups(self, given: pa.Array | None, questions: pa.Array, start: int) -> pa.Array:
        if given is not None:
            if given.null_count:
                row = start + int(pc.index(pc.is_null(given), True).as_py())
                raise UserError(f"{self.where}: column {show(self.config.group_column)}, row {row}: null: give a group")
            return given
        coded = questions.dictionary_encode()
        groups = pa.array([question_group(text) for text in coded.dictionary.to_pylist()], pa.string())
        return groups.take(coded.indices)

    def _without_missing_answers(self, batch: pa.RecordBatch, start: int) -> pa.RecordBatch:
        missing = _blank(batch.column("answer"))
        if not pc.any(missing).as_py():
            return batch
        if self.config.null_answers is NullAnswers.refuse:
            remedy = "remove the row, or set data.null_answers=drop to leave such rows out"
            self._refuse_where(missing, "answer", start, "the answer is null or blank", remedy)
        self.dropped.add((np.flatnonzero(missing.to_numpy(zero_copy_only=False)) + start).tolist())
        return batch.filter(pc.invert(missing))


def _blank(column: pa.Array) -> pa.Array:
    """True where a text is null or nothing but white space."""
    return pc.fill_null(pc.equal(pc.utf8_trim_whitespace(column), ""), True)


def _constant(text: str, rows: int) -> pa.Array:
    return pa.repeat(pa.scalar(text, pa.string()), rows)


def one_line(error: BaseException, limit: int = 200) -> str:
    """What an exception says, on one short printable line."""
    text = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= limit else text[:limit] + "..."
