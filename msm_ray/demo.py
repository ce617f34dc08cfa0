"""The demo: real prices of 20 US stocks, 1990-2022, and a fleet of portfolios over them. Everything goes through the public API."""

import importlib.util
from collections.abc import Callable
from datetime import UTC, date, datetime
from itertools import count, islice
from pathlib import Path

import numpy as np
import pandas as pd
from sqlalchemy import Engine

import msm_core
from msm_core.api import Asset, Calendar, CalendarDate, CalendarSession
from msm_core.configuration import (
    BacktestingWeightsConfig,
    PortfolioBuildConfiguration,
    PortfolioConfiguration,
    PortfolioExecutionConfiguration,
    PortfolioMarketsConfig,
    PriceTypeNames,
)
from msm_core.data_nodes.prices import APIDataNode, publish_prices
from msm_core.data_nodes.registration import register_portfolios
from msm_core.errors import ConfigurationError
from msm_core.rebalance_strategy import ImmediateSignal, RebalanceOn
from msm_core.signals import EqualWeights, FixedWeights, Signal

CALENDAR = "XNYS"
AS_OF = datetime(2022, 12, 31, tzinfo=UTC)  # the data end on 2022-12-28
FIRST, LAST = date(1990, 1, 2), date(2023, 12, 31)
RHYTHMS: tuple[RebalanceOn, ...] = ("month_end", "week_end", "month_end", "quarter_end", "every_session", "month_end", "week_end",
                                    "signal_change", "month_end", "quarter_end")  # fmt: skip
SIZES = (5, 8, 12, 20)
STARTS = (None, date(2000, 1, 3), date(2008, 1, 2), date(2015, 1, 2))
FEES = (0.00018, 0.0, 0.001)
Narrate = Callable[[str], None]


def prices() -> pd.DataFrame:
    """Adjusted closes (sessions x 20 stocks) that the skfolio package ships. Raises ConfigurationError when it is not installed."""
    found = importlib.util.find_spec("skfolio")  # found, not imported: that alone costs two seconds
    if found is None or not found.submodule_search_locations:
        raise ConfigurationError(problems="the demo needs the data set of the skfolio package: pip install 'msm-ray[demo]'")
    path = Path(found.submodule_search_locations[0], "datasets", "data", "sp500_dataset.csv.gz")
    return pd.read_csv(path, index_col=0, parse_dates=True)


def load(engine: Engine, narrate: Narrate) -> None:
    """Calendar, assets and bars; asked again, it writes nothing."""
    msm_core.start_engine(models=[Calendar, CalendarDate, CalendarSession, Asset])
    wide = prices()
    calendar = Calendar.get_or_none(unique_identifier=CALENDAR)
    if calendar is None or not (calendar.valid_from <= FIRST and calendar.valid_to >= LAST):
        calendar = Calendar.create_from_pandas_calendar("NYSE", CALENDAR, "New York Stock Exchange", FIRST, LAST)
    narrate(f"calendar {CALENDAR}: sessions {calendar.valid_from} to {calendar.valid_to}")
    Asset.upsert_many([{"unique_identifier": ticker, "asset_type": "equity", "calendar_uid": calendar.uid} for ticker in wide])
    closes = {s.local_date: s.closes_at for s in CalendarSession.filter(calendar_uid=calendar.uid)}
    stamps = pd.DatetimeIndex([closes[day.date()] for day in wide.index])
    long = wide.set_axis(stamps, axis=0).rename_axis("time_index").melt(ignore_index=False, var_name="asset_identifier", value_name="close")
    written = publish_prices(engine, long.reset_index())
    narrate(f"prices: {len(long):,} bars of {wide.shape[1]} stocks over {len(wide):,} sessions, {written:,} of them new")


def fleet(engine: Engine, portfolios: int) -> list[PortfolioConfiguration]:
    """Portfolios of many kinds, the same ones for the same number, registered."""
    tickers = sorted(prices().columns)
    configurations = [_portfolio(i, tickers) for i in islice(count(), portfolios)]
    with engine.begin() as connection:
        register_portfolios(connection, configurations)
    return configurations


def _portfolio(i: int, tickers: list[str]) -> PortfolioConfiguration:
    size, rhythm = SIZES[i % len(SIZES)], RHYTHMS[i % len(RHYTHMS)]
    universe = [tickers[(i + k * (1 + i % 3)) % len(tickers)] for k in range(len(tickers))]
    style, signal = _signal(i, list(dict.fromkeys(universe))[:size], rhythm)
    strategy = ImmediateSignal(calendar_key=CALENDAR, rebalance_on=rhythm, execution_lag=i // 7 % 2)
    return PortfolioConfiguration(
        portfolio_build_configuration=PortfolioBuildConfiguration(
            price_source_instance=APIDataNode.build_from_identifier("ExternalPricesTS"),
            price_column=PriceTypeNames.CLOSE,
            portfolio_prices_frequency="1d",
            start_date=STARTS[i // 5 % len(STARTS)],
            execution_configuration=PortfolioExecutionConfiguration(commission_fee=FEES[i % len(FEES)]),
            backtesting_weights_configuration=BacktestingWeightsConfig(
                signal_weights_instance=signal, rebalance_strategy_instance=strategy
            ),
        ),
        portfolio_markets_configuration=PortfolioMarketsConfig(
            portfolio_identifier=f"{style}-{size:02d}-{rhythm.replace('_', '-')}-{i:04d}",
            tags=("demo", style),
            signal_name=f"{style}-{size}",
        ),
    )


def _signal(i: int, universe: list[str], rhythm: RebalanceOn) -> tuple[str, Signal]:
    """Equal, fixed or long-short weights. A short position is never left to drift for ever: it can lose more than all."""
    kind = i % 5
    if kind in (0, 2, 4) or rhythm == "signal_change":
        return "equal", EqualWeights(asset_list=tuple(universe))
    ranks = np.arange(len(universe), 0, -1, dtype=np.float64)
    weights = dict(zip(universe, ranks / ranks.sum(), strict=True))
    if kind == 1:
        return "fixed", FixedWeights.from_signal_configuration(weights={a: round(w, 4) for a, w in weights.items()})
    half = len(universe) // 2
    legs = [0.9 / half] * half + [-0.3 / (len(universe) - half)] * (len(universe) - half)
    return "longshort", FixedWeights.from_signal_configuration(weights=dict(zip(universe, legs, strict=True)))
