"""Which rows go to which split: whole questions, by hash and seed. Knows of a row only its group's hash."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from mathverify.config import DataConfig
from mathverify.errors import UserError

SPLITS = ("train", "validation", "test")
NOWHERE = -1


@dataclass
class Plan:
    """Where every row of every source goes.

    target: by source, int8 [rows], an index into SPLITS or NOWHERE. taken: splits made out of train. shared: what
    was found to share questions and dropped for it. limited: rows left out by data.*_rows, by split.
    """

    target: dict[str, np.ndarray]
    taken: list[str] = field(default_factory=list)
    shared: list[dict[str, Any]] = field(default_factory=list)
    limited: dict[str, int] = field(default_factory=dict)


def plan(groups: Mapping[str, np.ndarray], config: DataConfig) -> Plan:
    """Assign rows to splits so that no group is in two. groups: by source split, uint64 [rows], each row's group hash.

    Rows of given splits that share a question with a later one (train < validation < test) are dropped from the
    earlier and counted. Splits not given are then taken from train: data.*_rows rows at most, or
    data.*_fraction of train's rows, in the order of a hash of (seed, split, group). Last, data.*_rows limit the
    given splits and train. Deterministic: the order of rows and the number of processes play no part.
    Raises UserError when train has too few questions or a limit is smaller than any question.
    """
    made = Plan({name: np.full(len(g), SPLITS.index(name), np.int8) for name, g in groups.items()})
    _drop_shared(made, groups)
    for name in ("test", "validation"):
        if name not in groups:
            _take(made, groups["train"], name, config)
    for name in SPLITS:
        limit = getattr(config, f"{name}_rows")
        if limit is not None and name in groups:
            _limit(made, groups[name], name, limit, config.seed)
    return made


def _drop_shared(made: Plan, groups: Mapping[str, np.ndarray]) -> None:
    for earlier, later in (("validation", "test"), ("train", "test"), ("train", "validation")):
        if earlier not in groups or later not in groups:
            continue
        kept = made.target[later] != NOWHERE
        both = np.isin(groups[earlier], groups[later][kept]) & (made.target[earlier] != NOWHERE)
        if both.any():
            made.target[earlier][both] = NOWHERE
            questions = len(np.unique(groups[earlier][both]))
            made.shared.append(
                {
                    "split": earlier,
                    "shares_with": later,
                    "questions": questions,
                    "rows_dropped": int(both.sum()),
                }
            )


def _take(made: Plan, groups: np.ndarray, name: str, config: DataConfig) -> None:
    """Move whole groups from train to the split `name`."""
    free = made.target["train"] == SPLITS.index("train")
    unique, counts = np.unique(groups[free], return_counts=True)
    if len(unique) < 2:
        raise UserError(
            f"data.{name}: cannot be taken from train by question, which has {len(unique)} question(s) left: "
            f"give more questions, or a file of its own with data.{name}="
        )
    limit = getattr(config, f"{name}_rows")
    wanted = limit if limit is not None else int(getattr(config, f"{name}_fraction") * len(groups))
    chosen = choose(unique, counts, max(wanted, 1), config.seed, name)
    if not len(chosen):
        if limit is not None:
            raise _too_small(name, limit, int(counts.min()))
        chosen = unique[[np.lexsort((priority(unique, config.seed, name), counts))[0]]]
    if len(chosen) == len(unique):
        raise UserError(f"data.{name}_rows = {limit} takes all of train's {len(unique)} questions: use fewer rows")
    made.target["train"][free & np.isin(groups, chosen)] = SPLITS.index(name)
    made.taken.append(name)


def _limit(made: Plan, groups: np.ndarray, name: str, limit: int, seed: int) -> None:
    mine = made.target[name] == SPLITS.index(name)
    if mine.sum() <= limit:
        return
    unique, counts = np.unique(groups[mine], return_counts=True)
    chosen = choose(unique, counts, limit, seed, name + " limit")
    if not len(chosen):
        raise _too_small(name, limit, int(counts.min()))
    out = mine & ~np.isin(groups, chosen)
    made.target[name][out] = NOWHERE
    made.limited[name] = int(out.sum())


def _too_small(name: str, limit: int, smallest: int) -> UserError:
    return UserError(
        f"data.{name}_rows = {limit} is less than any question's rows (the fewest: {smallest}), and questions are "
        f"never cut: use at least {smallest}"
    )


def choose(groups: np.ndarray, counts: np.ndarray, rows: int, seed: int, salt: str) -> np.ndarray:
    """Groups, in hash order, whose counts add up to at most `rows`; one too large for what is left is passed over.

    groups: uint64 [n], unique. counts: int [n], rows of each. Returns uint64 [m], m >= 0.
    """
    order = np.argsort(priority(groups, seed, salt), kind="stable")
    ordered = counts[order]
    until = int(np.searchsorted(np.cumsum(ordered), rows, side="right"))
    chosen = list(order[:until])
    left = rows - int(ordered[:until].sum())
    smallest = int(counts.min()) if len(counts) else 0
    for index in order[until:]:
        if left < smallest:
            break
        if counts[index] <= left:
            chosen.append(index)
            left -= int(counts[index])
    return groups[np.array(chosen, dtype=np.int64)]


def priority(groups: np.ndarray, seed: int, salt: str) -> np.ndarray:
    """A reproducible random number for each group: uint64 [n], splitmix64 (Steele et al. 2014) of group and salt."""
    mixed = groups ^ np.uint64(xxhash.xxh3_64_intdigest(f"{salt}/{seed}".encode()))
    mixed = mixed + np.uint64(0x9E3779B97F4A7C15)  # uint64 arrays wrap silently
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
