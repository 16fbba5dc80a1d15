"""Real services for tests, from Debian's packages (.ci/services), on loopback and without systemd. No test is here.

A test takes a fixture: `postgres` (a server, one for the session; make a database of your own with `database()`) or
`slurm` (a cluster of this one machine, with accounting). Each server is a child of the test process, in the foreground:
it ends with the fixture, and if the test process is killed the kernel ends it.
"""

from __future__ import annotations

import ctypes
import grp
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

PLACES = "/usr/sbin:/sbin:/usr/bin:/bin"
START_SECONDS = 60
PASSWORD = "pass-planted-5fc1"
"""The database's; its owner looks for it in everything a sweep leaves behind, and must find nothing."""


def require(*binaries: str) -> list[str]:
    """Full paths of programs that a test cannot do without.

    Without one the test is skipped, and the reason names the package; with CI=true it fails, because there
    .ci/services has installed them all.
    """
    found = [_find(binary) for binary in binaries]
    missing = [binary for binary, path in zip(binaries, found, strict=True) if path is None]
    if missing:
        lacking(f"{', '.join(missing)} not installed (.ci/services installs what tests need)")
    return [str(path) for path in found]


def lacking(reason: str) -> None:
    """Skip the test, or fail it where nothing may be missing."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def _find(binary: str) -> str | None:
    """On the path, where daemons are, or where Debian puts PostgreSQL's own programs."""
    newest_first = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name), reverse=True)
    places = os.pathsep.join([os.environ.get("PATH", ""), PLACES, *map(str, newest_first)])
    return shutil.which(binary, path=places)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def wait_until(ready: Callable[[], bool], what: str, seconds: float = START_SECONDS, poll: float = 0.1) -> None:
    """Poll until `ready`; an AssertionError that says what did not happen otherwise."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {seconds:g} s")
        time.sleep(poll)


def listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@contextmanager
def service_folder(user: str | None = None) -> Iterator[Path]:
    """A folder directly under /tmp (paths of sockets must be short, and pytest's own is closed to other users)."""
    folder = Path(tempfile.mkdtemp(prefix="mv-"))
    try:
        if user is not None:
            os.chown(folder, pwd.getpwnam(user).pw_uid, pwd.getpwnam(user).pw_gid)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _as_user(user: str | None) -> dict[str, Any]:
    """Arguments of Popen; servers that refuse to run as root get their package's user."""
    if user is None or os.getuid() != 0:
        return {}
    groups = [group.gr_gid for group in grp.getgrall() if user in group.gr_mem]
    return {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": groups}


def start(command: Sequence[str], log: Path, user: str | None = None, **more: Any) -> subprocess.Popen[bytes]:
    """Start a server in the foreground; its words go to `log`."""
    with log.open("ab") as output:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd="/",
            start_new_session=True, preexec_fn=_die_with_tests, **_as_user(user), **more,
        )  # fmt: skip


def _die_with_tests() -> None:
    """The kernel watches the thread that started the server: tests start servers in their main thread."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def stop(process: subprocess.Popen[bytes], how: int = signal.SIGTERM, seconds: float = 20) -> None:
    """Ask a server to end, and make it end."""
    if process.poll() is None:
        process.send_signal(how)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# PostgreSQL


@dataclass
class Postgres:
    """A server of its own on loopback, which wants a password."""

    folder: Path
    port: int
    user: str | None
    binaries: dict[str, str]
    server: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = ["-D", str(self.folder / "data"), "-p", str(self.port), "-k", str(self.folder), "-h", "127.0.0.1"]
        tuned = ["-c", "fsync=off", "-c", "max_connections=60", "-c", "shared_buffers=32MB", "-F"]
        log = self.folder / "server.log"
        self.server = start([self.binaries["postgres"], *options, *tuned], log, self.user)
        ready = [self.binaries["pg_isready"], "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        wait_until(lambda: subprocess.run(ready).returncode == 0, f"PostgreSQL is ready ({_tail(log)})")

    def stop(self, how: int = signal.SIGINT) -> None:
        """SIGINT cuts all connections and ends in order; SIGQUIT is a crash, after which the log is replayed."""
        assert self.server is not None
        stop(self.server, how)

    def restart(self, how: int = signal.SIGINT) -> None:
        self.stop(how)
        self.start()

    def database(self) -> str:
        """A fresh database; its URL, with the password in it."""
        name = f"study_{secrets.token_hex(4)}"
        self.sql(f"CREATE DATABASE {name}")
        return f"postgresql://owner:{PASSWORD}@127.0.0.1:{self.port}/{name}"

    def sql(self, statement: str, database: str = "postgres") -> str:
        """What psql prints for a statement, without headers."""
        command = [self.binaries["psql"], "-qtAX", "-h", "127.0.0.1", "-p", str(self.port), "-U", "owner"]
        done = subprocess.run(
            [*command, "-d", database, "-c", statement],
            env=os.environ | {"PGPASSWORD": PASSWORD}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.strip()


def with_password(folder: Path) -> list[Path]:
    """The files under a folder that have the database's password in them."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if PASSWORD.encode() in path.read_bytes()]


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server."""
    with postgres_server() as server:
        yield server


@contextmanager
def postgres_server() -> Iterator[Postgres]:
    """A PostgreSQL server of one's own, to be stopped and started at will; running when given."""
    names = ["initdb", "postgres", "pg_isready", "psql"]
    binaries = dict(zip(names, require(*names), strict=True))
    user = "postgres" if os.getuid() == 0 else None
    with service_folder(user) as folder:
        (folder / "password").write_text(PASSWORD)
        (folder / "password").chmod(0o644)
        initdb = [binaries["initdb"], "-D", str(folder / "data"), "-U", "owner", "-E", "UTF8", "--no-sync"]
        secure = ["--auth=scram-sha-256", f"--pwfile={folder / 'password'}", "--locale=C.UTF-8"]
        done = subprocess.run([*initdb, *secure], capture_output=True, text=True, cwd="/", **_as_user(user))
        assert done.returncode == 0, done.stderr
        server = Postgres(folder, free_port(), user, binaries)
        try:
            server.start()
            yield server
        finally:
            if server.server is not None:
                server.stop(signal.SIGQUIT)  # the quickest: nothing of it is kept


# Slurm, with accounting: without it a client waits for ever for a job that was killed


SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
ReturnToService=2
KillWait=1
MinJobAge=300
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={accounting_port}
AccountingStoragePass={folder}/munge.socket
JobAcctGatherType=jobacct_gather/none
NodeName={host} NodeAddr=127.0.0.1 NodeHostname={host} CPUs=4 RealMemory=2000
PartitionName=test Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={accounting_port}
SlurmUser=root
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm
"""


@dataclass
class Slurm:
    """A cluster of one machine. environment: what a client needs to find it."""

    folder: Path
    binaries: dict[str, str]
    environment: dict[str, str] = field(default_factory=dict)

    def __call__(self, *command: str) -> str:
        """What one of Slurm's own commands prints."""
        path = _find(command[0])
        assert path is not None, command[0]
        done = subprocess.run(
            [path, *command[1:]], env=os.environ | self.environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def jobs(self, states: str = "all") -> dict[str, str]:
        """States of the jobs in the queue, by id."""
        lines = self("squeue", "--noheader", "--array", "--format=%i %T", f"--states={states}").splitlines()
        return {line.split()[0]: line.split()[1] for line in lines}

    def words(self) -> str:
        """The ends of all logs, for a message."""
        return "\n".join(f"== {log.name}\n{_tail(log)}" for log in sorted(self.folder.glob("*.log")))


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """A Slurm cluster of this machine."""
    with ExitStack() as stack:
        yield _start_slurm(stack)


def _start_slurm(stack: ExitStack) -> Slurm:
    names = ["munged", "mariadbd", "mariadb-install-db", "mariadb", "slurmdbd", "sacctmgr", "slurmctld", "slurmd"]
    binaries = dict(zip(names, require(*names, "sbatch", "srun", "scancel", "sacct"), strict=False))
    if os.getuid() != 0:
        lacking("Slurm's daemons start jobs as other users, so they run as root only")
    folder = stack.enter_context(service_folder())
    folder.chmod(0o755)
    cluster = Slurm(folder, binaries, {"SLURM_CONF": str(folder / "slurm.conf")})
    ports = {name: free_port() for name in ("controller_port", "node_port", "accounting_port", "database_port")}
    values = {"folder": folder, "host": socket.gethostname().partition(".")[0], **ports}
    (folder / "slurm.conf").write_text(SLURM_CONF.format(**values))
    (folder / "slurmdbd.conf").write_text(SLURMDBD_CONF.format(**values))
    (folder / "slurmdbd.conf").chmod(0o600)
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    try:
        _start_munge(stack, cluster)
        _start_database(stack, cluster, ports["database_port"])
        _start_daemons(stack, cluster, ports["accounting_port"])
    except AssertionError as error:
        raise AssertionError(f"{error}\n{cluster.words()}") from None
    return cluster


def _serve(stack: ExitStack, cluster: Slurm, *command: str, user: str | None = None) -> subprocess.Popen[bytes]:
    path = cluster.binaries[command[0]]
    environment = os.environ | cluster.environment
    process = start([path, *command[1:]], cluster.folder / f"{command[0]}.out.log", user, env=environment)
    stack.callback(stop, process)
    return process


def _start_munge(stack: ExitStack, cluster: Slurm) -> None:
    key, handle = cluster.folder / "munge.key", cluster.folder / "munge.socket"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    files = [f"--{name}-file={cluster.folder}/munged.{name}" for name in ("pid", "log", "seed")]
    _serve(stack, cluster, "munged", "--foreground", f"--socket={handle}", f"--key-file={key}", *files)
    wait_until(handle.exists, "munged is ready")


def _start_database(stack: ExitStack, cluster: Slurm, port: int) -> None:
    data, handle = cluster.folder / "database", cluster.folder / "mariadb.socket"
    data.mkdir()
    shutil.chown(data, "mysql", "mysql")
    install = [cluster.binaries["mariadb-install-db"], "--no-defaults", f"--datadir={data}", "--user=mysql"]
    quick = ["--auth-root-authentication-method=normal", "--skip-test-db"]
    done = subprocess.run([*install, *quick], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    files = [f"--datadir={data}", f"--socket={data}/socket", f"--pid-file={data}/pid", f"--tmpdir={data}"]
    small = ["--bind-address=127.0.0.1", f"--port={port}", "--innodb-buffer-pool-size=64M"]
    quick = ["--innodb-flush-log-at-trx-commit=0", "--innodb-lock-wait-timeout=900"]
    _serve(stack, cluster, "mariadbd", "--no-defaults", *files, *small, *quick, user="mysql")
    wait_until(lambda: listens(port), "MariaDB is ready")
    handle = data / "socket"
    grant = "CREATE DATABASE slurm; CREATE USER slurm@'%' IDENTIFIED BY 'slurm'; GRANT ALL ON slurm.* TO slurm@'%';"
    client = [cluster.binaries["mariadb"], "--no-defaults", f"--socket={handle}", "--user=root", "--execute", grant]
    done = subprocess.run(client, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _start_daemons(stack: ExitStack, cluster: Slurm, accounting_port: int) -> None:
    _serve(stack, cluster, "slurmdbd", "-D")
    wait_until(lambda: listens(accounting_port), "slurmdbd is ready")
    with suppress(AssertionError):  # slurmctld registers the cluster too
        cluster("sacctmgr", "-i", "add", "cluster", "test")
    _serve(stack, cluster, "slurmctld", "-D")
    _serve(stack, cluster, "slurmd", "-D")

    def idle() -> bool:
        with suppress(AssertionError):
            return cluster("sinfo", "--noheader", "--format=%T").strip() == "idle"
        return False

    wait_until(idle, "the cluster has an idle node", poll=0.3)


def _tail(log: Path, count: int = 8) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-count:]) if log.exists() else "no log"
