"""How long the command takes to answer, and to take its first training step.

python -m tests.benchmarks.startup [--repeat 3]      prints a table: best and median seconds of each command

Each is a process of its own. The first step's time is when its line is in metrics.jsonl, from a cold start of the
process with an empty token cache.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "mathverify.train"]


def seconds_to_answer(*arguments: str) -> float:
    start = time.perf_counter()
    subprocess.run([*COMMAND, *arguments], check=True, capture_output=True, env=_environment())
    return time.perf_counter() - start


def seconds_to_first_step() -> float:
    with tempfile.TemporaryDirectory() as place:
        arguments = ["tracking.mode=offline", "hydra.run.dir=run", f"data.cache_dir={place}/cache"]
        start = time.perf_counter()
        process = subprocess.Popen([*COMMAND, *arguments], cwd=place, stdout=subprocess.DEVNULL, env=_environment())
        metrics = Path(place) / "run" / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None:
                raise RuntimeError(f"the run ended with {process.returncode} before its first step")
            time.sleep(0.005)
        seconds = time.perf_counter() - start
        process.kill()
        process.wait()
        return seconds


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    repeat = parser.parse_args().repeat
    rows: dict[str, Callable[[], float]] = {
        "--help": lambda: seconds_to_answer("--help"),
        "--cfg job": lambda: seconds_to_answer("--cfg", "job"),
        "first training step": seconds_to_first_step,
    }
    for name, work in rows.items():
        times = [work() for _ in range(repeat)]
        print(f"{name:22s} best {min(times):6.2f} s   median {statistics.median(times):6.2f} s   of {repeat}")


if __name__ == "__main__":
    main()
