"""What each node needs: its window, the reason, and the error that stops it before anything is tried.

Decided from the world that the driver has read (world.py), without any clock. A node that is already there gets no work; only its own
progress and the coverage of its own assets decide that, never a table-wide maximum.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Generic, Literal, TypeVar

from msm_core.configuration import PortfolioConfiguration
from msm_core.construction import required_assets
from msm_core.data_nodes.base import failure_facts
from msm_core.data_nodes.interpolated_prices import InterpolatedAsset
from msm_core.data_nodes.portfolios import PortfoliosDataNode, portfolio_code_version, portfolio_scopes
from msm_core.data_nodes.signals import SignalWeights, asset_names
from msm_core.data_nodes.world import Bounds, World, source_error, with_coverage
from msm_core.errors import DependencyFailed, MissingPrices, MissingRate, UnknownAssets
from msm_core.frames import TICK, to_datetime, utc
from msm_core.interpolation import CODE_VERSION as PRICES_CODE_VERSION
from msm_core.models import PortfolioRebalanceStateStorage, SignalWeightsStorage
from msm_core.price_sources import PriceSource, SourceKey
from msm_core.signals import Signal
from msm_core.signals.computed import ComputedSignal
from msm_core.sources import Source
from msm_core.storage import Progress, Scope

Reason = Literal[
    "new", "configuration changed", "code changed", "full refresh", "inputs advanced", "previous failure", "up to date", "invalid"
]
NodeT = TypeVar("NodeT", InterpolatedAsset, SignalWeights, PortfoliosDataNode)
SESSION_LENGTH_MAX = timedelta(days=2)  # from the stamp of a bar to the close of its session, in any time zone
Limit = tuple[datetime, str]  # an end of a window, and what sets it: an asset, "signal", "cash rate" or "as of"


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
        calendar_uid=world.assets[asset].calendar_uid,
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
    return with_coverage(world, coming)


def plan_signal(signal: Signal, world: World, as_of: datetime, full_refresh: bool) -> NodePlan[SignalWeights]:
    """A signal whose computation, or a later vector, is due; what cannot work (unknown assets, no prices, bad source) is told here."""
    try:
        return _plan_signal(signal, world, as_of, full_refresh)
    except Exception as error:
        return NodePlan(signal.uid, "invalid", None, error=failure_facts(error))


def _plan_signal(signal: Signal, world: World, as_of: datetime, full_refresh: bool) -> NodePlan[SignalWeights]:
    identifier = signal.uid
    before = world.progress.get(Scope(SignalWeightsStorage, identifier).uid)
    watermark = before.watermark if before else None
    if unknown := sorted(asset_names(signal) - world.assets.keys()) if signal.requests else []:
        raise UnknownAssets(owner=f"signal {signal.kind}", assets=", ".join(unknown))
    end, limit = as_of, "as of"
    if isinstance(signal, ComputedSignal):
        end, limit = _computed_end(signal, world, watermark, as_of)
    if watermark is None:
        reason: Reason = "new"
    elif full_refresh:
        reason = "full refresh"
    elif before and before.code_version != signal.code_version:
        reason = "code changed"
    elif end > watermark and (isinstance(signal, ComputedSignal) or _may_emit(signal, world, watermark, as_of)):
        reason = "inputs advanced"
    else:
        return NodePlan(identifier, "up to date", None, watermark, watermark, limit)
    node = SignalWeights(
        signal_weights_instance=signal,
        watermark=watermark,
        replace=reason in ("full refresh", "code changed"),
        expected_epoch=before.epoch if before else None,
        signal_uid=identifier,
    )
    return NodePlan(identifier, reason, node, node.since, end, limit)


def _may_emit(signal: Signal, world: World, watermark: datetime, as_of: datetime) -> bool:
    """Whether a later vector is due. A signal that raises is given work: it fails there, alone, with what depends on it."""
    if location := signal.weights_location:
        if location.source is None:
            return True  # what is in a file is known once it is read
        covered = world.coverage.get((location.source.key, location.column), {})
        return any(last > watermark for _, last in covered.values())
    try:
        return len(signal.emit(utc(watermark, "watermark"), utc(as_of, "as_of")).times) > 0
    except Exception:
        return True


def _computed_end(signal: ComputedSignal, world: World, watermark: datetime | None, as_of: datetime) -> Limit:
    """Where the universe of a computed signal is covered. Raises SourceNotRegistered, SourceUnusable, MissingPrices."""
    ends: list[Limit] = [(as_of, "as of")]
    for request in signal.requests:
        source = _usable(world, request.source, request.column)
        if signal.stale_after_sessions is not None:
            continue  # whoever is silent may be left out; sessions are counted when it is computed
        covered = world.coverage[request.source.key, request.column]
        listed = _not_gone(world, request.identifiers, as_of)
        absent = [a for a in listed if a not in covered]
        if absent and watermark is None:
            raise MissingPrices(
                portfolio=f"signal {signal.kind}", source=source.identifier, column=request.column, assets=", ".join(absent)
            )
        if absent:
            return watermark or as_of, absent[0]
        ends.append(_first_end(source, covered, listed, as_of))
    return min(ends)


def _not_gone(world: World, assets: Iterable[str], as_of: datetime) -> list[str]:
    """Without those that may be delisted by then, in some time zone; whether they are, their calendar tells when they are computed."""
    last, today = world.delisted, as_of.date()
    return [asset for asset in assets if asset not in last or last[asset] > today]


def _first_end(source: Source, covered: Bounds, assets: Iterable[str], as_of: datetime) -> Limit:
    """Where the bars of the first of `assets` end; `as_of` without any."""
    last, asset = min(((covered[asset][1], asset) for asset in assets), default=(None, ""))
    return (as_of, "as of") if last is None else (last + source.margin, asset)


def plan_portfolio(
    configuration: PortfolioConfiguration,
    world: World,
    as_of: datetime,
    full_refresh: bool,
    signal: NodePlan[SignalWeights] | None = None,
) -> NodePlan[PortfoliosDataNode]:
    """Reason, window and work of one portfolio; what cannot work (unknown assets, no prices, bad source) is told here, by name."""
    try:
        signal = signal or plan_signal(configuration.signal, world, as_of, full_refresh)
        return _plan_portfolio(configuration, world, as_of, full_refresh, signal)
    except Exception as error:  # one portfolio's trouble, foreseen or not, must not stop the fleet's plan
        return NodePlan(configuration.identifier, "invalid", None, error=failure_facts(error))


def _plan_portfolio(
    configuration: PortfolioConfiguration, world: World, as_of: datetime, full_refresh: bool, signal: NodePlan[SignalWeights]
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
    source = _usable(world, configuration.price_source, configuration.price_column, configuration.rebalance.liquidity_column)
    if signal.error:
        raise DependencyFailed(upstream=f"signal {signal.identifier} ({signal.error['message']})")
    ends = [_priced_end(configuration, world, source, required, start, as_of), _signal_end(configuration, signal, as_of)]
    end, limit = min(*ends, _rate_end(configuration, world, as_of))
    window = NodePlan[PortfoliosDataNode](identifier, reason, None, start, end, limit)
    if start is not None and end <= start:
        return replace(window, reason="up to date")
    node = PortfoliosDataNode(
        portfolio_configuration=configuration,
        held=held,
        watermark=watermark,
        replace=rebuilt,
        expected_epoch=before.epoch if before else None,
        had_orders=rebuilt and Scope(PortfolioRebalanceStateStorage, identifier).uid in world.progress,
        identities=(configuration.configuration_hash, configuration.signal_uid),
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
    if before.code_version != portfolio_code_version(configuration):
        return "code changed"
    return "inputs advanced"


def _usable(world: World, price_source: PriceSource, column: str, liquidity_column: str | None = None) -> Source:
    """The source, as the catalogue knows it. Raises SourceNotRegistered, SourceUnusable and what else keeps it from being read."""
    source = world.resolved.sources[price_source.key]
    if error := source_error(source, column, liquidity_column):
        raise error
    assert isinstance(source, Source)  # else it is the error
    return source


def _priced_end(
    configuration: PortfolioConfiguration,
    world: World,
    source: Source,
    required: Sequence[str],
    start: datetime | None,
    as_of: datetime,
) -> Limit:
    """The first end of the required assets' prices. Raises MissingPrices for a fresh portfolio with an asset that has none."""
    covered = world.coverage[configuration.price_source.key, configuration.price_column]
    signal = configuration.signal
    if isinstance(signal, ComputedSignal) and signal.stale_after_sessions is not None:
        return as_of, "as of"  # whoever is silent may be let go; sessions are counted when it is computed
    required = _not_gone(world, required, as_of)
    absent = [a for a in required if a not in covered]
    if absent and start is None:
        facts = {"source": source.identifier, "column": configuration.price_column, "assets": ", ".join(absent)}
        raise MissingPrices(portfolio=configuration.identifier, **facts)
    if absent:
        return start or as_of, absent[0]
    return _first_end(source, covered, required, as_of)


def _signal_end(configuration: PortfolioConfiguration, plan: NodePlan[SignalWeights], as_of: datetime) -> Limit:
    """How far the signal reaches: where its newest vector expires, when no newer one is due; and of a computed one, what is computed.

    On another calendar than the portfolio's, a computed signal may reach further than its last session; that is told when it runs.
    """
    signal, end = configuration.signal, plan.end
    if isinstance(signal, ComputedSignal) and end is not None:
        grid = (configuration.rebalance.calendar_key, configuration.frequency)
        if (signal.calendar_key, signal.frequency) == grid:
            return min((as_of, "as of"), (end, "signal"))
    fill = signal.maximum_forward_fill
    if fill is None or end is None or plan.node is not None:
        return as_of, "as of"
    return min((as_of, "as of"), (to_datetime(utc(end, "watermark") + fill - TICK), "signal"))


def _rate_end(configuration: PortfolioConfiguration, world: World, as_of: datetime) -> Limit:
    """How far the cash rate is known. Raises what is wrong with its source."""
    rate = configuration.execution.cash_rate
    if rate is None:
        return as_of, "as of"
    source = _usable(world, rate.source, rate.column)
    covered = world.coverage[rate.source.key, rate.column].get(rate.identifier)
    if covered is None:
        raise MissingRate(rate=rate.identifier, source=source.identifier, time="any time")
    return min((as_of, "as of"), (covered[1] + rate.forward_fill + SESSION_LENGTH_MAX, "cash rate"))
