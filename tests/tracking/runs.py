"""What the tests of tracking share: planted secrets, and looks into a run folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mathverify.config import RunConfig, TrackingConfig, TrackingKind
from mathverify.records import Predictions
from tests.loopback_wandb import KEY, LoopbackWandb

ROOT = Path(__file__).resolve().parents[2]
OFF = RunConfig(tracking=TrackingConfig(kind=TrackingKind.none))
PLANTED = {
    "HF_TOKEN": "hf_PlantedPlantedPlanted0123",
    "MY_SERVICE_KEY": "planted-service-key-value",
    "DB_PASSWORD": "planted-db-password",
    "PLAIN_ENVIRONMENT": "planted-environment-value",
}


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def predictions(rows: int) -> Predictions:
    ids = [str(i) for i in range(rows)]
    return Predictions(ids, ids, ["sums"] * rows, np.arange(rows) % 2 == 0, np.linspace(-2, 2, rows))


def point_at(loopback: LoopbackWandb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", loopback.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)


def wandb_id(folder: Path) -> str:
    return str(json.loads((folder / "tracking.json").read_text())["wandb_id"])


def planted_in(folder: Path) -> list[str]:
    """Files of the folder that hold a planted secret, in plain or as the key itself."""
    needles = [value.encode() for value in (*PLANTED.values(), KEY)]
    files = [p for p in folder.rglob("*") if p.is_file()]
    return [str(p) for p in files if any(needle in p.read_bytes() for needle in needles)]


# metrics.jsonl
