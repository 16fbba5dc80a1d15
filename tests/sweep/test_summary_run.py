"""A study leaves one W&B run of its own beside its trials': table, charts, best configuration; it goes on in the same one.

With the real client against a loopback server.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
from omegaconf import DictConfig
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from mathverify.entry import config_dir, register_schema
from mathverify.sweep.settings import Settings
from mathverify.sweep.space import Dimension, Space
from mathverify.sweep.study import Session, open_session
from mathverify.sweep.summary_run import send_summary, summary, table_columns, table_rows
from mathverify.tracking.service import Outage, Warnings
from tests.journeys.conftest import SMALL
from tests.loopback_wandb import KEY, LoopbackWandb

ROOT = Path(__file__).parents[2]
RANKS, LOADS = CategoricalDistribution((16, 64)), CategoricalDistribution(("nf4", "none"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackWandb]:
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(Outage, "began", -1e9)
    monkeypatch.setattr(Warnings, "_warned", False)
    if (
        "wandb" in sys.modules
    ):  # a test before may have met another server, which the client keeps for the whole process
        sys.modules["wandb"].teardown()
    with LoopbackWandb() as loopback:
        monkeypatch.setenv("WANDB_BASE_URL", loopback.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield loopback
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


def trial(rank: int, load: str, accuracy: float | None, **more: Any) -> FrozenTrial:
    job = {"overrides": [f"lora.rank={rank}", f"quantization={load}"], "config": "x"}
    return create_trial(
        params={"lora.rank": rank, "quantization": load},
        distributions={"lora.rank": RANKS, "quantization": LOADS},
        value=accuracy,
        **{"state": TrialState.COMPLETE, **more},
        user_attrs={"job": job, "facts": {"steps": 4, "examples": 32, "seconds": 1.5}},
    )


@pytest.fixture
def session(tmp_path: Path) -> Session:
    """A study of five trials: three completed, one pruned, one failed."""
    settings = Settings(sampler={"_target_": "optuna.samplers.TPESampler", "seed": 1}, study_name="s")
    space = Space({"lora.rank": Dimension("lora.rank", RANKS), "quantization": Dimension("quantization", LOADS)})
    session = open_session(settings, space, ("maximize",), {}, tmp_path / "s")
    for one in (trial(16, "nf4", 0.7), trial(64, "nf4", 0.8), trial(16, "none", 0.75)):
        session.study.add_trial(one)
    session.study.add_trial(trial(64, "none", None, state=TrialState.PRUNED, intermediate_values={2: 0.6}))
    failed = trial(64, "none", None, state=TrialState.FAIL)
    failed.user_attrs["reason"] = "loss is nan at step 3"
    session.study.add_trial(failed)
    return session


def composed(*overrides: str) -> DictConfig:
    register_schema()
    with hydra.initialize_config_dir(config_dir(), version_base="1.3"):
        return hydra.compose("config", overrides=list(overrides))


def test_the_table_has_every_trial_and_a_value_only_where_it_compares(session: Session) -> None:
    rows = [dict(zip(table_columns(session), row, strict=True)) for row in table_rows(session)]
    assert [(row["trial"], row["state"], row["rank"], row["quantization"]) for row in rows] == [
        (0, "completed", 16, "nf4"), (1, "completed", 64, "nf4"), (2, "completed", 16, "none"),
        (3, "pruned", 64, "none"), (4, "failed", 64, "none"),
    ]  # fmt: skip
    assert [row["final_validation/accuracy"] for row in rows] == [0.7, 0.8, 0.75, None, None]
    assert rows[4]["reason"] == "loss is nan at step 3"


def test_the_best_is_named_with_its_settings_and_its_command(session: Session) -> None:
    numbers = summary(session, "python -m mathverify.train")
    assert numbers.items() >= {
        "trials": 5, "trials/completed": 3, "trials/pruned": 1, "trials/failed": 1,
        "best/trial": 1, "best/final_validation/accuracy": 0.8, "best/rank": 64, "best/quantization": "nf4",
        "best/command": "python -m mathverify.train lora.rank=64 quantization=nf4",
    }.items()  # fmt: skip


def test_it_is_one_run_in_the_studys_group_also_when_the_study_goes_on(session: Session, server: LoopbackWandb) -> None:
    config = composed("tracking.tags=[night]")
    send_summary(session, config, "python -m mathverify.train")
    session.study.add_trial(trial(64, "nf4", 0.9))
    send_summary(session, config, "python -m mathverify.train")
    (run_id,) = server.run_ids
    run = server.run(run_id)
    assert (run["groupName"], run["jobType"], run["tags"]) == ("s", "sweep", ["night", "completed"])
    assert run["config"]["sampler"] == "TPESampler"
    assert run["config"]["space"] == "lora.rank in {16, 64}; quantization in {nf4, none}"
    assert server.summary[run_id]["best/final_validation/accuracy"] == 0.9
    assert server.summary[run_id]["trials"] == 6
    tables = {path.rpartition("/")[2].partition("_table_")[0]: json.loads(body) for path, body in uploaded(server)}
    assert {"history", "best_so_far", "importance"} <= set(tables)
    assert [row[1] for row in tables["best_so_far"]["data"]] == [0.7, 0.8, 0.8, 0.9]
    assert {row[0] for row in tables["importance"]["data"]} == {"rank", "quantization"}


def uploaded(server: LoopbackWandb) -> list[tuple[str, bytes]]:
    return [(path, body) for path, body in server.uploads.items() if "media/table" in path]


def test_two_objectives_are_shown_against_each_other(tmp_path: Path, server: LoopbackWandb) -> None:
    settings = Settings(
        sampler={"_target_": "optuna.samplers.NSGAIISampler"}, study_name="two",
        objective=("metrics.validation.accuracy", "costs.trainable_parameters"),
    )  # fmt: skip
    space = Space({"lora.rank": Dimension("lora.rank", RANKS)})
    session = open_session(settings, space, ("maximize", "minimize"), {}, tmp_path / "two")
    for rank, accuracy in ((16, 0.7), (64, 0.8)):
        session.study.add_trial(
            create_trial(params={"lora.rank": rank}, distributions={"lora.rank": RANKS}, values=[accuracy, float(rank)])
        )
    send_summary(session, composed(), "python -m mathverify.train")
    assert server.summary[server.run_ids[0]]["pareto_front"] == "0, 1"
    tables = [json.loads(body) for path, body in uploaded(server) if "objectives" in path]
    assert tables[0]["data"] == [[16, 0.7], [64, 0.8]]


@pytest.mark.parametrize("off", ["tracking=none", "another program"])
def test_nothing_is_sent_where_nothing_was_asked_for(session: Session, server: LoopbackWandb, off: str) -> None:
    config = composed("tracking=none") if off == "tracking=none" else DictConfig({"x": 1})
    send_summary(session, config, "python app.py")
    assert not server.bodies
    assert not list(session.folder.glob("wandb*"))


def test_what_goes_wrong_with_it_is_a_warning(
    session: Session, server: LoopbackWandb, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", "/nowhere")
    send_summary(session, composed("tracking.mode=online"), "python -m mathverify.train")
    assert len(caplog.records) == 1
    assert "needs a W&B key" in caplog.text


@pytest.mark.slow
def test_a_real_sweep_is_one_group_of_trials_and_their_study(server: LoopbackWandb, tmp_path: Path) -> None:
    """By the command: two trials, then a third; every run is filed so that W&B's tables need no clicks."""
    small = [s for s in SMALL if not s.startswith(("tracking", "train.batch_size"))]
    command = [
        sys.executable, "-m", "mathverify.train", "-m", "sweep=rank_grid", "lora=r4", "seed=choice(1,2,3)", *small,
        "hydra.sweeper.params={seed:'choice(1,2,3)'}", f"data.cache_dir='{tmp_path}/cache'",
    ]  # fmt: skip
    for trials in (2, 3):
        done = subprocess.run(
            [*command, f"hydra.sweeper.n_trials={trials}"], cwd=tmp_path, capture_output=True, text=True, timeout=200,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    runs = [server.run(run_id) for run_id in server.run_ids]
    assert {run["groupName"] for run in runs} == {"rank_grid"}
    trials_runs = [run for run in runs if run["jobType"] == "train"]
    trials_runs.sort(key=lambda run: int(run["config"]["trial"]))  # the server may hear of one later than of the next
    assert [run["config"]["trial"] for run in trials_runs] == [0, 1, 2]
    assert sorted(run["config"]["seed"] for run in trials_runs) == [1, 2, 3]
    assert [run["displayName"] for run in trials_runs] == [f"r4-a4-b4 #{number}" for number in range(3)]
    for run in trials_runs:
        assert isinstance(server.summary[run["name"]]["final_validation/accuracy"], float)
        assert isinstance(server.summary[run["name"]]["test/accuracy"], float)
    (study,) = [run for run in runs if run["jobType"] == "sweep"]
    assert server.summary[study["name"]]["trials/completed"] == 3
    assert server.summary[study["name"]]["best/rank"] == 4
    assert isinstance(server.summary[study["name"]]["best/learning_rate"], float)
