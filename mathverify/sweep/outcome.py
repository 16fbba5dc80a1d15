"""How a trial ended, from what its task returned, raised and left in its folder. Tells nobody."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from mathverify.errors import RunFailed, UserError
from mathverify.records import redact

RESULT = "result.json"


class End(Enum):
    """completed: has its values. pruned: stopped for being worse. failed: see the reason."""

    completed = "completed"
    pruned = "pruned"
    failed = "failed"


@dataclass(frozen=True)
class Outcome:
    """The end of a trial. out_of_memory: it does not fit, so that no trial near it need be tried.

    facts: what the table shows beside the values (steps, examples, seconds, parameters).
    """

    end: End
    values: list[float] | None = None
    reason: str | None = None
    out_of_memory: bool = False
    facts: dict[str, float] = field(default_factory=dict)

    def to_plain(self) -> dict[str, Any]:
        return asdict(self) | {"end": self.end.value}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Outcome:
        return cls(**{**plain, "end": End(plain["end"])})


def of_return(returned: Any, folder: Path, objective: Sequence[str], count: int, pruned: str | None) -> Outcome:
    """The outcome of a task that came to its end.

    Args:
        returned: what the task returned. folder: the run's, where result.json may be. objective: dotted paths into
            result.json, or empty. count: number of objectives. pruned: why the study stopped the trial, if it did.
    """
    record = read_result(folder)
    facts = facts_of(record)
    if pruned is not None or record.get("status") == "pruned":
        return Outcome(End.pruned, reason=pruned or record.get("reason"), facts=facts)
    if record.get("status") == "failed":
        return failed(str(record.get("reason") or "the run failed"), facts)
    try:
        values = [_look_up(record, path) for path in objective] if objective else _numbers(returned)
        if len(values) != count:
            raise ValueError(f"the task gave {len(values)} values, the study has {count} directions")
    except (ValueError, TypeError) as error:
        return failed(str(error), facts)
    if any(math.isnan(value) or math.isinf(value) for value in values):
        return failed(f"the objective is {', '.join(map(str, values))}", facts)
    return Outcome(End.completed, values, facts=facts)


def of_exception(error: BaseException, folder: Path) -> Outcome:
    """The outcome of a task that raised; a run's own record of why it failed says more than an exit code."""
    record = read_result(folder)
    facts = facts_of(record)
    if isinstance(error, SystemExit) and record.get("status") == "failed":
        return failed(str(record.get("reason") or "the run failed"), facts)
    text = " ".join(str(redact(str(error))).split())
    name = type(error).__name__
    reason = text if isinstance(error, UserError | RunFailed) and text else f"{name}: {text}" if text else name
    if isinstance(error, SystemExit):
        reason = f"the task exited with code {error.code}"
    return failed(reason[:500], facts, isinstance(error, MemoryError))


def failed(reason: str, facts: dict[str, float] | None = None, out_of_memory: bool = False) -> Outcome:
    """A failure; whether it is for want of memory is seen from the reason."""
    return Outcome(End.failed, None, reason, out_of_memory or is_out_of_memory(reason), facts or {})


def is_out_of_memory(reason: str) -> bool:
    """Whether a reason is torch's, CUDA's or the engine's way to say that memory ran out."""
    return (
        re.search(r"out ?of ?memory|ALLOC_FAILED|can't allocate memory|MemoryError", reason, re.IGNORECASE) is not None
    )


def kind_of(reason: str) -> str:
    """A reason without its numbers, paths and names in quotes, to see whether two failures are the same one."""
    return re.sub(r"'[^']*'|/\S+|[-+]?\d[\d.e+-]*|\b(nan|inf)\b", "#", reason)


def read_result(folder: Path) -> dict[str, Any]:
    """result.json as plain data; empty when there is none or it is no such thing."""
    try:
        plain = json.loads((folder / RESULT).read_text())
    except (OSError, ValueError):
        return {}
    return plain if isinstance(plain, dict) else {}


def facts_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The costs that the study's table shows, as far as the record has them."""
    costs = _part(record, "costs")
    named = {"steps": "optimizer_steps", "examples": "examples_seen", "parameters": "trainable_parameters"}
    facts = {name: costs[key] for name, key in named.items() if isinstance(costs.get(key), int | float)}
    seconds = [spent for spent in _part(costs, "seconds").values() if isinstance(spent, int | float)]
    return facts | ({"seconds": round(sum(seconds), 1)} if seconds else {})


def _part(tree: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = tree.get(key)
    return found if isinstance(found, Mapping) else {}


def _look_up(record: Mapping[str, Any], path: str) -> float:
    """A number of result.json by dotted path; a metric with an interval counts by its value."""
    found: Any = record
    for part in path.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    if isinstance(found, Mapping):
        found = found.get("value")
    if not isinstance(found, int | float):
        raise ValueError(f"objective {path} is not a number of the run's {RESULT}")
    return float(found)


def _numbers(returned: Any) -> list[float]:
    if isinstance(returned, Sequence) and not isinstance(returned, str):
        return [float(value) for value in returned]
    try:
        return [float(returned)]
    except (TypeError, ValueError):
        raise ValueError(f"the task returned {str(returned)[:80]!r}, which is not a number") from None
