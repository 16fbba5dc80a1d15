"""The hub path: the real loading code on a folder in the hub's own layout, and every refusal as one line."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mathverify.config import ColumnsConfig, DataConfig, DataSource
from mathverify.errors import UserError
from mathverify.examples.hub import explain
from mathverify.examples.sources import Loaded, load
from mathverify.hub import hub_answers
from tests.examples.files import all_rows, make_rows

NAME = "ad6398/nyu-dl-teach-maths-comp"


@pytest.fixture(autouse=True)
def own_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub-cache")


def hub_folder(folder: Path) -> Path:
    """The mission's layout: train in two shards, and a test split whose labels are all True."""
    (folder / "data").mkdir(parents=True)
    rows = make_rows()
    columns = ("question", "is_correct", "answer", "solution")
    for shard in range(2):
        part = pa.Table.from_pylist(rows[shard * 60 : shard * 60 + 60]).select(columns)
        pq.write_table(part, folder / "data" / f"train-{shard:05d}-of-00002.parquet")
    hidden = [row | {"question": f"hidden {i}", "is_correct": True} for i, row in enumerate(rows[:30])]
    pq.write_table(pa.Table.from_pylist(hidden).select(columns), folder / "data" / "test-00000-of-00001.parquet")
    return folder


def read(tmp_path: Path, path: Path | str, **settings: Any) -> Loaded:
    fractions = {"validation_fraction": 0.2, "test_fraction": 0.2}
    return load(
        DataConfig(source=DataSource.hub, path=str(path), cache_dir=str(tmp_path / "cache"), **(fractions | settings))
    )


def test_a_labelled_test_split_is_taken_from_train(tmp_path: Path) -> None:
    loaded = read(tmp_path, hub_folder(tmp_path / "nyu maths"))
    rows = all_rows(loaded)
    assert len(rows) == 120
    assert not any("hidden" in row["question"] for row in rows)
    assert loaded.prepared["taken"] == ["test", "validation"]
    assert 0 < loaded.surveys["test"].share_correct < 1


def test_the_placeholder_test_split_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"split 'test', for test: .*True in all of its 30 rows.*leave data\.test null"):
        read(tmp_path, hub_folder(tmp_path / "nyu"), test="test")


def test_a_second_start_uses_the_prepared_rows(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "nyu")
    assert read(tmp_path, folder) == read(tmp_path, folder)
    assert len([f for f in (tmp_path / "cache" / "rows").iterdir() if f.is_dir()]) == 1


def test_unknown_split_column_and_folder_are_named(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "nyu")
    with pytest.raises(UserError, match=r"split 'dev': no such split; it has .*train.*test"):
        read(tmp_path, folder, validation="dev")
    with pytest.raises(UserError, match=r"no column 'reply'; it has 'question', 'is_correct', 'answer'"):
        read(tmp_path, folder, columns=ColumnsConfig(answer="reply"))
    with pytest.raises(UserError, match=r"no such folder: set data\.path"):
        read(tmp_path, tmp_path / "nowhere")


def test_a_broken_shard_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = hub_folder(tmp_path / "nyu")
    (folder / "data" / "train-00001-of-00002.parquet").write_bytes(b"PAR1 half a download")
    with pytest.raises(UserError, match=r"cannot be read .*download the files again") as caught:
        read(tmp_path, folder)
    assert str(caught.value).isprintable()
    assert capfd.readouterr() == ("", ""), "nothing beside the line itself"


def test_offline_without_the_data_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"offline mode.*set data\.path to a local folder") as caught:
        read(tmp_path, NAME)
    assert str(caught.value).isprintable()


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub where nothing listens."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", "http://127.0.0.1:9")
    hub_answers.cache_clear()
    yield
    hub_answers.cache_clear()


def test_no_network_says_what_to_do(tmp_path: Path, silent: None, capfd: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match=r"the hub cannot be reached: .*set data\.path to a local folder"):
        read(tmp_path, NAME)
    assert capfd.readouterr() == ("", ""), "nothing beside the line itself"
    assert time.monotonic() - began < 15, "the clients' own retries take 23 s and more"


def test_a_download_that_was_cut_short_is_told_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent: None
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    blobs = tmp_path / "hub" / "datasets--ad6398--nyu-dl-teach-maths-comp" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "0123.incomplete").write_bytes(b"PAR1 half")
    remedy = rf"was cut short: `hf download {NAME} --repo-type dataset --force-download` mends it, or set data\.path"
    with pytest.raises(UserError, match=remedy):
        read(tmp_path, NAME)


@pytest.mark.parametrize("how", ["half", "empty", "gone"])
def test_a_torn_prepared_copy_is_made_again(tmp_path: Path, how: str) -> None:
    """What datasets made of the files is theirs to make again; the user need not know of it."""
    folder = hub_folder(tmp_path / "nyu")
    rows = all_rows(read(tmp_path, folder))
    prepared = list((tmp_path / "hub-cache").rglob("*train*.arrow"))
    assert prepared
    for file in prepared:
        match how:
            case "half":
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
            case "empty":
                file.write_bytes(b"")
            case "gone":
                file.unlink()
    shutil.rmtree(tmp_path / "cache")
    assert all_rows(read(tmp_path, folder)) == rows


class GatedRepoError(Exception):
    """Stands for the hub client's own, which needs a response to be made."""


class DatasetNotFoundError(Exception):
    """Stands for the one of datasets."""


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (GatedRepoError("403 Client Error"), "accept its licence on its hub page and log in"),
        (DatasetNotFoundError(f"Dataset '{NAME}' is a gated dataset on the Hub."), "accept its licence"),
        (
            DatasetNotFoundError(f"Dataset '{NAME}' doesn't exist on the Hub or cannot be accessed."),
            "check the name, log in",
        ),
        (ConnectionError("Couldn't reach the Hub"), "the hub cannot be reached"),
        (RuntimeError("first line\nsecond line"), "RuntimeError: first line second line"),
    ],
)
def test_every_refusal_names_its_remedy(error: Exception, says: str) -> None:
    config = DataConfig(source=DataSource.hub, path=NAME)
    told = str(explain(error, f"data.path '{NAME}'", config))
    assert says in told and "data.path" in told and told.isprintable()
    assert "data.path to a local folder" in told or "set data.path" in told
