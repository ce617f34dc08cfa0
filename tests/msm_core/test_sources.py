"""Reads of bars, carries and calendars of many assets, over our storages and over tables that somebody else made."""

import uuid
from datetime import UTC, datetime

import numpy as np
import pytest
from sqlalchemy import Engine

from msm_core.database import transaction
from msm_core.interpolation import NUMBERS, PriceBars
from msm_core.models import ExternalPricesStorage, InterpolatedPricesStorage
from msm_core.sources import AssetFacts, Source, read_assets, read_bars, read_carry, read_sources
from msm_ray.prepare import prepare
from tests import factories
from tests.msm_core.data_nodes.test_interpolation import catalogue, interpolated

NULL = float("nan")
HOSTILE = ["A", "b", "é", "e\u0301", "it's", '"quoted"', "x; DROP TABLE msm__asset; --", "🚀", "x" * 255]
HOSTILE += ["100%s", "a\nb", " ", "\\", "%(y)s", "{x}"]


def t(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def us(*texts: str) -> list[np.datetime64]:
    return [np.datetime64(text, "us") for text in texts]


END = t("2024-12-31")


def source_of(engine: Engine, uid: uuid.UUID) -> Source:
    with engine.connect() as connection:
        return read_sources(connection, [uid])[uid]


def read(engine: Engine, source: Source, assets, since=None, through=END) -> PriceBars:
    with transaction(engine, read_only=True) as connection:
        return read_bars(connection, source, assets, since or [None] * len(assets), through)


def closes(bars: PriceBars, assets) -> dict[str, dict[str, float]]:
    """`{"A": {"02 21:00": 10.0}}`, in the order of the rows."""
    found: dict[str, dict[str, float]] = {}
    for place, time, close in zip(bars.asset, bars.times, bars.numbers["close"], strict=True):
        found.setdefault(assets[place], {})[str(time)[8:16].replace("T", " ")] = float(close)
    return found


@pytest.fixture
def source(engine: Engine) -> Source:
    """A: 2 to 5 January, that of the 4th without a close; B: the 3rd only."""
    factories.sql(
        engine,
        "INSERT INTO msm__external_prices (asset_identifier, time_index, open, high, close, volume, open_time, interpolated) VALUES "
        "('A','2024-01-05 21:00Z',4,NULL,13,NULL,'2024-01-05 14:30Z',true), ('A','2024-01-02 21:00Z',1,2,10,500,'2024-01-02 14:30Z',NULL),"
        "('A','2024-01-03 21:00Z',NULL,'NaN','NaN',0,NULL,false), ('A','2024-01-04 21:00Z',9,9,NULL,9,NULL,NULL),"
        "('B','2024-01-03 21:00Z',NULL,NULL,20,NULL,NULL,NULL), ('Z','2024-01-03 21:00Z',NULL,NULL,99,NULL,NULL,NULL)",
    )
    return source_of(engine, ExternalPricesStorage.storage_uid())


def test_bars_as_they_are_stored(engine, source):  # lesson: a null in one column that overwrites the whole bar
    bars = read(engine, source, ["A", "ghost", "B"])
    assert bars.asset.tolist() == [0, 0, 0, 2]
    assert bars.times.tolist() == [x.item() for x in us("2024-01-02T21", "2024-01-03T21", "2024-01-05T21", "2024-01-03T21")]
    np.testing.assert_array_equal(bars.numbers["close"], [10, NULL, 13, 20])  # a NaN is told; a null close is no bar
    np.testing.assert_array_equal(bars.numbers["open"], [1, NULL, 4, NULL])
    np.testing.assert_array_equal(bars.numbers["high"], [2, NULL, NULL, NULL])
    np.testing.assert_array_equal(bars.numbers["volume"], [500, 0, NULL, NULL])
    assert set(bars.numbers) == set(NUMBERS)
    assert all(np.isnan(bars.numbers[name]).all() for name in ("low", "trade_count", "vwap"))
    np.testing.assert_array_equal(bars.open_times, us("2024-01-02T14:30", "NaT", "2024-01-05T14:30", "NaT"))
    assert bars.interpolated.tolist() == [False, False, True, False]


def test_every_asset_has_a_beginning_of_its_own(engine, source):
    assets = ["A", "B", "Z"]
    found = closes(read(engine, source, assets, [t("2024-01-02 21:00"), None, t("2024-01-03 20:59")], t("2024-01-03 21:00")), assets)
    assert {a: list(times) for a, times in found.items()} == {"A": ["03 21:00"], "B": ["03 21:00"], "Z": ["03 21:00"]}
    before = read(engine, source, assets, [None, t("2024-01-03 21:00"), None], t("2024-01-03 20:59"))
    assert closes(before, assets) == {"A": {"02 21:00": 10.0}}
    for nothing in (read(engine, source, []), read(engine, source, ["ghost"]), read(engine, source, ["A"], None, t("2020-01-01"))):
        assert (len(nothing.asset), len(nothing.times), nothing.times.dtype, nothing.open_times.dtype) == (0, 0, "<M8[us]", "<M8[us]")
        assert {len(column) for column in nothing.numbers.values()} == {0}


def test_infinite_times_and_infinite_numbers(engine, source):
    infinite = "VALUES ('B', '-infinity', 1), ('B', 'infinity', 1)"
    factories.sql(engine, f"INSERT INTO msm__external_prices (asset_identifier, time_index, close) {infinite}")
    factories.sql(engine, "UPDATE msm__external_prices SET volume = 'infinity', vwap = '-infinity' WHERE asset_identifier = 'B'")
    bars = read(engine, source, ["B"])
    assert (bars.times.tolist(), bars.numbers["volume"].tolist()) == ([us("2024-01-03T21")[0].item()], [float("inf")])
    assert bars.numbers["vwap"].tolist() == [float("-inf")]


def test_hostile_identifiers_are_values(engine, source):
    for i, name in enumerate(HOSTILE):
        row = (name, f"2024-02-{i + 1:02} 21:00Z", i + 1.0)
        factories.sql(engine, "INSERT INTO msm__external_prices (asset_identifier, time_index, close) VALUES (%s, %s, %s)", row)
    with factories.statements() as sent:
        bars = read(engine, source, HOSTILE, [t("2024-01-31")] * len(HOSTILE))
    assert bars.asset.tolist() == list(range(len(HOSTILE)))
    assert bars.numbers["close"].tolist() == [i + 1.0 for i in range(len(HOSTILE))]
    assert len([s for s in sent if "msm__external_prices" in s]) == 1  # R100


FOREIGN = {
    "the key and a close": ("close double precision", "10.5", {"close": 10.5}),
    "numeric, as exact as a float8": ("close numeric(18,4), volume bigint", "99999999999999.9999, 7", {"close": 1e14, "volume": 7.0}),
    "real and integers": ("close real, trade_count smallint, high integer", "0.5, 3, 1", {"close": 0.5, "trade_count": 3, "high": 1}),
    "numbers that are text": ("close float8, volume text, vwap varchar(9)", "1, '2', '3'", {"close": 1.0}),
    "times and marks that are something else": ("close float8, open_time date, interpolated integer", "1, '2024-01-02', 1", {"close": 1.0}),
    "names in other letters": ('close float8, "Volume" float8, "HIGH" float8', "1, 2, 3", {"close": 1.0}),
}


@pytest.mark.parametrize(("columns", "values", "expected"), FOREIGN.values(), ids=FOREIGN)
def test_columns_of_a_foreign_table(engine, columns, values, expected):  # R32
    factories.sql(engine, "CREATE SCHEMA vendor")
    factories.sql(engine, f'CREATE TABLE vendor."odd %s Bars" ({columns}, asset_identifier varchar(20), time_index timestamptz)')
    factories.sql(engine, f"""INSERT INTO vendor."odd %s Bars" VALUES ({values}, 'A', '2024-01-02 16:00-05')""")
    bars = read(engine, source_of(engine, catalogue(engine, "vendor.odd %s Bars")), ["A"])
    assert bars.times.tolist() == [us("2024-01-02T21")[0].item()]
    assert {name: column.tolist() for name, column in bars.numbers.items() if not np.isnan(column).all()} == {
        name: [value] for name, value in expected.items()
    }
    assert (np.isnat(bars.open_times).tolist(), bars.interpolated.tolist()) == ([True], [False])


def test_what_is_stored_at_the_watermarks(engine):
    price_source = interpolated()
    prepare(engine, [price_source])
    storage = InterpolatedPricesStorage.configured(price_source.source_uid, "1d", "1d", "ffill")
    factories.sql(
        engine,
        f"INSERT INTO {storage.__tablename__} (asset_identifier, time_index, close, vwap) VALUES ('A','2024-01-02 21:00Z',1.5,2.5),"
        "('A','2024-01-03 21:00Z',3.5,NULL), ('B','2024-01-03 21:00Z',9,9)",
    )
    with engine.connect() as connection, factories.statements() as sent:
        times = [t("2024-01-03 21:00"), None, t("2024-01-02 21:00"), t("2024-01-04 21:00")]
        carry = read_carry(connection, storage, ["A", "fresh", "A", "B"], times)
        assert len([s for s in sent if storage.__tablename__ in s]) == 1
        nobody = read_carry(connection, storage, [], [])
    np.testing.assert_array_equal(carry.times, us("2024-01-03T21", "NaT", "2024-01-02T21", "2024-01-04T21"))
    np.testing.assert_array_equal(carry.close, [3.5, NULL, 1.5, NULL])  # B has no row at its watermark: its state is lost
    np.testing.assert_array_equal(carry.vwap, [NULL, NULL, 2.5, NULL])
    assert (len(nobody.times), nobody.times.dtype) == (0, "<M8[us]")


def test_calendars_of_assets(engine):
    calendar = factories.store_calendar(engine)
    factories.register_assets(engine, [*HOSTILE, "always"])
    factories.sql(engine, "UPDATE msm__asset SET calendar_uid = %s WHERE unique_identifier <> 'always'", (calendar,))
    with engine.connect() as connection:
        found = read_assets(connection, [*HOSTILE, "always", "ghost"])
        assert read_assets(connection, []) == {}
    assert found == {**dict.fromkeys(HOSTILE, AssetFacts(calendar, None)), "always": AssetFacts(None, None)}
