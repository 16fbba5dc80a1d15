"""Where a study lives: a journal file that survives kill -9, or a database by URL; and the lock that workers share."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from mathverify.errors import UserError
from mathverify.records import redact

JOURNAL = "study.journal"
STORAGE_VARIABLE = "MATHVERIFY_STORAGE"
"""Environment variable that carries a storage URL with a password to jobs, so that it is in no file and no override."""


class FlockJournalLock(JournalFileOpenLock):
    """Exclusive access to the journal. The kernel gives the lock back when its process dies, however it dies."""

    def __init__(self, path: Path) -> None:
        self._path = path.with_name(path.name + ".flock")
        self._handle: int | None = None

    def acquire(self) -> bool:
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        fcntl.flock(handle, fcntl.LOCK_EX)
        self._handle = handle
        return True

    def release(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


class Journal(JournalFileBackend):
    """Optuna's journal file, with a lock that no dead process can hold and a torn last line cut off in time.

    A process killed within its write leaves half a line; Optuna would append to it and then read it never again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._guard = FlockJournalLock(path)
        super().__init__(str(path), lock_obj=self._guard)
        with self._guarded():
            self._mend()

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        with self._guarded():
            self._mend()
            with self._path.open("ab") as file:
                file.write(lines.encode())
                file.flush()
                os.fsync(file.fileno())

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        self._guard.acquire()
        try:
            yield
        finally:
            self._guard.release()

    def _mend(self) -> None:
        """Under the lock nobody is in the middle of a line, so half a line is a dead process's."""
        if not _is_whole(self._path):
            content = self._path.read_bytes()
            os.truncate(self._path, content.rfind(b"\n") + 1)


def _is_whole(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def open_storage(storage: str | dict[str, Any] | None, folder: Path) -> BaseStorage:
    """The storage that hydra.sweeper.storage names; without one, a journal file in the study's folder.

    Raises:
        UserError: a URL that is wrong, or a database that cannot be reached; never with its password.
    """
    if storage is None:
        folder.mkdir(parents=True, exist_ok=True)
        return JournalStorage(Journal(folder / JOURNAL))
    if isinstance(storage, str) and storage.startswith("journal://"):
        path = Path(storage.removeprefix("journal://"))
        path.parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(Journal(path))
    try:
        if isinstance(storage, dict):
            opened: BaseStorage = instantiate(storage)
            return opened
        return RDBStorage(with_driver(storage), engine_kwargs=_engine_options(storage))
    except Exception as error:
        raise _cannot_open(storage, error) from None


def existing_storage(storage: str | dict[str, Any] | None, folder: Path) -> BaseStorage | None:
    """As `open_storage`, for a look: None, and nothing is made, where there is no study yet.

    Raises:
        UserError: as `open_storage`.
    """
    if storage is None or (isinstance(storage, str) and storage.startswith("journal://")):
        path = folder / JOURNAL if storage is None else Path(str(storage).removeprefix("journal://"))
        return JournalStorage(Journal(path)) if path.exists() else None
    if isinstance(storage, str):
        from sqlalchemy import create_engine, inspect, make_url

        try:
            url = make_url(with_driver(storage))
            if url.get_backend_name() == "sqlite" and not Path(url.database or "").exists():
                return None
            engine = create_engine(url)
            there = inspect(engine).has_table("studies")
            engine.dispose()
        except Exception as error:
            raise _cannot_open(storage, error) from None
        if not there:
            return None
    return open_storage(storage, folder)


def _cannot_open(storage: str | dict[str, Any], error: Exception) -> UserError:
    reason = redact(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
    return UserError(f"hydra.sweeper.storage = {shown(storage)} cannot be opened: {reason}")


def with_driver(url: str) -> str:
    """postgresql:// names psycopg 3, the driver of the extra mathverify[postgres]; other URLs stay as they are."""
    scheme, mark, rest = url.partition("://")
    return f"postgresql+psycopg{mark}{rest}" if scheme in ("postgresql", "postgres") else url


def _engine_options(url: str) -> dict[str, Any]:
    """A database that was restarted is met with a fresh connection, not an error."""
    return {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}


def shown(storage: str | dict[str, Any] | None) -> str:
    """The storage as it may be printed: no passwords."""
    return "journal file" if storage is None else str(redact(storage))


@contextmanager
def study_lock(storage: BaseStorage, name: str, folder: Path) -> Iterator[None]:
    """Only one worker of a study at a time: while a trial is proposed, taken over or told.

    Held in the database where it is PostgreSQL (an advisory lock, so that machines need share nothing else), else on a
    file in the study's folder. Both are let go when the holder dies.
    """
    if isinstance(storage, RDBStorage) and storage.engine.dialect.name == "postgresql":
        from sqlalchemy import text

        key = int.from_bytes(hashlib.sha256(f"mathverify/{name}".encode()).digest()[:7], "big")
        with storage.engine.connect() as connection:
            connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": key})
            try:
                yield
            finally:
                connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": key})
                connection.rollback()
        return
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
