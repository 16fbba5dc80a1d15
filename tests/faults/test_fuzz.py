"""Anything at all as rows, as a command line, as a result.json: it is taken, or refused in one line; never a traceback."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig

from mathverify import entry
from mathverify.compare.reading import read_runs
from mathverify.config import RunConfig, to_plain
from mathverify.errors import UserError
from mathverify.records import RunRecord, read_record
from mathverify.sweep.outcome import End, of_return
from tests.examples.files import FORMATS, make_rows, write
from tests.examples.test_table import _only_rows_or_user_error
from tests.test_records import finished_record

# Bytes: cut, doubled, overwritten, inserted


@st.composite
def edits(draw: st.DrawFn) -> list[tuple[str, float, int, bytes]]:
    """(kind, place as a share of the length, length, new bytes)."""
    kinds = st.sampled_from(["cut", "double", "overwrite", "insert", "truncate"])
    interesting = st.sampled_from(
        [b'"', b"\n", b"\r", b",", b"\0", b"\xff", b"{", b"}", b"[" * 50, b"\\u", b"NaN", b"1e999"]
    )
    one = st.tuples(
        kinds, st.floats(0, 1), st.integers(1, 200), st.one_of(interesting, st.binary(min_size=1, max_size=8))
    )
    return draw(st.lists(one, min_size=1, max_size=4))


def edited(data: bytes, changes: list[tuple[str, float, int, bytes]]) -> bytes:
    for kind, share, length, new in changes:
        place = int(share * len(data))
        before, there, after = data[:place], data[place : place + length], data[place + length :]
        match kind:
            case "cut":
                data = before + after
            case "double":
                data = before + there + there + after
            case "overwrite":
                data = (before + new + data[place + len(new) :])[: len(data)]
            case "insert":
                data = before + new + there + after
            case "truncate":
                data = before
    return data


@pytest.mark.slow
@pytest.mark.parametrize("ending", FORMATS)
@settings(max_examples=150, deadline=None)
@given(changes=edits(), inside=st.booleans())
def test_a_file_of_rows_that_was_tampered_with_is_rows_or_one_line(
    ending: str, tmp_path_factory: pytest.TempPathFactory, changes: Any, inside: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / f"fuzz-tampered.{ending}"
    write(path, make_rows(6))
    data = path.read_bytes()
    if ending.endswith(".gz") and inside:  # a sound gzip of unsound text
        path.write_bytes(gzip.compress(edited(gzip.decompress(data), changes)))
    else:
        path.write_bytes(edited(data, changes))
    _only_rows_or_user_error(path, map_labels=False)


# Command lines

SETTINGS = [
    f"{part}.{name}" if isinstance(value, dict) else part
    for part, value in to_plain(RunConfig()).items()
    for name in (value if isinstance(value, dict) else [""])
]
GROUPS = ["model", "lora", "quantization", "optimizer", "data", "prompt", "train", "evaluate", "tracking", "experiment"]
GROUPS += ["sweep", "hydra/sweeper", "hydra/launcher"]
CHOICES = ["tiny", "r16", "nf4", "adamw", "arithmetic", "hf", "table", "none", "nosuch", "baseline_r16", "rank_grid"]
SPELLINGS = [
    "1", "0", "-1", "1.5", "1e-4", "nan", "inf", "null", "true", "''", '""', "[]", "{}", "[1,2]", "{a:1}", "1,2", "choice(1,2)",
    "range(0,10)", "range(0,1000000000)", "interval(0,1)", "tag(x,1)", "glob(*)", "sort(3,1)", "shuffle(1,2)", "int(1.5)",
    "str(3)", "json_str(1)", "extend_list(1)", "${seed}", "${nosuch}", "${oc.env:HOME}", "${oc.env:NO_SUCH}", "${oc.env:}",
    "${", "$", "}", "[", "(", "choice(", "\\", "'", '"', "=", "a=b", "a b", "???", "é—数", "\x1b[31m", "9" * 40, "1" * 5000, "~",
]  # fmt: skip
keys = st.one_of(st.sampled_from(SETTINGS), st.sampled_from(GROUPS), st.text("abc._/@~+:-\x00 é", max_size=12))
values = st.one_of(st.sampled_from(SPELLINGS), st.sampled_from(CHOICES), st.text(max_size=12))
overrides = st.builds("{}{}{}{}".format, st.sampled_from(["", "", "", "+", "++", "~"]), keys, st.sampled_from(["=", "=", "=", ""]), values)  # fmt: skip
words = st.one_of(overrides, overrides, overrides, st.text(max_size=20))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(entry, "_wants_traceback", False)
    return tmp_path


def _stand_in(composed: DictConfig) -> float:
    """mathverify.train's task up to where training begins."""
    with entry.refusing(entry.run_folder()):
        entry.to_run_config(composed)
    return 0.5


@pytest.mark.long
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(line=st.lists(words, max_size=4), grid=st.booleans())
def test_any_command_line_ends_with_0_or_2_and_no_traceback(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: list[str], grid: bool
) -> None:
    allowed = [word for word in line if not word.startswith("-") and "hydra." not in word]
    flags = ["-m", "hydra.sweeper.dry_run=true"] if grid and any("sweep=" in word for word in line) else ["-m"] * grid
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["mathverify.train", *flags, *allowed])
        capfd.readouterr()
        try:
            entry.main(_stand_in)
            code: Any = 0
        except SystemExit as end:
            code = end.code or 0
    errors = capfd.readouterr().err
    assert code in (0, 2), errors
    assert "Traceback" not in errors
    assert all(text.startswith("error: ") for text in errors.strip().splitlines()), errors
    assert code == 0 or errors.strip()


# result.json

WHOLE = finished_record(RunConfig()).to_plain()


def _paths(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(tree, dict):
        return [path, *(p for key, value in tree.items() for p in _paths(value, (*path, key)))]
    return [path]


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def _replaced(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    return tree | {path[0]: _replaced(tree[path[0]], path[1:], value)}


def _taken_or_one_line(folder: Path) -> None:
    """By everybody who reads result.json: a run that continues, a study that tells, a comparison."""
    said = "result.json"
    try:
        assert isinstance(read_record(folder), RunRecord)
    except UserError as error:
        said = str(error)
    assert "result.json" in said
    assert "\n" not in said
    assert of_return(0.5, folder, ["metrics.test.accuracy"], 1, None).end in End
    assert of_return(0.5, folder, [], 1, None).end in End
    try:
        read_runs([folder])
    except UserError as error:
        assert "\n" not in str(error)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(_paths(WHOLE)[1:]), value=trees)
def test_a_result_with_anything_in_any_place_is_read_or_refused(tmp_path: Path, path: Any, value: Any) -> None:
    (tmp_path / "result.json").write_text(json.dumps(_replaced(WHOLE, path, value)))
    _taken_or_one_line(tmp_path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=edits())
def test_a_result_that_was_tampered_with_is_read_or_refused(tmp_path: Path, changes: Any) -> None:
    (tmp_path / "result.json").write_bytes(edited(json.dumps(WHOLE).encode(), changes))
    _taken_or_one_line(tmp_path)
