"""The real optuna-dashboard opens a study's storage, journal or PostgreSQL, and shows its trials."""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial

from mathverify.sweep.storage import open_storage, with_driver

from ..services import PASSWORD, Postgres, free_port, lacking, listens, start, stop, wait_until
from .conftest import Program

PROGRAM = Path(sys.executable).with_name("optuna-dashboard")


@contextmanager
def dashboard(storage: str, folder: Path) -> Iterator[str]:
    """The address of a dashboard of its own."""
    if not PROGRAM.exists():
        lacking("optuna-dashboard is not installed (the extra mathverify[dashboards])")
    port, log = free_port(), folder / "dashboard.log"
    process = start([str(PROGRAM), storage, "--port", str(port), "--server", "wsgiref", "--quiet"], log)
    try:
        wait_until(lambda: listens(port) or process.poll() is not None, "the dashboard listens")
        assert process.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(process)


def read(address: str) -> Any:
    with urllib.request.urlopen(address, timeout=20) as answer:
        return json.load(answer)


@pytest.mark.long
@pytest.mark.parametrize("where", ["journal", "postgres"])
def test_the_dashboard_shows_a_study_and_its_trials(
    program: Program, where: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    server: Postgres | None = request.getfixturevalue("postgres") if where == "postgres" else None
    url = server.database() if server is not None else None
    program.sweep(
        "x=interval(-5,5)", "y=choice(1,2,3)", "fail=2", "hydra.sweeper.n_trials=6",
        *([f"hydra.sweeper.storage={url}"] if url else []), code=3,
    )  # fmt: skip
    trials = _trials(open_storage(url, program.folder / "multirun/s"))
    assert {t.state.name for t in trials} == {"COMPLETE", "FAIL"}
    opened = with_driver(url) if url else str(program.folder / "multirun/s/study.journal")
    with dashboard(opened, tmp_path) as address:
        (study,) = read(f"{address}/api/studies")["study_summaries"]
        assert (study["study_name"], study["directions"]) == ("s", ["minimize"])
        shown = read(f"{address}/api/studies/{study['study_id']}")["trials"]
        best = read(f"{address}/api/studies/{study['study_id']}")["best_trials"]
    assert [_row(t) for t in shown] == [
        (t.number, t.state.name.capitalize(), t.values, {k: str(v) for k, v in t.params.items()}) for t in trials
    ]
    values = {t.number: t.value for t in trials if t.value is not None}
    assert [t["number"] for t in best] == [min(values, key=lambda n: values[n])]
    reasons = [attribute for t in shown for attribute in t["user_attrs"] if attribute["key"] == "reason"]
    assert any("no luck with y = 2" in attribute["value"] for attribute in reasons)
    assert PASSWORD not in json.dumps(shown)


def _trials(storage: Any) -> list[FrozenTrial]:
    (study,) = storage.get_all_studies()
    found: list[FrozenTrial] = storage.get_all_trials(study._study_id)
    return found


def _row(trial: Any) -> tuple[int, str, list[float] | None, dict[str, str]]:
    params = {param["name"]: param["param_external_value"] for param in trial["params"]}
    return trial["number"], trial["state"], trial.get("values") or None, params
