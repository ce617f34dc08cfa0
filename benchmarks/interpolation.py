"""Interpolating 3 000 assets over 2 500 sessions with 1 % gaps, against a pure COPY of the very same rows; then one more session.

python benchmarks/interpolation.py [--quick]

rows_per_s   stored bars per second, read, interpolated and written in one process, median of three rounds
copy_ratio   seconds of the COPY of those rows, encoded beforehand, into an equal empty table, over seconds of the job
nightly      seconds (median of three) and SQL statements of a run that brings every asset one session further
"""

import resource
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime

import numpy as np
from common import counted_statements, emit, options, register, server
from psycopg import sql
from sqlalchemy import Engine

from msm_core.api import Asset, Calendar
from msm_core.configuration import (
    BacktestingWeightsConfig,
    PortfolioBuildConfiguration,
    PortfolioConfiguration,
    PortfolioMarketsConfig,
)
from msm_core.copying import Text, copy_in, driver_connection
from msm_core.data_nodes.interpolated_prices import InterpolatedPrices, InterpolatedPricesConfig
from msm_core.data_nodes.prices import APIDataNode
from msm_core.models import (
    ExternalPricesStorage,
    InterpolatedPricesStorage,
    PortfoliosStorage,
    PortfolioWeightsStorage,
    SignalWeightsStorage,
)
from msm_core.rebalance_strategy import ImmediateSignal
from msm_core.sessions import Sessions
from msm_core.signals import FixedWeights
from msm_core.storage import read_sessions
from msm_ray import demo, prepare
from msm_ray.executors import LocalExecutor
from msm_ray.run import RunReport, run_fleet

SEED = 20261122
GAPS = 0.01
ASSETS_PER_COPY = 100
CHUNK_BYTES = 2**20


def main() -> None:
    quick = options(__doc__).quick
    assets, sessions, rounds = (300, 500, 3) if quick else (3000, 2500, 3)
    with server() as fresh:
        engine = fresh()
        names = [f"asset-{i:04}" for i in range(assets)]
        calendar = register_assets(engine, names)
        closes = calendar.closes[calendar.closes < np.datetime64(demo.AS_OF.replace(tzinfo=None), "us")][-sessions - rounds :]
        load(engine, names, closes[:-rounds])
        portfolio = one_portfolio(names)
        register(engine, [portfolio])
        prepare.prepare(engine, [portfolio.price_source])
        job, copy, rows = [], [], 0
        for i in range(rounds):
            empty(engine)
            report, seconds = timed(engine, portfolio)
            rows = sum(r.rows for r in report.results if r.kind == "prices")
            job.append(seconds)
            copy.append(pure_copy(engine))
            print(f"round {i + 1}: {rows:,} rows, job {job[-1]:.1f} s, COPY alone {copy[-1]:.1f} s", file=sys.stderr)
        nights = [night(engine, names, portfolio, closes[i : i + 1]) for i in range(sessions, sessions + rounds)]
    ratios = [c / j for c, j in zip(copy, job, strict=True)]
    nightly = {"seconds": round(statistics.median(n[0] for n in nights), 2), "statements": nights[-1][1], "rows": nights[-1][2]}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    emit(
        {
            "assets": assets,
            "sessions": sessions,
            "rows": rows,
            "rows_per_s": round(rows / statistics.median(job)),
            "copy_ratio": round(statistics.median(ratios), 2),
            "nightly": nightly,
            "peak_mib": peak,
        }
    )


def register_assets(engine: Engine, names: list[str]) -> Sessions:
    """Assets that trade on the demo's exchange; returns its sessions."""
    calendar = Calendar.get(unique_identifier=demo.CALENDAR)
    Asset.upsert_many([{"unique_identifier": name, "calendar_uid": calendar.uid} for name in names])
    with engine.connect() as connection:
        return read_sessions(connection, [calendar.uid])[calendar.uid]


def load(engine: Engine, names: list[str], closes: np.ndarray, gaps: float = GAPS) -> None:
    """Random bars at `closes`, of which the given share is missing."""
    random = np.random.default_rng(SEED)
    columns = ("open", "high", "low", "close", "volume", "vwap")
    for start in range(0, len(names), ASSETS_PER_COPY):
        some = tuple(names[start : start + ASSETS_PER_COPY])
        asset, session = np.nonzero(random.random((len(some), len(closes))) >= gaps)
        block = {"asset_identifier": Text(asset, some), "time_index": closes[session]}
        with engine.begin() as connection:
            copy_in(connection, ExternalPricesStorage.__tablename__, block | {c: random.uniform(10, 100, len(asset)) for c in columns})


def one_portfolio(names: list[str]) -> PortfolioConfiguration:
    """It holds two assets; its price source interpolates all."""
    config = InterpolatedPricesConfig(
        source_price_instance=APIDataNode.build_from_identifier("ExternalPricesTS"),
        upsample_frequency_id="1d",
        intraday_bar_interpolation_rule="ffill",
        asset_list=tuple(names),
    )
    weights = BacktestingWeightsConfig(
        signal_weights_instance=FixedWeights.from_signal_configuration(weights={names[0]: 0.5, names[1]: 0.5}),
        rebalance_strategy_instance=ImmediateSignal(calendar_key=demo.CALENDAR, rebalance_on="quarter_end"),
    )
    build = PortfolioBuildConfiguration(
        price_source_instance=InterpolatedPrices(interpolation_config=config), backtesting_weights_configuration=weights
    )
    markets = PortfolioMarketsConfig(portfolio_identifier="benchmark")
    return PortfolioConfiguration(portfolio_build_configuration=build, portfolio_markets_configuration=markets)


def timed(engine: Engine, portfolio: PortfolioConfiguration) -> tuple[RunReport, float]:
    started = time.perf_counter()
    report = run_fleet(engine, [portfolio], LocalExecutor(), datetime(2023, 1, 31, tzinfo=UTC))
    assert report.status == "landed", report.failures()[:3]
    return report, time.perf_counter() - started


def night(engine: Engine, names: list[str], portfolio: PortfolioConfiguration, close: np.ndarray) -> tuple[float, int, int]:
    """(seconds, statements, rows) of one more session."""
    load(engine, names, close, gaps=0.0)
    with counted_statements() as sent:
        report, seconds = timed(engine, portfolio)
    return seconds, len(sent), sum(r.rows for r in report.results if r.kind == "prices")


def storage() -> type[InterpolatedPricesStorage]:
    return InterpolatedPricesStorage.configured(ExternalPricesStorage.storage_uid(), "1d", "1d", "ffill")


def empty(engine: Engine) -> None:
    """As if nothing had been computed yet."""
    tables = ", ".join(t.__tablename__ for t in (storage(), PortfoliosStorage, PortfolioWeightsStorage, SignalWeightsStorage))
    with engine.begin() as connection:
        connection.exec_driver_sql(f"TRUNCATE {tables}")
        connection.exec_driver_sql("UPDATE msm__data_node_update SET watermark = NULL, row_count = 0, configuration_hash = NULL")
        connection.exec_driver_sql("UPDATE msm__data_node_update SET code_version = NULL, input_digest = NULL")


def pure_copy(engine: Engine) -> float:
    """Seconds of a COPY of the stored rows, in key order, into an empty table like theirs."""
    table = storage().__tablename__
    with engine.begin() as connection:  # a transaction of its own: into a table of the same one, a COPY may go without WAL
        connection.exec_driver_sql(f"CREATE TABLE IF NOT EXISTS pure_copy (LIKE {table} INCLUDING ALL)")
        connection.exec_driver_sql("TRUNCATE pure_copy")
    with engine.begin() as connection, tempfile.TemporaryFile() as file:
        source = sql.SQL("COPY (SELECT * FROM {} ORDER BY asset_identifier, time_index) TO STDOUT (FORMAT BINARY)")
        with driver_connection(connection).cursor() as cursor:
            with cursor.copy(source.format(sql.Identifier(table))) as copy:
                for data in copy:
                    file.write(data)
            file.seek(0)
            started = time.perf_counter()
            with cursor.copy("COPY pure_copy FROM STDIN (FORMAT BINARY)") as copy:
                while data := file.read(CHUNK_BYTES):
                    copy.write(data)
        connection.commit()
        return time.perf_counter() - started


if __name__ == "__main__":
    main()
