"""What a run leaves behind: result.json, predictions, provenance; every file written whole or not at all.

Knows formats, not training: who fills a record is train.py's and the engine's business, who reads them compare's.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import mathverify
from mathverify.config import RunConfig, to_plain
from mathverify.errors import CannotWrite, UserError
from mathverify.files import is_full, remove_leftovers, temporary_beside, write_atomic
from mathverify.scoring import Metrics

if TYPE_CHECKING:
    import pyarrow
    from filelock import BaseFileLock

SCHEMA_VERSION = 1
RESULT = "result.json"
PREDICTIONS = "predictions.parquet"
CHECKPOINT = "checkpoint"
ANOTHER_FOLDER = "another run folder (hydra.run.dir=..., of a grid hydra.sweep.dir=...)"
OURS = (RESULT, PREDICTIONS, CHECKPOINT, "adapter", "metrics.jsonl")

# Settings that decide where and how fast a run goes, not what comes out: a run may be continued with others.
NOT_OF_THE_RESULT = {
    "": ("tracking", "device"),
    "train": ("threads", "token_budget", "memory", "checkpoint_every"),
    "data": ("cache_dir",),
}
PACKAGES = (
    "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers", "safetensors",
    "hydra-core", "omegaconf", "optuna", "wandb", "numpy", "scipy", "scikit-learn", "pyarrow", "triton",
)  # fmt: skip


class Status(Enum):
    """Where a run stands. A `running` record whose process is gone was killed: it can be continued."""

    running = "running"
    completed = "completed"
    pruned = "pruned"
    failed = "failed"
    interrupted = "interrupted"


class FolderState(Enum):
    """What a claimed run folder holds of this run."""

    nothing = "nothing"
    resumable = "resumable"
    finished = "finished"


@dataclass
class RunMetrics:
    """What the run measured. `test` is at threshold 0, `tuned` on the same rows at `threshold` (log-odds, tuned on
    validation); `slices` are of the test set; `zero_shot` is the frozen base on the test set, without adapter."""

    test: Metrics | None = None
    tuned: Metrics | None = None
    threshold: float | None = None
    slices: dict[str, Metrics] = field(default_factory=dict)
    validation: Metrics | None = None
    zero_shot: Metrics | None = None


@dataclass
class Costs:
    """What the run took. seconds: by phase (e.g. load, prepare, train, evaluate). tokens: of training passes.
    tokens_per_second: of the training phase. peak_memory_bytes: of the GPU, or resident on CPU."""

    seconds: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    optimizer_steps: int = 0
    examples_seen: int = 0
    trainable_parameters: int | None = None


@dataclass
class Provenance:
    """What made the run: code, packages, machine. git_dirty: tracked files differed from the commit."""

    mathverify: str
    git_commit: str | None
    git_dirty: bool | None
    python: str
    platform: str
    cpu_count: int
    threads: int | None
    packages: dict[str, str] = field(default_factory=dict)


@dataclass
class RunRecord:
    """result.json. Times are ISO 8601 in UTC; `config` is `to_plain` of the resolved RunConfig.

    fingerprint: of the settings that decide the result. data_fingerprint, base_fingerprint: of the training rows as
    tokenised and of the frozen base. test_fingerprint: of the test rows themselves, whatever the prompt: only runs that
    share it can be compared row by row. device: as used ("cpu", "cuda:0 NVIDIA H200"). reason: why a run failed or was
    cut short.
    """

    name: str
    status: Status
    config: dict[str, Any]
    fingerprint: str
    seed: int
    provenance: Provenance
    started: str
    schema_version: int = SCHEMA_VERSION
    finished: str | None = None
    reason: str | None = None
    device: str | None = None
    data_fingerprint: str | None = None
    test_fingerprint: str | None = None
    base_fingerprint: str | None = None
    metrics: RunMetrics = field(default_factory=RunMetrics)
    costs: Costs = field(default_factory=Costs)
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def begin(cls, config: RunConfig) -> RunRecord:
        """The record of a run that starts now."""
        return cls(
            name=config.name,
            status=Status.running,
            config=to_plain(config),
            fingerprint=fingerprint(config),
            seed=config.seed,
            provenance=provenance(config.train.threads),
            started=utc_now(),
        )

    def to_plain(self) -> dict[str, Any]:
        """JSON-ready, enums by value."""
        plain: dict[str, Any] = to_plain(self)
        return plain


def write_record(run_dir: Path, record: RunRecord) -> Path:
    """Write result.json into the run folder; returns its path."""
    path = run_dir / RESULT
    write_json(path, record.to_plain())
    return path


def read_record(run_dir: Path) -> RunRecord:
    """Read a run folder's result.json. Raises UserError when missing, torn, not ours, or of a newer schema."""
    from pydantic import ValidationError

    path = run_dir / RESULT
    plain = read_json(path)
    version = plain.get("schema_version") if isinstance(plain, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise UserError(f"{path}: written in schema {version}, this version reads {SCHEMA_VERSION}: update mathverify")
    try:
        record: RunRecord = _record_adapter().validate_python(plain)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "its top level"
        raise UserError(
            f"{path}: not a run record (at {_one_line(where)}: {_one_line(first['msg'])}): "
            "point at a folder that `python -m mathverify.train` made"
        ) from None
    return record


@functools.cache
def _record_adapter() -> Any:
    """The parser of records, from the dataclasses' own types. Made late, since pydantic takes time to import."""
    from pydantic import TypeAdapter

    return TypeAdapter(RunRecord)


def write_json(path: Path, tree: Any) -> None:
    """Write strict JSON (no NaN), redacted, atomically. Raises ValueError on NaN or infinity."""
    text = json.dumps(redact(tree), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(path, text.encode("utf-8", "backslashreplace") + b"\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises UserError naming the file and the remedy when missing, torn or not JSON."""
    try:
        return json.loads(path.read_bytes(), parse_constant=_refuse_constant, parse_float=_finite)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: check the path, or let the run that should write it finish") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not readable as JSON ({_one_line(str(error))}): it is torn or another program's; "
            "delete it and run again, or point at another folder"
        ) from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    if math.isinf(number := float(digits)):
        raise ValueError(f"{digits[:20]} is out of range")
    return number


@dataclass
class Predictions:
    """One evaluation set's rows and what the run said of them. All of length n.

    scores: float64 [n], log-odds of True. labels: bool [n]. ids, groups: text. slices: text or None.
    """

    ids: list[str]
    groups: list[str]
    slices: list[str | None]
    labels: NDArray[np.bool_]
    scores: NDArray[np.float64]

    def table(self) -> pyarrow.Table:
        """Columns id, group, slice, is_correct, score (log-odds of True), probability (of True)."""
        import pyarrow as pa
        from scipy.special import expit

        scores = np.asarray(self.scores, dtype=np.float64)
        columns = {
            "id": pa.array([str(i) for i in self.ids], pa.string()),
            "group": pa.array([str(g) for g in self.groups], pa.string()),
            "slice": pa.array(self.slices, pa.string()),
            "is_correct": pa.array(np.asarray(self.labels, dtype=bool)),
            "score": pa.array(scores),
            "probability": pa.array(expit(scores)),
        }
        return pa.table(columns)


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Write predictions.parquet atomically. Raises UserError when the disk refuses."""
    import pyarrow.parquet as pq

    table = predictions.table()
    write_atomic(path, lambda file: pq.write_table(table, file, compression="zstd"))


def read_predictions(path: Path) -> Predictions:
    """Read predictions.parquet back. Raises UserError when missing, torn, or without the columns."""
    table = read_prediction_table(path)
    return Predictions(
        table["id"].to_pylist(),
        table["group"].to_pylist(),
        table["slice"].to_pylist(),
        table["is_correct"].to_numpy(),
        table["score"].to_numpy(),
    )


def read_prediction_table(path: Path) -> pyarrow.Table:
    """The columns of predictions.parquet but for probability, as Arrow holds them. Raises as `read_predictions`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ["id", "group", "slice", "is_correct", "score"]
    try:
        with pq.ParquetFile(path, memory_map=True) as file:  # read_table takes longer and imports pandas
            return file.read(columns=names).select(names)
    except (OSError, KeyError, pa.ArrowException) as error:
        raise UserError(
            f"{path}: not readable as predictions ({_one_line(str(error))}): run the evaluation again"
        ) from None


def fingerprint(config: RunConfig) -> str:
    """SHA-256 (16 hex digits) of the settings that decide the result; equal for runs that should come out equal."""
    plain = to_plain(config)
    for part, names in NOT_OF_THE_RESULT.items():
        tree = plain[part] if part else plain
        for name in names:
            del tree[name]
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def lock_run_folder(path: Path) -> BaseFileLock:
    """Hold the run folder for this process until `release`, or until the process is gone, however it goes.

    Raises UserError when another process is at work in it.
    """
    from filelock import FileLock, Timeout

    check_writable(path)
    path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{path}: another process is at work in this run folder: wait for it, or choose {ANOTHER_FOLDER}"
        ) from None
    return lock


def claim_run_folder(path: Path, config: RunConfig) -> FolderState:
    """Make the run folder if needed and say what it holds of this run.

    Returns nothing (start from the beginning), resumable (this run, cut short, with a checkpoint) or finished.
    Leftovers of a write that a kill cut short are removed: a run folder belongs to one process at a time.
    Raises UserError, having changed nothing, when the folder holds a different run, files of another program in
    the run's places, or cannot be written.
    """
    check_writable(path)
    record = read_record(path) if (path / RESULT).exists() else None
    if record is None:
        _refuse_foreign(path)
        path.mkdir(parents=True, exist_ok=True)
    elif record.fingerprint != fingerprint(config):
        raise UserError(
            f"{path}: already holds another run ({_difference(record.config, to_plain(config))}): "
            f"choose {ANOTHER_FOLDER}, or delete this one"
        )
    for folder in (path, path / CHECKPOINT, path / "adapter", path / ".hydra"):
        remove_leftovers(folder)
    if record is None:
        return FolderState.nothing
    if record.status in (Status.completed, Status.pruned):
        return FolderState.finished
    checkpoint = path / CHECKPOINT
    return FolderState.resumable if checkpoint.is_dir() and any(checkpoint.iterdir()) else FolderState.nothing


def check_writable(path: Path) -> None:
    """Refuse a path that is a file, or whose nearest folder does not let us write or has no room (tried, not asked)."""
    nearest = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise UserError(f"{path}: {nearest} is a file, not a folder: choose {ANOTHER_FOLDER}")
    probe = temporary_beside(nearest / "probe")
    try:
        with probe.open("xb") as file:
            file.write(bytes(4096))  # an empty file finds room on a full disk
    except OSError as error:
        remedy = "free space" if is_full(error) else "mend its permissions"
        raise CannotWrite(
            f"{path}: cannot be written ({error.strerror}): choose {ANOTHER_FOLDER}, or {remedy}"
        ) from None
    finally:
        with suppress(OSError):  # there is none where nothing can be made
            probe.unlink(missing_ok=True)


def _refuse_foreign(path: Path) -> None:
    """Without a result.json, files in its places are not this run's."""
    found = [name for name in OURS if (path / name).exists()]
    if found:
        raise UserError(
            f"{path}: holds {', '.join(found)} but no {RESULT}, so it is not known whose: "
            f"choose {ANOTHER_FOLDER}, or delete these"
        )


def _difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """The first few settings that differ, as 'lora.rank is 16 there, 64 here'."""
    a, b = _flatten(redact(theirs)), _flatten(redact(ours))
    ignored = tuple(f"{part}.{name}" if part else name for part, names in NOT_OF_THE_RESULT.items() for name in names)
    keys = [k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
    keys = [k for k in keys if not any(k == i or k.startswith(f"{i}.") for i in ignored)]
    said = [f"{k} is {_one_line(str(a.get(k)))} there, {_one_line(str(b.get(k)))} here" for k in keys[:3]]
    return "; ".join(said) + (f"; and {len(keys) - 3} more" if len(keys) > 3 else "") or "other settings"


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping) and value
        flat |= _flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def provenance(threads: int | None = None) -> Provenance:
    """What runs here: versions by package metadata (nothing heavy is imported), git state of the checkout if any."""
    commit, dirty = _git_state(Path(mathverify.__file__).resolve().parents[1])
    return Provenance(
        mathverify=mathverify.__version__,
        git_commit=commit,
        git_dirty=dirty,
        python=platform.python_version(),
        platform=platform.platform(),
        cpu_count=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=threads,
        packages=dict(_versions()),
    )


@functools.cache
def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@functools.cache  # the code that runs is the code as it was when first asked
def _git_state(root: Path) -> tuple[str | None, bool | None]:
    """Commit and dirty flag of the checkout that the package runs from; (None, None) for an installed one."""
    if not (root / ".git").exists():
        return None, None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def utc_now() -> str:
    """The time as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


REDACTED = "[redacted]"
_SECRET_NAME = re.compile(r"(TOKEN|KEY|PASSWORD|PASSWD|SECRET|CREDENTIALS?)$", re.IGNORECASE)
_SECRET_SETTING = re.compile(
    r"(api_?key|access_?key|password|passwd|secret|(hf|auth|access|api|bearer)_?token)$", re.IGNORECASE
)
_URL_PASSWORD = re.compile(r"([a-z][a-z0-9+.\-]*://[^\s/:@'\"]*):([^\s/'\"]+)@", re.IGNORECASE)
_QUERY_PASSWORD = re.compile(r"([?&](?:password|passwd|token|api_?key)=)[^&\s'\"]+", re.IGNORECASE)
_KNOWN_SHAPES = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b|\bwandb_v1_[A-Za-z0-9_]{20,}")
_SHORTEST_SECRET = 6  # a shorter value, such as 1 or true, would black out ordinary text


def redact(tree: Any) -> Any:
    """A copy of text, or of every text in dicts and lists, without secrets.

    Secrets are: values of environment variables named *_TOKEN, *_KEY, *PASSWORD, *SECRET, *CREDENTIALS (of at least
    6 characters), passwords in URLs (postgresql://user:password@host) and in their queries, tokens of known shape,
    and anything under a dict key such as password or api_key. Everything written or shown goes through here.
    """
    return _redact(tree, _environment_secrets())


def _redact(tree: Any, known: list[str]) -> Any:
    match tree:
        case str():
            return _redact_text(tree, known)
        case dict():
            return {
                _redact(key, known): REDACTED
                if isinstance(key, str) and isinstance(value, str) and value and _SECRET_SETTING.search(key)
                else _redact(value, known)
                for key, value in tree.items()
            }
        case list() | tuple():
            return [_redact(item, known) for item in tree]
        case _:
            return tree


def _redact_text(text: str, known: list[str]) -> str:
    for secret in known:
        text = text.replace(secret, REDACTED)
    text = _URL_PASSWORD.sub(rf"\1:{REDACTED}@", text)
    text = _QUERY_PASSWORD.sub(rf"\1{REDACTED}", text)
    return _KNOWN_SHAPES.sub(REDACTED, text)


def _environment_secrets() -> list[str]:
    """Values to black out, longest first, so that a secret within another leaves no tail."""
    values = {v for name, v in os.environ.items() if _SECRET_NAME.search(name) and len(v) >= _SHORTEST_SECRET}
    return sorted(values, key=len, reverse=True)


def _one_line(text: str) -> str:
    return " ".join(str(redact(text)).split())[:200]
