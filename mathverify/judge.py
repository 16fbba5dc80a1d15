"""How a study looks into a run without the run knowing of studies: a judge of validations, set around the task.

The sweeper sets it, train.py hands it to the runner. Holds no policy and imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

Judge = Callable[[int, Mapping[str, float]], str | None]
"""(step, metrics such as {'validation/accuracy': 0.7}) -> reason to stop (prune) the run there, or None to go on."""

_current: ContextVar[Judge | None] = ContextVar("judge", default=None)


@contextmanager
def judged_by(judge_of_this_task: Judge) -> Iterator[None]:
    """Within, `judge` asks this one."""
    token = _current.set(judge_of_this_task)
    try:
        yield
    finally:
        _current.reset(token)


def judge(step: int, metrics: Mapping[str, float]) -> str | None:
    """Ask whoever runs this task; without a study nobody objects."""
    asked = _current.get()
    return None if asked is None else asked(step, metrics)


def judge_run(run: Any, found: Any) -> str | None:
    """`judge` as run.PackRunner asks: a run.Run and the scoring.Metrics of its latest validation."""
    return judge(run.trial.step, found.flat("validation"))
