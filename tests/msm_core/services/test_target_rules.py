"""What a target row may not say: generated in hundreds of ways, each refused by the database on its own and by the service on its own.

The rules are written down once more here, in the words of the issue, and never taken from the code under test.
"""

import itertools
import math
import uuid
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pytest
from psycopg.types.json import Jsonb
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from msm_core.api import PositionSet
from msm_core.errors import SnapshotRefused
from msm_core.services.snapshots import TargetSnapshot, replace_target_positions
from tests.accounts import NOON, Book, small

__all__ = ["small"]

Cells = dict[str, Any]
TARGET = ("target_type", "target_uid", "asset_uid", "portfolio_uid")
WEIGHT, AMOUNT, QUANTITY = EXPOSURES = ("weight_notional_exposure", "constant_notional_exposure", "single_asset_quantity")
GOOD = (0.25, -0.25, 0.0, 5e-324, -1e-300, 1.7976931348623157e308, -1e300)
BAD = (math.nan, math.inf, -math.inf)
WAYS_MIN = 200


def exposures() -> Iterator[tuple[Cells, bool]]:
    """Every combination of none, a number, NaN and the infinities in the three columns; True: exactly one, and it is a number."""
    for values in itertools.product((None, 0.5, *BAD), repeat=3):
        given = {name: value for name, value in zip(EXPOSURES, values, strict=True) if value is not None}
        yield given, len(given) == 1 and all(math.isfinite(value) for value in given.values())


def targets(book: Book) -> Iterator[tuple[Cells, str]]:
    """Every combination of what may stand in the four target columns; with it the type of target, or "" where it is none at all."""
    a, b, p, q = book.assets[0].uid, book.assets[1].uid, book.portfolios[0].uid, book.portfolios[1].uid
    ghost = uuid.UUID(int=7)
    types = (None, "asset", "portfolio", "Asset", "PORTFOLIO", " asset", "index", "")
    for type_, uid, asset, portfolio in itertools.product(types, (None, a, b, p, q, ghost), (None, a, ghost), (None, p, ghost)):
        cells = dict(zip(TARGET, (type_, uid, asset, portfolio), strict=True))
        is_asset = asset == a and portfolio is None
        is_portfolio = portfolio == p and asset is None
        kind = "asset" if is_asset else "portfolio" if is_portfolio else ""
        yield {k: v for k, v in cells.items() if v is not None}, kind


def complete(cells: Cells, kind: str) -> bool:
    """As the database has it, where nothing is derived."""
    return kind != "" and cells.get("target_type") == kind and cells.get("target_uid") == cells[f"{kind}_uid"]


def derivable(cells: Cells, kind: str) -> bool:
    """As the service has it: type and uid may be left out."""
    return kind != "" and cells.get("target_type", kind) == kind and cells.get("target_uid", cells[f"{kind}_uid"]) == cells[f"{kind}_uid"]


def asset_row(book: Book, **cells: Any) -> Cells:
    uid = book.assets[0].uid
    return {"target_type": "asset", "target_uid": uid, "asset_uid": uid, **cells}


def portfolio_row(book: Book, **cells: Any) -> Cells:
    uid = book.portfolios[0].uid
    return {"target_type": "portfolio", "target_uid": uid, "portfolio_uid": uid, **cells}


def valid(book: Book) -> list[Cells]:
    rows = [asset_row(book, **{name: value}) for name in EXPOSURES for value in GOOD]
    rows += [portfolio_row(book, **{name: value}) for name in (WEIGHT, AMOUNT) for value in GOOD]
    return [*rows, asset_row(book, **{WEIGHT: 1}), asset_row(book, **{WEIGHT: 1.0, "metadata_json": {"why": ["x", None]}})]


def invalid_in_both(book: Book) -> list[Cells]:
    """Rows that neither may take: broken exposures of a good target, good exposures of a broken target, and both."""
    rows = [make(book, **given) for given, good in exposures() if not good for make in (asset_row, portfolio_row)]
    rows += [portfolio_row(book, **{QUANTITY: value}) for value in GOOD]
    rows += [{**cells, WEIGHT: 0.5} for cells, kind in targets(book) if not derivable(cells, kind)]
    return [*rows, *({**cells, QUANTITY: math.nan, AMOUNT: 1.0} for cells, kind in targets(book) if not derivable(cells, kind))]


def distinct(rows: list[Cells]) -> list[Cells]:
    return list({repr(sorted(row.items())): row for row in rows}.values())


def told(refused: int, ways: int, taken: list[Any]) -> str:
    return f"{refused} of {ways} invalid target rows were refused; these were not: {taken[:5]}"


# -- the database -------------------------------------------------------------------------------------------------------------


class Table:
    """The bare table: one savepoint per row, so that each is judged alone and none stays."""

    def __init__(self, connection: Any, head: PositionSet) -> None:
        self.connection, self.head = connection, head

    def takes(self, *rows: Mapping[str, Any]) -> bool:
        savepoint = self.connection.begin_nested()
        try:
            for row in rows:
                cells = {"position_set_uid": self.head.uid, "time_index": self.head.position_set_time, **row}
                cells = {k: Jsonb(v) if isinstance(v, dict) else v for k, v in cells.items()}
                sql = f"INSERT INTO msm__target_positions ({', '.join(cells)}) VALUES ({', '.join(['%s'] * len(cells))})"
                self.connection.exec_driver_sql(sql, tuple(cells.values()))
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", "")[:2] != "23":
                raise  # a slip of this test, and no rule of the table
            return False
        finally:
            savepoint.rollback()
        return True


def test_the_database_refuses_every_invalid_target_row(small: Book, engine: Engine) -> None:  # R81, R82
    head = PositionSet.create(account_target_allocation_uid=small.allocations[0].uid, position_set_time=NOON)
    other = PositionSet.create(account_target_allocation_uid=small.allocations[0].uid, position_set_time=NOON + timedelta(days=1))
    good = asset_row(small, **{WEIGHT: 0.5})
    rows = invalid_in_both(small)
    rows += [{**cells, WEIGHT: 0.5} for cells, kind in targets(small) if not complete(cells, kind)]  # nothing is derived here
    rows += [{**good, "position_set_uid": uid} for uid in (None, uuid.UUID(int=8), other.uid)]
    rows += [{**good, "time_index": time} for time in (None, NOON + timedelta(microseconds=1), other.position_set_time)]
    rows = distinct(rows)
    assert len(rows) >= WAYS_MIN
    with engine.connect() as connection:
        table = Table(connection, head)
        taken = [row for row in rows if table.takes(row)]
        assert not taken, told(len(rows) - len(taken), len(rows), taken)
        assert not table.takes(good, {**good, WEIGHT: None, AMOUNT: 3.0})  # the same target twice
        assert [row for row in valid(small) if not table.takes(row)] == []
        assert table.takes(good, portfolio_row(small, **{AMOUNT: -1.0}))


# -- the service --------------------------------------------------------------------------------------------------------------


def invalid_in_the_service(book: Book) -> list[Cells]:
    """Ways that no column could hold, beside those that the database refuses too."""
    a, p = book.assets[0].uid, book.portfolios[0].uid
    numbers = (True, False, "0.5", "", "nan", [0.5], {"a": 1}, 1j, 10**400, np.True_)
    good = {"asset_uid": a, WEIGHT: 0.5}
    names = ("quantity", "weight", "time_index", "position_set_uid", "Asset_uid", " ")
    documents = ("x", [1], 5, {"a": math.nan}, {"a": "\0"}, {"a": object()})
    uids = ("A00", "", 5, True, 0.5, [a], uuid.UUID(int=9))
    rows = [{"asset_uid": a, name: value} for name in EXPOSURES for value in numbers]
    rows += [{"portfolio_uid": p, name: value} for name in EXPOSURES for value in numbers]
    rows += [{target: uid, WEIGHT: 0.5} for target in ("asset_uid", "portfolio_uid") for uid in uids]
    rows += [{"asset_identifier": "A00", WEIGHT: 0.5}, {**good, "asset_identifier": "A00"}]
    rows += [{**good, name: "x"} for name in names]
    rows += [{**good, "metadata_json": document} for document in documents]
    return [*rows, {**good, "target_type": 1}, {}]


def refused_rows(book: Book, snapshots: list[TargetSnapshot]) -> set[tuple[int, int]]:
    """(snapshot, row) of every refused row; the database stays as it was."""
    with pytest.raises(SnapshotRefused) as caught:
        replace_target_positions(snapshots)
    problems = caught.value.facts["problems"]
    assert caught.value.facts["count"] == len(problems)
    assert all(problem["field"] is not None and problem["reason"] for problem in problems)
    assert PositionSet.count() == 0
    return {(problem["snapshot"], problem["row"]) for problem in problems}


def test_the_service_refuses_every_invalid_target_row_and_tells_all_of_them(small: Book) -> None:  # R81
    both = distinct(invalid_in_both(small))
    rows = distinct([*both, *invalid_in_the_service(small)])
    assert len(both) >= WAYS_MIN
    moments = [NOON + timedelta(days=day) for day in range(len(rows))]
    refused = refused_rows(small, [_snapshot(small, time, row) for time, row in zip(moments, rows, strict=True)])
    taken = [row for place, row in enumerate(rows) if (place, 0) not in refused]
    assert not taken, told(len(rows) - len(taken), len(rows), taken)
    assert refused == {(place, 0) for place in range(len(rows))}  # and nothing else

    mixed = [row for pair in zip(rows, itertools.cycle(valid(small))) for row in pair]  # each beside a good one, in snapshots of their own
    refused = refused_rows(small, [_snapshot(small, NOON + timedelta(days=day), row) for day, row in enumerate(mixed)])
    assert refused == {(place, 0) for place in range(0, len(mixed), 2)}


def test_a_target_that_is_given_twice_is_refused(small: Book) -> None:
    a, p = small.assets[0].uid, small.portfolios[0].uid
    rows = [
        {"asset_uid": a, WEIGHT: 0.5},
        {"portfolio_uid": p, AMOUNT: 1.0},
        {"asset_uid": str(a), AMOUNT: 2.0},
        {"portfolio_uid": p, WEIGHT: 0},
    ]
    assert refused_rows(small, [TargetSnapshot(small.allocations[0], NOON, rows)]) == {(0, 2), (0, 3)}


def test_the_service_takes_every_valid_target_row(small: Book, engine: Engine) -> None:
    rows = [*valid(small), *({k: v for k, v in row.items() if k not in ("target_type", "target_uid")} for row in valid(small))]
    moments = [NOON + timedelta(days=day) for day in range(len(rows))]
    heads = replace_target_positions([_snapshot(small, time, row) for time, row in zip(moments, rows, strict=True)])
    assert [head.position_set_time for head in heads] == moments
    with engine.connect() as connection:
        found = connection.exec_driver_sql(
            f"SELECT {', '.join((*TARGET, *EXPOSURES))} FROM msm__target_positions ORDER BY time_index"
        ).all()
    assert [tuple(row) for row in found] == [
        (kind, row[f"{kind}_uid"], row.get("asset_uid"), row.get("portfolio_uid"), *(row.get(name) for name in EXPOSURES))
        for row in rows
        for kind in ("asset" if "asset_uid" in row else "portfolio",)
    ]


def _snapshot(book: Book, time: datetime, *rows: Cells) -> TargetSnapshot:
    return TargetSnapshot(book.allocations[0], time, rows)
