"""Overrides -> the config a trial would run with, checked, and a canonical form that is equal for equal runs."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mathverify import entry, records
from mathverify.config import RunConfig
from mathverify.errors import UserError
from mathverify.sweep import lora_scale
from mathverify.sweep.space import Point, Space

MOST_COMPOSITIONS = 64
MOST_POINTS = 64


class Composer:
    """Composes trial configs the way Hydra's launchers will. examples: how many a trial sees, of what was validated."""

    def __init__(self, config_loader: Any, master: DictConfig, space: Space) -> None:
        self._loader, self._master, self.space = config_loader, master, space
        self.ratio = lora_scale.searched(list(space.dimensions))
        self.examples: set[int] = set()

    @property
    def value_name(self) -> str:
        """What a task's return value is called."""
        return "validation accuracy" if _is_run(self._master) else "the task's value"

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """The config of a job with these overrides, without the part that is Hydra's.

        Raises:
            UserError: they do not compose.
        """
        try:
            composed = self._loader.load_sweep_config(master_config=self._master, sweep_overrides=list(overrides))
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(entry.one_line(error)) from None
        return _ours(composed)

    def overrides(self, point: Point) -> list[str]:
        """All overrides of a trial at this point, a ratio of alpha to rank turned into alpha."""
        plain = [*self.space.fixed, *self.space.overrides(point)]
        return [o for override in plain for o in self._resolved(override, plain)]

    def _resolved(self, override: str, plain: Sequence[str]) -> list[str]:
        if not lora_scale.is_ratio(override):
            return [override]
        key, _, text = override.partition("=")
        composed = self.compose([o for o in plain if not lora_scale.is_ratio(o)])
        return lora_scale.alpha_overrides(key, float(text), int(composed.lora.rank))

    def check(self, overrides: Sequence[str]) -> str:
        """Compose and validate a trial's config; returns its canonical form's hash.

        Raises:
            UserError: the config does not compose or is impossible.
        """
        return canonical(self.compose(overrides))

    def base(self) -> dict[str, Any]:
        """What all trials share: the config without what is searched, and without what decides no result."""
        composed = self.compose(self.space.fixed_plain)
        plain: dict[str, Any] = json.loads(json.dumps(_container(composed), default=str))
        if _is_run(composed):
            for part, names in records.NOT_OF_THE_RESULT.items():
                for name in names:
                    _drop(plain, f"{part}.{name}" if part else name)
        for key in self.space.dimensions:
            _drop(plain, key.lstrip("+~").partition("@")[0].replace("/", "."))
        if self.ratio is not None:
            _drop(plain, "lora.alpha")
            _drop(plain, "lora.rslora")
        return plain

    # Preflight

    def groups(self) -> list[str]:
        """The searched keys that are config groups."""
        return [key for key in self.space.dimensions if self._loader.get_group_options(_group(key))]

    def preflight(self) -> int:
        """Compose and validate every reachable group choice, each with the ends of the other dimensions.

        Returns:
            How many configs were validated.

        Raises:
            UserError: the first point that cannot run, and why.
        """
        groups = self.groups()
        count = 0
        for choice in self._corners(groups, MOST_COMPOSITIONS):
            for rest in self._corners([k for k in self.space.dimensions if k not in groups], MOST_POINTS):
                self._check_point(choice, rest)
                count += 1
        return count

    def _check_point(self, choice: Point, rest: Point) -> None:
        try:
            composed = self.compose([*self.space.fixed_plain, *self.space.overrides(choice)])
            for override in self.space.overrides(rest):
                if not lora_scale.is_ratio(override):
                    _set(composed, override)
            if (run := validate(composed)) is not None:
                self.examples.add(run.train.steps * run.train.examples_per_step)
        except (UserError, HydraException, OmegaConfBaseException) as error:
            where = " ".join(self.space.overrides({**choice, **rest})) or "no searched key"
            raise UserError(f"the space reaches a trial that cannot run ({where}): {entry.one_line(error)}") from None

    def _corners(self, keys: Sequence[str], most: int) -> Iterator[dict[str, Any]]:
        """Every combination of the values that matter, or, if these are more than `most`, each value once."""
        values = {key: self.space.dimensions[key].ends() for key in keys}
        total = 1
        for found in values.values():
            total *= len(found)
        if total <= most:
            for combination in itertools.product(*values.values()):
                yield dict(zip(keys, combination, strict=True))
            return
        first = {key: found[0] for key, found in values.items()}
        yield first
        for key, found in values.items():
            for value in found[1:]:
                yield first | {key: value}


def canonical(composed: DictConfig) -> str:
    """Hash of what decides a run's result; equal for configs that are spelled differently and mean the same.

    Raises:
        UserError: the config is impossible.
    """
    if _is_run(composed):
        return records.fingerprint(entry.to_run_config(composed))
    text = json.dumps(_container(composed, resolve=True), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def validate(composed: DictConfig) -> RunConfig | None:
    """The run that a config of ours describes; None for another program's, which only has to compose.

    Raises:
        UserError: the run is impossible.
    """
    return entry.to_run_config(composed) if _is_run(composed) else None


def _is_run(composed: DictConfig) -> bool:
    return OmegaConf.get_type(composed) is RunConfig


def _ours(composed: DictConfig) -> DictConfig:
    ours = copy.copy(composed)
    OmegaConf.set_readonly(ours, False)
    OmegaConf.set_struct(ours, False)
    ours.pop("hydra", None)
    OmegaConf.set_struct(ours, True)
    return ours


def _container(composed: DictConfig, resolve: bool = False) -> Any:
    return OmegaConf.to_container(composed, resolve=resolve, enum_to_str=True)


def _set(composed: DictConfig, override: str) -> None:
    """What Hydra does with a plain override, without composing anew."""
    parsed = OverridesParser.create().parse_override(override)
    force = parsed.is_add() or parsed.is_force_add()
    if parsed.is_delete():
        return
    OmegaConf.update(composed, parsed.key_or_group, parsed.value(), merge=True, force_add=force)


def _drop(tree: dict[str, Any], path: str) -> None:
    *above, last = path.split(".")
    for part in above:
        found = tree.get(part)
        if not isinstance(found, dict):
            return
        tree = found
    tree.pop(last, None)


def _group(key: str) -> str:
    return key.lstrip("+~").partition("@")[0]
