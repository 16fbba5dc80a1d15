"""The one exception a user is meant to see: its text is a single line that says what, where and the remedy."""


class UserError(ValueError):
    """Bad input: config, data, model or study. Commands print its text and exit with code 2, no traceback.

    The text names what is wrong, where, and what to do about it, on one line; it never contains secrets.
    """
