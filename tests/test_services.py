"""What a missing service means for a test, and that servers end with whoever started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .services import listens, require, wait_until


def test_without_its_program_a_test_is_skipped_and_in_ci_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert require("sh")[0].endswith("/sh")
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"no-such-server not installed \(\.ci/services"):
        require("sh", "no-such-server")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no-such-server not installed"):
        require("sh", "no-such-server")


SERVING = """
from tests.services import postgres_server
with postgres_server() as server:
    print(server.port, server.folder, flush=True)
    input()
    raise SystemExit("the test failed")
"""


@pytest.mark.long
@pytest.mark.parametrize("how", ["failed", "killed"])
def test_a_server_ends_with_its_test_however_that_ends(how: str) -> None:
    require("initdb", "postgres")
    process = subprocess.Popen(
        [sys.executable, "-c", SERVING], cwd=Path(__file__).parents[1], text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    port, folder = process.stdout.readline().split()
    assert listens(int(port))
    if how == "killed":
        process.send_signal(signal.SIGKILL)
    process.communicate("\n")
    wait_until(lambda: not listens(int(port)), "the server is gone", seconds=20)
    assert Path(folder).exists() == (how == "killed")  # a killed test can tidy nothing up
    subprocess.run(["rm", "-rf", folder], check=True)
