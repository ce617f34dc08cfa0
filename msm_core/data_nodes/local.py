"""One node, here and now: what `node.run()` does. The same registration, plan and protocol as a fleet's run, for a batch of one."""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Engine

from msm_core.data_nodes.base import Batch, NodeResult, update_batch
from msm_core.data_nodes.planning import plan_portfolio, plan_signal, read_world
from msm_core.data_nodes.portfolios import PortfolioKind, PortfoliosDataNode
from msm_core.data_nodes.registration import register_portfolios
from msm_core.data_nodes.signals import SignalKind, SignalWeights
from msm_core.database import exported_snapshot, get_engine, transaction
from msm_core.errors import NodeFailed
from msm_core.models import SignalWeightsStorage
from msm_core.storage import Scope, ensure_progress, verify_prepared


def run_portfolio(node: PortfoliosDataNode, as_of: datetime | None, update_tree: bool) -> NodeResult:
    """Register the portfolio, bring its signal up to date if `update_tree`, then itself. Raises NodeFailed, StorageNotPrepared."""
    engine, configuration = get_engine(), node.portfolio_configuration
    as_of = as_of or _now(engine)
    with engine.begin() as connection:
        verify_prepared(connection)
        register_portfolios(connection, [configuration])
    with exported_snapshot(engine) as snapshot:
        with transaction(engine, read_only=True) as connection:
            world = read_world(connection, [configuration], as_of)
        signal = plan_signal(configuration.signal, world, as_of, full_refresh=False).node
        if update_tree and signal is not None:
            _settled(update_batch(engine, Batch(SignalKind(), (signal,), as_of, snapshot=snapshot)))
        plan = plan_portfolio(configuration, world, as_of, full_refresh=False)
        if plan.error:
            _settled([NodeResult("portfolio", plan.identifier, "failed", error=plan.error)])
        if plan.node is None:
            return NodeResult("portfolio", plan.identifier, "up_to_date", watermark=plan.start)
        return _settled(update_batch(engine, Batch(PortfolioKind(), (plan.node,), as_of, snapshot=snapshot)))


def run_signal(node: SignalWeights, as_of: datetime | None) -> NodeResult:
    """Bring one signal up to date. Raises NodeFailed, StorageNotPrepared."""
    engine = get_engine()
    with engine.begin() as connection:
        verify_prepared(connection)
        ensure_progress(connection, [Scope(SignalWeightsStorage, node.identifier)])
    return _settled(update_batch(engine, Batch(SignalKind(), (node,), as_of or _now(engine))))


def _settled(results: Sequence[NodeResult]) -> NodeResult:
    result = results[0]
    if result.error:
        raise NodeFailed(type=result.error["reason"], text=result.error["message"])
    return result


def _now(engine: Engine) -> datetime:
    """The database's clock, read once per run: the same for every caller, whatever their machines say."""
    with engine.connect() as connection:
        return connection.exec_driver_sql("SELECT now()").scalar_one()
