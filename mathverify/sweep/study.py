"""One study and what we keep in it: opening, the check that a resumed study is still the same one, marks on trials."""

from __future__ import annotations

import json
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import optuna
from optuna.distributions import distribution_to_json, json_to_distribution
from optuna.pruners import NopPruner
from optuna.samplers import BaseSampler, RandomSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from mathverify.errors import UserError
from mathverify.records import redact
from mathverify.sweep.samplers import make_pruner, make_sampler
from mathverify.sweep.settings import Settings
from mathverify.sweep.space import Dimension, Space
from mathverify.sweep.storage import alone, open_storage, shown

T = TypeVar("T")

FACTS = "mathverify"
"""Study attribute: what the study was made of (StudyFacts)."""


@dataclass(frozen=True)
class StudyFacts:
    """What must not change while a study lives. space: distributions by key, as JSON. base: the trials' common config,
    without secrets. folder: where the trials' folders are. id: random, so that leftovers of another study are told."""

    id: str
    space: dict[str, str]
    base: dict[str, Any]
    directions: list[str]
    objective: list[str]
    folder: str

    def to_plain(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass
class Session:
    """An open study with everything that proposing, running and telling its trials needs."""

    settings: Settings
    study: optuna.Study
    storage: BaseStorage
    name: str
    folder: Path
    space: Space
    facts: StudyFacts

    @property
    def directions(self) -> list[str]:
        return self.facts.directions

    def alone(self, section: Callable[[], T]) -> T:
        """Run `section` while no other worker of the study proposes, takes over or tells; see storage.alone."""
        return alone(self.storage, self.name, self.folder, section)

    def trials(self) -> list[FrozenTrial]:
        """All trials by number, as they are now; not to be changed."""
        self.study._thread_local.cached_all_trials = None
        return self.study.get_trials(deepcopy=False)

    def trial(self, number: int) -> FrozenTrial:
        return self.trials()[number]

    def mark(self, trial: FrozenTrial | optuna.Trial, **marks: Any) -> None:
        """Write marks (user attributes) on a trial that is not finished."""
        for key, value in marks.items():
            self.storage.set_trial_user_attr(trial._trial_id, key, value)


def quiet_optuna() -> None:
    """One line a trial is ours to print; warnings about experimental features are not the user's business."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def study_name(settings: Settings, folder: Path) -> str:
    """The name given, or that of the sweep folder."""
    return settings.study_name or "-".join(folder.parts[-2:])


def open_session(
    settings: Settings, space: Space, directions: tuple[str, ...], base: Mapping[str, Any], folder: Path
) -> Session:
    """Open the study, making it if there is none.

    Raises:
        UserError: the storage cannot be opened, or holds a study of this name made of something else.
    """
    quiet_optuna()
    name = study_name(settings, folder)
    sampler, pruner = make_sampler(settings, space), make_pruner(settings)
    storage = open_storage(settings.storage, folder)
    ours = StudyFacts(
        id=secrets.token_hex(8),
        space={key: distribution_to_json(d.distribution) for key, d in space.dimensions.items()},
        base=redact(dict(base)),
        directions=list(directions),
        objective=list(settings.objective),
        folder=str(folder.absolute()),
    )

    def make_or_check() -> tuple[optuna.Study, StudyFacts]:
        study = optuna.create_study(
            storage=storage,
            sampler=sampler,
            pruner=pruner,
            study_name=name,
            directions=cast(Sequence[Literal["minimize", "maximize"]], directions),
            load_if_exists=True,
        )
        theirs = study.user_attrs.get(FACTS)
        if theirs is None:
            if study.get_trials(deepcopy=False):
                raise UserError(
                    f"study {name} in {shown(settings.storage)} was made by another program: "
                    "choose another hydra.sweeper.study_name"
                )
            study.set_user_attr(FACTS, ours.to_plain())
            return study, ours
        facts = StudyFacts(**theirs)
        _require_same(name, facts, ours)
        return study, facts

    study, facts = alone(storage, name, folder, make_or_check)
    return Session(settings, study, storage, name, folder, space, facts)


def open_existing(settings: Settings, folder: Path, sampler: BaseSampler | None = None) -> Session:
    """The study from within one of its jobs: nothing is made, nothing is proposed.

    Raises:
        UserError: there is no such study.
    """
    quiet_optuna()
    name = study_name(settings, folder)
    storage = open_storage(settings.storage, folder, patient=True)
    try:
        study = optuna.load_study(
            study_name=name, storage=storage, sampler=sampler or RandomSampler(), pruner=NopPruner()
        )
    except KeyError:
        raise UserError(
            f"study {name} is not in {shown(settings.storage)} ({folder}): a job belongs to the sweep that started it"
        ) from None
    facts = StudyFacts(**study.user_attrs[FACTS])
    space = Space({k: Dimension(k, json_to_distribution(text)) for k, text in facts.space.items()})
    study.pruner = make_pruner(settings)
    return Session(settings, study, storage, name, folder, space, facts)


def _require_same(name: str, theirs: StudyFacts, ours: StudyFacts) -> None:
    remedy = "give back what it was, or start another study (hydra.sweeper.study_name=...)"
    for what in ("directions", "objective"):
        if getattr(theirs, what) != getattr(ours, what):
            was, now = (", ".join(getattr(facts, what)) or "the task's value" for facts in (theirs, ours))
            raise UserError(f"study {name} was made with {what} {was}, now {now}: {remedy}")
    keys = [*theirs.space, *(key for key in ours.space if key not in theirs.space)]
    for key in keys:
        was, now = (_describe(key, facts.space.get(key)) for facts in (theirs, ours))
        if was != now:
            raise UserError(f"study {name} was made with {key} in {was}, now {now}: {remedy}")
    was_base, now_base = _flat(theirs.base), _flat(ours.base)
    for key in sorted(was_base.keys() | now_base.keys()):
        if was_base.get(key) != now_base.get(key):
            raise UserError(
                f"study {name} was made with {key} = {was_base.get(key)}, now {now_base.get(key)}, "
                f"so its trials would not compare: {remedy}"
            )


def _describe(key: str, text: str | None) -> str:
    return "no search" if text is None else Dimension(key, json_to_distribution(text)).describe()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.loads(json.dumps(value))
    return flat


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial takes a place of the budget; a repeated proposal that was turned down does not."""
    return not (trial.state is TrialState.FAIL and "duplicate_of" in trial.user_attrs)
