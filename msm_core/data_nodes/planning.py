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
from msm_core.frames import TICK, to_datetime, utc
from msm_core.models import SignalWeightsStorage
from msm_core.signals import CODE_VERSION as SIGNAL_CODE_VERSION
from msm_core.signals import Signal
from msm_core.storage import Progress, ProgressRows, Scope, Source, known_assets, last_trades, price_coverage, read_progress, read_sources
from msm_core.valuation import CODE_VERSION as PORTFOLIO_CODE_VERSION

Reason = Literal[
    "new", "configuration changed", "code changed", "full refresh", "inputs advanced", "previous failure", "up to date", "invalid"
]
NodeT = TypeVar("NodeT", SignalWeights, PortfoliosDataNode)
TEXT_TYPES = {"text", "character varying"}
Coverage = Mapping[tuple[uuid.UUID, str], Mapping[str, tuple[datetime, datetime]]]


@dataclass(frozen=True)
class NodePlan(Generic[NodeT]):
    """One node of a plan. `node` is None when there is nothing to do, or when `error` says that nothing can be done.

    start, end  the window is (start, end]; start None = from the beginning
    limited_by  what ends the window first: a required asset, "signal" (its vector expires) or "as of"
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
    elif _may_emit(signal, before.watermark, as_of):
        reason = "inputs advanced"
    else:
        return NodePlan(identifier, "up to date", None, before.watermark, before.watermark)
    start = before.watermark if before and reason == "inputs advanced" else None
    node = SignalWeights(
        signal_weights_instance=signal, replace=reason in ("full refresh", "code changed"), expected_epoch=before.epoch if before else None
    )
    return NodePlan(identifier, reason, node, start, as_of)


def _may_emit(signal: Signal, watermark: datetime, as_of: datetime) -> bool:
    """Whether a later vector is due. A signal that raises is given work: it fails there, alone, with what depends on it."""
    try:
        return len(signal.emit(utc(watermark, "watermark"), utc(as_of, "as_of")).times) > 0
    except Exception:
        return True


def plan_portfolio(
    configuration: PortfolioConfiguration, world: World, as_of: datetime, full_refresh: bool
) -> NodePlan[PortfoliosDataNode]:
    """Reason, window and work of one portfolio; what cannot work (unknown assets, no prices, bad source) is told here, by name."""
    try:
        return _plan_portfolio(configuration, world, as_of, full_refresh)
    except Exception as error:  # one portfolio's trouble, foreseen or not, must not stop the fleet's plan
        return NodePlan(configuration.identifier, "invalid", None, error=failure_facts(error))


def _plan_portfolio(
    configuration: PortfolioConfiguration, world: World, as_of: datetime, full_refresh: bool
) -> NodePlan[PortfoliosDataNode]:
    identifier = configuration.identifier
    own = [world.progress.get(scope.uid) for scope in portfolio_scopes(configuration)]
    before = own[0]
    reason = _reason(configuration, own, full_refresh)
    held_before = any(p is not None and p.watermark is not None for p in own)
    rebuilt = reason in ("full refresh", "configuration changed", "code changed") or (reason == "new" and held_before)
    watermark = before.watermark if before else None
    start = None if rebuilt else watermark
    held = () if start is None else world.held.get(identifier, ())
    required = required_assets(configuration, held)
    unknown = [a for a in required if a not in world.assets]
    if unknown:
        raise UnknownAssets(owner=identifier, assets=", ".join(unknown))
    if error := _source_error(configuration, world.sources):
        raise error
    end, limit = min(_priced_end(configuration, world, required, start, as_of), _signal_end(configuration, world, as_of))
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
    state = (before.watermark, configuration.configuration_hash)
    if any(p is None or (p.watermark, p.configuration_hash) != state for p in own):  # its own hash, or an index it did not publish before
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
    wrong = [
        (not source.readable, "this database role may not read it; GRANT SELECT on it"),
        (source.columns.get("asset_identifier", "").split("(")[0] not in TEXT_TYPES, "its asset_identifier must be a text column"),
        (source.columns.get("time_index") != "timestamp with time zone", "its time_index must be a timestamp with time zone"),
        (column not in source.numeric, f"it has no numeric column {column!r}, only {', '.join(source.numeric)}; set price_column"),
        (configuration.rebalance.needs_volume and "volume" not in source.numeric, f"{configuration.rebalance.kind} needs a volume column"),
    ]
    why = next((reason for is_wrong, reason in wrong if is_wrong), None)
    return SourceUnusable(source=source.identifier, why=why) if why else None


Limit = tuple[datetime, str]  # an end of the window, and what sets it: an asset, "signal" or "as of"


def _priced_end(
    configuration: PortfolioConfiguration, world: World, required: Sequence[str], start: datetime | None, as_of: datetime
) -> Limit:
    """The first end of the required assets' prices. Raises MissingPrices for a fresh portfolio with an asset that has none."""
    source = world.sources[configuration.price_source.source_uid]
    covered = world.coverage[source.uid, configuration.price_column]
    absent = [a for a in required if a not in covered]
    if absent and start is None:
        facts = {"source": source.identifier, "column": configuration.price_column, "assets": ", ".join(absent)}
        raise MissingPrices(portfolio=configuration.identifier, **facts)
    if absent:
        return start or as_of, absent[0]
    margin = SESSION_DATE_MARGIN if source.time_label == "session_date" else timedelta(0)
    return min((covered[a][1] + margin, a) for a in required)


def _signal_end(configuration: PortfolioConfiguration, world: World, as_of: datetime) -> Limit:
    """The last instant at which the signal's newest vector is valid, when no newer one is due; else `as_of`."""
    signal, fill = configuration.signal, configuration.signal.maximum_forward_fill
    before = world.progress.get(Scope(SignalWeightsStorage, configuration.signal_uid).uid)
    if fill is None or before is None or before.watermark is None or plan_signal(signal, world, as_of, full_refresh=False).node:
        return as_of, "as of"
    return min((as_of, "as of"), (to_datetime(utc(before.watermark, "watermark") + fill - TICK), "signal"))
