"""300 portfolios of every signal and every rebalance strategy over the demo data, by every road. Prints how many distinct checksums.

python benchmarks/mixed_fleet.py [--quick]

The demo's bars are closes; volumes, market capitalisations, a cash rate, external weights and a year of intraday bars are made up, the
same ones each time. One stock is delisted. Every portfolio must land; `distinct` must be 1.
"""

import itertools
import random
import sys
import time
from datetime import date, timedelta
from typing import Any

import numpy as np
import pandas as pd
from common import emit, options, server, stored_checksum
from sqlalchemy import Engine

import msm_core
from msm_core.api import Asset
from msm_core.api.sources import register_source
from msm_core.configuration import PortfolioConfiguration
from msm_core.data_nodes.prices import APIDataNode
from msm_core.data_nodes.registration import register_portfolios
from msm_core.data_nodes.world import price_sources_of
from msm_core.identity import logical_identifier, storage_uid
from msm_ray import demo, prepare
from msm_ray.executors import make_executor
from msm_ray.run import Options, run_fleet

SEED = 20261122
START = date(2016, 1, 4)
DELISTED = ("XOM", date(2021, 6, 30))
INTRADAY_FROM = "2022-10-03"
INTRADAY_START = date(2022, 10, 17)


def main() -> None:
    quick = options(__doc__).quick
    count = 120 if quick else 300
    roads: list[tuple[str, str, int | None, int]] = [
        ("local", "local", None, 1),
        ("ray, batch 7", "ray", 7, 1),
        ("9 nights", "local", 40, 9),
    ]
    if not quick:
        roads += [("ray", "ray", None, 1), ("batch 1", "local", 1, 1), ("batch 64", "local", 64, 1)]
    found: dict[str, str] = {}
    seconds: dict[str, float] = {}
    landed: set[int] = set()
    with server() as fresh:
        for name, executor_name, batch_size, nights in roads:
            engine = fresh()
            _make_up(engine)
            fleet = _fleet(count)
            prepare.prepare(engine, price_sources_of(fleet))
            with engine.begin() as connection:
                register_portfolios(connection, fleet)
            executor = make_executor(executor_name)
            started = time.perf_counter()
            done: set[str] = set()
            try:
                for as_of in _nights(nights):
                    there = fleet if as_of.date() > INTRADAY_START else fleet[: -len(INTRADAY)]
                    report = run_fleet(engine, there, executor, as_of, Options(batch_size=batch_size))
                    assert report.status == "landed", [(r.identifier, r.error) for r in report.failures()][:3]
                    done |= {r.identifier for r in report.results if r.kind == "portfolio" and r.status == "landed"}
            finally:
                executor.close()
            landed.add(len(done))
            idle = sorted({c.identifier for c in fleet} - done)
            print(f"{len(idle)} did not land: {idle[:5]}", file=sys.stderr) if idle else None
            seconds[name] = round(time.perf_counter() - started, 1)
            found[name] = stored_checksum(engine)
            print(f"{name:14} {found[name][:16]}  {seconds[name]} s, {len(done)} landed", file=sys.stderr)
            engine.dispose()
    kinds = {
        "signals": len({c.signal.kind for c in _fleet(count)}),
        "strategies": len({c.rebalance.kind for c in _fleet(count)}),
    }
    emit({"portfolios": count, "landed": min(landed), **kinds, "distinct": len(set(found.values())), "seconds": seconds})


def _nights(count: int) -> list[Any]:
    """Increasing instants, the last one the demo's as-of."""
    span = (demo.AS_OF.date() - START).days
    chosen = sorted(random.Random(SEED).sample(range(1, span), count - 1), reverse=True)
    return [*(demo.AS_OF - timedelta(days=days, hours=days % 24) for days in chosen), demo.AS_OF]


# -- what the demo does not have ------------------------------------------------------------------------------------------------


def _make_up(engine: Engine) -> None:
    generator = np.random.default_rng(SEED)
    with engine.begin() as connection:
        bars = pd.read_sql("SELECT asset_identifier, time_index, close FROM msm__external_prices ORDER BY 1, 2", connection)
        connection.exec_driver_sql(
            "UPDATE msm__external_prices SET volume = 1e5 + (hashtext(asset_identifier || time_index::text) & 1048575)"
        )
        for table, column in (("caps", "market_cap"), ("rates", "rate"), ("allocations", "signal_weight"), ("bars_30m", "close")):
            more = ", open float8, volume float8, available_notional float8" if table == "bars_30m" else ""
            connection.exec_driver_sql(
                f'CREATE TABLE {table} (asset_identifier text COLLATE "C", time_index timestamptz, {column} float8{more}, '
                "PRIMARY KEY (asset_identifier, time_index))"
            )
        tickers = sorted(set(bars["asset_identifier"]))
        shares = pd.Series(generator.uniform(1e8, 1e9, len(tickers)), tickers)
        caps = bars.assign(market_cap=bars["close"] * shares.loc[bars["asset_identifier"]].to_numpy()).drop(columns="close")
        recent = bars[bars["time_index"] >= pd.Timestamp(START, tz="UTC") - pd.Timedelta(days=900)]
        days = pd.DatetimeIndex(sorted(set(recent["time_index"])))
        rates = pd.DataFrame({"asset_identifier": "USD", "time_index": days, "rate": generator.uniform(0.0, 0.03, len(days))})
        months = days[::21]
        vectors = pd.DataFrame(generator.dirichlet(np.ones(len(tickers)), len(months)), months, tickers).rename_axis("time_index")
        allocations = vectors.melt(ignore_index=False, var_name="asset_identifier", value_name="signal_weight").reset_index()
        for table, frame in (("caps", caps), ("rates", rates), ("allocations", allocations), ("bars_30m", _intraday(bars, generator))):
            frame.to_sql(table, connection, if_exists="append", index=False, method="multi", chunksize=5000)
    msm_core.start_engine()
    for table, cadence in (("caps", "1d"), ("rates", "1d"), ("allocations", None), ("bars_30m", "30m")):
        register_source(table, table=table, cadence=cadence)
    Asset.upsert(unique_identifier=DELISTED[0], delisted_on=DELISTED[1])


def _intraday(bars: pd.DataFrame, generator: np.random.Generator) -> pd.DataFrame:
    """Half-hour bars of the last sessions that end at each close: 13 of a whole session."""
    recent = bars[bars["time_index"] >= pd.Timestamp(INTRADAY_FROM, tz="UTC")]
    parts = []
    for k in range(13):
        drift = 1 + generator.normal(0, 0.002, len(recent)) * (k > 0)
        close = recent["close"] * drift
        stamps = recent["time_index"] - pd.Timedelta(minutes=30) * k
        volume = generator.uniform(1e4, 1e5, len(recent))
        part = recent.assign(time_index=stamps, close=close, open=close * 0.999, volume=volume, available_notional=close * volume)
        parts.append(part)
    return pd.concat(parts)


# -- the fleet ------------------------------------------------------------------------------------------------------------------


def _source(table: str) -> dict[str, Any]:
    return APIDataNode(time_index_meta_table_uid=storage_uid(logical_identifier(table))).model_dump(mode="json")


def _signals(tickers: list[str]) -> list[dict[str, Any]]:
    daily = {"asset_list": tickers, "calendar_key": demo.CALENDAR, "price_source": _source("ExternalPricesTS")}
    filled = {
        "kind": "interpolated_prices",
        "interpolation_config": {
            "source_price_instance": _source("ExternalPricesTS"), "upsample_frequency_id": "1d", "intraday_bar_interpolation_rule": "ffill",
        },
    }  # fmt: skip
    few = {**daily, "asset_list": tickers[:9]}
    return [
        {"kind": "equal_weights", "asset_list": tickers},
        {"kind": "fixed_weights", "asset_unique_identifier_weights": [{"unique_identifier": a, "weight": 0.04} for a in tickers]},
        {"kind": "inverse_volatility", **daily, "emit_on": "week_end"},
        {"kind": "inverse_volatility", **few, "price_source": filled, "window_sessions": 21},
        {"kind": "momentum", **daily, "top_assets": 5, "emit_on": "month_end"},
        {"kind": "momentum", **few, "top_assets": 3, "long_short": True, "lookback_sessions": 126, "emit_on": "week_end"},
        {"kind": "market_cap", **daily, "market_cap_source": _source("caps"), "minimum_atvr_ratio": 0.001, "emit_on": "month_end"},
        {
            "kind": "market_cap",
            **few,
            "market_cap_source": _source("caps"),
            "minimum_atvr_ratio": 0.001,
            "emit_on": "week_end",
            "volatility_control": {"target_volatility": 0.1},
        },
        {"kind": "external_weights", "weights_source": _source("allocations"), "asset_list": tickers, "forward_fill": None},
        {"kind": "portfolio_replicator", **few, "target": {"portfolio": "mixed-000"}, "method": "nnls", "emit_on": "week_end"},
        {
            "kind": "portfolio_replicator",
            **few,
            "target": {"asset": "WMT"},
            "method": "lasso",
            "alpha": 1e-5,
            "asset_list": tickers[:9],
            "emit_on": "month_end",
        },
        {"kind": "skfolio", **few, "estimator": "HierarchicalRiskParity", "emit_on": "quarter_end"},
    ]


STRATEGIES: list[dict[str, Any]] = [
    {"kind": "immediate_signal", "rebalance_on": "signal_change", "execution_lag": 1},
    {"kind": "immediate_signal", "rebalance_on": "month_end"},
    {"kind": "threshold", "absolute_band": 0.01, "relative_band": 0.5},
    {"kind": "calendar_event", "schedule": "weekly", "weekday": 3},
    {"kind": "time_weighted", "rebalance_on": "week_end", "execution_lag": 1},
    {"kind": "volume_participation", "rebalance_on": "month_end", "total_notional": 2e9},
    {"kind": "liquidity_constrained", "rebalance_on": "month_end", "available_liquidity_column": "volume",
     "available_liquidity_unit": "quantity", "max_liquidity_fraction": 0.01, "total_notional": 2e9},
    {"kind": "trailing_adv_participation", "rebalance_on": "quarter_end", "total_notional": 5e9},
]  # fmt: skip
INTRADAY: list[tuple[str, dict[str, Any]]] = [  # the trend is flat at every close, so it is followed inside sessions
    ("intraday_trend", {"kind": "immediate_signal", "rebalance_on": "signal_change"}),
    ("intraday_trend", {"kind": "threshold", "rebalance_on": "signal_change", "absolute_band": 0.02}),
    ("equal_weights", {"kind": "time_weighted", "rebalance_on": "every_session", "execution_lag": 1}),
    ("equal_weights", {"kind": "volume_participation", "rebalance_on": "week_end", "total_notional": 1e8}),
    ("equal_weights", {"kind": "liquidity_constrained", "rebalance_on": "week_end", "max_liquidity_fraction": 0.01, "total_notional": 1e8}),
    ("equal_weights", {"kind": "trailing_adv_participation", "rebalance_on": "week_end", "total_notional": 1e8, "lookback_sessions": 5}),
    ("equal_weights", {"kind": "calendar_event", "event": "market_open", "schedule": "weekly"}),
]


def _fleet(count: int) -> list[PortfolioConfiguration]:
    """Every signal with every strategy, over and over with other fees and accountings; the first one is tracked by others."""
    tickers = sorted(demo.prices().columns)
    pairs = list(itertools.product(_signals(tickers), STRATEGIES))
    pairs = [pairs[i * 7 % len(pairs)] for i in range(len(pairs))]  # neighbours differ; 7 and 96 have no factor in common
    listed = [ticker for ticker in tickers if ticker != DELISTED[0]][:9]
    trend = {"kind": "intraday_trend", "calendar_key": demo.CALENDAR, "bar_frequency": "30m", "price_source": _source("bars_30m")}
    inside = {"intraday_trend": {**trend, "asset_list": listed}, "equal_weights": {"kind": "equal_weights", "asset_list": listed}}
    fleet = [_portfolio(i, *pairs[i % len(pairs)], "ExternalPricesTS", "1d", START) for i in range(count - len(INTRADAY))]
    late = [(inside[kind], strategy) for kind, strategy in INTRADAY]
    return fleet + [_portfolio(count + i, signal, s, "bars_30m", "30m", INTRADAY_START) for i, (signal, s) in enumerate(late)]


def _portfolio(
    i: int, signal: dict[str, Any], strategy: dict[str, Any], source: str, frequency: str, start: date
) -> PortfolioConfiguration:
    accounting = "target" if i % 11 == 10 else "drifted"
    execution: dict[str, Any] = {"commission_fee": 0.0001 * (i % 5), "weight_accounting": accounting}
    if i % 13 == 5:
        execution["cash_rate"] = {"source": _source("rates"), "identifier": "USD", "column": "rate", "forward_fill": "P10D"}
    return PortfolioConfiguration.model_validate(
        {
            "portfolio_build_configuration": {
                "price_source_instance": _source(source),
                "portfolio_prices_frequency": frequency,
                "start_date": start,
                "execution_configuration": execution,
                "backtesting_weights_configuration": {
                    "signal_weights_instance": {"kind": "equal_weights", "asset_list": sorted(signal["asset_list"])} if i == 0 else signal,
                    "rebalance_strategy_instance": {"calendar_key": demo.CALENDAR, **strategy},
                },
            },
            "portfolio_markets_configuration": {"portfolio_identifier": f"mixed-{i:03}", "tags": ("mixed",)},
        }
    )


if __name__ == "__main__":
    main()
