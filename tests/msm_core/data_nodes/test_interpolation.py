"""Interpolated prices on a real database: what lands, what each asset's progress says, and who fails with whom.

Loaded and read back by plain SQL; expected rows are pandas' reindex and ffill, asset by asset.
"""

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError
from sqlalchemy import Engine, create_engine
from sqlalchemy.exc import ProgrammingError

from msm_core.configuration import PortfolioConfiguration
from msm_core.data_nodes.base import Batch, NodeResult, update_batch
from msm_core.data_nodes.interpolated_prices import InterpolatedPrices, InterpolatedPricesConfig, storage_of
from msm_core.data_nodes.interpolation import PricesKind
from msm_core.data_nodes.planning import new_scopes, plan_prices
from msm_core.data_nodes.prices import APIDataNode
from msm_core.data_nodes.world import read_world
from msm_core.database import transaction
from msm_core.errors import ConfigurationError, NodeFailed, SourceNotRegistered, SourceUnusable, StorageNotPrepared, UnknownAssets
from msm_core.models import ExternalPricesStorage, InterpolatedPricesStorage
from msm_core.price_sources import PriceSource
from msm_core.sources import Source
from msm_core.storage import ensure_progress
from msm_ray import run as driver
from msm_ray.prepare import prepare
from tests import factories
from tests.factories import equal, instant, sql

scheduled = factories.scheduled

ASSETS = [f"a{i}" for i in range(9)]
EXTERNAL = ExternalPricesStorage.storage_uid()
END = "2024-12-31"
COLUMNS = ["open", "high", "low", "close", "volume", "trade_count", "vwap"]

# -- sources, prices, portfolios --------------------------------------------------------------------------------------------------


def interpolated(source: uuid.UUID = EXTERNAL, frequency: str = "1d", rule: Any = "ffill", assets: Any = None) -> InterpolatedPrices:
    return InterpolatedPrices(
        interpolation_config=InterpolatedPricesConfig(
            source_time_index_meta_table_uid=source,
            upsample_frequency_id=frequency,
            intraday_bar_interpolation_rule=rule,
            asset_list=assets,
        )
    )


def portfolio(identifier: str, prices: PriceSource, *assets: str, **options: Any) -> PortfolioConfiguration:
    configuration = factories.portfolio(identifier, equal(*assets), **options)
    build = configuration.portfolio_build_configuration.model_copy(update={"price_source_instance": prices})
    return configuration.model_copy(update={"portfolio_build_configuration": build})


def catalogue(engine: Engine, table: str, identifier: str = "Foreign", time_label: str = "close", cadence: str = "1d") -> uuid.UUID:
    """A catalogue row for anyone's table."""
    uid, columns = uuid.uuid4(), "uid, identifier, physical_table_name, kind, time_label, cadence, schema_fingerprint"
    row = (uid, identifier, table, time_label, cadence)
    sql(engine, f"INSERT INTO msm__time_index_meta_table ({columns}) VALUES (%s, %s, %s, 'prices', %s, %s, 'x')", row)
    return uid


def make(engine: Engine, table: str, *columns: str) -> None:
    """A stranger's table of that name."""
    key = "asset_identifier text, time_index timestamptz, PRIMARY KEY (asset_identifier, time_index)"
    sql(engine, f"CREATE TABLE {table} ({key}, {', '.join(f'{name} float8' for name in columns)})")


def open_market(engine: Engine, closes: pd.DataFrame, **columns: pd.DataFrame) -> pd.DataFrame:
    """Prices in ExternalPrices, of assets that trade on weekdays from 14:30 to 21:00."""
    factories.open_market(engine, closes, **columns)
    sql(engine, "UPDATE msm__asset SET calendar_uid = (SELECT uid FROM msm__calendar)")
    return closes


def dated(engine: Engine) -> uuid.UUID:
    """The same bars, each labelled with the date of its session."""
    day = "date_trunc('day', time_index, 'UTC') AS time_index"
    sql(engine, f"CREATE VIEW dated AS SELECT asset_identifier, {day}, close, volume, vwap FROM msm__external_prices")
    return catalogue(engine, "dated", "Dated", time_label="session_date")


def gappy(seed: int, count: int = 30, first: str = "2024-01-02", assets: Sequence[str] = ASSETS) -> pd.DataFrame:
    """Random closes with a bar in every tenth to last cell only; assets list and delist."""
    closes, random = factories.walks(first, count, assets, seed), np.random.default_rng(seed)
    for asset in assets:
        seen = random.random(count) < random.choice([0.3, 0.7, 1.0])
        seen[: random.integers(0, count // 3)] = seen[count - random.integers(0, count // 3) :] = False
        closes[asset] = closes[asset].where(seen)
    return closes


def nullable(closes: pd.DataFrame, seed: int) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    return closes.where(random.random(closes.shape) < 0.8) * random.uniform(0.9, 1.1, closes.shape)


@pytest.fixture
def market(engine: Engine) -> pd.DataFrame:
    """Thirty sessions, with gaps, of nine assets."""
    closes = gappy(3)
    return open_market(engine, closes, volume=nullable(closes, 4) * 50, vwap=nullable(closes, 5))


# -- what is stored ---------------------------------------------------------------------------------------------------------------


def tables(engine: Engine) -> list[str]:
    """Those that interpolation has, by the database's own catalogue."""
    return [name for (name,) in sql(engine, "SELECT tablename::text FROM pg_tables WHERE tablename LIKE 'msm__interpolated%' ORDER BY 1")]


def rows(engine: Engine, table: str = "") -> pd.DataFrame:
    query = f'SELECT * FROM {table or tables(engine)[0]} ORDER BY asset_identifier COLLATE "C", time_index'
    return factories.frame(engine, query).set_index(["asset_identifier", "time_index"])


def checksum(engine: Engine) -> list[tuple[Any, ...]]:
    """Postgres prints a float8 exactly: equal text is equal bits."""
    query = "SELECT count(*), md5(string_agg(t::text, '|' ORDER BY asset_identifier, time_index)) FROM {} t"
    return [sql(engine, query.format(table))[0] for table in tables(engine)]


def forget(engine: Engine) -> None:
    """As if nothing had ever been interpolated."""
    sql(engine, f"TRUNCATE {', '.join(tables(engine))}")
    sql(engine, "UPDATE msm__data_node_update SET watermark = NULL, epoch = 0, row_count = 0, code_version = NULL")


def watermarks(engine: Engine) -> dict[str, str]:
    query = "SELECT scope, to_char(watermark, 'MM-DD HH24:MI') FROM msm__data_node_update WHERE kind = 'interpolated_prices'"
    return dict(sql(engine, query))


def statuses(results: Sequence[NodeResult]) -> dict[str, str]:
    return {r.identifier.partition("/")[2]: r.status for r in results}


def filled(closes: pd.DataFrame, volume: pd.DataFrame, vwap: pd.DataFrame) -> pd.DataFrame:
    """What an interpolation of daily bars stores of closes, (T, N) with a row per session."""
    parts = {}
    for asset in closes:
        seen = closes[asset].dropna()
        span = closes.loc[seen.index[0] : seen.index[-1]].index
        made = ~span.isin(seen.index)
        own = pd.DataFrame({"close": seen.reindex(span).ffill()})
        own["volume"] = volume[asset].reindex(span).where(~made, 0.0)
        own["vwap"] = vwap[asset].reindex(seen.index).reindex(span, method="ffill")
        for name in ("open", "high", "low"):
            own[name] = own["close"].where(made)
        own["trade_count"] = pd.Series(0.0, span).where(made)
        own["open_time"] = pd.Series(span - pd.Timedelta(minutes=390), span).where(made)
        own["interpolated"] = made
        parts[asset] = own
    return pd.concat(parts, names=["asset_identifier", "time_index"])


# -- rows ---------------------------------------------------------------------------------------------------------------------------


def test_bars_without_gaps_in_a_table_of_their_own(engine):  # R45, R48
    closes = gappy(1)
    volume, vwap = nullable(closes, 2) * 40, nullable(closes, 3)
    open_market(engine, closes, volume=volume, vwap=vwap)
    prices = interpolated(assets=tuple(ASSETS))
    assert len(prepare(engine, [prices]).pending) == 1
    results = prices.run(as_of=instant(END))
    stored = rows(engine)
    expected = filled(closes, volume, vwap)
    assert statuses(results) == dict.fromkeys(ASSETS, "landed")
    assert set(stored.columns) == {*COLUMNS, "open_time", "interpolated"}  # no column of the policy
    assert 0.1 < stored["interpolated"].mean() < 0.9
    for name in expected:
        left, right = stored[name], expected[name]
        pd.testing.assert_series_equal(left, right, check_exact=True, check_dtype=False, check_index_type=False, check_freq=False, obj=name)
    assert {r.identifier.partition("/")[2]: r.rows for r in results} == stored.groupby(level=0).size().to_dict()
    assert {scope: row["row_count"] for (_, scope), row in factories.progress(engine).items()} == stored.groupby(level=0).size().to_dict()


def test_a_second_run_writes_nothing(engine, market):  # R59
    prices = interpolated(assets=tuple(ASSETS))
    assert prepare(engine, [prices]).pending != ()
    assert prepare(engine, [prices]).pending == ()
    prices.run(as_of=instant(END))
    before = factories.versions(engine)
    assert set(statuses(prices.run(as_of=instant(END))).values()) == {"up_to_date"}
    assert factories.versions(engine) == before
    plan = factories.plan(engine, [portfolio("p", prices, *ASSETS)], END)
    assert (plan.summary()["prices"], len(plan.work())) == ({"up to date": 9}, 2)  # what is left is the portfolio, and its signal


def five_minutes(engine: Engine, seed: int) -> uuid.UUID:
    """A stranger's five-minute bars over four days, with gaps over a weekend."""
    make(engine, "ticks", "close", "volume", "vwap")
    index = pd.DatetimeIndex([])
    for day in ("2024-01-04", "2024-01-05", "2024-01-08", "2024-01-09"):
        index = index.append(pd.date_range(f"{day} 14:35", f"{day} 21:00", freq="5min", tz="UTC"))
    random = np.random.default_rng(seed)
    closes = pd.DataFrame(random.lognormal(3, 0.2, (len(index), 9)), index, ASSETS)
    closes = closes.where(random.random(closes.shape) < np.linspace(0.15, 0.95, 9))
    factories.store_calendar(engine)
    factories.register_assets(engine, ASSETS)
    sql(engine, "UPDATE msm__asset SET calendar_uid = (SELECT uid FROM msm__calendar)")
    factories.load_prices(engine, closes, "ticks", volume=nullable(closes, seed) * 9, vwap=nullable(closes, seed + 1))
    return catalogue(engine, "ticks", cadence="5m")


@pytest.mark.parametrize(("seed", "kind"), [(0, "daily"), (1, "by date"), (2, "5m to 15m"), (3, "5m to 1d")])
def test_many_nights_give_the_bits_of_one(engine, seed, kind):  # R98, design section 8
    if kind in ("daily", "by date"):
        closes = gappy(seed, 60)
        open_market(engine, closes, volume=nullable(closes, seed), vwap=nullable(closes, seed + 1))
        source = EXTERNAL if kind == "daily" else dated(engine)
        prices, first, minutes = interpolated(source, assets=tuple(ASSETS)), "2024-01-02", 90 * 1440
    else:
        prices = interpolated(five_minutes(engine, seed), kind.rpartition(" ")[2], assets=tuple(ASSETS))
        first, minutes = "2024-01-04 14:00", 6 * 1440
    prepare(engine, [prices])
    for cut in sorted(np.random.default_rng(seed).integers(0, minutes, 6).tolist()):
        as_of = instant(first) + pd.Timedelta(minutes=cut)
        prices.run(as_of=as_of)
        assert sql(engine, f"SELECT count(*) FROM {tables(engine)[0]} WHERE time_index > %s", (as_of,)) == [(0,)]  # no look-ahead
    prices.run(as_of=instant(END))
    by_night, counts = checksum(engine), {s: r["row_count"] for (_, s), r in factories.progress(engine).items()}
    forget(engine)
    prices.run(as_of=instant(END))
    assert checksum(engine) == by_night
    assert by_night[0][0] >= 9 * 3
    assert counts == rows(engine).groupby(level=0).size().to_dict()


def test_a_full_refresh_replaces_with_the_same_bits(engine, market):
    prices = interpolated()
    prepare(engine, [prices])
    fleet = [portfolio("p", prices, "a0", "a1"), portfolio("q", prices, *ASSETS[2:])]
    factories.run(engine, fleet, "2024-01-20")
    factories.run(engine, fleet, END)
    before = checksum(engine)
    assert factories.run(engine, fleet, END, full_refresh=True).counts("prices")["landed"] == 9
    assert checksum(engine) == before


def test_a_full_refresh_that_yields_nothing_leaves_nothing(engine, market):
    """All bars of a0 turn out to be of Saturdays."""
    prices = interpolated()
    prepare(engine, [prices])
    fleet = [portfolio(asset, prices, asset) for asset in ASSETS]
    factories.run(engine, fleet, END)
    sql(engine, "DELETE FROM msm__external_prices WHERE asset_identifier = 'a0'")
    sql(engine, "INSERT INTO msm__external_prices (asset_identifier, time_index, close) VALUES ('a0', '2024-01-06 21:00Z', 1)")
    factories.run(engine, fleet, END, full_refresh=True)
    assert set(rows(engine).index.get_level_values(0)) == set(ASSETS[1:])


@pytest.mark.parametrize("left", ["a Saturday", "nothing"])
def test_a_full_refresh_after_the_source_took_its_bars_back(engine, market, left):
    prices = interpolated(assets=("a0",))
    prepare(engine, [prices])
    fleet = [portfolio("p", prices, "a1")]
    factories.run(engine, fleet, END)
    before = watermarks(engine)
    sql(engine, "DELETE FROM msm__external_prices WHERE asset_identifier = 'a0'")
    if left == "a Saturday":
        sql(engine, "INSERT INTO msm__external_prices (asset_identifier, time_index, close) VALUES ('a0', '2024-01-06 21:00Z', 1)")
    factories.run(engine, fleet, END)
    assert watermarks(engine) == before  # a night does not take back what it has computed
    factories.run(engine, fleet, END, full_refresh=True)
    assert len(rows(engine)) == 0
    assert watermarks(engine) == {"a0": None}


def test_an_asset_that_gets_another_calendar_is_computed_anew(engine, market):
    """Interpolated around the clock at first, because nobody had said where it trades."""
    sql(engine, "UPDATE msm__asset SET calendar_uid = NULL WHERE unique_identifier = 'a0'")
    prices = interpolated(assets=("a0", "a1"))
    prepare(engine, [prices])
    prices.run(as_of=instant(END))
    before = rows(engine)
    assert set(before.loc["a0"].index.hour) == {0}
    sql(engine, "UPDATE msm__asset SET calendar_uid = (SELECT uid FROM msm__calendar)")
    assert [r.status for r in prices.run(as_of=instant(END))] == ["up_to_date", "landed"]  # a1 had it all the time
    after = rows(engine)
    assert set(after.loc["a0"].index.hour) == {21}
    pd.testing.assert_frame_equal(after.loc["a1"], before.loc["a1"])


def test_rows_without_progress_are_replaced_by_a_full_refresh(engine, market):
    """A restored table beside a fresh catalogue: the rows are there, and nobody knows how far they reach."""
    prices = interpolated()
    prepare(engine, [prices])
    fleet = [portfolio(asset, prices, asset) for asset in ASSETS]
    factories.run(engine, fleet, END)
    before = checksum(engine)
    sql(engine, "DELETE FROM msm__data_node_update WHERE kind = 'interpolated_prices'")
    assert {r.error["reason"] for r in factories.run(engine, fleet, END).results if r.kind == "prices" and r.error} == {"node_failed"}
    assert factories.run(engine, fleet, END, full_refresh=True).status == "landed"
    assert checksum(engine) == before


# -- progress of each asset -----------------------------------------------------------------------------------------------------------


def test_progress_is_each_assets_own(engine):  # lesson: an unrelated asset's later row; R71, R73
    closes = factories.walks("2024-01-02", 10, [*ASSETS, "late", "stranger"])
    early = closes[ASSETS].copy()
    early.iloc[5:, 8] = np.nan  # a8 lags
    open_market(engine, closes * np.nan)
    factories.load_prices(engine, early.iloc[:7])
    prices = interpolated(assets=tuple(ASSETS))
    prepare(engine, [prices])
    prices.run(as_of=instant(END))
    assert watermarks(engine) == {**dict.fromkeys(ASSETS, "01-10 21:00"), "a8": "01-08 21:00"}
    every_row = f"SELECT xmin::text, t::text FROM {tables(engine)[0]} t"
    before = set(sql(engine, every_row))

    factories.load_prices(engine, closes[["stranger"]])
    assert set(statuses(prices.run(as_of=instant(END))).values()) == {"up_to_date"}
    factories.load_prices(engine, closes[["a8"]].iloc[6:8])  # the 10th and 11th; that of the 9th never comes
    factories.load_prices(engine, closes[["late"]].iloc[8:])
    more = interpolated(assets=(*ASSETS, "late"))
    expected = {**dict.fromkeys(ASSETS, "up_to_date"), "a8": "landed", "late": "landed"}
    assert statuses(more.run(as_of=instant(END))) == expected
    assert watermarks(engine) == {**dict.fromkeys(ASSETS, "01-10 21:00"), "a8": "01-11 21:00", "late": "01-15 21:00"}
    after = rows(engine)
    assert after.loc["late"].index.strftime("%m-%d").tolist() == ["01-12", "01-15"]  # fresh: nothing before its first bar
    assert after.loc["a8"]["interpolated"].tolist() == [False] * 5 + [True, False, False]
    assert before < set(sql(engine, every_row))  # nothing was written again


def test_an_asset_without_a_calendar_trades_around_the_clock(engine):
    factories.register_assets(engine, ASSETS)
    closes = factories.walks("2024-01-04", 3, ASSETS)  # stamped 21:00 of Thursday, Friday and Monday: inside their days
    factories.load_prices(engine, closes, volume=closes * 2)
    prices = interpolated(assets=tuple(ASSETS))
    prepare(engine, [prices])
    prices.run(as_of=instant("2024-01-09"))  # 00:00, when Monday closes
    stored = rows(engine).loc["a0"]
    assert stored.index.strftime("%m-%d %H:%M").tolist() == [f"01-0{d} 00:00" for d in (5, 6, 7, 8, 9)]
    assert stored["interpolated"].tolist() == [False, False, True, True, False]
    assert stored["volume"].tolist() == [*(closes["a0"].iloc[:2] * 2), 0.0, 0.0, closes["a0"].iloc[2] * 2]
    assert stored["open_time"].dt.strftime("%m-%d %H:%M").tolist()[2:4] == ["01-06 00:00", "01-07 00:00"]
    # a stored calendar of that name comes first (R24): of weekdays only
    factories.store_calendar(engine, key="24/7")
    forget(engine)
    prices.run(as_of=instant("2024-01-09"))
    assert rows(engine).loc["a0"].index.strftime("%m-%d %H:%M").tolist() == ["01-04 21:00", "01-05 21:00", "01-08 21:00"]


@pytest.mark.parametrize(("label", "hour"), [("session_date", 0), ("close", 12), ("close", 24)])
def test_a_bar_of_a_calendar_around_the_clock_lands_when_its_day_is_over(engine, label, hour):
    """Every night the bar of the day before has come: half an hour after midnight it lands."""
    factories.register_assets(engine, ASSETS)
    make(engine, "crypto", "close")
    prices = interpolated(catalogue(engine, "crypto", time_label=label), assets=tuple(ASSETS))
    prepare(engine, [prices])
    fleet = [portfolio("p", prices, *ASSETS, calendar="24/7")]
    for number, day in enumerate(pd.date_range("2024-01-01", periods=4, tz="UTC"), start=1):
        factories.load_prices(engine, pd.DataFrame([np.arange(1.0, 10.0)], [day + pd.Timedelta(hours=hour)], ASSETS), "crypto")
        assert set(statuses(prices.run(as_of=(day + pd.Timedelta(hours=23.5)).to_pydatetime())).values()) <= {"up_to_date"}
        report = factories.run(engine, fleet, day + pd.Timedelta(hours=24.5))
        assert (report.counts("prices")["landed"], factories.statuses(report)) == (9, {"p": "landed"})
        assert set(watermarks(engine).values()) == {(day + pd.Timedelta(days=1)).strftime("%m-%d %H:%M")}
        assert len(factories.values(engine, "p")) == number


# -- portfolios on interpolated prices ------------------------------------------------------------------------------------------------


def complete(closes: pd.DataFrame) -> pd.DataFrame:
    """Gaps filled by pandas, nothing before the first bar nor after the last."""
    return closes.ffill().where(closes.bfill().notna())


@pytest.mark.parametrize("label", ["close", "session_date"])
def test_a_portfolio_sees_what_was_interpolated_in_its_own_run(engine, market, label):  # R34, R40, R98
    """Prices are read in the claiming transaction: the exported snapshot of the run is older than they are."""
    make(engine, "whole", "close")
    factories.load_prices(engine, complete(market), "whole")
    prices = interpolated(EXTERNAL if label == "close" else dated(engine))
    whole = APIDataNode(time_index_meta_table_uid=catalogue(engine, "whole"))
    prepare(engine, [prices])
    ours, theirs = ([portfolio(f"{name}{i}", s, *ASSETS[i : i + 4]) for i in range(6)] for name, s in (("p", prices), ("w", whole)))
    for night in ("2024-01-25", END):
        report = factories.run(engine, ours, night)
        assert report.exit_code == 0, factories.messages(report)
    assert factories.run(engine, theirs, END).exit_code == 0
    for i in range(6):
        values = factories.values(engine, f"p{i}")
        assert values.index[-1] == min(market[a].last_valid_index() for a in ASSETS[i : i + 4])
        pd.testing.assert_frame_equal(values, factories.values(engine, f"w{i}"), check_exact=True)
    assert set(factories.statuses(factories.run(engine, ours, END)).values()) == {"up_to_date"}


def test_a_bad_asset_stops_only_the_portfolios_that_need_it(engine):
    closes = factories.walks("2024-01-02", 12, ASSETS)
    closes.iloc[5, 2] = closes.iloc[6, 4] = np.nan
    open_market(engine, closes)
    sql(engine, "UPDATE msm__external_prices SET close = -1 WHERE asset_identifier = 'a4' AND time_index = '2024-01-12 21:00Z'")
    prices = interpolated()
    prepare(engine, [prices])
    fleet = [portfolio("good", prices, *ASSETS[:4]), portfolio("bad", prices, "a4", "a5"), portfolio("all", prices, *ASSETS)]
    report = factories.run(engine, fleet, END)
    assert (factories.statuses(report), report.exit_code) == ({"good": "landed", "bad": "skipped", "all": "skipped"}, 3)
    assert {i.partition("/")[2] for i, s in factories.statuses(report, "prices").items() if s != "landed"} == {"a4"}
    why = factories.messages(report)["bad"]
    assert "/a4 (ExternalPricesTS: close of a4 at 2024-01-12 21:00Z is -1.0; a price must be finite and above 0" in why
    assert "a4" not in watermarks(engine) or watermarks(engine)["a4"] is None
    good = factories.values(engine, "good")

    factories.load_prices(engine, closes)  # repaired
    again = factories.run(engine, fleet, END, retry_of=report.run_uid)
    assert factories.statuses(again) == {"good": "up_to_date", "bad": "landed", "all": "landed"}
    assert len(rows(engine).loc["a4"]) == 12
    pd.testing.assert_frame_equal(factories.values(engine, "good"), good)


def test_what_is_wrong_with_an_asset_is_told_by_name(engine, market):
    prices = interpolated(assets=tuple(ASSETS))
    prepare(engine, [prices])
    narrow = factories.store_calendar(engine, "2024-01-01", "2024-01-05", key="NARROW")
    sql(engine, "UPDATE msm__asset SET calendar_uid = %s WHERE unique_identifier = 'a2'", (narrow,))
    sql(engine, "UPDATE msm__external_prices SET close = 'NaN' WHERE asset_identifier = 'a6'")
    sql(engine, "UPDATE msm__external_prices SET close = NULL WHERE asset_identifier = 'a7'")
    with pytest.raises(NodeFailed, match=r"calendar NARROW covers 2024-01-01\.\.2024-01-05"):
        prices.run(as_of=instant(END))
    report = factories.run(engine, [portfolio(f"p{i}", prices, a) for i, a in enumerate([*ASSETS, "ghost"])], END)
    good = {"p0", "p1", "p3", "p4", "p5", "p8"}
    assert {name for name, status in factories.statuses(report).items() if status == "landed"} == good
    told = factories.messages(report)
    assert "calendar NARROW covers" in told["p2"]
    assert "close of a6 at 2024-01-" in told["p6"]
    assert "is nan" in told["p6"]
    assert "has no close for a7" in told["p7"]  # a null close is no bar
    assert "ghost not registered" in told["p9"]
    with pytest.raises(UnknownAssets, match="ghost"):
        interpolated(assets=("a0", "ghost")).run(as_of=instant(END))
    with pytest.raises(ConfigurationError, match="asset_list"):
        interpolated().run(as_of=instant(END))


def test_a_lost_row_is_not_invented(engine, market):
    prices = interpolated(assets=tuple(ASSETS))
    prepare(engine, [prices])
    prices.run(as_of=instant("2024-01-20"))
    sql(engine, f"DELETE FROM {tables(engine)[0]} WHERE asset_identifier = 'a3'")
    with pytest.raises(NodeFailed, match=r"a3: progress says 2024-.* --full-refresh"):
        prices.run(as_of=instant(END))
    report = factories.run(engine, [portfolio("p", prices, "a3"), portfolio("q", prices, "a0")], END, full_refresh=True)
    assert report.exit_code == 0
    assert set(statuses(prices.run(as_of=instant(END))).values()) == {"up_to_date"}


INCOMPATIBLE = {
    "no asset_identifier": "time_index timestamptz, ticker text, close float8",
    "no time_index": "day date, asset_identifier text, close float8",
    "a naive time_index": "time_index timestamp, asset_identifier text, close float8",
    "a date as time_index": "time_index date, asset_identifier text, close float8",
    "a numeric asset_identifier": "time_index timestamptz, asset_identifier bigint, close float8",
}


@pytest.mark.parametrize("columns", INCOMPATIBLE.values(), ids=INCOMPATIBLE)
def test_an_incompatible_source_fails_only_those_who_read_it(engine, market, columns):  # R36
    sql(engine, f"CREATE TABLE strange ({columns})")
    asset = "7" if "bigint" in columns else "'a0'"
    sql(engine, f"INSERT INTO strange VALUES ('2024-01-02 21:00Z', {asset}, 1), ('2024-01-03 21:00Z', {asset}, 2)")
    bad, good = interpolated(catalogue(engine, "strange", "StrangePrices")), interpolated()
    prepare(engine, [bad, good])
    report = factories.run(engine, [portfolio("bad", bad, "a0"), portfolio("good", good, "a0")], END)
    assert factories.statuses(report) == {"bad": "failed", "good": "landed"}
    assert factories.messages(report)["bad"].startswith("price source StrangePrices: ")


# -- rivals -----------------------------------------------------------------------------------------------------------------------------


def planned(engine: Engine, prices: InterpolatedPrices, as_of: str = END) -> Batch[Any]:
    with transaction(engine, read_only=True) as connection:
        plans = plan_prices(read_world(connection, [], instant(as_of), [prices]), instant(as_of), full_refresh=False)
    with engine.begin() as connection:
        ensure_progress(connection, new_scopes(plans))
    return Batch(PricesKind(), tuple(p.node for p in plans if p.node), instant(as_of))


@contextmanager
def held(engine: Engine, asset: str) -> Iterator[None]:
    with factories.rival(engine) as rival:
        rival.execute("SELECT uid FROM msm__data_node_update WHERE scope = %s FOR UPDATE", (asset,))
        yield


def test_an_asset_that_a_rival_holds_is_busy_and_the_rest_lands(engine, market, monkeypatch):
    prices = interpolated(assets=tuple(ASSETS))
    prepare(engine, [prices])
    batch = planned(engine, prices)
    with held(engine, "a3"):
        assert statuses(update_batch(engine, batch)) == {a: "busy" if a == "a3" else "landed" for a in ASSETS}
        monkeypatch.setattr(driver, "BUSY_SECONDS_MAX", 0.5)  # asked again and again, while q has landed at once
        monkeypatch.setattr(driver, "BUSY_PAUSE_SECONDS", 0.02)
        report = factories.run(engine, [portfolio("p", prices, "a3", "a4"), portfolio("q", prices, "a4")], END)
        assert factories.statuses(report) == {"p": "busy", "q": "landed"}
    before = factories.versions(engine, tables(engine))
    assert set(statuses(update_batch(engine, batch)).values()) == {"landed", "busy"}  # an old plan lands nothing twice
    assert factories.versions(engine, tables(engine))[tables(engine)[0]][0] == before[tables(engine)[0]][0] + len(rows(engine).loc["a3"])
    landed = checksum(engine)
    assert set(statuses(update_batch(engine, batch)).values()) == {"busy"}
    forget(engine)
    prices.run(as_of=instant(END))
    assert checksum(engine) == landed


def test_the_number_of_statements_is_that_of_ten_assets(engine):  # R100
    names = [f"x{i:03}" for i in range(210)]
    open_market(engine, factories.walks("2024-01-02", 6, names))
    sql(engine, "UPDATE msm__asset SET calendar_uid = NULL WHERE unique_identifier LIKE '%5'")
    prepare(engine, [interpolated()])
    counts = []
    for members in (names[:10], names[10:]):
        with factories.statements() as sent:
            results = update_batch(engine, planned(engine, interpolated(assets=tuple(members))))
        assert statuses(results) == dict.fromkeys(members, "landed")
        counts.append(len(sent))
    assert counts[0] == counts[1]


def test_one_batch_holds_assets_of_several_storages_and_calendars(engine):
    uid = five_minutes(engine, 7)
    sql(engine, "UPDATE msm__asset SET calendar_uid = NULL WHERE unique_identifier IN ('a1', 'a8')")
    policies = [interpolated(uid, frequency, assets=tuple(ASSETS)) for frequency in ("5m", "15m", "1h", "1d")]
    prepare(engine, policies)
    batches = [planned(engine, p, "2024-01-12") for p in policies]
    mixed = tuple(node for nodes in zip(*(b.nodes for b in batches), strict=True) for node in nodes)
    assert {r.status for r in update_batch(engine, Batch(PricesKind(), mixed, batches[0].as_of))} == {"landed"}
    together = checksum(engine)
    forget(engine)
    for prices in policies:
        prices.run(as_of=instant("2024-01-12"))
    assert checksum(engine) == together
    assert len(together) == 4


# -- prepared or not --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def worker(engine: Engine) -> Iterator[Engine]:
    """The same database for a role that may read and write rows, and nothing else."""
    name = f"msm_worker_{uuid.uuid4().hex[:8]}"
    sql(engine, f"CREATE ROLE {name} LOGIN PASSWORD 'made-for-a-test'")
    limited = create_engine(engine.url.set(username=name, password="made-for-a-test"))
    yield limited
    limited.dispose()
    sql(engine, f"DROP OWNED BY {name}")
    sql(engine, f"DROP ROLE {name}")


def grant(engine: Engine, worker: Engine) -> None:
    sql(engine, f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {worker.url.username}")


def test_runtime_uses_a_table_and_never_makes_one(engine, worker, market, monkeypatch):  # R49, R50, R54, R58
    grant(engine, worker)
    prices = interpolated(assets=tuple(ASSETS))
    plain = portfolio("plain", APIDataNode(time_index_meta_table_uid=EXTERNAL), "a0", staleness=timedelta(days=99))
    fleet = [portfolio("p", prices, "a0", "a1"), plain]
    before = factories.relations(engine)
    for used, status in ((engine, "landed"), (worker, "up_to_date")):
        monkeypatch.setenv("MSM_DATABASE_URL", used.url.render_as_string(hide_password=False))
        with pytest.raises(StorageNotPrepared, match=r"msm__interpolated_prices_[0-9a-f]{16}. Run `msm-ray prepare`"):
            prices.run(as_of=instant(END))
        report = factories.run(used, fleet, END)
        assert factories.statuses(report) == {"p": "failed", "plain": status}
        assert "Run `msm-ray prepare`" in factories.messages(report)["p"]
    assert factories.relations(engine) == before
    with worker.connect() as connection, pytest.raises(ProgrammingError, match="permission denied"):
        connection.exec_driver_sql("CREATE TABLE mine (x int)")

    prepare(engine, [prices])
    grant(engine, worker)
    report = factories.run(worker, [fleet[0], portfolio("q", prices, *ASSETS[2:])], END)
    assert (report.exit_code, report.counts("prices")["landed"]) == (0, 9), factories.messages(report)
    monkeypatch.setenv("MSM_DATABASE_URL", worker.url.render_as_string(hide_password=False))
    assert set(statuses(prices.run(as_of=instant(END))).values()) == {"up_to_date"}


def test_a_source_that_may_not_be_read_fails_only_those_who_need_it(engine, worker, market):
    sql(engine, "CREATE TABLE secret AS SELECT * FROM msm__external_prices")
    secret, open_ = interpolated(catalogue(engine, "secret", "SecretPrices")), interpolated()
    prepare(engine, [secret, open_])
    grant(engine, worker)
    sql(engine, f"REVOKE ALL ON secret FROM {worker.url.username}")
    plain = APIDataNode(time_index_meta_table_uid=secret.source_uid)
    report = factories.run(worker, [portfolio("bad", secret, "a0"), portfolio("plain", plain, "a0"), portfolio("good", open_, "a0")], END)
    assert factories.statuses(report) == {"bad": "failed", "plain": "failed", "good": "landed"}
    assert {why.partition(";")[0] for why in factories.messages(report).values()} == {
        "price source SecretPrices: this database role may not read it"
    }


def test_a_catalogue_row_is_not_a_table(engine, market):  # R55, R56; lesson: a stale metadata row that skips the migration
    prices = interpolated(assets=tuple(ASSETS))
    prepare(engine, [prices])
    prices.run(as_of=instant(END))
    landed = checksum(engine)
    [name] = tables(engine)
    sql(engine, f"DROP TABLE {name}")
    with pytest.raises(StorageNotPrepared, match=name):
        prices.run(as_of=instant(END))
    assert prepare(engine, [prices]).pending == (name,)
    prices.run(as_of=instant(END))  # from scratch: the progress of a dropped table is none
    assert checksum(engine) == landed


def test_four_components_and_nothing_else_name_the_table(engine, market):  # R46, R47
    sql(engine, "CREATE TABLE ticks (asset_identifier text, time_index timestamptz, close float8)")
    sql(engine, "CREATE TABLE tocks (LIKE ticks)")
    ticks, tocks = catalogue(engine, "ticks", "Ticks", cadence="5m"), catalogue(engine, "tocks", "Tocks", cadence="5m")
    base = interpolated(ticks, "15m")
    others = [interpolated(tocks, "15m"), interpolated(ticks, "1h"), interpolated(ticks, "15m", "none")]
    same = [interpolated(ticks, "15m", assets=("a0",)), interpolated(ticks, "15m", assets=("a0", "a1"))]
    assert len(prepare(engine, [base, *others, *same]).pending) == 4
    sql(engine, "UPDATE msm__time_index_meta_table SET cadence = '1m' WHERE identifier = 'Ticks'")
    assert len(prepare(engine, [base]).pending) == 1
    assert len(tables(engine)) == 5
    components = dict(sql(engine, "SELECT physical_table_name, identity_components FROM msm__time_index_meta_table"))
    assert [set(components[t]) for t in tables(engine)] == [
        {"source_time_index_meta_table_uid", "source_cadence", "upsample_frequency_id", "intraday_bar_interpolation_rule"}
    ] * 5
    for other in same:
        assert portfolio("p", other, "a0").configuration_hash == portfolio("p", base, "a0").configuration_hash
    hashes = {portfolio("p", p, "a0").configuration_hash for p in (base, *others, APIDataNode(time_index_meta_table_uid=ticks))}
    assert len(hashes) == 5


GRAIN = {"asset_identifier": "text", "time_index": "timestamp with time zone"}
POLICIES = {
    "no cadence": (None, "1d", "close", "its cadence is not in the catalogue"),
    "daily to hours": ("1d", "1h", "close", "daily bars can only be given out as 1d, not 1h"),
    "no multiple": ("5m", "12m", "close", "12m is no whole multiple of its cadence 5m"),
    "finer": ("1h", "5m", "close", "5m is no whole multiple"),
    "weeks": ("7d", "1d", "close", "a cadence of 7d is longer than a day"),
    "intraday by date": ("5m", "15m", "session_date", "intraday bars must be stamped at their end"),
}


@pytest.mark.parametrize(("cadence", "frequency", "label", "why"), POLICIES.values(), ids=POLICIES)
def test_a_policy_that_does_not_fit_its_source_is_refused(cadence, frequency, label, why):  # R43, R57
    uid = uuid.uuid4()
    source = Source(uid, "Foreign", "foreign", "prices", cadence, label, {}, GRAIN | {"close": "real"}, True)
    with pytest.raises(SourceUnusable, match=f"price source Foreign: {why}"):
        storage_of(interpolated(uid, frequency), source)
    columns = GRAIN | {"volume": "real", "close": "text"}
    with pytest.raises(SourceUnusable, match="no numeric column close, only volume"):
        storage_of(interpolated(uid), Source(uid, "Foreign", "f", "prices", "1d", "close", {}, columns, True))
    with pytest.raises(ValidationError, match="upsample_frequency_id is 1d at most"):
        interpolated(uid, "2d")


def test_a_policy_that_fits_is_stored_under_one_spelling():
    uid = uuid.uuid4()
    made = [
        storage_of(interpolated(uid, frequency), Source(uid, "F", "f", "prices", cadence, "close", {}, GRAIN | {"close": "real"}, True))
        for cadence, frequency in (("30m", "1h"), ("30m", "60m"), ("60m", "1h"), ("1h", "1h"), ("1d", "1d"), ("1d", "24h"))
    ]
    assert [s.__metatable_extra_hash_components__["source_cadence"] for s in made] == ["30m", "30m", "1h", "1h", "1d", "1d"]
    assert [made[0] is made[1], made[2] is made[3], made[4] is made[5], made[1] is made[2]] == [True, True, True, False]
    assert made[0] is InterpolatedPricesStorage.configured(uid, "30m", "1h", "ffill")


# -- tables of strangers ----------------------------------------------------------------------------------------------------------------


def test_a_foreign_table_without_anything_but_closes(engine):  # R32
    factories.store_calendar(engine)
    factories.register_assets(engine, ASSETS)
    sql(engine, "UPDATE msm__asset SET calendar_uid = (SELECT uid FROM msm__calendar)")
    sql(engine, "CREATE SCHEMA vendor")
    sql(engine, "CREATE TABLE vendor.eod (close numeric(18,4), note text, asset_identifier varchar(20), time_index timestamptz)")
    for i, asset in enumerate(ASSETS):
        sql(
            engine,
            "INSERT INTO vendor.eod VALUES (%s, 'x', %s, '2024-01-03 16:00-05'), (NULL, 'no price', %s, '2024-01-04 21:00Z'),"
            " (12.5, NULL, %s, '2024-01-08 20:00Z')",
            (f"{i + 1}.1250", asset, asset, asset),
        )
    sql(engine, "INSERT INTO vendor.eod VALUES ('NaN', NULL, 'a8', '2024-01-09 21:00Z')")
    prices = interpolated(catalogue(engine, "vendor.eod", "VendorEod"))
    prepare(engine, [prices])
    report = factories.run(engine, [portfolio("p", prices, *ASSETS[:8]), portfolio("q", prices, "a8")], END)
    assert factories.statuses(report) == {"p": "landed", "q": "skipped"}
    assert "VendorEod: close of a8 at 2024-01-09 21:00Z is nan" in factories.messages(report)["q"]
    stored = rows(engine)
    assert set(stored.index.get_level_values(0)) == set(ASSETS[:8])
    own = stored.loc["a2"]
    assert own.index.strftime("%m-%d %H:%M").tolist() == [f"01-0{d} 21:00" for d in (3, 4, 5, 8)]
    assert own["close"].tolist() == [3.125, 3.125, 3.125, 12.5]
    assert own["open"].fillna(0).tolist() == [0, 3.125, 3.125, 0]
    assert own["volume"].fillna(-1).tolist() == [-1, 0, 0, -1]
    assert own["interpolated"].tolist() == [False, True, True, False]
    assert own["vwap"].isna().all()


def test_two_bars_at_one_time_are_refused(engine, market):
    sql(engine, "CREATE TABLE twice AS SELECT * FROM msm__external_prices")
    sql(engine, "INSERT INTO twice SELECT * FROM msm__external_prices WHERE asset_identifier = 'a5' ORDER BY time_index LIMIT 1")
    prices = interpolated(catalogue(engine, "twice", "Twice"), assets=tuple(ASSETS))
    prepare(engine, [prices])
    with pytest.raises(NodeFailed, match="Twice: a5 has two bars for"):
        prices.run(as_of=instant(END))
    assert set(watermarks(engine)) - {a for a, w in watermarks(engine).items() if w is None} == set(ASSETS) - {"a5"}


# -- configurations ---------------------------------------------------------------------------------------------------------------------


def config(**given: Any) -> InterpolatedPricesConfig:
    return InterpolatedPricesConfig(upsample_frequency_id="1d", intraday_bar_interpolation_rule="ffill", **given)


def test_exactly_one_source():  # R8, R41
    node = APIDataNode(time_index_meta_table_uid=EXTERNAL)
    for wrong in ({}, {"source_price_instance": node, "source_time_index_meta_table_uid": EXTERNAL}):
        with pytest.raises(ValidationError, match="exactly one of source_price_instance and source_time_index_meta_table_uid"):
            config(**wrong)
    with pytest.raises(ValidationError, match="interpolated already"):
        config(source_price_instance=interpolated())
    for missing in ({"upsample_frequency_id": "1d"}, {"intraday_bar_interpolation_rule": "ffill"}):
        with pytest.raises(ValidationError, match="Field required"):
            InterpolatedPricesConfig(source_time_index_meta_table_uid=EXTERNAL, **missing)  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        config(source_time_index_meta_table_uid=EXTERNAL, bar_frequency_id="1d")
    with pytest.raises(ValidationError):
        InterpolatedPricesConfig(
            source_time_index_meta_table_uid=EXTERNAL,
            upsample_frequency_id="1d",
            intraday_bar_interpolation_rule="bfill",  # type: ignore[arg-type]
        )


def test_both_spellings_of_a_source_are_one():  # R42, R44
    node = APIDataNode(time_index_meta_table_uid=EXTERNAL)
    by_node, by_uid = (
        InterpolatedPrices(interpolation_config=config(**given))
        for given in ({"source_price_instance": node}, {"source_time_index_meta_table_uid": str(EXTERNAL)})
    )
    assert (by_node.uid, by_node.key, by_node.dependencies()) == (by_uid.uid, by_uid.key, by_uid.dependencies())
    assert by_uid.dependencies() == {"source_prices": node}
    assert portfolio("p", by_node, "a0").configuration_hash == portfolio("q", by_uid, "a0").configuration_hash
    assert portfolio("p", by_uid, "a0").configuration_hash != portfolio("p", node, "a0").configuration_hash
    for source in (by_node, by_uid, interpolated(assets=("b", "a"))):
        configuration = portfolio("p", source, "a0", "a1")
        again = PortfolioConfiguration.model_validate_json(configuration.model_dump_json())
        assert isinstance(again.price_source, InterpolatedPrices)
        assert (again, again.configuration_hash) == (configuration, configuration.configuration_hash)
        assert again.price_source.asset_list in (None, ("a", "b"))


def test_a_source_that_is_not_registered(engine):
    prices = interpolated(uuid.UUID(int=5), assets=("a0",))
    assert "00000000-0000-0000-0000-000000000005" in prepare(engine, [prices]).problems[0]
    with pytest.raises(SourceNotRegistered, match="0005"):
        prices.run(as_of=instant(END))
    assert tables(engine) == []
