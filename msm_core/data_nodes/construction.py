"""How portfolios are brought up to date: those of a batch read together, are constructed one by one, and land together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple

import numpy as np
from psycopg import sql
from sqlalchemy import Connection

from msm_core.configuration import PortfolioConfiguration, PriceAlignmentPolicy, SourceKey
from msm_core.construction import Construction, Market, State, align, construct, window_end
from msm_core.copying import Block, Text, execute
from msm_core.data_nodes.base import input_digest
from msm_core.data_nodes.calendars import resolve_calendars
from msm_core.data_nodes.interpolated_prices import resolve_sources
from msm_core.data_nodes.portfolios import PortfoliosDataNode
from msm_core.errors import MsmError, StateLost, UnknownAssets
from msm_core.frames import BEGINNING, TICK, LastTrade, Series, to_datetime, utc
from msm_core.models import PortfolioTable, SignalWeightsStorage
from msm_core.sessions import Sessions
from msm_core.signals import Vectors
from msm_core.sources import Source, read_prices
from msm_core.storage import (
    Advance,
    ProgressRows,
    Scope,
    known_assets,
    last_trades,
    read_progress,
    read_signal_weights,
    read_values,
)
from msm_core.valuation import CODE_VERSION


class MarketKey(NamedTuple):
    """Portfolios with the same key share one aligned block of prices."""

    source: SourceKey
    column: str
    calendar_key: str
    frequency: timedelta
    policy: PriceAlignmentPolicy

    @classmethod
    def of(cls, configuration: PortfolioConfiguration) -> "MarketKey":
        return cls(
            configuration.price_source.key,
            configuration.price_column,
            configuration.rebalance.calendar_key,
            configuration.frequency,
            configuration.alignment,
        )


Markets = Mapping[MarketKey, Market | MsmError]  # one that could not be built holds the error, for the portfolios that need it


@dataclass(frozen=True)
class Outside:
    """Inputs that belong to others. `markets` are those of their prices; ours are not read yet."""

    sources: Mapping[SourceKey, Source | MsmError]
    calendars: Mapping[str, Sessions | MsmError]
    markets: Markets
    assets: set[str]
    as_of: datetime


@dataclass(frozen=True)
class Inside:
    """Inputs that this system wrote, read in the claiming transaction; `markets` are all of the batch."""

    markets: Markets
    vectors: Mapping[str, Vectors]
    signal_progress: Mapping[str, datetime | None]
    states: Mapping[str, State]


@dataclass(frozen=True)
class PortfolioKind:
    """How a batch of portfolios is brought up to date."""

    name: str = "portfolio"

    def read_outside(self, connection: Connection, nodes: Sequence[PortfoliosDataNode], as_of: datetime) -> Outside:
        assets = known_assets(connection, {a for node in nodes for a in node.assets})
        sources = resolve_sources(connection, [node.portfolio_configuration.price_source for node in nodes]).sources
        keys = {node.portfolio_configuration.rebalance.calendar_key for node in nodes}
        calendars = resolve_calendars(connection, keys, as_of)
        foreign = [node for node in nodes if not _is_inside(node, sources)]
        return Outside(sources, calendars, _markets(connection, foreign, sources, calendars, as_of), assets, as_of)

    def read_inside(self, connection: Connection, nodes: Sequence[PortfoliosDataNode], progress: ProgressRows, outside: Outside) -> Inside:
        ours = [node for node in nodes if _is_inside(node, outside.sources)]
        markets = {**outside.markets, **_markets(connection, ours, outside.sources, outside.calendars, outside.as_of)}
        signals = sorted({node.portfolio_configuration.signal_uid for node in nodes})
        since = min((_vectors_since(node, markets) for node in nodes), default=BEGINNING)
        rows = read_signal_weights(connection, signals, since, _latest(markets))
        scopes = {uid: Scope(SignalWeightsStorage, uid) for uid in signals}
        moved = read_progress(connection, [scope.uid for scope in scopes.values()])
        return Inside(
            markets=markets,
            vectors={uid: Vectors.from_rows(r) for uid, r in rows.items()},
            signal_progress={uid: moved[s.uid].watermark if s.uid in moved else None for uid, s in scopes.items()},
            states=_read_states(connection, nodes),
        )

    def update(self, node: PortfoliosDataNode, progress: ProgressRows, outside: Outside, inside: Inside, as_of: datetime) -> list[Advance]:
        configuration = node.portfolio_configuration
        unknown = [a for a in node.assets if a not in outside.assets]
        if unknown:
            raise UnknownAssets(owner=node.identifier, assets=", ".join(unknown))
        market = inside.markets[MarketKey.of(configuration)]
        if isinstance(market, MsmError):
            raise market
        vectors = inside.vectors.get(configuration.signal_uid)
        if vectors is None:
            return []  # the signal has not emitted anything yet
        state = inside.states.get(node.identifier)
        if node.since is not None and state is None:
            raise StateLost(portfolio=node.identifier, watermark=node.since.isoformat())
        end = window_end(configuration, market, state, utc(as_of, "as_of"), _signal_end(configuration, inside))
        if state is not None and end <= state.watermark:
            return []
        construction = construct(configuration, market, vectors, state, end)
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


# -- reading ------------------------------------------------------------------------------------------------------------------

PriceKey = tuple[SourceKey, str]


def _is_inside(node: PortfoliosDataNode, sources: Mapping[SourceKey, Source | MsmError]) -> bool:
    source = sources[node.portfolio_configuration.price_source.key]
    return isinstance(source, Source) and source.is_inside


def _markets(
    connection: Connection,
    nodes: Sequence[PortfoliosDataNode],
    sources: Mapping[SourceKey, Source | MsmError],
    calendars: Mapping[str, Sessions | MsmError],
    as_of: datetime,
) -> dict[MarketKey, Market | MsmError]:
    prices = _read_prices(connection, nodes, sources, as_of)
    groups: dict[MarketKey, list[PortfoliosDataNode]] = {}
    for node in nodes:
        groups.setdefault(MarketKey.of(node.portfolio_configuration), []).append(node)
    return {key: _market(key, group, sources, calendars, prices, as_of) for key, group in groups.items()}


def _read_prices(
    connection: Connection, nodes: Sequence[PortfoliosDataNode], sources: Mapping[SourceKey, Source | MsmError], as_of: datetime
) -> dict[PriceKey, dict[str, Series] | MsmError]:
    """Bars per (source, column), one statement each, whatever the number of portfolios."""
    groups: dict[PriceKey, list[PortfoliosDataNode]] = {}
    for node in nodes:
        configuration = node.portfolio_configuration
        groups.setdefault((configuration.price_source.key, configuration.price_column), []).append(node)
    prices: dict[PriceKey, dict[str, Series] | MsmError] = {}
    for (key, column), group in groups.items():
        source = sources[key]
        if isinstance(source, MsmError):
            prices[key, column] = source
            continue
        assets = sorted({a for node in group for a in node.assets})
        try:
            prices[key, column] = read_prices(connection, source, column, assets, _bars_since(group, source), as_of)
        except MsmError as error:
            prices[key, column] = error
    return prices


def _bars_since(nodes: Sequence[PortfoliosDataNode], source: Source) -> datetime | None:
    """Time of the oldest bar that any of the nodes may need: at its watermark, or as much earlier as staleness allows."""
    oldest: list[datetime] = []
    for node in nodes:
        start = node.since or _start_of(node.portfolio_configuration)
        if start is None:
            return None
        oldest.append(start - node.portfolio_configuration.alignment.maximum_staleness - source.margin)
    return min(oldest)


def _start_of(configuration: PortfolioConfiguration) -> datetime | None:
    """An instant safely before the configured start_date, in any time zone."""
    if configuration.start_date is None:
        return None
    return datetime.combine(configuration.start_date, datetime.min.time(), BEGINNING.tzinfo) - timedelta(days=1)


def _market(
    key: MarketKey,
    nodes: Sequence[PortfoliosDataNode],
    sources: Mapping[SourceKey, Source | MsmError],
    calendars: Mapping[str, Sessions | MsmError],
    prices: Mapping[PriceKey, dict[str, Series] | MsmError],
    as_of: datetime,
) -> Market | MsmError:
    sessions, series, source = calendars[key.calendar_key], prices[key.source, key.column], sources[key.source]
    for input_ in (series, sessions):
        if isinstance(input_, MsmError):
            return input_
    assert isinstance(sessions, Sessions)
    assert isinstance(series, dict)
    assert isinstance(source, Source)
    assets = sorted({a for node in nodes for a in node.assets})
    times = sessions.valuation_times(key.frequency)
    first = min((bars.times[0] for a, bars in series.items() if a in set(assets)), default=utc(as_of, "as_of"))
    watermarks = [utc(node.since, "watermark") for node in nodes if node.since]
    begin = min([first, *watermarks])
    grid = times[np.searchsorted(times, begin, "left") : np.searchsorted(times, utc(as_of, "as_of"), "right")]
    return align(series, assets, sessions, grid, key.policy, source.identifier, key.column, source.time_label)


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
    return {
        i: State(old[i], *values[i, old[i]], trade_value=values[i, trade.time][1], last_trade=trade)
        for i, trade in trades.items()
        if (i, old[i]) in values and (i, trade.time) in values
    }


def _signal_end(configuration: PortfolioConfiguration, inside: Inside) -> np.datetime64 | None:
    """Last instant at which the signal's newest vector may still be valid; None = for ever. The bound itself is not valid."""
    fill = configuration.signal.maximum_forward_fill
    through = inside.signal_progress[configuration.signal_uid]
    if fill is None or through is None:
        return None
    return utc(through, "signal progress") + fill - TICK


# -- writing ------------------------------------------------------------------------------------------------------------------


def _advances(node: PortfoliosDataNode, progress: ProgressRows, construction: Construction) -> list[Advance]:
    bars = construction.bars
    digest = input_digest(bars.assets, bars.times, bars.prices, bars.volumes, construction.trades.after)
    blocks = [_values_block(node.identifier, construction), _weights_block(node.identifier, construction)]
    if len(node.scopes) > len(blocks):
        blocks.append(_index_block(node.scopes[-1].value, construction))
    return [
        Advance(
            scope=scope,
            epoch=progress[scope.uid].epoch,
            watermark=to_datetime(construction.times[-1]),
            row_count=rows + (0 if node.replace else progress[scope.uid].row_count),
            configuration_hash=node.portfolio_configuration.configuration_hash,
            code_version=CODE_VERSION,
            input_digest=digest,
            block=block if rows else None,
            replace=node.replace,
        )
        for scope, (block, rows) in zip(node.scopes, blocks, strict=True)
    ]


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
    trades, bars = construction.trades, construction.bars
    trade, asset = np.nonzero((trades.after != 0) | (trades.before != 0))
    row = trades.rows[trade]
    block = {
        "portfolio_identifier": Text.constant(identifier, len(trade)),
        "time_index": bars.times[row],
        "asset_identifier": Text(asset, construction.assets),
        "weight": trades.after[trade, asset],
        "weight_before": trades.before[trade, asset],
        "price_current": bars.prices[row, asset],
        "price_before": construction.prices_before[trade, asset],
        "volume_current": bars.volumes[row, asset],
        "volume_before": construction.volumes_before[trade, asset],
    }
    return block, len(trade)


def _index_block(identifier: str, construction: Construction) -> tuple[Block, int]:
    values, rows = _values_block(identifier, construction)
    names = {"portfolio_identifier": "portfolio_index_identifier"}
    return {names.get(name, name): column for name, column in values.items() if name != "calculated_close"}, rows
