"""Text of unknown origin made safe for a terminal or a shell. Of its own, so that programs without torch can use it."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path


def printable(text: str) -> str:
    """Text of unknown origin (names, paths, reasons) with what a terminal would obey written out, e.g. ESC as \\x1b."""
    return "".join(c if unicodedata.category(c) not in _OBEYED else _written_out(c) for c in text)


_OBEYED = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories of control characters, direction overrides, surrogates and line ends."""


def _written_out(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def as_override(key: str, folder: Path) -> str:
    """KEY=FOLDER as it can be pasted into a shell, whatever the folder is called."""
    plain = re.fullmatch(r"[\w./-]+", str(folder)) is not None
    return f"{key}={folder}" if plain else f"\"{key}='{folder}'\""
