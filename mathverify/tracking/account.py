"""Whether W&B is to be reached, and whether a key for it is configured. Never asks for a key and never prints one."""

from __future__ import annotations

import contextlib
import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

from mathverify.config import TrackingMode
from mathverify.errors import UserError


def goes_online(mode: TrackingMode) -> bool:
    """Whether a run of this mode is sent while it goes on. Raises UserError when it must be and no key is there."""
    match mode:
        case TrackingMode.offline:
            return False
        case TrackingMode.online if not has_key():
            raise UserError(
                "tracking.mode = 'online' needs a W&B key: set WANDB_API_KEY, run `wandb login`, "
                "or use tracking.mode=offline"
            )
        case TrackingMode.online:
            return True
    return os.environ.get("WANDB_MODE", "online") == "online" and has_key()


def is_disabled() -> bool:
    """Whether W&B's own switch turns it off altogether."""
    return os.environ.get("WANDB_MODE") == "disabled"


def has_key() -> bool:
    """Whether a W&B key is configured, in the environment or in netrc for W&B's host."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        if path and (file := Path(path).expanduser()).is_file():
            with contextlib.suppress(netrc.NetrcParseError, OSError, UnicodeDecodeError):
                hosts = netrc.netrc(file).hosts
                return host in hosts or host.split(":")[0] in hosts
    return False
