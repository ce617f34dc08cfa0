"""Fleets of every kind of signal, and their market: helpers of the database tests of signals, orders and dependencies."""

from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sqlalchemy import Engine

from msm_core.alignment import PriceAlignmentPolicy
from msm_core.configuration import PortfolioConfiguration
from msm_core.data_nodes.prices import APIDataNode
from msm_core.identity import storage_uid
from msm_core.models import ExternalPricesStorage, PortfolioRebalanceStateStorage
from msm_core.signals import InverseVolatility, MarketCap, Momentum, PortfolioReplicator
from msm_core.signals.external_weights import ExternalWeights
from msm_core.signals.portfolio_replicator import TrackedSeries
from msm_ray.run import RunReport
from tests import factories
from tests.factories import CALENDAR, portfolio, sql

NINE = tuple(f"a{i}" for i in range(9))
BENCH = "bench"
DAILY = APIDataNode(time_index_meta_table_uid=ExternalPricesStorage.storage_uid())
ORDERS = PortfolioRebalanceStateStorage.__tablename__
SEEN: dict[str, Any] = {"asset_list": NINE, "calendar_key": CALENDAR, "price_source": DAILY}  # what every computed signal is given
END = "2024-12-30"


@pytest.fixture(autouse=True)
def strangers(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tables that a test made go with it, so that its database can be lent again: `strangers = mixed.strangers`."""
    engine: Engine | None = request.getfixturevalue("engine") if "engine" in request.fixturenames else None
    yield
    if engine is not None:
        made = sql(engine, "SELECT quote_ident(tablename) FROM pg_tables WHERE schemaname = 'public' AND tablename NOT LIKE 'msm%'")
        for (table,) in made:
            sql(engine, f"DROP TABLE {table} CASCADE")


# -- sources ------------------------------------------------------------------------------------------------------------------


def register_table(engine: Engine, table: str, **columns: pd.DataFrame) -> APIDataNode:
    """Anyone's table of that name, in the catalogue, with columns of numbers (T, N) each."""
    uid = storage_uid(table)
    key = "asset_identifier text, time_index timestamptz, PRIMARY KEY (asset_identifier, time_index)"
    sql(engine, f"CREATE TABLE IF NOT EXISTS {table} ({key}, {', '.join(f'{name} float8' for name in columns)})")
    sql(
        engine,
        "INSERT INTO msm__time_index_meta_table (uid, identifier, physical_table_name, kind, time_label, cadence, schema_fingerprint) "
        "VALUES (%s, %s, %s, 'prices', 'close', '1d', 'x') ON CONFLICT DO NOTHING",
        (uid, table, table),
    )
    load_table(engine, table, **columns)
    return APIDataNode(time_index_meta_table_uid=uid)


def load_table(engine: Engine, table: str, **columns: pd.DataFrame) -> None:
    """More rows of it; where the first column has no number there is no row."""
    names = list(columns)
    long = pd.concat({name: frame.stack() for name, frame in columns.items()}, axis=1).dropna(subset=[names[0]])
    rows = [(asset, time.to_pydatetime(), *map(float, values)) for (time, asset), values in zip(long.index, long.to_numpy(), strict=True)]
    with factories.rival(engine) as connection, connection.cursor() as cursor:
        marks = ", ".join(["%s"] * (2 + len(names)))
        cursor.executemany(f"INSERT INTO {table} (asset_identifier, time_index, {', '.join(names)}) VALUES ({marks})", rows)  # type: ignore[arg-type]


def volumes(closes: pd.DataFrame, seed: int = 2) -> pd.DataFrame:
    """Random volumes, some of them 0."""
    random = np.random.default_rng(seed)
    drawn = random.uniform(1e4, 1e6, closes.shape) * (random.random(closes.shape) > 0.05)
    return pd.DataFrame(drawn, closes.index, closes.columns)


def always_open(engine: Engine, key: str = "ALWAYS") -> str:
    """A calendar of every day of 2024, midnight to midnight UTC."""
    factories.store_calendar(engine, key=key)
    sql(
        engine,
        "DELETE FROM msm__calendar_session s USING msm__calendar c WHERE c.uid = s.calendar_uid AND c.unique_identifier = %s",
        (key,),
    )
    sql(
        engine,
        "INSERT INTO msm__calendar_session (uid, calendar_uid, local_date, opens_at, closes_at) "
        "SELECT gen_random_uuid(), c.uid, d::date, d AT TIME ZONE 'UTC', (d + interval '1 day') AT TIME ZONE 'UTC' "
        "FROM msm__calendar c, generate_series('2024-01-01'::timestamp, '2024-12-31', '1 day') d WHERE c.unique_identifier = %s",
        (key,),
    )
    return key


# -- signals ------------------------------------------------------------------------------------------------------------------


def inverse(window: int = 5, **options: Any) -> InverseVolatility:
    return InverseVolatility(window_sessions=window, **SEEN | options)


def momentum(**options: Any) -> Momentum:
    return Momentum(**SEEN | {"lookback_sessions": 7, "skip_sessions": 2, "top_assets": 3} | options)


def market_cap(caps: APIDataNode, **options: Any) -> MarketCap:
    windows = {"rolling_atvr_volume_windows": (4, 8), "minimum_atvr_ratio": 0.0, "frequency_trading_percent": 0.5}
    return MarketCap(market_cap_source=caps, **SEEN | windows | options)


def replicator(window: int = 12, assets: Sequence[str] = NINE, **target: str) -> PortfolioReplicator:
    """`replicator(portfolio="p")`."""
    tracked = TrackedSeries(**target)
    return PortfolioReplicator(target=tracked, method="nnls", window_sessions=window, **SEEN | {"asset_list": tuple(assets)})


def external(source: APIDataNode | None = None, path: Path | None = None, **options: Any) -> ExternalWeights:
    return ExternalWeights(asset_list=NINE, weights_source=source, path=None if path is None else str(path), **options)


def held_for(days: int) -> PriceAlignmentPolicy:
    return PriceAlignmentPolicy(maximum_staleness=timedelta(days=days))


# -- fleets -------------------------------------------------------------------------------------------------------------------


def open_market(engine: Engine, count: int = 45, first: str = "2024-01-02") -> pd.DataFrame:
    """Closes and volumes of nine assets and a benchmark."""
    closes = factories.walks(first, count, [*NINE, BENCH])
    return factories.open_market(engine, closes, volume=volumes(closes))


def given_weights(times: pd.DatetimeIndex, seed: int = 5) -> pd.DataFrame:
    """Vectors that others computed: some negative, some zero, and assets that are absent from one."""
    random = np.random.default_rng(seed)
    drawn = random.normal(0.1, 0.1, (len(times), len(NINE)))
    drawn[random.random(drawn.shape) < 0.2] = 0.0
    drawn[random.random(drawn.shape) < 0.2] = np.nan
    return pd.DataFrame(drawn, times, list(NINE))


def of_every_kind(engine: Engine, closes: pd.DataFrame, folder: Path) -> list[PortfolioConfiguration]:
    """Portfolios of computed, external and replicating signals, each signal shared by two; sources of their own where they have some."""
    caps = register_table(engine, "caps", market_cap=closes[list(NINE)].iloc[::3] * 1e6)
    table = register_table(engine, "given", signal_weight=given_weights(closes.index[4:]))
    file = folder / "weights.csv"
    sparse = given_weights(closes.index[6::7], seed=6).stack().dropna().rename("weight").rename_axis(["time_index", "asset_identifier"])
    sparse.reset_index().to_csv(file, index=False)
    weekly = {"maximum_staleness": timedelta(days=5)}
    signals = {
        "inverse": inverse(),
        "monthly": momentum(emit_on="month_end"),
        "long-short": momentum(emit_on="week_end", long_short=True, top_assets=2),
        "caps": market_cap(caps, price_alignment_policy=PriceAlignmentPolicy(**weekly)),
        "table": external(table),
        "file": external(path=file, weight_column="weight", forward_fill=None),
        "of-asset": replicator(asset=BENCH),
        "of-index": replicator(index="INDEX"),
        "of-portfolio": replicator(portfolio="inverse-0", assets=NINE[:5]),
        "of-copy": replicator(portfolio="of-portfolio-1", window=3),
    }
    return [
        portfolio(
            f"{name}-{i}",
            signal,
            accounting=("drifted", "target")[i],
            on=("every_session", "signal_change")[i],
            lag=i,
            index="INDEX" if (name, i) == ("caps", 1) else None,
        )
        for name, signal in signals.items()
        for i in range(2)
    ]


# -- runs and what they left --------------------------------------------------------------------------------------------------


def landed(engine: Engine, fleet: Sequence[PortfolioConfiguration], as_of: Any = END, **options: Any) -> RunReport:
    """A run that nothing failed in."""
    report = factories.run(engine, fleet, as_of, **options)
    assert report.exit_code == 0, factories.messages(report)
    return report


def nightly(engine: Engine, fleet: Sequence[PortfolioConfiguration], nights: Iterable[Any], **options: Any) -> None:
    for night in nights:
        landed(engine, fleet, night, **options)


def bits(engine: Engine) -> dict[str, Any]:
    """Every output to the bit, open orders too, and how far each scope is computed."""
    found: dict[str, Any] = {**factories.dump(engine), **factories._digests(engine, (ORDERS, "msm__portfolio_index_values"), "t::text")}
    rows = factories.sql(engine, f"SELECT storage, scope, watermark, row_count FROM {factories.PROGRESS}")
    return found | {f"{storage} {scope}": facts for storage, scope, *facts in rows}


def wipe(engine: Engine) -> None:
    """Nothing was ever computed."""
    made = sql(engine, "SELECT tablename::text FROM pg_tables WHERE tablename LIKE 'msm__interpolated_prices_%%'")
    tables = [*factories.OUTPUTS, ORDERS, "msm__portfolio_index_values", *(name for (name,) in made)]
    sql(engine, f"TRUNCATE {', '.join(tables)}")
    sql(
        engine,
        f"UPDATE {factories.PROGRESS} SET watermark = NULL, epoch = 0, row_count = 0, configuration_hash = NULL, code_version = NULL",
    )


def vectors(engine: Engine, signal_uid: str) -> pd.DataFrame:
    """Stored vectors of a signal, (V, N); an asset without a row has 0."""
    query = f"SELECT time_index, asset_identifier, signal_weight FROM {factories.OUTPUTS[0]} WHERE signal_uid = %s"
    found = factories.frame(engine, query, (signal_uid,))
    return found.pivot(index="time_index", columns="asset_identifier", values="signal_weight").fillna(0.0).astype(float)


def computed_through(engine: Engine, signal_uid: str) -> Any:
    return factories.progress(engine)["SignalWeightsTS", signal_uid]["watermark"]
