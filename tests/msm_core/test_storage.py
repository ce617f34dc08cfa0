"""Scoped reads, over our storages and over tables that somebody else made."""

import uuid
from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pytest
from sqlalchemy import Engine

from msm_core import frames, sources, storage
from msm_core.database import transaction
from msm_core.errors import SourceUnusable, StorageNotPrepared
from msm_core.models import ExternalPricesStorage, PortfoliosStorage, SignalWeightsStorage
from msm_ray import prepare
from tests import factories

scheduled = factories.scheduled

EXTERNAL = ExternalPricesStorage.storage_uid()
HOSTILE = [
    "A",
    "b",
    "é",
    "e\u0301",
    "it's",
    '"quoted"',
    "x; DROP TABLE msm__asset; --",
    "100%s",
    "a\nb",
    " ",
    "\\",
    "🚀",
    "{x}",
    "%(y)s",
    "x" * 255,
]


def t(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def us(*texts: str) -> list[np.datetime64]:
    return [np.datetime64(text, "us") for text in texts]


@pytest.fixture
def connection(engine: Engine):
    """A transaction that sees what the test wrote before its first read."""
    with transaction(engine, read_only=True) as connection:
        yield connection


def catalogue(engine: Engine, table: str, identifier: str = "Foreign", time_label: str = "close") -> uuid.UUID:
    """A catalogue row for anyone's table."""
    uid = uuid.uuid4()
    factories.sql(
        engine,
        "INSERT INTO msm__time_index_meta_table (uid, identifier, physical_table_name, kind, time_label, schema_fingerprint) "
        "VALUES (%s, %s, %s, 'prices', %s, 'x')",
        (uid, identifier, table, time_label),
    )
    return uid


def one_source(connection, uid: uuid.UUID) -> sources.Source:
    return sources.read_sources(connection, [uid])[uid]


# -- the catalogue ----------------------------------------------------------------------------------------------------------------


def test_what_is_declared_but_absent_is_named(engine):  # R56, R58
    with engine.connect() as connection:
        storage.verify_prepared(connection)
    factories.sql(engine, "DROP TABLE msm__portfolios, msm__run_node")
    with engine.connect() as connection, pytest.raises(StorageNotPrepared) as caught:
        storage.verify_prepared(connection)
    assert "missing: msm__portfolios, msm__run_node. Run `msm-ray prepare`" in str(caught.value)
    with engine.connect() as connection:
        storage.verify_prepared(connection, [SignalWeightsStorage])
        with pytest.raises(StorageNotPrepared):
            storage.verify_prepared(connection, [PortfoliosStorage])


def test_our_own_price_storage_is_in_the_catalogue(connection):  # R14
    source = one_source(connection, EXTERNAL)
    assert (source.identifier, source.table, source.time_label) == ("ExternalPricesTS", "msm__external_prices", "close")
    assert set(source.numeric) == {"open", "high", "low", "close", "volume", "trade_count", "vwap"}


def test_an_unknown_source_is_absent_and_a_vanished_one_has_no_columns(engine):
    vanished = catalogue(engine, "nowhere.prices")
    with engine.connect() as connection:
        found = sources.read_sources(connection, [uuid.uuid4(), vanished])
        assert {uid: (source.columns, source.readable) for uid, source in found.items()} == {vanished: ({}, False)}
        assert sources.read_sources(connection, []) == {}


FOREIGN_NAMES = {
    "schema-qualified": ("market.daily", "market", "daily"),
    "upper case": ("Market.DailyPrices", "Market", "DailyPrices"),
    "a space and quotes": ('other data.the "prices"', "other data", 'the "prices"'),
    "an attack": ("x'); DROP TABLE msm__asset; --.y; --", "x'); DROP TABLE msm__asset; --", "y; --"),
}


@pytest.mark.parametrize(("name", "schema", "table"), FOREIGN_NAMES.values(), ids=FOREIGN_NAMES)
def test_any_table_name_is_quoted_part_by_part(engine, name, schema, table):  # R32
    quoted = ".".join('"' + part.replace('"', '""') + '"' for part in (schema, table))
    factories.sql(engine, f'CREATE SCHEMA "{schema}"')
    factories.sql(engine, f"CREATE TABLE {quoted} (time_index timestamptz, asset_identifier text, close float8)".replace("%", "%%"))
    factories.sql(engine, f"INSERT INTO {quoted} VALUES ('2024-01-02 21:00Z', 'A', 7)")
    uid = catalogue(engine, name)
    with engine.connect() as connection:
        source = one_source(connection, uid)
        prices = sources.read_prices(connection, source, "close", ["A"], None, t("2024-02-01"))
        assert prices["A"].values.tolist() == [7.0]
    assert factories.sql(engine, "SELECT to_regclass('msm__asset') IS NOT NULL") == [(True,)]


@pytest.mark.parametrize("name", ["", ".", "a b", "a.b.c.d", 'x"y', "pg_class", "no\u0001thing"])
def test_a_name_that_is_no_table_of_prices_hurts_nobody_else(engine, name):
    good, bad = EXTERNAL, catalogue(engine, name)
    with engine.connect() as connection:
        assert good in sources.read_sources(connection, [good, bad])


# -- prices -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bars(engine: Engine) -> Engine:
    closes = pd.DataFrame(
        {"A": [10.0, 11.0, 12.0, 13.0], "B": [np.nan, 21.0, np.nan, 23.0]}, factories.closes_of("2024-01-02", 4)
    )  # 2024-01-02 is a Tuesday
    factories.load_prices(engine, closes, volume=closes * 100, vwap=closes.iloc[:2] + 0.5)
    return engine


@pytest.fixture
def source(bars: Engine) -> sources.Source:
    with bars.connect() as connection:
        return one_source(connection, EXTERNAL)


def test_coverage_is_per_asset_column_and_as_of(connection, source):
    through = t("2024-01-31")
    found = sources.price_coverage(connection, source, "close", ["B", "A", "ghost"], through)
    assert found == {"A": (t("2024-01-02 21:00"), t("2024-01-05 21:00")), "B": (t("2024-01-03 21:00"), t("2024-01-05 21:00"))}
    # a null is no bar: vwap was published on the first two days only
    found = sources.price_coverage(connection, source, "vwap", ["A", "B"], through)
    assert found == {"A": (t("2024-01-02 21:00"), t("2024-01-03 21:00")), "B": (t("2024-01-03 21:00"), t("2024-01-03 21:00"))}
    assert sources.price_coverage(connection, source, "open", ["A"], through) == {}
    # as_of is included
    assert sources.price_coverage(connection, source, "close", ["A"], t("2024-01-04 21:00"))["A"][1] == t("2024-01-04 21:00")
    assert sources.price_coverage(connection, source, "close", ["A"], t("2024-01-04 20:59"))["A"][1] == t("2024-01-03 21:00")
    assert sources.price_coverage(connection, source, "close", ["A"], t("2024-01-01")) == {}
    assert sources.price_coverage(connection, source, "close", [], through) == {}


def test_prices_within_both_bounds(connection, source):
    found = sources.read_prices(connection, source, "close", ["A", "B", "ghost"], t("2024-01-03 21:00"), t("2024-01-05 21:00"))
    assert sorted(found) == ["A", "B"]
    assert found["A"].times.tolist() == [x.item() for x in us("2024-01-03T21", "2024-01-04T21", "2024-01-05T21")]
    assert found["A"].values.tolist() == [11.0, 12.0, 13.0]
    assert found["A"].volumes.tolist() == [1100.0, 1200.0, 1300.0]
    assert found["B"].values.tolist() == [21.0, 23.0]
    assert sources.read_prices(connection, source, "close", ["A"], t("2024-01-05 21:01"), t("2024-12-31")) == {}
    assert sources.read_prices(connection, source, "close", [], None, t("2024-12-31")) == {}


def test_what_the_table_says_is_passed_on(bars, source):
    """NaN, infinities and nonsense are prices like any other here: whoever needs the cell judges it. A null is no bar."""
    for day, price in enumerate(("NaN", "Infinity", "-3", "0"), start=10):
        factories.sql(
            bars, f"INSERT INTO msm__external_prices (asset_identifier, time_index, close) VALUES ('C', '2024-01-{day}', '{price}')"
        )
    factories.sql(bars, "INSERT INTO msm__external_prices (asset_identifier, time_index, vwap) VALUES ('C', '2024-01-20', 1)")
    with bars.connect() as connection:
        found = sources.read_prices(connection, source, "close", ["C"], None, t("2024-12-31"))["C"]
    np.testing.assert_array_equal(found.values, [np.nan, np.inf, -3.0, 0.0])
    assert np.isnan(found.volumes).all()


def test_infinite_timestamps_are_no_bars_and_stop_nobody(bars, source):
    """psycopg cannot even load them, and a coverage that fails would fail the plan of the whole fleet."""
    factories.sql(
        bars, "INSERT INTO msm__external_prices (asset_identifier, time_index, close) VALUES ('A','-infinity',1), ('A','infinity',1)"
    )
    with bars.connect() as connection:
        found = sources.price_coverage(connection, source, "close", ["A"], t("2024-12-31"))
        assert found == {"A": (t("2024-01-02 21:00"), t("2024-01-05 21:00"))}
        assert len(sources.read_prices(connection, source, "close", ["A"], None, t("2024-12-31"))["A"].times) == 4


def test_hostile_identifiers_are_values(engine):
    closes = pd.DataFrame({name: [float(i + 1)] for i, name in enumerate(HOSTILE)}, factories.closes_of("2024-01-02", 1))
    factories.load_prices(engine, closes)
    factories.register_assets(engine, HOSTILE)
    with engine.connect() as connection:
        source = one_source(connection, EXTERNAL)
        found = sources.read_prices(connection, source, "close", HOSTILE, None, t("2024-12-31"))
        assert {name: bars.values.tolist() for name, bars in found.items()} == {name: [i + 1.0] for i, name in enumerate(HOSTILE)}
        assert set(sources.price_coverage(connection, source, "close", HOSTILE, t("2024-12-31"))) == set(HOSTILE)
        assert set(sources.read_assets(connection, [*HOSTILE, "B", "é!"])) == set(HOSTILE)


def test_a_hostile_column_name_is_quoted(engine):
    name = 'clo%se"; DROP TABLE msm__asset; --'
    quoted = '"' + name.replace('"', '""') + '"'
    factories.sql(engine, f"CREATE TABLE odd (time_index timestamptz, asset_identifier text, {quoted} float8)")
    factories.sql(engine, "INSERT INTO odd VALUES ('2024-01-02 21:00Z', 'A', 3)")
    uid = catalogue(engine, "odd")
    with engine.connect() as connection:
        source = one_source(connection, uid)
        assert source.numeric == [name]
        assert sources.price_coverage(connection, source, name, ["A"], t("2024-12-31"))["A"][0] == t("2024-01-02 21:00")
        assert sources.read_prices(connection, source, name, ["A"], None, t("2024-12-31"))["A"].values.tolist() == [3.0]


# -- a table that somebody else made ------------------------------------------------------------------------------------------------


@pytest.fixture
def foreign(engine: Engine) -> uuid.UUID:
    """numeric prices, another character type, no volume, columns in another order, a column more, no primary key."""
    factories.sql(engine, "CREATE SCHEMA vendor")
    factories.sql(
        engine,
        "CREATE TABLE vendor.eod (settle numeric(18,4), note text, asset_identifier varchar(20), lots integer, time_index timestamptz)",
    )
    factories.sql(
        engine,
        "INSERT INTO vendor.eod VALUES (10.1250, 'x', 'A', 5, '2024-01-02 16:00-05'), (11.25, NULL, 'A', 6, '2024-01-03 21:00Z'),"
        " (NULL, 'no price', 'A', 0, '2024-01-04 21:00Z'), (99999999999999.9999, '', 'B', 1, '2024-01-03 21:00Z')",
    )
    return catalogue(engine, "vendor.eod", "VendorEod")


def test_a_foreign_table_is_a_source(engine, foreign):  # R32, R36
    with engine.connect() as connection:
        source = one_source(connection, foreign)
        assert (source.identifier, source.numeric) == ("VendorEod", ["lots", "settle"])
        coverage = sources.price_coverage(connection, source, "settle", ["A", "B"], t("2024-12-31"))
        assert coverage["A"] == (t("2024-01-02 21:00"), t("2024-01-03 21:00"))
        found = sources.read_prices(connection, source, "settle", ["A", "B"], None, t("2024-12-31"))
    assert found["A"].times.tolist() == [x.item() for x in us("2024-01-02T21", "2024-01-03T21")]
    assert found["A"].values.tolist() == [10.125, 11.25]
    assert found["B"].values.tolist() == [float("99999999999999.9999")]
    assert np.isnan(found["A"].volumes).all()  # R37
    with engine.connect() as connection:
        assert sources.read_prices(connection, source, "lots", ["A"], None, t("2024-12-31"))["A"].values.tolist() == [5.0, 6.0, 0.0]


def test_a_portfolio_lives_on_a_foreign_table(engine, foreign):  # R32, R37
    factories.store_calendar(engine)
    factories.register_assets(engine, ["A"])
    report = factories.run(
        engine, [factories.portfolio("p", factories.fixed(A=1.0), source=foreign, column="settle", fee=0.0)], "2024-01-04"
    )
    assert report.status == "landed", factories.messages(report)
    # bought at 10.125 for 1.0, then 11.25 / 10.125 = 10 / 9
    assert factories.values(engine, "p")["close"].tolist() == [1.0, pytest.approx(10 / 9, abs=1e-15)]
    assert factories.weights(engine, "p")[["volume_current", "volume_before"]].isna().all(axis=None)


def test_two_bars_at_one_time_are_refused(engine, foreign):
    factories.sql(engine, "INSERT INTO vendor.eod VALUES (10.2, 'again', 'A', 5, '2024-01-02 21:00Z')")
    with engine.connect() as connection:
        source = one_source(connection, foreign)
        with pytest.raises(SourceUnusable, match="VendorEod: A has two bars at one time"):
            sources.read_prices(connection, source, "settle", ["A", "B"], None, t("2024-12-31"))
        assert "B" in sources.read_prices(connection, source, "settle", ["B"], None, t("2024-12-31"))


UNUSABLE = {
    "no asset_identifier": "time_index timestamptz, ticker text, close float8",
    "no time_index": "day date, asset_identifier text, close float8",
    "a naive time_index": "time_index timestamp, asset_identifier text, close float8",
    "a date as time_index": "time_index date, asset_identifier text, close float8",
    "a numeric asset_identifier": "time_index timestamptz, asset_identifier bigint, close float8",
}


@pytest.mark.parametrize("columns", UNUSABLE.values(), ids=UNUSABLE)
def test_an_incompatible_table_fails_only_those_who_read_it(engine, columns):  # R36
    """It is told by the name of the source, as a failure of its own portfolios."""
    factories.open_market(engine, pd.DataFrame({"A": [1.0, 2.0]}, factories.closes_of("2024-01-02", 2)))
    factories.sql(engine, f"CREATE TABLE strange ({columns})")
    asset = "7" if "bigint" in columns else "'A'"
    factories.sql(engine, f"INSERT INTO strange VALUES ('2024-01-02 21:00Z', {asset}, 1), ('2024-01-03 21:00Z', {asset}, 2)")
    uid = catalogue(engine, "strange", "StrangePrices")
    fleet = [factories.portfolio("bad", factories.fixed(A=1.0), source=uid), factories.portfolio("good", factories.fixed(A=1.0))]
    report = factories.run(engine, fleet, "2024-01-10")
    assert factories.statuses(report) == {"bad": "failed", "good": "landed"}
    assert "StrangePrices" in factories.messages(report)["bad"]


# -- signals, weights, values -------------------------------------------------------------------------------------------------------


def store_vectors(engine: Engine, signal: str, **vectors: dict[str, float]) -> None:
    for day, vector in vectors.items():
        for asset, weight in vector.items():
            factories.sql(
                engine,
                "INSERT INTO msm__signal_weights (signal_uid, time_index, asset_identifier, signal_weight) VALUES (%s, %s, %s, %s)",
                (signal, f"2024-01-{day[1:]} 21:00Z", asset, weight),
            )


def vectors_of(rows) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for time, asset, weight in zip(rows.times, rows.assets, rows.weights, strict=True):
        found.setdefault(str(time)[8:10], {})[asset] = float(weight)
    return found


def test_the_vector_before_the_window_is_read_though_another_lies_inside(engine):
    """The lesson: what is valid at the start of a window was emitted before it."""
    store_vectors(engine, "s", d02={"A": 1.0}, d05={"A": 0.4, "B": 0.6}, d10={"B": 1.0}, d15={"A": 0.0})
    store_vectors(engine, "other", d07={"Z": 1.0})

    def read(since: str, through: str, *uids: str) -> dict[str, dict[str, dict[str, float]]]:
        with engine.connect() as connection:
            found = storage.read_signal_weights(connection, uids or ("s",), t(f"2024-01-{since}"), t(f"2024-01-{through}"))
        return {uid: vectors_of(rows) for uid, rows in found.items()}

    d05, d10 = {"A": 0.4, "B": 0.6}, {"B": 1.0}
    assert read("07 21:00", "12 21:00") == {"s": {"05": d05, "10": d10}}
    assert read("05 21:00", "12 21:00") == {"s": {"05": d05, "10": d10}}  # one emitted at `since` itself is the one before
    assert read("05 20:59", "10 21:00") == {"s": {"02": {"A": 1.0}, "05": d05, "10": d10}}  # `through` is included
    assert read("05 20:59", "10 20:59") == {"s": {"02": {"A": 1.0}, "05": d05}}
    assert read("20 21:00", "25 21:00") == {"s": {"15": {"A": 0.0}}}  # only one before
    assert read("01 00:00", "03 00:00") == {"s": {"02": {"A": 1.0}}}  # none before
    assert read("01 00:00", "02 00:00") == {}
    assert read("06 00:00", "08 00:00", "s", "other", "ghost") == {"s": {"05": d05}, "other": {"07": {"Z": 1.0}}}  # R75
    with engine.connect() as connection:
        everything = storage.read_signal_weights(connection, ["s"], frames.BEGINNING, t("2024-12-31"))
        assert sorted(vectors_of(everything["s"])) == ["02", "05", "10", "15"]
        assert storage.read_signal_weights(connection, [], frames.BEGINNING, t("2024-12-31")) == {}


def test_assets_of_a_vector_come_in_bytewise_order(engine):
    assets = ["Z", "a", "B", "é", "_", "🚀", "é"]
    store_vectors(engine, "s", d02=dict.fromkeys(assets, 1.0))
    with engine.connect() as connection:
        rows = storage.read_signal_weights(connection, ["s"], frames.BEGINNING, t("2024-12-31"))["s"]
    assert rows.assets == sorted(set(assets))
    assert [a.encode() for a in rows.assets] == sorted(a.encode() for a in set(assets))


def store_trade(engine: Engine, portfolio: str, day: str, **assets: tuple) -> None:
    for asset, (weight, price, volume) in assets.items():
        factories.sql(
            engine,
            "INSERT INTO msm__portfolio_weights (portfolio_identifier, time_index, asset_identifier, weight, weight_before,"
            " price_current, volume_current) VALUES (%s, %s, %s, %s, 0, %s, %s)",
            (portfolio, f"2024-01-{day} 21:00Z", asset, weight, price, volume),
        )


def test_the_last_trade_of_each_portfolio_and_of_no_other(engine):  # R73
    store_trade(engine, "p", "02", A=(1.0, 10.0, None))
    store_trade(engine, "p", "05", B=(0.7, 20.0, 5.0), A=(0.0, 11.0, None), C=(-0.2, 30.0, None))
    store_trade(engine, "q", "09", A=(1.0, 12.0, None))
    with engine.connect() as connection:
        found = storage.last_trades(connection, ["p", "q", "ghost"])
        assert storage.last_trades(connection, []) == {}
    assert sorted(found) == ["p", "q"]
    trade = found["p"]
    assert (trade.time, trade.assets) == (us("2024-01-05T21")[0], ("A", "B", "C"))
    assert trade.held() == ("B", "C")
    assert (trade.weights.tolist(), trade.prices.tolist()) == ([0.0, 0.7, -0.2], [11.0, 20.0, 30.0])
    np.testing.assert_array_equal(trade.volumes, [np.nan, 5.0, np.nan])


def test_what_is_held_is_what_the_last_trade_left_with_a_weight(engine):  # R70, R73
    store_trade(engine, "p", "02", A=(1.0, 10.0, None))
    store_trade(engine, "p", "05", b=(0.7, 20.0, 5.0), A=(0.0, 11.0, None), Z=(-0.2, 30.0, None))
    store_trade(engine, "sold", "09", A=(0.0, 12.0, None))
    with engine.connect() as connection:
        assert storage.held_assets(connection, ["p", "sold", "ghost"]) == {"p": ("Z", "b"), "sold": ()}
        assert storage.held_assets(connection, []) == {}


def test_the_partition_of_a_scope_is_where_its_rows_lie(engine):
    names = [f"p{i}" for i in range(40)] + HOSTILE
    with engine.connect() as connection:
        assert storage.partitions_of(connection, PortfoliosStorage, names) == {}  # a plain table
    prepare.lay_out(engine, partitions=5)
    factories.sql(
        engine,
        'INSERT INTO msm__portfolios (portfolio_identifier, time_index, close, "return", calculated_close, close_time)'
        " SELECT n, '2024-01-02 21:00Z', 1, 0, 1, '2024-01-02 21:00Z' FROM unnest(%s::text[]) n",
        (names,),
    )
    lie = dict(factories.sql(engine, "SELECT portfolio_identifier, right(tableoid::regclass::text, 1)::int FROM msm__portfolios"))
    assert set(lie.values()) == set(range(5))
    with engine.connect() as connection:
        assert storage.partitions_of(connection, PortfoliosStorage, names) == lie
        assert storage.partitions_of(connection, PortfoliosStorage, []) == {}


def test_years_are_nobodys_partition(engine):
    prepare.lay_out(engine, yearly=True)
    with engine.connect() as connection:
        assert storage.partitions_of(connection, PortfoliosStorage, ["p"]) == {}


def test_values_by_exact_key(engine):
    for name, day, close, calculated in (("p", "02", 1.0, 1.5), ("p", "03", 2.0, 2.5), ("q", "02", 3.0, 3.5)):
        factories.sql(
            engine,
            'INSERT INTO msm__portfolios (portfolio_identifier, time_index, close, "return", calculated_close, close_time)'
            " VALUES (%s, %s, %s, 0, %s, now())",
            (name, f"2024-01-{day} 21:00:00.000001Z", close, calculated),
        )
    first, second = us("2024-01-02T21:00:00.000001", "2024-01-03T21:00:00.000001")
    keys = [("p", first), ("q", first), ("q", second), ("ghost", first), ("p", first), ("p", us("2024-01-02T21")[0])]
    with engine.connect() as connection:
        assert storage.read_values(connection, keys) == {("p", first): (1.0, 1.5), ("q", first): (3.0, 3.5)}
        assert storage.read_values(connection, []) == {}


# -- progress -----------------------------------------------------------------------------------------------------------------------


def test_progress_rows_are_made_once_and_kept(engine):
    scopes = [storage.Scope(PortfoliosStorage, name) for name in ("p", "q", "p")]
    with engine.begin() as connection:
        storage.ensure_progress(connection, scopes)
    factories.sql(engine, "UPDATE msm__data_node_update SET watermark = '2024-01-05Z', epoch = 7, row_count = 3 WHERE scope = 'p'")
    with engine.begin() as connection:
        storage.ensure_progress(connection, [*scopes, storage.Scope(SignalWeightsStorage, "p")])
    rows = factories.progress(engine)
    assert set(rows) == {("PortfoliosTS", "p"), ("PortfoliosTS", "q"), ("SignalWeightsTS", "p")}
    assert (rows["PortfoliosTS", "p"]["epoch"], rows["PortfoliosTS", "q"]["epoch"]) == (7, 0)
    with engine.connect() as connection:
        found = storage.read_progress(connection, [s.uid for s in scopes] + [uuid.uuid4()])
    assert (found[scopes[0].uid].watermark, found[scopes[0].uid].epoch, found[scopes[0].uid].row_count) == (t("2024-01-05"), 7, 3)
    assert (found[scopes[1].uid].watermark, len(found)) == (None, 2)
