"""A finished study as one W&B run beside its trials' runs: table, charts, best configuration. Decides nothing.

job_type `sweep`, in the trials' group; its id is the study's, so that a continued study goes on in the same one. As any
run of ours it is kept offline where W&B does not answer, and neither delays nor fails a sweep.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from typing import Any

import optuna
from omegaconf import DictConfig, OmegaConf
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from mathverify.config import RunConfig, TrackingConfig, TrackingKind, from_plain
from mathverify.errors import UserError
from mathverify.records import Status, redact
from mathverify.sweep import report
from mathverify.sweep.outcome import read_result
from mathverify.sweep.study import Session, counts
from mathverify.tracking.account import goes_online, is_disabled
from mathverify.tracking.mirror import Mirror, RunCard
from mathverify.tracking.service import outages_become_one_warning
from mathverify.tracking.vocabulary import SELECTED_BY, SWEEP_JOB, flat_config, flat_name

Row = list[Any]


def send_summary(session: Session, config: DictConfig, program: str) -> None:
    """Send the study as it stands now; returns at once within `uploads_in_background`.

    config: as Hydra composed it; nothing is sent for another program's, nor with tracking=none. program: how the
    command line starts, for the command that runs the best trial again.
    """
    if OmegaConf.get_type(config) is not RunConfig or is_disabled():
        return
    with outages_become_one_warning(session.folder):
        tracking = OmegaConf.to_object(config.tracking)
        assert isinstance(tracking, TrackingConfig)
        if tracking.kind is TrackingKind.none:
            return
        # All of it is made here: the thread that sends is not to use the study's storage.
        numbers, columns, rows = summary(session, program), table_columns(session), table_rows(session)
        charts = [history_of, *([] if len(session.directions) > 1 else [best_so_far_of, importance_of])]
        plots = [plot for make in charts if (plot := make(session)) is not None]
        mirror = Mirror(_card(session, tracking), session.folder, online=goes_online(tracking.mode))
        mirror.send(lambda run: run.log(_tables(columns, rows, plots)))
        mirror.send(lambda run: run.summary.update(numbers))
        mirror.close(Status.completed)


def _card(session: Session, tracking: TrackingConfig) -> RunCard:
    settings = session.settings
    space = {key: d.describe() for key, d in session.space.dimensions.items()}
    config = {
        "study": session.name,
        "sampler": sampler_name(session),
        "pruner": "none" if settings.pruner is None else settings.pruner["_target_"].rpartition(".")[2],
        "objective": ", ".join(f"{d} {n}" for d, n in zip(session.directions, objectives(session), strict=True)),
        "space": "; ".join(f"{key} in {values}" for key, values in space.items()),
        "fixed": " ".join(session.space.fixed),
    }
    return RunCard(
        project=tracking.project,
        entity=tracking.entity,
        group=str(redact(tracking.group or session.name)),
        name=str(redact(f"{session.name} (study)")),
        job_type=SWEEP_JOB,
        tags=tuple(str(redact(tag)) for tag in tracking.tags),
        config=redact(config),
        id=f"study{session.facts.id}",
    )


def sampler_name(session: Session) -> str:
    """'TPESampler'."""
    return str(session.settings.sampler["_target_"].rpartition(".")[2])


def objectives(session: Session) -> list[str]:
    """What the study's values are called; alone and unnamed it is the accuracy on validation."""
    return list(session.settings.objective) or [SELECTED_BY] * len(session.directions)


# Numbers and table


def summary(session: Session, program: str) -> dict[str, Any]:
    """How many trials ended how, and the best one: its number, values, every setting, and the command that runs it."""
    trials = [trial for trial in session.trials() if counts(trial)]
    numbers: dict[str, Any] = {"trials": len(trials)}
    for trial in trials:
        name = f"trials/{report.state_of(trial).replace(' ', '_')}"
        numbers[name] = numbers.get(name, 0) + 1
    best = report.best_trials(session, session.trials())
    if len(session.directions) > 1:
        numbers["pareto_front"] = ", ".join(str(trial.number) for trial in best)
    elif best:
        numbers |= {"best/trial": best[0].number, f"best/{objectives(session)[0]}": best[0].value}
        numbers |= {f"best/{key}": value for key, value in _configuration(session, best[0]).items()}
        numbers["best/command"] = report.rerun_command(best[0], program)
    redacted: dict[str, Any] = redact(numbers)
    return redacted


def _configuration(session: Session, trial: FrozenTrial) -> dict[str, Any]:
    """All settings of the trial's run, from its record; what was searched where there is none."""
    with contextlib.suppress(UserError, KeyError, TypeError, ValueError):
        return flat_config(from_plain(read_result(session.folder / str(trial.number))["config"]))
    return {flat_name(key): value for key, value in trial.params.items()}


def table_columns(session: Session) -> list[str]:
    searched = [flat_name(key) for key in session.space.dimensions]
    return ["trial", "state", *searched, *objectives(session), "steps", "examples", "seconds", "reason"]


def table_rows(session: Session) -> list[Row]:
    """One row a trial that took a place of the budget. A pruned one has no value: its last would not compare."""
    rows: list[Row] = []
    for trial in session.trials():
        if not counts(trial):
            continue
        facts = trial.user_attrs.get("facts", {})
        values: Row = list(trial.values) if trial.state is TrialState.COMPLETE else [None] * len(session.directions)
        searched = [trial.params.get(key) for key in session.space.dimensions]
        known = [report.steps_of(trial), facts.get("examples"), facts.get("seconds")]
        rows.append([trial.number, report.state_of(trial), *searched, *values, *known, trial.user_attrs.get("reason")])
    redacted: list[Row] = redact(rows)
    return redacted


# Charts: (kind, name, title, columns, rows), drawn by W&B from tables


Plot = tuple[str, str, str, list[str], list[Row]]


def _completed(session: Session) -> list[FrozenTrial]:
    return [trial for trial in session.trials() if trial.state is TrialState.COMPLETE]


def history_of(session: Session) -> Plot | None:
    """Every completed trial's value over its number; with two objectives one over the other."""
    names, done = objectives(session), _completed(session)
    if not done:
        return None
    if len(names) > 1:
        return "scatter", "objectives", f"{names[1]} and {names[0]}", [names[1], names[0]], [
            [trial.values[1], trial.values[0]] for trial in done
        ]  # fmt: skip
    return "scatter", "history", f"{names[0]} of each trial", ["trial", names[0]], [
        [trial.number, trial.values[0]] for trial in done
    ]  # fmt: skip


def best_so_far_of(session: Session) -> Plot | None:
    """The best value up to each completed trial."""
    done = _completed(session)
    better = max if session.study.directions[0] is StudyDirection.MAXIMIZE else min
    rows: list[Row] = []
    for trial in done:
        value = trial.values[0]
        rows.append([trial.number, better(value, rows[-1][1]) if rows else value])
    return ("line", "best_so_far", "best so far", ["trial", "best"], rows) if rows else None


def importance_of(session: Session) -> Plot | None:
    """Optuna's estimate of how much of the spread each searched setting explains; None when it cannot tell."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it says of few trials is nothing that a user could mend
            found = optuna.importance.get_param_importances(session.study)
    except Exception:  # too few trials, one value for all, nothing but conditional settings: it has many words for no
        return None
    rows: list[Row] = [[flat_name(key), value] for key, value in found.items() if math.isfinite(value)]
    return ("bar", "importance", "importance (Optuna)", ["setting", "importance"], rows) if len(rows) > 1 else None


def _tables(columns: list[str], rows: list[Row], plots: list[Plot]) -> dict[str, Any]:
    """What W&B logs; in the thread, where wandb is imported."""
    import wandb

    logged: dict[str, Any] = {"study/trials": wandb.Table(columns=[*columns], data=rows, allow_mixed_types=True)}
    for kind, name, title, names, points in plots:
        table = wandb.Table(columns=[*names], data=points)
        match kind:
            case "bar":
                logged[f"study/{name}"] = wandb.plot.bar(table, names[0], names[1], title=title)
            case "line":
                logged[f"study/{name}"] = wandb.plot.line(table, names[0], names[1], title=title)
            case _:
                logged[f"study/{name}"] = wandb.plot.scatter(table, names[0], names[1], title=title)
    return logged
