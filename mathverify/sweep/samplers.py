"""Samplers and pruners from their config. A seeded one proposes trial N alike in every process and after any kill."""

from __future__ import annotations

import copy
import difflib
import functools
import hashlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from hydra.utils import get_class, instantiate
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import BaseSampler, GridSampler, QMCSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from mathverify.errors import UserError
from mathverify.sweep.plugin import PRUNERS, SAMPLERS
from mathverify.sweep.settings import Settings
from mathverify.sweep.space import Space
from mathverify.sweep.targets import check_targets

NEEDS = {"CmaEsSampler": "cmaes", "GPSampler": "scipy", "QMCSampler": "scipy", "WilcoxonPruner": "scipy"}
GONE = {"optuna.samplers.MOTPESampler": "optuna.samplers.TPESampler"}


class SeededByTrial(BaseSampler):
    """Gives every trial a sampler of its own, seeded by (seed, trial number).

    A sampler that lives as long as its process starts its random stream anew after a resume and proposes its first
    points again; and two workers with one seed propose the same points. Here a proposal depends on nothing but the
    seed, the number and the trials told so far. A point that a dying process left half drawn is completed as it would
    have been, except by Optuna's GP and QMC samplers, which take what is drawn into account.
    """

    def __init__(self, make: Callable[[int | None], BaseSampler], seed: int | None) -> None:
        self._make, self._seed = make, seed
        self._number: int | None = None
        self._drawn: set[str] = set()  # of this trial: what needs no draw from its stream any more
        self.inner = make(seed)

    def _for(self, trial: FrozenTrial) -> BaseSampler:
        if trial.number != self._number:
            self._number, self._drawn = trial.number, set(trial.system_attrs.get("fixed_params", {}))
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
        found = self._for(trial).sample_relative(study, trial, search_space)
        self._drawn |= found.keys()
        return found

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        inner = self._for(trial)
        self._redraw(inner, study, trial)
        self._drawn.add(param_name)
        return inner.sample_independent(study, trial, param_name, param_distribution)

    def _redraw(self, inner: BaseSampler, study: Study, trial: FrozenTrial) -> None:
        """A trial whose process died while it was proposed has some values: the stream goes on behind their draws."""
        then = copy.copy(trial)
        then.params, then.distributions = {}, {}
        for name, distribution in trial.distributions.items():
            if name not in self._drawn and not distribution.single():
                inner.sample_independent(study, then, name, distribution)
            self._drawn.add(name)
            then.params = then.params | {name: trial.params[name]}
            then.distributions = then.distributions | {name: distribution}

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
        UserError: unknown target, missing package, unknown or bad argument, or a grid over a continuous dimension.
    """
    named = settings.sampler["_target_"]
    check_targets(settings.sampler | {"_target_": GONE.get(named, named)}, "hydra.sweeper.sampler")
    target, arguments, _ = _arguments(settings.sampler, "sampler")
    if target.endswith(".GridSampler"):
        if settings.custom_search_space is not None:
            raise UserError(
                "hydra.sweeper.custom_search_space adds to points as they are drawn, a grid is fixed before the first: "
                "use another hydra/sweeper/sampler"
            )
        arguments.setdefault("search_space", _grid(space))

    def make(seed: int | None) -> BaseSampler:
        given = arguments | ({"seed": seed} if seed is not None else {})
        sampler: BaseSampler = _instantiate(target, given, "hydra.sweeper.sampler")
        return sampler

    return SeededByTrial(make, settings.seed)


def make_pruner(settings: Settings) -> BasePruner:
    """The study's pruner; one that never prunes when none is set.

    Raises:
        UserError: unknown target, missing package, unknown or bad argument.
    """
    if settings.pruner is None:
        return NopPruner()
    check_targets(settings.pruner, "hydra.sweeper.pruner")
    target, arguments, _ = _arguments(settings.pruner, "pruner")
    pruner: BasePruner = _instantiate(target, arguments, "hydra.sweeper.pruner")
    return pruner


def _grid(space: Space) -> dict[str, list[Any]]:
    values = {key: dimension.values() for key, dimension in space.dimensions.items()}
    for key, found in values.items():
        if found is None:
            raise UserError(f"{key} is continuous, a grid needs values: use choice(...) or range(a,b,step=c)")
    return {key: found or [] for key, found in values.items()}


def left_out(settings: Settings) -> list[str]:
    """A line for each argument that is set and does not apply: another sampler's or pruner's, or one Optuna dropped."""
    lines: list[str] = []
    for what, component in (("sampler", settings.sampler), ("pruner", settings.pruner)):
        if component is None:
            continue
        target, _, names = _arguments(component, what)
        said = ", ".join(f"{name} = {component[name]}" for name in names)
        if names:
            lines.append(f"hydra.sweeper.{what}: {target.rpartition('.')[2]} takes no {said}: left out")
    return lines


def _arguments(component: Mapping[str, Any], what: str) -> tuple[str, dict[str, Any], list[str]]:
    """Target and arguments of a sampler or pruner, and the names of what was set for another one.

    A study of sweeps/ sets arguments for its own sampler and pruner, and the command line may put others in their
    place; and a config of hydra-optuna-sweeper may set what newer versions of Optuna take no more. Both are left out.
    What no sampler and no pruner ever took is a slip of the pen.

    Raises:
        UserError: no such target, or an argument that none knows.
    """
    target = GONE.get(component["_target_"], component["_target_"])
    given = {k: v for k, v in component.items() if k != "_target_" and v is not None}
    try:
        parameters = inspect.signature(get_class(target)).parameters
    except Exception as error:
        raise UserError(f"hydra.sweeper.{what}._target_ = {target}: no such {what} ({error})") from None
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return target, given, []
    others = {name: value for name, value in given.items() if name not in parameters}
    for name, value in others.items():
        if name not in _known_arguments():
            close = difflib.get_close_matches(name, parameters, 1)
            meant = f"did you mean {close[0]}? " if close else ""
            raise UserError(
                f"hydra.sweeper.{what}.{name} = {value}: {target.rpartition('.')[2]} takes no such argument: "
                f"{meant}it takes {', '.join(parameters) or 'none'}"
            )
    accepted = {name: value for name, value in given.items() if name in parameters}
    return target, accepted, [name for name, value in others.items() if (name, value) not in _group_defaults()]


@functools.cache
def _known_arguments() -> set[str]:
    """Of every sampler and pruner of this Optuna, and of the documented groups, older versions' among them."""
    classes = [
        member
        for module in (optuna.samplers, optuna.pruners)
        for member in vars(module).values()
        if inspect.isclass(member)
    ]
    return {name for c in classes for name in inspect.signature(c).parameters} | {n for n, _ in _group_defaults()}


def _group_defaults() -> list[tuple[str, Any]]:
    """(argument, value) as hydra/sweeper/sampler and pruner set them: nobody chose these."""
    return [item for group in (SAMPLERS, PRUNERS) for choice in group.values() for item in (choice or {}).items()]


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
