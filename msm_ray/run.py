"""The loop of a run: submit, wait, quarantine, report. It knows executors by two methods and nothing of Ray.

A node's failure stops only what depends on it. A lost batch is halved and tried again until the culprit stands alone. Nodes that a
rival run holds are asked again at the end: landed by the rival to the same as-of, they are up to date.
"""

import time
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from graphlib import CycleError, TopologicalSorter
from typing import Any

import structlog
from sqlalchemy import Engine

from msm_core.configuration import PortfolioConfiguration
from msm_core.data_nodes.base import NodeResult, failure_facts
from msm_core.data_nodes.interpolated_prices import InterpolatedAsset
from msm_core.data_nodes.planning import new_scopes, read_world
from msm_core.data_nodes.portfolios import PortfoliosDataNode
from msm_core.data_nodes.signals import SignalWeights
from msm_core.database import exported_snapshot, transaction
from msm_core.errors import CyclicPlan, DependencyFailed
from msm_core.frames import parse_frequency
from msm_core.signals.computed import ComputedSignal
from msm_core.storage import ensure_progress, verify_prepared
from msm_ray import ledger
from msm_ray.executors import Executor, encode_batch
from msm_ray.plan import Key, Plan, Work, make_plan

log = structlog.get_logger()

BATCH_NODES_MAX = 256
PRICE_NODES_MAX = 4096  # an asset is a smaller piece of work than a portfolio
PRICE_COLUMNS = 4  # columns of a bar, weighed: they travel, but are not computed with
WINDOW_WEIGHT = 0.1  # of a number in a signal's window against one of a portfolio's
BATCH_CELLS_MAX = 3_000_000  # sessions x assets: bounds memory, and keeps a task long enough to be worth its overhead
SESSIONS_PER_DAY = 5 / 7
FRESH_SESSIONS = 5_000  # guess for a window without a start
BUSY_SECONDS_MAX = 60.0
BUSY_PAUSE_SECONDS = 1.0


@dataclass(frozen=True)
class RunReport:
    """What a run did; `results` holds one entry per node, portfolios and signals."""

    run_uid: uuid.UUID
    as_of: datetime
    results: tuple[NodeResult, ...]
    seconds: float

    def counts(self, kind: str = "portfolio") -> dict[str, int]:
        found = Counter(r.status for r in self.results if r.kind == kind)
        return {status: found.get(status, 0) for status in ("landed", "up_to_date", "failed", "skipped", "busy")}

    @property
    def rows_written(self) -> int:
        return sum(r.rows for r in self.results)

    @property
    def status(self) -> str:
        counts = self.counts()
        bad = counts["failed"] + counts["skipped"] + counts["busy"] + self.counts("signal")["failed"] + self.counts("prices")["failed"]
        good = counts["landed"] + counts["up_to_date"]
        return "landed" if not bad else "partial" if good else "failed"

    @property
    def exit_code(self) -> int:
        """0 all landed, 3 partial, 4 nothing landed."""
        return {"landed": 0, "partial": 3, "failed": 4}[self.status]

    def summary(self) -> dict[str, Any]:
        return {
            "run": str(self.run_uid),
            "as_of": self.as_of.isoformat(),
            "status": self.status,
            **self.counts(),
            "prices": self.counts("prices"),
            "signals": self.counts("signal"),
            "rows_written": self.rows_written,
            "seconds": round(self.seconds, 3),
        }

    def failures(self) -> list[NodeResult]:
        return [r for r in self.results if r.status in ("failed", "skipped", "busy")]

    def document(self) -> dict[str, Any]:
        """The whole report as plain data: `run_results.json`."""
        return {**self.summary(), "nodes": [{**asdict(r), "watermark": r.watermark and r.watermark.isoformat()} for r in self.results]}


@dataclass(frozen=True)
class Options:
    """How a run goes about it; nothing here changes numbers.

    batch_size        most nodes per batch; None = by work
    signals_selected  signals to bring up to date even if no portfolio needs them
    unreadable        stored portfolios whose configuration cannot be read, and why: reported as failed
    """

    batch_size: int | None = None
    full_refresh: bool = False
    signals_selected: Collection[str] = ()
    unreadable: Mapping[str, dict[str, str]] = field(default_factory=dict)
    retry_of: uuid.UUID | None = None
    arguments: dict[str, Any] = field(default_factory=dict)


OnProgress = Callable[[Plan, Sequence[NodeResult]], None]


def run_fleet(
    engine: Engine,
    configurations: Sequence[PortfolioConfiguration],
    executor: Executor,
    as_of: datetime,
    options: Options | None = None,
    on_progress: OnProgress = lambda plan, results: None,
) -> RunReport:
    """Bring `configurations` up to `as_of`, under one snapshot of all outside inputs, and write the ledger.

    Raises StorageNotPrepared before anything is written. Whatever ends it, the run's row says so.
    """
    options = options or Options()
    started = time.perf_counter()
    with engine.connect() as connection:
        verify_prepared(connection)
        failed_before = ledger.failed_portfolios(connection)
    run_uid = ledger.start_run(engine, as_of, options.arguments, options.retry_of)
    status, report = "cancelled", None
    try:
        with exported_snapshot(engine) as snapshot:
            run = _Run(engine, executor, run_uid, as_of, snapshot, options, on_progress)
            results = run.bring_up_to_date(configurations, failed_before)
        report = RunReport(run_uid, as_of, tuple(results), time.perf_counter() - started)
        status = report.status
        return report
    except Exception:
        status = "failed"
        raise
    finally:
        ledger.finish_run(engine, run_uid, status, report.summary() if report else {})


@dataclass
class _Run:
    """One run under way."""

    engine: Engine
    executor: Executor
    run_uid: uuid.UUID
    as_of: datetime
    snapshot: str
    options: Options
    on_progress: OnProgress

    def bring_up_to_date(self, configurations: Sequence[PortfolioConfiguration], failed_before: Collection[str]) -> list[NodeResult]:
        """Run a plan; then again for nodes that a rival held, until they are done or patience ends."""
        results: dict[Key, NodeResult] = {}
        signals = set(self.options.signals_selected)
        deadline = time.monotonic() + BUSY_SECONDS_MAX
        while True:
            plan = self.plan(configurations, failed_before, signals)
            landed = {key for key, r in results.items() if r.status == "landed"}
            for result in self.execute(plan, landed):
                results[result.kind, result.identifier] = result
            busy = {key for key, r in results.items() if r.status == "busy"}
            if not busy or time.monotonic() > deadline:
                return list(results.values())
            log.info("nodes are held by another run; asking again", count=len(busy))
            time.sleep(BUSY_PAUSE_SECONDS)
            signals = {identifier for kind, identifier in busy if kind == "signal"}
            if not any(kind == "prices" for kind, _ in busy):
                configurations = [c for c in configurations if ("portfolio", c.identifier) in busy or c.signal_uid in signals]

    def plan(self, configurations: Sequence[PortfolioConfiguration], failed_before: Collection[str], signals: Collection[str]) -> Plan:
        with transaction(self.engine, read_only=True) as connection:
            world = read_world(connection, configurations, self.as_of)
        plan = make_plan(
            configurations,
            world,
            self.as_of,
            full_refresh=self.options.full_refresh,
            failed_before=failed_before,
            signals_selected=signals,
            unreadable=self.options.unreadable,
        )
        if scopes := new_scopes(plan.prices):
            with self.engine.begin() as connection:
                ensure_progress(connection, scopes)
        return plan

    def execute(self, plan: Plan, landed: Collection[Key] = ()) -> list[NodeResult]:
        """Results of the plan's nodes. One that has `landed` in this run, and is asked again beside a busy one, has still landed."""
        reasons = plan.reasons()
        results: list[NodeResult] = []

        def note(found: Sequence[NodeResult]) -> None:
            news = [r for r in found if r.status != "up_to_date" or (r.kind, r.identifier) not in landed]
            results.extend(news)
            self._publish(plan, news, reasons)

        note(plan.settled())
        for batch in _Flight(plan, self).results():
            note(batch)
        return results

    def _publish(self, plan: Plan, results: Sequence[NodeResult], reasons: dict[Key, str]) -> None:
        ledger.record(self.engine, self.run_uid, results, reasons)
        self.on_progress(plan, results)


class _Flight:
    """The nodes of one plan on their way: ready ones wait in groups that share inputs, batches fly, dependants of failures are skipped."""

    def __init__(self, plan: Plan, run: _Run) -> None:
        self.run = run
        self.work, self.upstream = plan.work(), plan.upstream()
        self.sorter = TopologicalSorter(self.upstream)
        try:
            self.sorter.prepare()
        except CycleError as error:
            raise CyclicPlan(cycle=" -> ".join(f"{kind}:{identifier}" for kind, identifier in error.args[1])) from None
        self.blocked: dict[Key, NodeResult] = {}
        self.waiting: dict[tuple[Any, ...], deque[Key]] = defaultdict(deque)
        self.flying: dict[int, list[Key]] = {}
        self.tickets = 0

    def results(self) -> Iterator[list[NodeResult]]:
        """Yields the results of each batch, and of the nodes that its failures skip, until nothing is left."""
        while self.sorter.is_active():
            skipped = self._collect_ready()
            if skipped:
                yield skipped
            while len(self.flying) < 2 * self.run.executor.slots and (batch := self._next_batch()):
                self._submit(batch)
            if self.flying:
                yield self._land()

    def _collect_ready(self) -> list[NodeResult]:
        skipped = []
        for key in self.sorter.get_ready():
            bad = next((self.blocked[up] for up in self.upstream[key] if up in self.blocked), None)
            if bad is None:
                self.waiting[_group(key, self.work[key])].append(key)
            else:
                skipped.append(self._skip(key, bad))
        return skipped

    def _skip(self, key: Key, bad: NodeResult) -> NodeResult:
        cause = f"{bad.kind} {bad.identifier} ({bad.error['message'] if bad.error else bad.status})"
        facts = failure_facts(DependencyFailed(upstream=cause))
        status = "busy" if bad.status == "busy" else "skipped"
        result = NodeResult(key[0], key[1], status, error=facts, attempts=0)
        self.blocked[key] = result
        self.sorter.done(key)
        return result

    def _next_batch(self) -> list[Key]:
        """The next nodes of the fullest group, up to the bounds on nodes and on work.

        In the order of their keys, as far as they are ready: rows then go to the right end of a primary key, which is its fast end.
        """
        group = max(self.waiting, key=lambda g: len(self.waiting[g]), default=None)
        if group is None:
            return []
        waiting, batch, cells = self.waiting[group], list[Key](), 0.0
        most = self.run.options.batch_size or (PRICE_NODES_MAX if group[0] == "prices" else BATCH_NODES_MAX)
        while waiting and len(batch) < most and (not batch or cells < BATCH_CELLS_MAX):
            key = waiting.popleft()
            batch.append(key)
            cells += _cells(self.work[key], self.run.as_of)
        if not waiting:
            del self.waiting[group]
        return batch

    def _submit(self, keys: list[Key]) -> None:
        nodes = [self.work[key] for key in sorted(keys)]
        payload = encode_batch(keys[0][0], nodes, self.run.as_of, self.run.run_uid, self.run.snapshot)
        self.tickets += 1
        self.flying[self.tickets] = keys
        self.run.executor.submit(self.tickets, payload)

    def _land(self) -> list[NodeResult]:
        ticket, outcome = self.run.executor.wait()
        keys = self.flying.pop(ticket)
        if isinstance(outcome, Exception):
            return self._lost(keys, outcome)
        for result in outcome:
            key = (result.kind, result.identifier)
            if result.status in ("failed", "busy"):
                self.blocked[key] = result
            self.sorter.done(key)
        return outcome

    def _lost(self, keys: list[Key], error: Exception) -> list[NodeResult]:
        """A batch without an answer: two halves get another chance, a single node is quarantined."""
        if len(keys) > 1:
            log.warning("a batch was lost; trying its halves", nodes=len(keys), error=failure_facts(error)["message"])
            half = len(keys) // 2
            self._submit(keys[:half])
            self._submit(keys[half:])
            return []
        result = NodeResult(*keys[0], "failed", error=failure_facts(error))
        self.blocked[keys[0]] = result
        self.sorter.done(keys[0])
        return [result]


def _group(key: Key, node: Work) -> tuple[Any, ...]:
    """Nodes of one group read the same prices over a similar window."""
    if isinstance(node, InterpolatedAsset):
        return (key[0], node.source_key, node.since is None)
    if isinstance(node, SignalWeights):
        sources = sorted({str(source.key) for source in node.dependencies().values()})
        return (key[0], *sources, node.since is None)
    configuration = node.portfolio_configuration
    return (key[0], configuration.price_source.key, configuration.price_column, node.since is None)


def _cells(node: Work, as_of: datetime) -> float:
    """Estimated sessions x assets of a node's window; of bars for prices, of which each is a dozen columns; of a signal's own windows."""
    sessions = (FRESH_SESSIONS if node.since is None else max((as_of - node.since).days, 1) * SESSIONS_PER_DAY) + 1
    if isinstance(node, InterpolatedAsset):
        return sessions * PRICE_COLUMNS * (timedelta(days=1) / parse_frequency(node.source_cadence))
    if isinstance(node, PortfoliosDataNode):
        return sessions * (len(node.assets) + 1)
    signal = node.signal_weights_instance
    if not isinstance(signal, ComputedSignal):
        return len(signal.universe)
    return sessions * len(signal.universe) * max(signal.history_sessions * WINDOW_WEIGHT, 1.0)
