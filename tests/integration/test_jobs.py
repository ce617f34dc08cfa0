"""`ray job submit`, end to end, on a head of the test's own: prepare, a night that lands, a night that lands in part."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import Engine

from tests import factories
from tests.integration import test_cli

ROOT = Path(__file__).parents[2]
SHIPPED = ("jobs", "msm_core", "msm_ray", "migrations")
RAY = Path(sys.executable).with_name("ray")
CANARY = "c4nary-in-a-c0almine"
START_SECONDS_MAX, JOB_SECONDS_MAX = 90, 150
ENTRIES = [
    "{ id: good-0, signal: { kind: equal_weights, asset_list: [a0, a1] }, tags: [first] }",
    "{ id: good-1, signal: { kind: equal_weights, asset_list: [a1, a2, a3] }, tags: [first] }",
    "{ id: good-2, signal: { kind: equal_weights, asset_list: [a4, a5] }, tags: [second] }",
    "{ id: bad, signal: { kind: equal_weights, asset_list: [a0, a9] }, tags: [second] }",
]
bars = test_cli.bars


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@dataclass
class Head:
    """A head of one machine. `environment` is a submitter's: it has Ray's token, and nothing of the database."""

    folder: Path
    address: str
    environment: dict[str, str]

    @property
    def token(self) -> str:
        return (self.folder / "token").read_text()

    def submit(self, submission_id: str, *entrypoint: str) -> "Job":
        shipped = json.dumps({"env_vars": {"MSM_HOME": str(self.folder)}})
        where = ["--address", self.address, "--submission-id", submission_id, "--working-dir", ".", "--runtime-env-json", shipped]
        log = self.folder / f"{submission_id}.out"
        with open(log, "w") as out:
            command = [str(RAY), "job", "submit", *where, "--", "python", *entrypoint]
            process = subprocess.Popen(command, cwd=self.folder / "work", env=self.environment, stdout=out, stderr=out)
        return Job(process, log)

    def ask(self, path: str, token: str | None) -> str:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(f"{self.address}{path}", headers=headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read().decode()

    def await_answer(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_SECONDS_MAX
        while True:
            try:
                self.ask("/api/jobs/", self.token)
                return
            except OSError:
                assert process.poll() is None, (self.folder / "head.out").read_text()
                assert time.monotonic() < deadline, "the head does not answer"
                time.sleep(0.25)


@dataclass
class Job:
    process: subprocess.Popen[bytes]
    log: Path

    def wait(self) -> tuple[int, str]:
        """The exit code of `ray job submit` and what it printed, the job's own output among it."""
        return self.process.wait(JOB_SECONDS_MAX), self.log.read_text()


@pytest.fixture
def head(engine: Engine) -> Iterator[Head]:
    """The database's address is known to the head's machine alone: a file that its environment names, with a password in it."""
    folder = Path(tempfile.mkdtemp(prefix="msm-"))  # a short path: Ray's sockets are in it
    role = f"nightly_{engine.url.database}"
    factories.sql(engine, f"CREATE ROLE {role} LOGIN PASSWORD '{CANARY}' IN ROLE {engine.url.username}")
    url = engine.url.set(drivername="postgresql", username=role, password=CANARY).render_as_string(hide_password=False)
    for name, secret in (("token", secrets.token_hex(32)), ("database_address", url)):
        (folder / name).touch(0o600)
        (folder / name).write_text(secret)
    ship(folder / "work")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MSM_", "PG", "PYTHONPATH"))}
    given = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "RAY_USAGE_STATS_ENABLED": "0"}
    given |= {"PATH": os.pathsep.join([str(RAY.parent), os.environ.get("PATH", "")]), "RAY_TMPDIR": str(folder)}
    dashboard, agent, metrics, client = free_ports(4)
    ports = [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"]
    ports += [f"--ray-client-server-port={client}", "--port=0", "--min-worker-port=0", "--max-worker-port=0"]
    size = ["--num-cpus=2", "--object-store-memory=100000000"]
    command = [str(RAY), "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", *ports, *size]
    node = clean | given | {"MSM_DATABASE_URL_FILE": str(folder / "database_address")}
    with open(folder / "head.out", "w") as out:
        process = subprocess.Popen(command, env=node, cwd=folder, stdout=out, stderr=out)
    started = Head(folder, f"http://127.0.0.1:{dashboard}", clean | given)
    try:
        started.await_answer(process)
        yield started
    finally:
        process.terminate()  # with --block, it ends what it started; `ray stop` would end every Ray on this machine
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)
        factories.sql(engine, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", (role,))
        factories.sql(engine, f"DROP ROLE {role}")


def ship(folder: Path) -> None:
    """The least that a job needs, in a version that tells it from the installed one."""
    for name in SHIPPED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    with open(folder / "msm_core" / "__init__.py", "a") as file:
        file.write('\n__version__ = "0-shipped"\n')
    test_cli.write_fleet(folder / "fleet.yaml", ENTRIES)


def arguments_of_everything() -> str:
    """The command lines of all processes of this machine."""
    texts = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            texts.append(path.read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return "\n".join(texts)


def files_with(text: str, folder: Path) -> list[str]:
    """Regular files under `folder` that hold `text`."""
    found = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return sorted(path.relative_to(folder).as_posix() for path in found if text.encode() in path.read_bytes())


def report_in(output: str) -> dict:
    """The line of JSON that a job leaves in its log; of a failed job, Ray shows the end of the log once more."""
    (line,) = {line for line in output.splitlines() if line.startswith('{"')}
    return json.loads(line)


@pytest.mark.usefixtures("bars")
def test_a_fleet_is_prepared_and_run_by_submitted_jobs(engine: Engine, head: Head) -> None:  # R97
    factories.sql(engine, f"UPDATE {test_cli.PRICES} SET close = 'NaN' WHERE asset_identifier = 'a9' AND time_index = '2024-02-01'")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        head.ask("/api/jobs/", None)

    code, output = head.submit("prepare", "jobs/prepare_storage.py", "--file", "fleet.yaml").wait()
    assert code == 0, output
    assert "0 revisions and tables applied" in output
    assert "4 configurations new or changed" in output

    nights = [
        head.submit(f"nightly-{tag}", "jobs/run_fleet.py", "--select", f"tag:{tag}", "--as-of", "2024-02-29") for tag in ("first", "second")
    ]
    seen = ""
    while any(night.process.poll() is None for night in nights):
        seen = max(seen, arguments_of_everything(), key=lambda text: text.count("run_fleet"))
        time.sleep(1)
    (code, whole), (code_of_part, part) = (night.wait() for night in nights)

    assert code == 0, whole
    assert {k: report_in(whole)[k] for k in ("status", "landed", "failed")} == {"status": "landed", "landed": 2, "failed": 0}
    assert code_of_part == 1  # of `ray job submit`, for whatever failure
    assert "failed with exit code 3" in part
    assert {k: report_in(part)[k] for k in ("status", "landed", "failed")} == {"status": "partial", "landed": 1, "failed": 1}
    assert "close of a9 at 2024-02-01 00:00Z is nan" in part
    told = head.ask("/api/jobs/", head.token)
    status = {job["submission_id"]: job["status"] for job in json.loads(told)}
    assert status == {"prepare": "SUCCEEDED", "nightly-first": "SUCCEEDED", "nightly-second": "FAILED"}
    used = factories.sql(engine, "SELECT DISTINCT split_part(code_version, ',', 1) FROM msm__run")
    assert used == [("msm 0-shipped",)]  # what was sent, not what is installed

    code, output = head.submit("nightly-first", "jobs/run_fleet.py").wait()
    assert code == 1
    assert "already exists" in output

    assert "run_fleet" in seen
    assert CANARY not in seen
    assert CANARY not in told
    assert files_with(CANARY, head.folder) == ["database_address"]
    assert files_with(head.token, head.folder) == ["token"]
