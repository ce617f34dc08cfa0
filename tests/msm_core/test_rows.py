"""Set-based writing: each row keeps its own columns, equal rows are not written, keys are unambiguous."""

import json
import uuid
from datetime import UTC, date, datetime, timedelta, timezone

import pytest
from sqlalchemy import Engine

from msm_core.errors import InvalidRow
from msm_core.models import (
    AssetTable,
    CalendarTable,
    PortfolioGroupMembershipTable,
    PortfolioTable,
    RebalanceStrategyMetadataTable,
    RunTable,
)
from msm_core.rows import document, upsert_rows
from tests import factories

KEY = ("unique_identifier",)


def upsert(engine: Engine, table: type, *rows: dict, key: tuple[str, ...] = KEY, **options) -> list:
    with engine.begin() as connection:
        return upsert_rows(connection, table, rows, key=key, **options)


def assets(engine: Engine) -> dict[str, str | None]:
    return dict(factories.sql(engine, "SELECT unique_identifier, asset_type FROM msm__asset"))


def test_a_heterogeneous_batch_keeps_what_each_row_does_not_name(engine):
    """The lesson: a SET list taken from the first row blanks, or forgets, columns of the others."""
    first, second = uuid.uuid4(), uuid.uuid4()
    factories.sql(
        engine,
        "INSERT INTO msm__calendar (uid, unique_identifier, display_name, calendar_type, valid_from, valid_to) "
        "VALUES (%s, 'c1', 'c1', 'CUSTOM', '2024-01-01', '2024-12-31'), (%s, 'c2', 'c2', 'CUSTOM', '2024-01-01', '2024-12-31')",
        (first, second),
    )
    upsert(
        engine,
        PortfolioTable,
        {"unique_identifier": "p", "calendar_uid": first, "backtest_table_price_column_name": "vwap"},
        {"unique_identifier": "q", "calendar_name": "kept"},
        {"unique_identifier": "r"},
    )
    upsert(
        engine,
        PortfolioTable,
        {"unique_identifier": "p", "calendar_uid": second},
        {"unique_identifier": "q", "backtest_table_price_column_name": "open"},
        {"unique_identifier": "r", "calendar_name": "new"},
        {"unique_identifier": "s", "calendar_uid": None},
    )
    found = factories.sql(
        engine,
        "SELECT unique_identifier, calendar_uid, calendar_name, backtest_table_price_column_name FROM msm__portfolio ORDER BY 1",
    )
    assert found == [
        ("p", second, None, "vwap"),
        ("q", None, "kept", "open"),
        ("r", None, "new", "close"),
        ("s", None, None, "close"),
    ]


def test_a_supplied_null_is_a_null(engine):
    upsert(engine, AssetTable, {"unique_identifier": "A", "asset_type": "equity"}, {"unique_identifier": "B", "asset_type": "equity"})
    upsert(engine, AssetTable, {"unique_identifier": "A", "asset_type": None}, {"unique_identifier": "B"})
    assert assets(engine) == {"A": None, "B": "equity"}


def test_what_is_equal_is_not_written(engine):
    rows = [{"unique_identifier": f"a{i}", "asset_type": "equity" if i % 2 else None} for i in range(10)]
    first = {row["unique_identifier"]: row["uid"] for row in upsert(engine, AssetTable, *rows)}
    before = factories.sql(engine, "SELECT unique_identifier, xmin::text, ctid::text FROM msm__asset ORDER BY 1")
    again = upsert(engine, AssetTable, *reversed(rows))
    assert {row["unique_identifier"]: row["uid"] for row in again} == first  # R11
    assert factories.sql(engine, "SELECT unique_identifier, xmin::text, ctid::text FROM msm__asset ORDER BY 1") == before
    upsert(engine, AssetTable, {"unique_identifier": "a3", "asset_type": "bond"}, *rows[:3])
    after = factories.sql(engine, "SELECT unique_identifier, xmin::text, ctid::text FROM msm__asset ORDER BY 1")
    assert [new[0] for new, old in zip(after, before, strict=True) if new != old] == ["a3"]


def test_update_false_leaves_existing_rows_alone(engine):
    upsert(engine, AssetTable, {"unique_identifier": "A", "asset_type": "old"})
    stored = upsert(
        engine, AssetTable, {"unique_identifier": "A", "asset_type": "new"}, {"unique_identifier": "B", "asset_type": "new"}, update=False
    )
    assert {row["unique_identifier"]: row["asset_type"] for row in stored} == {"A": "old", "B": "new"}
    assert assets(engine) == {"A": "old", "B": "new"}


def test_the_uid_is_made_once_or_given(engine):
    uid = uuid.uuid4()
    (row,) = upsert(engine, AssetTable, {"uid": uid, "unique_identifier": "A"})
    assert row["uid"] == uid
    (row,) = upsert(engine, AssetTable, {"unique_identifier": "A", "asset_type": "x"})
    assert (row["uid"], row["asset_type"]) == (uid, "x")
    (row,) = upsert(engine, AssetTable, {"uid": uuid.uuid4(), "unique_identifier": "A"})  # a history hangs on it: it never changes
    assert row["uid"] == uid


@pytest.mark.parametrize("second", [{"unique_identifier": "A"}, {"unique_identifier": "A", "asset_type": "other columns"}])
def test_a_key_given_twice_is_refused(engine, second):
    with pytest.raises(InvalidRow, match=r"'A'.*is given twice in one batch"):
        upsert(engine, AssetTable, {"unique_identifier": "A"}, {"unique_identifier": "B"}, second)
    assert assets(engine) == {}


def test_a_key_of_two_columns(engine):
    with engine.begin() as connection:
        (p,) = upsert_rows(connection, PortfolioTable, [{"unique_identifier": "p"}], key=KEY)
    groups = [uuid.uuid4(), uuid.uuid4()]
    for group in groups:
        factories.sql(engine, "INSERT INTO msm__portfolio_group (uid, unique_identifier) VALUES (%s, %s)", (group, str(group)))
    rows = [{"portfolio_group_uid": group, "portfolio_uid": p["uid"]} for group in groups]
    key = ("portfolio_group_uid", "portfolio_uid")
    first = upsert(engine, PortfolioGroupMembershipTable, *rows, key=key)
    again = upsert(engine, PortfolioGroupMembershipTable, *rows, key=key)
    assert sorted(row["uid"] for row in first) == sorted(row["uid"] for row in again)
    assert factories.sql(engine, "SELECT count(*) FROM msm__portfolio_group_membership") == [(2,)]


HOSTILE = [
    "it's",
    '"',
    "x'); DROP TABLE msm__asset; --",
    "%s %(x)s :rows :name",
    "\\",
    "\\u0041",
    "\n\t",
    "🚀é",
    "e\u0301",
    "{}",
    "NULL",
    " ",
]


def test_hostile_texts_are_values(engine):
    stored = upsert(engine, AssetTable, *({"unique_identifier": text, "asset_type": text} for text in HOSTILE))
    assert {row["unique_identifier"] for row in stored} == set(HOSTILE)
    assert assets(engine) == {text: text for text in HOSTILE}


def test_types_survive_the_document(engine):
    configuration = {"a": [1, 2.5, None, True, "x"], "b": {"c": 1e-300, "d": 0.1 + 0.2, "e": 2**53}}
    (row,) = upsert(
        engine,
        RebalanceStrategyMetadataTable,
        {"rebalance_strategy_uid": "u", "configuration_json": configuration},
        key=("rebalance_strategy_uid",),
    )
    assert row["configuration_json"] == configuration
    (row,) = upsert(
        engine,
        CalendarTable,
        {
            "unique_identifier": "c",
            "display_name": "c",
            "calendar_type": "CUSTOM",
            "valid_from": date(2024, 2, 29),
            "valid_to": "2024-12-31",
        },
    )
    assert (row["valid_from"], row["valid_to"]) == (date(2024, 2, 29), date(2024, 12, 31))
    local = datetime(2024, 1, 1, 12, 0, 0, 123456, timezone(timedelta(hours=5, minutes=30)))
    run = {"uid": uuid.uuid4(), "as_of": local, "status": "running", "code_version": "x", "arguments": {"f": "a"}}
    (row,) = upsert(engine, RunTable, run, key=("uid",))
    assert row["as_of"].astimezone(UTC) == datetime(2024, 1, 1, 6, 30, 0, 123456, UTC)


def test_numbers_that_json_has_not_are_refused():
    assert json.loads(document([{"a": 0.1, "b": datetime(2024, 1, 1, tzinfo=UTC)}])) == [{"a": 0.1, "b": "2024-01-01T00:00:00Z"}]
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            document([{"a": value}])


def test_no_rows_no_statement(engine):
    with engine.begin() as connection, factories.statements() as sent:
        assert upsert_rows(connection, AssetTable, [], key=KEY) == []
    assert sent == []


def test_statements_do_not_depend_on_the_number_of_rows(engine):  # R100
    counts = []
    for size in (1, 5_000):
        rows = [{"unique_identifier": f"a{i}"} | ({"asset_type": "x"} if i % 2 else {}) for i in range(size + 1)]
        with engine.begin() as connection, factories.statements() as sent:
            assert len(upsert_rows(connection, AssetTable, rows, key=KEY)) == size + 1
        counts.append(len(sent))
    assert counts == [4, 4]  # two sets of supplied columns, two statements each
    assert len(assets(engine)) == 5_001


def test_a_batch_lands_whole_or_not_at_all(engine):
    with pytest.raises(Exception, match="value too long"):
        upsert(engine, AssetTable, {"unique_identifier": "A"}, {"unique_identifier": "B", "asset_type": "x" * 65})
    assert assets(engine) == {}
