"""Run folders -> entries: thin, until the reading layer is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mathverify.records import RunRecord, read_record


@dataclass(frozen=True)
class Entry:
    """One run to be shown. name: what tells it from the others."""

    name: str
    folder: Path
    record: RunRecord


def read(folders: Sequence[Path]) -> list[Entry]:
    found = [path.parent for folder in folders for path in sorted(Path(folder).rglob("result.json"))]
    return [Entry(folder.name, folder, read_record(folder)) for folder in found]
