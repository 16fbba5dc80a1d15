"""n_jobs > 1 without a launcher of Hydra's: the same command in several processes, which share the study.

A free process takes the next trial, none waits for the slowest, and each leases its own GPU (lease.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time

WORKER_VARIABLE = "MATHVERIFY_WORKER"
PR_SET_PDEATHSIG = 1


def is_worker() -> bool:
    """Whether this process was started by `run_workers`: it plans and reports nothing, only runs trials."""
    return WORKER_VARIABLE in os.environ


def run_workers(count: int) -> list[int]:
    """Run this very command `count` times side by side, to the end; returns their exit codes.

    A signal to this process is passed on, and then waited for, so that every trial is checkpointed. If this process is
    killed outright, the workers get SIGTERM from the kernel.
    """
    threads = str(max(1, (os.cpu_count() or 1) // count))
    # Not a terminal to rich: the bars of several processes would overwrite each other.
    environment = {"OMP_NUM_THREADS": threads, "TTY_COMPATIBLE": "0"} | os.environ
    workers = [
        subprocess.Popen(
            sys.orig_argv,
            env=environment | {WORKER_VARIABLE: f"{place}"},
            preexec_fn=_die_with_parent,
            start_new_session=True,  # Ctrl-C reaches them through us, once
        )
        for place in range(count)
    ]
    try:
        return [worker.wait() for worker in workers]
    except BaseException:
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                worker.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 60
        for worker in workers:
            try:
                worker.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.kill()
        raise


def _die_with_parent() -> None:
    """In the child, before it becomes the command."""
    with contextlib.suppress(OSError, AttributeError):  # Linux only; elsewhere orphans finish the study by themselves
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
