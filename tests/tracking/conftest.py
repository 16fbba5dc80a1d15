"""A W&B server on loopback for the real client, and nothing of the machine's own W&B."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mathverify.tracking.service import Outage, Warnings
from tests.loopback_wandb import LoopbackWandb

from .runs import point_at


@pytest.fixture
def calm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No W&B settings of the machine, and no outage remembered from another test."""
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(Warnings, "_warned", False)
    monkeypatch.setattr(Outage, "began", -math.inf)
    monkeypatch.setattr(Warnings, "_said_offline", False)
    _forget_server()
    yield
    _forget_server()


def _forget_server() -> None:
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()  # it keeps the first server and login for the whole process


@pytest.fixture
def server(calm: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackWandb]:
    with LoopbackWandb() as loopback:
        point_at(loopback, monkeypatch)
        yield loopback
