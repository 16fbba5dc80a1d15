"""Cached folders: built once, whole or not there, and a full disk is one line."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mathverify.cache import cached_folder, is_whole
from mathverify.errors import UserError


def build(folder: Path) -> None:
    (folder / "a.txt").write_text("one")
    (folder / "b.txt").write_text("two")


def test_a_folder_is_built_once(tmp_path: Path) -> None:
    built: list[Path] = []

    def counted(folder: Path) -> None:
        built.append(folder)
        build(folder)

    for _ in range(2):
        folder = cached_folder(tmp_path / "deep" / "cache", "key", counted)
        assert (folder / "a.txt").read_text() == "one"
    assert len(built) == 1


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        build(folder)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match=r"the disk is full: free space or set data\.cache_dir"):
        cached_folder(tmp_path, "key", fail)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []
    assert is_whole(cached_folder(tmp_path, "key", build))


KILLED = """
import os, signal, sys
from pathlib import Path
from mathverify.cache import cached_folder
def build(folder):
    (folder / "a.txt").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
cached_folder(Path(sys.argv[1]), "key", build)
"""


def test_a_builder_killed_in_the_middle_is_as_if_it_had_not_been(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not is_whole(tmp_path / "key")
    folder = cached_folder(tmp_path, "key", build)
    assert (folder / "a.txt").read_text() == "one"
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["key"]


@pytest.mark.skipif(os.name != "posix", reason="umask")
def test_files_follow_the_users_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        folder = cached_folder(tmp_path, "key", build)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}
    assert folder.stat().st_mode & 0o777 == 0o750
