"""Bars from files: what the file says is what is stored; anything wrong is named by row, and then nothing is stored at all."""

import csv
import gzip
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sqlalchemy import Engine

import msm_core
from msm_core.api import register_source
from msm_core.data_nodes import bar_files, loading
from msm_core.data_nodes.loading import LoadReport, load_prices
from msm_core.database import transaction
from msm_core.errors import CalendarNotFound, ConfigurationError, LoadRefused, MsmError, SourceNotRegistered, SourceUnusable, UnusableFile
from msm_core.models import ExternalPricesStorage
from tests import factories

PRICES = ExternalPricesStorage.__tablename__
ASSETS = ["A", "B", "C"]


@pytest.fixture
def market(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Three assets and a calendar of weekdays, closing 21:00; files are read some 5 rows at a time."""
    monkeypatch.setattr(bar_files, "CSV_BLOCK_BYTES", 200)
    monkeypatch.setattr(bar_files, "PARQUET_CELLS", 20)
    msm_core.start_engine()
    factories.register_assets(engine, ASSETS)
    factories.store_calendar(engine)
    return engine


@pytest.fixture
def load(market: Engine, tmp_path: Path):
    """`load("time,asset,close\\n...")` writes the text to a file and loads it into ExternalPricesTS."""

    def load_text(text: str, source: str = "ExternalPricesTS", **options: Any) -> LoadReport:
        path = tmp_path / "bars.csv"
        path.write_text(text)
        return load_prices(market, path, source, **options)

    return load_text


def write(frame: pd.DataFrame, path: Path) -> None:
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False)


def stored(engine: Engine, columns: str = "close", table: str = PRICES) -> list[tuple[Any, ...]]:
    query = f"SELECT asset_identifier::text, to_char(time_index, 'MM-DD HH24:MI'), {columns} FROM {table} ORDER BY 1, 2"
    return factories.sql(engine, query)


def refusal(load: Any, text: str, **options: Any) -> list[tuple[Any, ...]]:
    """(row, asset, time, column, reason) of everything that is wrong with the file."""
    with pytest.raises(LoadRefused) as caught:
        load(text, **options)
    assert caught.value.facts["count"] == len(caught.value.facts["errors"])
    return [tuple(error.values()) for error in caught.value.facts["errors"]]


# -- what is loaded -----------------------------------------------------------------------------------------------------------


def test_every_form_of_the_same_bars_stores_the_same_rows(market, tmp_path):
    """Breaks: what is stored depends on the form of the file, or on where its chunks end."""
    closes = factories.walks("2024-01-02", 40, ASSETS)
    closes.iloc[3, 1] = closes.iloc[39, 2] = np.nan  # B has no bar on 2024-01-05, C none on the last day
    wide = closes.rename_axis("Date")
    long = wide.melt(ignore_index=False, var_name="Ticker", value_name="Close").dropna().reset_index()
    paths = [tmp_path / name for name in ("long.csv", "long.csv.gz", "long.parquet", "wide.csv", "wide.parquet")]
    for path, frame in zip(paths, [long, long, long, wide.reset_index(), wide.reset_index()], strict=True):
        write(frame, path)
    bars = zip(long["Ticker"], long["Date"], long["Close"], strict=True)
    expected = sorted(bars)
    assert len(expected) == 3 * 40 - 2
    seen: list[int] = []
    for path in paths:
        first, again = (load_prices(market, path, "ExternalPricesTS", progress=seen.append) for _ in range(2))
        assert (first.bars_read, first.rows_written, first.assets, again.rows_written) == (118, 118, 3, 0)
        assert (first.first, first.last) == (closes.index[0], closes.index[-1])
        rows = factories.sql(market, f"SELECT asset_identifier::text, time_index, close, interpolated FROM {PRICES} ORDER BY 1, 2")
        assert [row[:3] for row in rows] == expected
        assert {row[3] for row in rows} == {False}
        factories.sql(market, f"TRUNCATE {PRICES}")
    assert len(seen) > 40  # chunks, and not one of them a whole file
    assert max(seen) == 118


def test_all_columns_by_name_and_an_empty_cell_is_null(load, market):
    """Breaks: a column is dropped in silence, or an empty cell becomes 0."""
    header = "\ufeffTIME_INDEX,Symbol,OPEN,close,Volume,trade_count,vwap,Open_Time\n"
    report = load(f"{header}2024-01-02T16:00:00-05:00,A,+1,2.50, 7 ,3,,2024-01-02 14:30Z\n2024-01-02 21:00:00.000001000Z,B,,1e-3,0,,,\n")
    assert (report.rows_written, report.assets_created) == (2, 0)
    assert stored(market, "open, close, volume, trade_count, vwap, to_char(open_time, 'HH24:MI')") == [
        ("A", "01-02 21:00", 1.0, 2.5, 7.0, 3.0, None, "14:30"),
        ("B", "01-02 21:00", None, 0.001, 0.0, None, None, None),
    ]


def test_a_second_file_corrects_what_it_names_and_nothing_else(load, market):
    """Breaks: a column that is not in the file is wiped, or an empty cell does not take a wrong price back."""
    load("time,asset,close,volume\n2024-01-02T21:00Z,A,1,5\n2024-01-02T21:00Z,B,2,6\n")
    assert load("time,asset,close\n2024-01-02T21:00Z,A,1\n2024-01-02T21:00Z,B,\n").rows_written == 1
    assert stored(market, "close, volume") == [("A", "01-02 21:00", 1.0, 5.0), ("B", "01-02 21:00", None, 6.0)]


def test_a_file_without_rows_loads_nothing(load):
    """Breaks: a holiday's empty file is an error."""
    report = load("time,asset,close\n")
    assert (report.bars_read, report.rows_written, report.assets, report.first) == (0, 0, 0, None)


def test_a_strangers_table_takes_what_its_columns_take(load, market):
    """Breaks: digits are lost on the way into numeric, fractions in integer, or their names are not quoted."""
    factories.sql(market, "CREATE SCHEMA vendor")
    columns = 'asset_identifier text, time_index timestamptz, "Close%" numeric(24,6), px real, lots int, note varchar(5)'
    factories.sql(market, f'CREATE TABLE vendor."Bars %s ""q""" ({columns}, UNIQUE (time_index, asset_identifier), CHECK (lots < 100))')
    register_source("V", 'vendor.Bars %s "q"')
    text = "date,ticker,close%,PX,lots,note\n2024-01-02T21:00Z,A,123456789012.123456,0.1,3,ok\n2024-01-03T21:00Z,A,0.1,,,\n"
    assert (load(text, "V").rows_written, load(text, "V").rows_written) == (2, 0)
    assert stored(market, '"Close%"::text, px::text, lots, note', 'vendor."Bars %s ""q"""') == [
        ("A", "01-02 21:00", "123456789012.123460", "0.1", 3, "ok"),  # the nearest double ends there: 17 digits, not 15
        ("A", "01-03 21:00", "0.100000", None, None, None),
    ]
    assert refusal(load, "time,asset,lots\n2024-01-02T21:00Z,A,1.5\n", source="V") == [
        (2, "A", "2024-01-02T21:00Z", "lots", "'1.5' is not whole, and lots is integer")
    ]
    for cells, told in (("100,", "check constraint"), ("3e9,", "out of range"), ("1,too long", "too long for type")):
        with pytest.raises(SourceUnusable, match=f"refused the rows .*{told}"):
            load(f"time,asset,lots,note\n2024-01-04T21:00Z,A,{cells}\n", "V")
    assert len(stored(market, "1", 'vendor."Bars %s ""q"""')) == 2
    assert load("time,A,B\n2024-01-04T21:00Z,5,\n", "V", column="px").rows_written == 1


# -- times --------------------------------------------------------------------------------------------------------------------


def test_a_date_is_stamped_at_the_close_of_its_session(load, market):
    """Breaks: a close is known at midnight, before it was traded; or a bar of a holiday is invented."""
    wide = "date,A,B\n2024-01-05,1,2\n2024-01-08,,3\n"
    report = load(wide, calendar=factories.CALENDAR)
    assert (report.bars_read, report.rows_written) == (3, 3)  # an empty cell is no bar
    assert stored(market) == [("A", "01-05 21:00", 1.0), ("B", "01-05 21:00", 2.0), ("B", "01-08 21:00", 3.0)]
    told = [(row, reason) for row, *_, reason in refusal(load, "date,A\n2024-01-06,1\n2025-01-02,1\n", calendar=factories.CALENDAR)]
    assert told[0] == (2, "'2024-01-06' is no session of WEEKDAYS")
    assert told[1] == (3, "'2025-01-02' is outside calendar WEEKDAYS, 2024-01-01 to 2024-12-31")
    assert "--calendar" in refusal(load, wide)[0][4]
    with pytest.raises(CalendarNotFound):
        load(wide, calendar="NOSUCH")


def test_bars_by_date_are_stamped_at_midnight_utc(load, market):
    """Breaks: a source that is labelled session_date gets stamps that its readers take for another session's."""
    columns = "asset_identifier text, time_index timestamptz, close float8, UNIQUE (asset_identifier, time_index)"
    factories.sql(market, f"CREATE TABLE daily ({columns})")
    register_source("Daily", "daily", cadence="1d", time_label="session_date")
    assert load("date,A\n2024-01-05,1\n2024-01-08T00:00Z,2\n", "Daily").rows_written == 2
    assert stored(market, table="daily") == [("A", "01-05 00:00", 1.0), ("A", "01-08 00:00", 2.0)]
    assert "is not 00:00 UTC" in refusal(load, "date,A\n2024-01-09T21:00Z,2\n", source="Daily")[0][4]
    assert "is no session" in refusal(load, "date,A\n2024-01-06,2\n", source="Daily", calendar=factories.CALENDAR)[0][4]


# -- what is wrong ------------------------------------------------------------------------------------------------------------


def test_everything_wrong_is_named_by_its_row(load, market):
    """Breaks: people correct one error per attempt, or look for it in the wrong row."""
    text = "\n".join(
        [
            "time,asset,close,volume",
            "2024-01-02T21:00Z,A,1,1",  # row 2, good
            "",  # nothing is no row, but it is counted
            ",,,",
            "2024-01-02T21:00Z,,1,1",
            ",B,1,1",
            "2024-01-02T21:00:00,B,1,1",
            "02/01/2024 21:00,B,1,1",
            "2024-02-30T21:00Z,B,1,1",
            "1024-01-02T21:00Z,B,1,1",
            "2024-01-03T21:00Z,B,1.5.1,x",
            "2024-01-04T21:00Z,B,NaN,1",
            "2024-01-05T21:00Z,B,0,-1",
            "2024-01-08T21:00Z,B,1e999,1",
            "2024-01-09T21:00Z,B,1",
            '2024-01-09T21:00Z,C,"1,5",1',
            "2024-01-10T21:00Z,Z,1,1",
            "2024-01-11T21:00Z,Z,1,1",
            "2024-01-02T22:00+01:00,A,2,1",  # the bar of row 2 again
            "",
        ]
    )
    wrong = sorted(refusal(load, text), key=lambda error: (error[0], error[3]))
    assert [(row, asset, column, reason.split(";")[0]) for row, asset, _, column, reason in wrong] == [
        (2, "A", "", "asset and time are given twice in the file"),
        (5, "", "", "the asset is missing"),
        (6, "B", "", "the time is missing"),
        (7, "B", "", "'2024-01-02T21:00:00' has no time zone"),
        (8, "B", "", "'02/01/2024 21:00' is no time"),
        (9, "B", "", "'2024-02-30T21:00Z' is no time"),
        (10, "B", "", "'1024-01-02T21:00Z' lies outside 1800 to 2200"),
        (11, "B", "close", "'1.5.1' is not a number"),
        (11, "B", "volume", "'x' is not a number"),
        (12, "B", "close", "'NaN' is not a number"),
        (13, "B", "close", "'0' is refused: a price must be finite and above 0"),
        (13, "B", "volume", "'-1' is refused: volume must be finite and 0 or more"),
        (14, "B", "close", "'1e999' is refused: a price must be finite and above 0"),
        (15, "", "", "the row has 3 cells, the header 4"),
        (16, "C", "close", "'1,5' is not a number"),
        (17, "Z", "", "asset 'Z' is not registered"),
        (19, "A", "", "asset and time are given twice in the file"),
    ]
    assert stored(market) == []


@pytest.mark.parametrize("form", ["long.csv", "long.parquet", "wide.csv", "wide.parquet"])
def test_nothing_is_loaded_when_the_last_chunk_is_bad(market, tmp_path, form):
    """Breaks: half a file is stored, and nobody knows which half."""
    closes = factories.walks("2024-01-02", 40, ASSETS)
    closes.iloc[39, 2] = -1.0
    frame = closes.rename_axis("time")
    frame = frame.reset_index() if "wide" in form else frame.melt(ignore_index=False, var_name="asset", value_name="close").reset_index()
    path = tmp_path / form
    write(frame, path)
    with pytest.raises(LoadRefused) as caught:
        load_prices(market, path, "ExternalPricesTS", create_assets=True)
    last = (40 if "wide" in form else 120) + (1 if path.suffix == ".csv" else 0)  # the header of a CSV is row 1
    assert [(e["row"], e["asset"], e["column"]) for e in caught.value.facts["errors"]] == [(last, "C", "close")]
    assert stored(market) == []


def test_all_errors_go_to_a_file_and_the_first_are_kept(load, market, tmp_path, monkeypatch):
    """Breaks: a million errors fill the memory or the screen, or the last of them are lost."""
    monkeypatch.setattr(bar_files, "ERRORS_KEPT", 3)
    errors = tmp_path / "errors.csv"
    errors.write_text("old")
    lines = "".join(f"2024-01-02T{i // 60:02}:{i % 60:02}Z,A,bad\n" for i in range(500))
    with pytest.raises(LoadRefused) as caught:
        load(f"time,asset,close\n{lines}", errors=errors)
    assert (caught.value.facts["count"], len(caught.value.facts["errors"])) == (500, 3)
    first = "The first: row 2, A, 2024-01-02T00:00Z, close, 'bad' is not a number"
    assert f"bars.csv: 500 errors, so nothing was loaded. {first}" in str(caught.value)
    with errors.open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["row", "asset", "time", "column", "reason"]
    assert [row[0] for row in rows[1:]] == [str(i) for i in range(2, 502)]
    load("time,asset,close\n2024-01-02T21:00Z,A,1\n", errors=errors)
    assert errors.read_text().splitlines() == ["row,asset,time,column,reason"]  # not the errors of the file before
    with pytest.raises(UnusableFile, match="would overwrite"):
        load("time,asset,close\n", errors=tmp_path / "bars.csv")


def test_a_parquet_that_spells_out_nan_is_refused(market, tmp_path):
    """Breaks: a price that a computation lost looks like one that nobody had."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    time = pd.DatetimeIndex(["2024-01-02 21:00Z"])
    for value, told in ((float("nan"), "'nan' is not a number"), (float("inf"), "'inf' is not a number")):
        pq.write_table(pa.table({"time": time, "asset": ["A"], "close": [value]}), tmp_path / "f.parquet")
        with pytest.raises(LoadRefused, match=told):
            load_prices(market, tmp_path / "f.parquet", "ExternalPricesTS")
    pq.write_table(pa.table({"time": time.tz_localize(None), "asset": ["A"], "close": [1.0]}), tmp_path / "f.parquet")
    with pytest.raises(LoadRefused, match="no time zone"):
        load_prices(market, tmp_path / "f.parquet", "ExternalPricesTS")


# -- assets -------------------------------------------------------------------------------------------------------------------


def test_unknown_assets_are_created_with_the_calendar(load, market):
    """Breaks: new assets trade around the clock, or an asset loses the calendar it has."""
    other = factories.store_calendar(market, key="OTHER")
    factories.sql(market, "UPDATE msm__asset SET calendar_uid = %s WHERE unique_identifier = 'B'", (other,))
    text = "date,A,B,it's {new} 100%\n2024-01-05,1,2,3\n"
    told = refusal(load, text, calendar=factories.CALENDAR)
    assert [(row, asset) for row, asset, *_ in told] == [(2, "it's {new} 100%")]
    assert told[0][4].startswith('asset "it\'s {new} 100%" is not registered; register it (Asset.upsert), or')
    report = load(text, calendar=factories.CALENDAR, create_assets=True)
    assert (report.assets, report.assets_created, report.rows_written) == (3, 1, 3)
    joined = "msm__asset a LEFT JOIN msm__calendar c ON c.uid = a.calendar_uid"
    query = f"SELECT a.unique_identifier, c.unique_identifier FROM {joined} ORDER BY 1"
    expected = [("A", "WEEKDAYS"), ("B", "OTHER"), ("C", None), ("it's {new} 100%", "WEEKDAYS")]  # C is not in the file
    assert factories.sql(market, query) == expected


def test_assets_are_not_created_by_a_file_that_is_refused(load, market):
    """Breaks: spelling mistakes of a bad file stay as assets for ever."""
    text = "time,asset,close\n2024-01-05T21:00Z,new,1\n2024-01-05T21:00Z,new ,1\n2024-01-05T21:00Z,e\u0301,1\n2024-01-05T21:00Z,B,-1\n"
    told = [(row, reason) for row, _, _, _, reason in refusal(load, text, create_assets=True)]
    assert told[0] == (5, "'-1' is refused: a price must be finite and above 0")
    assert told[1] == (3, "asset 'new ' has spaces at its ends")
    assert "NFC" in told[2][1]
    assert factories.sql(market, "SELECT unique_identifier FROM msm__asset ORDER BY 1") == [(a,) for a in ASSETS]
    with pytest.raises(ConfigurationError, match="is not stored"):  # XLON is the library's
        load("date,asset,close\n2024-01-05,new,1\n", calendar="XLON", create_assets=True)


# -- where it cannot go, and what is no file of bars --------------------------------------------------------------------------


def test_tables_that_cannot_be_loaded(load, market):
    """Breaks: rows are added twice, interpolated bars are overwritten, or the driver's own error is all there is to go by."""
    grain = "(asset_identifier text, time_index timestamptz, close float8)"
    factories.sql(market, f"CREATE TABLE heap {grain}; CREATE VIEW seen AS SELECT * FROM heap; CREATE TABLE gone {grain}")
    for table in ("heap", "seen", "gone"):
        register_source(table, table)
    insert = "INSERT INTO msm__time_index_meta_table (uid, identifier, physical_table_name, kind, schema_fingerprint) VALUES "
    factories.sql(market, f"{insert} (%s, 'InterpolatedPricesTS.1', 'heap', 'interpolated_prices', '')", (uuid.uuid4(),))
    factories.sql(market, "DROP TABLE gone")
    bars = "time,asset,close\n2024-01-05T21:00Z,A,1\n"
    for source, told in (
        ("heap", r'CREATE UNIQUE INDEX ON "public"."heap" \(asset_identifier, time_index\)'),
        ("seen", "it is a view"),
        ("gone", "does not exist"),
        ("InterpolatedPricesTS.1", "makes it from another source"),
    ):
        with pytest.raises(SourceUnusable, match=told):
            load(bars, source)
    with pytest.raises(SourceNotRegistered):
        load(bars, "nowhere")
    factories.sql(market, 'CREATE UNIQUE INDEX ON "public"."heap" (asset_identifier, time_index)')  # as it was told
    assert load(bars, "heap").rows_written == 1


def test_a_table_that_this_role_may_only_read(market):
    """Breaks: a whole file is read and staged before the database says no."""
    role = f"reader_{uuid.uuid4().hex[:8]}"
    factories.sql(market, f"CREATE ROLE {role}; GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}; GRANT INSERT ON {PRICES} TO {role}")
    try:
        with transaction(market) as connection:
            connection.exec_driver_sql(f"SET LOCAL ROLE {role}")
            with pytest.raises(SourceUnusable, match="may not write it; GRANT INSERT, UPDATE"):
                loading._loadable(connection, "ExternalPricesTS")
    finally:
        factories.sql(market, f"DROP OWNED BY {role}; DROP ROLE {role}")


@pytest.mark.parametrize(
    ("text", "options", "told"),
    [
        ("", {}, "cannot be used"),
        ("date;asset;close\n", {}, "no column is a time .* its columns are date;asset;close"),
        ("time,asset,close,last\n", {}, "has no column 'last' to load; it has close, high"),
        ("time,asset,interpolated\n", {}, "has no column 'interpolated'"),
        ("time,asset\n", {}, "no column holds values"),
        ("time,asset,close,Close\n", {}, "two columns are called 'close'"),
        ("time,asset,close\n", {"column": "close"}, "--column is for wide files"),
        ("time,open,close\n", {}, "no column is an asset"),  # else assets `open` and `close` would be asked for
        ("time,A,B\n", {"column": "last"}, "no number last; --column is one of close, high"),
        ("time,A,A\n", {}, "two columns are called 'A'"),
        ("time,A,\n", {}, "a column has no name"),
        ("time\n", {}, "none is named after one"),
        ("\ntime,asset,close\n", {}, "first line is no header"),
    ],
)
def test_files_that_are_not_bars(market, tmp_path, text, options, told):
    """Breaks: a column is guessed, and prices land where they do not belong."""
    path = tmp_path / "bars.csv"
    path.write_text(text)
    with pytest.raises(UnusableFile, match=told):
        load_prices(market, path, "ExternalPricesTS", **options)


def test_files_that_cannot_be_read(market, tmp_path):
    """Breaks: a download that was cut off is loaded as far as it goes."""
    whole = gzip.compress(b"time,asset,close\n" + b"".join(b"2024-01-02T%02d:%02dZ,A,1\n" % divmod(i, 60) for i in range(1000)))
    latin = b"time,asset,close\n" + b"2024-01-02T21:00Z,A,1\n" * 1000 + b"2024-01-02T21:00Z,\xff,1\n"
    bad = {"a.csv.gz": whole[:-100], "b.csv.gz": b"time,asset\n", "a.parquet": b"PAR1", "a.xlsx": b"", "a.csv": latin}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UnusableFile):
            load_prices(market, tmp_path / name, "ExternalPricesTS")
    with pytest.raises(MsmError, match="No such file"):
        load_prices(market, tmp_path / "absent.csv", "ExternalPricesTS")
    assert stored(market) == []
