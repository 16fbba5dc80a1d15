"""The token store: ids are those of the whole text, cuts fall in the solution only, and a damaged cache is remade."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mathverify.config import DataConfig, DataSource, PromptConfig
from mathverify.errors import UserError
from mathverify.examples.schema import EXAMPLE_SCHEMA, iter_examples
from mathverify.examples.sources import load
from mathverify.prompts import PromptParts, render
from mathverify.tokens import TokenStore, tokenize, verdict_tokens
from mathverify.tokens.encoding import encode_prompts, encode_text, plain
from tests.examples.files import write_many
from tests.tokens.small import byte_level, sentencepiece_like

REAL = Path(__file__).parents[3] / "shared" / "data" / "real_verification"
BPE = byte_level()
METASPACE = sentencepiece_like()
KINDS = pytest.mark.parametrize("tokenizer", [BPE, METASPACE], ids=["byte-level", "metaspace"])


def table(count: int = 30, solution: str = "First {i} + 1,\nthen more. ", repeat: int = 3) -> pa.Table:
    rows = [
        {
            "id": f"r{i}",
            "question": f"What is {i} + 1? ✓",
            "answer": str(i + 1 + i % 2),
            "solution": solution.format(i=i) * (i % 5 * repeat),
            "is_correct": i % 2 == 0,
            "group": str(i),
            "slice": "all",
        }
        for i in range(count)
    ]
    return pa.Table.from_pylist(rows, EXAMPLE_SCHEMA)


@KINDS
@pytest.mark.parametrize("with_solution", [False, True])
def test_ids_are_those_of_the_whole_text_in_the_rows_order(tmp_path: Path, tokenizer: Any, with_solution: bool) -> None:
    rows = table()
    store = tokenize(rows, tokenizer, PromptConfig(with_solution, 2048), tmp_path)
    assert len(store) == rows.num_rows and store.cut == 0
    for i, example in enumerate(iter_examples(rows)):
        expected = tokenizer(render(example, with_solution).text)["input_ids"]
        assert store.ids(i).tolist() == expected
        assert store.lengths[i] == len(expected)
        assert store.labels[i] == example.is_correct
    assert store.ids(0).dtype == store.lengths.dtype == np.int32
    assert store.labels.dtype == bool
    assert not store.ids(0).flags.writeable


@KINDS
def test_long_rows_lose_the_end_of_their_solution_and_nothing_else(tmp_path: Path, tokenizer: Any) -> None:
    rows = table(repeat=20)
    needed = max(len(encode_text(tokenizer, render(e, True).text)) for e in iter_examples(table(repeat=0)))
    limit = needed + 40
    store = tokenize(rows, tokenizer, PromptConfig(True, limit), tmp_path)
    assert store.cut == 24
    assert store.lengths.max() <= limit - 1, "one place is left for the verdict"
    assert store.lengths.max() >= limit - 3, "what there is room for is kept"
    for i, example in enumerate(iter_examples(rows)):
        head, solution, tail = (getattr(render(example, True), part) for part in ("head", "solution", "tail"))
        text = tokenizer.decode(store.ids(i)[1:].tolist())
        assert text.startswith(head.lstrip()) and text.endswith(tail.rstrip("\n") + "\n")
        assert solution.startswith(text[len(head) : len(text) - len(tail)])
        assert store.ids(i).tolist() == encode_text(tokenizer, text), "the ids are those of an actual text"


@settings(max_examples=150, deadline=None)
@given(
    head=st.text(max_size=20),
    solution=st.text(max_size=80),
    tail=st.text(max_size=20),
    limit=st.integers(5, 60),
    metaspace=st.booleans(),
)
def test_any_text_fits_its_limit_or_is_said_not_to(
    head: str, solution: str, tail: str, limit: int, metaspace: bool
) -> None:
    tokenizer = METASPACE if metaspace else BPE
    parts = PromptParts(head, solution, tail)
    with plain(tokenizer) as inner:
        (encoded,) = encode_prompts(inner, [parts], limit)
        whole = inner.encode(parts.text).ids
        kept = [inner.encode(head + solution[:n] + tail).ids for n in range(len(solution) + 1)]
    if encoded.ids is None:
        assert len(kept[0]) > limit
    elif encoded.cut:
        assert len(whole) > limit >= len(encoded.ids)
        assert encoded.ids.tolist() in kept[: len(solution)]
    else:
        assert encoded.ids.tolist() == whole and len(whole) <= limit


def test_rows_that_cannot_fit_are_refused_with_the_length_that_would_do(tmp_path: Path) -> None:
    rows = table()
    longest = max(len(encode_text(BPE, render(e, False).text)) for e in iter_examples(rows))
    with pytest.raises(UserError, match=rf"30 rows do not fit .*has id 'r0'.*use at least {longest + 1}, or"):
        tokenize(rows, BPE, PromptConfig(False, 20), tmp_path)
    assert tokenize(rows, BPE, PromptConfig(False, longest + 1), tmp_path).lengths.max() == longest
    with pytest.raises(UserError):
        tokenize(rows, BPE, PromptConfig(False, longest), tmp_path)


def test_special_tokens_in_a_rows_text_stay_text(tmp_path: Path) -> None:
    rows = table(4).to_pylist()
    rows[1]["question"] = "<s> ignore all that </s> <pad>"
    store = tokenize(pa.Table.from_pylist(rows, EXAMPLE_SCHEMA), BPE, PromptConfig(), tmp_path)
    special = {BPE.bos_token_id, BPE.eos_token_id, BPE.pad_token_id}
    assert [token for token in store.ids(1).tolist() if token in special] == [BPE.bos_token_id]
    assert "<s> ignore all that </s> <pad>" in BPE.decode(store.ids(1)[1:].tolist())


def test_the_tokenizers_own_settings_are_left_as_they_were(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer(["a", "long long text"], padding=True, truncation=True, max_length=4)
    before = tokenizer.backend_tokenizer.to_str()
    store = tokenize(table(), tokenizer, PromptConfig(), tmp_path)
    assert tokenizer.backend_tokenizer.to_str() == before
    assert store.lengths.min() > 4
    assert store.fingerprint == tokenize(table(), byte_level(), PromptConfig(), tmp_path).fingerprint


def _store(cache: Path, rows: pa.Table | None = None, tokenizer: Any = BPE, **prompt: Any) -> TokenStore:
    return tokenize(table() if rows is None else rows, tokenizer, PromptConfig(**prompt), cache)


def _same(a: TokenStore, b: TokenStore) -> bool:
    return len(a) == len(b) and all(np.array_equal(a.ids(i), b.ids(i)) for i in range(len(a)))


def test_a_second_start_tokenises_nothing(tmp_path: Path) -> None:
    calls: list[str] = []
    for _ in range(2):
        tokenize(table(), BPE, PromptConfig(), tmp_path, lambda what, done, total: calls.append(what))
    assert calls == ["tokenising"]


def test_whatever_decides_the_ids_is_in_the_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = _store(tmp_path)
    other_rows = table().to_pylist()
    other_rows[7]["answer"] = "eight"
    flipped = table().to_pylist()
    flipped[7]["is_correct"] = not flipped[7]["is_correct"]
    prints = {
        base.fingerprint,
        _store(tmp_path, pa.Table.from_pylist(other_rows, EXAMPLE_SCHEMA)).fingerprint,
        _store(tmp_path, pa.Table.from_pylist(flipped, EXAMPLE_SCHEMA)).fingerprint,
        _store(tmp_path, table().slice(1)).fingerprint,
        _store(tmp_path, tokenizer=byte_level(template="<s> <pad> $A")).fingerprint,
        _store(tmp_path, with_solution=True).fingerprint,
        _store(tmp_path, max_length=512).fingerprint,
    }
    monkeypatch.setattr("mathverify.prompts.INSTRUCTION", "Is it right?")
    prints.add(_store(tmp_path).fingerprint)
    assert len(prints) == 8
    monkeypatch.undo()
    chunks = pa.concat_tables([table().slice(0, 7), table().slice(7)])
    assert _store(tmp_path, chunks).fingerprint == base.fingerprint, "how rows are chunked plays no part"


@pytest.mark.parametrize("file", ["ids.bin", "lengths.npy", "labels.npy", "about.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_cache_is_remade(tmp_path: Path, file: str, damage: str) -> None:
    before = _store(tmp_path)
    copy = [before.ids(i).copy() for i in range(len(before))]
    victim = tmp_path / "tokens" / before.fingerprint / file
    data = bytearray(victim.read_bytes())
    data[-3] ^= 0x11
    match damage:
        case "flip":
            victim.write_bytes(data) if file != "manifest.json" else victim.write_bytes(b"{}")
        case "truncate":
            victim.write_bytes(data[:-5])
        case "delete":
            victim.unlink()
    after = _store(tmp_path)
    assert all(np.array_equal(after.ids(i), ids) for i, ids in enumerate(copy))
    assert (after.cut, after.labels.tolist()) == (before.cut, before.labels.tolist())
    assert not list((tmp_path / "tokens").glob(".*tmp*"))


def _work(cache: Path, together: Any, queue: Any) -> None:
    calls: list[int] = []

    def slowly(what: str, done: int, total: int | None) -> None:
        calls.append(done)
        time.sleep(1.0)  # so that the others come while this one is at work

    tokenizer = byte_level()
    together.wait(60)
    store = tokenize(table(200), tokenizer, PromptConfig(), cache, slowly)
    queue.put((len(calls), int(store.lengths.sum()), len(store)))


def test_processes_that_start_together_do_the_work_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue, together = context.Queue(), context.Barrier(3)
    workers = [context.Process(target=_work, args=(tmp_path, together, queue)) for _ in range(3)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert sorted(calls for calls, _, _ in results) == [0, 0, 1]
    assert len({result[1:] for result in results}) == 1


def test_a_build_that_was_killed_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    fingerprint = _store(tmp_path / "other").fingerprint
    dead = tmp_path / "tokens" / f".{fingerprint}.tmp-dead"
    dead.mkdir(parents=True)
    (dead / "ids.bin").write_bytes(b"half")
    assert _same(_store(tmp_path), _store(tmp_path / "other"))
    assert not dead.exists()


def test_a_failing_build_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        _store(tmp_path, max_length=9)
    assert [p for p in (tmp_path / "tokens").iterdir() if p.is_dir()] == []


def test_no_rows_are_no_tokens(tmp_path: Path) -> None:
    store = _store(tmp_path, table().slice(0, 0))
    assert len(store) == 0 and store.lengths.shape == store.labels.shape == (0,)
    with pytest.raises(IndexError):
        store.ids(0)


def test_a_store_in_memory_is_like_one_on_disk(tmp_path: Path) -> None:
    made = TokenStore.of([[1, 2, 3], [], [4]], [True, False, True])
    assert [made.ids(i).tolist() for i in range(3)] == [[1, 2, 3], [], [4]]
    assert made.lengths.tolist() == [3, 0, 1] and made.labels.tolist() == [True, False, True]
    disk = _store(tmp_path)
    again = TokenStore.of([disk.ids(i) for i in range(len(disk))], disk.labels.tolist())
    assert _same(disk, again)


def test_a_tokenizer_without_a_fast_one_is_refused() -> None:
    class Slow:
        bos_token_id = None

    with pytest.raises(UserError, match=r"Slow.*has no tokenizer\.json"):
        encode_text(Slow(), "text")


@pytest.mark.skipif(not REAL.exists(), reason="the real rows are not on this machine")
def test_real_rows_become_tokens_that_read_back(tmp_path: Path) -> None:
    train, validation, test = (str(REAL / f"{name}.parquet") for name in ("train", "validation", "test"))
    config = DataConfig(source=DataSource.table, train=train, validation=validation, test=test, cache_dir=str(tmp_path))
    rows = load(config).splits.test
    assert rows.num_rows > 1000 and pq.read_metadata(REAL / "test.parquet").num_rows >= rows.num_rows
    store = tokenize(rows, BPE, PromptConfig(with_solution=True, max_length=1024), tmp_path)
    verdicts = verdict_tokens(BPE)
    uncut = 0
    for i, example in enumerate(iter_examples(rows)):
        text = str(BPE.decode(store.ids(i)[1:].tolist()))
        uncut += text == render(example, True).text
        assert text.endswith(f"Answer:\n{example.answer}\n\nOutput:\n")
        assert verdicts.true_id != store.ids(i)[-1] != verdicts.false_id
    assert uncut == rows.num_rows - store.cut and 0 < store.cut < rows.num_rows / 2


MEASURE = """
import sys
from pathlib import Path
from mathverify.config import DataConfig, DataSource, PromptConfig
from mathverify.examples.sources import load
from mathverify.tokens import tokenize
from tests.tokens.small import byte_level
def anonymous():
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status if ":" in line)
    return int(fields["RssAnon"].split()[0]) * 1024
cache = Path(sys.argv[2])
rows = load(DataConfig(source=DataSource.table, train=sys.argv[1], cache_dir=str(cache))).splits.train
tokenizer = byte_level()
start = peak = anonymous()
def watch(what, done, total):
    global peak
    peak = max(peak, anonymous())
store = tokenize(rows, tokenizer, PromptConfig(with_solution=True), cache, watch)
print(max(peak, anonymous()) - start, store.lengths.sum())
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Tokenising six times the rows holds hardly more: far less than their ids, let alone lists of them."""
    held, tokens = {}, {}
    for rows in (5_000, 30_000):
        path = tmp_path / f"{rows}.parquet"
        write_many(path, rows)
        command = [sys.executable, "-c", MEASURE, str(path), str(tmp_path / "cache")]
        root = Path(__file__).parents[2]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
        held[rows], tokens[rows] = map(int, done.stdout.split())
    ids_bytes = 4 * (tokens[30_000] - tokens[5_000])
    assert ids_bytes > 40e6
    assert held[30_000] - held[5_000] < 0.4 * ids_bytes, (held, tokens)
