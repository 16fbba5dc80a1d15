"""In a process that is to die: kills it with -9 at a chosen event. The program itself has no hook for this and knows nothing.

An event is {"event": "rename", "file": "result.json", "count": 2, "when": "before"}: the second time that a file of this
name (a pattern) takes its place; or {"event": "call", "function": "package.module:Class.method", "count": 1, "when": "after"}.
when: before, after, torn (after, with half of the journal's last line cut off) or a number of seconds after.

python -m tests.faults.killer EVENT ARGUMENTS: `python -m mathverify.train ARGUMENTS` that dies at EVENT, as JSON.
"""

from __future__ import annotations

import fnmatch
import functools
import json
import os
import runpy
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

Event = dict[str, Any]


def install(event: Event) -> None:
    """From here on this process dies at `event`; an empty one never comes."""
    match event.get("event"):
        case "rename":
            _at_rename(dict(event))
        case "call":
            _at_call(dict(event))


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _is_it(event: Event) -> bool:
    """Count one more occurrence; whether it is the one."""
    event["count"] -= 1
    return bool(event["count"] == 0)


def _at_rename(event: Event) -> None:
    """Python announces each rename, and much else, before it is done."""
    over = False

    def heard(name: str, arguments: Sequence[Any]) -> None:
        nonlocal over
        if over:  # the rename is done, and this is whatever comes next; the kill itself is announced, too
            over = False
            _die()
        if name == "os.rename" and fnmatch.fnmatch(Path(os.fspath(arguments[1])).name, event["file"]) and _is_it(event):
            if event["when"] == "before":
                _die()
            over = True

    sys.addaudithook(heard)


def _at_call(event: Event) -> None:
    module, _, path = event["function"].partition(":")
    owner: Any = import_module(module)
    *above, last = path.split(".")
    for part in above:
        owner = getattr(owner, part)
    setattr(owner, last, _deadly(getattr(owner, last), event))


def _deadly(function: Callable[..., Any], event: Event) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        if not _is_it(event):
            return function(*arguments, **named)
        when = event["when"]
        if when == "before":
            _die()
        if isinstance(when, int | float):
            threading.Timer(when, _die).start()
        result = function(*arguments, **named)
        if when == "torn":
            _tear(arguments[0]._path)
        if when in ("after", "torn"):
            _die()
        return result

    return wrapped


def _tear(path: Path) -> None:
    content = path.read_bytes()
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    os.truncate(path, (last + len(content)) // 2)


if __name__ == "__main__":
    install(json.loads(sys.argv.pop(1)))
    runpy.run_module("mathverify.train", run_name="__main__", alter_sys=True)
