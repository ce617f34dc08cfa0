"""A first load of portfolio_weights into each physical layout, a first run of a whole fleet, and one more session of 1 000 portfolios.

python benchmarks/first_load.py [--quick] [--replica]

Two processes own half of the portfolios each: 2 500 sessions x 50 assets per portfolio, in key order, one transaction per portfolio.
`keyed` is what `prepare` makes; `deferred_*` is loaded without the key, which is then built (work memory of maintenance, parallel
workers), and counts both; `yearly` has the key and a partition per year; `created` makes a table per writer in the loading transaction,
which no run may do. The fleet is 20 stocks traded every session, by two Ray workers (--quick: in one process), everything included.
Every figure is the median of three rounds, in which the layouts take turns; a ratio is the time of `keyed` over that of the layout:
above 1 the layout is faster.

The server is the embedded one with its own settings; with --replica, wal_level and synchronous_commit are what a server of your own
most likely has: both change what writing a key costs.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime
from multiprocessing.connection import Connection as Pipe

import numpy as np
from common import emit, point_at, register, server, starting
from sqlalchemy import Connection, Engine, MetaData
from sqlalchemy.schema import CreateTable

from msm_core import embedded
from msm_core.configuration import (
    BacktestingWeightsConfig,
    PortfolioBuildConfiguration,
    PortfolioConfiguration,
    PortfolioMarketsConfig,
)
from msm_core.copying import Block, Text, copy_in
from msm_core.data_nodes.prices import APIDataNode
from msm_core.database import get_engine
from msm_core.models import DataNodeUpdateTable, PortfoliosStorage, PortfolioWeightsStorage, SignalWeightsStorage
from msm_core.rebalance_strategy import ImmediateSignal
from msm_core.signals import EqualWeights
from msm_ray import demo, prepare
from msm_ray.executors import make_executor
from msm_ray.run import run_fleet

WEIGHTS, PROGRESS = PortfolioWeightsStorage.__tablename__, DataNodeUpdateTable.__tablename__
WRITERS, ROUNDS = 2, 3
SESSIONS, ASSETS = 2_500, 50
FIRST, LAST = np.datetime64("2016-01-04T21:00", "us"), np.datetime64("2025-12-31T21:00", "us")
YEARS = range(1994, 2028)  # of which the load fills ten: as many partitions as a long history has
KEY = "(portfolio_identifier, time_index, asset_identifier)"
BUILDS = {"64MB_0": ("64MB", 0), "1GB_0": ("1GB", 0), "64MB_2": ("64MB", 2), "1GB_2": ("1GB", 2)}
NIGHT_PORTFOLIOS = 1_000
REPLICA = ("wal_level=replica", "max_wal_senders=10", "synchronous_commit=on")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under 60 seconds, smaller")
    parser.add_argument("--replica", action="store_true", help="wal_level=replica, synchronous_commit=on")
    arguments = parser.parse_args()
    if arguments.replica:
        embedded.SETTINGS.extend(REPLICA)  # the last one wins
    portfolios, history = (4, 4) if arguments.quick else (32, 80)
    builds = {name: BUILDS[name] for name in (("64MB_0", "1GB_2") if arguments.quick else BUILDS)}
    began = time.perf_counter()
    with server() as fresh:
        fleets = first_runs(fresh, arguments.quick)
        engine = get_engine()
        with writers() as write:
            loads = first_loads(engine, write, portfolios, builds)
        nights = nightly(engine, history)
    rows = portfolios * SESSIONS * ASSETS
    emit(
        {
            "rows": rows,
            "wal_level": "replica" if arguments.replica else "minimal",
            "keyed_rows_per_second": round(rows / loads["keyed"]),
            "seconds": {name: round(found, 2) for name, found in loads.items()},
            "ratio": ratios(loads),
            "fleet_seconds": {name: round(found, 2) for name, found in fleets.items()},
            "fleet_ratio": ratios(fleets),
            "night_seconds": {name: round(found, 3) for name, found in nights.items()},
            "night_ratio": ratios(nights),
            "took": round(time.perf_counter() - began, 1),
        }
    )


def ratios(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(seconds["keyed"] / found, 2) for name, found in seconds.items()}


# -- layouts ------------------------------------------------------------------------------------------------------------------


def create(connection: Connection, name: str, keyed: bool = True) -> None:
    """A table like portfolio_weights, checks included."""
    table = PortfolioWeightsStorage.__table__.to_metadata(MetaData(), name=name)  # type: ignore[attr-defined] - a Table
    table.primary_key.name = f"pk_{name}"
    connection.exec_driver_sql(f"DROP TABLE IF EXISTS {name}")
    connection.execute(CreateTable(table))
    connection.exec_driver_sql(f"ALTER TABLE {name} DROP CONSTRAINT pk_{name}") if not keyed else None


def create_yearly(connection: Connection, name: str) -> None:
    create(connection, f"{name}_like")
    connection.exec_driver_sql(f"DROP TABLE IF EXISTS {name}")
    connection.exec_driver_sql(f"CREATE TABLE {name} (LIKE {name}_like INCLUDING ALL) PARTITION BY RANGE (time_index)")
    connection.exec_driver_sql(f"CREATE TABLE {name}_rest PARTITION OF {name} DEFAULT")
    for year in YEARS:
        bounds = f"FROM ('{year}-01-01 00:00Z') TO ('{year + 1}-01-01 00:00Z')"
        connection.exec_driver_sql(f"CREATE TABLE {name}_{year} PARTITION OF {name} FOR VALUES {bounds}")


def build_key(connection: Connection, name: str, memory: str, workers: int) -> None:
    connection.exec_driver_sql(f"SET LOCAL maintenance_work_mem = '{memory}'")
    connection.exec_driver_sql(f"SET LOCAL max_parallel_maintenance_workers = {workers}")
    connection.exec_driver_sql(f"ALTER TABLE {name} ADD CONSTRAINT pk_{name} PRIMARY KEY {KEY}")


# -- writers ------------------------------------------------------------------------------------------------------------------

Job = tuple[Sequence[str], Sequence[str], bool]  # tables, identifiers, whether the writer makes a table of its own
Write = Callable[[Sequence[Job]], float]


@contextmanager
def writers() -> Iterator[Write]:
    """Processes that wait for work; calling the value gives one job to each and returns the seconds until all are done."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(WRITERS)]
    processes = [context.Process(target=_writer, args=(far,), daemon=True) for _, far in pipes]
    for process in processes:
        process.start()
    for near, _ in pipes:
        near.recv()  # it is connected and has its rows

    def write(jobs: Sequence[Job]) -> float:
        started = time.perf_counter()
        for (near, _), job in zip(pipes, jobs, strict=True):
            near.send(job)
        for near, _ in pipes:
            near.recv()
        return time.perf_counter() - started

    yield write
    for process in processes:
        process.terminate()
        process.join()


def _writer(pipe: Pipe) -> None:
    engine = get_engine()
    block = rows_of(grid(SESSIONS), ["any"])
    with engine.connect():
        pipe.send(None)
    while True:
        (table,), identifiers, own = pipe.recv()
        if own:
            with engine.begin() as connection:
                create(connection, table)
                for identifier in identifiers:
                    copy_in(connection, table, named(block, [identifier]))
        else:
            for identifier in identifiers:
                with engine.begin() as connection:
                    copy_in(connection, table, named(block, [identifier]))
        pipe.send(None)


def grid(sessions: int) -> np.ndarray:
    """Session closes, evenly over the ten years."""
    return FIRST + (LAST - FIRST) * np.arange(sessions) // sessions


def rows_of(times: np.ndarray, identifiers: Sequence[str]) -> Block:
    """Weights of 50 assets at each time for each portfolio, in key order. Text keys of a usual length."""
    days, count = len(times), len(identifiers)
    rows = days * ASSETS * count
    values = np.random.default_rng(1).uniform(0.001, 0.04, (5, rows))
    assets = tuple(f"US{1000 + i}-EQ" for i in range(ASSETS))
    return {
        "portfolio_identifier": Text(np.repeat(np.arange(count), days * ASSETS), tuple(identifiers)),
        "time_index": np.tile(np.repeat(times, ASSETS), count),
        "asset_identifier": Text(np.tile(np.arange(ASSETS), days * count), assets),
        "weight": values[0],
        "weight_before": values[1],
        "price_current": values[2] * 1e4,
        "price_before": values[3] * 1e4,
        "volume_current": values[4] * 1e7,
        "volume_before": values[0] * 1e7,
    }


def named(block: Block, identifiers: Sequence[str]) -> Block:
    """The same rows of other portfolios."""
    names = block["portfolio_identifier"]
    assert isinstance(names, Text)
    return {**block, "portfolio_identifier": Text(names.codes, tuple(identifiers))}


def portfolio_names(count: int) -> list[str]:
    return [f"equal-weights-large-caps-{i:05}" for i in range(count)]


# -- measurements -------------------------------------------------------------------------------------------------------------


def first_loads(engine: Engine, write: Write, portfolios: int, builds: Mapping[str, tuple[str, int]]) -> dict[str, float]:
    """Median seconds of a first load per layout."""
    names = portfolio_names(portfolios)
    shares = [names[i::WRITERS] for i in range(WRITERS)]
    seconds: dict[str, list[float]] = {}

    def note(layout: str, taken: float) -> None:
        seconds.setdefault(layout, []).append(taken)
        print(f"{layout:16} {taken:8.2f} s", file=sys.stderr)

    for _ in range(ROUNDS):
        for layout in ("keyed", "keyless", "yearly", "created"):
            with engine.begin() as connection:
                create_yearly(connection, "loaded") if layout == "yearly" else create(connection, "loaded", layout == "keyed")
            _run_sql(engine, "CHECKPOINT")  # a layout does not pay for the one before it
            tables = [f"loaded_{i}" if layout == "created" else "loaded" for i in range(WRITERS)]
            taken = write([((table,), share, layout == "created") for table, share in zip(tables, shares, strict=True)])
            note(layout, taken)
            if layout == "keyless":
                for build, (memory, workers) in builds.items():
                    note(f"deferred_{build}", taken + _build_seconds(engine, memory, workers))
            with engine.begin() as connection:
                for table in {*tables, "loaded", "loaded_like"}:
                    connection.exec_driver_sql(f"DROP TABLE IF EXISTS {table} CASCADE")
    return {layout: statistics.median(found) for layout, found in seconds.items()}


def _build_seconds(engine: Engine, memory: str, workers: int) -> float:
    """Seconds to build the key; it is taken off again."""
    _run_sql(engine, "CHECKPOINT")
    with engine.begin() as connection:
        started = time.perf_counter()
        build_key(connection, "loaded", memory, workers)
        taken = time.perf_counter() - started
        connection.exec_driver_sql("ALTER TABLE loaded DROP CONSTRAINT pk_loaded")
    return taken


def first_runs(fresh: Callable[[], Engine], quick: bool) -> dict[str, float]:
    """Median seconds of a fleet's first run per layout: plan, prices, signal, kernel, weights and values; `deferred` builds the key too."""
    engines = {"yearly": fresh(), "keyed": fresh()}  # the last one is what workers find from here on
    engines["deferred"] = engines["keyed"]
    prepare.lay_out(engines["yearly"], yearly=True)
    first = date(2015, 1, 2) if quick else date(1990, 1, 2)
    configurations = starting(daily(2 if quick else 24), first)
    early = datetime(first.year, 1, 10, tzinfo=UTC)
    seconds: dict[str, list[float]] = {"keyed": [], "deferred": [], "yearly": []}
    key = f"CONSTRAINT pk_{WEIGHTS}"
    for engine in (engines["yearly"], engines["keyed"]):
        register(engine, configurations)
    for _ in range(ROUNDS):
        for layout, found in seconds.items():
            engine = engines[layout]
            point_at(engine)
            statements = [f"TRUNCATE {WEIGHTS}, {PortfoliosStorage.__tablename__}, {SignalWeightsStorage.__tablename__}", "CHECKPOINT"]
            _run_sql(engine, *statements, f"UPDATE {PROGRESS} SET watermark = NULL, epoch = 0, row_count = 0")
            _run_sql(engine, f"ALTER TABLE {WEIGHTS} DROP {key}") if layout == "deferred" else None
            executor = make_executor("local" if quick else "ray", workers=WRITERS)
            run_fleet(engine, configurations[:1], executor, early)  # the workers are there, and have the modules
            started = time.perf_counter()
            report = run_fleet(engine, configurations, executor, demo.AS_OF)
            _run_sql(engine, f"ALTER TABLE {WEIGHTS} ADD {key} PRIMARY KEY {KEY}") if layout == "deferred" else None
            found.append(time.perf_counter() - started)
            executor.close()
            assert report.counts()["landed"] == len(configurations), report.failures()[:1]
            print(f"fleet {layout:10} {found[-1]:8.2f} s, {report.rows_written} rows", file=sys.stderr)
    return {layout: statistics.median(found) for layout, found in seconds.items()}


def daily(count: int) -> list[PortfolioConfiguration]:
    """Portfolios that hold all 20 stocks in equal parts and trade every session."""
    source = APIDataNode.build_from_identifier("ExternalPricesTS")
    weights = BacktestingWeightsConfig(
        signal_weights_instance=EqualWeights(asset_list=tuple(sorted(demo.prices().columns))),
        rebalance_strategy_instance=ImmediateSignal(calendar_key=demo.CALENDAR, rebalance_on="every_session"),
    )
    build = PortfolioBuildConfiguration(price_source_instance=source, backtesting_weights_configuration=weights)
    return [
        PortfolioConfiguration(
            portfolio_build_configuration=build, portfolio_markets_configuration=PortfolioMarketsConfig(portfolio_identifier=name)
        )
        for name in portfolio_names(count)
    ]


def _run_sql(engine: Engine, *statements: str) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def nightly(engine: Engine, history: int) -> dict[str, float]:
    """Median seconds of one session of 1 000 portfolios on top of `history` sessions, in transactions of 250 portfolios."""
    names = portfolio_names(NIGHT_PORTFOLIOS)
    layouts = ("keyed", "deferred", "yearly")
    for layout in layouts:
        with engine.begin() as connection:
            create_yearly(connection, layout) if layout == "yearly" else create(connection, layout, layout == "keyed")
        for start in range(0, len(names), 100):
            with engine.begin() as connection:
                copy_in(connection, layout, rows_of(grid(history), names[start : start + 100]))
        if layout == "deferred":
            with engine.begin() as connection:
                build_key(connection, layout, *BUILDS["1GB_0"])
    seconds: dict[str, list[float]] = {layout: [] for layout in layouts}
    for night in range(ROUNDS + 1):
        for layout in layouts:
            blocks = [rows_of(np.array([LAST + np.timedelta64(night + 1, "D")]), names[s : s + 250]) for s in range(0, len(names), 250)]
            _run_sql(engine, "CHECKPOINT")
            started = time.perf_counter()
            for block in blocks:
                with engine.begin() as connection:
                    copy_in(connection, layout, block)
            if night:  # the first fills caches, and splits the full pages of a key that was built in one go
                seconds[layout].append(time.perf_counter() - started)
    return {layout: statistics.median(found) for layout, found in seconds.items()}


if __name__ == "__main__":
    main()
