"""How long and how much memory comparing thousands of runs takes.

python -m tests.benchmarks.compare_many [--runs 2000] [--rows 2000]     prints seconds of each phase and peak memory

The folders are made first, as real runs leave them (result.json of a real record, predictions.parquet), every run with
verdicts of its own. Compared are single runs, then the same as settings with eight seeds each.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console

from mathverify.compare.reading import read_runs
from mathverify.compare.show import show
from mathverify.compare.verdict import By, judge
from mathverify.records import PREDICTIONS, RESULT, write_predictions
from tests.compare.conftest import TestRows, config_of, make_run


def make_many(place: Path, runs: int, rows: TestRows) -> None:
    """Run folders whose records differ in rank and seed and whose verdicts differ at random."""
    rng = np.random.default_rng(0)
    plain = json.loads((make_run(place / "model", config_of(), rows) / RESULT).read_text())
    ease = rng.random(rows.rows)
    for number in range(runs):
        folder = place / "runs" / str(number)
        folder.mkdir(parents=True)
        plain["config"]["lora"]["rank"], plain["config"]["seed"] = 1 + number // 8, number % 8
        plain |= {"seed": number % 8, "fingerprint": f"{number:016x}"}
        (folder / RESULT).write_text(json.dumps(plain, indent=2))
        right = ease + 0.3 * rng.random(rows.rows) > 0.3
        write_predictions(folder / PREDICTIONS, rows.predictions(rows.scores(right)))


@contextmanager
def told(what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"{what:28s} {time.perf_counter() - start:7.2f} s   peak memory so far {peak:,.0f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=2000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        make_many(place, options.runs, TestRows(options.rows, int(0.8 * options.rows)))
        with told(f"read {options.runs} runs"):
            comparison = read_runs([place / "runs"])
        for by in (By.run, By.configuration):
            with told(f"judge by {by.value}"):
                verdicts = judge(comparison, by=by)
            with told("show"), Path("/dev/null").open("w") as nowhere:
                show(Console(file=nowhere), comparison, verdicts, limit=40)


if __name__ == "__main__":
    main()
