"""Holdings attributed to funds, in a real database. What is stored is summed here, row by row, in decimals."""

import itertools
import math
import random
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import pandas as pd
import pytest
from sqlalchemy import Engine, create_engine, text

from msm_core import database, start_engine
from msm_core.api import AccountHoldingsSet, Asset, VirtualFund, VirtualFundHoldingsSet
from msm_core.api.runtime import one_transaction
from msm_core.errors import AllocationRefused, EngineNotStarted, InvalidRow, NaiveTimestamp, RowNotFound, UnresolvedPortfolios
from msm_core.models.accounts import AccountHoldingsStorage, VirtualFundHoldingsStorage, VirtualFundTable
from msm_core.rows import upsert_rows
from msm_core.services.allocation import STRATEGIES
from msm_core.services.virtual_funds import (
    EXPOSURE,
    AllocationPlan,
    allocate_from_account_holdings_set,
    apply_allocation,
    demands_of_portfolios,
    plan_allocation,
    release_allocations,
    virtual_fund_exposure,
)
from tests.accounts import NOON, Book, book
from tests.msm_core.api.conftest import started, statements, versions

FIXTURES = (started, statements, versions)
HELD = {"A00": 100.0, "A01": -50.0, "A02": 0.3}  # A01 is short
THREADS, ROUNDS = 8, 50


@dataclass(frozen=True)
class Desk:
    """One account with a snapshot of HELD, and funds F0, F1, ... of it that follow P00, P01, P00, ..."""

    book: Book
    snapshot: AccountHoldingsSet
    funds: list[VirtualFund]


@pytest.fixture
def desk(started: Engine) -> Desk:
    return opened(book(accounts=2))


def opened(registry: Book, funds: int = 8) -> Desk:
    rows = [
        {"unique_identifier": f"F{i}", "account_uid": registry.accounts[0].uid, "target_portfolio_uid": registry.portfolios[i % 2].uid}
        for i in range(funds)
    ]
    return Desk(registry, snapshot_of(registry.accounts[0].uid, HELD), VirtualFund.upsert_many(rows))


def snapshot_of(account: uuid.UUID, held: dict[str, float], at: datetime = NOON) -> AccountHoldingsSet:
    head = AccountHoldingsSet.create(account_uid=account, time_index=at)
    names = {"holdings_set_uid": head.uid, "account_uid": account, "time_index": at}
    rows = [{**names, "asset_identifier": a, "quantity": abs(q), "direction": int(math.copysign(1, q))} for a, q in held.items()]
    with one_transaction(AccountHoldingsStorage) as connection:
        upsert_rows(connection, AccountHoldingsStorage, rows, key=("account_uid", "time_index", "asset_identifier"))
    return head


def asked(*rows: tuple[Any, str, float]) -> list[dict[str, Any]]:
    return [dict(zip(("virtual_fund", "asset_identifier", "quantity"), row, strict=True)) for row in rows]


def stored(engine: Engine, table: type) -> list[dict[str, Any]]:
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(text(f'SELECT * FROM "{table.__tablename__}"')).mappings()]


def views(engine: Engine) -> list[tuple[str, str, float, str]]:
    """fund, asset, signed quantity, strategy of every stored row."""
    names = {row["uid"]: row["unique_identifier"] for row in stored(engine, VirtualFundTable)}
    return sorted(
        (names[r["virtual_fund_uid"]], r["asset_identifier"], r["allocated_quantity"] * r["direction"], r["allocation_strategy"])
        for r in stored(engine, VirtualFundHoldingsStorage)
    )


def attributed(engine: Engine) -> dict[tuple[str, int], Decimal]:
    """The exact sum over all rows, per asset and direction."""
    sums: Counter[tuple[str, int]] = Counter()
    for row in stored(engine, VirtualFundHoldingsStorage):
        sums[row["asset_identifier"], row["direction"]] += Decimal(repr(row["allocated_quantity"]))  # type: ignore[assignment]
    return dict(sums)  # type: ignore[arg-type]


def reasons(refusal: pytest.ExceptionInfo[AllocationRefused]) -> list[str]:
    return [problem["reason"] for problem in refusal.value.facts["problems"]]


# -- planning and applying ------------------------------------------------------------------------------------------------------------


def test_an_allocation_is_planned_applied_and_given_back(desk, started):
    rows = asked(("F0", "A00", 60), (desk.funds[1], "A00", 40.0), (desk.funds[1].uid, "A01", -20.0), ("F2", "A02", 0.0))
    plan = plan_allocation(desk.snapshot, rows)
    assert plan.virtual_fund_uids == tuple(fund.uid for fund in desk.funds[:3])
    assert list(plan.allocations.itertuples(index=False, name=None)) == [
        ("F0", desk.funds[0].uid, "A00", 1, 60.0, 60.0),
        ("F1", desk.funds[1].uid, "A00", 1, 40.0, 40.0),
        ("F1", desk.funds[1].uid, "A01", -1, 20.0, 20.0),
    ]
    assert list(plan.residual.itertuples(index=False, name=None)) == [
        ("A00", 1, 100.0, 0.0, 100.0, 0.0),
        ("A01", -1, 50.0, 0.0, 20.0, 30.0),
        ("A02", 1, 0.3, 0.0, 0.0, 0.3),
    ]
    sets = apply_allocation(plan)
    assert [(s.virtual_fund_uid, s.source_account_holdings_set_uid, s.account_uid, s.time_index) for s in sets] == [
        (fund.uid, desk.snapshot.uid, desk.snapshot.account_uid, NOON) for fund in desk.funds[:3]
    ]
    expected = [("F0", "A00", 60.0, "explicit"), ("F1", "A00", 40.0, "explicit"), ("F1", "A01", -20.0, "explicit")]
    assert views(started) == expected

    assert release_allocations(desk.snapshot, "F1") == 2
    assert views(started) == expected[:1]
    assert release_allocations(desk.snapshot.uid) == 1
    assert release_allocations(desk.snapshot) == 0
    assert views(started) == []
    assert VirtualFundHoldingsSet.count() == 0  # F2 had a view, an empty one


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_dry_run_writes_nothing(desk, versions, strategy):
    before = versions()
    plan = allocate_from_account_holdings_set(desk.snapshot, asked(("F0", "A00", 60.0)), strategy, dry_run=True)
    assert plan.allocations["allocated_quantity"].tolist() == [60.0]
    assert versions() == before
    allocate_from_account_holdings_set(desk.snapshot, asked(("F0", "A00", 60.0)), strategy)
    assert versions() != before


def test_what_others_have_is_not_free_and_what_the_own_funds_had_is(desk, started):
    allocate_from_account_holdings_set(desk.snapshot, asked(("F0", "A00", 70.0), ("F1", "A00", 20.0)))
    with pytest.raises(AllocationRefused, match=r"'A00' long: 31\.0 demanded, 30\.0 free"):
        plan_allocation(desk.snapshot, asked(("F1", "A00", 31.0)), overwrite=True)
    plan = allocate_from_account_holdings_set(desk.snapshot, asked(("F1", "A00", 30.0)), overwrite=True)
    assert list(plan.residual.iloc[0]) == ["A00", 1, 100.0, 70.0, 30.0, 0.0]
    # 0 free for another fund: in proportion it gets nothing, and no row
    allocate_from_account_holdings_set(desk.snapshot, asked(("F2", "A00", 5.0)), "proportional_attribution")
    assert views(started) == [("F0", "A00", 70.0, "explicit"), ("F1", "A00", 30.0, "explicit")]


def test_in_proportion_and_to_the_last_bit(desk, started):
    # 0.3 free of 0.7 demanded: 0.1 * 0.3 / 0.7 = 0.042857142857142857..., six times that = 0.25714285714285714...
    rows = asked(("F0", "A02", 0.1), ("F1", "A02", 0.6))
    allocate_from_account_holdings_set(desk.snapshot, rows, "proportional_attribution")
    name = "proportional_attribution"
    assert views(started) == [("F0", "A02", 0.0428571428571428, name), ("F1", "A02", 0.257142857142857, name)]
    # 0.1 + 0.2 = 0.3 exactly, though not in floats
    allocate_from_account_holdings_set(desk.snapshot, asked(("F0", "A02", 0.1), ("F1", "A02", 0.2)), overwrite=True)
    assert attributed(started) == {("A02", 1): Decimal("0.3")}
    with pytest.raises(AllocationRefused):  # the smallest there is, more
        allocate_from_account_holdings_set(desk.snapshot, asked(("F2", "A02", 5e-324)))


def test_strict_is_all_or_nothing(desk, started, versions):
    before = versions()
    rows = asked(("F0", "A00", 100.0), ("F1", "A01", -51.0), ("F2", "A02", -0.1))
    with pytest.raises(AllocationRefused) as refusal:
        allocate_from_account_holdings_set(desk.snapshot, rows, "strict_feasible")
    assert refusal.value.facts["problems"] == [
        {"asset_identifier": "A01", "direction": -1, "demanded": 51.0, "free": 50.0, "reason": "'A01' short: 51.0 demanded, 50.0 free"},
        {"asset_identifier": "A02", "direction": -1, "demanded": 0.1, "free": 0.0, "reason": "'A02' short: 0.1 demanded, 0 free"},
    ]
    assert versions() == before
    allocate_from_account_holdings_set(desk.snapshot, rows[:1], "strict_feasible")
    assert views(started) == [("F0", "A00", 100.0, "strict_feasible")]


def test_every_problem_is_told_and_nothing_is_written(desk, versions):
    foreign = {"unique_identifier": "X0", "account_uid": desk.book.accounts[1].uid, "target_portfolio_uid": desk.book.portfolios[0].uid}
    VirtualFund.create(**foreign)
    allocate_from_account_holdings_set(desk.snapshot, asked(("F0", "A00", 1.0)))
    before = versions()
    stranger = uuid.uuid4()
    rows = [("F0", "A00", 1.0), ("X0", "A00", 1.0), ("nobody", "A00", 1.0), (stranger, "A00", 1.0), ("F1", "A08", 1.0)]
    rows += [("F2", "A00", math.nan), ("F3", "A00", 1.0), (desk.funds[3].uid, "A00", 2.0), ("F4", "A01", -60.0)]
    with pytest.raises(AllocationRefused) as refusal:
        allocate_from_account_holdings_set(desk.snapshot, asked(*rows))
    assert reasons(refusal) == [
        "there is no virtual fund 'nobody'",
        f"there is no virtual fund '{stranger}'",
        "virtual fund 'X0' is of another account than the snapshot",
        "virtual fund 'F0' has an allocation of this snapshot already; pass overwrite=True to replace it",
        "demand of 'F2' for 'A00': its quantity is not a finite number",
        "demand of 'F3' for 'A00': the fund asks for this asset twice",
        "demand of 'F1' for 'A08': the asset is not held",
        "'A01' short: 60.0 demanded, 50.0 free",
    ]
    assert versions() == before


def test_a_plan_applied_twice_doubles_nothing(desk, started):
    once = plan_allocation(desk.snapshot, asked(("F0", "A00", 60.0), ("F1", "A01", -5.0)))
    sets = apply_allocation(once)
    expected = views(started)
    with pytest.raises(AllocationRefused, match="has an allocation of this snapshot already"):
        apply_allocation(once)
    again = plan_allocation(desk.snapshot, asked(("F0", "A00", 60.0), ("F1", "A01", -5.0)), overwrite=True)
    assert apply_allocation(again) == sets  # their uids too
    assert apply_allocation(again) == sets
    assert views(started) == expected


def test_overwriting_replaces_all_that_a_fund_has(desk, started):
    allocate_from_account_holdings_set(desk.snapshot, asked(("F0", "A00", 60.0), ("F0", "A01", -5.0), ("F1", "A00", 1.0)))
    allocate_from_account_holdings_set(desk.snapshot, asked(("F0", "A02", 0.25)), "strict_feasible", overwrite=True)
    assert views(started) == [("F0", "A02", 0.25, "strict_feasible"), ("F1", "A00", 1.0, "explicit")]
    allocate_from_account_holdings_set(desk.snapshot, asked(("F0", "A02", 0.0)), overwrite=True)
    assert views(started) == [("F1", "A00", 1.0, "explicit")]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            "UPDATE {holdings} SET quantity = 59.99999999999999 WHERE asset_identifier = 'A00'",
            r"have 60 of 59\.99999999999999 held",
        ),
        ("DELETE FROM {holdings} WHERE asset_identifier = 'A00'", "no longer holds every asset"),
        ("DELETE FROM {fund}", "there is no virtual fund"),
        ("UPDATE {holdings} SET direction = -1 WHERE asset_identifier = 'A00'", "no longer holds every asset"),
    ],
)
def test_a_plan_is_refused_when_the_world_has_moved(desk, started, versions, change, why):
    plan = plan_allocation(desk.snapshot, asked(("F0", "A00", 60.0), ("F1", "A01", -5.0)))
    names = {"holdings": f'"{AccountHoldingsStorage.__tablename__}"', "fund": f'"{VirtualFundTable.__tablename__}"'}
    with started.begin() as connection:
        connection.exec_driver_sql(change.format(**names))
    before = versions()
    with pytest.raises(AllocationRefused, match=why):
        apply_allocation(plan)
    assert versions() == before


def test_a_plan_is_refused_when_others_took_what_was_free(desk, started):
    plan = plan_allocation(desk.snapshot, asked(("F0", "A02", 0.1)))
    allocate_from_account_holdings_set(desk.snapshot, asked(("F1", "A02", 0.20000000000000004)))  # 0.30000000000000004 in all
    with pytest.raises(AllocationRefused, match=r"all funds would have 0\.30000000000000004 of 0\.3 held"):
        apply_allocation(plan)
    assert views(started) == [("F1", "A02", 0.20000000000000004, "explicit")]


def test_a_snapshot_that_there_is_not(desk, started):
    plan = plan_allocation(desk.snapshot, asked(("F0", "A00", 1.0)))
    AccountHoldingsSet.delete(desk.snapshot)
    for act in (
        lambda: plan_allocation(desk.snapshot, []),
        lambda: allocate_from_account_holdings_set(desk.snapshot.uid, asked(("F0", "A00", 1.0))),
        lambda: apply_allocation(plan),
        lambda: release_allocations(desk.snapshot),
    ):
        with pytest.raises(RowNotFound):
            act()


def test_odd_calls(desk, started):
    assert apply_allocation(plan_allocation(desk.snapshot, [])) == []
    with pytest.raises(AllocationRefused, match="there is no virtual fund 'nobody'"):
        release_allocations(desk.snapshot, ["F0", "nobody"])
    with pytest.raises(InvalidRow, match="NUL"):
        plan_allocation(desk.snapshot, asked(("F\0", "A00", 1.0)))
    with pytest.raises(AllocationRefused, match="column asset_identifier of the demands is missing"):
        plan_allocation(desk.snapshot, [{"virtual_fund": "F0", "quantity": 1.0}])


def test_nothing_goes_before_the_engine_is_started(engine):
    with pytest.raises(EngineNotStarted):
        plan_allocation(uuid.uuid4(), [])


def test_the_number_of_statements_does_not_depend_on_funds_and_rows(started, statements):
    many = opened(book(assets=40, portfolios=2), funds=30)
    snapshot = snapshot_of(many.book.accounts[0].uid, {f"A{i:02d}": 100.0 for i in range(40)}, NOON + timedelta(days=1))
    sizes = []
    for funds, assets in ((1, 1), (30, 40)):
        rows = asked(*((f"F{i}", f"A{k:02d}", 9.0) for i in range(funds) for k in range(assets)))
        with statements() as sent:
            allocate_from_account_holdings_set(snapshot, rows, "proportional_attribution", overwrite=True)
            release_allocations(snapshot)
        sizes.append(len(sent))
    assert sizes[0] == sizes[1] == 19  # allocate 13, release 6


@contextmanager
def default_of_the_server(engine: Engine, setting: str, value: str) -> Iterator[None]:
    """New connections to the database of `engine` have the setting."""

    def alter(what: str) -> None:
        with engine.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql(f'ALTER DATABASE "{engine.url.database}" {what}')
        engine.dispose()

    alter(f"SET {setting} = '{value}'")
    try:
        yield
    finally:
        alter("RESET ALL")


def test_a_server_that_prints_floats_short_changes_nothing(desk, started):
    with default_of_the_server(started, "extra_float_digits", "-2"):
        plan = allocate_from_account_holdings_set(desk.snapshot, asked(("F0", "A02", 0.1), ("F1", "A02", 0.19999999999999998)))
        assert plan.residual["residual_quantity"].tolist()[2] == 2e-17
        with pytest.raises(AllocationRefused, match="3E-17 demanded, 2E-17 free"):
            allocate_from_account_holdings_set(desk.snapshot, asked(("F2", "A02", 3e-17)))


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read"])
def test_who_has_waited_sees_what_the_other_did(desk, started, isolation):
    """Under the server's default of REPEATABLE READ the one that waits would look at the world from before."""

    def waits() -> bool:
        with started.connect() as connection:
            return bool(connection.exec_driver_sql("SELECT count(*) FROM pg_locks WHERE NOT granted").scalar_one())

    with default_of_the_server(started, "default_transaction_isolation", isolation), ThreadPoolExecutor(1) as thread:
        with one_transaction(VirtualFundTable):
            allocate_from_account_holdings_set(desk.snapshot, asked(("F0", "A00", 60.0)))
            second = thread.submit(
                allocate_from_account_holdings_set, desk.snapshot, asked(("F1", "A00", 60.0)), "proportional_attribution"
            )
            deadline = time.monotonic() + 10
            while not waits() and time.monotonic() < deadline:
                time.sleep(0.02)
        assert second.result(timeout=10).allocations["allocated_quantity"].tolist() == [40.0]
    assert attributed(started) == {("A00", 1): Decimal(100)}


# -- many at once -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def wide(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """The engine of this database with a connection for each thread; a process has one otherwise."""
    monkeypatch.setattr(database, "create_engine", lambda url, **options: create_engine(url, **{**options, "pool_size": THREADS}))
    database._engine.cache_clear()
    start_engine()
    engine = database.get_engine()
    yield engine
    engine.dispose()


def wishes(dice: random.Random) -> list[dict[str, Any]]:
    """A fund's demands: up to half of what is held of some assets, with all the digits that a float has."""
    chosen = dice.sample(sorted(HELD), dice.randint(1, len(HELD)))
    return [{"asset_identifier": asset, "quantity": HELD[asset] * dice.uniform(0.05, 0.5)} for asset in chosen]


def test_concurrent_allocations_never_exceed_what_is_held(desk, wide):
    """8 threads, each on a connection of its own, 50 rounds over one snapshot: 400 allocations, all strategies, new and overwriting."""
    dice = random.Random(1)
    held = {(asset, int(math.copysign(1, q))): Decimal(repr(abs(q))) for asset, q in HELD.items()}
    landed: Counter[str] = Counter()
    refused: Counter[str] = Counter()

    def allocate(fund: VirtualFund, rows: list[dict[str, Any]], strategy: Any, overwrite: bool) -> tuple[str, AllocationPlan | None]:
        try:
            demands = [{"virtual_fund": fund, **row} for row in rows]
            return strategy, allocate_from_account_holdings_set(desk.snapshot, demands, strategy, overwrite=overwrite)
        except AllocationRefused:
            return strategy, None

    with ThreadPoolExecutor(THREADS) as threads:
        for turn in range(ROUNDS):
            release_allocations(desk.snapshot)
            funds = [desk.funds[dice.randrange(6)] for _ in range(THREADS)]  # some ask twice
            strategies = itertools.islice(itertools.cycle(STRATEGIES), turn % 3, turn % 3 + THREADS)
            work = [(fund, wishes(dice), strategy, dice.random() < 0.5) for fund, strategy in zip(funds, strategies, strict=True)]
            for strategy, plan in threads.map(lambda job: allocate(*job), work):
                (landed if plan else refused)[strategy] += 1
            sums = attributed(wide)
            assert all(total <= held[place] for place, total in sums.items()), turn
            assert sums, turn
    assert sum(landed.values()) + sum(refused.values()) == THREADS * ROUNDS == 400
    assert all(landed[strategy] >= 50 for strategy in STRATEGIES), landed
    assert all(refused[strategy] >= 10 for strategy in ("explicit", "strict_feasible")), refused


def test_concurrent_allocations_in_proportion_share_what_is_left(desk, wide):
    """Nobody fails: 8 funds want 30 of 100 each. Three come first and get 30, the fourth gets the 10 that are left, the others nothing."""

    def share(fund: VirtualFund) -> float:
        demands = asked((fund, "A00", 30.0))
        plan = allocate_from_account_holdings_set(desk.snapshot, demands, "proportional_attribution")
        return float(plan.allocations["allocated_quantity"][0])

    with ThreadPoolExecutor(THREADS) as threads:
        assert sorted(threads.map(share, desk.funds)) == [0.0, 0.0, 0.0, 0.0, 10.0, 30.0, 30.0, 30.0]
    assert attributed(wide) == {("A00", 1): Decimal(100)}


# -- views, not holdings ----------------------------------------------------------------------------------------------------------------


def test_funds_are_no_assets_and_never_among_holdings(desk, started):  # R90
    before = stored(started, AccountHoldingsStorage), Asset.count()
    allocate_from_account_holdings_set(desk.snapshot, asked(("F0", "A00", 60.0), ("F1", "A01", -5.0)))
    holdings = stored(started, AccountHoldingsStorage)
    assert (holdings, Asset.count()) == before
    funds = {str(name) for fund in desk.funds for name in (fund.uid, fund.unique_identifier)}
    assert not funds & {str(value) for row in holdings for value in row.values()}
    assert not funds & {str(name) for asset in Asset.filter() for name in (asset.uid, asset.unique_identifier)}
    with pytest.raises(AllocationRefused, match="the asset is not held"):
        plan_allocation(desk.snapshot, asked(("F2", "F0", 1.0)))


# -- exposure -----------------------------------------------------------------------------------------------------------------------------


def history(desk: Desk) -> list[datetime]:
    """Three snapshots of the first account, one of the second; F0 in all, F1 in the first two, F2 in the last with nothing."""
    days = [NOON + timedelta(days=i) for i in range(3)]
    first, second = desk.book.accounts[0].uid, desk.book.accounts[1].uid
    snapshots = [desk.snapshot, *(snapshot_of(first, {"A00": 10.0 * i, "A03": -7.0}, day) for i, day in enumerate(days[1:], 1))]
    VirtualFund.create(unique_identifier="X0", account_uid=second, target_portfolio_uid=desk.book.portfolios[0].uid)
    for i, snapshot in enumerate(snapshots):
        rows = [("F0", "A00", 5.0 + i), *([("F0", "A03", -2.0)] if i else []), *([("F1", "A00", 4.0)] if i < 2 else [("F2", "A00", 0.0)])]
        allocate_from_account_holdings_set(snapshot, asked(*rows), "strict_feasible" if i == 1 else "explicit")
    allocate_from_account_holdings_set(snapshot_of(second, {"A04": 3.0}, days[1]), asked(("X0", "A04", 9.0)), "proportional_attribution")
    return days


def rebuilt(engine: Engine, as_of: datetime | None) -> list[tuple]:
    """The exposure, put together in pandas from whole tables."""
    funds = pd.DataFrame(stored(engine, VirtualFundTable))
    sets = pd.DataFrame([row.model_dump() for row in VirtualFundHoldingsSet.filter()])
    sets = sets[sets["time_index"] <= as_of] if as_of else sets
    newest = sets.loc[sets.groupby("virtual_fund_uid")["time_index"].idxmax()] if len(sets) else sets
    rows = pd.DataFrame(stored(engine, VirtualFundHoldingsStorage)).drop(columns="time_index")
    rows = rows.merge(newest[["uid", "time_index"]], left_on="virtual_fund_holdings_set_uid", right_on="uid")
    rows = rows.merge(funds, left_on="virtual_fund_uid", right_on="uid", suffixes=("", "_of_fund"))
    quantities = rows["allocated_quantity"] * rows["direction"]
    columns = (rows["unique_identifier"], rows["time_index"], rows["asset_identifier"], quantities, rows["allocation_strategy"])
    return sorted(zip(*columns, strict=True))


def told(exposure: pd.DataFrame) -> list[tuple]:
    columns = ["virtual_fund", "time_index", "asset_identifier", "quantity", "allocation_strategy"]
    return list(exposure[columns].itertuples(index=False, name=None))


def test_exposure_is_the_newest_view_of_each_fund(desk, started):
    days = history(desk)
    exposure = virtual_fund_exposure()
    assert list(exposure.itertuples(index=False, name=None)) == [
        ("C00", "F0", "P00", days[2], "A00", 7.0, "explicit"),
        ("C00", "F0", "P00", days[2], "A03", -2.0, "explicit"),
        ("C00", "F1", "P01", days[1], "A00", 4.0, "strict_feasible"),
        ("C01", "X0", "P00", days[1], "A04", 3.0, "proportional_attribution"),
    ]
    assert str(exposure["time_index"].dtype) == "datetime64[us, UTC]"
    assert told(virtual_fund_exposure(as_of=days[0])) == [("F0", days[0], "A00", 5.0, "explicit"), ("F1", days[0], "A00", 4.0, "explicit")]


def test_exposure_equals_what_pandas_makes_of_the_three_tables(desk, started):  # R90
    days = history(desk)
    for as_of in (None, *days, days[1] - timedelta(microseconds=1), days[2] + timedelta(days=99)):
        assert told(virtual_fund_exposure(as_of=as_of)) == rebuilt(started, as_of)
    assert virtual_fund_exposure(as_of=days[0] - timedelta(microseconds=1)).empty


@pytest.mark.parametrize(
    ("selected", "funds"),
    [
        ({"accounts": "C01"}, {"X0"}),
        ({"accounts": ["C00", "C01"]}, {"F0", "F1", "X0"}),
        ({"virtual_funds": ["F1", "X0"]}, {"F1", "X0"}),
        ({"accounts": "C00", "virtual_funds": ["F1", "X0"]}, {"F1"}),
        ({"accounts": []}, set()),
        ({"virtual_funds": "nobody"}, set()),
    ],
)
def test_exposure_of_some(desk, started, selected, funds):
    history(desk)
    assert set(virtual_fund_exposure(**selected)["virtual_fund"]) == funds


def test_exposure_of_rows_and_uids_and_of_an_instant_without_zone(desk, started):
    history(desk)
    account, fund = desk.book.accounts[0], desk.funds[1]
    for accounts, funds in ((account, fund), (account.uid, fund.uid), ([account], [fund.uid, "F1"])):
        assert told(virtual_fund_exposure(accounts=accounts, virtual_funds=funds)) == [
            ("F1", NOON + timedelta(days=1), "A00", 4.0, "strict_feasible")
        ]
    with pytest.raises(NaiveTimestamp):
        virtual_fund_exposure(as_of=datetime(2024, 1, 2))


def test_the_statement_of_exposure_can_be_copied_without_its_conditions(desk, started):
    history(desk)
    copied = EXPOSURE.split("WHERE (CAST")[0].replace("coalesce(CAST(:as_of AS timestamptz), 'infinity')", "'2024-01-02 12:00+00'")
    with started.connect() as connection:
        rows = connection.exec_driver_sql(copied[copied.index("SELECT") :]).all()
    assert {row[1] for row in rows} == {"F0", "F1"}


# -- demands of portfolios ----------------------------------------------------------------------------------------------------------------


def test_demands_ask_the_resolver_once_and_can_be_allocated(desk, started):
    asked_for: list[list[uuid.UUID]] = []
    first, second = (portfolio.uid for portfolio in desk.book.portfolios)

    def resolver(portfolios: Iterable[uuid.UUID]) -> pd.DataFrame:
        asked_for.append(list(portfolios))
        rows = [(first, uuid.uuid4(), "A00", 0.5, 20.0), (first, uuid.uuid4(), "A01", -0.25, 5.0), (second, uuid.uuid4(), "A00", 1.0, 20.0)]
        return pd.DataFrame(rows, columns=["portfolio_uid", "asset_uid", "asset_identifier", "weight", "price"])

    # F0 and F2 follow P00, F1 follows P01. 1000 * 0.5 / 20 = 25; 1000 * -0.25 / 5 = -50; 600 / 20 = 30; 200 * 0.5 / 20 = 5; -10
    demands = demands_of_portfolios({"F0": 1000.0, desk.funds[1]: 600, desk.funds[2].uid: 200.0}, resolver)
    assert sorted(demands.itertuples(index=False, name=None)) == [
        ("F0", "A00", 25.0),
        ("F0", "A01", -50.0),
        ("F1", "A00", 30.0),
        ("F2", "A00", 5.0),
        ("F2", "A01", -10.0),
    ]
    assert [sorted(uids) for uids in asked_for] == [sorted([first, second])]
    # A00 fits; A01: 50 of 60 demanded, 50 * 50 / 60 = 41.666... and 50 * 10 / 60 = 8.333..., to 15 digits down: 49.99999999999993
    allocate_from_account_holdings_set(desk.snapshot, demands, "proportional_attribution")
    assert attributed(started) == {("A00", 1): Decimal(60), ("A01", -1): Decimal("41.6666666666666") + Decimal("8.33333333333333")}


def test_portfolios_of_which_nothing_is_known_are_named(desk, started):
    columns = ["portfolio_uid", "asset_uid", "asset_identifier", "weight", "price"]
    with pytest.raises(UnresolvedPortfolios, match="P00, P01"):
        demands_of_portfolios({"F0": 1.0, "F1": 1.0, "F2": 1.0}, lambda _: pd.DataFrame(columns=columns))
    with pytest.raises(AllocationRefused, match="there is no virtual fund 'nobody'"):
        demands_of_portfolios({"F0": 1.0, "nobody": 1.0}, lambda _: pd.DataFrame(columns=columns))
    assert demands_of_portfolios({}, lambda _: pd.DataFrame(columns=columns)).empty
