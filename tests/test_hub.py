"""What the hub's cache on this machine is worth: whole copies are taken, damaged ones named with what mends them."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
from huggingface_hub import constants

from mathverify import tiny
from mathverify.hub import cache_damage, mending
from tests.test_base import load_from_hub

NAME, COMMIT = "acme/small-llama", "0123456789abcdef0123456789abcdef01234567"


def cached(home: Path) -> Path:
    """The embedded model as the hub's client keeps it: blobs, and a snapshot of links to them. Returns the snapshot."""
    repository = home / "hf" / "hub" / "models--acme--small-llama"
    snapshot, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    for folder in (snapshot, blobs, repository / "refs"):
        folder.mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in Path(tiny.path()).iterdir() if path.is_file())):
        shutil.copy(file, blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    (repository / "refs" / "main").write_text(COMMIT)
    return snapshot


def damage(snapshot: Path, how: str) -> None:
    file, _, kind = how.partition(" ")
    blob = (snapshot / file).resolve()
    match kind:
        case "cut":
            blob.write_bytes(blob.read_bytes()[: blob.stat().st_size // 2])
        case "empty":
            blob.write_bytes(b"")
        case "without its blob":
            blob.unlink()
        case "interrupted":  # as the client leaves it: no link yet, and a blob of another name
            blob.rename(blob.with_name(blob.name + ".incomplete"))
            (snapshot / file).unlink()
        case "lacking a shard":
            (snapshot / file).rename(snapshot / "model-00001-of-00002.safetensors")
            shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
            (snapshot / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))


CASES = [
    ("model.safetensors cut", "model.safetensors is torn"),
    ("model.safetensors empty", "model.safetensors is torn"),
    ("model.safetensors without its blob", "model.safetensors is a link to a file that is not there"),
    ("model.safetensors interrupted", "was cut short"),
    ("model.safetensors lacking a shard", "names model-00002-of-00002.safetensors, which is not there"),
    ("config.json cut", "config.json is torn"),
    ("config.json without its blob", "config.json is a link to a file that is not there"),
    ("tokenizer.json cut", "tokenizer.json is torn"),
    ("tokenizer.json interrupted", "was cut short"),
]


@pytest.mark.parametrize(("how", "says"), CASES, ids=[how for how, _ in CASES])
def test_what_is_wrong_with_a_cached_model_is_named(
    how: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    snapshot = cached(tmp_path)
    assert cache_damage(NAME, "model") is None
    damage(snapshot, how)
    assert says in str(cache_damage(NAME, "model"))
    assert says in str(cache_damage(NAME, "model", COMMIT)), "a revision given as a commit is found as well"
    assert cache_damage("acme/other", "model") is None


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1 half a download"])
def test_a_torn_table_in_a_cached_dataset_is_named(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "datasets--acme--rows" / "snapshots" / COMMIT / "data"
    snapshot.mkdir(parents=True)
    (snapshot.parents[2] / "refs").mkdir()
    (snapshot.parents[2] / "refs" / "main").write_text(COMMIT)
    (snapshot / "train-00000-of-00001.parquet").write_bytes(content)
    assert "train-00000-of-00001.parquet is torn" in str(cache_damage("acme/rows", "dataset"))
    assert mending("acme/rows", "dataset") == "`hf download acme/rows --repo-type dataset --force-download` mends it"


def test_weights_that_claim_to_be_longer_than_the_world_are_torn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    snapshot = cached(tmp_path)
    (snapshot / "model.safetensors").resolve().write_bytes(struct.pack("<Q", 2**62) + b"{}")
    assert "model.safetensors is torn" in str(cache_damage(NAME, "model"))


# As a user meets it: the loading code in a process of its own, the hub absent or switched off.

OFF = {"switched off": {"HF_HUB_OFFLINE": "1"}, "not there": {"HF_ENDPOINT": "http://127.0.0.1:9"}}


@pytest.mark.slow
@pytest.mark.parametrize("hub", OFF)
def test_a_whole_copy_is_enough_without_a_hub(hub: str, tmp_path: Path) -> None:
    """At once: the client alone asks for every file again and again, for minutes."""
    cached(tmp_path)
    assert load_from_hub(NAME, tmp_path, **OFF[hub]) == "loaded"


@pytest.mark.slow
@pytest.mark.parametrize(("how", "hub"), [(CASES[0][0], "not there"), (CASES[3][0], "switched off")])
def test_a_damaged_copy_is_one_line_with_the_remedy(how: str, hub: str, tmp_path: Path) -> None:
    damage(cached(tmp_path), how)
    said = load_from_hub(NAME, tmp_path, **OFF[hub])
    assert dict(CASES)[how] in said
    assert "`hf download acme/small-llama --force-download` mends it, or give a local copy with model.path=" in said


def test_what_is_no_name_of_the_hub_has_no_cached_copy() -> None:
    assert cache_damage("https://somewhere/else", "model") is None
    assert cache_damage("a/b/c/d", "dataset") is None
