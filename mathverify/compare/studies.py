"""A study URL -> runs: the trials that an Optuna storage knows of, and their folders. Reads only; makes no storage.

journal:///path/to/study.journal, sqlite:///path/to/file.db or postgresql://user:password@host/name; #NAME at the end
picks one study of several. Imports optuna, so reading.py asks for it only when a URL is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mathverify.compare.reading import RunView, State, read_run
from mathverify.errors import UserError
from mathverify.records import RESULT, redact


def runs_of_study(url: str) -> Iterator[RunView]:
    """One view a trial that took a place of its study's budget; from its folder where that is here.

    Raises:
        UserError: no such storage, no study in it, or not the one named; without passwords.
    """
    try:
        yield from _runs_of_study(url)
    except UserError:
        raise
    except Exception as error:  # of SQLAlchemy, of every database driver, of Optuna on a file that is no journal
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{redact(url)}: cannot be read as a study ({redact(first)[:200]}): check the address, and that a sweep of "
            "this program made it"
        ) from None


def _runs_of_study(url: str) -> Iterator[RunView]:
    import optuna

    where, _, name = url.partition("#")
    storage = _open(where)
    known = [study.study_name for study in optuna.get_all_study_summaries(storage, include_best_trial=False)]
    if not known or (name and name not in known):
        listed = f"it has {', '.join(map(repr, known[:8]))}" if known else "it has none"
        raise UserError(f"{redact(url)}: no study {name or 'at all'} there ({listed}): check the address and the name")
    for study in [name] if name else known:
        yield from _trials(optuna.load_study(study_name=study, storage=storage))


def _trials(study: Any) -> Iterator[RunView]:
    from mathverify.sweep.study import FACTS, counts

    facts = study.user_attrs.get(FACTS) or {}
    folder = Path(str(facts.get("folder") or f"study {study.study_name}"))
    for trial in study.get_trials(deepcopy=False):
        if counts(trial):
            yield _view(trial, folder / str(trial.number))


def _view(trial: Any, folder: Path) -> RunView:
    """The run of a trial; where its folder is elsewhere, what the study knows: state, reason, parameters."""
    if (folder / RESULT).exists():
        view = read_run(folder)
    else:
        state = {"COMPLETE": State.unreadable, "PRUNED": State.pruned, "FAIL": State.failed}
        values = ", ".join(f"{value:.4g}" for value in trial.values or [])
        missing = f"its folder {folder} is not on this machine" + (f"; the study has {values}" if values else "")
        reason = str(trial.user_attrs.get("reason") or missing)
        view = RunView(folder, state.get(trial.state.name, State.running), " ".join(str(redact(reason)).split()))
        view.settings = dict(trial.params)
    view.trial = trial.number
    return view


def _open(url: str) -> Any:
    """The storage, never made anew: what is not there is an error."""
    scheme, _, rest = url.partition("://")
    if scheme == "journal":
        return _journal(Path(rest))
    from optuna.storages import RDBStorage

    from mathverify.sweep.storage import with_driver

    if scheme == "sqlite" and not Path(rest.removeprefix("/")).is_file():
        raise UserError(f"{redact(url)}: no such file: check the path (sqlite:///relative or sqlite:////absolute)")
    return RDBStorage(with_driver(url), skip_table_creation=True)


def _journal(path: Path) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    if not path.is_file():
        raise UserError(f"journal://{path}: no such file: give the study.journal of a sweep folder")
    return JournalStorage(JournalFileBackend(str(path)))
