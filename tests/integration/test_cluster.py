"""A cluster that loses a machine in the middle of a run: head without CPUs and two nodes of one, all on this host.

The driver is a process of its own (this file, run as a program), so that nothing of its Ray is left in the test process.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from sqlalchemy import Connection, Engine

from msm_core.configuration import PortfolioConfiguration
from msm_core.data_nodes import base
from msm_core.data_nodes.registration import read_configurations
from msm_core.database import get_engine, transaction
from msm_core.storage import Advance
from msm_core.verification import Verification, verify
from msm_ray import executors
from msm_ray.run import Options, run_fleet
from tests import factories

ROOT = Path(__file__).parents[2]
NIGHT = "2024-03-01"
PORTFOLIOS, PER_BATCH = 16, 2
NAP_SECONDS = 0.7  # of a batch between its claim and its commit: a moment to be killed in


# -- the driver ---------------------------------------------------------------------------------------------------------------


class Notes:
    """Who did what, as files: all nodes are on this host. Travels with the task, by value."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run_batch(self, payload: str, keep_connection: bool) -> Any:
        """In a worker: the real thing, but slow to commit, and noted."""
        import ray

        from msm_ray.executors import run_batch

        note = f"{ray.get_runtime_context().get_node_id()}-{os.getpid()}-{time.monotonic_ns()}"
        commit = base.commit_advances

        def slowly(connection: Connection, advances: Sequence[Advance], *rest: Any) -> Any:
            (self.folder / f"{note}.writing").touch()
            time.sleep(NAP_SECONDS)
            return commit(connection, advances, *rest)

        with mock.patch.object(base, "commit_advances", slowly):
            results = run_batch(payload, keep_connection)
        (self.folder / f"{note}.done").touch()
        return results

    def done(self) -> list[str]:
        return [path.stem for path in self.folder.glob("*.done")]

    def cut_off(self) -> list[str]:
        """Batches that have claimed their nodes and written rows, and are not committed."""
        return sorted({path.stem for path in self.folder.glob("*.writing")} - set(self.done()))


def node_of(note: str) -> str:
    return note.split("-")[0]


def drive(folder: Path) -> None:
    """Run the stored fleet, and kill a node that is between claim and commit, once both nodes have done something."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=80 << 20, wait=False) for _ in range(2)]
    cluster.wait_for_nodes(60)
    os.environ["RAY_ADDRESS"] = str(cluster.address)
    notes, told = Notes(folder), dict[str, Any]()

    def kill_one() -> None:
        """All of a machine: its raylet and its worker, which is frozen first: else it would have the time to end its batch."""
        while not (len({node_of(note) for note in notes.done()}) == 2 and (busy := notes.cut_off())):
            time.sleep(0.05)
        told.update(worked=len({node_of(note) for note in notes.done()}), done=len(notes.done()))
        newest = max(busy, key=lambda note: int(note.split("-")[2]))
        worker = int(newest.split("-")[1])
        os.kill(worker, signal.SIGSTOP)
        cluster.remove_node(next(node for node in nodes if node.node_id == node_of(newest)), allow_graceful=False)
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)

    threading.Thread(target=kill_one, daemon=True).start()
    engine = get_engine()
    with transaction(engine, read_only=True) as connection:
        fleet, _ = read_configurations(connection)
    executor = executors.RayExecutor()
    with mock.patch.object(executors, "run_batch", lambda *given: notes.run_batch(*given)):
        try:
            report = run_fleet(engine, fleet, executor, factories.instant(NIGHT), Options(batch_size=PER_BATCH))
        finally:
            executor.close()
            cluster.shutdown()
    told.update(cut_off=len(notes.cut_off()), counts=report.counts(), failures=[r.error for r in report.failures()])
    print(json.dumps(told))


# -- the test -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: Ray's sockets are in it."""
    made = Path(tempfile.mkdtemp(prefix="msm-"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


def store_fleet(engine: Engine) -> list[PortfolioConfiguration]:
    """Portfolios of three signals, stored."""
    assets = [f"a{i}" for i in range(9)]
    factories.open_market(engine, factories.walks("2024-01-02", 40, assets))
    signals = [factories.equal(*assets), factories.equal(*assets[:4]), factories.fixed(a0=0.5, a8=0.3)]
    fleet = [factories.portfolio(f"p{i:02}", signals[i % 3], accounting=("drifted", "target")[i % 2]) for i in range(PORTFOLIOS)]
    factories.register(engine, fleet)
    return fleet


def audit(engine: Engine) -> Verification:
    with transaction(engine, read_only=True) as connection:
        return verify(connection)


def test_a_node_that_dies_in_the_middle_of_a_run_costs_nothing(engine: Engine, folder: Path) -> None:
    fleet = store_fleet(engine)
    token = folder / "token"
    token.touch(0o600)
    token.write_text(secrets.token_hex(32))
    given = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-m", "tests.integration.test_cluster", str(folder)]
    driver = subprocess.run(command, cwd=ROOT, env=given | ray | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=240)
    assert driver.returncode == 0, driver.stderr[-3000:]
    told = json.loads(driver.stdout.splitlines()[-1])

    assert told["worked"] == 2  # both nodes did something before one was killed
    assert told["done"] * PER_BATCH < PORTFOLIOS  # and much was left to do
    assert told["cut_off"] == 1
    assert told["failures"] == []
    assert told["counts"] == {"landed": PORTFOLIOS, "up_to_date": 0, "failed": 0, "skipped": 0, "busy": 0}
    after_loss = audit(engine)
    assert after_loss.violations == ()
    factories.run(engine, fleet, NIGHT, registered=True, full_refresh=True)
    assert after_loss == audit(engine)


if __name__ == "__main__":
    drive(Path(sys.argv[1]))
