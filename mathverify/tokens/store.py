"""A split's prompts as token ids on disk, memory-mapped: made once per rows, prompt and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import xxhash

from mathverify.cache import cached_folder
from mathverify.config import PromptConfig
from mathverify.errors import UserError
from mathverify.examples.rows import show
from mathverify.examples.schema import Example, iter_examples
from mathverify.examples.sources import rows_fingerprint
from mathverify.progress import Progress, silent
from mathverify.prompts import render
from mathverify.tokens.encoding import PROBE, Encoded, encode_prompts, plain, tokenizer_fingerprint

VERSION = 1
"""Of the stored files' layout and of the way solutions are cut."""

BATCH_ROWS = 1024


@dataclass(frozen=True)
class TokenStore:
    """The prompts of n rows, in the rows' order.

    lengths: int32 [n], ids of each prompt. labels: bool [n], is_correct. cut: rows whose solution was shortened.
    fingerprint: 32 hex digits of rows, prompt and tokenizer. `ids(i)` is a view into a memory-mapped file.
    """

    lengths: np.ndarray
    labels: np.ndarray
    cut: int
    fingerprint: str
    _ids: np.ndarray
    _bounds: np.ndarray

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int] | np.ndarray], labels: Sequence[bool]) -> TokenStore:
        """A store in memory, of prompts that are ids already; for rows made on the spot."""
        lengths = np.array([len(ids) for ids in prompts], np.int32)
        flat = np.concatenate([np.empty(0, np.int32), *(np.asarray(ids, np.int32) for ids in prompts)])
        truth = np.array(labels, bool)
        fingerprint = xxhash.xxh3_128_hexdigest(lengths.tobytes() + flat.tobytes() + truth.tobytes())
        return cls(lengths, truth, 0, fingerprint, flat, _bounds(lengths))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def largest(self) -> int:
        """The largest token id, -1 without any; reads all of them."""
        return int(self._ids.max(initial=-1))

    def ids(self, row: int) -> np.ndarray:
        """Token ids of one prompt, BOS included, verdict not: int32 [lengths[row]], read-only, not copied."""
        if not 0 <= row < len(self.lengths):
            raise IndexError(f"row {row} of a store of {len(self.lengths)}")
        return self._ids[self._bounds[row] : self._bounds[row + 1]]


def tokenize(
    rows: pa.Table, tokenizer: Any, prompt: PromptConfig, cache_dir: Path, progress: Progress = silent
) -> TokenStore:
    """Tokenise every row's prompt, or find it done in `cache_dir`/tokens.

    A prompt has at most prompt.max_length - 1 ids, one being left for the verdict. Ids are those of the whole text;
    where it is too long, the end of the solution is cut. Rows that do not fit even without a solution are never cut
    nor dropped, which would change what is evaluated: UserError says how many there are and the max_length needed.
    A corrupt cache is made anew; processes that start together do the work once. Memory is bounded by a batch.
    """
    fingerprint = _fingerprint(rows, tokenizer, prompt)

    def build(folder: Path) -> None:
        _build(folder, rows, tokenizer, prompt, progress)

    return _open(cached_folder(cache_dir / "tokens", fingerprint, build), fingerprint)


def _fingerprint(rows: pa.Table, tokenizer: Any, prompt: PromptConfig) -> str:
    parts = [
        VERSION,
        rows_fingerprint(rows),
        tokenizer_fingerprint(tokenizer),
        asdict(prompt),
        [asdict(render(PROBE, with_solution)) for with_solution in (False, True)],  # the wording itself
    ]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())


def _bounds(lengths: np.ndarray) -> np.ndarray:
    """Where each prompt begins, and the end: int64 [n + 1]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _open(folder: Path, fingerprint: str) -> TokenStore:
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    lengths = np.load(folder / "lengths.npy", allow_pickle=False)
    labels = np.load(folder / "labels.npy", allow_pickle=False)
    bounds = _bounds(lengths)
    ids = np.empty(0, np.int32)
    if bounds[-1]:  # np.memmap's own type makes every slice slow, so only its buffer is kept
        ids = np.asarray(np.memmap(folder / "ids.bin", dtype=np.int32, mode="r")).view(np.ndarray)
    return TokenStore(lengths, labels, int(about["cut"]), fingerprint, ids, bounds)


@dataclass
class _Unfit:
    """Rows that do not fit without their solution."""

    count: int = 0
    first: str = ""
    longest: int = 0

    def add(self, example: Example, encoded: Encoded) -> None:
        self.first = self.first or example.id
        self.count += 1
        self.longest = max(self.longest, encoded.tokens_needed)

    def refuse(self, prompt: PromptConfig) -> None:
        if self.count:
            raise UserError(
                f"prompt.max_length = {prompt.max_length}: {self.count:,} rows do not fit even without their solution "
                f"(the first has id {show(self.first)}): use at least {self.longest + 1}, or remove those rows"
            )


def _build(folder: Path, rows: pa.Table, tokenizer: Any, prompt: PromptConfig, progress: Progress) -> None:
    lengths: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    cut = 0
    unfit = _Unfit()
    with (folder / "ids.bin").open("wb") as file, plain(tokenizer) as inner:
        for examples in _batches(rows):
            parts = [render(example, prompt.with_solution) for example in examples]
            encoded = encode_prompts(inner, parts, prompt.max_length - 1)
            cut += _write(file, examples, encoded, unfit)
            lengths.append(np.array([e.tokens_needed for e in encoded], np.int32))
            labels.append(np.array([example.is_correct for example in examples], bool))
            progress("tokenising", sum(map(len, lengths)), rows.num_rows)
    unfit.refuse(prompt)
    np.save(folder / "lengths.npy", np.concatenate([np.empty(0, np.int32), *lengths]), allow_pickle=False)
    np.save(folder / "labels.npy", np.concatenate([np.empty(0, bool), *labels]), allow_pickle=False)
    (folder / "about.json").write_text(json.dumps({"rows": rows.num_rows, "cut": cut}), encoding="utf-8")


def _batches(rows: pa.Table) -> Iterator[tuple[Example, ...]]:
    examples = iter_examples(rows, BATCH_ROWS)
    while batch := tuple(islice(examples, BATCH_ROWS)):
        yield batch


def _write(file: BinaryIO, examples: tuple[Example, ...], encoded: list[Encoded], unfit: _Unfit) -> int:
    """Append a batch's ids to the file, remember rows that do not fit, and return how many were cut."""
    for example, one in zip(examples, encoded, strict=True):
        if one.ids is None:
            unfit.add(example, one)
        else:
            file.write(one.ids.data)
    return sum(one.cut for one in encoded)
