"""What every kind of row keeps: shown on the rows that make each point plainest."""

import uuid
from datetime import UTC, date, datetime
from decimal import Decimal

import pytest
from pydantic import ValidationError
from sqlalchemy import Table

import msm_core.api as api
from msm_core.api import Asset, AssetType, Calendar, CalendarEvent, Index, Portfolio, Row, SignalMetadata, one_transaction
from msm_core.errors import InvalidRow, NaiveTimestamp, RowNotFound
from msm_core.models import AssetTable

ROWS = [value for value in vars(api).values() if isinstance(value, type) and issubclass(value, Row) and value is not Row]
CALENDAR = {"display_name": "d", "calendar_type": "TRADING", "valid_from": "2024-01-01", "valid_to": "2024-01-31"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.__name__)
def test_declaration_says_what_the_table_says(row: type[Row]):
    table = row.__model__.__table__
    assert isinstance(table, Table)
    unique = [{c.name for c in u.columns} for u in table.constraints if type(u).__name__ == "UniqueConstraint"]
    assert set(row.__key__) in unique + [{c.name} for c in table.columns if c.unique]
    for column in table.columns:
        field = row.model_fields[column.name]
        required = not column.nullable and column.default is None
        assert field.is_required() == required or column.name in row.__key__, column.name


def test_row_type_that_forgets_a_column_is_refused():
    with pytest.raises(TypeError, match="asset_type"):

        class Forgetful(Row, table=AssetTable, key=("unique_identifier",)):
            unique_identifier: str


# -- writing -----------------------------------------------------------------------------------------------------------------------


def test_create_then_create_again(started):
    created = Asset.create(unique_identifier="AAPL", asset_type="equity")
    assert Asset.get(uid=created.uid) == Asset.get(unique_identifier="AAPL") == created
    with pytest.raises(InvalidRow, match=r"'AAPL' exists already\. Use upsert"):
        Asset.create_many([Asset(unique_identifier="MSFT"), Asset(unique_identifier="AAPL", asset_type="bond")])
    assert [asset.unique_identifier for asset in Asset.filter()] == ["AAPL"]  # all or none


def test_the_day_of_delisting_is_set_kept_and_taken_back(started, versions):
    listed = Asset.upsert(unique_identifier="OLD", asset_type="equity")
    assert listed.delisted_on is None
    gone = Asset.upsert(unique_identifier="OLD", delisted_on=date(2024, 1, 5))
    assert gone == listed.model_copy(update={"delisted_on": date(2024, 1, 5)})
    before = versions()
    assert Asset.upsert(unique_identifier="OLD", delisted_on="2024-01-05") == gone
    assert Asset.upsert(unique_identifier="OLD", asset_type="equity") == gone  # what is not supplied is kept
    assert versions() == before
    assert [asset.unique_identifier for asset in Asset.filter(delisted_on=date(2024, 1, 5))] == ["OLD"]
    assert Asset.upsert(unique_identifier="OLD", delisted_on=None) == listed
    assert [a.delisted_on for a in Asset.upsert_many([{"unique_identifier": "OLD", "delisted_on": "2024-02-01"}])] == [date(2024, 2, 1)]


@pytest.mark.parametrize("day", ["2024-02-30", "yesterday", datetime(2024, 1, 5, 21, tzinfo=UTC)])
def test_a_day_of_delisting_is_a_date(started, day):
    with pytest.raises((InvalidRow, ValidationError), match="delisted_on"):
        Asset.upsert(unique_identifier="OLD", delisted_on=day)
    assert Asset.filter() == []


def test_upsert_is_idempotent_and_touches_only_what_is_supplied(started, versions):  # R11, R12
    first = Index.upsert(
        unique_identifier="I", index_type="portfolio", display_name="one", description="kept", metadata_json={"a": [1, None]}
    )
    before = versions()
    assert Index.upsert(unique_identifier="I", index_type="portfolio", display_name="one") == first
    assert versions() == before
    changed = Index.upsert(unique_identifier="I", index_type="portfolio", display_name="two")
    assert changed == first.model_copy(update={"display_name": "two"})
    assert Index.upsert(unique_identifier="I", index_type="portfolio", display_name="two", description=None).description is None


def test_heterogeneous_batch_takes_no_column_from_its_first_row(started):
    Index.upsert_many([Index(unique_identifier=n, index_type="t", display_name=n, description=f"old {n}") for n in "abc"])
    rows = Index.upsert_many(
        [
            {"unique_identifier": "c", "index_type": "t", "display_name": "c", "description": "new c"},
            {"unique_identifier": "a", "index_type": "t", "display_name": "A"},
            {"unique_identifier": "b", "index_type": "u", "display_name": "b", "description": None},
        ]
    )
    shown = [(row.unique_identifier, row.index_type, row.display_name, row.description) for row in rows]  # in the order given
    assert shown == [("c", "t", "c", "new c"), ("a", "t", "A", "old a"), ("b", "u", "b", None)]


def test_a_batch_is_all_or_nothing(started):
    with pytest.raises(InvalidRow, match=r"calendar_uid names no Calendar row \(.*\). Store the Calendar first"):
        Portfolio.upsert_many([{"unique_identifier": "ok"}, {"unique_identifier": "bad", "calendar_uid": uuid.uuid4()}])
    with pytest.raises(InvalidRow, match="given twice"):
        Portfolio.upsert_many([{"unique_identifier": "ok"}, {"unique_identifier": "ok"}])
    assert Portfolio.count() == 0


def test_update_by_uid_row_and_key(started):
    a, _ = AssetType.upsert_many([{"asset_type": "a", "description": "x"}, {"asset_type": "b", "description": "y"}])
    assert AssetType.update(a.uid, display_name="A") == a.model_copy(update={"display_name": "A"})
    assert AssetType.update(a, description=None).display_name == "A"
    rows = AssetType.update_many([{"asset_type": "b", "metadata_json": {"k": 1}}, {"uid": a.uid, "description": "z"}])
    assert [(row.asset_type, row.description, row.metadata_json) for row in rows] == [("b", "y", {"k": 1}), ("a", "z", None)]
    with pytest.raises(RowNotFound, match="no AssetType row has asset_type 'none'"):
        AssetType.update_many([{"asset_type": "b", "description": "lost"}, {"asset_type": "none", "description": "w"}])
    assert AssetType.get(asset_type="b").description == "y"
    with pytest.raises(InvalidRow, match="asset_type is the key and cannot change"):
        AssetType.update(a, asset_type="c")


def test_delete(started):
    calendar = Calendar.upsert(unique_identifier="C", **CALENDAR)
    portfolio = Portfolio.upsert(unique_identifier="P", calendar_uid=calendar.uid)
    with pytest.raises(InvalidRow, match=r"still referenced by Portfolio.calendar_uid. Repoint or delete"):
        Calendar.delete(calendar)
    Portfolio.delete(portfolio)
    Calendar.delete(calendar.uid)
    with pytest.raises(RowNotFound):
        Calendar.delete(calendar)
    assets = Asset.upsert_many({"unique_identifier": f"a{n}"} for n in range(5))
    assert Asset.delete_many([*assets[:3], uuid.uuid4()]) == 3
    assert Asset.count() == 2


def test_several_writes_in_one_transaction(started):
    def one_good_one_bad() -> None:
        with one_transaction():
            Asset.upsert(unique_identifier="gone with the rest")
            Portfolio.upsert(unique_identifier="P", calendar_uid=uuid.uuid4())

    with pytest.raises(InvalidRow, match="calendar_uid"):
        one_good_one_bad()
    assert Asset.count() == 0
    with one_transaction():
        Asset.upsert(unique_identifier="A")
        assert Asset.get(unique_identifier="A")
    assert Asset.count() == 1


# -- reading -----------------------------------------------------------------------------------------------------------------------


def test_a_scan_has_no_hidden_limit_and_a_fixed_number_of_statements(started, statements):
    counts = []
    for size in (10, 3000):
        with statements() as sent:
            Asset.upsert_many({"unique_identifier": f"asset-{n:05}", "asset_type": "equity"} for n in range(size))
        counts.append(len(sent))
    assert counts == [2, 2]
    keys = [f"asset-{n:05}" for n in range(3000)]
    assert [asset.unique_identifier for asset in Asset.filter(asset_type="equity")] == keys
    with statements() as sent:
        assert [asset.unique_identifier for asset in Asset.get_many(reversed(keys))] == keys[::-1]
        assert Asset.update_many({"unique_identifier": key, "asset_type": "etf"} for key in keys)[7].asset_type == "etf"
    assert len(sent) == 1 + 2
    assert Asset.count(asset_type="etf", name_contains="ASSET-000") == 100


def test_get_and_filter(started):
    Index.upsert_many(
        [
            {"unique_identifier": "b_1", "index_type": "t", "display_name": "Growth 50%"},
            {"unique_identifier": "a", "index_type": "t", "display_name": "Value", "description": "d"},
            {"unique_identifier": "b21", "index_type": "u", "display_name": "Cash"},
        ]
    )

    def names(**conditions) -> list[str]:
        return [row.unique_identifier for row in Index.filter(**conditions)]

    assert names() == ["a", "b21", "b_1"]  # bytewise: "2" is 0x32, "_" is 0x5f
    assert names(limit=1) == ["a"]
    assert names(description=None) == ["b21", "b_1"]
    assert names(index_type="t", description="d") == ["a"]
    assert names(name_contains="B_") == ["b_1"]  # a wildcard is a letter like any other
    assert names(name_contains="0%") == ["b_1"]
    assert Index.get_or_none(unique_identifier="none") is None
    assert [row.unique_identifier for row in Index.get_many(["none", "a"], missing_ok=True)] == ["a"]
    with pytest.raises(RowNotFound, match="no Index row has unique_identifier 'none'"):
        Index.get(unique_identifier="none")
    with pytest.raises(RowNotFound, match="'none' or unique_identifier 'nor this'"):
        Index.get_many(["none", "a", "nor this"])


def test_times_come_back_in_utc_and_a_composite_key_names_a_row(started):
    calendar = Calendar.upsert(unique_identifier="C", **CALENDAR)
    with started.begin() as connection:  # a server whose sessions are not in UTC
        connection.exec_driver_sql(f"ALTER DATABASE \"{started.url.database}\" SET timezone = 'Asia/Tokyo'")
    started.dispose()
    time = datetime.fromisoformat("2024-01-02T01:00:00+05:00")
    event = CalendarEvent.upsert(calendar_uid=calendar.uid, event_date=date(2024, 1, 2), event_type="expiry", event_time=time)
    assert event.event_time == datetime(2024, 1, 1, 20, tzinfo=UTC)
    assert event.event_time.tzinfo is UTC
    assert CalendarEvent.get(calendar_uid=calendar.uid, event_date="2024-01-02", event_type="expiry") == event
    assert CalendarEvent.get_many([(calendar.uid, "2024-01-02", "expiry", "", "", "")]) == [event]


# -- refusals: before anything is sent, so no database is needed --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "why"),
    [
        (
            lambda: Asset.upsert(unique_identifier="x", ticker="X"),
            "ticker is not a field. Known fields: uid, unique_identifier, asset_type",
        ),
        (lambda: Asset.filter(ticker="X"), "ticker is not a field. Known fields: uid"),
        (lambda: Asset.filter(ticker=None), "ticker is not a field"),
        (lambda: Asset.update(uuid.uuid4(), ticker="X"), "ticker is not a field"),
        (lambda: Asset.upsert(asset_type="x"), "unique_identifier must be given: the key is unique_identifier"),
        (lambda: Asset.upsert(unique_identifier=None), "unique_identifier must be given"),
        (lambda: Asset.get(), "unique_identifier must be given"),
        (lambda: Asset.get(unique_identifier="x", asset_type="y"), "get takes uid, or unique_identifier"),
        (lambda: Asset.get(uid="not a uid"), "uid 'not a uid': Input should be a valid UUID"),
        (lambda: Asset.filter(limit=-1), "limit is -1"),
        (lambda: Asset.filter(unique_identifier="\0"), "NUL"),
        (lambda: Asset.filter(name_contains="\ud800"), "surrogate"),
        (lambda: Asset.upsert(unique_identifier=7), "unique_identifier 7: Input should be a valid string"),
        (lambda: Asset.upsert(unique_identifier="x", asset_type="y" * 65), "asset_type .* has 65 characters; at most 64 fit"),
        (lambda: Index.upsert(unique_identifier="x", index_type="t"), "display_name must be given"),
        (lambda: Portfolio.upsert(unique_identifier="x", backtest_table_price_column_name=None), "Input should be a valid string"),
        (lambda: Calendar.upsert(unique_identifier="x", **CALENDAR | {"calendar_type": "MOON"}), "calendar_type 'MOON'"),
        (lambda: Calendar.upsert(unique_identifier="x", timezone="Mars/Base", **CALENDAR), "timezone 'Mars/Base': it is not an IANA"),
        (lambda: AssetType.upsert(asset_type="x", metadata_json={"a": float("nan")}), "metadata_json is not JSON"),
        (lambda: AssetType.upsert(asset_type="x", metadata_json={"a": Decimal(1)}), "metadata_json is not JSON"),
        (lambda: AssetType.upsert(asset_type="x", metadata_json={"a": 10**200_000}), "metadata_json is not JSON"),
        (lambda: AssetType.upsert(asset_type="x", metadata_json={"a": [{"b\0": 1}]}), "metadata_json holds a NUL"),
        (lambda: AssetType.upsert(asset_type="x", description="\0"), "description .* NUL"),
        (lambda: SignalMetadata.upsert_many([{"signal_uid": "a"}, {"signal_uid": ""}]), r"signal_uid '' is empty.*\(row 1 of the batch\)"),
    ],
)
def test_refused_with_the_field_and_the_reason(write, why):
    with pytest.raises(InvalidRow, match=why):
        write()


@pytest.mark.parametrize(
    ("identifier", "why"),
    [
        ("", "is empty"),
        ("a" * 256, "has 256 characters; at most 255 fit"),
        ("nul\0", "NUL"),
        ("line\nfeed", "control character"),
        ("escape\x1b[2J", "control character"),
        ("half \ud83d", "surrogate"),
        ("e\N{COMBINING ACUTE ACCENT}", "not NFC-normalised"),
    ],
)
def test_hostile_identifiers_are_refused(identifier, why):
    with pytest.raises(InvalidRow, match=f"unique_identifier .*{why}") as caught:
        Asset.upsert(unique_identifier=identifier)
    assert str(caught.value).isprintable()  # what is hostile to a terminal is not repeated to it


def test_odd_identifiers_are_kept_as_they_are(started):
    odd = [
        "'",
        '"',
        "%",
        "%s",
        "%(a)s",
        ":given",
        "x'; DROP TABLE msm__asset; --",
        "\\",
        "é",
        "日本",
        "👩\N{ZERO WIDTH JOINER}🔬",
        "{}",
        "a" * 255,
        "A",
        "a",
    ]
    Asset.upsert_many({"unique_identifier": name} for name in odd)
    assert [asset.unique_identifier for asset in Asset.get_many(odd)] == odd
    assert [asset.unique_identifier for asset in Asset.filter()] == sorted(odd)  # code points sort like their UTF-8 bytes
    assert all(Asset.get(unique_identifier=name).unique_identifier == name for name in odd[:7])
    assert [asset.unique_identifier for asset in Asset.filter(name_contains="%")] == ["%", "%(a)s", "%s"]


def test_naive_times_are_refused():
    naive = datetime(2024, 1, 2, 12)
    with pytest.raises(NaiveTimestamp, match=r"CalendarEvent.event_time is 2024-01-02T12:00:00, without a time zone"):
        CalendarEvent.upsert(calendar_uid=uuid.uuid4(), event_date=date(2024, 1, 2), event_type="x", event_time=naive)


def test_rows_are_frozen_and_refuse_unknown_fields():
    asset = Asset(unique_identifier="x")
    with pytest.raises(ValidationError):
        asset.unique_identifier = "y"
    with pytest.raises(ValidationError):
        Asset(unique_identifier="x", ticker="X")


@pytest.mark.parametrize(
    ("write", "why"),
    [
        (lambda: Portfolio.create(uid=uuid.UUID(int=1), unique_identifier="other"), "the uid is taken by another row"),
        (lambda: Portfolio.upsert(uid=uuid.UUID(int=2), unique_identifier="P"), "'P' exists with another uid. Leave uid out"),
        (lambda: Portfolio.update(uuid.UUID(int=1), portfolio_index_uid=uuid.uuid4()), "portfolio_index_uid names no Index row"),
        (
            lambda: Calendar.upsert(unique_identifier="C", **CALENDAR | {"valid_to": "2023-01-01"}),
            "the rule valid_to >= valid_from is broken",
        ),
    ],
)
def test_what_the_database_refuses_is_told_in_our_words(started, write, why):
    Portfolio.create(uid=uuid.UUID(int=1), unique_identifier="P")
    with pytest.raises(InvalidRow, match=why) as caught:
        write()
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__  # the driver's error is not printed along
