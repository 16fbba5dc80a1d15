"""Samplers and pruners from their config. A seeded one proposes trial N alike in every process and after any kill."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hydra.utils import get_class, instantiate
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import BaseSampler, GridSampler, QMCSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from mathverify.errors import UserError
from mathverify.sweep.settings import Settings
from mathverify.sweep.space import Space
from mathverify.sweep.targets import check_targets

NEEDS = {"CmaEsSampler": "cmaes", "GPSampler": "scipy", "QMCSampler": "scipy", "WilcoxonPruner": "scipy"}
GONE = {"optuna.samplers.MOTPESampler": "optuna.samplers.TPESampler"}


class SeededByTrial(BaseSampler):
    """Gives every trial a sampler of its own, seeded by (seed, trial number).

    A sampler that lives as long as its process starts its random stream anew after a resume and proposes its first
    points again; and two workers with one seed propose the same points. Here a proposal depends on nothing but the
    seed, the number and the trials told so far.
    """

    def __init__(self, make: Callable[[int | None], BaseSampler], seed: int | None) -> None:
        self._make, self._seed = make, seed
        self._number: int | None = None
        self.inner = make(seed)

    def _for(self, trial: FrozenTrial) -> BaseSampler:
        if trial.number != self._number:
            self._number = trial.number
            # A quasi-random sequence is one, as is a shuffled grid: the place in it, not its seed, follows the number.
            keep = self._seed is None or isinstance(self.inner, QMCSampler | GridSampler)
            self.inner = self._make(self._seed if keep else trial_seed(self._seed, trial.number))
        return self.inner

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._for(trial).before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._for(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._for(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._for(trial).sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        if not isinstance(self.inner, GridSampler):  # which would call study.stop(), forbidden outside of optimize()
            self._for(trial).after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        """Nothing: every trial has its own seed already."""


def trial_seed(seed: int | None, number: int) -> int:
    """A 31-bit seed for one trial, far from those of its neighbours."""
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def make_sampler(settings: Settings, space: Space) -> SeededByTrial:
    """The study's sampler.

    Raises:
        UserError: unknown target, missing package, bad argument, or a grid over a continuous dimension.
    """
    check_targets(settings.sampler, "hydra.sweeper.sampler")
    arguments = dict(settings.sampler)
    target = GONE.get(arguments["_target_"], arguments["_target_"])
    if target.endswith(".GridSampler") and not arguments.get("search_space"):
        arguments["search_space"] = _grid(space)
    arguments = _accepted(target, {k: v for k, v in arguments.items() if k != "_target_" and v is not None}, "sampler")

    def make(seed: int | None) -> BaseSampler:
        given = arguments | ({"seed": seed} if seed is not None else {})
        sampler: BaseSampler = _instantiate(target, given, "hydra.sweeper.sampler")
        return sampler

    return SeededByTrial(make, settings.seed)


def make_pruner(settings: Settings) -> BasePruner:
    """The study's pruner; one that never prunes when none is set.

    Raises:
        UserError: unknown target, missing package or bad argument.
    """
    if settings.pruner is None:
        return NopPruner()
    check_targets(settings.pruner, "hydra.sweeper.pruner")
    target = settings.pruner["_target_"]
    given = {k: v for k, v in settings.pruner.items() if k != "_target_" and v is not None}
    arguments = _accepted(target, given, "pruner")
    pruner: BasePruner = _instantiate(target, arguments, "hydra.sweeper.pruner")
    return pruner


def _grid(space: Space) -> dict[str, list[Any]]:
    values = {key: dimension.values() for key, dimension in space.dimensions.items()}
    for key, found in values.items():
        if found is None:
            raise UserError(f"{key} is continuous, a grid needs values: use choice(...) or range(a,b,step=c)")
    return {key: found or [] for key, found in values.items()}


def _accepted(target: str, arguments: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Leave out what older versions of Optuna took and this one does not, and what a study set for another target."""
    try:
        known = inspect.signature(get_class(target)).parameters
    except Exception as error:
        raise UserError(f"hydra.sweeper.{what}._target_ = {target}: no such {what} ({error})") from None
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
        return dict(arguments)
    return {name: value for name, value in arguments.items() if name in known}


def _instantiate(target: str, arguments: Mapping[str, Any], where: str) -> Any:
    name = target.rpartition(".")[2]
    package = NEEDS.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        raise UserError(f"{where} = {name} needs the package {package}: pip install {package}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experimental and renamed arguments: nothing a user can act on
            return instantiate({"_target_": target, "_convert_": "all", **arguments})
    except Exception as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"{where} = {name} cannot be made: {reason}") from None
