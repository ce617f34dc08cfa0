"""Helpers of the database tests: a market to trade, portfolios, runs by the local road, and what a run left in the database.

What is loaded and what is read back goes through plain SQL, not through the code under test. Sessions are weekdays, 14:30 to 21:00
UTC, so that a bar of a session is stamped 21:00 and a week ends on a Friday.
"""

import hashlib
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal

import numpy as np
import pandas as pd
import psycopg
import pytest
from pydantic import AwareDatetime
from sqlalchemy import Engine

from msm_core.configuration import (
    BacktestingWeightsConfig,
    CashRate,
    PortfolioBuildConfiguration,
    PortfolioConfiguration,
    PortfolioExecutionConfiguration,
    PortfolioMarketsConfig,
    PriceAlignmentPolicy,
)
from msm_core.data_nodes.prices import APIDataNode
from msm_core.data_nodes.registration import register_portfolios
from msm_core.data_nodes.world import read_world
from msm_core.database import transaction
from msm_core.frames import Times, utc
from msm_core.models import ExternalPricesStorage, PortfoliosStorage, PortfolioWeightsStorage, SignalWeightsStorage
from msm_core.price_sources import PriceSource
from msm_core.rebalance_strategy import ImmediateSignal, RebalanceStrategy
from msm_core.signals import SIGNALS, EqualWeights, FixedWeights, Signal, Vectors
from msm_core.signals.base import NOTHING, Inputs
from msm_ray.executors import Executor, LocalExecutor
from msm_ray.plan import Plan, make_plan
from msm_ray.run import Options, RunReport, run_fleet

CALENDAR = "WEEKDAYS"
PRICES = ExternalPricesStorage.__tablename__
OUTPUTS = (SignalWeightsStorage.__tablename__, PortfolioWeightsStorage.__tablename__, PortfoliosStorage.__tablename__)
PROGRESS = "msm__data_node_update"


# -- plain SQL ----------------------------------------------------------------------------------------------------------------


@contextmanager
def rival(engine: Engine, **options: Any) -> Iterator[psycopg.Connection[Any]]:
    """A connection of somebody else's, outside the pool; commits at its end."""
    url = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url, **options) as connection:
        connection.execute("SET TIME ZONE 'UTC'")
        yield connection


def sql(engine: Engine, query: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
    """Run one query in a transaction of its own; returns its rows, if it has any."""
    with rival(engine) as connection:
        cursor = connection.execute(query, parameters or None)  # type: ignore[arg-type]
        return cursor.fetchall() if cursor.description else []


def frame(engine: Engine, query: str, parameters: Sequence[Any] = ()) -> pd.DataFrame:
    with rival(engine) as connection:
        cursor = connection.execute(query, parameters or None)  # type: ignore[arg-type]
        return pd.DataFrame(cursor.fetchall(), columns=[c.name for c in cursor.description or ()])


# -- a market -----------------------------------------------------------------------------------------------------------------


def closes_of(first: str, count: int) -> pd.DatetimeIndex:
    """Closing instants of `count` weekday sessions."""
    return pd.bdate_range(first, periods=count, tz="UTC") + pd.Timedelta(hours=21)


def walks(first: str, count: int, assets: Sequence[str], seed: int = 1) -> pd.DataFrame:
    """Random prices, (count, N), that no two assets share."""
    steps = np.random.default_rng(seed).normal(0.0003, 0.02, (count, len(assets)))
    return pd.DataFrame(100 * np.exp(np.cumsum(steps, axis=0)), closes_of(first, count), list(assets))


def store_calendar(engine: Engine, first: str = "2024-01-01", last: str = "2024-12-31", key: str = CALENDAR) -> uuid.UUID:
    """A calendar of all weekdays, both dates included."""
    uid = uuid.uuid4()
    with rival(engine) as connection:
        connection.execute(
            "INSERT INTO msm__calendar (uid, unique_identifier, display_name, calendar_type, valid_from, valid_to) "
            "VALUES (%s, %s, 'weekdays', 'CUSTOM', %s, %s)",
            (uid, key, first, last),
        )
        connection.execute(
            "INSERT INTO msm__calendar_session (uid, calendar_uid, local_date, opens_at, closes_at) "
            "SELECT gen_random_uuid(), %s, d::date, (d + interval '14:30') AT TIME ZONE 'UTC', (d + interval '21:00') AT TIME ZONE 'UTC' "
            "FROM generate_series(%s::timestamp, %s::timestamp, '1 day') d WHERE extract(isodow FROM d) < 6",
            (uid, first, last),
        )
    return uid


def register_assets(engine: Engine, assets: Iterable[str]) -> None:
    sql(
        engine,
        "INSERT INTO msm__asset (uid, unique_identifier) SELECT gen_random_uuid(), a FROM unnest(%s::text[]) a ON CONFLICT DO NOTHING",
        (list(assets),),
    )


def load_prices(engine: Engine, closes: pd.DataFrame, table: str = PRICES, **columns: pd.DataFrame) -> None:
    """Publish prices, (T, N) with a UTC index; further columns by name. A missing close is no row; rows that exist are corrected."""
    given = {"close": closes, **columns}
    names = list(given)
    long = pd.concat({name: table_.stack() for name, table_ in given.items()}, axis=1).dropna(subset=["close"])
    rows = [(time, asset, *values) for (time, asset), values in zip(long.index, long.to_numpy(), strict=True)]
    with rival(engine) as connection, connection.cursor() as cursor:
        cursor.execute("CREATE TEMP TABLE loaded (t timestamptz, a text, {})".format(", ".join(f"{n} float8" for n in names)))
        with cursor.copy("COPY loaded FROM STDIN") as copy:
            for time, asset, *values in rows:
                copy.write_row((time.to_pydatetime(), asset, *(None if np.isnan(v) else v for v in values)))
        changed = ", ".join(f"{n} = EXCLUDED.{n}" for n in names)
        listed = ", ".join(names)
        cursor.execute(
            f"INSERT INTO {table} (time_index, asset_identifier, {listed}) SELECT t, a, {listed} FROM loaded "
            f"ON CONFLICT (asset_identifier, time_index) DO UPDATE SET {changed}"
        )


def open_market(engine: Engine, closes: pd.DataFrame, **columns: pd.DataFrame) -> pd.DataFrame:
    """A calendar for 2024, the assets and their prices; returns the closes."""
    store_calendar(engine)
    register_assets(engine, closes.columns)
    load_prices(engine, closes, **columns)
    return closes


# -- portfolios ---------------------------------------------------------------------------------------------------------------


class Scheduled(Signal):
    """Vectors written down by the test, each (time, {asset: weight}); `broken` makes every emission fail."""

    kind: Literal["scheduled"] = "scheduled"
    vectors: tuple[tuple[AwareDatetime, dict[str, float]], ...]
    fill: timedelta | None = None
    more_assets: tuple[str, ...] = ()
    broken: bool = False

    @property
    def universe(self) -> tuple[str, ...]:
        return tuple(sorted({*self.more_assets, *(asset for _, vector in self.vectors for asset in vector)}))

    @property
    def maximum_forward_fill(self) -> np.timedelta64 | None:
        return None if self.fill is None else np.timedelta64(self.fill)

    def emit(self, since: np.datetime64 | None, through: np.datetime64, inputs: Inputs = NOTHING) -> Vectors:
        if self.broken:
            raise RuntimeError("this signal is broken on purpose")
        due = [(utc(t, "t"), v) for t, v in sorted(self.vectors, key=lambda pair: pair[0])]
        due = [(t, v) for t, v in due if t <= through and (since is None or t > since)]
        weights = [[vector.get(asset, 0.0) for asset in self.universe] for _, vector in due]
        times: Times = np.array([t for t, _ in due], "datetime64[us]")
        return Vectors(times, self.universe, np.array(weights, float).reshape(len(due), len(self.universe)))


@pytest.fixture(autouse=True)
def scheduled() -> Iterator[None]:
    """The kind `scheduled` is known to this test module only: `scheduled = factories.scheduled`."""
    SIGNALS.register(Scheduled)
    yield
    del SIGNALS.classes["scheduled"]


def schedule(*vectors: tuple[Any, Mapping[str, float]], **options: Any) -> Scheduled:
    """`schedule(("2024-01-03 21:00Z", {"A": 1.0}), ...)`."""
    return Scheduled(vectors=tuple((pd.Timestamp(t).to_pydatetime(), dict(v)) for t, v in vectors), **options)


def fixed(**weights: float) -> FixedWeights:
    return FixedWeights.from_signal_configuration(weights=weights)


def equal(*assets: str, **options: Any) -> EqualWeights:
    return EqualWeights(asset_list=assets, **options)


def portfolio(
    identifier: str,
    signal: Signal,
    *,
    fee: float = 0.00018,
    accounting: Literal["drifted", "target"] = "drifted",
    on: Any = "every_session",
    lag: int = 0,
    calendar: str = CALENDAR,
    source: uuid.UUID | None = None,
    column: str = "close",
    start_date: date | None = None,
    staleness: timedelta = timedelta(0),
    missing: Literal["fail", "hold"] = "fail",
    index: str | None = None,
    prices: PriceSource | None = None,
    rebalance: RebalanceStrategy | None = None,
    cash_rate: CashRate | None = None,
    frequency: str = "1d",
    **display: Any,
) -> PortfolioConfiguration:
    """`prices` instead of `source`, `rebalance` instead of an immediate strategy of `calendar`, `on` and `lag`."""
    return PortfolioConfiguration(
        portfolio_build_configuration=PortfolioBuildConfiguration(
            price_source_instance=prices or APIDataNode(time_index_meta_table_uid=source or ExternalPricesStorage.storage_uid()),
            price_column=column,
            portfolio_prices_frequency=frequency,
            start_date=start_date,
            price_alignment_policy=PriceAlignmentPolicy(maximum_staleness=staleness, missing=missing),
            execution_configuration=PortfolioExecutionConfiguration(commission_fee=fee, weight_accounting=accounting, cash_rate=cash_rate),
            backtesting_weights_configuration=BacktestingWeightsConfig(
                signal_weights_instance=signal,
                rebalance_strategy_instance=rebalance or ImmediateSignal(calendar_key=calendar, rebalance_on=on, execution_lag=lag),
            ),
        ),
        portfolio_markets_configuration=PortfolioMarketsConfig(
            portfolio_identifier=identifier, portfolio_index_identifier=index, **display
        ),
    )


def fleet(assets: Sequence[str], count: int) -> list[PortfolioConfiguration]:
    """Portfolios of every sort: both accountings, every rebalance_on, lags 0..2, equal, fixed (short and cash) and scheduled signals."""
    generator = np.random.default_rng(7)
    rebalances = ("every_session", "signal_change", "week_end", "month_end", "quarter_end")
    times = closes_of("2024-01-10", 12)[::3]
    signals: list[Signal] = [
        equal(*assets),
        equal(*assets[:-2]),
        fixed(**{a: float(w) for a, w in zip(assets, generator.normal(0.1, 0.1, len(assets)), strict=True)}),
        schedule(*((t, {a: float(w) for a, w in zip(assets, generator.uniform(0, 0.1, len(assets)), strict=True)}) for t in times)),
        schedule(*((t, dict.fromkeys(assets[i : i + 5], 1 / 5)) for i, t in enumerate(times)), fill=timedelta(days=60)),
    ]
    return [
        portfolio(
            f"p{i:03}",
            signals[i % 5],
            accounting=("drifted", "target")[i % 2],
            on=rebalances[(i // 2) % 5],
            lag=i % 3,
            fee=0.0005 * (i % 4),
        )
        for i in range(count)
    ]


# -- runs ---------------------------------------------------------------------------------------------------------------------


def instant(text: Any) -> datetime:
    """`2024-01-05` or `2024-01-05 21:00` as a UTC instant."""
    time = pd.Timestamp(text)
    return (time.tz_localize("UTC") if time.tzinfo is None else time).tz_convert("UTC").to_pydatetime().replace(tzinfo=UTC)


def register(engine: Engine, configurations: Sequence[PortfolioConfiguration]) -> int:
    with engine.begin() as connection:
        return register_portfolios(connection, configurations)


def run(
    engine: Engine,
    configurations: Sequence[PortfolioConfiguration],
    as_of: Any,
    *,
    executor: Executor | None = None,
    registered: bool = False,
    **options: Any,
) -> RunReport:
    """Register, then run by the local road."""
    if not registered:
        register(engine, configurations)
    return run_fleet(engine, configurations, executor or LocalExecutor(), instant(as_of), Options(**options))


def plan(engine: Engine, configurations: Sequence[PortfolioConfiguration], as_of: Any, **options: Any) -> Plan:
    with transaction(engine, read_only=True) as connection:
        world = read_world(connection, configurations, instant(as_of))
    return make_plan(configurations, world, instant(as_of), **options)


def statuses(report: RunReport, kind: str = "portfolio") -> dict[str, str]:
    return {r.identifier: r.status for r in report.results if r.kind == kind}


def messages(report: RunReport) -> dict[str, str]:
    """Error text per node that has one."""
    return {r.identifier: r.error["message"] for r in report.results if r.error}


# -- what a run left ----------------------------------------------------------------------------------------------------------


def dump(engine: Engine) -> dict[str, tuple[int, str]]:
    """(rows, digest) of each output table, whatever the order of rows. Equal digests mean equal bits: Postgres prints a float8 exactly."""
    return _digests(engine, OUTPUTS, "t::text")


def versions(engine: Engine, tables: Sequence[str] = ()) -> dict[str, tuple[int, str]]:
    """As `dump`, of all or some tables, with the transaction that wrote each row: the same before and after = nothing was written."""
    every = "SELECT tablename::text FROM pg_tables WHERE schemaname = 'public'"
    return _digests(engine, tables or sorted(name for (name,) in sql(engine, every)), "xmin::text || t::text")


def _digests(engine: Engine, tables: Sequence[str], row: str) -> dict[str, tuple[int, str]]:
    found = {}
    with rival(engine) as connection:
        for table in tables:
            query = f'SELECT {row} FROM "{table}" t'
            rows = sorted(text for (text,) in connection.execute(query).fetchall())  # type: ignore[arg-type]
            found[table] = (len(rows), hashlib.sha256("\n".join(rows).encode()).hexdigest())
    return found


def values(engine: Engine, identifier: str) -> pd.DataFrame:
    """close, return and calculated_close by time."""
    query = f'SELECT time_index, close, "return", calculated_close FROM {OUTPUTS[2]} WHERE portfolio_identifier = %s ORDER BY 1'
    return frame(engine, query, (identifier,)).set_index("time_index")


def weights(engine: Engine, identifier: str) -> pd.DataFrame:
    """Rows of the weights storage by (time, asset)."""
    query = f"SELECT * FROM {OUTPUTS[1]} WHERE portfolio_identifier = %s ORDER BY time_index, asset_identifier"
    return frame(engine, query, (identifier,)).set_index(["time_index", "asset_identifier"]).drop(columns="portfolio_identifier")


def progress(engine: Engine) -> dict[tuple[str, str], dict[str, Any]]:
    """Progress rows by (storage, scope)."""
    rows = frame(engine, f"SELECT * FROM {PROGRESS}").to_dict("records")
    return {(row["storage"], row["scope"]): row for row in rows}


def relations(engine: Engine) -> list[tuple[Any, ...]]:
    """Every table, index, sequence and view, with its physical identity."""
    return sql(engine, "SELECT oid, relname, relkind, relfilenode FROM pg_class WHERE relnamespace = 'public'::regnamespace ORDER BY 1")


@contextmanager
def statements() -> Iterator[list[str]]:
    """`with statements() as sent:` collects every SQL statement and COPY that psycopg sends, whoever sends it."""
    sent: list[str] = []
    cursor = psycopg.Cursor
    originals = {name: getattr(cursor, name) for name in ("execute", "executemany", "copy")}

    def recorded(name: str) -> Any:
        def call(self: psycopg.Cursor[Any], query: Any, *args: Any, **options: Any) -> Any:
            sent.append(query.as_string(self.connection) if hasattr(query, "as_string") else str(query))
            return originals[name](self, query, *args, **options)

        return call

    for name in originals:
        setattr(cursor, name, recorded(name))
    try:
        yield sent
    finally:
        for name, original in originals.items():
            setattr(cursor, name, original)
