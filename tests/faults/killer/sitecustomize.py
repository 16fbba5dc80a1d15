"""On the path of a process that is to die: kills it with -9 at the moment that KILL_AT names. The program knows nothing.

KILL_AT is JSON: {"event": "rename", "file": "result.json", "count": 2, "when": "before"} for the second time a file of that
name (a pattern) takes its place, or {"event": "call", "function": "package.module:Class.method", "count": 1, "when": "after"}.
when: before, after, torn (after, with half of the last line of the journal cut off) or a number of seconds after.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_at: dict[str, Any] = json.loads(os.environ.pop("KILL_AT", "{}"))


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _is_it() -> bool:
    """Count one more occurrence; whether it is the one."""
    _at["count"] -= 1
    return bool(_at["count"] == 0)


# Renames: Python announces each before it is done.

_over = False


def _heard(event: str, arguments: Sequence[Any]) -> None:
    global _over
    if _over:  # the rename is done, and this is whatever comes next
        _die()
    if event == "os.rename":
        name = os.path.basename(os.fspath(arguments[1]))  # noqa: PTH119 (pathlib is not imported this early)
        if fnmatch.fnmatch(name, _at["file"]) and _is_it():
            if _at["when"] == "before":
                _die()
            _over = True


# Calls: the function is wrapped when its module has been imported.


class _Wrapping(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, module: str, path: str) -> None:
        self.module, self.path = module, path
        self._inner: Any = None

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        if name != self.module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None:
            self._inner, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        found: ModuleType | None = self._inner.create_module(spec)
        return found

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        owner: Any = module
        *above, last = self.path.split(".")
        for part in above:
            owner = getattr(owner, part)
        setattr(owner, last, _deadly(getattr(owner, last)))


def _deadly(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        if not _is_it():
            return function(*arguments, **named)
        when = _at["when"]
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


def _tear(path: Any) -> None:
    content = path.read_bytes()
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    os.truncate(path, (last + len(content)) // 2)


match _at.get("event"):
    case "rename":
        sys.addaudithook(_heard)
    case "call":
        sys.meta_path.insert(0, _Wrapping(*_at["function"].split(":")))
