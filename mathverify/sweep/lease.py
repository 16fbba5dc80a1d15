"""One GPU for each process of a host: a lock per device, held while the process works. Imports no torch.

Without it every trial of a sweep that runs on one host lands on the first GPU.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

VISIBLE = "CUDA_VISIBLE_DEVICES"
DEVICES_VARIABLE = "MATHVERIFY_DEVICES"
"""Ids to lease instead of the GPUs that nvidia-smi lists; for tests, and for devices that it does not know."""

_held: tuple[str, int] | None = None
_before: str | None = None
"""What CUDA_VISIBLE_DEVICES was before the lease."""
_bound: str | None = None
"""The device on which this process has begun to use CUDA: it can use no other from then on."""


def leased_device(config: Any = None, poll: float = 1.0) -> str | None:
    """Lease a device for this process and make it the only visible one; waits while all are taken.

    The lease ends with `give_device_back` or the process.

    Returns:
        Its id; None when there is none to lease, when Slurm has dealt a single one to this job, or when `device` of the
        config names one.
    """
    global _held, _before
    if _held is not None:
        return _held[0]
    wanted = config.get("device", "auto") if hasattr(config, "get") else "auto"
    ids = device_ids() if wanted in ("auto", "cuda") else []
    if not ids or ("SLURM_JOB_GPUS" in os.environ and len(ids) == 1):
        return None
    waited = False
    while _held is None:
        _held = next((held for held in map(_try, ids) if held is not None), None)
        if _held is None:
            if not waited:
                print(f"waiting for a device: all of {', '.join(ids)} are taken by other trials", flush=True)
            waited = True
            time.sleep(poll)
    _before = os.environ.get(VISIBLE)
    os.environ[VISIBLE] = _held[0]
    return _held[0]


def give_device_back() -> None:
    """End the lease. A process that has used CUDA goes on with the same device when it leases again."""
    global _held, _bound
    if _held is None:
        return
    device, handle = _held
    _held = None
    os.close(handle)
    if _uses_cuda():
        _bound = device
    elif _before is None:
        os.environ.pop(VISIBLE, None)
    else:
        os.environ[VISIBLE] = _before


def _uses_cuda() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized())


def device_ids() -> list[str]:
    """Devices of this host that this process may use: as CUDA_VISIBLE_DEVICES says, else all that nvidia-smi lists.

    GPUs go by their UUID where nvidia-smi is there: indices mean different GPUs in different containers.
    """
    if _bound is not None:
        return [_bound]
    if DEVICES_VARIABLE in os.environ:
        return _listed(os.environ[DEVICES_VARIABLE])
    uuids = _uuids()
    if VISIBLE not in os.environ:
        return uuids
    visible = _listed(os.environ[VISIBLE])
    return [uuids[int(v)] if v.isdigit() and int(v) < len(uuids) else v for v in visible if uuids]


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _uuids() -> list[str]:
    try:
        command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split() if done.returncode == 0 else []


def _try(device: str) -> tuple[str, int] | None:
    folder = Path(os.environ.get("MATHVERIFY_LEASES", Path(tempfile.gettempdir()) / f"mathverify-{os.getuid()}"))
    folder.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() or c in "-_" else "_" for c in device)
    handle = os.open(folder / f"{name}.lease", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return device, handle
