"""Where batches run: in this process, or on Ray. Same payloads, same function, same bits; the only driver module that imports ray.

A payload is JSON: validated configurations and small references, never objects, addresses or prices. A reply is a small summary.
Each worker resolves the database itself and keeps one engine per process.
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
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import structlog

from msm_core.data_nodes.base import Batch, NodeKind, NodeResult, update_batch
from msm_core.data_nodes.construction import PortfolioKind
from msm_core.data_nodes.interpolated_prices import InterpolatedAsset
from msm_core.data_nodes.interpolation import PricesKind
from msm_core.data_nodes.portfolios import PortfoliosDataNode
from msm_core.data_nodes.signals import SignalKind, SignalWeights
from msm_core.database import get_engine, redact
from msm_core.errors import RayUnavailable, StaleCode, TaskTimedOut, WorkerLost
from msm_core.plugins import code_version
from msm_core.settings import Settings

log = structlog.get_logger()


WorkNode = InterpolatedAsset | SignalWeights | PortfoliosDataNode
KINDS: dict[str, tuple[NodeKind[Any], type[WorkNode]]] = {
    "prices": (PricesKind(), InterpolatedAsset),
    "signal": (SignalKind(), SignalWeights),
    "portfolio": (PortfolioKind(), PortfoliosDataNode),
}
START_SECONDS_MAX = 90


class Errand(NamedTuple):
    """What all batches of a run are told: nothing later than `as_of` is used, and the snapshot of outside inputs."""

    as_of: datetime
    run_uid: uuid.UUID | None = None
    snapshot: str | None = None


def encode_batch(kind: str, nodes: Sequence[WorkNode], errand: Errand) -> str:
    return json.dumps(
        {
            "kind": kind,
            "nodes": [node.model_dump(mode="json") for node in nodes],
            "as_of": errand.as_of.isoformat(),
            "run_uid": str(errand.run_uid) if errand.run_uid else None,
            "snapshot": errand.snapshot,
            "code_version": code_version(),
        }
    )


def run_batch(payload: str) -> list[NodeResult]:
    """What a worker does with a payload. Raises StaleCode when driver and worker are different installations."""
    given = json.loads(payload)
    if given["code_version"] != code_version():
        raise StaleCode(worker=code_version(), driver=given["code_version"])
    kind, node_class = KINDS[given["kind"]]
    batch = Batch(
        kind=kind,
        nodes=tuple(node_class.model_validate(node) for node in given["nodes"]),
        as_of=datetime.fromisoformat(given["as_of"]),
        run_uid=uuid.UUID(given["run_uid"]) if given["run_uid"] else None,
        snapshot=given["snapshot"],
    )
    return update_batch(get_engine(), batch)


Outcome = list[NodeResult] | Exception


class Executor(Protocol):
    """Runs payloads. `slots` is how many can run at once."""

    @property
    def slots(self) -> int: ...
    def submit(self, ticket: int, payload: str) -> None: ...
    def wait(self) -> tuple[int, Outcome]: ...
    def close(self) -> None: ...


class LocalExecutor:
    """One batch after the other, in this process."""

    slots = 1

    def __init__(self) -> None:
        self._queue: deque[tuple[int, str]] = deque()

    def submit(self, ticket: int, payload: str) -> None:
        self._queue.append((ticket, payload))

    def wait(self) -> tuple[int, Outcome]:
        ticket, payload = self._queue.popleft()
        try:
            return ticket, run_batch(payload)
        except Exception as error:
            return ticket, error

    def close(self) -> None:
        self._queue.clear()


class RayExecutor:
    """Batches as Ray tasks, bounded in flight by the caller, collected in finish order.

    Inside a Ray job, or with RAY_ADDRESS set, it joins that cluster; otherwise it starts a local one, with token authentication on a
    token file of its own under MSM_HOME (mode 0600, path set explicitly: without the path, workers that start later cannot find it).
    """

    def __init__(self, task_seconds_max: float = 1800.0, workers: int | None = None) -> None:
        self._started_here = not os.environ.get("RAY_ADDRESS")
        self._task_seconds_max, self._workers = task_seconds_max, workers
        self._tasks: dict[Any, tuple[int, float]] = {}

    @functools.cached_property
    def _ray(self) -> Any:
        """Ray, started at the first need: a night with nothing to do does not pay for it."""
        if self._started_here:
            _prepare_local_environment()
        import ray  # after the environment is set: ray reads it on import

        self._starter = _Starter(lambda: self._connect(ray), START_SECONDS_MAX)
        return ray

    def _connect(self, ray: Any) -> None:
        if not ray.is_initialized():
            local: dict[str, Any] = {"include_dashboard": False, "num_cpus": self._workers} if self._started_here else {}
            context = ray.init(log_to_driver=False, logging_level=logging.ERROR, **local)
            if not self._started_here:
                refuse_open_cluster(context.dashboard_url)
        ray.get(ray.remote(num_cpus=1)(_ping).remote(), timeout=START_SECONDS_MAX)  # a worker that cannot start must show here

    @functools.cached_property
    def _remote(self) -> Any:
        """The task. Crashes are retried; an error of its own is not, since it would come again."""
        return self._ray.remote(num_cpus=1, max_retries=3)(run_batch)

    @property
    def slots(self) -> int:
        return self._slots

    @functools.cached_property
    def _slots(self) -> int:
        return max(int(self._ray.cluster_resources().get("CPU", 1)), 1)

    def submit(self, ticket: int, payload: str) -> None:
        name = f"update_{json.loads(payload)['kind'].removesuffix('s')}s"  # static, one per kind: the dashboard groups by it
        self._tasks[self._remote.options(name=name).remote(payload)] = (ticket, time.monotonic())

    def wait(self) -> tuple[int, Outcome]:
        while True:
            done, _ = self._ray.wait(list(self._tasks), num_returns=1, timeout=5.0)
            reference = done[0] if done else self._overdue()
            if reference is None:
                continue
            ticket, _ = self._tasks.pop(reference)
            if not done:
                self._ray.cancel(reference, force=True)
                return ticket, TaskTimedOut(seconds=self._task_seconds_max)
            return ticket, self._collect(reference)

    def _overdue(self) -> Any | None:
        """A task past its wall-clock limit, counted from its submission."""
        return next((r for r, (_, since) in self._tasks.items() if time.monotonic() - since > self._task_seconds_max), None)

    def _collect(self, reference: Any) -> Outcome:
        from ray.exceptions import RayError, RayTaskError

        try:
            return self._ray.get(reference)
        except RayTaskError as error:
            return error.cause if isinstance(error.cause, Exception) else error
        except RayError as error:
            return WorkerLost(why=redact(str(error)).splitlines()[0])

    def close(self) -> None:
        if "_ray" not in self.__dict__:
            return  # never needed
        for reference in self._tasks:
            self._ray.cancel(reference, force=True)
        if self._started_here:
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


def _prepare_local_environment() -> None:
    """Environment of a local Ray, which its workers inherit; what the user has set is left alone."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # it takes lines that differ in numbers for repetitions
    os.environ.setdefault("RAY_task_oom_retries", "1")  # endless by default: one hog would stall the night
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
