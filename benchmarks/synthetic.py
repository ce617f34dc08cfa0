"""A made-up market and fleets over it, the same ones each time: what the benchmarks of whole runs are about."""

from datetime import UTC, date, datetime, timedelta

import numpy as np
from sqlalchemy import Engine

import msm_core
from msm_core.api import Asset, Calendar, CalendarDate, CalendarSession
from msm_core.configuration import PortfolioConfiguration
from msm_core.copying import Text, copy_in
from msm_core.data_nodes.prices import APIDataNode
from msm_core.models import ExternalPricesStorage
from msm_core.rebalance_strategy import RebalanceOn
from msm_core.signals import FixedWeights

CALENDAR = "XNYS"
FIRST, LAST = date(2013, 1, 2), date(2023, 12, 29)
SESSIONS = 2_500
ASSETS = 500
HELD = 50  # assets of a portfolio
SEED = 20261122
STYLES: tuple[RebalanceOn, ...] = ("every_session", "month_end")
FOREVER = datetime(2100, 1, 1, tzinfo=UTC)


def load(engine: Engine, sessions: int = SESSIONS, assets: int = ASSETS) -> list[datetime]:
    """Calendar, assets and random walks with volumes; the closes of the first `sessions` sessions, and of one more."""
    msm_core.start_engine(models=[Calendar, CalendarDate, CalendarSession, Asset])
    calendar = Calendar.create_from_pandas_calendar("NYSE", CALENDAR, "New York Stock Exchange", FIRST, LAST)
    names = [name(i) for i in range(assets)]
    Asset.upsert_many([{"unique_identifier": n, "asset_type": "equity", "calendar_uid": calendar.uid} for n in names])
    closes = sorted(s.closes_at for s in CalendarSession.filter(calendar_uid=calendar.uid) if s.closes_at)[: sessions + 1]
    times = np.array([c.astimezone(UTC).replace(tzinfo=None) for c in closes], "datetime64[us]")
    random = np.random.default_rng(SEED)
    for n in names:
        prices = 100 * np.cumprod(1 + random.normal(0.0003, 0.015, len(times)))
        block = {
            "asset_identifier": Text.constant(n, len(times)),
            "time_index": times,
            "close": prices,
            "volume": random.lognormal(13, 1, len(times)),
        }
        with engine.begin() as connection:
            copy_in(connection, ExternalPricesStorage.__tablename__, block)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(f"VACUUM ANALYZE {ExternalPricesStorage.__tablename__}")
    return closes


def name(i: int) -> str:
    return f"A{i:03d}"


def through(close: datetime) -> datetime:
    """An as-of that knows this session and no later one."""
    return close + timedelta(hours=1)


def fleet(
    count: int, rebalance_on: RebalanceOn, prefix: str = "p", start: date = FIRST, held: int = HELD, seed: int = 0
) -> list[PortfolioConfiguration]:
    """Portfolios with weights of their own over `held` of the assets; other ones for another seed."""
    chance = (np.random.default_rng([SEED, seed, i, rebalance_on == "month_end"]) for i in range(count))
    return [_portfolio(random, f"{prefix}{i:05d}", rebalance_on, start, held) for i, random in enumerate(chance)]


def _portfolio(random: np.random.Generator, identifier: str, rebalance_on: RebalanceOn, start: date, held: int) -> PortfolioConfiguration:
    chosen, weights = random.choice(ASSETS, held, replace=False), random.dirichlet(np.ones(held))
    signal = FixedWeights.from_signal_configuration(weights={name(a): float(w) for a, w in zip(chosen, weights, strict=True)})
    return PortfolioConfiguration.model_validate(
        {
            "portfolio_build_configuration": {
                "price_source_instance": APIDataNode.build_from_identifier("ExternalPricesTS"),
                "start_date": start,
                "backtesting_weights_configuration": {
                    "signal_weights_instance": signal,
                    "rebalance_strategy_instance": {"kind": "immediate_signal", "calendar_key": CALENDAR, "rebalance_on": rebalance_on},
                },
            },
            "portfolio_markets_configuration": {"portfolio_identifier": identifier},
        }
    )
