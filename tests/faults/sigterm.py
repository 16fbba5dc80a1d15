"""A SIGTERM in the middle of a step that takes seconds, in a run, a sweep and a pack: how long until all is saved.

python -m tests.faults.sigterm
"""

from __future__ import annotations

import argparse
import json
import signal
import tempfile
import time
from pathlib import Path

from tests.faults.commands import OUT, OwnProcess
from tests.faults.kills import PACK, RUN, SWEEP, Scenario
from tests.faults.results import write_result

LONG = ["train.batch_size=64", "train.grad_accumulation=8", "train.max_steps=3", "train.eval_every=null"]
LONG += ["train.checkpoint_every=null"]
INTO_A_STEP = 0.3
"""Seconds after a step's line at which the signal comes; the next step takes longer."""


def arguments(scenario: Scenario, place: Path, at_once: int) -> list[str]:
    """The scenario's command with three steps of 512 examples, and as many trials as train at once."""
    trials = [f"hydra.sweeper.n_trials={at_once}"] if scenario.study else []
    return [*scenario.arguments, *LONG, *trials, f"data.cache_dir='{place.parent}/cache'"]


def stop(scenario: Scenario, place: Path, at_once: int = 1) -> float:
    """Start the command in `place`, send it a SIGTERM in its second step; seconds until it has ended.

    at_once: how many runs train together. Raises AssertionError unless it ends by itself with exit code 130.
    """
    command = OwnProcess(arguments(scenario, place, at_once), place)

    def steps() -> int:
        return sum(file.read_text().count("train/loss") for file in place.glob(f"{scenario.runs}/metrics.jsonl"))

    deadline = time.monotonic() + 120
    while steps() < at_once:
        assert command.ended(0.02) is None, (place / OUT).read_text()
        assert time.monotonic() < deadline
    time.sleep(INTO_A_STEP)
    assert steps() == at_once, "the signal would come too late for the second step"
    begun = time.monotonic()
    command.signal(signal.SIGTERM)
    code = command.ended(60)
    seconds = time.monotonic() - begun
    assert code == 130, f"exit code {code}: {(place / OUT).read_text()[-3000:]}"
    return seconds


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    seconds = {}
    with tempfile.TemporaryDirectory() as work:
        for scenario, at_once in ((RUN, 1), (SWEEP, 1), (PACK, 2)):
            place = Path(work) / scenario.name
            place.mkdir()
            seconds[scenario.name] = round(stop(scenario, place, at_once), 1)
    write_result("sigterm", {"seconds": seconds})
    print(json.dumps(seconds, indent=2))


if __name__ == "__main__":
    main()
