"""Rows of a data set on the Hugging Face hub, or of a local folder in the hub's own layout. No checks of meaning here.

The mission's data set (ad6398/nyu-dl-teach-maths-comp) has a test split whose labels are placeholders. A labelled
test set is therefore taken from train by question: leave data.test null (and data.validation too), and the hub's
own test split is never read. Naming it, data.test=test, is refused because it holds one class only.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from mathverify.cache import checksum
from mathverify.config import DataConfig
from mathverify.errors import UserError
from mathverify.examples.rows import BATCH_ROWS, RawBatch, Source, find_columns, one_line, show
from mathverify.examples.table import plain_batch
from mathverify.hub import cache_damage, mending, nobody_asked_in_vain


def sources(config: DataConfig) -> list[Source]:
    """The splits that data.train (default "train"), data.validation and data.test name; others are not read.

    Raises UserError, one line with the remedy, when the data set cannot be had: no network, no such name or split,
    gated without an accepted licence, or broken files.
    """
    given = (("train", config.train or "train"), ("validation", config.validation), ("test", config.test))
    return [_open_split(name, split, config) for split, name in given if name]


def _open_split(name: str, split: str, config: DataConfig) -> Source:
    where = f"data.path {show(config.path, 200)}, split {show(name)}"
    rows = _load(name, where, config)
    columns = find_columns(config, rows.column_names, where)
    if len(rows) == 0:
        raise UserError(f"{where}: has no rows: choose another split with data.{split}")
    return Source(where, split, _fingerprint(rows), lambda: _batches(rows, columns, where, config), len(rows))


def _load(name: str, where: str, config: DataConfig) -> Any:
    """The split as a datasets.Dataset, memory-mapped."""
    import datasets
    import pyarrow

    local = _is_local(config.path or "")
    missing = local and not Path(config.path or "").expanduser().exists()
    path = str(Path(config.path or "").expanduser()) if local else config.path
    read = partial(datasets.load_dataset, path, split=name, revision=config.revision)
    try:
        if missing:  # datasets would ask the hub for it, several times
            raise FileNotFoundError(config.path)
        with _quiet(), nullcontext() if local else nobody_asked_in_vain():
            try:
                return read()
            except (pyarrow.ArrowInvalid, OSError) as error:
                if type(error) not in (
                    pyarrow.ArrowInvalid,
                    OSError,
                    FileNotFoundError,
                ):  # the network's are kinds of it
                    raise
                # datasets' own prepared copy is torn, by a kill or a full disk: made again from the files
                return read(download_mode=datasets.DownloadMode.REUSE_CACHE_IF_EXISTS)
    except Exception as error:  # the hub's client raises from requests, httpx, fsspec, arrow and its own tree
        raise explain(error, where, config) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep datasets' own log lines off the screen, since an error is told in one line, and its bars off a log file."""
    import datasets

    before, bars = datasets.logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)
        if bars:
            datasets.enable_progress_bars()


def _offline() -> bool:
    """Whether the hub client was told not to use the network (HF_HUB_OFFLINE=1)."""
    import datasets
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE)


def _is_local(path: str) -> bool:
    return Path(path).expanduser().exists() or path.startswith(("/", "./", "../", "~"))


def explain(error: BaseException, where: str, config: DataConfig) -> UserError:
    """What stopped a hub data set from loading, as one line with the remedy. The error's own text may be long."""
    names = {kind.__name__ for kind in _chain_types(error)}
    text = " ".join(one_line(e, 400) for e in _chain(error))
    local = _is_local(config.path or "")
    folder = "or set data.path to a local folder of it"
    if "Unknown split" in text or ("not found in" in text and "split" in text.lower()):
        listed = re.search(r"\[[^\]]*\]", text)
        return UserError(
            f"{where}: no such split; it has {listed.group() if listed else 'others'}: set data.train and so on"
        )
    if local and not Path(config.path or "").expanduser().exists():
        return UserError(
            f"{where}: no such folder: set data.path to a folder with data/train-*.parquet, or to a hub name"
        )
    if "GatedRepoError" in names or "gated" in text.lower():
        return UserError(f"{where}: is gated: accept its licence on its hub page and log in (hf auth login), {folder}")
    if not local and (damage := cache_damage(config.path or "", "dataset", config.revision)) is not None:
        return UserError(f"{where}: {damage}: {mending(config.path or '', 'dataset')}, {folder}")
    if not local and _offline():
        return UserError(f"{where}: the hub client is in offline mode: unset HF_HUB_OFFLINE, {folder}")
    if local:
        return UserError(f"{where}: cannot be read ({one_line(_last(error), 120)}): mend or download the files again")
    if names & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        return UserError(f"{where}: not on the hub, or private: check the name, log in (hf auth login), {folder}")
    if names & _NETWORK or "connect" in text.lower() or "LocalEntryNotFoundError" in names:
        return UserError(f"{where}: the hub cannot be reached: check the network, {folder}")
    return UserError(f"{where}: cannot be loaded ({type(error).__name__}: {one_line(error, 120)}): {folder[3:]}")


_NETWORK = {
    "ConnectionError",
    "ConnectError",
    "ConnectTimeout",
    "ReadTimeout",
    "Timeout",
    "ProxyError",
    "TimeoutException",
}


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception and what caused it, outermost first."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _last(error: BaseException) -> BaseException:
    return list(_chain(error))[-1]


def _chain_types(error: BaseException) -> Iterator[type]:
    for one in _chain(error):
        yield from type(one).__mro__


def _fingerprint(rows: Any) -> str:
    """Of the content, so that the same rows in another folder or from the hub are the same data."""
    digest = xxhash.xxh3_128()
    for file in rows.cache_files:
        digest.update(checksum(Path(file["filename"])).encode())
    return digest.hexdigest()


def _batches(rows: Any, columns: dict[str, str], where: str, config: DataConfig) -> Iterator[RawBatch]:
    start = 1
    needed = rows.select_columns(sorted(set(columns.values()))).with_format("arrow")
    for table in needed.iter(BATCH_ROWS):
        for batch in table.combine_chunks().to_batches():
            yield plain_batch(batch, columns, start, where, config)
            start += batch.num_rows
