"""Writing files so that a kill or a full disk never leaves a torn one: temporary name, sync, rename."""

from __future__ import annotations

import errno
import os
import platform
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mathverify.errors import CannotWrite

SECONDS_OF_A_DAY = 86400.0


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; when the block ends well, its file is synced and takes `path`'s place.

    A reader, or a crash at any moment, sees the old file or the new one, never a part. The temporary file lies in the
    same folder (a rename is atomic only within a file system) and has the user's umask; the folder is synced too.

    Raises:
        CannotWrite: the disk or the permissions refuse. The temporary file is gone, and what was at `path` stands.
    """
    temporary = temporary_beside(path)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_write(path, error) from error
        raise


def write_atomic(path: Path, content: bytes | Callable[[BinaryIO], None]) -> None:
    """Write a file whole or not at all; see `replacing`.

    content: the bytes, or a function that writes them to an open binary file.
    """
    with replacing(path) as temporary, temporary.open("xb") as file:
        if callable(content):
            content(file)
        else:
            file.write(content)


def temporary_beside(path: Path) -> Path:
    """A hidden name of its own in the same folder, which says whose it is: .NAME.MACHINE.PID.RANDOM.tmp."""
    return path.with_name(f".{path.name}.{_machine()}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Remove what writes that a kill cut short have left here.

    A file of a process that runs on this machine stays. Whether one of another machine runs cannot be asked: its files
    stay for a day.
    """
    for file in folder.glob(".*.*.*.*.tmp"):
        machine, pid = file.name.split(".")[-4:-2]
        with suppress(FileNotFoundError):  # it took its place just now, or another process removes it too
            if machine == _machine():
                over = not Path(f"/proc/{pid}").exists()
            else:
                over = time.time() - file.stat().st_mtime > SECONDS_OF_A_DAY
            if over:
                file.unlink()


def _machine() -> str:
    return platform.node().replace(".", "-") or "-"


def sync(path: Path) -> None:
    """Ask the disk to hold a file's bytes, or a folder's entries, before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_full(error: OSError) -> bool:
    """Whether an error says that the disk, or the user's share of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def cannot_write(path: Path | str, error: OSError) -> CannotWrite:
    """What stopped `path` from being written, and how to go on."""
    remedy = "free space or choose another folder, then run the same command again: it continues"
    return CannotWrite(f"{path}: cannot write ({error.strerror or error}): {remedy}")
