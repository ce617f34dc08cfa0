"""One node, here and now: what `node.run()` does. The same registration, plan and protocol as a fleet's run, for a batch of one."""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Engine

from msm_core.configuration import PortfolioConfiguration
from msm_core.data_nodes.base import Batch, NodeResult, update_batch
from msm_core.data_nodes.construction import PortfolioKind
from msm_core.data_nodes.dependencies import dependencies, tracks_values, upstream_of
from msm_core.data_nodes.interpolated_prices import InterpolatedAsset, InterpolatedPrices, resolve_sources
from msm_core.data_nodes.interpolation import PricesKind
from msm_core.data_nodes.planning import NodePlan, new_scopes, plan_portfolio, plan_prices, plan_signal, with_prices
from msm_core.data_nodes.portfolios import PortfoliosDataNode
from msm_core.data_nodes.registration import read_configurations, register_portfolios
from msm_core.data_nodes.signals import SignalKind, SignalWeights
from msm_core.data_nodes.world import read_world
from msm_core.database import exported_snapshot, get_engine, transaction
from msm_core.errors import ConfigurationError, MsmError, NodeFailed, StorageNotPrepared, UnknownAssets
from msm_core.storage import ensure_progress, read_progress, verify_prepared


def run_portfolio(node: PortfoliosDataNode, as_of: datetime | None, update_tree: bool) -> NodeResult:
    """Register the portfolio; if `update_tree` bring what it depends on up to date; then itself. Raises NodeFailed, StorageNotPrepared.

    It depends on its signal, that on prices and on the stored portfolios that it tracks, and so on.
    """
    engine, configuration = get_engine(), node.portfolio_configuration
    as_of = as_of or _now(engine)
    with transaction(engine, read_only=True) as connection:
        verify_prepared(connection)
        source = resolve_sources(connection, [configuration.price_source]).sources[configuration.price_source.key]
        if isinstance(source, StorageNotPrepared):
            raise source
    upstream = _upstream(engine, configuration) if update_tree else []
    with engine.begin() as connection:
        register_portfolios(connection, [configuration])
    for other in upstream:
        _run_alone(engine, other, as_of, update_tree)
    return _run_alone(engine, configuration, as_of, update_tree)


def _upstream(engine: Engine, configuration: PortfolioConfiguration) -> list[PortfolioConfiguration]:
    """Stored portfolios that it waits for, in order. Raises CyclicPlan where it, or one of them, waits for itself."""
    if not tracks_values(configuration.signal):
        return []  # the stored fleet may be large
    with transaction(engine, read_only=True) as connection:
        stored = [c for c in read_configurations(connection).configurations if c.identifier != configuration.identifier]
    fleet = dependencies([*stored, configuration])
    upstream = upstream_of([configuration], fleet)
    if cycle := next((fleet.cyclic[c.identifier] for c in (configuration, *upstream) if c.identifier in fleet.cyclic), None):
        raise cycle
    return upstream


def _run_alone(engine: Engine, configuration: PortfolioConfiguration, as_of: datetime, update_tree: bool) -> NodeResult:
    with exported_snapshot(engine) as snapshot:
        with transaction(engine, read_only=True) as connection:
            world = read_world(connection, [configuration], as_of)
        prices = plan_prices(world, as_of, full_refresh=False) if update_tree else []
        for result in _update_prices(engine, prices, as_of, snapshot):
            if result.identifier.partition("/")[2] in world.needed[configuration.identifier]:
                _settled(result)
        world = with_prices(world, prices)
        signal = plan_signal(configuration.signal, world, as_of, full_refresh=False)
        if update_tree and signal.error:
            _settled(NodeResult("signal", signal.identifier, "failed", error=signal.error))
        if update_tree and signal.node is not None:
            _settled(update_batch(engine, Batch(SignalKind(), (signal.node,), as_of, snapshot=snapshot))[0])
        plan = plan_portfolio(configuration, world, as_of, full_refresh=False, signal=signal)
        if plan.error:
            _settled(NodeResult("portfolio", plan.identifier, "failed", error=plan.error))
        if plan.node is None:
            return NodeResult("portfolio", plan.identifier, "up_to_date", watermark=plan.start)
        return _settled(update_batch(engine, Batch(PortfolioKind(), (plan.node,), as_of, snapshot=snapshot))[0])


def run_prices(price_source: InterpolatedPrices, as_of: datetime | None) -> list[NodeResult]:
    """Bring the assets of its list up to date; see `InterpolatedPrices.run`."""
    engine = get_engine()
    as_of = as_of or _now(engine)
    if price_source.asset_list is None:
        raise ConfigurationError(problems="interpolated prices run by themselves need an asset_list: it says for which assets")
    with engine.connect() as connection:
        verify_prepared(connection)
    with exported_snapshot(engine) as snapshot:
        with transaction(engine, read_only=True) as connection:
            world = read_world(connection, [], as_of, [price_source])
        if isinstance(error := world.resolved.sources[price_source.key], MsmError):
            raise error
        if unknown := [a for a in price_source.asset_list if a not in world.assets]:
            raise UnknownAssets(owner="interpolated prices", assets=", ".join(unknown))
        results = _update_prices(engine, plan_prices(world, as_of, full_refresh=False), as_of, snapshot)
    return [_settled(result) for result in results]


def _update_prices(engine: Engine, plans: Sequence[NodePlan[InterpolatedAsset]], as_of: datetime, snapshot: str) -> list[NodeResult]:
    """One result per asset of the plan."""
    with engine.begin() as connection:
        ensure_progress(connection, new_scopes(plans))
    nodes = tuple(p.node for p in plans if p.node)
    done = [NodeResult("prices", p.identifier, "up_to_date", watermark=p.end) for p in plans if p.node is None]
    return done + (update_batch(engine, Batch(PricesKind(), nodes, as_of, snapshot=snapshot)) if nodes else [])


def run_signal(node: SignalWeights, as_of: datetime | None) -> NodeResult:
    """Bring one signal up to date. Raises NodeFailed, StorageNotPrepared."""
    engine, scope = get_engine(), node.scopes[0]
    with engine.begin() as connection:
        verify_prepared(connection)
        ensure_progress(connection, [scope])
        progress = read_progress(connection, [scope.uid])[scope.uid]
    node = node.model_copy(update={"watermark": progress.watermark})  # what lies before it, but for a window, is not read again
    return _settled(update_batch(engine, Batch(SignalKind(), (node,), as_of or _now(engine)))[0])


def _settled(result: NodeResult) -> NodeResult:
    if result.error:
        raise NodeFailed(type=result.error["reason"], text=result.error["message"])
    return result


def _now(engine: Engine) -> datetime:
    """The database's clock, read once per run: the same for every caller, whatever their machines say."""
    with engine.connect() as connection:
        return connection.exec_driver_sql("SELECT now()").scalar_one()
