"""Progress: nothing on stdout, a line now and then where there is no terminal."""

from __future__ import annotations

import pytest

from mathverify import progress


def test_lines_are_sparse_and_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    log = progress._lines(lambda: now)
    for step in range(100):
        now = step / 4
        log("reading", step, 100)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["reading: 40 of 100 (40%)", "reading: 80 of 100 (80%)"]


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.shown() as log:
        for step in range(50):
            log("reading", step, None)
    assert capsys.readouterr() == ("", "")
