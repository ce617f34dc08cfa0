"""What each node needs: its window, the reason, and the error that stops it before anything is tried.

Read set-based by the driver, decided without any clock. A node that is already there gets no work; only its own progress and the
coverage of its own assets decide that, never a table-wide maximum.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Generic, Literal, TypeVar

from sqlalchemy import Connection

from msm_core.configuration import PortfolioConfiguration
from msm_core.construction import required_assets
from msm_core.data_nodes.base import failure_facts
from msm_core.data_nodes.portfolios import SESSION_DATE_MARGIN, PortfoliosDataNode, portfolio_scopes
from msm_core.data_nodes.signals import SignalWeights
from msm_core.errors import MissingPrices, MsmError, SourceNotRegistered, SourceUnusable, UnknownAssets
from msm_core.frames import utc
from msm_core.models import SignalWeightsStorage
from msm_core.signals import CODE_VERSION as SIGNAL_CODE_VERSION
from msm_core.signals import Signal
from msm_core.storage import Progress, ProgressRows, Scope, Source, known_assets, last_trades, price_coverage, read_progress, read_sources
from msm_core.valuation import CODE_VERSION as PORTFOLIO_CODE_VERSION

Reason = Literal[
    "new", "configuration changed", "code changed", "full refresh", "inputs advanced", "previous failure", "up to date", "invalid"
]
NodeT = TypeVar("NodeT", SignalWeights, PortfoliosDataNode)
Coverage = Mapping[tuple[uuid.UUID, str], Mapping[str, tuple[datetime, datetime]]]


@dataclass(frozen=True)
class NodePlan(Generic[NodeT]):
    """One node of a plan. `node` is None when there is nothing to do, or when `error` says that nothing can be done.

    start, end  the window is (start, end]; start None = from the beginning
    limited_by  the required asset whose prices end the window first
    """

    identifier: str
    reason: Reason
    node: NodeT | None
    start: datetime | None = None
    end: datetime | None = None
    limited_by: str | None = None
    error: dict[str, str] | None = None


@dataclass(frozen=True)
class World:
    """What the plan of a fleet is decided from, all of it read in a fixed number of statements."""

    progress: ProgressRows
    held: Mapping[str, tuple[str, ...]]
    sources: Mapping[uuid.UUID, Source]
    assets: set[str]
    coverage: Coverage


def read_world(connection: Connection, configurations: Sequence[PortfolioConfiguration], as_of: datetime) -> World:
    """Statements: five, and one more per (price source, column)."""
    scopes = [s for c in configurations for s in (*portfolio_scopes(c), Scope(SignalWeightsStorage, c.signal_uid))]
    progress = read_progress(connection, {s.uid for s in scopes})
    held = {i: trade.held() for i, trade in last_trades(connection, [c.identifier for c in configurations]).items()}
    needed = {
        c.identifier: {*c.signal.universe, *held.get(c.identifier, ()), *filter(None, [c.signal.override_asset])} for c in configurations
    }
    sources = read_sources(connection, {c.price_source.source_uid for c in configurations})
    assets = known_assets(connection, {a for names in needed.values() for a in names})
    wanted: dict[tuple[uuid.UUID, str], set[str]] = {}
    for c in configurations:
        if _source_error(c, sources) is None:
            wanted.setdefault((c.price_source.source_uid, c.price_column), set()).update(needed[c.identifier])
    coverage = {
        (uid, column): price_coverage(connection, sources[uid], column, sorted(names), as_of) for (uid, column), names in wanted.items()
    }
    return World(progress, held, sources, assets, coverage)


def plan_signal(signal: Signal, world: World, as_of: datetime, full_refresh: bool) -> NodePlan[SignalWeights]:
    """A signal whose computation, or a later vector, is due."""
    identifier = signal.uid
    before = world.progress.get(Scope(SignalWeightsStorage, identifier).uid)
    if before is None or before.watermark is None:
        reason: Reason = "new"
    elif full_refresh:
        reason = "full refresh"
    elif before.code_version != SIGNAL_CODE_VERSION:
        reason = "code changed"
    elif len(signal.emit(utc(before.watermark, "watermark"), utc(as_of, "as_of")).times):
        reason = "inputs advanced"
    else:
        return NodePlan(identifier, "up to date", None, before.watermark, before.watermark)
    start = before.watermark if before and reason == "inputs advanced" else None
    node = SignalWeights(
        signal_weights_instance=signal, replace=reason in ("full refresh", "code changed"), expected_epoch=before.epoch if before else None
    )
    return NodePlan(identifier, reason, node, start, as_of)


def plan_portfolio(
    configuration: PortfolioConfiguration, world: World, as_of: datetime, full_refresh: bool
) -> NodePlan[PortfoliosDataNode]:
    """Reason, window and work of one portfolio; what cannot work (unknown assets, no prices, bad source) is told here, by name."""
    try:
        return _plan_portfolio(configuration, world, as_of, full_refresh)
    except MsmError as error:
        return NodePlan(configuration.identifier, "invalid", None, error=failure_facts(error))


def _plan_portfolio(
    configuration: PortfolioConfiguration, world: World, as_of: datetime, full_refresh: bool
) -> NodePlan[PortfoliosDataNode]:
    identifier = configuration.identifier
    own = [world.progress.get(scope.uid) for scope in portfolio_scopes(configuration)]
    before = own[0]
    reason = _reason(configuration, own, full_refresh)
    rebuilt = reason in ("full refresh", "configuration changed", "code changed")
    watermark = before.watermark if before else None
    start = None if rebuilt else watermark
    held = () if start is None else world.held.get(identifier, ())
    required = required_assets(configuration, held)
    unknown = [a for a in required if a not in world.assets]
    if unknown:
        raise UnknownAssets(owner=identifier, assets=", ".join(unknown))
    if error := _source_error(configuration, world.sources):
        raise error
    end, limit = _window_end(configuration, world, required, start, as_of)
    window = NodePlan[PortfoliosDataNode](identifier, reason, None, start, end, limit)
    if start is not None and end <= start:
        return replace(window, reason="up to date")
    node = PortfoliosDataNode(
        portfolio_configuration=configuration,
        held=held,
        watermark=watermark,
        replace=rebuilt,
        expected_epoch=before.epoch if before else None,
    )
    return replace(window, node=node)


def _reason(configuration: PortfolioConfiguration, own: Sequence[Progress | None], full_refresh: bool) -> Reason:
    before = own[0]
    if before is None or before.watermark is None:
        return "new"
    if full_refresh:
        return "full refresh"
    behind = any(p is None or p.watermark != before.watermark for p in own)  # for example an index that it did not publish before
    if before.configuration_hash != configuration.configuration_hash or behind:
        return "configuration changed"
    if before.code_version != PORTFOLIO_CODE_VERSION:
        return "code changed"
    return "inputs advanced"


def _source_error(configuration: PortfolioConfiguration, sources: Mapping[uuid.UUID, Source]) -> MsmError | None:
    uid, column = configuration.price_source.source_uid, configuration.price_column
    if uid not in sources:
        return SourceNotRegistered(
            source=str(uid), known=", ".join(sorted(s.identifier for s in sources.values())) or "none of this fleet's"
        )
    source = sources[uid]
    if column not in source.columns:
        numeric = ", ".join(sorted(source.columns))
        return SourceUnusable(source=source.identifier, why=f"it has no numeric column {column!r}, only {numeric}; set price_column")
    if configuration.rebalance.needs_volume and "volume" not in source.columns:
        return SourceUnusable(source=source.identifier, why=f"{configuration.rebalance.kind} needs a volume column")
    return None


def _window_end(
    configuration: PortfolioConfiguration, world: World, required: Sequence[str], start: datetime | None, as_of: datetime
) -> tuple[datetime, str | None]:
    """End of the window as far as prices tell, and the asset that limits it. Raises MissingPrices for a fresh portfolio."""
    source = world.sources[configuration.price_source.source_uid]
    covered = world.coverage[source.uid, configuration.price_column]
    absent = [a for a in required if a not in covered]
    if absent and start is None:
        facts = {"source": source.identifier, "column": configuration.price_column, "assets": ", ".join(absent)}
        raise MissingPrices(portfolio=configuration.identifier, **facts)
    if absent:
        return start or as_of, absent[0]
    margin = SESSION_DATE_MARGIN if source.time_label == "session_date" else timedelta(0)
    last, asset = min((covered[a][1] + margin, a) for a in required)
    return (last, asset) if last < as_of else (as_of, None)
