"""The test rows themselves: who judged which rightly, packed for the page, and the text of those they disagree on.

The text is not in run folders; it is read again from the data that the runs name, never over a network.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from scipy.special import expit

from mathverify.compare.reading import RunView
from mathverify.config import DataConfig, DataSource, from_plain
from mathverify.errors import UserError
from mathverify.examples.sources import load
from mathverify.records import Predictions, redact

VERDICT_BYTES = 400_000
"""For all verdicts together; more rows than fit are drawn, whole questions at a time."""
TEXT_BYTES = 1_300_000
CLIPS = {"question": 1200, "answer": 300, "solution": 2000}
"""Characters of a row's text that travel in the page."""

Row = dict[str, Any]


@dataclass
class RowFacts:
    """The shared test rows. runs: by number, with one verdict a row (bit set: it was right) and P(True) of listed rows.

    labels, groups, slices: of every row, base64 of bits, uint32 and uint8 (255: none). listed: rows with text;
    place says which row. disputed: rows on which any two runs differ.
    """

    rows: int
    questions: int
    slices: list[str]
    labels: str
    groups: str
    slice_codes: str
    runs: dict[int, dict[str, str]]
    listed: list[Row]
    disputed: int
    total_rows: int
    without_text: str | None = None
    sampled: list[str] = field(default_factory=list)


def row_facts(runs: Mapping[int, RunView], predictions: Mapping[int, Predictions]) -> RowFacts | str:
    """Pack the rows that most of the runs share, or say why there is nothing to compare.

    Runs of another test set are left out; `sampled` says so.
    """
    shared = _largest_set(runs, predictions)
    if len(shared) < 2:
        return "rows can be compared where at least two finished runs were tested on the same rows"
    first = predictions[shared[0]]
    in_order = {number: aligned(predictions[number], first) for number in shared}
    scores = {number: found for number, found in in_order.items() if found is not None}
    if len(scores) < 2:
        return "the finished runs were not tested on the same rows"
    sampled = []
    if left := len(predictions) - len(scores):
        sampled.append(f"{left} finished runs were tested on other rows and are not in this comparison")
    keep, note = _drawn_rows(first, len(scores))
    if note:
        sampled.append(note)
    labels = first.labels[keep]
    verdicts = {number: (found[keep] > 0) == labels for number, found in scores.items()}
    disputed = np.flatnonzero(np.ptp(np.stack(list(verdicts.values())).astype(np.int8), axis=0))
    listed, without_text = _listed([first.ids[i] for i in keep], labels, disputed, verdicts, runs[shared[0]])
    if len(listed) < len(disputed):
        sampled.append(f"{len(listed):,} of the {len(disputed):,} rows on which any two runs differ are listed")
    codes = np.unique(np.asarray(first.groups)[keep], return_inverse=True)[1]
    names = sorted({first.slices[i] or "" for i in keep} - {""})[:255]
    place = {name: code for code, name in enumerate(names)}
    where = [row["place"] for row in listed]
    return RowFacts(
        rows=len(keep),
        questions=int(codes.max()) + 1,
        slices=names,
        labels=_bits(labels),
        groups=_packed(codes.astype("<u4")),
        slice_codes=_packed(np.asarray([place.get(first.slices[i] or "", 255) for i in keep], "u1")),
        runs={
            number: {
                "right": _bits(verdicts[number]),
                "said": _packed(np.rint(expit(found[keep][where]) * 65535).astype("<u2")),
            }
            for number, found in scores.items()
        },
        listed=listed,
        disputed=len(disputed),
        total_rows=len(first.labels),
        without_text=without_text,
        sampled=sampled,
    )


def _largest_set(runs: Mapping[int, RunView], predictions: Mapping[int, Predictions]) -> list[int]:
    sets: dict[str | None, list[int]] = {}
    for number in predictions:
        sets.setdefault(runs[number].test_set, []).append(number)
    return max(sets.values(), key=len, default=[])


def aligned(predictions: Predictions, first: Predictions) -> NDArray[np.float64] | None:
    """The scores in the order of `first`'s rows; None when the rows or their labels are others."""
    if predictions.ids == first.ids:
        return predictions.scores if np.array_equal(predictions.labels, first.labels) else None
    places = {identity: place for place, identity in enumerate(predictions.ids)}
    if len(places) != len(predictions.ids) or places.keys() != set(first.ids):
        return None
    order = [places[identity] for identity in first.ids]
    return predictions.scores[order] if np.array_equal(predictions.labels[order], first.labels) else None


def _drawn_rows(first: Predictions, runs: int) -> tuple[NDArray[np.int64], str | None]:
    """All rows, or as many whole questions, drawn at random, as the page has room for."""
    total, most = len(first.labels), max(1000, VERDICT_BYTES * 8 // runs)
    if total <= most:
        return np.arange(total), None
    codes = np.unique(np.asarray(first.groups), return_inverse=True)[1]
    order = np.random.default_rng(0).permutation(codes.max() + 1)
    rank = np.argsort(order)[codes]
    sizes = np.cumsum(np.bincount(rank))
    keep = np.flatnonzero(rank < np.searchsorted(sizes, most))
    return keep, f"verdicts are of {len(keep):,} of the {total:,} test rows, whole questions drawn at random"


def _listed(
    ids: Sequence[str],
    labels: NDArray[np.bool_],
    disputed: NDArray[np.int64],
    verdicts: Mapping[int, NDArray[np.bool_]],
    run: RunView,
) -> tuple[list[Row], str | None]:
    """Disputed rows with their text while there is room: those that best and second differ on first, then at random."""
    best, second, *_ = verdicts.values()
    shuffled = np.random.default_rng(0).permutation(disputed)
    order = sorted(shuffled.tolist(), key=lambda place: best[place] == second[place])
    texts, reason = _texts(run, [ids[place] for place in order], labels[order])
    rows: list[Row] = []
    room = TEXT_BYTES
    for place in order:
        text = texts.get(ids[place], {})
        row = {"place": place, "id": str(redact(ids[place]))[:120], **text}
        room -= 40 + sum(len(value.encode()) for key, value in row.items() if isinstance(value, str))
        if room < 0:
            break
        rows.append(row)
    return rows, reason


def _texts(run: RunView, ids: Sequence[str], labels: NDArray[np.bool_]) -> tuple[dict[str, Row], str | None]:
    """Question, answer and solution by id, from the data that the run was made with; or why they cannot be had."""
    wanted = dict(zip(ids, labels.tolist(), strict=True))
    try:
        config = found_again(from_plain(run.record().config).data, run.folder)
        with _no_network():
            test = load(config).splits.test
    except UserError as error:
        return {}, str(redact(str(error)))
    found: dict[str, Row] = {}
    import pyarrow.compute as pc

    chosen = test.filter(pc.is_in(test.column("id"), value_set=_array(list(wanted))))
    for row in chosen.select(["id", "question", "answer", "solution", "is_correct"]).to_pylist():
        if row["is_correct"] == wanted[row["id"]]:
            found[row["id"]] = {name: _clipped(row[name], most) for name, most in CLIPS.items() if row[name]}
    if len(found) < len(wanted):
        return {}, "the data that the runs name are no longer those they were tested on"
    return found, None


def _array(values: list[str]) -> Any:
    import pyarrow as pa

    return pa.array(values, pa.string())


def _clipped(text: str, most: int) -> str:
    shown = str(redact(text))
    return shown if len(shown) <= most else shown[:most] + " ..."


def found_again(config: DataConfig, folder: Path) -> DataConfig:
    """The data config with relative paths taken from where the run was started, as Hydra noted it."""
    try:
        started_in = Path(
            yaml.safe_load((folder / ".hydra" / "hydra.yaml").read_text("utf-8"))["hydra"]["runtime"]["cwd"]
        )
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return config
    names = {DataSource.table: ("train", "validation", "test"), DataSource.hub: ("path",)}.get(config.source, ())
    for name in (*names, "cache_dir"):
        given = getattr(config, name)
        if given and not Path(given).expanduser().exists() and (started_in / given).exists():
            setattr(config, name, str(started_in / given))
    return config


@contextmanager
def _no_network() -> Iterator[None]:
    """A data set of the hub is taken from its cache or not at all."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _bits(flags: NDArray[np.bool_]) -> str:
    return _packed(np.packbits(flags, bitorder="little"))


def _packed(values: NDArray[Any]) -> str:
    return base64.b64encode(values.tobytes()).decode("ascii")
