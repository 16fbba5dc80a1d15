"""A study in a real PostgreSQL is compared by its URL, whose password is shown nowhere."""

from __future__ import annotations

import optuna
import pytest
from _pytest.capture import CaptureFixture

from mathverify.compare.__main__ import main
from mathverify.sweep.storage import with_driver

from ..services import PASSWORD, Postgres
from .conftest import Make, config_of

pytestmark = pytest.mark.long


def test_a_study_in_postgresql_is_read_by_its_url(postgres: Postgres, make: Make, capsys: CaptureFixture[str]) -> None:
    url = postgres.database()
    study = optuna.create_study(storage=with_driver(url), study_name="ranks", direction="maximize")
    folders = [make(f"study/{number}", config_of(rank=rank)) for number, rank in enumerate((16, 64))]
    study.set_user_attr("mathverify", {"folder": str(folders[0].parent)})
    for _ in folders:
        study.tell(study.ask(), 0.8)
    elsewhere = study.ask()
    elsewhere.set_user_attr("reason", f"no memory at {url}")
    study.tell(elsewhere, state=optuna.trial.TrialState.FAIL)
    assert main([f"{url}#ranks"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("completed") == 2 and "failed 2: no memory at" in shown.out
    assert main([f"{url}#nobody"]) == 2
    refused = capsys.readouterr()
    assert "no study nobody" in refused.err
    assert PASSWORD in url and PASSWORD not in shown.out + shown.err + refused.out + refused.err


def test_a_database_without_studies_is_left_as_it_is(postgres: Postgres, capsys: CaptureFixture[str]) -> None:
    url = postgres.database()
    assert main([url]) == 2
    said = capsys.readouterr().err
    assert "cannot be read as a study" in said and PASSWORD not in said and len(said.splitlines()) == 1
    assert (
        postgres.sql("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'", url.rpartition("/")[2]).strip()
        == "0"
    )
