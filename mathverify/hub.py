"""What the Hugging Face hub and its cache on this machine can give right now: does it answer, is the cache whole?

Only looks. Loading is base.py's and examples/hub.py's business; these say which way to go and what went wrong.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROBE_SECONDS = 5.0
"""For the hub's first answer. Its client tries every file again and again: a cached model took more than two minutes to
load while nothing listened at the hub's address."""


@functools.cache
def hub_answers() -> bool:
    """Whether the hub can be reached at all, in whatever mood; asked once a process. False in its offline mode."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
    except Exception:  # of httpx, ssl and the system's own
        return False
    return True


@contextmanager
def nobody_asked_in_vain() -> Iterator[None]:
    """Within, the hub's clients are in their offline mode if the hub does not answer: they neither retry nor say so."""
    from huggingface_hub import constants

    # datasets keeps a switch of its own; it is imported where it matters
    switches: list[Any] = [constants, *(sys.modules[name] for name in ("datasets.config",) if name in sys.modules)]
    before = [switch.HF_HUB_OFFLINE for switch in switches]
    if not hub_answers():
        for switch in switches:
            switch.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for switch, was in zip(switches, before, strict=True):
            switch.HF_HUB_OFFLINE = was


def cache_damage(name: str, kind: str, revision: str | None = None) -> str | None:
    """What is wrong with the cached copy of a model or dataset, as 'FILE is ...'; None if nothing is, or none is there.

    Args:
        name: as on the hub, 'owner/name'. kind: 'model' or 'dataset'. revision: branch, tag or commit; default main.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.file_download import repo_folder_name

    try:
        folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind)
    except HFValidationError:  # no name of the hub: nothing of it is cached
        return None
    reference = folder / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision or ""
    for file in sorted((folder / "snapshots" / commit).rglob("*")) if commit else ():
        if (wrong := _damage(file)) is not None:
            return f"{file} {wrong}"
    if next(folder.glob("blobs/*.incomplete"), None) is not None:
        return f"the download into {folder} was cut short"
    return None


def mending(name: str, kind: str) -> str:
    """The command that repairs a damaged copy."""
    return f"`hf download {name}{' --repo-type dataset' * (kind == 'dataset')} --force-download` mends it"


def _damage(file: Path) -> str | None:
    if not file.exists():
        return "is a link to a file that is not there"
    if file.is_dir():
        return None
    if file.name.endswith(".safetensors.index.json") and (missing := next(_missing_shards(file), None)):
        return f"names {missing}, which is not there"
    whole = {".safetensors": _is_whole_safetensors, ".json": _is_json, ".parquet": _is_whole_parquet}.get(file.suffix)
    return "is torn" if whole is not None and not whole(file) else None


def _is_whole_safetensors(file: Path) -> bool:
    """As long as its header says: 8 bytes of length n, n bytes of JSON with every tensor's place, the tensors."""
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > file.stat().st_size:
            return False
        try:
            header = json.loads(stream.read(length))
            ends = [tensor["data_offsets"][1] for key, tensor in header.items() if key != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
    return file.stat().st_size == 8 + length + max(ends, default=0)


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_bytes())
    except ValueError:
        return False
    return True


def _is_whole_parquet(file: Path) -> bool:
    with file.open("rb") as stream:
        start = stream.read(4)
        stream.seek(max(0, file.stat().st_size - 4))
        return start == stream.read(4) == b"PAR1" and file.stat().st_size >= 12


def _missing_shards(index: Path) -> Iterator[str]:
    if not _is_json(index):
        return
    weights = json.loads(index.read_bytes()).get("weight_map", {})
    for shard in dict.fromkeys(weights.values()):
        if not (index.parent / shard).exists():
            yield shard
