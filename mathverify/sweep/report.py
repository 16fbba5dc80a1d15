"""What a person sees of a sweep: plan, a line a trial, table, optimization_results.yaml. Decides nothing."""

from __future__ import annotations

import shlex
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from mathverify.files import write_atomic
from mathverify.printable import printable
from mathverify.records import redact
from mathverify.sweep.composer import Composer
from mathverify.sweep.proposals import is_failure, is_infeasible
from mathverify.sweep.samplers import left_out
from mathverify.sweep.settings import Duplicates
from mathverify.sweep.storage import shown
from mathverify.sweep.study import Session, counts

RESULTS = "optimization_results.yaml"


def say(text: str) -> None:
    """One line or several to stdout, at once, without secrets and without what a terminal would obey."""
    print("\n".join(map(printable, str(redact(text)).split("\n"))), flush=True)


def plan(session: Session, composer: Composer, validated: int, at_once: int) -> str:
    """What the sweep is going to do: space, points, budget, engine, cost.

    validated: how many configs were composed and checked. at_once: most trials that run at the same time.
    """
    settings, trials = session.settings, [t for t in session.trials() if counts(t)]
    done = sum(trial.state.is_finished() for trial in trials)
    size = session.space.size
    sampler = settings.sampler["_target_"].rpartition(".")[2]
    seed = "no seed" if settings.seed is None else f"seed {settings.seed}"
    pruner = "no pruner" if settings.pruner is None else settings.pruner["_target_"].rpartition(".")[2]
    objective = ", ".join(
        f"{direction} {name}"
        for direction, name in zip(
            session.directions, settings.objective or [composer.value_name] * len(session.directions), strict=True
        )
    )
    lines = [
        f"study     {session.name} in {_near(session.folder)} ({shown(settings.storage)})",
        f"space     {'; '.join(f'{k} in {d.describe()}' for k, d in session.space.dimensions.items()) or 'one point'}",
        f"points    {'a continuous space' if size is None else size}; {validated} configs composed and valid",
        f"fixed     {' '.join(session.space.fixed) or '-'}",
        f"objective {objective}",
        f"engine    {sampler} ({seed}), {pruner}, {at_once} at once, repeated points: {settings.duplicates.value}",
        f"budget    {session.budget} trials, {done} done" + (f", {len(trials) - done} begun" * (len(trials) > done)),
        *_examples_line(composer.examples),
        f"cost      {_cost(session)}",
        *(f"note      {line}" for line in left_out(settings)),
    ]
    return "\n".join(lines)


def _examples_line(examples: set[int]) -> list[str]:
    """Told before the first trial: what looks like the effect of a batch may be that of more examples."""
    if not examples:
        return []
    text = f"{min(examples):,} a trial"
    if len(examples) > 1:
        text = (
            f"{min(examples):,} to {max(examples):,} a trial, so not only what is searched differs; "
            "train.max_examples=N gives every trial the same number"
        )
    return [f"examples  {text}"]


def _cost(session: Session) -> str:
    found = _estimate(session)
    if found is None:
        return "known after the first trial"
    each, rest, left = found
    return f"{_duration(each)} a trial so far; {_duration(rest)} for the {left} left"


def _estimate(session: Session) -> tuple[float, float, int] | None:
    """Median seconds of a trial, seconds for the rest of the study, and how many trials are left; None if none ended.

    Of a trial that runs, the part that its last validation shows as done is not counted again.
    """
    trials = [t for t in session.trials() if counts(t)]
    seconds = [s for t in trials if (s := _seconds(t)) is not None]
    if not seconds:
        return None
    left = max(_total(session) - sum(t.state.is_finished() for t in trials), 0)
    steps = max((steps_of(t) or 0 for t in trials), default=0)
    begun = sum((t.last_step or 0) / steps for t in trials if steps and not t.state.is_finished())
    each = statistics.median(seconds)
    return each, each * max(left - begun, 0.0) / session.lanes, left


def _total(session: Session) -> int:
    """How many trials the study will have: a finite space may end before the budget does."""
    size = session.space.size
    if size is None or session.settings.custom_search_space is not None:
        return session.budget
    return session.budget if session.settings.duplicates is Duplicates.train else min(session.budget, size)


def trial_lines(session: Session, trial: FrozenTrial) -> str:
    """The line of a trial that ended; after the study's first, what the others are going to cost."""
    line = trial_line(session, trial)
    done = [t for t in session.trials() if counts(t) and t.state.is_finished()]
    left = _total(session) - len(done)
    if len(done) == 1 and left > 0 and _seconds(trial) is not None:
        line += f"\ncost      {_cost(session)}"
    return line


def trial_line(session: Session, trial: FrozenTrial) -> str:
    """'#3 completed r=16 ... 300 steps 0.731; best 0.745 (#1); 4 m left'."""
    trials = [t for t in session.trials() if counts(t)]
    parts = [f"#{trial.number}", state_of(trial), params_text(trial)]
    if (steps := steps_of(trial)) is not None:
        parts.append(f"{steps} steps")
    parts.append(values_text(trial))
    if trial.user_attrs.get("reason"):
        parts.append(f"({trial.user_attrs['reason']})")
    best = best_trials(session, trials)
    if len(session.directions) > 1:
        parts.append(f"| front: {len(best)}")
    elif best:
        parts.append(f"| best {values_text(best[0])} (#{best[0].number})")
    done = sum(t.state.is_finished() for t in trials)
    total = _total(session)
    found = _estimate(session)
    rest = f", about {_duration(found[1])} left" if found is not None and found[2] else ""
    parts.append(f"| {done}/{total} done{rest}")
    return "  ".join(parts)


def table(session: Session) -> str:
    """Every trial that took a place of the budget, as aligned columns."""
    trials = [trial for trial in session.trials() if counts(trial)]
    header = ["trial", "state", "parameters", "steps", "examples", "value", "seconds", "reason"]
    rows = [header]
    for trial in trials:
        facts, seconds = trial.user_attrs.get("facts", {}), _seconds(trial)
        row = [
            str(trial.number),
            state_of(trial),
            params_text(trial),
            str(steps_of(trial) or "-"),
            str(facts.get("examples", "-")),
            values_text(trial),
            "-" if seconds is None else f"{seconds:.1f}",
            trial.user_attrs.get("reason") or "",
        ]
        rows.append(row)
    widths = [max(len(row[place]) for row in rows) for place in range(len(header))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def repeats_note(session: Session) -> str | None:
    """Which numbers are missing in the table: proposals that were turned down, since they were run before."""
    repeats = [
        f"#{t.number} (as #{t.user_attrs['duplicate_of']})"
        for t in session.trials()
        if "duplicate_of" in t.user_attrs and not counts(t)
    ]
    return f"not trained again: {', '.join(repeats)}" if repeats else None


def examples_note(session: Session) -> str | None:
    """A warning when completed trials saw different numbers of examples: more of them is an effect of its own."""
    finished = [t for t in session.trials() if t.state is TrialState.COMPLETE]
    seen = Counter(n for t in finished if (n := t.user_attrs.get("facts", {}).get("examples")) is not None)
    if len(seen) < 2:
        return None
    said = ", ".join(f"{examples:,} ({trials} trials)" for examples, trials in sorted(seen.items()))
    return (
        f"note: trials that ran to their end saw different numbers of examples: {said}. Part of a difference between "
        "them may be more data, not a bigger batch; train.max_examples=N gives every trial the same number"
    )


def best_trials(session: Session, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The best completed trial (the first of equals), or the Pareto front; a repeated point counts once."""
    done = [t for t in trials if t.state is TrialState.COMPLETE and "duplicate_of" not in t.user_attrs]
    signs = [-1.0 if d is StudyDirection.MAXIMIZE else 1.0 for d in session.study.directions]
    costs = {t.number: [s * v for s, v in zip(signs, t.values, strict=True)] for t in done}
    if len(signs) == 1:
        return [min(done, key=lambda t: (costs[t.number], t.number))] if done else []

    def dominated(one: FrozenTrial) -> bool:
        own = costs[one.number]
        return any(o != own and all(a <= b for a, b in zip(o, own, strict=True)) for o in costs.values())

    return [t for t in done if not dominated(t)]


def write_results(session: Session) -> dict[str, Any]:
    """optimization_results.yaml, with hydra-optuna-sweeper's keys, in the study's folder; returns what it holds."""
    best = best_trials(session, session.trials())
    results: dict[str, Any] = {"name": "optuna"}
    if len(session.directions) > 1:
        results["solutions"] = [{"params": dict(t.params), "values": list(t.values)} for t in best]
    elif best:
        results |= {"best_params": dict(best[0].params), "best_value": best[0].value}
    write_atomic(session.folder / RESULTS, yaml.safe_dump(results, sort_keys=False, allow_unicode=True).encode())
    return results


def summary(session: Session) -> str:
    """'12 trials: 9 completed, 2 pruned, 1 failed'."""
    trials = [t for t in session.trials() if counts(t)]
    tally = dict.fromkeys(("completed", "pruned", "failed", "out of memory", "running"), 0)
    for trial in trials:
        tally[state_of(trial)] = tally.get(state_of(trial), 0) + 1
    always = ("completed", "pruned", "failed")
    return f"{len(trials)} trials: " + ", ".join(f"{n} {name}" for name, n in tally.items() if n or name in always)


def closing(session: Session, program: str) -> str:
    """The end of a sweep: table, best, and the command that runs the best again."""
    lines = [table(session)]
    lines.extend(note for note in (repeats_note(session), examples_note(session)) if note)
    best = best_trials(session, session.trials())
    several = len(session.directions) > 1
    if several and best:
        lines.append("Pareto front: " + "; ".join(f"#{t.number} {values_text(t)} ({params_text(t)})" for t in best))
    for trial in best:
        if not several:
            lines.append(f"best: #{trial.number}, {values_text(trial)}, {params_text(trial)}")
        lines.append(f"run {'#' + str(trial.number) if several else 'it'} again: {rerun_command(trial, program)}")
    return "\n".join(lines)


def rerun_command(trial: FrozenTrial, program: str) -> str:
    """The command line that runs exactly this trial's config, on its own."""
    return shlex.join([*shlex.split(program), *trial.user_attrs["job"]["overrides"]])


def program() -> str:
    """How this process was started, up to the overrides: 'python -m mathverify.train --config-name x'."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    start = ["python", "-m", spec.name] if spec is not None and spec.name else ["python", sys.argv[0]]
    flags: list[str] = []
    rest = sys.argv[1:]
    for place, word in enumerate(rest):
        if word.startswith("--config-") or word in ("-cp", "-cn", "-cd"):
            flags.append(word)
            if "=" not in word and place + 1 < len(rest):
                flags.append(rest[place + 1])
    return shlex.join(start + flags)


def continuing_command() -> str:
    """The command line that was given, which also continues the study; without passwords."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    start = ["python", "-m", spec.name] if spec is not None and spec.name else ["python", sys.argv[0]]
    command = shlex.join([*start, *sys.argv[1:]])
    safe = str(redact(command))
    return safe if safe == command else f"{safe} (with the password in place of what is redacted)"


# Parts of lines


def _near(folder: Path) -> Path:
    """A folder as it is named from here."""
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def state_of(trial: FrozenTrial) -> str:
    """A trial's state as the table names it."""
    if is_infeasible(trial):
        return "out of memory"
    match trial.state:
        case TrialState.COMPLETE:
            return "repeated" if "duplicate_of" in trial.user_attrs else "completed"
        case TrialState.PRUNED:
            return "pruned"
        case TrialState.FAIL:
            return "failed" if is_failure(trial) else "repeated"
        case _:
            return "running"


def params_text(trial: FrozenTrial) -> str:
    """'rank=16 alpha=32': the last part of each key is enough where it is unique."""
    short = [key.rpartition(".")[2] for key in trial.params]
    names = {key: s if short.count(s) == 1 else key for key, s in zip(trial.params, short, strict=True)}
    return " ".join(f"{names[key]}={_number(value)}" for key, value in trial.params.items()) or "-"


def values_text(trial: FrozenTrial) -> str:
    """The objectives; for a pruned trial its last validation."""
    if trial.state is TrialState.COMPLETE:
        return ", ".join(_number(value) for value in trial.values)
    if trial.last_step is not None:
        return _number(trial.intermediate_values[trial.last_step])
    return "-"


def steps_of(trial: FrozenTrial) -> int | None:
    """Optimizer steps: of the run's record, else of its last validation."""
    steps = trial.user_attrs.get("facts", {}).get("steps", trial.last_step)
    return None if steps is None else int(steps)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _seconds(trial: FrozenTrial) -> float | None:
    """What a trial took; a run's own account where there is one: a resumed trial's clock ran while nothing did."""
    if "seconds" in (facts := trial.user_attrs.get("facts", {})):
        return float(facts["seconds"])
    if trial.duration is None or "duplicate_of" in trial.user_attrs:
        return None
    return trial.duration.total_seconds()


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
