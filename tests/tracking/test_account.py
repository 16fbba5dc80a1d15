"""Online with a key, else offline; W&B's own switches are honoured."""

from __future__ import annotations

from pathlib import Path

import pytest

from mathverify.config import RunConfig, TrackingConfig, TrackingMode
from mathverify.errors import UserError
from mathverify.tracking import Tracker, account, open_tracker
from tests.loopback_wandb import KEY


@pytest.mark.parametrize("host", ["api.wandb.ai", "wandb.example.org"])
def test_a_key_in_netrc_counts_for_its_host_only(
    calm: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, host: str
) -> None:
    assert not account.goes_online(TrackingMode.auto)
    (tmp_path / "netrc").write_text(f"machine {host}\n  login user\n  password {KEY}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert account.goes_online(TrackingMode.auto) == (host == "api.wandb.ai")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert account.goes_online(TrackingMode.auto) == (host == "wandb.example.org")
    assert not account.goes_online(TrackingMode.offline)


def test_online_without_a_key_is_refused_with_the_remedy(calm: None, tmp_path: Path) -> None:
    config = RunConfig(tracking=TrackingConfig(mode=TrackingMode.online))
    with pytest.raises(UserError, match=r"WANDB_API_KEY.*wandb login.*offline"):
        open_tracker(config, tmp_path)


def test_wandbs_own_switches_are_honoured(calm: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert not account.goes_online(TrackingMode.auto)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with open_tracker(RunConfig(), tmp_path) as tracker:
        assert type(tracker) is Tracker
