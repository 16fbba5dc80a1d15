"""The search space: Hydra overrides in, Optuna distributions out, and points back into overrides. No study here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep, Transformer
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from mathverify.errors import UserError
from mathverify.sweep.lora_scale import ALPHA_KEYS, is_ratio

Value = str | int | float | bool | None
Point = Mapping[str, Value]


@dataclass(frozen=True)
class Dimension:
    """One searched key. texts: how each categorical choice is written as an override value."""

    key: str
    distribution: BaseDistribution
    texts: Mapping[Value, str] = field(default_factory=dict)

    def override(self, value: Value) -> str:
        """'key=value' as Hydra parses it."""
        return f"{self.key}={self.texts.get(value, value_text(value))}"

    def values(self) -> list[Value] | None:
        """Every value, or None when there are infinitely many."""
        d = self.distribution
        match d:
            case CategoricalDistribution():
                return list(d.choices)
            case IntDistribution() if d.log:
                return list(range(d.low, d.high + 1))
            case IntDistribution():
                return list(range(d.low, d.high + 1, d.step))
            case FloatDistribution() if d.step is not None:
                count = math.floor((d.high - d.low) / d.step + 1e-9) + 1
                return [d.low + place * d.step for place in range(count)]
            case FloatDistribution() if d.low == d.high:
                return [d.low]
            case _:
                return None

    def ends(self) -> list[Value]:
        """Every choice of a categorical dimension, the two ends of a numeric one."""
        d = self.distribution
        if isinstance(d, CategoricalDistribution):
            return list(d.choices)
        assert isinstance(d, IntDistribution | FloatDistribution)
        return [d.low] if d.low == d.high else [d.low, d.high]

    def describe(self) -> str:
        """'{16, 32, 64}', '1e-05 .. 0.001 (log)'."""
        d = self.distribution
        if isinstance(d, CategoricalDistribution):
            return "{" + ", ".join(self.texts.get(choice, value_text(choice)) for choice in d.choices) + "}"
        assert isinstance(d, IntDistribution | FloatDistribution)
        step = f", step {d.step:g}" if d.step not in (None, 1) else ""
        return f"{d.low:g} .. {d.high:g}" + (" (log)" if d.log else step)


@dataclass(frozen=True)
class Space:
    """dimensions: what is searched, by key. fixed: overrides that every trial gets, deletions included."""

    dimensions: Mapping[str, Dimension]
    fixed: tuple[str, ...] = ()

    @property
    def fixed_plain(self) -> list[str]:
        """The fixed overrides that a config knows; ratios (lora_scale.py) are not among them."""
        return [override for override in self.fixed if not is_ratio(override)]

    @property
    def size(self) -> int | None:
        """Number of points, or None when a dimension is continuous."""
        counts = [self.count(d) for d in self.dimensions.values()]
        return math.prod(c for c in counts if c is not None) if None not in counts else None

    @staticmethod
    def count(dimension: Dimension) -> int | None:
        values = dimension.values()
        return None if values is None else len(values)

    def points(self) -> Iterator[dict[str, Value]]:
        """Every point of a discrete space, the last key changing fastest."""
        keys = list(self.dimensions)
        values = [self.dimensions[key].values() for key in keys]
        for combination in itertools.product(*(v or [] for v in values)):
            yield dict(zip(keys, combination, strict=True))

    def overrides(self, point: Point) -> list[str]:
        """The overrides of a point; a key that only a custom search space knows is written as it is."""
        known = self.dimensions
        return [known[k].override(v) if k in known else f"{k}={value_text(v)}" for k, v in point.items()]


def parse_space(
    params: Mapping[str, str], arguments: Sequence[str], config_loader: Any = None, grid: bool = False
) -> Space:
    """hydra.sweeper.params and the command line -> Space; of two settings of one key the later holds.

    The ways to give alpha (lora_scale.py) count as one key when the command line chooses another than params.

    Args:
        arguments: task overrides of the command line, sweeps among them. config_loader: Hydra's, to expand glob().
        grid: the space is for a grid, where range() leaves out its end.

    Raises:
        UserError: a sweep that no sampler can draw from.
    """
    parser = OverridesParser.create(config_loader=config_loader)
    given = parser.parse_overrides(list(arguments))
    if ALPHA_KEYS & {override.get_key_element() for override in given}:
        params = {key: value for key, value in params.items() if key not in ALPHA_KEYS}
    overrides = parser.parse_overrides([f"{key}={value}" for key, value in params.items()]) + given
    dimensions: dict[str, Dimension] = {}
    fixed: dict[str, str] = {}
    for override in overrides:
        key = override.get_key_element()
        bare = key.lstrip("+~")
        for known in [k for k in (*dimensions, *fixed) if k.lstrip("+~") == bare]:
            dimensions.pop(known, None)
            fixed.pop(known, None)
        if override.is_sweep_override():
            dimensions[key] = _dimension(key, override, grid)
        else:
            fixed[key] = override.input_line or f"{key}={override.get_value_element_as_str()}"
    return Space(dimensions, tuple(fixed.values()))


def _dimension(key: str, override: Override, grid: bool) -> Dimension:
    """The distributions that hydra-optuna-sweeper makes of the same text."""
    value = override.value()
    try:
        match value:
            case RangeSweep() if not value.shuffle:
                return Dimension(key, _of_range(value, grid))
            case IntervalSweep():
                return Dimension(key, _of_interval(value))
            case ChoiceSweep() | _ if override.is_discrete_sweep():
                return _of_choices(key, override)
    except ValueError as error:
        raise UserError(f"{override.input_line}: not a search space: {error}") from None
    raise UserError(f"{override.input_line}: not a search space: use choice(), range() or interval()")


def _of_choices(key: str, override: Override) -> Dimension:
    """Choices keep their type; lists and mappings, which Optuna cannot hold, stand for themselves as text."""
    texts = list(override.sweep_string_iterator())
    values: list[Value] = []
    for value, text in zip(override.sweep_iterator(transformer=Transformer.encode), texts, strict=True):
        plain = isinstance(value, str | int | float | bool | type(None))
        values.append(str(value) if isinstance(value, str) else value if plain else text)  # type: ignore[arg-type]
    if len(set(map(repr, values))) != len(values):
        raise UserError(f"{override.input_line}: a choice stands there twice: name each once")
    return Dimension(key, CategoricalDistribution(values), dict(zip(values, texts, strict=True)))


def _of_range(sweep: RangeSweep, grid: bool) -> BaseDistribution:
    """hydra-optuna-sweeper's range() includes its end when sampled, and leaves it out, as Hydra does, in a grid."""
    start, stop, step = sweep.start, sweep.stop, sweep.step
    assert start is not None
    assert stop is not None
    if any(isinstance(x, float) for x in (start, stop, step)):
        last = stop
        if grid:
            last = start + (math.ceil((stop - start) / step - 1e-9) - 1) * step
        return FloatDistribution(start, last, step=step)
    if grid:
        stop = start + (math.ceil((stop - start) / step) - 1) * step
    return IntDistribution(int(start), int(stop), log="log" in sweep.tags, step=int(step))


def _of_interval(sweep: IntervalSweep) -> BaseDistribution:
    start: Any = sweep.start  # typed float, and yet int under int(interval(...))
    end: Any = sweep.end
    log = "log" in sweep.tags
    if isinstance(start, int) and isinstance(end, int):
        return IntDistribution(start, end, log=log)
    return FloatDistribution(start, end, log=log)


def value_text(value: Value) -> str:
    """A value as Hydra's override grammar reads it back."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case float():
            return repr(value)
        case str():
            return value if _is_plain(value) else quoted(value)
        case _:
            return str(value)


def quoted(text: str) -> str:
    """Text in quotes that Hydra's override grammar undoes."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text, Quote.single).with_quotes()


def _is_plain(text: str) -> bool:
    return bool(text) and all(c.isalnum() or c in "_-./:%@+" for c in text)
