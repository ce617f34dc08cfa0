"""Snapshots of targets and holdings: whole or not at all, one road for one and for a thousand, and never a mixture."""

import pickle
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from threading import Barrier
from typing import Any

import pandas as pd
import pytest
from pydantic import ValidationError
from sqlalchemy import Engine, event

from msm_core import start_engine
from msm_core.api import (
    AccountHoldingsSet,
    Asset,
    PositionSet,
    VirtualFund,
    VirtualFundHoldingsSet,
    one_transaction,
)
from msm_core.errors import EngineNotStarted, InvalidRow, SnapshotExists, SnapshotInUse, SnapshotRefused
from msm_core.services.snapshots import (
    AccountHolding,
    HoldingsSnapshot,
    TargetPosition,
    TargetSnapshot,
    replace_account_holdings,
    replace_target_positions,
)
from tests.accounts import NOON, Book, book, small

__all__ = ["small"]

NIGHT = NOON + timedelta(hours=12)
TARGETS = """
    SELECT t.time_index, coalesce(a.unique_identifier, p.unique_identifier),
           weight_notional_exposure, constant_notional_exposure, single_asset_quantity
    FROM msm__target_positions t LEFT JOIN msm__asset a ON a.uid = asset_uid LEFT JOIN msm__portfolio p ON p.uid = portfolio_uid
    ORDER BY 1, 2"""
HOLDINGS = "SELECT time_index, asset_identifier, direction * quantity FROM msm__account_holdings ORDER BY account_uid, 1, 2"


def stored(engine: Engine, sql: str) -> list[tuple[Any, ...]]:
    with engine.connect() as connection:
        return [tuple(row) for row in connection.exec_driver_sql(sql)]


def everything(engine: Engine) -> list[list[tuple[Any, ...]]]:
    tables = ("position_set", "target_positions", "account_holdings_set", "account_holdings", "virtual_fund_holdings")
    return [stored(engine, f"SELECT xmin::text, t::text FROM msm__{table} t ORDER BY 2") for table in tables]


def held(name: str, quantity: float, **cells: Any) -> dict[str, Any]:
    return {"asset_identifier": name, "quantity": quantity, **cells}


@contextmanager
def counted(engine: Engine) -> Iterator[list[str]]:
    sent: list[str] = []

    def keep(connection: object, cursor: object, statement: str, *_: object) -> None:
        sent.append(statement)

    event.listen(engine, "before_cursor_execute", keep)
    try:
        yield sent
    finally:
        event.remove(engine, "before_cursor_execute", keep)


# -- storing ------------------------------------------------------------------------------------------------------------------


def test_targets_as_rows_mappings_and_a_frame_are_the_same(small: Book, engine: Engine) -> None:
    a, b, p = small.assets[0].uid, small.assets[1].uid, small.portfolios[0].uid
    typed = [
        TargetPosition(asset_uid=a, weight_notional_exposure=0.5),
        TargetPosition(asset_uid=b, single_asset_quantity=-3),
        TargetPosition(portfolio_uid=p, constant_notional_exposure=1e6),
    ]
    mappings = [
        {"asset_uid": a, "weight_notional_exposure": 0.5, "portfolio_uid": None},
        {"asset_uid": str(b), "single_asset_quantity": -3.0, "target_type": "asset", "target_uid": str(b).upper()},
        {"portfolio_uid": p, "constant_notional_exposure": 1_000_000},
    ]
    frame = pd.DataFrame(mappings)
    frame["metadata_json"] = pd.NaT
    owner = small.allocations[0]
    heads = replace_target_positions(
        [
            TargetSnapshot(owner, NOON, typed, source="desk"),
            TargetSnapshot(owner.uid, NIGHT, iter(mappings)),
            TargetSnapshot("C00-core", pd.Timestamp("2024-01-03T12:00", tz="Asia/Tokyo"), frame),
        ]
    )
    times = [NOON, NIGHT, datetime(2024, 1, 3, 3, tzinfo=UTC)]
    assert heads == PositionSet.get_many([(owner.uid, time) for time in times])
    assert [(head.position_set_time, head.source) for head in heads] == [(NOON, "desk"), (times[1], None), (times[2], None)]
    wanted = [("A00", 0.5, None, None), ("A01", None, None, -3.0), ("P00", None, 1e6, None)]
    assert stored(engine, TARGETS) == [(time, *row) for time in times for row in wanted]


def test_holdings_are_kept_with_all_their_facts(small: Book, engine: Engine) -> None:
    due = datetime.fromisoformat("2024-01-02T21:00:00+05:30")
    frame = pd.DataFrame(
        {"asset_identifier": ["A02", "A03"], "quantity": [5, 0.25], "direction": [-1, None], "is_trade_snapshot": [True, None]}
    )
    frame["target_trade_time"] = [due, pd.NaT]
    rows = [AccountHolding(asset_identifier="A00", quantity=10), held("A01", 2.5, direction=-1, extra_details={"lot": ["x", None]})]
    first, second = replace_account_holdings([HoldingsSnapshot("C00", NOON, rows), HoldingsSnapshot(small.accounts[0], NIGHT, frame)])
    assert (first.account_uid, first.time_index, second.time_index) == (small.accounts[0].uid, NOON, NIGHT)
    columns = "asset_identifier, quantity, direction, is_trade_snapshot, target_trade_time, extra_details, holdings_set_uid"
    assert stored(engine, f"SELECT {columns} FROM msm__account_holdings ORDER BY 1") == [
        ("A00", 10.0, 1, None, None, None, first.uid),
        ("A01", 2.5, -1, None, None, {"lot": ["x", None]}, first.uid),
        ("A02", 5.0, -1, True, due, None, second.uid),
        ("A03", 0.25, 1, None, None, None, second.uid),
    ]


def test_replacing_touches_exactly_the_named_snapshots_and_keeps_their_uids(small: Book, engine: Engine) -> None:
    days = [NOON + timedelta(days=day) for day in range(3)]
    before = replace_account_holdings([HoldingsSnapshot("C00", day, [held("A00", 1), held("A01", 2)]) for day in days])
    untouched = stored(engine, "SELECT xmin::text, t::text FROM msm__account_holdings t WHERE time_index <> '2024-01-03 12:00+00'")
    (after,) = replace_account_holdings(HoldingsSnapshot("C00", days[1], [held("A01", 7, direction=-1)]), overwrite=True)
    assert after == before[1]
    assert untouched == stored(engine, "SELECT xmin::text, t::text FROM msm__account_holdings t WHERE time_index <> '2024-01-03 12:00+00'")
    assert stored(engine, HOLDINGS) == [
        (days[0], "A00", 1.0), (days[0], "A01", 2.0), (days[1], "A01", -7.0), (days[2], "A00", 1.0), (days[2], "A01", 2.0),
    ]  # fmt: skip


def test_the_source_of_a_snapshot_is_replaced_with_it(small: Book) -> None:
    position = TargetPosition(asset_uid=small.assets[0].uid, weight_notional_exposure=1)
    (first,) = replace_target_positions(TargetSnapshot("C00-core", NOON, [position], source="desk"))
    PositionSet.update(first, metadata_json={"kept": True})
    (second,) = replace_target_positions(TargetSnapshot("C00-core", NOON, [position]), overwrite=True)
    assert (second.uid, second.source, second.metadata_json) == (first.uid, None, {"kept": True})


def test_new_and_old_snapshots_in_one_call_come_back_in_the_order_given(small: Book) -> None:
    days = [NOON + timedelta(days=day) for day in (5, 1, 3)]
    (old,) = replace_account_holdings(HoldingsSnapshot("C00", days[1], []))
    heads = replace_account_holdings([HoldingsSnapshot("C00", day, [held("A00", 1)]) for day in days], overwrite=True)
    assert [head.time_index for head in heads] == days
    assert heads[1] == old
    assert replace_account_holdings([]) == []


def test_an_empty_snapshot_wants_and_holds_nothing(small: Book, engine: Engine) -> None:
    replace_account_holdings(HoldingsSnapshot("C00", NOON, [held("A00", 1)]))
    replace_account_holdings(HoldingsSnapshot("C00", NOON, pd.DataFrame()), overwrite=True)
    replace_target_positions(TargetSnapshot("C00-core", NOON, ()))
    assert (AccountHoldingsSet.count(), PositionSet.count(), stored(engine, HOLDINGS), stored(engine, TARGETS)) == (1, 1, [], [])
    with pytest.raises(SnapshotExists):
        replace_account_holdings(HoldingsSnapshot("C00", NOON, [held("A00", 1)]))


def test_the_number_of_statements_does_not_depend_on_snapshots_or_rows(engine: Engine) -> None:
    start_engine()
    many = book(assets=50, portfolios=10, accounts=100)

    def targets(accounts: int, rows: int) -> list[TargetSnapshot]:
        kinds = ("weight_notional_exposure", "single_asset_quantity")
        exposures = [{"asset_uid": a.uid, kinds[i % 2]: 0.1} for i, a in enumerate(many.assets)]
        exposures[1:1] = [{"portfolio_uid": p.uid, "constant_notional_exposure": 1.0, "metadata_json": {}} for p in many.portfolios]
        return [TargetSnapshot(a.unique_identifier, NOON, exposures[:rows]) for a in many.allocations[:accounts]]

    def holdings(accounts: int, rows: int) -> list[HoldingsSnapshot]:
        rows_of = [held(a.unique_identifier, 1.0, **({"is_trade_snapshot": True} if i % 2 else {})) for i, a in enumerate(many.assets)]
        return [HoldingsSnapshot(a, NOON, rows_of[:rows]) for a in many.accounts[:accounts]]

    for make, replace, most in ((targets, replace_target_positions, 10), (holdings, replace_account_holdings, 11)):
        sizes = []
        for accounts, rows in ((1, 1), (1, 50), (100, 50)):
            with counted(engine) as sent:
                replace(make(accounts, rows), overwrite=True)  # type: ignore[operator, arg-type]
            sizes.append(len(sent))
        assert sizes == [most] * 3
    for owner, table in (("position_set_uid", "target_positions"), ("account_uid", "account_holdings")):
        assert stored(engine, f"SELECT count(*), count(DISTINCT {owner}) FROM msm__{table}") == [(5000, 100)]


# -- refusals -----------------------------------------------------------------------------------------------------------------


def test_every_problem_of_every_row_is_told_and_nothing_is_stored(small: Book, engine: Engine) -> None:
    a, ghost = small.assets[0].uid, uuid.UUID(int=5)
    good = {"asset_uid": a, "weight_notional_exposure": 0.5}
    odd: list[Any] = [good, "row", {**good, "asset_uid": None, "asset_identifier": "A00"}]
    before = everything(engine)
    snapshots: list[Any] = [
        TargetSnapshot("C00-core", NOON, [good, {"asset_uid": ghost, "weight_notional_exposure": float("nan")}, {"asset_uid": a}]),
        TargetSnapshot("nobody", datetime(2024, 1, 2), odd),
        TargetSnapshot(small.allocations[0].uid, NOON.astimezone(), [good], source="x" * 256),
        TargetSnapshot(ghost, NOON, 5),  # type: ignore[arg-type]
        TargetSnapshot(small.accounts[0], NOON, []),  # type: ignore[arg-type]
        HoldingsSnapshot("C00", NOON, []),
    ]
    with pytest.raises(SnapshotRefused) as caught:
        replace_target_positions(snapshots)
    told = [(p["snapshot"], p["row"], p["field"]) for p in caught.value.facts["problems"]]
    exposures = "weight_notional_exposure, constant_notional_exposure, single_asset_quantity"
    assert sorted(told, key=repr) == sorted(
        [
            (0, 1, "weight_notional_exposure"), (0, 1, "asset_uid"), (0, 2, exposures), (0, 2, "asset_uid"),
            (1, None, "account_target_allocation"), (1, None, "position_set_time"), (1, 1, ""), (1, 2, "asset_identifier"),
            (1, 2, "asset_uid, portfolio_uid"), (2, None, "source"), (3, None, "account_target_allocation"), (3, None, "positions"),
            (4, None, "account_target_allocation"), (5, None, ""),
        ], key=repr,
    )  # fmt: skip
    assert told == sorted(told, key=lambda p: (p[0], -1 if p[1] is None else p[1]))
    assert caught.value.facts["count"] == len(told)
    assert str(caught.value).startswith("target positions: 14 problems, so nothing was stored. The first: snapshot 0, row 1: ")
    assert pickle.loads(pickle.dumps(caught.value)).facts == caught.value.facts
    reasons = {(p["snapshot"], p["row"], p["field"]): p["reason"] for p in caught.value.facts["problems"]}
    assert "no time zone. Give an offset" in reasons[1, None, "position_set_time"]
    assert "by asset_uid" in reasons[1, 2, "asset_identifier"]
    assert "is in row 0 already" in reasons[0, 2, "asset_uid"]
    assert reasons[0, 1, "asset_uid"] == f"'{ghost}' names no Asset. Store the Asset first, or correct it"
    assert everything(engine) == before


@pytest.mark.parametrize(
    ("row", "field"),
    [
        (held("A00", 0), "quantity"),
        (held("A00", -1), "quantity"),
        (held("A00", float("nan")), "quantity"),
        (held("A00", float("inf")), "quantity"),
        (held("A00", True), "quantity"),
        (held("A00", "1"), "quantity"),  # type: ignore[arg-type]
        ({"asset_identifier": "A00"}, "quantity"),
        ({"quantity": 1}, "asset_identifier"),
        (held("ghost", 1), "asset_identifier"),
        (held("A00\0", 1), "asset_identifier"),
        (held("", 1), "asset_identifier"),
        (held("A00", 1, direction=0), "direction"),
        (held("A00", 1, direction=True), "direction"),
        (held("A00", 1, direction="1"), "direction"),
        (held("A00", 1, is_trade_snapshot=1), "is_trade_snapshot"),
        (held("A00", 1, target_trade_time=datetime(2024, 1, 2)), "target_trade_time"),
        (held("A00", 1, target_trade_time="2024-01-02"), "target_trade_time"),
        (held("A00", 1, target_trade_time=5), "target_trade_time"),
        (held("A00", 1, extra_details={"a": float("nan")}), "extra_details"),
        (held("A00", 1, weight=1), "weight"),
    ],
)
def test_a_holding_that_cannot_be(small: Book, row: dict[str, Any], field: str) -> None:
    with pytest.raises(SnapshotRefused) as caught:
        replace_account_holdings(HoldingsSnapshot("C00", NOON, [held("A08", 1), row]))
    assert [(p["row"], p["field"]) for p in caught.value.facts["problems"]] == [(1, field)]
    assert AccountHoldingsSet.count() == 0


def test_an_asset_twice_a_snapshot_twice_and_an_unknown_producer(small: Book) -> None:
    twice = [held("A00", 1), held("A01", 1), held("A00", 1, direction=-1)]
    with pytest.raises(SnapshotRefused) as caught:
        replace_account_holdings(
            [
                HoldingsSnapshot("C00", NOON, twice, source_data_node_uid=uuid.uuid4()),
                HoldingsSnapshot(small.accounts[0], NIGHT, []),
                HoldingsSnapshot(small.accounts[0].uid, NOON, []),
            ]
        )
    told = [(p["snapshot"], p["row"], p["field"]) for p in caught.value.facts["problems"]]
    assert told == [(0, None, "source_data_node_uid"), (0, 2, "asset_identifier"), (2, None, "account")]
    assert "snapshot 0" in caught.value.facts["problems"][2]["reason"]


def test_rows_are_frozen_and_a_changed_copy_is_checked_again(small: Book) -> None:
    row = TargetPosition(asset_uid=small.assets[0].uid, weight_notional_exposure=0.5)
    with pytest.raises(ValidationError):
        row.weight_notional_exposure = 1.0  # type: ignore[misc]
    with pytest.raises(ValidationError, match="by asset_uid"):
        TargetPosition(asset_identifier="A00", weight_notional_exposure=0.5)  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="finite"):
        AccountHolding(asset_identifier="A00", quantity=float("inf"))
    with pytest.raises(SnapshotRefused):
        replace_target_positions(TargetSnapshot("C00-core", NOON, [row.model_copy(update={"single_asset_quantity": 1.0})]))


def test_what_exists_is_named_and_stays(small: Book, engine: Engine) -> None:
    days = [NOON + timedelta(days=day) for day in range(8)]
    replace_account_holdings([HoldingsSnapshot("C00", day, [held("A00", 1)]) for day in days[:7]])
    before = everything(engine)
    with pytest.raises(SnapshotExists, match=r"account holdings of C00 at 2024-01-02T12:00:00\+00:00, .* and 2 more exist already"):
        replace_account_holdings([HoldingsSnapshot("C00", day, [held("A01", 1)]) for day in days])
    assert everything(engine) == before  # the eighth, which is new, is not there either


def test_holdings_that_virtual_funds_draw_on_stay(small: Book, engine: Engine) -> None:
    used, free = replace_account_holdings([HoldingsSnapshot("C00", time, [held("A00", 10), held("A01", 1)]) for time in (NOON, NIGHT)])
    account = small.accounts[0].uid
    fund = VirtualFund.create(unique_identifier="V", account_uid=account, target_portfolio_uid=small.portfolios[0].uid)
    for head in (used, free):
        view = VirtualFundHoldingsSet.create(
            virtual_fund_uid=fund.uid, source_account_holdings_set_uid=head.uid, account_uid=account, time_index=head.time_index
        )
        if head is used:
            columns = "virtual_fund_uid, time_index, asset_identifier, virtual_fund_holdings_set_uid, source_account_holdings_set_uid"
            with engine.begin() as connection:
                connection.exec_driver_sql(
                    f"INSERT INTO msm__virtual_fund_holdings ({columns}, allocated_quantity) VALUES (%s, %s, 'A00', %s, %s, 4)",
                    (fund.uid, NOON, view.uid, head.uid),
                )
    before = everything(engine)
    with pytest.raises(SnapshotInUse, match=r"holdings of C00 at 2024-01-02T12:00:00\+00:00 are attributed to virtual funds \(V\)"):
        replace_account_holdings([HoldingsSnapshot("C00", time, [held("A00", 3)]) for time in (NOON, NIGHT)], overwrite=True)
    assert everything(engine) == before
    replace_account_holdings(HoldingsSnapshot("C00", NIGHT, [held("A00", 3)]), overwrite=True)  # a view of nothing is no use
    assert stored(engine, HOLDINGS) == [(NOON, "A00", 10.0), (NOON, "A01", 1.0), (NIGHT, "A00", 3.0)]


def test_tables_must_be_attached(engine: Engine) -> None:
    start_engine(["TargetPositions"])
    with pytest.raises(EngineNotStarted, match="AccountHoldings"):
        replace_account_holdings(HoldingsSnapshot("C00", NOON, []))


# -- several at a time --------------------------------------------------------------------------------------------------------


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What each call returns, or the error it raises; all begin together, each in a thread and connection of its own."""
    together = Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        together.wait(5)
        try:
            return call()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


@pytest.mark.parametrize("exists", [False, True])
def test_of_two_that_replace_one_snapshot_one_wins_whole(small: Book, engine: Engine, exists: bool) -> None:
    if exists:
        replace_account_holdings(HoldingsSnapshot("C00", NOON, [held("A08", 1)]))
    for _ in range(5):
        mine, yours = ([held(f"A{i:02d}", quantity) for i in rows] for quantity, rows in ((1, range(5)), (2, range(3, 8))))
        done = at_once(
            lambda: replace_account_holdings(HoldingsSnapshot("C00", NOON, mine), overwrite=True),  # noqa: B023
            lambda: replace_account_holdings(HoldingsSnapshot("C00", NOON, yours), overwrite=True),  # noqa: B023
        )
        assert [len(heads) for heads in done] == [1, 1]
        assert done[0] == done[1]
        found = [(name, quantity) for _, name, quantity in stored(engine, HOLDINGS)]
        assert found in ([(row["asset_identifier"], row["quantity"]) for row in rows] for rows in (mine, yours))


def test_of_two_that_store_one_new_snapshot_one_is_told_that_it_exists(small: Book, engine: Engine) -> None:
    for day in range(5):
        moment = NOON + timedelta(days=day)
        done = at_once(*(lambda n=n: replace_account_holdings(HoldingsSnapshot("C00", moment, [held(f"A0{n}", 1)])) for n in (1, 2)))  # noqa: B023
        assert sorted(type(outcome).__name__ for outcome in done) == ["SnapshotExists", "list"]
        winner = next(n for n, outcome in zip((1, 2), done, strict=True) if isinstance(outcome, list))
        assert stored(engine, HOLDINGS)[-1] == (moment, f"A0{winner}", 1.0)


def test_two_that_replace_the_same_many_in_other_orders_do_not_lock_each_other_out(engine: Engine) -> None:
    start_engine()
    many = book(accounts=9)
    snapshots = [HoldingsSnapshot(account, NOON, [held("A00", 1)]) for account in many.accounts]
    heads = sorted(replace_account_holdings(snapshots), key=lambda head: head.account_uid)
    ordered = sorted(snapshots, key=lambda snapshot: snapshot.account.uid)  # type: ignore[union-attr]
    with engine.connect() as third, ThreadPoolExecutor(2) as pool:
        third.exec_driver_sql("SELECT uid FROM msm__account_holdings_set WHERE uid = %s FOR UPDATE", (heads[4].uid,))
        given = (ordered, ordered[::-1])  # either gets to the one in the middle from its own side, and waits there
        done = [pool.submit(replace_account_holdings, snapshots, overwrite=True) for snapshots in given]
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        until = time.monotonic() + 5
        while stored(engine, waiting) != [(2,)] and time.monotonic() < until:
            time.sleep(0.01)
        third.rollback()
        assert [len(future.result()) for future in done] == [9, 9]


def test_a_reader_sees_the_old_or_the_new(small: Book, engine: Engine) -> None:
    replace_account_holdings(HoldingsSnapshot("C00", NOON, [held("A00", 1), held("A01", 1)]))
    with one_transaction():
        replace_account_holdings(HoldingsSnapshot("C00", NOON, [held("A02", 2)]), overwrite=True)
        assert [name for _, name, _ in stored(engine, HOLDINGS)] == ["A00", "A01"]  # another connection
    assert [name for _, name, _ in stored(engine, HOLDINGS)] == ["A02"]


def test_what_is_replaced_is_locked_against_those_who_allocate_from_it(small: Book, engine: Engine) -> None:
    (head,) = replace_account_holdings(HoldingsSnapshot("C00", NOON, [held("A00", 1)]))
    with one_transaction():
        replace_account_holdings(HoldingsSnapshot("C00", NOON, [held("A00", 2)]), overwrite=True)
        with engine.connect() as other:
            locked = "SELECT uid FROM msm__account_holdings_set FOR KEY SHARE SKIP LOCKED"  # what a foreign key to it takes
            assert other.exec_driver_sql(locked).all() == []
    assert [uid for (uid,) in stored(engine, "SELECT uid FROM msm__account_holdings_set FOR KEY SHARE SKIP LOCKED")] == [head.uid]


def test_an_asset_that_goes_while_its_snapshot_is_written_is_told_in_our_words(small: Book, engine: Engine) -> None:
    def drop(connection: Any, cursor: object, statement: str, *_: object) -> None:
        if statement.startswith('INSERT INTO "msm__account_holdings_set"'):  # after all checks
            with engine.begin() as other:
                other.exec_driver_sql("DELETE FROM msm__asset WHERE unique_identifier = 'A00'")

    event.listen(engine, "before_cursor_execute", drop)
    with pytest.raises(InvalidRow, match="AccountHoldings: asset_identifier names no Asset row"):
        replace_account_holdings(HoldingsSnapshot("C00", NOON, [held("A00", 1)]))
    event.remove(engine, "before_cursor_execute", drop)
    assert AccountHoldingsSet.count() == 0
    assert Asset.count() == 8
