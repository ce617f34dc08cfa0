"""A run: plan, let it fly, record, report. Nothing here knows Ray.

Nodes that a rival run holds are asked again at the end: landed by the rival to the same as-of, they are up to date.
"""

import math
import time
import uuid
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

import structlog
from sqlalchemy import Engine

from msm_core.configuration import PortfolioConfiguration
from msm_core.data_nodes.base import NodeResult
from msm_core.data_nodes.dependencies import independent_parts
from msm_core.data_nodes.planning import new_scopes
from msm_core.data_nodes.world import read_world
from msm_core.database import exported_snapshot, transaction
from msm_core.garbage import collecting_seldom
from msm_core.models import PortfoliosStorage, PortfolioWeightsStorage, SignalWeightsStorage
from msm_core.storage import Scope, ensure_progress, partitions_of, read_progress, verify_prepared
from msm_ray import ledger
from msm_ray.executors import Errand, Executor
from msm_ray.flight import Flight
from msm_ray.plan import Key, Plan, make_plan

log = structlog.get_logger()

WRITTEN = {"signal": SignalWeightsStorage, "portfolio": PortfolioWeightsStorage}  # most of the rows of a node
PART_PORTFOLIOS_MIN, PARTS_MAX = 2_000, 8  # a part costs a dozen statements
BUSY_SECONDS_MAX = 60.0
BUSY_PAUSE_SECONDS = 1.0


@dataclass(frozen=True)
class RunReport:
    """What a run did; `results` holds one entry per node, portfolios and signals.

    oldest_watermark  where the most stale of the run's portfolios stands, failed ones too; None = none of them has a value
    """

    run_uid: uuid.UUID
    as_of: datetime
    results: tuple[NodeResult, ...]
    seconds: float
    oldest_watermark: datetime | None = None

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
            "oldest_watermark": self.oldest_watermark and self.oldest_watermark.isoformat(),
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


class Observer:
    """Follows a run, in the driver's thread. It does nothing by itself; what an override raises ends the run."""

    def planned(self, run_uid: uuid.UUID, plan: Plan) -> None:
        """What is to be done: of a large fleet part by part, while the first ones run. Told again, with what is left, when nodes that a
        rival run held are asked once more."""

    def landed(self, results: Sequence[NodeResult]) -> None:
        """Nodes that came to an end together: a batch, what its failures skip, or what needed no work."""

    def finished(self, report: RunReport) -> None:
        """The run is over and its ledger is written. A run that crashes is not finished."""


@collecting_seldom()
def run_fleet(
    engine: Engine,
    configurations: Sequence[PortfolioConfiguration],
    executor: Executor,
    as_of: datetime,
    options: Options | None = None,
    observer: Observer | None = None,
) -> RunReport:
    """Bring `configurations` up to `as_of`, under one snapshot of all outside inputs, and write the ledger.

    Raises StorageNotPrepared before anything is written. Whatever ends it, the run's row says so.
    """
    observer = observer or Observer()
    report = _run_recorded(engine, configurations, executor, as_of, options or Options(), observer)
    observer.finished(report)
    return report


def _run_recorded(
    engine: Engine,
    configurations: Sequence[PortfolioConfiguration],
    executor: Executor,
    as_of: datetime,
    options: Options,
    observer: Observer,
) -> RunReport:
    started = time.perf_counter()
    with engine.connect() as connection:
        verify_prepared(connection)
        failed_before = ledger.failed_portfolios(connection)
    run_uid = ledger.start_run(engine, as_of, options.arguments, options.retry_of)
    status, report = "cancelled", None
    try:
        with exported_snapshot(engine) as snapshot:
            run = _Run(engine, executor, run_uid, as_of, snapshot, options, observer)
            results = run.bring_up_to_date(configurations, failed_before)
        oldest = _oldest_watermark(engine, results)
        report = RunReport(run_uid, as_of, tuple(results), time.perf_counter() - started, oldest)
        status = report.status
        return report
    except Exception:
        status = "failed"
        raise
    finally:
        ledger.finish_run(engine, run_uid, status, report.summary() if report else {})


def _oldest_watermark(engine: Engine, results: Sequence[NodeResult]) -> datetime | None:
    """From the progress rows: the result of a portfolio that failed does not tell where it stands."""
    uids = [Scope(PortfoliosStorage, r.identifier).uid for r in results if r.kind == "portfolio"]
    with transaction(engine, read_only=True) as connection:
        return min((p.watermark for p in read_progress(connection, uids).values() if p.watermark), default=None)


@dataclass
class _Run:
    """One run under way."""

    engine: Engine
    executor: Executor
    run_uid: uuid.UUID
    as_of: datetime
    snapshot: str
    options: Options
    observer: Observer

    def bring_up_to_date(self, configurations: Sequence[PortfolioConfiguration], failed_before: Collection[str]) -> list[NodeResult]:
        """Run the fleet; then again nodes that a rival held, until they are done or patience ends."""
        results: dict[Key, NodeResult] = {}
        signals = set(self.options.signals_selected)
        deadline = time.monotonic() + BUSY_SECONDS_MAX
        while True:
            landed = {key for key, r in results.items() if r.status == "landed"}
            for result in self.execute(configurations, failed_before, signals, landed):
                results[result.kind, result.identifier] = result
            busy = {key for key, r in results.items() if r.status == "busy"}
            if not busy or time.monotonic() > deadline:
                return list(results.values())
            log.info("nodes are held by another run; asking again", count=len(busy))
            time.sleep(BUSY_PAUSE_SECONDS)
            signals = {identifier for kind, identifier in busy if kind == "signal"}
            if not any(kind == "prices" for kind, _ in busy):
                configurations = [c for c in configurations if ("portfolio", c.identifier) in busy or c.signal_uid in signals]

    def execute(
        self, configurations: Sequence[PortfolioConfiguration], failed_before: Collection[str], signals: Collection[str],
        landed: Collection[Key],
    ) -> list[NodeResult]:  # fmt: skip
        """Results of all nodes. One that has `landed` in this run, and is asked again beside a busy one, has still landed.

        A large fleet is planned in parts, while workers are at those before: planning ten thousand portfolios takes seconds.
        """
        reasons: dict[Key, str] = {}
        results: list[NodeResult] = []

        def note(found: Sequence[NodeResult]) -> None:
            news = [r for r in found if r.status != "up_to_date" or (r.kind, r.identifier) not in landed]
            results.extend(news)
            ledger.record(self.engine, self.run_uid, news, reasons)
            self.observer.landed(news)

        flight = Flight(self.executor, Errand(self.as_of, self.run_uid, self.snapshot), self.options.batch_size)
        unreadable = self.options.unreadable
        for part in independent_parts(configurations, max(PART_PORTFOLIOS_MIN, math.ceil(len(configurations) / PARTS_MAX))):
            plan = self.plan(part, failed_before, signals, unreadable)
            unreadable = {}  # told once
            reasons |= plan.reasons()
            self.observer.planned(self.run_uid, plan)
            flight.add(plan, self._partitions(plan))
            note(plan.settled())  # while the workers work
            for batch in flight.landed():
                note(batch)
        for batch in flight.results():
            note(batch)
        return results

    def plan(
        self, configurations: Sequence[PortfolioConfiguration], failed_before: Collection[str], signals: Collection[str],
        unreadable: Mapping[str, dict[str, str]],
    ) -> Plan:  # fmt: skip
        with transaction(self.engine, read_only=True) as connection:
            world = read_world(connection, configurations, self.as_of)
        plan = make_plan(
            configurations,
            world,
            self.as_of,
            full_refresh=self.options.full_refresh,
            failed_before=failed_before,
            signals_selected=signals,
            unreadable=unreadable,
        )
        if scopes := new_scopes(plan.prices):
            with self.engine.begin() as connection:
                ensure_progress(connection, scopes)
        return plan

    def _partitions(self, plan: Plan) -> dict[Key, int]:
        """Of nodes that are computed from scratch: an increment is a few rows everywhere, and groups of its own would cost more."""
        fresh = [key for key, node in plan.work().items() if key[0] in WRITTEN and node.since is None]
        if not fresh:
            return {}
        with transaction(self.engine, read_only=True) as connection:
            return {
                (kind, identifier): partition
                for kind, storage in WRITTEN.items()
                for identifier, partition in partitions_of(connection, storage, [i for k, i in fresh if k == kind]).items()
            }
