"""DataConfig -> rows: read once, check, split by question, keep as Arrow files that are memory-mapped ever after.

A second start with the same content and settings reads nothing anew. Memory is bounded by a batch, plus about 30 bytes
a row while splitting; the returned tables are memory-mapped files, whose pages the system can drop at will.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from mathverify.cache import cached_folder, default_cache_dir
from mathverify.config import DataConfig, DataSource, to_plain
from mathverify.errors import UserError
from mathverify.examples.report import Survey, group_hashes, shared_questions, survey
from mathverify.examples.rows import RowChecker, Source
from mathverify.examples.schema import EXAMPLE_SCHEMA, Splits
from mathverify.examples.splitting import SPLITS, Plan, plan
from mathverify.progress import Progress, silent

VERSION = 1
"""Of the cached tables: raised whenever the same file and settings would give other rows."""

ARITHMETIC_ROWS = {"train": 8000, "validation": 500, "test": 1000}
"""How many rows are generated where data.*_rows is null."""


@dataclass(frozen=True)
class Loaded:
    """A data set that is ready to be tokenised.

    fingerprint: 32 hex digits of the rows' source and of all settings that shape them. prepared: JSON-ready account
    of what was read and left out (sources, dropped, shared, limited, taken). surveys: counts by split.
    shared_questions: '<split> and <split>' -> number of questions in both.
    """

    splits: Splits
    fingerprint: str
    prepared: dict[str, Any]
    surveys: dict[str, Survey]
    shared_questions: dict[str, int]


def load(config: DataConfig, progress: Progress = silent) -> Loaded:
    """Read, check and split the rows that `config` describes; from the cache if it was done before.

    Raises UserError, naming file, column, row and remedy, for anything wrong with the data: see rows.py, table.py,
    hub.py and splitting.py. Also when a split has rows of one class only.
    """
    match config.source:
        case DataSource.arithmetic:
            return _generated(config)
        case DataSource.table:
            from mathverify.examples import table

            return _prepared(table.sources(config), config, progress)
        case DataSource.hub:
            from mathverify.examples import hub

            return _prepared(hub.sources(config), config, progress)


def _generated(config: DataConfig) -> Loaded:
    from mathverify.examples.arithmetic import generate

    rows = {name: getattr(config, f"{name}_rows") or default for name, default in ARITHMETIC_ROWS.items()}
    splits = generate(rows["train"], rows["validation"], rows["test"], config.seed)
    for name, table in splits.items():
        _refuse_one_class(f"data.{name} (arithmetic)", table, f"use more rows with data.{name}_rows")
    prepared: dict[str, Any] = {"sources": [{"where": "arithmetic", "rows": rows, "seed": config.seed}]}
    fingerprint = _digest({name: rows_fingerprint(table) for name, table in splits.items()})
    return Loaded(splits, fingerprint, prepared, _surveys(splits), shared_questions(splits))


def _prepared(sources: list[Source], config: DataConfig, progress: Progress) -> Loaded:
    settings = to_plain(config)
    for name in (
        "path",
        "train",
        "validation",
        "test",
        "revision",
        "cache_dir",
    ):  # the content counts, not its name
        del settings[name]
    fingerprint = _digest(
        {"version": VERSION, "settings": settings, "sources": [[s.split, s.fingerprint] for s in sources]}
    )
    folder = cached_folder(
        cache_dir(config) / "rows", fingerprint, lambda folder: _build(folder, sources, config, progress)
    )
    splits = Splits(*(_mapped(folder / f"{name}.arrow") for name in SPLITS))
    kept = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
    surveys = {name: Survey(**entry) for name, entry in kept["surveys"].items()}
    prepared = {"sources": [], **kept["prepared"]}
    prepared["sources"] = [
        {"where": s.where, "split": s.split, **read} for s, read in zip(sources, prepared["sources"], strict=True)
    ]
    return Loaded(splits, fingerprint, prepared, surveys, kept["shared_questions"])


def cache_dir(config: DataConfig) -> Path:
    """Where prepared rows and tokens are kept: data.cache_dir, or the user's cache folder."""
    return Path(config.cache_dir).expanduser() if config.cache_dir else default_cache_dir()


def _digest(value: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def _mapped(path: Path) -> pa.Table:
    """An Arrow IPC file as a memory-mapped table: nothing is read until it is looked at."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


# Building the cached folder


def _build(folder: Path, sources: list[Source], config: DataConfig, progress: Progress) -> None:
    checkers = [RowChecker(source, config, prefix_ids=len(sources) > 1) for source in sources]
    groups: dict[str, np.ndarray] = {}
    for source, checker in zip(sources, checkers, strict=True):
        groups[source.split] = _copy_checked(folder / f"raw-{source.split}.arrow", source, checker, progress)
    made = plan(groups, config)
    wheres = {source.split: source.where for source in sources}
    for index, name in enumerate(SPLITS):
        _write_split(folder, name, index, made, config, wheres)
    for source in sources:
        (folder / f"raw-{source.split}.arrow").unlink()
    splits = Splits(*(_mapped(folder / f"{name}.arrow") for name in SPLITS))
    record = {
        "prepared": _account(checkers, made),
        "surveys": {name: asdict(counts) for name, counts in _surveys(splits).items()},
        "shared_questions": shared_questions(splits),
    }
    (folder / "prepared.json").write_text(json.dumps(record, indent=1), encoding="utf-8")


def _copy_checked(path: Path, source: Source, checker: RowChecker, progress: Progress) -> np.ndarray:
    """Write a source's checked rows to an Arrow file. Returns the hash of each row's group, uint64 [rows]."""
    hashes = [np.empty(0, np.uint64)]
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, EXAMPLE_SCHEMA) as writer:
        for raw in source.batches():
            batch = checker.check(raw)
            writer.write_batch(batch)
            hashes.append(group_hashes(batch))
            progress(f"reading {source.split}", checker.read, source.total)
    checker.finish()
    return np.concatenate(hashes)


def _streamed(path: Path) -> Iterator[pa.RecordBatch]:
    """The batches of an Arrow file, read one by one rather than mapped, so that they are not counted as held."""
    with pa.OSFile(str(path), "rb") as file:
        reader = pa.ipc.open_file(file)
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)


def _write_split(folder: Path, name: str, index: int, made: Plan, config: DataConfig, wheres: dict[str, str]) -> None:
    origin = "train" if name in made.taken else name
    with (
        pa.OSFile(str(folder / f"{name}.arrow"), "wb") as file,
        pa.ipc.new_file(file, EXAMPLE_SCHEMA) as writer,
    ):
        start = 0
        for batch in _streamed(folder / f"raw-{origin}.arrow"):
            mine = made.target[origin][start : start + batch.num_rows] == index
            start += batch.num_rows
            if mine.any():
                writer.write_batch(batch if mine.all() else batch.filter(pa.array(mine)))
    remedy = (
        f"use another data.seed or more rows for data.{name}"
        if name in made.taken
        else f"give labelled rows of both classes; for placeholder labels leave data.{name} null, to take it from train"
        if name != "train"
        else "give labelled rows of both classes"
    )
    _refuse_one_class(f"{wheres[origin]}, for {name}", _mapped(folder / f"{name}.arrow"), remedy)


def _refuse_one_class(where: str, rows: pa.Table, remedy: str) -> None:
    if rows.num_rows == 0:
        raise UserError(f"{where}: no rows are left after those without an answer or with a shared question: {remedy}")
    correct = sum(int(chunk.true_count) for chunk in rows["is_correct"].chunks)
    if correct in (0, rows.num_rows):
        raise UserError(
            f"{where}: column 'is_correct' is {bool(correct)} in all of its {rows.num_rows:,} rows: {remedy}"
        )


def _account(checkers: list[RowChecker], made: Plan) -> dict[str, Any]:
    return {
        "sources": [{"rows": c.read, "null_solutions": c.null_solutions} for c in checkers],
        "dropped": [asdict(c.dropped) for c in checkers if c.dropped.count],
        "shared": made.shared,
        "limited": made.limited,
        "taken": made.taken,
    }


def _surveys(splits: Splits) -> dict[str, Survey]:
    return {name: survey(rows) for name, rows in splits.items()}


def rows_fingerprint(rows: pa.Table) -> str:
    """32 hex digits of an EXAMPLE_SCHEMA table's content, however it is cut into chunks (several GB/s)."""
    digests = [(xxhash.xxh3_128(), xxhash.xxh3_128()) for _ in EXAMPLE_SCHEMA]
    for batch in rows.to_batches():
        for column, (sizes, content) in zip(batch.columns, digests, strict=True):
            if pa.types.is_boolean(column.type):
                content.update(column.to_numpy(zero_copy_only=False).tobytes())
                continue
            _, offsets, data = column.buffers()
            bounds = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
            sizes.update(np.diff(bounds).tobytes())
            if data is not None and len(column):
                content.update(memoryview(data)[int(bounds[0]) : int(bounds[-1])])
    return _digest([[sizes.hexdigest(), content.hexdigest()] for sizes, content in digests])
