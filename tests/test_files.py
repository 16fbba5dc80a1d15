"""Files are written whole or not at all."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mathverify.errors import UserError
from mathverify.files import SECONDS_OF_A_DAY, remove_leftovers, temporary_beside, write_atomic


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_atomic(path, b"old")

    def breaks(file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"No space left on device.*free space"):
        write_atomic(path, breaks)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_files_have_the_users_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "x", b"1")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_leftovers_go_and_what_a_living_process_writes_stays(tmp_path: Path) -> None:
    program = "from pathlib import Path; from mathverify.files import temporary_beside as t; t(Path('x.json')).touch()"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    (theirs,) = tmp_path.iterdir()  # that process is gone
    (mine := temporary_beside(tmp_path / "x.json")).touch()
    machine, pid = theirs.name.split(".")[-4:-2]
    elsewhere, old = (tmp_path / f".x.json.not-{machine}.{pid}.{n}.tmp" for n in ("0a", "0b"))
    elsewhere.touch()
    old.touch()
    os.utime(old, (time.time() - SECONDS_OF_A_DAY - 1,) * 2)
    for name in ("x.json", ".lock", ".x.tmp", "a.b.c.d.tmp"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {mine.name, elsewhere.name, "x.json", ".lock", ".x.tmp", "a.b.c.d.tmp"}
