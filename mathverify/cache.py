"""Folders that are made once and then reused: written aside, checked by checksum, safe with many processes.

What is in a folder is its maker's business; this file only knows when one is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import xxhash

from mathverify.errors import CannotWrite
from mathverify.files import is_full, sync

MANIFEST = "manifest.json"
CHUNK_BYTES = 1 << 22


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/mathverify, or ~/.cache/mathverify."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mathverify"


def cached_folder(parent: Path, key: str, build: Callable[[Path], None]) -> Path:
    """Return `parent/key`, made by `build(folder)` unless a whole one is there already.

    A folder is whole when every file in its manifest has the size and checksum that it was written with; anything
    else is made anew. One process builds at a time, the others wait; a process that is killed leaves nothing that
    is mistaken for a result. Raises CannotWrite when the folder cannot be written (read-only, full disk).
    """
    from filelock import FileLock

    final = parent / key
    try:
        if is_whole(final):
            return final
        parent.mkdir(parents=True, exist_ok=True)
        with FileLock(parent / f".{key}.lock"):
            if not is_whole(final):
                _make(parent, key, build)
        return final
    except OSError as error:
        raise _unwritable(parent, error) from error


def is_whole(folder: Path) -> bool:
    """Whether every file of `folder` has the size and checksum of its manifest. Reads all of it (several GB/s)."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all(_same(folder / name, entry) for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _same(path: Path, entry: Mapping[str, object]) -> bool:
    return path.stat().st_size == entry["bytes"] and checksum(path) == entry["xxh3_128"]


def _make(parent: Path, key: str, build: Callable[[Path], None]) -> None:
    for leftover in parent.glob(f".{key}.tmp-*"):  # a killed builder's: we hold the lock, so nobody is writing there
        shutil.rmtree(leftover, ignore_errors=True)
    aside = parent / f".{key}.tmp-{uuid.uuid4().hex}"
    aside.mkdir()
    try:
        build(aside)
        _seal(aside)
        final = parent / key
        if final.exists():  # torn or corrupt; another process may still have its files mapped, which a rename allows
            broken = parent / f".{key}.tmp-{uuid.uuid4().hex}"
            final.rename(broken)
            shutil.rmtree(broken, ignore_errors=True)
        aside.rename(final)
        sync(parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _seal(folder: Path) -> None:
    """Sync every file and write the manifest last."""
    files = {}
    for path in sorted(folder.iterdir()):
        sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "xxh3_128": checksum(path)}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    sync(folder / MANIFEST)
    sync(folder)


def checksum(path: Path) -> str:
    """xxh3-128 of a file's bytes, as 32 hex digits; reads 4 MiB at a time."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _unwritable(parent: Path, error: OSError) -> CannotWrite:
    what = "the disk is full" if is_full(error) else (error.strerror or type(error).__name__)
    return CannotWrite(
        f"cache folder {str(parent)!r}: {what}: free space or set data.cache_dir to a folder you can write"
    )
