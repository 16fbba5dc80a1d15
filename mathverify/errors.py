"""The exceptions a user is meant to see: their text is a single line that says what, where and the remedy."""

from __future__ import annotations

from traceback import clear_frames


class UserError(ValueError):
    """Bad input: config, data, model or study. Commands print its text and exit with code 2, no traceback.

    The text names what is wrong, where, and what to do about it, on one line; it never contains secrets.
    """


class CannotWrite(UserError):
    """The disk or the permissions refuse. Whatever was under way can go on where it stands once that is mended."""


class NoRoom(UserError):
    """Memory is too small for a run beside what else is in it; the run may fit when others have gone."""


class RunFailed(Exception):
    """A run came to nothing by itself (its loss was not finite, say); its record says why. Exit code 1."""


class Interrupted(Exception):
    """A signal asked the work to end; what was done is saved. Exit code 130."""


def without_frames(error: BaseException) -> None:
    """Drop the tracebacks of an error and of what led to it: their frames keep runs and models in memory."""
    for link in _chain(error):
        link.__traceback__ = None


def empty_frames(error: BaseException) -> None:
    """Let go of what the frames of an error's traceback hold, which may be a run and its model; its lines stay."""
    for link in _chain(error):
        clear_frames(link.__traceback__)


def _chain(error: BaseException) -> list[BaseException]:
    """An error and what led to it."""
    seen: list[BaseException] = []
    links: list[BaseException | None] = [error]
    while links:
        link = links.pop()
        if link is not None and link not in seen:
            seen.append(link)
            links += [link.__cause__, link.__context__]
    return seen
