"""Rows from a parquet, jsonl or csv file (the last two also gzipped), a batch at a time. No checks of meaning here.

Text files are read line by line rather than with Arrow's readers, because those guess types per block and cannot
say in which row a fault is.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from mathverify.cache import checksum
from mathverify.config import DataConfig
from mathverify.errors import UserError
from mathverify.examples.rows import (
    BATCH_ROWS,
    MAX_FIELD_BYTES,
    RawBatch,
    Source,
    bad_label,
    find_columns,
    label_of,
    one_line,
    show,
)

MAX_LINE_BYTES = 4 * MAX_FIELD_BYTES
GZIP_FREE_BYTES = 64 << 20
GZIP_MAX_RATIO = 100
"""Compressed text may unpack to 64 MiB freely, and beyond that to at most 100 times its size: more is no text."""

SUFFIXES = ".parquet, .jsonl or .csv (.jsonl.gz and .csv.gz too)"
CSV_LABELS = {word: word.lower() == "true" for word in ("True", "true", "TRUE", "False", "false", "FALSE")}


def sources(config: DataConfig) -> list[Source]:
    """The files that data.train, data.validation and data.test name, in this order; those not given are left out."""
    given = (("train", config.train), ("validation", config.validation), ("test", config.test))
    return [open_table(Path(path).expanduser(), split, config) for split, path in given if path]


def open_table(path: Path, split: str, config: DataConfig) -> Source:
    """A file as a Source. Raises UserError if it is missing, empty, of another kind or has not the columns."""
    where = f"data.{split} {show(str(path), 200)}"
    kind = _kind(path, where)
    try:
        size = path.stat().st_size
        if size == 0:
            raise UserError(f"{where}: is empty: give a file with labelled rows")
        if kind == "parquet":
            return _open_parquet(path, split, where, config)
        read = _read_csv if kind.startswith("csv") else _read_jsonl
        fingerprint = checksum(path)
    except OSError as error:
        raise _unreadable(where, error) from error
    return Source(where, split, fingerprint, lambda: _guarded(where, lambda: read(path, where, config)))


def _kind(path: Path, where: str) -> str:
    if not path.exists():
        raise UserError(f"{where}: no such file: give a path to a {SUFFIXES} file")
    if not path.is_file():
        raise UserError(f"{where}: is not a file: give a path to a {SUFFIXES} file")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    last = suffixes[-1] if suffixes else ""
    zipped = ".gz" if last == ".gz" else ""
    inner = (suffixes[-2] if len(suffixes) > 1 else "") if zipped else last
    kinds = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv"}
    if inner in (".parquet", ".pq") and not zipped:
        return "parquet"
    if inner not in kinds:
        raise UserError(f"{where}: unknown kind of file {show(last)}: use {SUFFIXES}")
    return kinds[inner] + zipped


def _guarded(where: str, read: Callable[[], Iterator[RawBatch]]) -> Iterator[RawBatch]:
    """Turn what reading may raise into the one line that a user sees."""
    try:
        yield from read()
    except UserError:
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{where}: is not a whole gzip file ({one_line(error)}): compress or download it again"
        ) from error
    except OSError as error:
        raise _unreadable(where, error) from error
    except pa.ArrowException as error:
        raise UserError(f"{where}: is corrupt ({one_line(error)}): write or download it again") from error


def _unreadable(where: str, error: OSError) -> UserError:
    if error.errno is None:  # Arrow raises OSError for broken content too
        return UserError(f"{where}: is corrupt ({one_line(error)}): write or download it again")
    return UserError(f"{where}: cannot be read ({error.strerror}): check the path and its permissions")


# Parquet


def _open_parquet(path: Path, split: str, where: str, config: DataConfig) -> Source:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            total = file.metadata.num_rows
            _refuse_swollen(file.metadata, where)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{where}: is not a readable parquet file ({one_line(error)}): write it again") from error
    if total == 0:
        raise UserError(f"{where}: has no rows: give a file with labelled rows")
    columns = find_columns(config, names, where)
    read: Callable[[], Iterator[RawBatch]] = lambda: _read_parquet(path, columns, where, config)  # noqa: E731
    return Source(where, split, checksum(path), lambda: _guarded(where, read), total)


def _refuse_swollen(metadata: pq.FileMetaData, where: str) -> None:
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        if group.num_rows and group.total_byte_size / group.num_rows > MAX_LINE_BYTES:
            raise UserError(
                f"{where}: row group {index} unpacks to {group.total_byte_size:,} bytes for {group.num_rows:,} rows: "
                f"refused, rows may have at most {MAX_LINE_BYTES:,} bytes each"
            )


def _read_parquet(path: Path, columns: dict[str, str], where: str, config: DataConfig) -> Iterator[RawBatch]:
    # buffer_size makes Arrow stream pages, so that a file written as one row group of a million rows stays bounded.
    with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        start = 1
        for batch in file.iter_batches(BATCH_ROWS, columns=sorted(set(columns.values())), use_threads=False):
            yield plain_batch(batch, columns, start, where, config)
            start += batch.num_rows


def plain_batch(batch: pa.RecordBatch, columns: dict[str, str], start: int, where: str, config: DataConfig) -> RawBatch:
    """Arrow columns of any fitting type as RawBatch's string and bool ones; UserError names the first unfit row."""
    plain = {}
    for ours, theirs in columns.items():
        column = batch.column(theirs)
        if ours == "is_correct":
            plain[ours] = _labels(column, theirs, start, where, config.map_labels)
        else:
            plain[ours] = _text(column, theirs, start, where)
    return RawBatch(start, plain)


def _text(column: pa.Array, name: str, start: int, where: str) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if not (_is_text(kind) or _is_bytes(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
        nested = "nested" if pa.types.is_nested(kind) else str(kind)
        raise UserError(f"{where}: column {show(name)}, row {start}: is {nested}, not text: store it as a string")
    if _is_text(kind):  # Arrow does not look at the bytes of a string column unless asked
        column = column.cast(pa.large_binary())
    try:
        return column.cast(pa.string())
    except pa.ArrowInvalid as error:
        row = start + next(i for i, value in enumerate(column.to_pylist()) if not _is_utf8(value))
        raise _not_utf8(where, f"column {show(name)}, row {row}") from error


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_utf8(value: bytes | None) -> bool:
    try:
        return value is None or value.decode("utf-8") is not None
    except UnicodeDecodeError:
        return False


def _not_utf8(where: str, place: str) -> UserError:
    return UserError(f"{where}: {place}: is not UTF-8 text: save the file as UTF-8 (iconv -t utf-8)")


def _labels(column: pa.Array, name: str, start: int, where: str, map_labels: bool) -> pa.Array:
    if pa.types.is_boolean(column.type):
        return column
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _is_text(column.type):
        column = _text(column, name, start, where)
    values: Sequence[Any] = column.to_pylist()
    return pa.array(_plain_labels(values, name, start, where, map_labels), pa.bool_())


def _plain_labels(values: Iterable[Any], name: str, start: int, where: str, map_labels: bool) -> Iterator[bool | None]:
    for row, value in enumerate(values, start):
        try:
            yield label_of(value, map_labels)
        except ValueError:
            raise bad_label(where, name, row, value, map_labels) from None


# Text files


def _lines(path: Path, where: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, text) of a UTF-8 file, gzipped or not; bounded in the length of a line."""
    with path.open("rb") as raw:
        file = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if path.suffix.lower() == ".gz" else raw
        number, unpacked = 0, 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            unpacked += len(line)
            if len(line) > MAX_LINE_BYTES:
                raise UserError(f"{where}: line {number} is longer than {MAX_LINE_BYTES:,} bytes: shorten or remove it")
            if file is not raw and unpacked > max(GZIP_FREE_BYTES, GZIP_MAX_RATIO * path.stat().st_size):
                raise UserError(
                    f"{where}: unpacks to more than {GZIP_MAX_RATIO} times its size (line {number}): "
                    "refused as a decompression bomb; unpack it yourself if it is sound"
                )
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(where, f"line {number}, byte {error.start + 1}") from error


def _batched(rows: Iterator[tuple[dict[str, Any], int]], columns: dict[str, str], where: str) -> Iterator[RawBatch]:
    """Collect (values by our column names, line number) into RawBatches."""
    start, done = 1, False
    while not done:
        values: dict[str, list[Any]] = {name: [] for name in columns}
        size = 0
        done = True
        for row, _line in rows:
            for name in columns:
                value = row[name]
                size += len(value) if isinstance(value, str) else 1
                values[name].append(value)
            if len(values["question"]) == BATCH_ROWS or size > 16 * MAX_FIELD_BYTES:
                done = False
                break
        if values["question"]:
            yield RawBatch(
                start,
                {name: _to_arrow(name, values[name], theirs, start, where) for name, theirs in columns.items()},
            )
            start += len(values["question"])


def _to_arrow(ours: str, values: list[Any], name: str, start: int, where: str) -> pa.Array:
    try:
        return pa.array(values, pa.bool_() if ours == "is_correct" else pa.string())
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell and UTF-8 cannot
        row = start + values.index(error.object)
        raise _not_utf8(where, f"column {show(name)}, row {row}") from error


def _read_jsonl(path: Path, where: str, config: DataConfig) -> Iterator[RawBatch]:
    lines = ((number, line) for number, line in _lines(path, where) if line.strip())
    first = next(lines, None)
    if first is None:
        raise UserError(f"{where}: has no rows: give a file with labelled rows")
    columns = find_columns(config, list(_json_object(*first, where)), where)

    def rows() -> Iterator[tuple[dict[str, Any], int]]:
        for row, (number, line) in enumerate(_chain(first, lines), 1):
            values = _json_object(number, line, where)
            yield _json_row(values, columns, row, where, config), number

    yield from _batched(rows(), columns, where)


def _chain(first: tuple[int, str], rest: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    yield first
    yield from rest


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


# Numbers keep their spelling ("7.0" stays "7.0"): an answer is text, and rewriting it would change the prompt.
_DECODER = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=_refuse_constant)


def _json_object(number: int, line: str, where: str) -> dict[str, Any]:
    try:
        value = _DECODER.decode(line.strip())
    except (ValueError, RecursionError) as error:
        hint = (
            "a JSON array? write one object per line" if number == 1 and line.lstrip()[:1] == "[" else "mend the line"
        )
        raise UserError(f"{where}: line {number} is not JSON ({one_line(error, 80)}): {hint}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: line {number} is not a JSON object: write one {{...}} per line")
    return value


def _json_row(
    values: dict[str, Any], columns: dict[str, str], row: int, where: str, config: DataConfig
) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for ours, theirs in columns.items():
        value = values.get(theirs)
        if ours == "is_correct":
            plain[ours] = _plain_label(value, theirs, row, where, config.map_labels)
        elif value is None or isinstance(value, str):
            plain[ours] = value
        else:
            kind = "nested" if isinstance(value, (dict, list)) else "a boolean"
            raise UserError(f"{where}: column {show(theirs)}, row {row}: is {kind}, not text: store it as a string")
    return plain


def _plain_label(value: Any, name: str, row: int, where: str, map_labels: bool) -> bool | None:
    return next(_plain_labels([value], name, row, where, map_labels))


def _read_csv(path: Path, where: str, config: DataConfig) -> Iterator[RawBatch]:
    table = _csv_records(path, where)
    header = next(table, None)
    if header is None:
        raise UserError(f"{where}: has no rows: give a file with a header line and labelled rows")
    names = header[0]
    _refuse_other_separator(names, where)
    columns = find_columns(config, names, where)
    places = {ours: names.index(theirs) for ours, theirs in columns.items()}

    def rows() -> Iterator[tuple[dict[str, Any], int]]:
        for row, (values, number) in enumerate(table, 1):
            if len(values) != len(names):
                what = f"{len(values)} fields where the header has {len(names)}"
                raise UserError(f"{where}: row {row} (line {number}): {what}: quote texts that hold commas")
            plain: dict[str, Any] = {ours: values[place] or None for ours, place in places.items()}
            label = plain["is_correct"]
            plain["is_correct"] = _plain_label(
                CSV_LABELS.get(label, label), columns["is_correct"], row, where, config.map_labels
            )
            yield plain, number

    yield from _batched(rows(), columns, where)


def _refuse_other_separator(names: list[str], where: str) -> None:
    for separator, word in ((";", "semicolons"), ("\t", "tabs"), ("|", "vertical bars")):
        if len(names) == 1 and names[0].count(separator) >= 2:
            raise UserError(f"{where}: its fields are separated by {word}, not by commas: save it as CSV with commas")


def _csv_records(path: Path, where: str) -> Iterator[tuple[list[str], int]]:
    """Yield (fields, number of the record's last line), leaving out blank lines."""
    # csv's own limit is process-wide; it bounds what an unclosed quote can swallow.
    csv.field_size_limit(MAX_FIELD_BYTES)
    number = 0

    def text() -> Iterator[str]:
        nonlocal number
        for number, line in _lines(path, where):  # noqa: B007  (the count is read outside)
            yield line

    try:
        for fields in csv.reader(text(), strict=True):
            if fields:
                yield fields, number
    except csv.Error as error:
        raise UserError(f"{where}: line {number} is not CSV ({one_line(error)}): mend its quotes") from error
