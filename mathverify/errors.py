"""The exceptions a user is meant to see: their text is a single line that says what, where and the remedy."""


class UserError(ValueError):
    """Bad input: config, data, model or study. Commands print its text and exit with code 2, no traceback.

    The text names what is wrong, where, and what to do about it, on one line; it never contains secrets.
    """


class CannotWrite(UserError):
    """The disk or the permissions refuse. Whatever was under way can go on where it stands once that is mended."""


class RunFailed(Exception):
    """A run came to nothing by itself (its loss was not finite, say); its record says why. Exit code 1."""


class Interrupted(Exception):
    """A signal asked the work to end; what was done is saved. Exit code 130."""
