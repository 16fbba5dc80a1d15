"""Where a study lives: a journal file that survives kill -9, or a database by URL that may restart meanwhile; the lock
that workers share; and the ways of a password. Knows nothing of trials."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from hydra.utils import instantiate
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from mathverify.errors import UserError
from mathverify.files import cannot_write
from mathverify.records import REDACTED, redact
from mathverify.sweep.targets import check_targets

JOURNAL = "study.journal"
STORAGE_VARIABLE = "MATHVERIFY_STORAGE"
"""Environment variable that carries a storage URL with a password to jobs, so that it is in no file and no override."""
PASSWORD_VARIABLE, PLAIN_VARIABLE = f"{STORAGE_VARIABLE}_PASSWORD", f"{STORAGE_VARIABLE}_PLAIN_PASSWORD"
"""The password alone, as the URL has it and without its escapes, by names that `redact` takes for a secret's."""

LOCK_SECONDS = 120.0
"""Longest wait for a lock that is held for milliseconds, or for as long as a sampler proposes."""

T = TypeVar("T")


class FlockJournalLock(JournalFileOpenLock):
    """Exclusive access to the journal. The kernel gives the lock back when its process dies, however it dies."""

    def __init__(self, path: Path) -> None:
        self._path = path.with_name(path.name + ".flock")
        self._handle: int | None = None

    def acquire(self) -> bool:
        self._handle = _locked(self._path)
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
        try:
            with self._guarded():
                self._mend()
                with self._path.open("ab") as file:
                    file.write(lines.encode())
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            raise cannot_write(self._path, error) from error

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


def open_storage(storage: str | dict[str, Any] | None, folder: Path, patient: bool = False) -> BaseStorage:
    """The storage that hydra.sweeper.storage names; without one, a journal file in the study's folder.

    patient: a database that does not answer is waited for, as within a study; at its start that is an error at once.

    Raises:
        UserError: a URL that is wrong, or a database that cannot be reached; never with its password.
    """
    if storage is None:
        return JournalStudy(folder / JOURNAL)
    if isinstance(storage, str) and storage.startswith("journal://"):
        return JournalStudy(Path(storage.removeprefix("journal://")))
    try:
        url = storage
        if isinstance(storage, dict):
            check_targets(storage, "hydra.sweeper.storage")
            if storage.keys() != {"_target_", "url"} or storage["_target_"] != "optuna.storages.RDBStorage":
                opened: BaseStorage = instantiate(storage)  # with settings of its own: its own way with restarts too
                return opened
            url = storage["url"]
        return open_database(str(url)) if not patient else patiently(lambda: open_database(str(url)))
    except UserError:
        raise
    except Exception as error:
        raise _cannot_open(storage, error) from None


def existing_storage(storage: str | dict[str, Any] | None, folder: Path) -> BaseStorage | None:
    """As `open_storage`, for a look: None, and nothing is made, where there is no study yet.

    Raises:
        UserError: as `open_storage`.
    """
    if storage is None or (isinstance(storage, str) and storage.startswith("journal://")):
        path = folder / JOURNAL if storage is None else Path(str(storage).removeprefix("journal://"))
        return JournalStudy(path) if path.exists() else None
    if isinstance(storage, str):
        from sqlalchemy import create_engine, inspect, make_url

        try:
            url = make_url(with_driver(storage))
            if url.get_backend_name() == "sqlite" and not Path(url.database or "").exists():
                return None
            engine = create_engine(url, **_engine_options(storage))
            there = inspect(engine).has_table("studies")
            engine.dispose()
        except Exception as error:
            raise _cannot_open(storage, error) from None
        if not there:
            return None
    return open_storage(storage, folder)


def _cannot_open(storage: str | dict[str, Any], error: Exception) -> UserError:
    remedy = "see that it runs, that it lets this user in, and that the URL is right"
    if isinstance(error, ImportError):
        remedy = "pip install 'mathverify[postgres]'" if "psycopg" in str(error) else "install its driver"
    return UserError(f"hydra.sweeper.storage = {shown(storage)} cannot be opened ({_reason(error)}): {remedy}")


class JournalStudy(JournalStorage):
    """A journal that knows its file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        _refuse_foreign(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            super().__init__(Journal(path))
        except OSError as error:
            raise UserError(
                f"{path}: cannot be opened as a study's journal ({error.strerror or error}): use another folder "
                "(hydra.sweep.dir=...), or mend its permissions"
            ) from None


def _refuse_foreign(path: Path) -> None:
    """Before anything is written: a journal has one JSON object with an op_code a line. A torn last line is mended."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder, not a study's journal: choose another folder (hydra.sweep.dir=...)")
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not _is_entry(line) and not _is_torn(line):
                raise UserError(
                    f"{path}: line {number} is not of a study's journal: it is damaged or another program's; "
                    "remove the line, or choose another folder (hydra.sweep.dir=...)"
                )


def _is_entry(line: bytes) -> bool:
    try:
        entry = json.loads(line)
    except ValueError:
        return False
    return isinstance(entry, dict) and "op_code" in entry


def _is_torn(line: bytes) -> bool:
    """Whether a line without an end is the beginning of an entry."""
    begins = b'{"op_code":'
    return not line.endswith(b"\n") and (line.startswith(begins) or begins.startswith(line))


def shown(storage: str | dict[str, Any] | None) -> str:
    """The storage as it may be printed: no passwords."""
    if storage is None:
        return "journal file"
    text = str(storage)
    written = _password(storage if isinstance(storage, str) else str(storage.get("url", "")))
    if written is not None:  # by its place: what is no proper URL may have a password all the same
        text = text.replace(f":{written}@", f":{REDACTED}@")
    return str(redact(text))


# Passwords


def hide_password(storage: str | dict[str, Any] | None) -> bool:
    """Put a storage that has a password into the environment, for jobs; whether it has one.

    From then on `redact` knows the password by itself, wherever it turns up.
    """
    for name in (STORAGE_VARIABLE, PASSWORD_VARIABLE, PLAIN_VARIABLE):  # of an earlier sweep of this process
        os.environ.pop(name, None)
    if storage is None or shown(storage) == str(storage):
        return False
    os.environ[STORAGE_VARIABLE] = storage if isinstance(storage, str) else json.dumps(storage)
    written = _password(storage if isinstance(storage, str) else str(storage.get("url", "")))
    if written is not None:
        os.environ[PASSWORD_VARIABLE] = written
        os.environ[PLAIN_VARIABLE] = unquote(written)
    return True


def hidden_storage() -> str | dict[str, Any] | None:
    """What `hide_password` put into the environment of this process or of the one that started it."""
    text = os.environ.get(STORAGE_VARIABLE) or None
    if text is not None and text.startswith("{"):
        found: dict[str, Any] = json.loads(text)
        return found
    return text


def _password(url: str) -> str | None:
    """As it stands in the URL: between the first colon after the user and the last @."""
    before, _, _ = url.partition("://")[2].rpartition("@")
    user, _, password = before.partition(":")
    return None if "/" in user else password or None


# Databases


class Database(RDBStorage):
    """Optuna's storage in a database, whose calls outlive a restart of it: they are repeated with fresh connections.

    Within `alone` on PostgreSQL they are not: there the whole section begins anew, since its lock is gone.
    """

    def __init__(self, url: str) -> None:
        super().__init__(with_driver(url), engine_kwargs={"hide_parameters": True, **_engine_options(url)})


def _outliving(name: str) -> Callable[..., Any]:
    """The method of RDBStorage, patient."""
    plain = getattr(RDBStorage, name)

    @functools.wraps(plain)
    def call(self: Database, *arguments: Any, **named: Any) -> Any:
        if getattr(_section, "is_open", False):
            return plain(self, *arguments, **named)
        return patiently(lambda: plain(self, *arguments, **named))

    return call


# Each is one transaction, and harmless when it is done a second time because the answer to the first was lost: what is
# set is set to the same, and a trial created twice is taken up by a worker as one whose proposer died.
for _name in (
    *("create_new_study", "set_study_user_attr", "set_study_system_attr", "get_study_id_from_name"),
    *("get_study_name_from_id", "get_study_directions", "get_study_user_attrs", "get_study_system_attrs"),
    *("get_all_studies", "_create_new_trial", "_set_trial_param", "get_trial_id_from_study_id_trial_number"),
    *("set_trial_state_values", "set_trial_intermediate_value", "set_trial_user_attr", "set_trial_system_attr"),
    *("get_trial", "_get_trials", "_get_best_trial_id"),
):
    setattr(Database, _name, _outliving(_name))


def open_database(url: str) -> Database:
    """Connect, and make Optuna's tables if there are none; only one of several workers does."""
    if (file := _sqlite_file(url)) is not None:
        with _holding(_lock_of(file, "tables")):
            return Database(url)
    if not _is_postgres(url):
        return Database(url)
    import sqlalchemy as sql

    engine = sql.create_engine(with_driver(url), poolclass=sql.NullPool, **_engine_options(url))
    with engine.connect() as connection:  # the lock goes with the connection
        connection.execute(sql.text("SELECT pg_advisory_lock(:key)"), {"key": _key("tables")})
        return Database(url)


def with_driver(url: str) -> str:
    """postgresql:// names psycopg 3, the driver of the extra mathverify[postgres]; other URLs stay as they are."""
    scheme, mark, rest = url.partition("://")
    return f"postgresql+psycopg{mark}{rest}" if scheme in ("postgresql", "postgres") else url


def _is_postgres(url: str) -> bool:
    return url.partition("://")[0].partition("+")[0] in ("postgresql", "postgres")


def _engine_options(url: str) -> dict[str, Any]:
    """A connection that a restart cut is not used again, and a host that vanished is noticed within a minute."""
    if url.startswith("sqlite"):
        return {"connect_args": {"timeout": 60}}
    options: dict[str, Any] = {"pool_pre_ping": True}
    if with_driver(url).startswith(("postgresql+psycopg:", "postgresql+psycopg2:")):
        known = {"connect_timeout": 10, "keepalives_idle": 20, "keepalives_interval": 5, "keepalives_count": 3}
        given = url.partition("?")[2]
        options["connect_args"] = {name: value for name, value in known.items() if f"{name}=" not in given}
    return options


# A database that does not answer


PATIENCE_SECONDS = 600.0
"""How long a worker waits for a database that does not answer: a restart takes seconds, an upgrade minutes."""
_patience: ContextVar[float] = ContextVar("patience", default=PATIENCE_SECONDS)
_last_outage = -math.inf


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Wait only so long for a database, in this thread, before UserError."""
    token = _patience.set(seconds)
    try:
        yield
    finally:
        _patience.reset(token)


def briefly() -> AbstractContextManager[None]:
    """Wait for a database only as long as someone who wants to leave, or to go on, can wait."""
    return patience(5.0)


def last_outage() -> float:
    """When a database last did not answer this process (time.monotonic); -inf if it always did."""
    return _last_outage


def patiently(work: Callable[[], T]) -> T:
    """Do `work`, again and again while its database does not answer.

    Raises:
        UserError: it has not answered for as long as `patience` allows.
    """
    global _last_outage
    start = time.monotonic()
    pause = 0.1
    while True:
        try:
            return work()
        except Exception as error:
            if not is_outage(error):
                raise
            _last_outage = time.monotonic()
            if _last_outage - start >= _patience.get():
                raise UserError(
                    f"the study's database does not answer ({_reason(error)}): see that it runs and can be reached, "
                    "then give the same command again, which continues"
                ) from None
            if 1 < pause < 2:  # once; shorter ones are not worth a word
                print(f"waiting for the study's database: {_reason(error)}", flush=True)
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(2 * pause, 10.0)


def is_outage(error: BaseException | None) -> bool:
    """Whether an error means that the database or the way to it is down, restarting, full or busy; not that it refuses
    the user or lacks what is asked for."""
    from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, PendingRollbackError
    from sqlalchemy.exc import TimeoutError as PoolTimeout

    while error is not None:
        # Optuna reads on after a query that failed; a connection that was cut says then that it was not rolled back.
        if isinstance(error, OperationalError | InterfaceError | PoolTimeout | PendingRollbackError) or (
            isinstance(error, DBAPIError) and error.connection_invalidated
        ):
            return _REFUSAL.search(str(error)) is None
        error = error.__cause__
    return False


_REFUSAL = re.compile(
    r"authentication failed|no password supplied|no pg_hba.conf entry|permission denied|no such (table|column)"
    r"|(database|role) \"[^\"]*\" does not exist|unable to open database file"
)


def _reason(error: BaseException) -> str:
    """What the driver said, in one line: SQLAlchemy and Optuna put their own words around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return str(redact(lines[0])) if lines else type(error).__name__


# The lock


def alone(storage: BaseStorage, name: str, folder: Path, section: Callable[[], T]) -> T:
    """Run `section` while no other worker of study `name` is in one: to propose, take over or tell a trial.

    On PostgreSQL the lock is the database's (an advisory one, so that machines need share nothing else), else a file
    beside the study's. Both are let go when the holder dies. One that is suspended is cut off by the database; a file's
    lock it keeps until it goes on. If the database goes away in the middle, the section is run anew from its beginning
    under a fresh lock, so it must look at the study before it changes anything.
    """
    if isinstance(storage, RDBStorage) and storage.engine.dialect.name == "postgresql":
        return patiently(lambda: _alone_in_postgres(storage, name, section))
    with _holding(_lock_path(storage, name, folder)):
        return section()


@contextmanager
def _holding(path: Path) -> Iterator[None]:
    """Exclusively, until the block or the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _locked(path)
    try:
        yield
    finally:
        os.close(handle)


def _locked(path: Path) -> int:
    """An open handle that holds the lock on `path`; closing it, or dying, gives the lock back.

    Raises:
        UserError: somebody has held it for LOCK_SECONDS, which no working process does.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(handle)
                raise UserError(
                    f"{path}: has been locked by another process for {LOCK_SECONDS:g} s: "
                    "see whether a worker of this study is stopped or hangs, and end it"
                ) from None
        time.sleep(0.005)


def _alone_in_postgres(storage: RDBStorage, name: str, section: Callable[[], T]) -> T:
    """All that the section reads and writes goes through the very connection that holds the lock.

    So nothing can be written once the lock is lost: they are lost together. A worker that stands still within its
    section (suspended, its machine gone) is cut off by the server, and wakes up to that error.
    """
    import sqlalchemy as sql
    from sqlalchemy.orm import Session

    with storage.engine.connect() as connection:
        connection.detach()  # from the pool: closing it ends the lock, whatever state the section leaves it in
        connection.execute(sql.text(_LOCK_SETTINGS))
        connection.execute(sql.text("SELECT pg_advisory_lock(:key)"), {"key": _key(name)})
        connection.commit()  # the lock is the connection's, not this transaction's
        sql.event.listen(connection, "before_cursor_execute", _only_on(connection.connection.dbapi_connection))
        storage.scoped_session.registry.set(Session(bind=connection))
        _section.is_open = True
        try:
            return section()
        except Exception as error:
            if connection.invalidated:  # whatever the section made of that
                raise _lock_lost() from error
            raise
        finally:
            _section.is_open = False
            storage.scoped_session.remove()


def _only_on(locked: Any) -> Callable[..., None]:
    """SQLAlchemy replaces a connection that broke; here that would be one without the lock."""

    def check(connection: Any, *statement: Any) -> None:
        if connection.connection.dbapi_connection is not locked:
            raise _lock_lost()

    return check


def _lock_lost() -> Exception:
    from sqlalchemy.exc import OperationalError

    return OperationalError("section", None, ConnectionError("the connection that held the study's lock is gone"))


_section = threading.local()
_LOCK_SETTINGS = """
SELECT set_config(known.name, wanted.value, false) FROM pg_settings AS known JOIN (VALUES
    ('idle_session_timeout', '5min'), ('idle_in_transaction_session_timeout', '5min'),
    ('tcp_keepalives_idle', '20'), ('tcp_keepalives_interval', '5'), ('tcp_keepalives_count', '3')
) AS wanted (name, value) USING (name)
"""
"""Those that this version of PostgreSQL knows."""


def _key(name: str) -> int:
    """A study's number among PostgreSQL's advisory locks."""
    return int.from_bytes(hashlib.sha256(f"mathverify/{name}".encode()).digest()[:7], "big")


def _lock_path(storage: BaseStorage, name: str, folder: Path) -> Path:
    """Beside the study's file, where every process that shares the file finds it."""
    if isinstance(storage, JournalStudy):
        return _lock_of(storage.path, name)
    file = _sqlite_file(storage.url) if isinstance(storage, RDBStorage) else None
    return folder / ".lock" if file is None else _lock_of(file, name)


def _lock_of(file: Path, what: str) -> Path:
    return file.with_name(f".{file.name}.{hashlib.sha256(what.encode()).hexdigest()[:8]}.lock")


def _sqlite_file(url: str) -> Path | None:
    """The file of an sqlite URL; None for other databases, and for one in memory."""
    scheme, _, rest = url.partition("://")
    path = rest.removeprefix("/").partition("?")[0]
    return Path(path) if scheme.partition("+")[0] == "sqlite" and path not in ("", ":memory:") else None
