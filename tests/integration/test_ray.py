"""Ray itself: the same bits as in one process, and clear ends for what can hang. Its scheduling, in threads: budgets and clocks."""

import json
import queue
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from sqlalchemy import Engine, event
from structlog.testing import capture_logs

import msm_core
from msm_core import database
from msm_core.api import Portfolio
from msm_core.database import transaction
from msm_core.errors import RayUnavailable, TaskTimedOut, TooFewConnections
from msm_core.services.snapshots import TargetSnapshot, replace_target_positions
from msm_core.verification import verify
from msm_ray import demo, executors
from msm_ray.account_fleet import expand_fleet
from msm_ray.executors import LocalExecutor, Parallelism, RayExecutor, parallelism
from msm_ray.run import Options, run_fleet
from tests import factories
from tests.accounts import book


def test_ray_and_one_process_store_the_same_bits(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # R97, R98
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    demo.load(engine, lambda text: None)
    configurations = demo.fleet(engine, 20)
    ray = RayExecutor(workers=2)
    try:
        landed = run_fleet(engine, configurations, ray, demo.AS_OF, Options(batch_size=3))
        with transaction(engine, read_only=True) as connection:
            on_ray = verify(connection)
        local = run_fleet(engine, configurations, LocalExecutor(), demo.AS_OF, Options(full_refresh=True))
        with transaction(engine, read_only=True) as connection:
            in_process = verify(connection)
        _want_everything(6)
        far, near = (expand_fleet(engine, executor, demo.AS_OF).exposure for executor in (ray, LocalExecutor()))
    finally:
        ray.close()
    assert len(far) > 1_000
    pd.testing.assert_frame_equal(far, near)
    assert (landed.counts()["landed"], local.counts()["landed"]) == (20, 20)
    assert on_ray == in_process
    assert on_ray.violations == ()
    token = tmp_path / "ray_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert len(token.read_text()) == 64


def _want_everything(accounts: int) -> None:
    """Each account wants every portfolio."""
    msm_core.start_engine()
    positions = [{"portfolio_uid": p.uid, "weight_notional_exposure": 0.05} for p in Portfolio.filter()]
    replace_target_positions([TargetSnapshot(a, demo.AS_OF, positions) for a in book(0, 0, accounts).allocations])


def test_a_fleet_with_nothing_to_do_does_not_start_ray(engine: Engine) -> None:
    executor = RayExecutor()
    report = run_fleet(engine, [], executor, demo.AS_OF)
    executor.close()
    assert report.results == ()
    assert "_ray" not in vars(executor)


def test_a_start_that_hangs_ends_in_a_clear_error() -> None:
    with pytest.raises(RayUnavailable, match=r"no answer within 0 s.*--executor local"):
        executors._Starter(threading.Event().wait, seconds=0.2)  # type: ignore[arg-type]


def test_a_start_that_fails_tells_why() -> None:
    def fail() -> None:
        raise RuntimeError("no room for postgresql://u:canary-secret@h/d")

    with pytest.raises(RayUnavailable, match="RuntimeError: no room") as caught:
        executors._Starter(fail, seconds=5)
    assert "canary-secret" not in str(caught.value)


@pytest.mark.parametrize(("status", "refused"), [(200, True), (401, False)])
def test_a_remote_cluster_without_a_token_is_refused(status: int, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("0.0.0.0", 0), Dashboard)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"0.0.0.0:{server.server_port}"
        if refused:
            with pytest.raises(RayUnavailable, match="answers without a token"):
                executors.refuse_open_cluster(address)
            monkeypatch.setenv("MSM_RAY_ALLOW_UNAUTHENTICATED", "1")
        executors.refuse_open_cluster(address)
        executors.refuse_open_cluster(f"127.0.0.1:{server.server_port}")  # loopback is left to its host
    finally:
        server.shutdown()


# -- connections and clocks, on a Ray of threads --------------------------------------------------------------------------------


class Processes:
    """Ray's scheduling: tasks in order, `cpus` at once, each in the process that has been idle for longest, so that all come to serve."""

    def __init__(self, cpus: int, engines: Callable[[], Any] = lambda: None) -> None:
        self.cpus, self.pool, self.local = cpus, ThreadPoolExecutor(cpus), threading.local()
        self.engines = [engines() for _ in range(cpus)]
        self.idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for engine in self.engines:
            self.idle.put(engine)
        self.asked: dict[str, Any] = {}
        self.exceptions = SimpleNamespace(RayTaskError=(), RayError=())  # of the real ray they would read its environment too early
        self.running = self.most = 0

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(self.cpus)}

    def remote(self, **options: Any) -> Callable[..., "Processes"]:
        self.asked = options
        return self._decorate

    def _decorate(self, function: Callable[..., Any]) -> Any:
        fake = self

        class Remote:
            def options(self, name: str) -> "Remote":
                return self

            def remote(self, *arguments: Any) -> Future[Any]:
                return fake.pool.submit(fake._serve, function, *arguments)

        return Remote()

    def _serve(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self.local.engine = self.idle.get()
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            return function(*arguments)
        finally:
            self.running -= 1
            self.idle.put(self.local.engine)

    def wait(self, tasks: list[Future[Any]], num_returns: int, timeout: float) -> tuple[list[Future[Any]], list[Future[Any]]]:
        done = wait_for(tasks, timeout, FIRST_COMPLETED).done
        return list(done)[:num_returns], []

    def get(self, task: Future[Any]) -> Any:
        return task.result()

    def cancel(self, task: Future[Any], force: bool) -> None:
        task.cancel()

    def close(self) -> None:
        self.pool.shutdown()
        for engine in filter(None, self.engines):
            engine.dispose()


def executor_on(processes: Processes, task_seconds_max: float = 1800.0) -> RayExecutor:
    executor = RayExecutor(task_seconds_max)
    vars(executor)["_ray"] = processes
    return executor


@contextmanager
def role_with(engine: Engine, limit: int) -> Iterator[Callable[[], Engine]]:
    """Makes engines, one per process as in workers, of a role that may hold `limit` connections."""
    role, engines = f"few_{engine.url.database}", list[Engine]()
    factories.sql(engine, f"CREATE ROLE {role} LOGIN PASSWORD 'few' CONNECTION LIMIT {limit} IN ROLE {engine.url.username}")

    def make() -> Engine:
        url = engine.url.set(username=role, password="few").render_as_string(hide_password=False)
        engines.append(database._engine.__wrapped__(url))
        return engines[-1]

    try:
        yield make
    finally:
        for made in engines:
            made.dispose()
        factories.sql(engine, f"DROP ROLE {role}")


def test_32_workers_on_20_connections(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20, the run holds 2 (snapshot, work) and keeps 1 to spare: 17 workers, and no worker that idles holds a connection."""
    factories.open_market(engine, factories.walks("2024-01-02", 5, ["A", "B"]))
    fleet = [factories.portfolio(f"p{i:02}", factories.equal("A", "B")) for i in range(60)]
    factories.register(engine, fleet)
    with role_with(engine, 20) as make:
        processes, mine, refused = Processes(32, make), make(), list[str]()
        monkeypatch.setattr(executors, "get_engine", lambda: getattr(processes.local, "engine", mine))
        event.listen(Engine, "handle_error", note := lambda context: refused.append(str(context.original_exception)))
        try:
            with capture_logs() as logs:
                report = run_fleet(mine, fleet, executor_on(processes), factories.instant("2024-01-20"), Options(batch_size=1))
        finally:
            event.remove(Engine, "handle_error", note)
            processes.close()
    assert report.counts()["landed"] == 60
    assert refused == []
    assert processes.most == 17
    (warning,) = [line for line in logs if line["log_level"] == "warning"]
    assert (warning["cpus"], warning["used"]) == (32, 17)
    assert "max_connections" in warning["remedy"]
    assert "pgbouncer" in warning["remedy"]


def test_no_connection_for_a_worker_is_said_before_any_batch(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    factories.open_market(engine, factories.walks("2024-01-02", 5, ["A", "B"]))
    fleet = [factories.portfolio("p", factories.equal("A", "B"))]
    factories.register(engine, fleet)
    processes = Processes(2)
    with role_with(engine, 3) as make:  # one each for the snapshot and for work, one to spare
        mine = make()
        monkeypatch.setattr(executors, "get_engine", lambda: mine)
        with pytest.raises(TooFewConnections, match=r"grants 1 more connections, and a run needs 2: .* pgbouncer"):
            run_fleet(mine, fleet, executor_on(processes), factories.instant("2024-01-20"))
    assert processes.most == 0
    assert factories.sql(engine, "SELECT status FROM msm__run") == [("failed",)]


@pytest.mark.parametrize(
    ("cpus", "connections", "expected"),
    [
        (8, None, Parallelism(8, 16, True)),  # a pooler, which queues
        (8, 16, Parallelism(8, 16, True)),
        (8, 15, Parallelism(8, 15, False)),  # Ray may keep more processes than CPUs for a while
        (8, 8, Parallelism(8, 8, False)),
        (8, 3, Parallelism(3, 3, False)),
        (8, 1, Parallelism(1, 1, False)),
    ],
)
def test_parallelism_by_connections(cpus: int, connections: int | None, expected: Parallelism) -> None:
    assert parallelism(cpus, connections) == expected


@pytest.fixture
def no_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "get_engine", lambda: None)
    monkeypatch.setattr(executors, "connections_left", lambda engine: None)


def outcomes(processes: Processes, naps: list[float], task_seconds_max: float, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Any]]:
    """What the executor tells, in its order, of batches that only sleep."""
    monkeypatch.setattr(executors, "run_batch", lambda payload, keep_connection: time.sleep(json.loads(payload)["nap"]) or [])
    executor = executor_on(processes, task_seconds_max)
    for ticket, nap in enumerate(naps):
        executor.submit(ticket, "prices", json.dumps({"kind": "prices", "nap": nap}))
    told = [executor.wait() for _ in naps]
    processes.close()
    return told


def test_waiting_behind_others_does_not_count_against_a_batch(no_database: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker, three batches of 0.5 s: Ray has had the second for 1.0 s when it ends, and the limit is 0.8 s."""
    monkeypatch.setattr(executors, "POLL_SECONDS", 0.02)
    assert outcomes(Processes(1), [0.5] * 3, 0.8, monkeypatch) == [(ticket, []) for ticket in range(3)]


def test_a_batch_that_hangs_is_given_up_while_others_go_on(no_database: None, monkeypatch: pytest.MonkeyPatch) -> None:
    told = outcomes(Processes(2), [1.2, *[0.1] * 10], 0.4, monkeypatch)
    (place,) = [place for place, (ticket, outcome) in enumerate(told) if ticket == 0]
    assert isinstance(told[place][1], TaskTimedOut)
    assert 2 <= place < 8
    assert [outcome for ticket, outcome in told if ticket] == [[]] * 10


def test_processes_are_recycled_and_crashes_retried_a_bounded_number_of_times(no_database: None, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes(processes := Processes(1), [0.0], 5.0, monkeypatch)
    assert processes.asked == {"num_cpus": 1, "max_retries": 3, "max_calls": 200}
    for local in (True, False):
        monkeypatch.delenv("RAY_task_oom_retries", raising=False)
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        executors._prepare_environment(local)
        assert executors.os.environ["RAY_task_oom_retries"] == "1"
