"""Runs and sweeps killed with -9 at random moments; the same command continues, and it ends like one nobody touched.

python -m tests.faults.kills --times 100

After every kill all files that a reader may open must be whole; in the end no finished trial may be lost or repeated, and
every metric, score, weight and loss must be bitwise that of an uninterrupted run (CPU, one thread).
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults.commands import OUT, Forked, OwnProcess, Running
from tests.faults.killer import Event
from tests.faults.results import write_result
from tests.journeys.conftest import SMALL

MOST_KILLS = 5
"""Of one folder, before it is left to end: a trial may be started ten times before the sweeper gives it up."""

COMMON = [*SMALL, "lora=r4", "train.max_steps=6", "train.eval_every=3", "train.checkpoint_every=2", "train.threads=1"]
STUDY = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.study_name=s", "hydra.sweeper.sampler.seed=1"]
STUDY += ["hydra.sweeper.n_trials=3", "hydra.sweeper.sampler.n_startup_trials=2"]
SPACE = ["lora.rank=choice(2,4,8)", "optimizer.learning_rate=tag(log,interval(1e-4,1e-2))"]


@dataclass(frozen=True)
class Scenario:
    """A command, and where it leaves what: run folders by glob, and whether there is a study.

    exact: it ends bitwise like the uninterrupted one. A pack does not: which trials are left to share a pass with after
    a kill changes the order of additions, so there the invariant of packs holds, a tolerance.
    """

    name: str
    arguments: Sequence[str]
    runs: str
    study: bool = False
    wandb: bool = False
    exact: bool = True


RUN = Scenario("run", [*COMMON, "hydra.run.dir=run"], "run")
WITH_WANDB = Scenario("run with W&B", [*COMMON, "tracking=wandb", "tracking.mode=offline", "hydra.run.dir=run"], "run", wandb=True)  # fmt: skip
SWEEP = Scenario("sweep", [*STUDY, *COMMON, *SPACE], "multirun/s/[0-9]*", study=True)
# Its sampler looks at no other trial: with two trials at once it depends on chance which are told when one is proposed.
TOGETHER = ["hydra/launcher=pack", "hydra.sweeper.n_jobs=2", "hydra/sweeper/sampler=random"]
PACK = Scenario(
    "sweep as a pack", [*STUDY[:-1], *TOGETHER, *COMMON, *SPACE], "multirun/s/[0-9]*", study=True, exact=False
)


def scenarios() -> list[Scenario]:
    """What this checkout can do."""
    from hydra.core.config_store import ConfigStore

    from mathverify.entry import register_schema

    register_schema()
    launchers = ConfigStore.instance().repo.get("hydra", {}).get("launcher", {})
    return [RUN, WITH_WANDB, SWEEP, *([PACK] if "pack.yaml" in launchers else [])]


# Moments


@dataclass(frozen=True)
class Moment:
    """When to die: after so many seconds, or at an event (killer.py)."""

    name: str
    seconds: float | None = None
    event: Event = field(default_factory=dict)


def moment(dice: random.Random, scenario: Scenario, duration: float, earlier: int) -> Moment:
    """A random one. duration: seconds of the whole command. earlier: kills of this folder, after which less is left."""

    def number(most: int) -> int:
        return dice.randint(1, max(1, most // (1 + earlier)))

    def call(name: str, function: str, most: int, *when: str | float) -> Moment:
        count = number(most)
        event = {
            "event": "call",
            "function": function,
            "count": count,
            "when": dice.choice(when or ("before", "after")),
        }
        return Moment(name, event=event)

    def rename(name: str, file: str, most: int) -> Moment:
        event = {"event": "rename", "file": file, "count": number(most), "when": dice.choice(("before", "after"))}
        return Moment(name, event=event)

    trials = 3 if scenario.study else 1
    choices = [
        lambda: Moment("any time", seconds=dice.uniform(0.3, 1.0) * duration),
        lambda: call("a step", "mathverify.engine.pack:Pack.step", 4 * trials),
        lambda: call("evaluation", "mathverify.engine.evaluate:_score_part", 4 * trials),
        lambda: rename("checkpoint write", "step-*.safetensors", 2 * trials),
        lambda: call("checkpoint write", "mathverify.engine.tensor_file:save_file", 2 * trials),
        lambda: rename("result write", "result.json", 2 * trials),
        lambda: rename("predictions write", "predictions.parquet", trials),
        lambda: rename("adapter write", "adapter_*", trials),
        lambda: call("a file's sync", "mathverify.files:sync", 6 * trials, "before"),
    ]
    if scenario.study:
        choices += 3 * [lambda: call("study update", "mathverify.sweep.storage:Journal.append_logs", 25, "before", "after", "torn")]  # fmt: skip
        choices.append(lambda: call("the last words", "mathverify.sweep.report:write_results", 1))
    if scenario.wandb:
        choices += 4 * [
            lambda: call("W&B finish", "mathverify.tracking.mirror:Mirror.close", 1, "before", 0.05, 0.3, "after")
        ]
    return dice.choice(choices)()


# Killing


@dataclass
class Tally:
    """What came of it. ends: folders that were brought to their end and compared."""

    kills: int = 0
    ends: int = 0
    in_processes_of_their_own: int = 0
    by_moment: dict[str, int] = field(default_factory=dict)
    by_scenario: dict[str, int] = field(default_factory=dict)

    def count(self, at: Moment, scenario: Scenario, own: bool) -> None:
        self.kills += 1
        self.in_processes_of_their_own += own
        self.by_moment[at.name] = self.by_moment.get(at.name, 0) + 1
        self.by_scenario[scenario.name] = self.by_scenario.get(scenario.name, 0) + 1


Start = Callable[[Sequence[str], Path, Event], Running]


def died(scenario: Scenario, place: Path, at: Moment, start: Start) -> bool:
    """Run the command until it is killed; False if it ended before that."""
    command = start(_arguments(scenario, place), place, at.event)
    code = command.ended(at.seconds if at.seconds is not None else 300)
    if code is None:
        command.signal(signal.SIGKILL)
        code = command.ended(60)
    assert code in (0, -signal.SIGKILL), f"exit code {code}: {(place / OUT).read_text()[-3000:]}"
    return code != 0


def finish(scenario: Scenario, place: Path, start: Start) -> float:
    """Let the command end; returns its seconds."""
    begun = time.monotonic()
    code = start(_arguments(scenario, place), place, {}).ended(600)
    assert code == 0, f"exit code {code}: {(place / OUT).read_text()[-3000:]}"
    return time.monotonic() - begun


def _arguments(scenario: Scenario, place: Path) -> list[str]:
    return [*scenario.arguments, f"data.cache_dir='{place.parent}/cache'"]


# What is there


def whole(scenario: Scenario, place: Path) -> None:
    """Open every file that a reader, or the next process, may open."""
    from safetensors import safe_open

    from mathverify.records import read_predictions, read_record

    for folder in place.glob(scenario.runs):
        if (folder / "result.json").exists():
            read_record(folder)
        if (folder / "predictions.parquet").exists():
            read_predictions(folder / "predictions.parquet")
        for file in [*folder.glob("checkpoint/*.safetensors"), *folder.glob("adapter/*.safetensors")]:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (not a dict)
                    opened.get_tensor(key)
        for file in folder.glob("adapter/*.json"):
            json.loads(file.read_text())
        if (folder / "metrics.jsonl").exists():
            for words in (folder / "metrics.jsonl").read_text().splitlines():
                json.loads(words)
    if scenario.study and (journal := place / "multirun/s/study.journal").exists():
        for line in journal.read_bytes().split(b"\n")[:-1]:  # what comes after the last line's end is torn, or nothing
            json.loads(line)


def finished(scenario: Scenario, place: Path) -> dict[str, tuple[int, bytes]]:
    """{run folder: (time of writing, content)} of the results of runs that are completed."""
    found = {}
    for file in place.glob(f"{scenario.runs}/result.json"):
        content = file.read_bytes()
        if json.loads(content)["status"] == "completed":
            found[str(file.parent.relative_to(place))] = (file.stat().st_mtime_ns, content)
    return found


def told(scenario: Scenario, place: Path) -> dict[int, Any]:
    """{number: (state, parameters, values)} of the study's finished trials."""
    if not scenario.study or not (place / "multirun/s/study.journal").exists():
        return {}
    import optuna

    from mathverify.sweep.storage import open_storage

    try:
        study = optuna.load_study(study_name="s", storage=open_storage(None, place / "multirun/s"))
    except KeyError:  # killed before it was made
        return {}
    return {t.number: (t.state.name, t.params, t.values) for t in study.trials if t.state.is_finished()}


def end_of(scenario: Scenario, place: Path) -> dict[str, Any]:
    """All that must be bitwise equal in the end."""
    from mathverify.records import read_predictions

    ends: dict[str, Any] = {"study": told(scenario, place)}
    for folder in sorted(place.glob(scenario.runs)):
        record = json.loads((folder / "result.json").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        ends[folder.name] = {
            "status": record["status"],
            "metrics": record["metrics"],
            "steps": record["costs"]["optimizer_steps"],
            "scores": read_predictions(folder / "predictions.parquet").scores.tobytes(),
            "weights": (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
            "losses": [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line],
            "validations": [
                (line["step"], line["validation/accuracy"]) for line in lines if "validation/accuracy" in line
            ],
        }
        assert not list(folder.rglob("*.tmp")), "a temporary file is left"
    assert not list(place.glob("multirun/s/.*.tmp")), "a temporary file is left in the study's folder"
    return ends


def require_same(scenario: Scenario, ends: dict[str, Any], calm: dict[str, Any]) -> None:
    """Ends are those of a command that nobody touched: bitwise, or within the tolerance of packs."""
    (_require_equal if scenario.exact else _require_close)(ends, calm)


def _require_equal(ends: dict[str, Any], calm: dict[str, Any]) -> None:
    assert ends.keys() == calm.keys(), f"{sorted(ends)} instead of {sorted(calm)}"
    for name, end in calm.items():
        for key, value in end.items():
            assert ends[name].get(key) == value, f"{name}: {key} differs from the uninterrupted run's"
        assert ends[name].keys() == end.keys()


def _require_close(ends: dict[str, Any], calm: dict[str, Any]) -> None:
    """The same trials, parameters, states and steps; losses and scores within the tolerance of packs."""
    assert ends.keys() == calm.keys(), f"{sorted(ends)} instead of {sorted(calm)}"
    for name, end in calm.items():
        if name == "study":
            for number, (state, parameters, values) in end.items():
                assert ends[name][number][:2] == (state, parameters), f"trial {number}: {ends[name][number]}"
                assert np.allclose(ends[name][number][2], values, atol=1.01 / 48), "more than one row judged otherwise"
            continue
        assert (ends[name]["status"], ends[name]["steps"]) == (end["status"], end["steps"])
        assert np.allclose(ends[name]["losses"], end["losses"], rtol=1e-5, atol=1e-7), f"{name}: losses"
        ours, theirs = (np.frombuffer(e["scores"]) for e in (ends[name], end))
        assert np.allclose(ours, theirs, rtol=0, atol=1e-4), f"{name}: scores"


# The whole


def kill_often(times: int, seed: int, chosen: Sequence[Scenario], say: Callable[[str], None] = print) -> Tally:
    """Kill until `times` kills have been counted, and bring every folder to its end.

    Every fifth folder is worked on by processes as a user starts them, the others by forks of a warm one.

    Raises:
        AssertionError: something was torn, lost, repeated or different.
    """
    dice, tally = random.Random(seed), Tally()
    with tempfile.TemporaryDirectory() as work:
        calm = {scenario.name: _calm(scenario, Path(work)) for scenario in chosen}
        while tally.kills < times:
            scenario = chosen[tally.ends % len(chosen)]
            place = _new(Path(work) / str(tally.ends))
            _one_folder(scenario, place, dice, tally, times, calm[scenario.name])
            say(f"{tally.kills}/{times} kills, {tally.ends} folders brought to the same end (last: {scenario.name})")
            shutil.rmtree(place)
    return tally


@dataclass(frozen=True)
class Calm:
    """How a scenario ends that nobody touches. seconds: of a process of its own, and of a fork."""

    end: dict[str, Any]
    seconds: tuple[float, float]


def _calm(scenario: Scenario, work: Path) -> Calm:
    own, forked = (_new(work / f"calm-{scenario.name}-{how}") for how in ("own", "forked"))
    finish(scenario, _new(work / f"first-{scenario.name}"), Forked)  # warms the cache
    seconds = finish(scenario, own, OwnProcess), finish(scenario, forked, Forked)
    end = end_of(scenario, own)
    require_same(scenario, end_of(scenario, forked), end)
    return Calm(end, seconds)


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _one_folder(scenario: Scenario, place: Path, dice: random.Random, tally: Tally, times: int, calm: Calm) -> None:
    own = tally.ends % 5 == 4
    start: Start = OwnProcess if own else Forked
    done: dict[str, tuple[int, bytes]] = {}
    study: dict[int, Any] = {}
    for earlier in range(dice.randint(2, MOST_KILLS)):
        at = moment(dice, scenario, calm.seconds[not own], earlier)
        was_killed = died(scenario, place, at, start)
        whole(scenario, place)
        now, trials = finished(scenario, place), told(scenario, place)
        assert done.items() <= now.items(), f"a finished run was lost or done again after {at}"
        assert study.keys() <= trials.keys() and all(trials[n] == end for n, end in study.items()), f"{at}: {trials}"
        done, study = now, trials
        if not was_killed:
            break
        tally.count(at, scenario, own)
        if tally.kills == times:
            break
    finish(scenario, place, start)
    now = finished(scenario, place)
    assert done.items() <= now.items(), "a finished run was lost or done again"
    require_same(scenario, end_of(scenario, place), calm.end)
    tally.ends += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="name of one scenario")
    options = parser.parse_args()
    chosen = [s for s in scenarios() if options.only in (None, s.name)]
    begun = time.monotonic()
    tally = kill_often(options.times, options.seed, chosen)
    figures = asdict(tally) | {"seed": options.seed, "seconds": round(time.monotonic() - begun)}
    write_result("kills", figures)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
