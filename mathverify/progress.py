"""How far long work has come, on stderr: a bar on a terminal, a line now and then elsewhere. No results here."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int | None], None]
"""Called with (what is being done, how much is done, how much there is or None if unknown), in any unit."""

SECONDS_BETWEEN_LINES = 10.0


def silent(what: str, done: int, total: int | None) -> None:
    """The Progress that shows nothing."""


@contextmanager
def shown() -> Iterator[Progress]:
    """Yield a Progress that draws on stderr: rich bars on a terminal, else at most one line every 10 s."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(time.monotonic)
        return
    from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Bars(*columns, console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def draw(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield draw


def _lines(clock: Callable[[], float]) -> Progress:
    # The first line waits too: work that ends within 10 s needs no log.
    last = clock()

    def log(what: str, done: int, total: int | None) -> None:
        nonlocal last
        if clock() - last >= SECONDS_BETWEEN_LINES:
            last = clock()
            share = f" ({done / total:.0%})" if total else ""
            print(f"{what}: {done:,}{f' of {total:,}' if total else ''}{share}", file=sys.stderr, flush=True)

    return log
