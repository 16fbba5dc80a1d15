"""Reading files: every format gives the same rows, and every fault is one line that says what, where and the remedy."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mathverify.config import ColumnsConfig, DataConfig, DataSource, NullAnswers
from mathverify.errors import UserError
from mathverify.examples.rows import MAX_FIELD_BYTES, RowChecker
from mathverify.examples.schema import EXAMPLE_SCHEMA
from mathverify.examples.sources import load, rows_fingerprint
from mathverify.examples.table import open_table
from tests.examples.files import FORMATS, all_rows, make_rows, read, write, write_many

REAL = Path(__file__).parents[3] / "shared" / "data" / "real_verification"
TEXTS = ("question", "answer", "solution", "is_correct")


@pytest.mark.parametrize("ending", FORMATS)
def test_every_format_gives_every_row_as_written(tmp_path: Path, ending: str) -> None:
    rows = make_rows()
    loaded = read(tmp_path / "cache", write(tmp_path / f"rows.{ending}", rows))
    key = lambda row: (row["question"], row["answer"])  # noqa: E731
    got = [{name: row[name] for name in TEXTS} for row in all_rows(loaded)]
    assert sorted(got, key=key) == sorted(rows, key=key)
    for _, table in loaded.splits.items():
        assert table.schema == EXAMPLE_SCHEMA


def test_the_same_rows_split_the_same_in_every_format(tmp_path: Path) -> None:
    prints = {
        tuple(
            rows_fingerprint(table)
            for _, table in read(tmp_path / "c", write(tmp_path / f"r.{e}", make_rows())).splits.items()
        )
        for e in FORMATS
    }
    assert len(prints) == 1


def test_paths_may_have_spaces_and_any_letters(tmp_path: Path) -> None:
    folder = tmp_path / "données — 数据 (1)"
    folder.mkdir()
    loaded = read(tmp_path / "ca che é", write(folder / "my rows ü.csv", make_rows()))
    assert len(all_rows(loaded)) == 120


def test_a_byte_order_mark_and_crlf_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    lines = ["question,answer,is_correct"] + [f"what is {i}?,{i},{'True' if i % 2 else 'false'}" for i in range(60)]
    path.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    rows = all_rows(read(tmp_path / "c", path))
    assert {row["answer"] for row in rows} == {str(i) for i in range(60)}
    assert {row["solution"] for row in rows} == {""}


def test_a_second_start_reads_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", make_rows())
    seen: list[str] = []
    config = DataConfig(source=DataSource.table, train=str(path), cache_dir=str(tmp_path / "c"), test_fraction=0.2)
    first = load(config, lambda what, done, total: seen.append(what))
    assert seen
    seen.clear()
    second = load(config, lambda what, done, total: seen.append(what))
    assert not seen
    assert second == first


def test_changed_content_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", make_rows())
    before = read(tmp_path / "c", path)
    changed = make_rows()
    changed[0]["answer"] = "seven"
    after = read(tmp_path / "c", write(path, changed))
    assert after.fingerprint != before.fingerprint
    assert "seven" in {row["answer"] for row in all_rows(after)}


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest"])
def test_a_corrupt_cache_is_made_anew(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path / "r.jsonl", make_rows())
    before = all_rows(read(tmp_path / "c", path))
    (folder,) = (f for f in (tmp_path / "c" / "rows").iterdir() if f.is_dir())
    victim = folder / ("manifest.json" if damage == "manifest" else "train.arrow")
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    match damage:
        case "flip":
            victim.write_bytes(data)
        case "truncate" | "manifest":
            victim.write_bytes(data[: len(data) // 3])
        case "delete":
            victim.unlink()
    assert all_rows(read(tmp_path / "c", path)) == before


def test_words_and_numbers_are_labels_only_if_asked(tmp_path: Path) -> None:
    for value, other in (("true", "false"), (1, 0), ("yes", "No"), (1.0, 0.0), ("T", "f")):
        rows = [row | {"is_correct": value if row["is_correct"] else other} for row in make_rows()]
        for ending in ("jsonl", "parquet"):
            path = write(tmp_path / f"r.{ending}", rows)
            with pytest.raises(UserError, match=r"column 'is_correct', row 1: .* data\.map_labels=true"):
                read(tmp_path / "c", path)
            loaded = read(tmp_path / "c", path, map_labels=True)
            assert sum(row["is_correct"] for row in all_rows(loaded)) == 40


def test_rows_without_an_answer_are_dropped_counted_and_named(tmp_path: Path) -> None:
    rows = make_rows()
    rows[4]["answer"], rows[10]["answer"] = None, "  "
    for ending in ("parquet", "jsonl", "csv"):
        path = write(tmp_path / f"r.{ending}", rows)
        loaded = read(tmp_path / "c", path)
        (drop,) = loaded.prepared["dropped"]
        assert (drop["count"], drop["rows"]) == (2, [5, 11])
        assert len(all_rows(loaded)) == len(rows) - 2
        with pytest.raises(UserError, match=r"column 'answer', row 5: .*data\.null_answers=drop"):
            read(tmp_path / "c", path, null_answers=NullAnswers.refuse)


def test_columns_can_be_renamed_and_groups_and_slices_chosen(tmp_path: Path) -> None:
    rows = [
        {
            "Q": row["question"],
            "A": row["answer"],
            "ok": row["is_correct"],
            "topic": f"t{i // 3 % 8}",
            "kind": f"k{i % 2}",
        }
        for i, row in enumerate(make_rows())
    ]
    path = write(tmp_path / "r.parquet", rows)
    names = {"question": "Q", "answer": "A", "is_correct": "ok"}
    loaded = read(tmp_path / "c", path, columns=ColumnsConfig(**names), group_column="topic", slice_column="kind")
    got = all_rows(loaded)
    assert {row["group"] for row in got} == {f"t{i}" for i in range(8)}
    assert {row["slice"] for row in got} == {"k0", "k1"}
    assert loaded.surveys["train"].questions + loaded.surveys["test"].questions <= 8


def test_ids_are_kept_or_made_and_always_unique(tmp_path: Path) -> None:
    rows = [row | {"id": 1000 + i} for i, row in enumerate(make_rows())]
    path = write(tmp_path / "r.parquet", rows)
    assert {row["id"] for row in all_rows(read(tmp_path / "c", path))} == {str(1000 + i) for i in range(120)}
    both = all_rows(
        read(
            tmp_path / "c",
            path,
            test=str(write(tmp_path / "t.parquet", [r | {"question": f"other {r['id']}"} for r in rows])),
        )
    )
    assert len({row["id"] for row in both}) == len(both) == 240
    numbered = all_rows(read(tmp_path / "c", path, columns=ColumnsConfig(id="")))
    assert {row["id"] for row in numbered} == {f"train-{i:07d}" for i in range(1, 121)}


def _rows_with(index: int, **change: Any) -> list[dict[str, Any]]:
    rows = make_rows()
    rows[index] = rows[index] | change
    return rows


def _jsonl(*lines: str) -> bytes:
    good = [json.dumps(row) for row in make_rows(2)]
    return "\n".join([*good, *lines]).encode()


def _parquet(path: Path, **columns: pa.Array) -> None:
    table = pa.Table.from_pylist(make_rows())
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, values)
    pq.write_table(table, path)


def _corrupt_parquet(path: Path) -> None:
    _parquet(path)
    data = bytearray(path.read_bytes())
    for i in range(8, len(data) // 2):
        data[i] ^= 0x5A
    path.write_bytes(data)


def _not_utf8_parquet(path: Path) -> None:
    answers = pa.array([b"1"] * 41 + [b"\xff\xfe"] + [b"2"] * 78, pa.binary())
    _parquet(path, answer=pa.StringArray.from_buffers(120, *answers.buffers()[1:], answers.buffers()[0]))


ROW = '{"question": "q", "answer": "a", "is_correct": true'
BAD: dict[str, tuple[str, Any, str]] = {
    # name: (file name, its bytes, its rows or its writer, what the message says)
    "empty parquet": ("r.parquet", b"", r"is empty: give"),
    "empty jsonl": ("r.jsonl", b"", r"is empty: give"),
    "blank jsonl": ("r.jsonl", b"\n \n\n", r"has no rows: give"),
    "header only": ("r.csv", b"question,answer,is_correct\n", r"has no rows: give"),
    "no rows in parquet": ("r.parquet", lambda p: pq.write_table(pa.Table.from_pylist(make_rows()).slice(0, 0), p), r"has no rows"),
    "wrong columns": ("r.csv", b"Question,reply\n1,2\n", r"no column 'question'; it has 'Question', 'reply': set data\.columns\.question=Question"),
    "columns twice": ("r.csv", b"question,answer,answer,is_correct\n", r"column 'answer' appears more than once"),
    "label in words": ("r.csv", b"question,answer,is_correct\nq,1,maybe\n", r"column 'is_correct', row 1: 'maybe' is not a boolean label"),
    "label is a number": ("r.jsonl", _rows_with(70, is_correct=1), r"column 'is_correct', row 71: '1' is not a boolean"),
    "label is null": ("r.parquet", _rows_with(70, is_correct=None), r"column 'is_correct', row 71: the label is null: "),
    "label is null in csv": ("r.csv", _rows_with(70, is_correct=""), r"column 'is_correct', row 71: the label is null: "),
    "label is NaN": ("r.jsonl", _jsonl(ROW.replace("true", "NaN") + "}"), r"line 7 is not JSON"),
    "question is null": ("r.parquet", _rows_with(8, question=None), r"column 'question', row 9: null or blank: remove"),
    "question is blank": ("r.jsonl", _rows_with(8, question="\t"), r"column 'question', row 9: null or blank: remove"),
    "one class": ("r.jsonl", [row | {"is_correct": True} for row in make_rows()], r"column 'is_correct' is True in all of its"),
    "duplicate ids": ("r.jsonl", [r | {"id": i % 100} for i, r in enumerate(make_rows())], r"column 'id', rows \d+ and \d+: 20 duplicate ids: make"),
    "null id": ("r.jsonl", [r | {"id": i if i else None} for i, r in enumerate(make_rows())], r"column 'id', row 1: .*give every row an id"),
    "nested answer": ("r.jsonl", _rows_with(3, answer={"final": 7}), r"column 'answer', row 4: is nested, not text: store"),
    "nested parquet": ("r.parquet", [r | {"answer": [r["answer"]]} for r in make_rows()], r"column 'answer', row 1: is nested, not text: store"),
    "float answers": ("r.parquet", [r | {"answer": 0.5} for r in make_rows()], r"column 'answer', row 1: is double, not text: store"),
    "boolean answer": ("r.jsonl", _rows_with(3, answer=True), r"column 'answer', row 4: is a boolean, not text"),
    "JSON array": ("r.jsonl", b'[{"question": 1},\n{}]', r"line 1 is not JSON .*write one object per line"),
    "not an object": ("r.jsonl", _jsonl("7"), r"line 7 is not a JSON object"),
    "half a line": ("r.jsonl", _jsonl('{"question": "wha'), r"line 7 is not JSON .*mend the line"),
    "deep nesting": ("r.jsonl", _jsonl("[" * 100_000), r"line 7 is not JSON"),
    "half a surrogate": ("r.jsonl", _jsonl(ROW.replace('"a"', r'"\ud800"') + "}"), r"column 'answer', row 7: is not UTF-8"),
    "huge field": ("r.jsonl", _rows_with(5, solution="x" * (MAX_FIELD_BYTES + 1)), r"column 'solution', row 6: longer than 1,048,576 bytes: shorten"),
    "huge line": ("r.jsonl", b"x" * (4 * MAX_FIELD_BYTES + 2), r"line 1 is longer than"),
    "huge csv field": ("r.csv", _rows_with(5, solution="x" * (MAX_FIELD_BYTES + 1)), r"is not CSV .*field larger"),
    "open quote": ("r.csv", b'question,answer,is_correct\n"what,1,True\n', r"line 2 is not CSV .*mend its quotes"),
    "too many fields": ("r.csv", b"question,answer,is_correct\nq,1,True\nq,1,2,True\n", r"row 2 \(line 3\): 4 fields where the header has 3: quote"),
    "latin-1": ("r.csv", "question,answer,is_correct\nqué,1,True\n".encode("latin-1"), r"line 2, byte 3: is not UTF-8 text: save"),
    "utf-16": ("r.jsonl", "".join(json.dumps(r) for r in make_rows()).encode("utf-16"), r"line 1, byte 1: is not UTF-8 text: save"),
    "bad bytes in parquet": ("r.parquet", _not_utf8_parquet, r"column 'answer', row 42: is not UTF-8 text: save"),
    "not parquet": ("r.parquet", b"question,answer\n" * 9, r"is not a readable parquet file .*write it again"),
    "corrupt parquet": ("r.parquet", _corrupt_parquet, r"is corrupt|is not a readable parquet|not UTF-8"),
    "not gzip": ("r.csv.gz", b"question,answer,is_correct\n", r"is not a whole gzip file .*compress or download"),
    "half a gzip": ("r.jsonl.gz", gzip.compress(_jsonl() * 200)[:150], r"is not a whole gzip file"),
    "gzip bomb": ("r.jsonl.gz", gzip.compress((ROW + ', "x": "' + "0" * 100_000 + '"}\n').encode() * 800), r"refused as a decompression bomb"),
    "unknown kind": ("r.xlsx", b"PK", r"unknown kind of file '.xlsx': use .parquet"),
    "no ending": ("rows", b"PK", r"unknown kind of file '': use .parquet"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    file, content, says = BAD[name]
    path = tmp_path / file
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif callable(content):
        content(path)
    else:
        write(path, content)
    with pytest.raises(UserError, match=says) as caught:
        read(tmp_path / "cache", path)
    text = str(caught.value)
    assert text.isprintable(), "one line, no control characters"
    assert file in text and "data.train" in text
    left = [p for p in (tmp_path / "cache").rglob("*") if not p.name.endswith(".lock") and p.parent.name == "rows"]
    assert not left, "no half-made folder is left"


def test_a_missing_file_a_folder_and_a_closed_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "c", tmp_path / "none.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match="is not a file"):
        read(tmp_path / "c", tmp_path / "folder.csv")


def test_control_characters_in_names_and_values_are_escaped(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path / "c", write(tmp_path / "r.jsonl", _rows_with(0, is_correct="\x1b[31m\nred")))
    assert str(caught.value).isprintable()


def test_an_unwritable_cache_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the cache folder should be")
    with pytest.raises(UserError, match=r"cache folder .*set data\.cache_dir"):
        read(tmp_path / "cache", write(tmp_path / "r.csv", make_rows()))


CELL = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.text(max_size=3), max_size=2),
)
OBJECT = st.fixed_dictionaries({}, optional=dict.fromkeys((*TEXTS, "id"), CELL))
TYPICAL = st.sampled_from(
    [json.dumps(row).encode() for row in make_rows(3)] + [b"question,answer,is_correct\r\n", b'q,"1",true\n']
)
LINES = st.lists(st.one_of(TYPICAL, st.binary(max_size=40), OBJECT.map(lambda o: json.dumps(o).encode())), max_size=8)


def _only_rows_or_user_error(path: Path, map_labels: bool) -> None:
    config = DataConfig(source=DataSource.table, train=str(path), map_labels=map_labels)
    try:
        source = open_table(path, "train", config)
        checker = RowChecker(source, config)
        for raw in source.batches():
            batch = checker.check(raw)
            batch.validate(full=True)
            assert batch.schema == EXAMPLE_SCHEMA
            assert all(column.null_count == 0 for column in batch.columns)
            assert not pc.any(pc.equal(pc.utf8_trim_whitespace(batch.column("answer")), "")).as_py()
        checker.finish()
    except UserError as error:
        told = str(error)
    else:
        return
    assert told.isprintable()
    assert path.name in told


@settings(max_examples=300, deadline=None)
@given(lines=LINES, ending=st.sampled_from(FORMATS), map_labels=st.booleans(), zipped=st.booleans())
def test_any_bytes_are_rows_or_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], ending: str, map_labels: bool, zipped: bool
) -> None:
    data = b"\n".join(lines)
    path = tmp_path_factory.getbasetemp() / f"fuzz.{ending}"
    path.write_bytes(gzip.compress(data) if zipped and ending.endswith("gz") else data)
    _only_rows_or_user_error(path, map_labels)


@settings(max_examples=150, deadline=None)
@given(where=st.lists(st.integers(0, 10_000), min_size=1, max_size=6), value=st.integers(0, 255))
def test_a_parquet_file_with_flipped_bytes_is_rows_or_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, where: list[int], value: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz-flip.parquet"
    write(path, make_rows())
    data = bytearray(path.read_bytes())
    for place in where:
        data[place % len(data)] = value
    path.write_bytes(data)
    _only_rows_or_user_error(path, map_labels=False)


@pytest.mark.skipif(not REAL.exists(), reason="the real rows are not on this machine")
def test_the_real_rows_are_read_whole(tmp_path: Path) -> None:
    paths = {name: str(REAL / f"{name}.parquet") for name in ("train", "validation", "test")}
    loaded = read(tmp_path, paths.pop("train"), **paths, slice_column="generator")
    for name, table in loaded.splits.items():
        raw = pq.read_table(REAL / f"{name}.parquet")
        answered = raw.filter(pc.not_equal(pc.utf8_trim_whitespace(pc.fill_null(raw["answer"], "")), ""))
        assert table["question"].to_pylist() == answered["question"].to_pylist()
        assert table["is_correct"].to_pylist() == answered["is_correct"].to_pylist()
        assert set(loaded.surveys[name].slices) == set(answered["generator"].to_pylist())
    assert set(loaded.shared_questions.values()) == {0}


MEASURE = """
import json, sys
from mathverify.config import DataConfig, DataSource
from mathverify.examples.sources import load
def anonymous():
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status if ":" in line)
    return int(fields["RssAnon"].split()[0]) * 1024
start = peak = anonymous()
def watch(what, done, total):
    global peak
    peak = max(peak, anonymous())
loaded = load(DataConfig(source=DataSource.table, train=sys.argv[1], cache_dir=sys.argv[2]), watch)
print(json.dumps([max(peak, anonymous()) - start, sum(s.rows for s in loaded.surveys.values())]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, ending: str) -> None:
    """Reading five times the rows (740 bytes each, one row group) holds hardly more: far less than their text."""
    held = {}
    for rows in (50_000, 250_000):
        path = tmp_path / f"{rows}.{ending}"
        write_many(path, rows)
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(path), str(tmp_path / "cache")],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[2],
        )
        held[rows], count = json.loads(done.stdout)
        assert count == rows
    assert held[250_000] - held[50_000] < 0.25 * 200_000 * 740
