"""Processes of one host get different devices, and a device comes back when its process is gone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CODE = """
import os
from mathverify.sweep.lease import leased_device
print(leased_device(), os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
input()
"""


def start(leases: Path) -> tuple[subprocess.Popen[str], str]:
    environment = os.environ | {"MATHVERIFY_DEVICES": "GPU-a,GPU-b", "MATHVERIFY_LEASES": str(leases)}
    process = subprocess.Popen(
        [sys.executable, "-c", CODE], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_two_processes_get_two_devices_and_a_dead_ones_is_free(tmp_path: Path) -> None:
    first, a = start(tmp_path)
    second, b = start(tmp_path)
    first.kill()
    first.communicate()
    third, again = start(tmp_path)
    for process in (second, third):
        process.communicate("\n", timeout=10)
    assert (a, b, again) == ("GPU-a GPU-a", "GPU-b GPU-b", "GPU-a GPU-a")
