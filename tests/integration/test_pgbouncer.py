"""Everything through pgbouncer in transaction mode: every transaction may get another server connection, of which there are few."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, Engine

from msm_core import database
from msm_core.data_nodes.registration import read_configurations
from msm_core.database import connections_left, get_engine, transaction
from msm_ray import executors
from msm_ray.run import Options, run_fleet
from tests import factories
from tests.integration import test_cli
from tests.integration.test_cli import BAD_ENTRIES, PRICES, Cli, good_entries, write_fleet
from tests.integration.test_jobs import free_ports
from tests.integration.test_ray import Processes, executor_on

run_cli, bars = test_cli.run_cli, test_cli.bars
BINARY = shutil.which("pgbouncer", path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"]))
ACCOUNT: dict[str, Any] = {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.geteuid() == 0 else {}  # it refuses root
WORKERS, POOL = 4, 2  # one server connection is the snapshot's, one is for everybody else
SETTINGS = """
[databases]
* = host={host} port={port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen}
unix_socket_dir =
auth_type = {auth}
auth_file = {folder}/users
pool_mode = transaction
default_pool_size = {pool}
query_wait_timeout = 30
logfile = {folder}/log
"""

pytestmark = pytest.mark.skipif(BINARY is None, reason="there is no pgbouncer on this machine: apt-get install pgbouncer")


@pytest.fixture
def pooled(server_url: str) -> Iterator[URL]:
    """An address of the server's databases behind a pool of its own."""
    server, folder = database.make_url(server_url), Path(tempfile.mkdtemp(prefix="msm-"))
    (listen,) = free_ports(1)
    auth = "scram-sha-256" if server.password else "trust"
    text = SETTINGS.format(host=server.host, port=server.port or 5432, listen=listen, auth=auth, folder=folder, pool=POOL)
    for name, content in (("settings", text), ("users", f'"{server.username}" "{server.password or ""}"\n')):
        (folder / name).touch(0o600)
        (folder / name).write_text(content)
    for path in (folder, *folder.iterdir()) if ACCOUNT else ():
        shutil.chown(path, ACCOUNT["user"])
    process = subprocess.Popen([str(BINARY), "--quiet", str(folder / "settings")], **ACCOUNT)
    try:
        await_port(listen, process)
        yield server.set(host="127.0.0.1", port=listen)
    finally:
        process.terminate()
        process.wait(20)
        shutil.rmtree(folder)


def await_port(port: int, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert process.poll() is None, "pgbouncer did not start"
            assert time.monotonic() < deadline, "pgbouncer does not answer"
            time.sleep(0.05)


@pytest.fixture
def engine(empty_engine: Engine, pooled: URL, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Of an empty database, behind the pool; `MSM_DATABASE_URL` points there."""
    through = pooled.set(drivername="postgresql", database=empty_engine.url.database)
    monkeypatch.setenv("MSM_DATABASE_URL", through.render_as_string(hide_password=False))
    yield get_engine()
    get_engine().dispose()


def backend_of(engine: Engine) -> int:
    with engine.connect() as connection:
        return connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()


def test_a_pooler_is_recognised_and_not_budgeted(engine: Engine, empty_engine: Engine) -> None:
    assert connections_left(engine) is None
    assert connections_left(empty_engine) is not None


def test_the_tests_meet_more_than_one_server_connection(engine: Engine) -> None:
    """Else nothing below would show what is left behind on one."""
    with transaction(engine) as held:
        mine = held.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        assert backend_of(engine) != mine
        assert held.exec_driver_sql("SELECT pg_backend_pid()").scalar_one() == mine


def test_a_fleet_through_a_small_pool_is_the_same_to_the_bit(
    engine: Engine,
    empty_engine: Engine,
    run_cli: Cli,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prepare, a night of four workers with one failure, retry and verify on two server connections; then afresh without pgbouncer."""
    fleet = write_fleet(tmp_path / "fleet.yaml", [*good_entries(12), BAD_ENTRIES[0]])
    code, prepared = run_cli("prepare", "-f", str(fleet))
    assert (code, prepared["configurations_stored"]) == (0, 13)
    assert run_cli("prepare", "--check", "-f", str(fleet))[0] == 0
    request.getfixturevalue("bars")
    factories.sql(empty_engine, f"UPDATE {PRICES} SET close = 'NaN' WHERE asset_identifier = 'a9' AND time_index = '2024-02-01'")

    address = engine.url.render_as_string(hide_password=False)
    workers = Processes(WORKERS, lambda: database._engine.__wrapped__(address))
    monkeypatch.setattr(executors, "get_engine", lambda: getattr(workers.local, "engine", None) or get_engine())
    with transaction(engine, read_only=True) as connection:
        configurations, _ = read_configurations(connection)
    report = run_fleet(engine, configurations, executor_on(workers), factories.instant("2024-03-01"), Options(batch_size=1))
    workers.close()
    assert report.exit_code == 3
    assert (report.counts()["landed"], report.counts()["failed"], workers.most) == (12, 1, WORKERS)

    factories.sql(empty_engine, f"UPDATE {PRICES} SET close = 100 WHERE close = 'NaN'")
    code, retried = run_cli("retry", "--executor", "local")
    assert (code, retried["landed"], retried["as_of"]) == (0, 1, "2024-03-01T00:00:00+00:00")
    code, pooled = run_cli("verify")
    assert (code, pooled["violations"]) == (0, [])
    assert pooled["rows"] > 13 * test_cli.SESSIONS

    direct = empty_engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    monkeypatch.setenv("MSM_DATABASE_URL", direct)
    code, afresh = run_cli("run", "--executor", "local", "--as-of", "2024-02-29", "--full-refresh")
    assert (code, afresh["landed"]) == (0, 13)
    assert run_cli("verify") == (0, pooled)
