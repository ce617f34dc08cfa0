"""The binary formats, against the server: what Postgres reads back must be what went in, to the bit, in both directions."""

import struct
from datetime import UTC, datetime

import numpy as np
import pytest
from psycopg import sql
from sqlalchemy import Connection, Engine

from msm_core.copying import ROWS_PER_BLOCK, Text, concatenate, copy_in, execute, fetch, row_count
from tests import factories

TABLE = 'odd "name"; --'


@pytest.fixture
def connection(empty_engine: Engine):
    with empty_engine.begin() as connection:
        connection.exec_driver_sql("SET LOCAL TIME ZONE 'UTC'")
        connection.exec_driver_sql('CREATE TABLE "odd ""name""; --" (n bigserial, t timestamptz, "a %% ""b""" text, v float8)')
        yield connection


def write(connection: Connection, times: np.ndarray, texts: Text, floats: np.ndarray) -> int:
    return copy_in(connection, TABLE, {"t": times, 'a % "b"': texts, "v": floats})


def stored(connection: Connection, columns: str) -> list[tuple]:
    """Rows as Postgres itself prints or sends them: float8send and timestamptz_send are the server's own bytes."""
    return list(connection.exec_driver_sql(f'SELECT {columns} FROM "odd ""name""; --" ORDER BY n').fetchall())


def bits(values: np.ndarray) -> list[bytes]:
    return [struct.pack(">d", value) for value in values]


SPECIAL = [0.0, -0.0, 5e-324, -5e-324, 2.2250738585072009e-308, 1.7976931348623157e308, -1.7976931348623157e308, 0.1, 1 / 3]


def test_doubles_keep_their_bits(connection):
    generator = np.random.default_rng(11)
    anything = np.frombuffer(generator.bytes(8 * 20_000), ">f8").astype(np.float64)  # random bits: every exponent, denormals too
    values = np.concatenate([SPECIAL, anything[np.isfinite(anything)]])
    rows = write(connection, np.full(len(values), "2024-01-01", "datetime64[us]"), Text.constant("x", len(values)), values)
    assert rows == len(values) > 19_000
    assert [bytes(b) for (b,) in stored(connection, "float8send(v)")] == bits(values)


def test_nan_and_nat_become_null_and_infinities_stay(connection):
    values = np.array([np.nan, np.inf, -np.inf, -0.0, 1.5])
    times = np.array(["NaT", "2024-01-01", "NaT", "2024-01-02", "2024-01-03"], "datetime64[us]")
    write(connection, times, Text.constant("x", 5), values)
    assert stored(connection, "v::text") == [(None,), ("Infinity",), ("-Infinity",), ("-0",), ("1.5",)]
    assert [t is None for (t,) in stored(connection, "t")] == [True, False, True, False, False]


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_a_check_still_refuses_infinities(engine, value):
    block = {
        "signal_uid": Text.constant("s", 1),
        "time_index": np.array(["2024-01-01"], "datetime64[us]"),
        "asset_identifier": Text.constant("A", 1),
        "signal_weight": np.array([value]),
    }
    with pytest.raises(Exception, match="ck_msm__signal_weights_finite"), engine.begin() as connection:
        copy_in(connection, "msm__signal_weights", block)
    assert factories.sql(engine, "SELECT count(*) FROM msm__signal_weights") == [(0,)]


def test_times_before_2000_and_far_away(connection):
    times = ["0001-01-01", "1677-09-21T00:12:43.145225", "1969-12-31T23:59:59.999999", "1970-01-01", "1999-12-31T23:59:59.999999"]
    times += ["2000-01-01", "2000-01-01T00:00:00.000001", "2024-02-29T21:00", "2262-04-12", "9999-12-31T23:59:59.999999"]
    given = np.array(times, "datetime64[us]")
    write(connection, given, Text.constant("x", len(given)), np.zeros(len(given)))
    # independent of numpy: python's own datetimes, compared by the server
    expected = [datetime.fromisoformat(t if "T" in t else f"{t}T00:00").replace(tzinfo=UTC) for t in times]
    assert [t for (t,) in stored(connection, "t")] == expected


def test_coarser_and_finer_times_are_microseconds(connection):
    given = np.array(["2024-01-01T00:00:00.123456789"], "datetime64[ns]")
    write(connection, given, Text.constant("x", 1), np.zeros(1))
    days = np.array(["1900-03-01"], "datetime64[D]")
    write(connection, days, Text.constant("x", 1), np.zeros(1))
    expected = [datetime(2024, 1, 1, 0, 0, 0, 123456, UTC), datetime(1900, 3, 1, tzinfo=UTC)]
    assert [t for (t,) in stored(connection, "t")] == expected


def test_texts_of_every_length(connection):
    generator = np.random.default_rng(3)
    alphabet = "aZ0 '\"\\\t\n\r,;%:$-éß漢字🚀\u200f\u0301"
    texts = ["", " ", "\\N", "\\.", "NULL", "e\u0301", "é", "🚀" * 64, "x" * 255, "漢" * 255, *("x" * n for n in range(1, 40))]
    texts += ["".join(generator.choice(list(alphabet), size)) for size in generator.integers(0, 60, 200)]
    categories = tuple(dict.fromkeys(texts))
    codes = generator.integers(0, len(categories), 1000)
    write(connection, np.full(1000, "2024-01-01", "datetime64[us]"), Text(codes, categories), np.zeros(1000))
    assert [t for (t,) in stored(connection, '"a %% ""b"""')] == [categories[c] for c in codes]


def test_a_text_that_postgres_cannot_hold_is_an_error_not_a_shift(connection):
    with pytest.raises(Exception, match="0x00"), connection.begin_nested():
        write(connection, np.full(2, "2024-01-01", "datetime64[us]"), Text(np.array([0, 1]), ("a\0b", "c")), np.zeros(2))
    assert stored(connection, "v") == []


def test_more_rows_than_one_block_and_views(connection):
    rows = 2 * ROWS_PER_BLOCK + 17
    floats = np.random.default_rng(5).normal(size=(rows, 3))[:, 1]  # a strided view, as columns of a matrix are
    times = np.datetime64("1999-12-01", "us") + np.arange(rows)[::-1] * np.timedelta64(7, "m")  # a reversed view, across 2000
    names = tuple(f"asset {i}" for i in range(1000))
    codes = np.arange(rows) % 1000
    assert write(connection, times, Text(codes, names), floats) == rows
    query = sql.SQL(
        'SELECT array_agg(v ORDER BY n), array_agg(t ORDER BY n), array_agg(("a % ""b"""=\'asset \'||((n-1)%1000))::int::float8 ORDER BY n)'
        ' FROM "odd ""name""; --"'.replace("%", "%%")
    )
    ((values, instants, matches),) = fetch(connection, query, {})
    assert values.tobytes() == np.ascontiguousarray(floats).tobytes()
    assert (instants == times).all()
    assert (matches == 1.0).all()


@pytest.mark.parametrize("texts", [("aa", "bb", "cc"), ("a", "", "ccc")], ids=["of one length", "of several"])
@pytest.mark.parametrize(
    ("floats_missing", "times_missing"),
    [
        (slice(0, 50), slice(0, 0)),  # a first vector has no price before
        (slice(0, 50), slice(40, 60)),
        (slice(ROWS_PER_BLOCK - 1, ROWS_PER_BLOCK + 1), slice(-1, None)),
        (slice(None, None, 3), slice(1, None, 7)),  # more runs than are worth telling apart
        (slice(None), slice(5, 6)),
        (slice(None), slice(None)),
        (slice(ROWS_PER_BLOCK), slice(ROWS_PER_BLOCK)),
    ],
)
def test_nulls_wherever_they_are(connection, texts, floats_missing, times_missing):
    rows = ROWS_PER_BLOCK + 100
    floats, codes = np.arange(rows) + 0.5, np.arange(rows) % 3
    times = np.datetime64("2024-01-01", "us") + np.arange(rows) * np.timedelta64(1, "h")
    floats[floats_missing], times[times_missing] = np.nan, np.datetime64("NaT")
    write(connection, times, Text(codes, texts), floats)
    given = zip(times.tolist(), (texts[c] for c in codes), floats.tolist(), strict=True)
    expected = [(t and t.replace(tzinfo=UTC), a, None if v != v else v) for t, a, v in given]
    assert stored(connection, 't, "a %% ""b""", v') == expected


def test_no_rows(connection):
    assert write(connection, np.empty(0, "datetime64[us]"), Text.constant("x", 0), np.empty(0)) == 0
    assert stored(connection, "*") == []


def test_blocks_one_after_the_other(connection):
    def block(texts: Text, *floats: float) -> dict:
        times = np.full(len(floats), "2024-01-01", "datetime64[us]")
        return {"t": times, 'a % "b"': texts, "v": np.array(floats)}

    parts = [
        block(Text(np.array([1, 0]), ("x", "yy")), 1.0, 2.0),
        block(Text.constant("", 0)),
        block(Text(np.array([0, 2]), ("yy", "unused", "z")), 3.0, np.nan),
    ]
    together = concatenate(parts)
    assert row_count(together) == 4
    copy_in(connection, TABLE, together)
    assert stored(connection, '"a %% ""b""", v') == [("yy", 1.0), ("x", 2.0), ("yy", 3.0), ("z", None)]


# -- reading ------------------------------------------------------------------------------------------------------------------


def test_array_loaders_equal_what_the_server_sends(connection):
    texts = ["0", "-0", "1e-320", "-1.7976931348623157e308", "0.1", "Infinity", "-Infinity", "NaN", "0.30000000000000004"]
    query = sql.SQL("SELECT %(texts)s::float8[], ARRAY(SELECT float8send(x) FROM unnest(%(texts)s::float8[]) x)")
    ((loaded, raw),) = fetch(connection, query, {"texts": texts})
    assert loaded.dtype == np.float64
    assert bits(loaded) == [bytes(b) for b in raw]


def test_time_arrays(connection):
    times = ["0001-01-01 00:00:00+00", "1999-12-31 23:59:59.999999+00", "2000-01-01 00:00:00+00", "2024-02-29 21:00:00.5+00"]
    times += ["9999-12-31 23:59:59.999999+00"]
    ((loaded,),) = fetch(connection, sql.SQL("SELECT %(times)s::timestamptz[]"), {"times": times})
    assert loaded.dtype == np.dtype("datetime64[us]")
    assert [t.item().replace(tzinfo=UTC) for t in loaded] == [datetime.fromisoformat(t) for t in times]


def test_empty_and_absent_arrays(connection):
    query = sql.SQL("SELECT '{}'::float8[], '{}'::timestamptz[], NULL::float8[], array_agg(x) FROM unnest('{}'::float8[]) x")
    ((floats, times, absent, aggregated),) = fetch(connection, query, {})
    assert (len(floats), floats.dtype.kind) == (0, "f")
    assert (len(times), times.dtype) == (0, np.dtype("datetime64[us]"))
    assert (absent, aggregated) == (None, None)


def test_a_loaded_array_may_be_written_to(connection):
    ((loaded,),) = fetch(connection, sql.SQL("SELECT ARRAY[1.0, 2.0]::float8[]"), {})
    loaded[0] = 7.0
    assert loaded.tolist() == [7.0, 2.0]


def test_loaders_stay_with_their_cursor(connection):
    """Arrays become numpy only in `fetch`: another cursor of the same connection, SQLAlchemy's for one, keeps its lists."""
    fetch(connection, sql.SQL("SELECT ARRAY[1.0]::float8[]"), {})
    assert connection.exec_driver_sql("SELECT ARRAY[1.0, 2.0]::float8[]").scalar_one() == [1.0, 2.0]


def test_execute_tells_the_rows_it_touched(connection):
    write(connection, np.full(3, "2024-01-01", "datetime64[us]"), Text.constant("x", 3), np.array([1.0, 2.0, 3.0]))
    statement = sql.SQL("UPDATE {} SET v = v * 2 WHERE v > %(least)s").format(sql.Identifier(TABLE))
    assert execute(connection, statement, {"least": 1.5}) == 2
    assert stored(connection, "v") == [(1.0,), (4.0,), (6.0,)]


def test_what_is_copied_belongs_to_the_transaction(engine):
    block = {
        "asset_identifier": Text.constant("A", 1),
        "time_index": np.array(["2024-01-01"], "datetime64[us]"),
        "close": np.array([1.0]),
    }
    with engine.connect() as connection:
        transaction = connection.begin()
        copy_in(connection, "msm__external_prices", block)
        transaction.rollback()
    assert factories.sql(engine, "SELECT count(*) FROM msm__external_prices") == [(0,)]
