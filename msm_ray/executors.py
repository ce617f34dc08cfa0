"""Where batches run: in this process, or on Ray. Same payloads, same function, same bits; the only driver module that imports ray.

A payload is JSON: validated configurations and small references, never objects, addresses or prices. A reply is a small summary.
Each worker resolves the database itself and keeps one engine per process. Never do more batches run than the database has connections for.
"""

import functools
import json
import logging
import os
import secrets
import threading
import time
import urllib.request
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import structlog
from pydantic_core import from_json
from sqlalchemy import Engine

from msm_core.data_nodes.base import Batch, NodeKind, NodeResult, update_batch
from msm_core.data_nodes.construction import PortfolioKind
from msm_core.data_nodes.interpolated_prices import InterpolatedAsset
from msm_core.data_nodes.interpolation import PricesKind
from msm_core.data_nodes.portfolios import PortfoliosDataNode
from msm_core.data_nodes.signals import SignalKind, SignalWeights
from msm_core.database import connections_left, get_engine, redact, retrying, transaction, where
from msm_core.errors import RayUnavailable, StaleCode, TaskTimedOut, TooFewConnections, WorkerLost
from msm_core.garbage import collecting_seldom
from msm_core.plugins import code_version
from msm_core.services.account_exposure import AccountExposure, expand_account_targets
from msm_core.settings import Settings

log = structlog.get_logger()


WorkNode = InterpolatedAsset | SignalWeights | PortfoliosDataNode
KINDS: dict[str, tuple[NodeKind[Any], type[WorkNode]]] = {
    "prices": (PricesKind(), InterpolatedAsset),
    "signal": (SignalKind(), SignalWeights),
    "portfolio": (PortfolioKind(), PortfoliosDataNode),
}
ACCOUNTS = "accounts"
START_SECONDS_MAX = 90
POLL_SECONDS = 5.0
BATCHES_PER_PROCESS_MAX = 200  # then a fresh one takes over: libraries leak; a start costs seconds
DRIVER_SPARE_CONNECTIONS = 1  # beside the snapshot's and the working one, which are there when the budget is asked for


class Errand(NamedTuple):
    """What all batches of a run are told: nothing later than `as_of` is used, and the snapshot of outside inputs."""

    as_of: datetime
    run_uid: uuid.UUID | None = None
    snapshot: str | None = None


def encode_batch(kind: str, nodes: Sequence[WorkNode], errand: Errand) -> str:
    """Nodes of one kind, to be brought up to date."""
    given = _addressed(kind, errand)
    documents = ",".join(node.model_dump_json() for node in nodes)  # pydantic writes text three times as fast as json does its plain data
    return f'{json.dumps(given)[:-1]}, "nodes": [{documents}]}}'


def encode_accounts(accounts: Sequence[str], errand: Errand, net: bool) -> str:
    """Accounts whose target positions are to be expanded: it reads, and writes nothing."""
    return json.dumps({**_addressed(ACCOUNTS, errand), "accounts": list(accounts), "net": net})


def _addressed(kind: str, errand: Errand) -> dict[str, str | None]:
    return {
        "kind": kind,
        "as_of": errand.as_of.isoformat(),
        "run_uid": str(errand.run_uid) if errand.run_uid else None,
        "snapshot": errand.snapshot,
        "code_version": code_version(),
    }


@collecting_seldom()
def run_batch(payload: str, keep_connection: bool = True) -> Any:
    """What a worker does with a payload: results of nodes, or exposure of accounts. Raises StaleCode when driver and worker are
    different installations.

    Without `keep_connection` it leaves none open: idle processes, of which there can be more than batches, then hold nothing.
    """
    given = from_json(payload)
    if given["code_version"] != code_version():
        raise StaleCode(worker=code_version(), driver=given["code_version"])
    engine = get_engine()
    try:
        return (_expand if given["kind"] == ACCOUNTS else _update)(engine, given)
    finally:
        if not keep_connection:
            engine.dispose()


def _update(engine: Engine, given: Mapping[str, Any]) -> list[NodeResult]:
    kind, node_class = KINDS[given["kind"]]
    batch = Batch(
        kind=kind,
        nodes=tuple(node_class.model_validate(node) for node in given["nodes"]),
        as_of=datetime.fromisoformat(given["as_of"]),
        run_uid=uuid.UUID(given["run_uid"]) if given["run_uid"] else None,
        snapshot=given["snapshot"],
    )
    return update_batch(engine, batch)


def _expand(engine: Engine, given: Mapping[str, Any]) -> AccountExposure:
    for attempt in retrying():
        with attempt, transaction(engine, read_only=True, snapshot=given["snapshot"]) as connection:
            return expand_account_targets(connection, given["accounts"], datetime.fromisoformat(given["as_of"]), given["net"])
    raise AssertionError("unreachable: the last attempt raises")


Outcome = Any  # what `run_batch` returned, or the exception that ended it


class Executor(Protocol):
    """Runs payloads, each of nodes of one kind. `slots` is how many can run at once; `has_landed`: `wait` would not have to."""

    @property
    def slots(self) -> int: ...
    def submit(self, ticket: int, kind: str, payload: str) -> None: ...
    def has_landed(self) -> bool: ...
    def wait(self) -> tuple[int, Outcome]: ...
    def close(self) -> None: ...


class LocalExecutor:
    """One batch after the other, in this process."""

    slots = 1

    def __init__(self) -> None:
        self._queue: deque[tuple[int, str]] = deque()

    def submit(self, ticket: int, kind: str, payload: str) -> None:
        self._queue.append((ticket, payload))

    def has_landed(self) -> bool:
        return False  # a batch runs when it is waited for

    def wait(self) -> tuple[int, Outcome]:
        ticket, payload = self._queue.popleft()
        try:
            return ticket, run_batch(payload)
        except Exception as error:
            return ticket, error

    def close(self) -> None:
        self._queue.clear()


class Parallelism(NamedTuple):
    """slots: batches that run at once; with_ray: batches that Ray holds, running or queued; keep_connections: between batches, too."""

    slots: int
    with_ray: int
    keep_connections: bool


def parallelism(cpus: int, connections: int | None) -> Parallelism:
    """What `cpus` workers may do with so many connections for all of them; None = no limit.

    Ray is told of no limit but its CPUs: it gets no more batches than there are connections, even if nodes join.
    """
    if connections is None:
        return Parallelism(cpus, 2 * cpus, True)
    with_ray = min(2 * cpus, connections)
    return Parallelism(min(cpus, connections), with_ray, keep_connections=with_ray == 2 * cpus)


@dataclass
class _Task:
    ticket: int
    since: float | None = None  # monotonic seconds; None while no worker can have it


class RayExecutor:
    """Batches as Ray tasks, collected in finish order; a batch that Ray must not have yet waits here.

    Inside a Ray job, or with RAY_ADDRESS set, it joins that cluster; otherwise it starts a local one, with token authentication on a
    token file of its own under MSM_HOME (mode 0600, path set explicitly: without the path, workers that start later cannot find it).
    """

    def __init__(self, task_seconds_max: float = 1800.0, workers: int | None = None) -> None:
        self._is_local = not os.environ.get("RAY_ADDRESS")
        self._task_seconds_max, self._workers = task_seconds_max, workers
        self._waiting: deque[tuple[int, str, str]] = deque()
        self._tasks: dict[Any, _Task] = {}  # oldest first

    @functools.cached_property
    def _ray(self) -> Any:
        """Ray, started at the first need: a night with nothing to do does not pay for it."""
        _prepare_environment(self._is_local)
        import ray  # after the environment is set: ray reads it on import

        self._starter = _Starter(lambda: self._connect(ray), START_SECONDS_MAX)
        return ray

    def _connect(self, ray: Any) -> None:
        self._connected_here = not ray.is_initialized()
        if self._connected_here:
            # "local": without it, Ray joins whatever cluster was last started on this machine
            local: dict[str, Any] = {"address": "local", "include_dashboard": False, "num_cpus": self._workers}
            context = ray.init(log_to_driver=False, logging_level=logging.ERROR, **(local if self._is_local else {}))
            if not self._is_local:
                refuse_open_cluster(context.dashboard_url)
        ray.get(ray.remote(num_cpus=1)(_ping).remote(), timeout=START_SECONDS_MAX)  # a worker that cannot start must show here

    @functools.cached_property
    def _remote(self) -> Any:
        """The task. Crashes are retried; an error of its own is not, since it would come again."""
        return self._ray.remote(num_cpus=1, max_retries=3, max_calls=BATCHES_PER_PROCESS_MAX)(run_batch)

    @property
    def slots(self) -> int:
        return self._parallelism.slots

    @functools.cached_property
    def _parallelism(self) -> Parallelism:
        """Decided once, at the first batch. Raises TooFewConnections when there is none for a worker."""
        cpus = max(int(self._ray.cluster_resources().get("CPU", 1)), 1)
        engine = get_engine()
        left = connections_left(engine)
        if left is not None and left <= DRIVER_SPARE_CONNECTIONS:
            raise TooFewConnections(where=where(engine.url), left=left, needed=DRIVER_SPARE_CONNECTIONS + 1)
        found = parallelism(cpus, None if left is None else left - DRIVER_SPARE_CONNECTIONS)
        if found.slots < cpus:
            remedy = "raise max_connections (or the limit of the role or the database), use fewer workers, or connect through pgbouncer"
            log.warning("the database has too few connections for all workers", cpus=cpus, used=found.slots, remedy=remedy)
        return found

    def submit(self, ticket: int, kind: str, payload: str) -> None:
        self._waiting.append((ticket, kind, payload))
        self._hand_over()

    def _hand_over(self) -> None:
        """Give Ray what it may have, and start the clock of every batch that a worker can have: Ray serves them in order."""
        _, with_ray, keep_connections = self._parallelism
        while self._waiting and len(self._tasks) < with_ray:
            ticket, kind, payload = self._waiting.popleft()
            name = f"update_{kind.removesuffix('s')}s"  # static, one per kind: the dashboard groups by it
            self._tasks[self._remote.options(name=name).remote(payload, keep_connections)] = _Task(ticket)
        for task in islice(self._tasks.values(), self.slots):
            if task.since is None:
                task.since = time.monotonic()

    def has_landed(self) -> bool:
        return bool(self._tasks) and bool(self._ray.wait(list(self._tasks), num_returns=1, timeout=0)[0])

    def wait(self) -> tuple[int, Outcome]:
        while True:
            late = self._overdue()
            done, _ = self._ray.wait(list(self._tasks), num_returns=1, timeout=POLL_SECONDS if late is None else 0)
            if done:
                return self._land(done[0]), self._collect(done[0])
            if late is not None:
                self._ray.cancel(late, force=True)
                return self._land(late), TaskTimedOut(seconds=self._task_seconds_max)

    def _land(self, reference: Any) -> int:
        task = self._tasks.pop(reference)
        self._hand_over()
        return task.ticket

    def _overdue(self) -> Any | None:
        """A task past its wall-clock limit, counted from when a worker can have had it."""
        latest = time.monotonic() - self._task_seconds_max
        return next((r for r, task in self._tasks.items() if task.since is not None and task.since < latest), None)

    def _collect(self, reference: Any) -> Outcome:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            return error.cause if isinstance(error.cause, Exception) else error
        except self._ray.exceptions.RayError as error:
            return WorkerLost(why=redact(str(error)).splitlines()[0])

    def close(self) -> None:
        if "_ray" not in self.__dict__:
            return  # never needed
        self._waiting.clear()
        for reference in self._tasks:
            self._ray.cancel(reference, force=True)
        if self._connected_here:
            self._ray.shutdown()
        self._starter.release()


def refuse_open_cluster(dashboard_url: str | None) -> None:
    """Raises RayUnavailable when a cluster's dashboard, reachable from other machines, answers without a token.

    Whoever reaches such a dashboard may run any code on the cluster (CVE-2023-48022). One on loopback is left to its host.
    """
    if not dashboard_url or Settings().ray_allow_unauthenticated:
        return
    host = dashboard_url.rsplit(":", 1)[0]
    if host in ("localhost", "[::1]") or host.startswith("127."):
        return
    try:
        with urllib.request.urlopen(f"http://{dashboard_url}/api/jobs/", timeout=5) as answer:
            is_open = answer.status == 200
    except OSError:  # refused, unreachable, or 401: nobody gets in without a token this way
        is_open = False
    if is_open:
        remedy = "Start it with RAY_AUTH_MODE=token, or set MSM_RAY_ALLOW_UNAUTHENTICATED=1 if its network is closed."
        raise RayUnavailable(why=f"the cluster at {host} answers without a token", remedy=remedy)


def _ping() -> str:
    return "pong"


def _prepare_environment(local: bool) -> None:
    """What Ray reads from the environment; workers of a local one inherit it. What the user has set is left alone."""
    os.environ.setdefault("RAY_task_oom_retries", "1")  # endless by default: one hog would stall the night
    if not local:
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # it takes lines that differ in numbers for repetitions
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(_token_file())


def _token_file() -> Path:
    path = Settings().state_path / "ray_token"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    return path


class _Starter:
    """Runs `start` in a thread and gives up on it after a time: a Ray that hangs cannot be interrupted, only abandoned.

    The thread stays alive until `release`: Ray's processes are set to die with the very thread that started them (PR_SET_PDEATHSIG).
    """

    def __init__(self, start: Callable[[], None], seconds: float) -> None:
        self._released, settled, errors = threading.Event(), threading.Event(), list[BaseException]()

        def attempt() -> None:
            try:
                start()
            except BaseException as error:
                errors.append(error)
            settled.set()
            self._released.wait()

        threading.Thread(target=attempt, name="ray-start", daemon=True).start()
        remedy = "Check that no stale Ray processes are in the way (`ray status`), or run with --executor local."
        if not settled.wait(seconds):
            raise RayUnavailable(why=f"no answer within {seconds:.0f} s", remedy=remedy)
        if errors and isinstance(errors[0], RayUnavailable):
            raise errors[0]
        if errors:
            why = redact(f"{type(errors[0]).__name__}: {errors[0]}").strip().splitlines()[0]
            raise RayUnavailable(why=why, remedy=remedy) from errors[0]

    def release(self) -> None:
        self._released.set()


def make_executor(name: str, task_seconds_max: float = 1800.0, workers: int | None = None) -> Executor:
    return RayExecutor(task_seconds_max, workers) if name == "ray" else LocalExecutor()
