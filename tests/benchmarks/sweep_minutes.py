"""How long the mission's study takes on the embedded default, and whether kill -9 changes what comes of it.

python -m tests.benchmarks.sweep_minutes                       sweep=rank_alpha_batch, 12 trials: once in peace, then
                                                               killed at three random moments and continued each time
python -m tests.benchmarks.sweep_minutes train.max_steps=40    with further overrides

Prints the seconds of the command in peace (process start, reading, tokenising and all else included), where they went,
and whether both studies hold the same trials, values and metrics to the last bit. Exits with 1 when they do not, or when
the study in peace took more than 6 minutes.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.sweep.ends import ends

ROOT = Path(__file__).parents[2]
STUDY = "rank_alpha_batch"
MOST_SECONDS = 360


def start(place: Path, overrides: list[str]) -> subprocess.Popen[bytes]:
    place.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "mathverify.train", "-m", f"sweep={STUDY}", *overrides, f"data.cache_dir={place}/cache"],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=(place / "out.txt").open("ab"),
        stderr=subprocess.STDOUT,
    )


def to_the_end(place: Path, overrides: list[str]) -> float:
    """Seconds of the command."""
    begin = time.perf_counter()
    code = start(place, overrides).wait()
    if code != 0:
        raise SystemExit(f"the study ended with {code}:\n{(place / 'out.txt').read_text()[-3000:]}")
    return time.perf_counter() - begin


def killed(place: Path, overrides: list[str], kills: int, seconds: float, moments: random.Random) -> None:
    """The same study, killed so often and then left to finish; `seconds`: of the study in peace."""
    for place_of_kill in range(kills):
        process = start(place, overrides)
        after = moments.uniform(5.0, max(6.0, seconds / (kills + 1)))
        try:
            code = process.wait(after)
            print(f"kill {place_of_kill + 1}: it had ended with {code} before")
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            told = [line for line in (place / "out.txt").read_text().splitlines() if re.match(r"#\d+  ", line)]
            print(
                f"kill {place_of_kill + 1}: {after:.1f} s after its start, {len(told)} trials told so far", flush=True
            )
    to_the_end(place, overrides)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    overrides = [f"hydra.sweeper.n_trials={given.trials}", *given.overrides]
    with tempfile.TemporaryDirectory() as folder:
        calm, cut = Path(folder) / "calm", Path(folder) / "killed"
        seconds = to_the_end(calm, overrides)
        print((calm / "out.txt").read_text())
        print(f"{given.trials} trials: {seconds:.1f} s = {seconds / 60:.2f} minutes, to be at most 6", flush=True)
        in_peace = ends(calm / "multirun" / STUDY, STUDY)
        killed(cut, overrides, given.kills, seconds, random.Random(given.seed))
        after_kills = ends(cut / "multirun" / STUDY, STUDY)
    same = in_peace == after_kills
    states = Counter(trial["state"] for trial in in_peace)
    print(
        f"killed {given.kills} times and continued: {'the same' if same else 'OTHER'} trials and values ({dict(states)})"
    )
    for one, other in zip(in_peace, after_kills, strict=False):
        if one != other:
            print(f"  in peace {one}\n  killed   {other}")
    sys.exit(0 if same and seconds <= MOST_SECONDS else 1)


if __name__ == "__main__":
    main()
