"""How a study looks into a run without the run knowing of studies: a judge of validations, set around the task.

Each run has its own (run.Run.judge). A launcher that runs one task at a time sets it around the task. Holds no policy
and imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

Judge = Callable[[int, Mapping[str, float]], str | None]
"""(step, metrics such as {'validation/accuracy': 0.7}) -> reason to stop (prune) the run there, or None to go on."""


def nobody(step: int, metrics: Mapping[str, float]) -> str | None:
    """The judge of a run without a study: nobody objects."""
    return None


_current: ContextVar[Judge] = ContextVar("judge", default=nobody)


@contextmanager
def judged_by(judge_of_this_task: Judge) -> Iterator[None]:
    """Within, `current_judge` is this one."""
    token = _current.set(judge_of_this_task)
    try:
        yield
    finally:
        _current.reset(token)


def current_judge() -> Judge:
    """The judge that was set around this task."""
    return _current.get()
