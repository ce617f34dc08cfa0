"""What portfolios hold at an instant: the weights struck at their last trade, drifted with the prices since. Read set-based."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import numpy as np
import pandas as pd
from psycopg import sql
from pydantic import ValidationError
from sqlalchemy import Connection

from msm_core.configuration import PortfolioConfiguration
from msm_core.construction import current_weights
from msm_core.copying import fetch
from msm_core.data_nodes.base import failure_facts
from msm_core.data_nodes.calendars import resolve_calendars
from msm_core.data_nodes.interpolated_prices import resolve_sources
from msm_core.data_nodes.markets import MarketKey, Need, read_markets
from msm_core.database import get_engine, transaction
from msm_core.errors import MsmError, UnknownAssets, UnresolvedPortfolios
from msm_core.frames import LastTrade, to_datetime
from msm_core.models import AssetTable, PortfolioConfigurationTable, PortfolioTable
from msm_core.sources import delistings, read_assets
from msm_core.storage import ValueKey, last_trades, last_values, read_values

COLUMNS = ("portfolio_uid", "portfolio_identifier", "asset_uid", "held_portfolio_uid", "asset_identifier", "weight", "price", "time_index")
LOOKED_THROUGH = "portfolio"  # asset_type of an asset that stands for the portfolio of its name


@dataclass(frozen=True)
class CurrentPositions:
    """positions: rows of COLUMNS, one per asset of each portfolio; problems: what is wrong with the others, by uid."""

    positions: pd.DataFrame
    problems: Mapping[UUID, str]


class CurrentWeights:
    """A resolver for `expand_portfolio_target_positions`: weights at the last valuation at or before `as_of`, whoever asks.

    Statements: about a dozen, whatever the number of portfolios, and one more per source and column of prices.

    An asset of type `portfolio` whose unique_identifier names a portfolio stands for it: its row has `held_portfolio_uid`.
    Asked again, a portfolio is not read again. Raises UnresolvedPortfolios naming each that has no weights then, and why.
    """

    def __init__(self, as_of: datetime, connection: Connection | None = None) -> None:
        self.as_of, self._connection = as_of, connection
        self._asked: set[UUID] = set()
        self._positions = pd.DataFrame(columns=list(COLUMNS))
        self._problems: dict[UUID, str] = {}

    def __call__(self, portfolios: Sequence[UUID]) -> pd.DataFrame:
        if new := [uid for uid in portfolios if uid not in self._asked]:
            found = self._read(new)
            self._asked.update(new)
            self._problems |= found.problems
            self._positions = pd.concat([self._positions, found.positions]) if len(self._positions) else found.positions
        if lost := [f"{uid} ({self._problems[uid]})" for uid in portfolios if uid in self._problems]:
            raise UnresolvedPortfolios(portfolios=", ".join(lost))
        return self._positions[self._positions["portfolio_uid"].isin(portfolios)]

    def identifiers(self) -> dict[UUID, str]:
        """Names of the assets and portfolios that were met so far, by uid."""
        met, pairs = self._positions, (("asset_uid", "asset_identifier"), ("portfolio_uid", "portfolio_identifier"))
        return {uid: name for by, names in pairs for uid, name in zip(met[by], met[names], strict=True) if uid is not None}

    def _read(self, portfolios: Sequence[UUID]) -> CurrentPositions:
        if self._connection is not None:
            return read_current_positions(self._connection, portfolios, self.as_of)
        with transaction(get_engine(), read_only=True) as connection:
            return read_current_positions(connection, portfolios, self.as_of)


@dataclass(frozen=True)
class _Standing:
    """Where a portfolio stands: its configuration, its last trade, and when it was last valued, grown by how much since that trade."""

    configuration: PortfolioConfiguration
    trade: LastTrade
    at: np.datetime64
    growth: float


def read_current_positions(connection: Connection, portfolios: Sequence[UUID], as_of: datetime) -> CurrentPositions:
    """Of portfolios by uid, at the last valuation of each at or before `as_of`."""
    problems: dict[UUID, str] = {}
    configurations = _configurations(connection, portfolios, problems)
    standings = _standings(connection, configurations, as_of, problems)
    markets = _markets(connection, standings, as_of)
    names = sorted({asset for standing in standings.values() for asset in standing.trade.assets})
    known = _assets(connection, names)
    rows: list[tuple[Any, ...]] = []
    for uid, standing in standings.items():
        configuration, trade = standing.configuration, standing.trade
        market = markets[MarketKey.of(configuration)]
        try:
            if isinstance(market, MsmError):
                raise market
            if unknown := [asset for asset in trade.assets if asset not in known]:
                raise UnknownAssets(owner=configuration.identifier, assets=", ".join(unknown))
            weights, prices = current_weights(configuration, market, trade, standing.growth, standing.at)
        except MsmError as error:
            problems[uid] = failure_facts(error)["message"]
            continue
        time = to_datetime(standing.at)
        rows += [
            (uid, configuration.identifier, *known[asset], asset, weight, price, time)
            for asset, weight, price in zip(trade.assets, weights.tolist(), prices.tolist(), strict=True)
        ]
    return CurrentPositions(pd.DataFrame(rows, columns=list(COLUMNS)).astype({"weight": np.float64, "price": np.float64}), problems)


def _configurations(connection: Connection, portfolios: Sequence[UUID], problems: dict[UUID, str]) -> dict[UUID, PortfolioConfiguration]:
    statement = sql.SQL("""
        SELECT u.uid, p.unique_identifier, c.configuration FROM unnest(%(uids)s::uuid[]) u(uid)
        LEFT JOIN {portfolio} p ON p.uid = u.uid LEFT JOIN LATERAL (
            SELECT v.configuration FROM {configuration} v WHERE v.portfolio_uid = u.uid ORDER BY v.version DESC LIMIT 1) c ON true
    """).format(portfolio=_name(PortfolioTable), configuration=_name(PortfolioConfigurationTable))
    found: dict[UUID, PortfolioConfiguration] = {}
    for uid, identifier, stored in fetch(connection, statement, {"uids": list(portfolios)}):
        if identifier is None:
            problems[uid] = "there is no such portfolio"
        elif stored is None:
            problems[uid] = f"{identifier} has no stored configuration, so it was never computed"
        else:
            try:
                found[uid] = PortfolioConfiguration.model_validate(stored)
            except (MsmError, ValidationError) as error:
                problems[uid] = f"{identifier}: {failure_facts(error)['message']}"
    return found


def _standings(
    connection: Connection, configurations: Mapping[UUID, PortfolioConfiguration], as_of: datetime, problems: dict[UUID, str]
) -> dict[UUID, _Standing]:
    names = [c.identifier for c in configurations.values()]
    trades, last = last_trades(connection, names, as_of), last_values(connection, names, as_of)
    struck: list[ValueKey] = [(name, trade.time) for name, trade in trades.items()]
    at_trade = read_values(connection, struck)
    found: dict[UUID, _Standing] = {}
    for uid, configuration in configurations.items():
        name = configuration.identifier
        trade = trades.get(name)
        if trade is None or name not in last or (name, trade.time) not in at_trade:
            problems[uid] = f"{name} has no weights at or before {as_of.isoformat()}"
            continue
        at, value = last[name]
        found[uid] = _Standing(configuration, trade, at, value / at_trade[name, trade.time][1])
    return found


def _markets(connection: Connection, standings: Mapping[UUID, _Standing], as_of: datetime) -> dict[MarketKey, Any]:
    """Prices at the last valuation of each."""
    configurations = [standing.configuration for standing in standings.values()]
    needs = [Need(MarketKey.of(s.configuration), s.trade.assets, to_datetime(s.at)) for s in standings.values()]
    sources = resolve_sources(connection, [c.price_source for c in configurations]).sources
    calendars = resolve_calendars(connection, {c.rebalance.calendar_key for c in configurations}, as_of)
    gone = delistings(read_assets(connection, {asset for need in needs for asset in need.assets}))
    world = (needs, sources, calendars, gone, as_of)
    return {**read_markets(connection, *world, inside=False), **read_markets(connection, *world, inside=True)}


def _assets(connection: Connection, names: Sequence[str]) -> dict[str, tuple[UUID | None, UUID | None]]:
    """(asset_uid, uid of the portfolio that it stands for) by name; one of them is set."""
    statement = sql.SQL("""
        SELECT a.unique_identifier, a.uid, p.uid FROM {asset} a
        LEFT JOIN {portfolio} p ON p.unique_identifier = a.unique_identifier AND a.asset_type = %(type)s
        WHERE a.unique_identifier = ANY(%(names)s)
    """).format(asset=_name(AssetTable), portfolio=_name(PortfolioTable))
    found = fetch(connection, statement, {"names": list(names), "type": LOOKED_THROUGH})
    return {name: (None if portfolio else asset, portfolio) for name, asset, portfolio in found}


def _name(table: type) -> sql.Identifier:
    return sql.Identifier(table.__tablename__)
