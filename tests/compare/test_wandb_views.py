"""--wandb: what would be sent is right, it reaches a server once, and without an account one line says so."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mathverify import scoring
from mathverify.compare import wandb_views
from mathverify.compare.__main__ import main
from mathverify.compare.wandb_views import Views, build_views, save_views
from mathverify.config import RunConfig
from mathverify.errors import UserError
from mathverify.records import RunRecord, Status
from mathverify.tracking.vocabulary import final_numbers, flat_config
from tests.loopback_wandb import KEY, LoopbackWandb

from .conftest import Make, TestRows, config_of

pytest.importorskip("wandb_workspaces")


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No W&B settings of the machine."""
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


@pytest.fixture
def server(account: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackWandb]:
    with LoopbackWandb() as loopback:
        monkeypatch.setenv("WANDB_BASE_URL", loopback.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield loopback


@pytest.fixture(scope="module")
def views() -> Views:
    return build_views("tester", "p", ["lora.rank", "learning_rate"])


def spec(views: Views) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(views.workspace._to_model().model_dump_json(by_alias=True, exclude_none=True))
    return found["spec"]["section"]  # type: ignore[no-any-return]


def panels(section: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for part in section["panelBankConfig"]["sections"] for panel in part["panels"]]


def accessors(tree: Any) -> set[str]:
    """Every 'config:...' and 'summary:...' in a spec."""
    if isinstance(tree, dict):
        return {a for key, value in tree.items() for a in accessors(value) | accessors(key)}
    if isinstance(tree, list):
        return {a for item in tree for a in accessors(item)}
    return {tree} if isinstance(tree, str) and tree.startswith(("config:", "summary:")) else set()


def test_everything_that_is_shown_is_something_that_runs_send(views: Views) -> None:
    labels = np.arange(40) % 2 == 0
    record = RunRecord.begin(RunConfig())
    record.status = Status.completed
    record.metrics.test = record.metrics.validation = scoring.measure(
        np.where(labels, 1.0, -1.0), labels, np.arange(40), resamples=100
    )
    record.costs.seconds, record.costs.tokens_per_second, record.costs.peak_memory_bytes = {"train": 1.0}, 1.0, 1
    record.costs.trainable_parameters = 1
    sent = {f"config:{name}.value" for name in flat_config(RunConfig())}
    sent |= {f"summary:{name}" for name in final_numbers(record)}
    shown = accessors(spec(views))
    assert {"config:rank.value", "config:learning_rate.value", "summary:final_validation/accuracy"} <= shown
    assert shown - sent == set()


def test_the_view_ranks_by_validation_and_leaves_the_studies_own_runs_out(views: Views) -> None:
    section = spec(views)
    (runs,) = section["runSets"]
    assert runs["sort"]["keys"][0] == {
        "key": {"section": "summary", "name": "final_validation/accuracy"},
        "ascending": False,
    }
    assert '"jobType"' in json.dumps(runs["filters"]) and '"train"' in json.dumps(runs["filters"])
    feed = runs["runFeed"]
    assert feed["columnOrder"][:6] == [
        "run:displayName", "run:state", "run:group", "tags:__ALL__", "config:rank.value", "config:learning_rate.value",
    ]  # fmt: skip
    assert all(feed["columnPinned"][name] for name in feed["columnOrder"])


def test_the_panels_are_there_and_about_the_right_numbers(views: Views) -> None:
    kinds: dict[str, list[dict[str, Any]]] = {}
    for panel in panels(spec(views)):
        kinds.setdefault(panel["viewType"], []).append(panel["config"])
    (parallel,) = kinds["Parallel Coordinates Plot"]
    assert [column["accessor"] for column in parallel["columns"]] == [
        "config:rank.value", "config:learning_rate.value", "summary:final_validation/accuracy",
    ]  # fmt: skip
    assert [column.get("log") for column in parallel["columns"]] == [False, True, None]
    assert [config["targetKey"] for config in kinds["Parameter Importance"]] == ["final_validation/accuracy"]
    curves = {config["chartTitle"]: config for config in kinds["Run History Line Plot"]}
    grouped = curves["Validation accuracy by rank"]
    assert (grouped["xAxis"], grouped["metrics"]) == ("train/step", ["validation/accuracy"])
    assert "rank" in json.dumps(grouped["groupBy"]) and grouped["groupAgg"] == "mean"


def test_the_report_holds_the_same_and_the_studies(server: LoopbackWandb) -> None:
    save_views("tester/p", ["lora.rank"])
    (report,) = [json.loads(view["spec"]) for view in server.views.values() if view["type"] == "runs"]
    grids = [block["metadata"] for block in report["blocks"] if block["type"] == "panel-grid"]
    kinds = [panel["viewType"] for grid in grids for panel in grid["panelBankSectionConfig"]["panels"]]
    assert {"Parallel Coordinates Plot", "Parameter Importance", "Run History Line Plot", "Scatter Plot"} <= set(kinds)
    jobs = [json.dumps(grid["runSets"][0]["filters"]) for grid in grids]
    assert ['"train"' in job for job in jobs] == [True, True, True, False] and '"sweep"' in jobs[-1]
    assert "study/trials" in json.dumps(grids[-1])
    assert "only reported" in json.dumps(report["blocks"])


def test_it_is_saved_once_and_renewed_after_that(server: LoopbackWandb, capfd: pytest.CaptureFixture[str]) -> None:
    first = save_views("tester/p")
    assert save_views("tester/p", ["lora.rank"]) == first
    assert all(
        address.startswith(f"{server.url}/tester/p") and "?" not in address.partition("?nw=")[0] for address in first
    )
    assert sorted(view["type"] for view in server.views.values()) == ["project-view", "runs"]
    (view,) = [view for view in server.views.values() if view["type"] == "project-view"]
    assert accessors(json.loads(view["spec"])) & {"config:alpha.value"} == set()
    assert KEY not in json.dumps(server.views)
    assert capfd.readouterr() == ("", "")


def test_the_command_shows_what_differs_between_the_runs(
    server: LoopbackWandb, make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = TestRows(100, 80)
    for rank in (16, 64):
        make(f"sweep/{rank}", config_of(rank=rank), rows)
    assert main([str(tmp_path / "sweep"), "--wandb", "tester/p"]) == 0
    assert capsys.readouterr().out.count("saved: http://127.0.0.1") == 2
    (view,) = [view for view in server.views.values() if view["type"] == "project-view"]
    shown = {name for name in accessors(json.loads(view["spec"])) if name.startswith("config:")}
    assert shown == {"config:rank.value", "config:alpha.value", "config:seed.value"}


@pytest.mark.parametrize(
    ("target", "says"),
    [("nonsense", "use ENTITY/PROJECT"), ("a/b/c", "use ENTITY/PROJECT"), ("me/proj", "needs an online account.*wandb login")],
)  # fmt: skip
def test_what_cannot_be_saved_is_one_line(
    account: None, target: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--wandb", target]) == 2
    (line,) = capsys.readouterr().err.splitlines()

    assert line.startswith("error: --wandb ") and re.search(says, line)


def test_without_the_extra_the_line_says_what_to_install(account: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'mathverify\[dashboards\]'"):
        save_views("me/proj")


@pytest.mark.parametrize(
    ("target", "behaviour", "says"),
    [
        ("tester/nothing", "ok", "`tester/nothing` not found"),
        ("tester/p", "401", "loopback 401"),
        pytest.param("tester/p", "hang", "no answer within 2 s", marks=pytest.mark.slow),
    ],
)
def test_a_server_that_refuses_or_is_silent_is_one_line(
    server: LoopbackWandb, monkeypatch: pytest.MonkeyPatch, target: str, behaviour: str, says: str
) -> None:
    server.behaviour = behaviour
    monkeypatch.setattr(wandb_views, "SAVE_SECONDS", 2.0 if behaviour == "hang" else 30.0)
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        save_views(target)
    assert says in str(caught.value) and "\n" not in str(caught.value) and KEY not in str(caught.value)
    assert "check the names" in str(caught.value)
    assert time.monotonic() - began < 40
