"""Which runs can train together, and why others cannot: they share the frozen base and what goes into it.

All else may differ within a pack: rank, alpha, dropout, targets, learning rate, schedule, batch size, accumulation,
seed, steps, loss, optimizer, evaluation, tracking. Trains nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mathverify.config import RunConfig, to_plain

SHARED = ("model", "quantization", "prompt", "data", "device")
"""Parts of a config that are one and the same for all runs of a pack."""

SHARED_IN_TRAIN = ("memory", "token_budget", "threads")
"""Settings of a pass, which all runs of a pack go through together, or of the process."""


def base_of(config: RunConfig) -> dict[str, Any]:
    """The settings that runs of a pack share, flat: {'quantization.kind': 'nf4', ...}."""
    plain = to_plain(config)
    shared = {part: plain[part] for part in SHARED} | {
        "train": {name: plain["train"][name] for name in SHARED_IN_TRAIN}
    }
    return _flat(shared, "")


def base_key(config: RunConfig) -> str:
    """Equal for runs that can train together."""
    return json.dumps(base_of(config), sort_keys=True)


def in_common() -> str:
    """What runs of a pack share, in words."""
    *most, last = [*SHARED, *(f"train.{name}" for name in SHARED_IN_TRAIN)]
    return f"{', '.join(most)} and {last}"


def difference(config: RunConfig, other: RunConfig) -> str:
    """Why `config` cannot train together with `other`: 'quantization.kind is nf4, not none'."""
    own, others = base_of(config), base_of(other)
    unlike = [key for key in own if own[key] != others.get(key)]
    said = [f"{key} is {own[key]}, not {others.get(key)}" for key in unlike[:2]]
    return "; ".join(said) + (f"; and {len(unlike) - 2} more" if len(unlike) > 2 else "")


def by_base(configs: Sequence[RunConfig]) -> list[list[int]]:
    """Indices of configs that can train together, group by group in the order of each group's first."""
    groups: dict[str, list[int]] = {}
    for index, config in enumerate(configs):
        groups.setdefault(base_key(config), []).append(index)
    return list(groups.values())


def _flat(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
