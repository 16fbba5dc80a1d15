"""The findings are one command: it trains with several processes, continues, and says what may be said."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.journeys.conftest import SMALL

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_findings_are_one_command_that_can_be_repeated(tmp_path: Path) -> None:
    small = [s for s in SMALL if not s.startswith(("train.batch_size", "train.max", "train.grad", "tracking"))]
    words = [
        sys.executable, "-m", "tests.benchmarks.findings", "--only", "rank", "--only", "batch_equal_examples",
        "--seeds", "2", "--steps", "4",
        "--runs", str(tmp_path / "my runs"), "--out", str(tmp_path / "page"), "--",
        *small, f"data.cache_dir='{tmp_path}/cache'",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def findings() -> str:
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stdout + done.stderr
        return (tmp_path / "page" / "README.md").read_text()

    first = findings()
    results = {path: path.read_bytes() for path in tmp_path.glob("my runs/*/*/result.json")}
    assert len(results) == 12
    assert "note: equal examples (64) but unequal steps: 2 to 8" in first
    assert "- selection: the best of 3 on validation" in first and "have not been reproduced here" in first
    assert (tmp_path / "page/rank/table.csv").read_text().count("\n") == 7
    assert (tmp_path / "page/rank/report.html").stat().st_size > 10_000
    for picture in re.findall(r"!\[\w+\]\(([^)]+)\)", first):
        assert (tmp_path / "page" / picture).read_text().startswith("<svg")
    assert "accuracy_by_lora_rank.svg" in first
    assert findings() == first
    assert {path: path.read_bytes() for path in results} == results
