"""What each node needs: its window, the reason, and the error that stops it before anything is tried.

Read set-based by the driver, decided without any clock. A node that is already there gets no work; only its own progress and the
coverage of its own assets decide that, never a table-wide maximum.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Generic, Literal, TypeVar
from uuid import UUID

from sqlalchemy import Connection

from msm_core.configuration import PortfolioConfiguration, PriceSource, SourceKey
from msm_core.construction import required_assets
from msm_core.data_nodes.base import failure_facts
from msm_core.data_nodes.interpolated_prices import InterpolatedAsset, Resolved, resolve_sources
from msm_core.data_nodes.portfolios import PortfoliosDataNode, portfolio_scopes
from msm_core.data_nodes.signals import SignalWeights
from msm_core.errors import MissingPrices, MsmError, SourceUnusable, UnknownAssets
from msm_core.frames import TICK, to_datetime, utc
from msm_core.interpolation import CODE_VERSION as PRICES_CODE_VERSION
from msm_core.models import SignalWeightsStorage
from msm_core.signals import CODE_VERSION as SIGNAL_CODE_VERSION
from msm_core.signals import Signal
from msm_core.sources import Source, grain_problems, price_coverage, read_asset_calendars
from msm_core.storage import Progress, ProgressRows, Scope, last_trades, read_progress
from msm_core.valuation import CODE_VERSION as PORTFOLIO_CODE_VERSION

Reason = Literal[
    "new", "configuration changed", "code changed", "full refresh", "inputs advanced", "previous failure", "up to date", "invalid"
]
NodeT = TypeVar("NodeT", InterpolatedAsset, SignalWeights, PortfoliosDataNode)
SESSION_LENGTH_MAX = timedelta(days=2)  # from the stamp of a bar to the close of its session, in any time zone
Bounds = Mapping[str, tuple[datetime, datetime]]  # first and last bar per asset


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
    """What the plan of a fleet is decided from, all of it read in a fixed number of statements.

    needed     assets of each portfolio: its universe, what it holds, its override asset
    assets     those of them that are registered, and the calendar of each; None = it trades around the clock
    coverage   of the prices that are read, by (source, column); where they are interpolated, of what is stored
    wanted     assets that are to be interpolated, by key
    originals  coverage of the bars that they are made from
    """

    progress: ProgressRows
    held: Mapping[str, tuple[str, ...]]
    needed: Mapping[str, set[str]]
    resolved: Resolved
    assets: Mapping[str, UUID | None]
    coverage: Mapping[tuple[SourceKey, str], Bounds]
    wanted: Mapping[SourceKey, set[str]]
    originals: Mapping[SourceKey, Bounds]


def read_world(
    connection: Connection, configurations: Sequence[PortfolioConfiguration], as_of: datetime, price_sources: Iterable[PriceSource] = ()
) -> World:
    """Statements: five, one more per (price source, column), and where prices are interpolated one per storage and one more.

    price_sources  that are of interest beside those of the portfolios
    """
    price_sources = list(price_sources)
    held = {i: trade.held() for i, trade in last_trades(connection, [c.identifier for c in configurations]).items()}
    needed = {c.identifier: {*c.signal.universe, *held.get(c.identifier, ()), *c.signal.override} for c in configurations}
    resolved = resolve_sources(connection, [*price_sources, *(c.price_source for c in configurations)])
    interpolated: dict[SourceKey, set[str]] = {key: set() for key in resolved.storages if isinstance(resolved.sources[key], Source)}
    for price_source, assets in [*((p, ()) for p in price_sources), *((c.price_source, needed[c.identifier]) for c in configurations)]:
        if price_source.key in interpolated:
            interpolated[price_source.key].update(assets if price_source.asset_list is None else price_source.asset_list)
    wanted: dict[tuple[SourceKey, str], set[str]] = {}
    for c in configurations:
        if _source_error(c, resolved) is None:
            wanted.setdefault((c.price_source.key, c.price_column), set()).update(needed[c.identifier])
    scopes = [s for c in configurations for s in (*portfolio_scopes(c), Scope(SignalWeightsStorage, c.signal_uid))]
    scopes += [Scope(resolved.storages[key], asset) for key, assets in interpolated.items() for asset in assets]
    progress = read_progress(connection, {s.uid for s in scopes})
    known = read_asset_calendars(connection, sorted({a for names in (*needed.values(), *interpolated.values()) for a in names}))
    coverage: dict[tuple[SourceKey, str], Bounds] = {}
    for (key, column), names in wanted.items():
        source = resolved.sources[key]
        assert isinstance(source, Source)  # else it would have an error
        coverage[key, column] = price_coverage(connection, source, column, sorted(names), as_of)
    originals = {
        key: price_coverage(connection, resolved.origins[key], "close", sorted(names), as_of) for key, names in interpolated.items()
    }
    return World(progress, held, needed, resolved, known, coverage, interpolated, originals)


def plan_prices(world: World, as_of: datetime, full_refresh: bool) -> list[NodePlan[InterpolatedAsset]]:
    """Every asset that is to be interpolated and has, or had, bars; one that is not registered fails with the portfolios that need it."""
    plans = [
        _plan_asset(world, key, asset, world.originals[key].get(asset), as_of, full_refresh)
        for key, assets in world.wanted.items()
        for asset in sorted(assets & world.assets.keys())
    ]
    return [plan for plan in plans if plan is not None]


def _plan_asset(
    world: World, key: SourceKey, asset: str, bars: tuple[datetime, datetime] | None, as_of: datetime, full_refresh: bool
) -> NodePlan[InterpolatedAsset] | None:
    storage = world.resolved.storages[key]
    before = world.progress.get(Scope(storage, asset).uid)
    watermark = before.watermark if before else None
    if bars is None and not (full_refresh and watermark):
        return None
    node = InterpolatedAsset(
        **storage.__metatable_extra_hash_components__,  # type: ignore[arg-type] - text that pydantic reads
        asset_identifier=asset,
        calendar_uid=world.assets[asset],
        watermark=watermark,
        expected_epoch=before.epoch if before else 0,
    )
    if before is None or watermark is None:
        reason: Reason = "new"
    elif full_refresh:
        reason = "full refresh"
    elif before.configuration_hash != node.configuration_hash:
        reason = "configuration changed"  # the asset has another calendar now
    elif before.code_version != PRICES_CODE_VERSION:
        reason = "code changed"
    elif bars and bars[1] + world.resolved.origins[key].margin > watermark:
        reason = "inputs advanced"
    else:
        return NodePlan(node.identifier, "up to date", None, watermark, watermark)
    if rebuilt := full_refresh or reason not in ("new", "inputs advanced"):
        node = node.model_copy(update={"replace": True})
    return NodePlan(node.identifier, reason, node, None if rebuilt else watermark, as_of)


def new_scopes(plans: Iterable[NodePlan[InterpolatedAsset]]) -> list[Scope]:
    """Progress rows that must be made before `plans` can run: assets that are interpolated for the first time."""
    return [scope for plan in plans if plan.node and plan.reason == "new" for scope in plan.node.scopes]


def with_prices(world: World, plans: Sequence[NodePlan[InterpolatedAsset]]) -> World:
    """The world once `plans` have run: at most to the end of the session that the newest bar of a source belongs to."""
    coming: dict[SourceKey, dict[str, tuple[datetime, datetime]]] = {}
    for plan in plans:
        bars = world.originals[plan.node.source_key].get(plan.node.asset_identifier) if plan.node else None
        if plan.node and bars:
            first, last = bars
            coming.setdefault(plan.node.source_key, {})[plan.node.asset_identifier] = (first, last + SESSION_LENGTH_MAX)
    coverage = {(key, column): {**stored, **coming.get(key, {})} for (key, column), stored in world.coverage.items()}
    return replace(world, coverage=coverage)


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
        signal_weights_instance=signal, replace=full_refresh or reason == "code changed", expected_epoch=before.epoch if before else None
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
    rebuilt = full_refresh or reason in ("configuration changed", "code changed") or (reason == "new" and held_before)
    watermark = before.watermark if before else None
    start = None if rebuilt else watermark
    held = () if start is None else world.held.get(identifier, ())
    required = required_assets(configuration, held)
    unknown = [a for a in required if a not in world.assets]
    if unknown:
        raise UnknownAssets(owner=identifier, assets=", ".join(unknown))
    if error := _source_error(configuration, world.resolved):
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


def _source_error(configuration: PortfolioConfiguration, resolved: Resolved) -> MsmError | None:
    source, column = resolved.sources[configuration.price_source.key], configuration.price_column
    if isinstance(source, MsmError):
        return source
    wrong = grain_problems(source.columns, source.readable)
    if column not in source.numeric:
        wrong.append(f"it has no numeric column {column!r}, only {', '.join(source.numeric)}; set price_column")
    if configuration.rebalance.needs_volume and "volume" not in source.numeric:
        wrong.append(f"{configuration.rebalance.kind} needs a volume column")
    return SourceUnusable(source=source.identifier, why=wrong[0]) if wrong else None


Limit = tuple[datetime, str]  # an end of the window, and what sets it: an asset, "signal" or "as of"


def _priced_end(
    configuration: PortfolioConfiguration, world: World, required: Sequence[str], start: datetime | None, as_of: datetime
) -> Limit:
    """The first end of the required assets' prices. Raises MissingPrices for a fresh portfolio with an asset that has none."""
    source = world.resolved.sources[configuration.price_source.key]
    assert isinstance(source, Source)
    covered = world.coverage[configuration.price_source.key, configuration.price_column]
    absent = [a for a in required if a not in covered]
    if absent and start is None:
        facts = {"source": source.identifier, "column": configuration.price_column, "assets": ", ".join(absent)}
        raise MissingPrices(portfolio=configuration.identifier, **facts)
    if absent:
        return start or as_of, absent[0]
    return min((covered[a][1] + source.margin, a) for a in required)


def _signal_end(configuration: PortfolioConfiguration, world: World, as_of: datetime) -> Limit:
    """The last instant at which the signal's newest vector is valid, when no newer one is due; else `as_of`."""
    signal, fill = configuration.signal, configuration.signal.maximum_forward_fill
    before = world.progress.get(Scope(SignalWeightsStorage, configuration.signal_uid).uid)
    if fill is None or before is None or before.watermark is None or plan_signal(signal, world, as_of, full_refresh=False).node:
        return as_of, "as of"
    return min((as_of, "as of"), (to_datetime(utc(before.watermark, "watermark") + fill - TICK), "signal"))
