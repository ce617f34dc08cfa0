"""How portfolios are brought up to date: those of a batch are read together, executed together, and land together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import filterfalse

import numpy as np
from psycopg import sql
from sqlalchemy import Connection

from msm_core.alignment import Market
from msm_core.cash import CashAccount, cash_account
from msm_core.configuration import CashRate, PortfolioConfiguration
from msm_core.construction import (
    Construction,
    OpenOrder,
    State,
    Window,
    executed,
    finished,
    prepared,
    window_end,
)
from msm_core.copying import Block, Text, execute
from msm_core.data_nodes.calendars import resolve_calendars
from msm_core.data_nodes.interpolated_prices import resolve_sources
from msm_core.data_nodes.markets import Calendars, MarketKey, Markets, Need, Sources, read_markets
from msm_core.data_nodes.portfolios import PortfoliosDataNode, portfolio_code_version
from msm_core.errors import MissingRate, MsmError, StateLost, UnknownAssets
from msm_core.frames import BEGINNING, NEVER, TICK, Floats, LastTrade, Times, to_datetime, utc
from msm_core.models import (
    PortfolioIndexValuesStorage,
    PortfolioRebalanceStateStorage,
    PortfoliosStorage,
    PortfolioTable,
    PortfolioWeightsStorage,
    SignalWeightsStorage,
)
from msm_core.sessions import Sessions
from msm_core.signals import Vectors
from msm_core.signals.computed import ComputedSignal
from msm_core.sources import AssetFacts, Source, delistings, read_assets, read_prices
from msm_core.storage import (
    Advance,
    ProgressRows,
    Scope,
    last_trades,
    read_orders,
    read_progress,
    read_signal_weights,
    read_values,
)

CashKey = tuple[CashRate, str, timedelta]
CashAccounts = Mapping[CashKey, CashAccount | MsmError]


@dataclass(frozen=True)
class Outside:
    """Inputs that belong to others. `markets` and `cash` are those of their prices; ours are not read yet."""

    sources: Sources
    calendars: Calendars
    markets: Markets
    cash: CashAccounts
    assets: Mapping[str, AssetFacts]
    as_of: datetime


@dataclass(frozen=True)
class Inside:
    """Inputs that this system wrote, read in the claiming transaction; `markets` are all of the batch."""

    markets: Markets
    vectors: Mapping[str, Vectors]
    signal_progress: Mapping[str, datetime | None]
    states: Mapping[str, State]


Results = Mapping[str, Construction | Exception | None]  # what became of each node of a batch; None = nothing new


@dataclass(frozen=True)
class PortfolioKind:
    """How a batch of portfolios is brought up to date."""

    name: str = "portfolio"

    def read_outside(self, connection: Connection, nodes: Sequence[PortfoliosDataNode], as_of: datetime, world: str | None) -> Outside:
        assets = read_assets(connection, set().union(*(node.assets for node in nodes)))
        configurations = [node.portfolio_configuration for node in nodes]
        rates = [c.execution.cash_rate.source for c in configurations if c.execution.cash_rate]
        sources = resolve_sources(connection, [*(c.price_source for c in configurations), *rates]).sources
        keys = {c.rebalance.calendar_key for c in configurations}
        keys |= {c.signal.calendar_key for c in configurations if isinstance(c.signal, ComputedSignal)}
        calendars = resolve_calendars(connection, keys, as_of)
        markets = read_markets(connection, map(_need, nodes), sources, calendars, delistings(assets), as_of, inside=False, world=world)
        return Outside(sources, calendars, markets, _cash_accounts(connection, configurations, sources, calendars, as_of), assets, as_of)

    def read_inside(self, connection: Connection, nodes: Sequence[PortfoliosDataNode], progress: ProgressRows, outside: Outside) -> Results:
        """What the whole batch becomes: read set-based, then executed in one loop per way of trading."""
        world = (outside.sources, outside.calendars, delistings(outside.assets), outside.as_of)
        markets = {**outside.markets, **read_markets(connection, map(_need, nodes), *world, inside=True)}
        signals = sorted({node.portfolio_configuration.signal_uid for node in nodes})
        since = min((_vectors_since(node, markets) for node in nodes), default=BEGINNING)
        rows = read_signal_weights(connection, signals, since, _latest(markets))
        scopes = {uid: Scope(SignalWeightsStorage, uid) for uid in signals}
        moved = read_progress(connection, [scope.uid for scope in scopes.values()])
        inside = Inside(
            markets=markets,
            vectors={uid: Vectors.from_rows(r) for uid, r in rows.items()},
            signal_progress={uid: moved[s.uid].watermark if s.uid in moved else None for uid, s in scopes.items()},
            states=_read_states(connection, nodes),
        )
        return _construct(nodes, outside, inside)

    def update(self, node: PortfoliosDataNode, progress: ProgressRows, outside: Outside, inside: Results, as_of: datetime) -> list[Advance]:
        construction = inside[node.identifier]
        if isinstance(construction, Exception):
            raise construction
        return _advances(node, progress, construction) if construction else []

    def finish(self, connection: Connection, nodes: Sequence[PortfoliosDataNode]) -> None:
        """The Portfolio rows get their producer pointers last."""
        statement = sql.SQL("""
            UPDATE {table} p SET portfolio_data_node_uid = x.v, portfolio_weights_data_node_uid = x.w, signal_weights_data_node_uid = x.s
            FROM unnest(%(ids)s::text[], %(values)s::uuid[], %(weights)s::uuid[], %(signals)s::uuid[]) x(id, v, w, s)
            WHERE p.unique_identifier = x.id
              AND (p.portfolio_data_node_uid, p.portfolio_weights_data_node_uid, p.signal_weights_data_node_uid)
                  IS DISTINCT FROM (x.v, x.w, x.s)
        """).format(table=sql.Identifier(PortfolioTable.__tablename__))
        pointers = {
            "ids": [node.identifier for node in nodes],
            "values": [node.scopes[0].uid for node in nodes],
            "weights": [node.scopes[1].uid for node in nodes],
            "signals": [Scope(SignalWeightsStorage, node.portfolio_configuration.signal_uid).uid for node in nodes],
        }
        execute(connection, statement, pointers)


# -- computing ----------------------------------------------------------------------------------------------------------------


def _construct(nodes: Sequence[PortfoliosDataNode], outside: Outside, inside: Inside) -> Results:
    """A node's failure is its own, wherever it happens."""
    results: dict[str, Construction | Exception | None] = {}
    windows: dict[str, Window] = {}
    for node in nodes:
        try:
            if window := _window(node, outside, inside):
                windows[node.identifier] = window
            else:
                results[node.identifier] = None
        except Exception as error:
            results[node.identifier] = error
    for identifier, trades in zip(windows, executed(list(windows.values())), strict=True):
        try:
            results[identifier] = trades if isinstance(trades, Exception) else finished(windows[identifier], trades)
        except Exception as error:
            results[identifier] = error
    return results


def _window(node: PortfoliosDataNode, outside: Outside, inside: Inside) -> Window | None:
    configuration = node.portfolio_configuration
    unknown = [*filterfalse(outside.assets.__contains__, node.assets)]
    if unknown:
        raise UnknownAssets(owner=node.identifier, assets=", ".join(unknown))
    market = inside.markets[MarketKey.of(configuration)]
    if isinstance(market, MsmError):
        raise market
    vectors = inside.vectors.get(configuration.signal_uid)
    if vectors is None:
        return None  # the signal has not emitted anything yet
    state = inside.states.get(node.identifier)
    if node.since is not None and state is None:
        raise StateLost(portfolio=node.identifier, watermark=node.since.isoformat())
    cash = outside.cash[_cash_key(configuration)] if configuration.execution.cash_rate else None
    if isinstance(cash, MsmError):
        raise cash
    end = window_end(configuration, market, state, utc(outside.as_of, "as_of"), _signal_end(configuration, outside, inside))
    if cash is not None:
        end = min(end, cash.times[-1]) if len(cash.times) else (state.watermark if state else end)
    if state is not None and end <= state.watermark:
        return None
    return prepared(configuration, market, vectors, state, end, cash)


def _signal_end(configuration: PortfolioConfiguration, outside: Outside, inside: Inside) -> np.datetime64 | None:
    """Last instant at which it is settled which of the signal's vectors is valid; None = it always is.

    A vector expires `maximum_forward_fill` after the signal's progress; and after what is computed a newer one may come.
    """
    signal, through = configuration.signal, inside.signal_progress[configuration.signal_uid]
    if through is None:
        return None
    progress, ends = utc(through, "signal progress"), list[np.datetime64]()
    if signal.maximum_forward_fill is not None:
        ends.append(progress + signal.maximum_forward_fill - TICK)
    if isinstance(signal, ComputedSignal):
        sessions = outside.calendars[signal.calendar_key]
        if isinstance(sessions, MsmError):
            raise sessions
        times = sessions.valuation_times(signal.frequency)
        coming = int(np.searchsorted(times, progress, "right"))
        ends += [times[coming] - TICK] if coming < len(times) else []
    return min(ends, default=None)


# -- reading ------------------------------------------------------------------------------------------------------------------


def _need(node: PortfoliosDataNode) -> Need:
    configuration = node.portfolio_configuration
    since = node.since or _start_of(configuration)
    return Need(MarketKey.of(configuration), node.assets, since, configuration.rebalance.history_sessions)


def _start_of(configuration: PortfolioConfiguration) -> datetime | None:
    """An instant safely before the configured start_date, in any time zone."""
    if configuration.start_date is None:
        return None
    return datetime.combine(configuration.start_date, datetime.min.time(), BEGINNING.tzinfo) - timedelta(days=1)


def _cash_key(configuration: PortfolioConfiguration) -> CashKey:
    assert configuration.execution.cash_rate is not None
    return configuration.execution.cash_rate, configuration.rebalance.calendar_key, configuration.frequency


def _cash_accounts(
    connection: Connection, configurations: Sequence[PortfolioConfiguration], sources: Sources, calendars: Calendars, as_of: datetime
) -> dict[CashKey, CashAccount | MsmError]:
    """The whole history of each rate that is used: the level of an account is a recursion from its beginning."""
    keys = {_cash_key(c) for c in configurations if c.execution.cash_rate}
    return {key: _cash_account(connection, *key, sources, calendars, as_of) for key in keys}


def _cash_account(
    connection: Connection, rate: CashRate, calendar_key: str, frequency: timedelta, sources: Sources, calendars: Calendars, as_of: datetime
) -> CashAccount | MsmError:
    source, sessions = sources[rate.source.key], calendars[calendar_key]
    for input_ in (source, sessions):
        if isinstance(input_, MsmError):
            return input_
    assert isinstance(source, Source)
    assert isinstance(sessions, Sessions)
    try:
        found = read_prices(connection, source, rate.column, [rate.identifier], None, as_of)
    except MsmError as error:
        return error
    if rate.identifier not in found:
        return MissingRate(rate=rate.identifier, source=source.identifier, time="any time")
    times = sessions.valuation_times(frequency)
    known = times[: int(np.searchsorted(times, utc(as_of, "as_of"), "right"))]
    return cash_account(found[rate.identifier], known, rate.forward_fill, rate.day_count, rate.identifier, source.identifier)


def _vectors_since(node: PortfoliosDataNode, markets: Markets) -> datetime:
    """Instant at which the oldest decision that may still matter was taken; the vector valid there is read too.

    A trade just after the watermark was decided `execution_lag` sessions earlier, and `signal_change` looks one session further back.
    """
    market = markets[MarketKey.of(node.portfolio_configuration)]
    if node.since is None or isinstance(market, MsmError):
        return BEGINNING
    closes = market.sessions.closes
    session = int(np.searchsorted(closes, utc(node.since, "watermark"), "right")) - node.portfolio_configuration.rebalance.execution_lag - 2
    return to_datetime(closes[session]) if session >= 0 else BEGINNING


def _latest(markets: Markets) -> datetime:
    """The newest valuation time of the batch; later vectors cannot matter."""
    ends = [m.grid[-1] for m in markets.values() if isinstance(m, Market) and len(m.grid)]
    return to_datetime(max(ends)) if ends else BEGINNING


def _read_states(connection: Connection, nodes: Sequence[PortfoliosDataNode]) -> dict[str, State]:
    """Stored state per portfolio with a watermark; one whose rows do not support its watermark is absent."""
    old = {node.identifier: utc(node.since, "watermark") for node in nodes if node.since is not None}
    trades: dict[str, LastTrade] = last_trades(connection, list(old))
    values = read_values(connection, [(i, t) for i, trade in trades.items() for t in (old[i], trade.time)])
    carrying = [node.identifier for node in nodes if node.identifier in trades and node.portfolio_configuration.rebalance.carries]
    orders = read_orders(connection, carrying) if carrying else {}
    return {
        i: State(old[i], *values[i, old[i]], trade_value=values[i, trade.time][1], last_trade=trade, order=_open_order(orders.get(i)))
        for i, trade in trades.items()
        if (i, old[i]) in values and (i, trade.time) in values
    }


def _open_order(stored: tuple[Times, list[str], Floats, Floats] | None) -> OpenOrder | None:
    if stored is None:
        return None
    active_from, assets, goals, used = stored
    active = active_from[~np.isnat(active_from)]
    return OpenOrder(active[0] if len(active) else NEVER, tuple(assets), goals, used)


# -- writing ------------------------------------------------------------------------------------------------------------------


def _advances(node: PortfoliosDataNode, progress: ProgressRows, construction: Construction) -> list[Advance]:
    blocks = {
        PortfoliosStorage: _values_block(node.identifier, construction),
        PortfolioWeightsStorage: _weights_block(node.identifier, construction),
        PortfolioRebalanceStateStorage: _order_block(node.identifier, construction),
    }
    if node.portfolio_configuration.index_identifier:
        blocks[PortfolioIndexValuesStorage] = _index_block(node.portfolio_configuration.index_identifier, construction)
    advances = []
    for scope in node.scopes:
        block, rows = blocks[scope.storage]
        replaced = node.replace or scope.storage is PortfolioRebalanceStateStorage  # of an order only what is left now is kept
        advances.append(
            Advance(
                scope=scope,
                epoch=progress[scope.uid].epoch,
                watermark=to_datetime(construction.times[-1]),
                row_count=rows + (0 if replaced else progress[scope.uid].row_count),
                configuration_hash=node.portfolio_configuration.configuration_hash,
                code_version=portfolio_code_version(node.portfolio_configuration),
                input_digest=construction.input_digest,
                block=block if rows else None,
                replace=replaced,
            )
        )
    return advances


def _order_block(identifier: str, construction: Construction) -> tuple[Block, int]:
    """What is left of the order at the end of the window; the assets of which nothing is left, and nothing was used, have no row."""
    order = construction.trades.order
    kept = np.flatnonzero(~np.isnan(order.goals) | (order.used != 0)) if order else np.empty(0, np.int64)
    if order is None or not len(kept):
        return {}, 0
    pending = ~np.isnan(order.goals[kept])
    block = {
        "portfolio_identifier": Text.constant(identifier, len(kept)),
        "time_index": np.full(len(kept), construction.times[-1]),
        "asset_identifier": Text(kept, construction.assets),
        "target_weight": order.goals[kept],
        "active_from": np.where(pending, order.active_from, NEVER),
        "used_weight": order.used[kept],
    }
    return block, len(kept)


def _values_block(identifier: str, construction: Construction) -> tuple[Block, int]:
    rows = len(construction.times)
    block = {
        "portfolio_identifier": Text.constant(identifier, rows),
        "time_index": construction.times,
        "close": construction.close,
        "return": construction.returns,
        "calculated_close": construction.calculated_close,
        "close_time": construction.times,
    }
    return block, rows


def _weights_block(identifier: str, construction: Construction) -> tuple[Block, int]:
    """One complete vector per trade: every asset held before or after it."""
    trades, assets = construction.trades, construction.assets
    listed = (trades.after != 0) | (trades.before != 0)
    whole = bool(listed.all())  # then nothing has to be picked out
    width = len(assets) if whole else np.count_nonzero(listed, axis=1)
    asset = np.tile(np.arange(len(assets)), len(listed)) if whole else np.nonzero(listed)[1]
    columns = {
        "weight": trades.after,
        "weight_before": trades.before,
        "price_current": construction.prices,
        "price_before": construction.prices_before,
        "volume_current": construction.volumes,
        "volume_before": construction.volumes_before,
    }
    block = {
        "portfolio_identifier": Text.constant(identifier, len(asset)),
        "time_index": np.repeat(construction.bars.times[trades.rows], width),
        "asset_identifier": Text(asset, assets),
        **{name: values.ravel() if whole else values[listed] for name, values in columns.items()},
    }
    return block, len(asset)


def _index_block(identifier: str, construction: Construction) -> tuple[Block, int]:
    values, rows = _values_block(identifier, construction)
    names = {"portfolio_identifier": "portfolio_index_identifier"}
    return {names.get(name, name): column for name, column in values.items() if name != "calculated_close"}, rows
