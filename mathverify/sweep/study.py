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
from mathverify.files import remove_leftovers, write_atomic
from mathverify.records import RESULT, redact
from mathverify.sweep.samplers import make_pruner, make_sampler
from mathverify.sweep.settings import Settings
from mathverify.sweep.space import Dimension, Space
from mathverify.sweep.storage import JOURNAL, alone, existing_storage, open_storage, shown

T = TypeVar("T")

FACTS = "mathverify"
"""Study attribute: what the study was made of (StudyFacts)."""

MARK = ".study"
"""File in a study's folder that says whose trials are there: the study's id."""


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
    """An open study with everything that proposing, running and telling its trials needs.

    lanes: how many trials take time side by side; the runs of a pack share it, each counting its own part.
    """

    settings: Settings
    study: optuna.Study
    storage: BaseStorage
    name: str
    folder: Path
    space: Space
    facts: StudyFacts
    lanes: int = 1

    @property
    def directions(self) -> list[str]:
        return self.facts.directions

    def alone(self, section: Callable[[], T]) -> T:
        """Run `section` while no other worker of the study proposes, takes over or tells; see storage.alone."""
        return alone(self.storage, self.name, self.folder, section)

    @property
    def budget(self) -> int:
        """The study's total of trials."""
        points = self.space.size
        assert self.settings.n_trials is not None or points is not None
        return self.settings.n_trials or points or 0

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
        UserError: the storage cannot be opened, or holds a study of this name made of something else; or the folder
            holds the trials of another study.
    """
    quiet_optuna()
    name = study_name(settings, folder)
    folder = folder.absolute()  # jobs may change the current folder
    sampler, pruner = make_sampler(settings, space), make_pruner(settings)
    if settings.storage is None and not (folder / JOURNAL).exists():
        _refuse_foreign(folder, None)  # before a journal is made there
    storage = open_storage(settings.storage, folder)
    ours = _facts(settings, space, directions, base, folder)

    def make_or_check() -> tuple[optuna.Study, StudyFacts]:
        _refuse_foreign(folder, _loaded(name, storage))
        study = optuna.create_study(
            storage=storage,
            sampler=sampler,
            pruner=pruner,
            study_name=name,
            directions=cast(Sequence[Literal["minimize", "maximize"]], directions),
            load_if_exists=True,
        )
        facts = _agreed(study, settings, ours)
        if FACTS not in study.user_attrs:
            study.set_user_attr(FACTS, facts.to_plain())
        if not (folder / MARK).exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / MARK, facts.id.encode())
        remove_leftovers(folder)
        return study, facts

    study, facts = alone(storage, name, folder, make_or_check)
    return Session(settings, study, storage, name, folder, space, facts)


def look_at_session(
    settings: Settings, space: Space, directions: tuple[str, ...], base: Mapping[str, Any], folder: Path
) -> Session:
    """What `open_session` would open, for a look at it: a study that is not there yet is made in memory only.

    Raises:
        UserError: as `open_session`.
    """
    quiet_optuna()
    name = study_name(settings, folder)
    folder = folder.absolute()
    sampler, pruner = make_sampler(settings, space), make_pruner(settings)
    ours = _facts(settings, space, directions, base, folder)
    storage = existing_storage(settings.storage, folder)
    study = _loaded(name, storage) if storage is not None else None
    _refuse_foreign(folder, study)
    if study is None:
        study = optuna.create_study(directions=cast(Sequence[Literal["minimize", "maximize"]], directions))
    facts = _agreed(study, settings, ours)
    study.sampler, study.pruner = sampler, pruner
    return Session(settings, study, study._storage, name, folder, space, facts)


def _facts(
    settings: Settings, space: Space, directions: tuple[str, ...], base: Mapping[str, Any], folder: Path
) -> StudyFacts:
    return StudyFacts(
        id=secrets.token_hex(8),
        space={key: distribution_to_json(d.distribution) for key, d in space.dimensions.items()},
        base=redact(dict(base)),
        directions=list(directions),
        objective=list(settings.objective),
        folder=str(folder),
    )


def _loaded(name: str, storage: BaseStorage) -> optuna.Study | None:
    try:
        return optuna.load_study(study_name=name, storage=storage, sampler=RandomSampler(), pruner=NopPruner())
    except KeyError:
        return None


def _agreed(study: optuna.Study, settings: Settings, ours: StudyFacts) -> StudyFacts:
    """The facts that hold for a study: its own, once it is sure that ours are the same."""
    theirs = study.user_attrs.get(FACTS)
    if theirs is not None:
        _require_same(study.study_name, StudyFacts(**theirs), ours)
        return StudyFacts(**theirs)
    if study.get_trials(deepcopy=False):
        raise UserError(
            f"study {study.study_name} in {shown(settings.storage)} was made by another program: "
            "choose another hydra.sweeper.study_name"
        )
    return ours


def _refuse_foreign(folder: Path, study: optuna.Study | None) -> None:
    """Raise UserError when the trial folders here are not this study's: a run in one of them would be mixed up."""
    trials = sorted(f.name for f in folder.glob("*") if (f / ".hydra").is_dir() or (f / RESULT).is_file())
    if not trials:
        return
    owner = (folder / MARK).read_text().strip() if (folder / MARK).exists() else None
    facts, known = (None, 0) if study is None else (study.user_attrs.get(FACTS), len(study.get_trials(deepcopy=False)))
    ours = owner == facts["id"] if owner and facts else known > 0 and all(_is_of(name, known) for name in trials)
    if not ours:
        whose = "another study's trials" if owner else "trials that are in no study"
        raise UserError(
            f"{folder}: holds {whose} ({', '.join(trials[:3])}{', ...' if len(trials) > 3 else ''}): choose another "
            "folder (hydra.sweep.dir=...) or another hydra.sweeper.study_name, or delete what is there"
        )


def _is_of(name: str, known: int) -> bool:
    """Whether a trial's folder may be one of that many trials: ours are called by their numbers."""
    return not name.isdigit() or int(name) < known


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
