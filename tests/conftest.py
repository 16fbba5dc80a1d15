"""Fixtures for all tests: the real services of services.py, and a process that every test finds as it was."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

from .services import postgres, slurm

__all__ = ["postgres", "slurm"]


@pytest.fixture(autouse=True)
def a_process_as_it_was() -> Iterator[None]:
    """What a command that ran in this process leaves behind: Hydra's variable, its log handlers, our log records."""
    environment, factory, root = dict(os.environ), logging.getLogRecordFactory(), logging.getLogger()
    handlers = list(root.handlers)
    yield
    os.environ.clear()
    os.environ.update(environment)
    logging.setLogRecordFactory(factory)
    for handler in list(root.handlers):
        if handler not in handlers and type(handler).__module__ == "logging":
            root.removeHandler(handler)
