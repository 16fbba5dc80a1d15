"""The keys of hydra.sweeper, checked: a typed Settings for everything below. Knows no Optuna."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mathverify.errors import UserError


class Duplicates(Enum):
    """A proposed point that was run before: ask the sampler again, tell it the earlier result, or train it again."""

    ask_again = "ask_again"
    tell = "tell"
    train = "train"


@dataclass(frozen=True)
class Settings:
    """What a study is made of besides its base config.

    sampler, pruner: `_target_` and its arguments. directions: one per objective; None until the task is known.
    storage: URL, `_target_` mapping, or None for a journal file in the sweep folder. n_trials: the study's total, over
    all resumes and workers; None for every point of a finite space. n_jobs: trials at once. max_failure_rate: the sweep
    stops when more than this share of n_trials has failed. params: override syntax by key. objective: dotted paths into
    result.json, one per direction; empty means the task's return value. report: the validation metric that pruners look
    at. max_attempts: how often a trial may be started before it fails because its worker always died. dead_after:
    seconds without a sign of life after which a worker on another machine is taken for dead.
    """

    sampler: dict[str, Any]
    pruner: dict[str, Any] | None = None
    directions: tuple[str, ...] | None = None
    storage: str | dict[str, Any] | None = None
    study_name: str | None = None
    n_trials: int | None = 20
    n_jobs: int = 1
    max_failure_rate: float = 1.0
    params: dict[str, str] = field(default_factory=dict)
    custom_search_space: str | None = None
    objective: tuple[str, ...] = ()
    report: str = "validation/accuracy"
    duplicates: Duplicates = Duplicates.ask_again
    stop_after_same_failures: int = 3
    max_attempts: int = 10
    dead_after: float = 60.0
    lease_devices: bool = True
    dry_run: bool = False

    @property
    def seed(self) -> int | None:
        """Of the sampler; with it, trial N of a study is always proposed alike."""
        return self.sampler.get("seed")

    @property
    def is_grid(self) -> bool:
        return str(self.sampler.get("_target_", "")).endswith(".GridSampler")


def read_settings(keys: Mapping[str, Any], cwd: Path | None = None) -> Settings:
    """hydra.sweeper's keys -> Settings.

    Args:
        cwd: where relative paths begin, for a job that Hydra started in a folder of its own; else the current folder.

    Raises:
        UserError: a value that cannot work.
    """
    plain = {key: _plain(value) for key, value in keys.items()}
    directions = _directions(plain.get("direction"))
    objective = _texts(plain.get("objective"))
    if objective and directions is not None and len(objective) != len(directions):
        raise UserError(
            f"hydra.sweeper.objective names {len(objective)} values and hydra.sweeper.direction {len(directions)}: "
            "give one direction for each"
        )
    pruner = plain.get("pruner") or {}
    settings = Settings(
        sampler=_component(plain.get("sampler"), "sampler"),
        pruner=pruner if pruner.get("_target_") else None,
        directions=directions,
        storage=_absolute(plain.get("storage"), cwd or Path.cwd()),
        study_name=plain.get("study_name"),
        n_trials=plain.get("n_trials", 20),
        n_jobs=plain.get("n_jobs", 1),
        max_failure_rate=plain.get("max_failure_rate", 1.0),
        params=_params(plain.get("params"), plain.get("search_space")),
        custom_search_space=_dotpath(plain.get("custom_search_space")),
        objective=objective,
        report=plain.get("report", "validation/accuracy"),
        duplicates=_duplicates(plain.get("duplicates", "ask_again")),
        stop_after_same_failures=plain.get("stop_after_same_failures", 3),
        max_attempts=plain.get("max_attempts", 10),
        dead_after=plain.get("dead_after", 60.0),
        lease_devices=plain.get("lease_devices", True),
        dry_run=plain.get("dry_run", False),
    )
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    for name in ("n_jobs", "stop_after_same_failures", "max_attempts"):
        _require(getattr(settings, name) >= 1, name, getattr(settings, name), "a whole number >= 1")
    trials = settings.n_trials
    _require(trials is None or trials >= 1, "n_trials", trials, "a whole number >= 1, or null for every point")
    rate = settings.max_failure_rate
    _require(0.0 <= rate <= 1.0, "max_failure_rate", rate, "a number in [0, 1]")
    _require(settings.dead_after > 0, "dead_after", settings.dead_after, "seconds > 0")
    several = settings.directions is not None and len(settings.directions) > 1
    if several and settings.pruner is not None:
        raise UserError(
            "hydra/sweeper/pruner: Optuna prunes for one objective only, this study has several: "
            "use hydra/sweeper/pruner=none"
        )


def _require(ok: bool, key: str, value: object, allowed: str) -> None:
    if not ok:
        raise UserError(f"hydra.sweeper.{key} = {value!r} is not possible: use {allowed}")


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _component(value: Any, key: str) -> dict[str, Any]:
    _require(isinstance(value, dict) and bool(value.get("_target_")), key, value, f"a mapping with _target_, or {key}=")
    return dict(value)


def _directions(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    names = tuple(str(getattr(d, "name", d)).lower() for d in (value if isinstance(value, list) else [value]))
    _require(
        bool(names) and set(names) <= {"minimize", "maximize"},
        "direction",
        value,
        "minimize, maximize, or a list of them",
    )
    return names


def _dotpath(value: Any) -> str | None:
    """Older configs begin it with a dot, which Hydra refuses by now."""
    return None if value is None else str(value).lstrip(".")


def _absolute(storage: Any, cwd: Path) -> Any:
    """A file's URL with the whole path: jobs may run in folders of their own (hydra.job.chdir)."""
    for scheme in ("sqlite:///", "journal://"):
        if isinstance(storage, str) and storage.startswith(scheme) and (path := storage.removeprefix(scheme)):
            return storage if path.startswith((":memory:", "file:")) else f"{scheme}{cwd / path}"
    return storage


def _texts(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    return (
        tuple(str(item) for item in value)
        if isinstance(value, Sequence) and not isinstance(value, str)
        else (str(value),)
    )


def _duplicates(value: Any) -> Duplicates:
    names = [choice.value for choice in Duplicates]
    _require(value in names, "duplicates", value, ", ".join(names))
    return Duplicates(value)


def _params(params: Any, search_space: Any) -> dict[str, str]:
    """Both ways to write a space, as override values; `search_space` is the older, with type, low, high, choices."""
    if params and search_space:
        raise UserError("hydra.sweeper.params and hydra.sweeper.search_space are both given: keep params")
    if search_space:
        return {str(key): _from_distribution(str(key), value) for key, value in search_space.items()}
    return {str(key): _as_override_value(value) for key, value in (params or {}).items()}


def _as_override_value(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case list():
            return "[" + ",".join(_as_override_value(item) for item in value) + "]"
        case _:
            return str(value)


def _from_distribution(key: str, value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    kind = str(getattr(kind, "name", kind))
    _require(kind in ("categorical", "int", "float"), f"search_space.{key}", value, "type: categorical, int or float")
    if kind == "categorical":
        return "choice(" + ",".join(_as_override_value(choice) for choice in value["choices"]) + ")"
    cast = int if kind == "int" else float
    low, high = cast(value["low"]), cast(value["high"])
    if value.get("log"):
        return f"tag(log,{kind}(interval({low},{high})))" if kind == "int" else f"tag(log,interval({low},{high}))"
    if value.get("step") is not None:
        return f"range({low},{high},step={cast(value['step'])})"
    return f"int(interval({low},{high}))" if kind == "int" else f"interval({low},{high})"
