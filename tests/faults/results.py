"""Figures of the tests and scripts of this folder, as JSON files in results/; figures.py makes the table from them."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def write_result(name: str, figures: dict[str, Any]) -> None:
    """Write results/NAME.json, with the date and the machine that the figures come from."""
    RESULTS.mkdir(exist_ok=True)
    made = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "cpus": os.cpu_count(), "python": platform.python_version()}
    (RESULTS / f"{name}.json").write_text(json.dumps({"made": made, **figures}, indent=2, sort_keys=True) + "\n")


def read_result(name: str) -> dict[str, Any] | None:
    """What was written last; None before that."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else None
