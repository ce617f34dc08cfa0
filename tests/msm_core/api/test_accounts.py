"""Accounts, their mandates and the heads of their snapshots: every kind of row, and what goes with what when a row goes."""

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine

from msm_core.api import (
    Account,
    AccountAllocationModel,
    AccountGroup,
    AccountHoldingsSet,
    AccountTargetAllocation,
    Asset,
    Portfolio,
    PositionSet,
    Row,
    VirtualFund,
    VirtualFundHoldingsSet,
)
from msm_core.errors import InvalidRow, NaiveTimestamp, RowNotFound

NOON = datetime(2024, 1, 2, 12, tzinfo=UTC)


@dataclass(frozen=True)
class Two:
    """Two accounts of one group, an allocation of each under one model, a portfolio, and the progress row of a producer."""

    group: AccountGroup
    accounts: list[Account]
    model: AccountAllocationModel
    allocations: list[AccountTargetAllocation]
    portfolio: Portfolio
    producer: uuid.UUID


@pytest.fixture
def two(started: Engine) -> Two:
    producer = uuid.uuid4()
    with started.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO msm__data_node_update (uid, kind, storage, scope) VALUES (%s, 'holdings', 's', 'c')", (producer,)
        )
    group, model = AccountGroup.create(group_name="g"), AccountAllocationModel.create(allocation_model_name="m")
    accounts = Account.create_many({"unique_identifier": n, "account_name": n, "account_group_uid": group.uid} for n in ("c0", "c1"))
    allocations = AccountTargetAllocation.create_many(
        {"unique_identifier": f"{a.unique_identifier}-m", "account_uid": a.uid, "account_allocation_model_uid": model.uid} for a in accounts
    )
    return Two(group, accounts, model, allocations, Portfolio.create(unique_identifier="p"), producer)


def fund(two: Two, **cells: Any) -> VirtualFund:
    given = {"unique_identifier": "v", "account_uid": two.accounts[0].uid, "target_portfolio_uid": two.portfolio.uid, **cells}
    return VirtualFund.create_many([given])[0]


# -- every kind of row --------------------------------------------------------------------------------------------------------

Made = tuple[type[Row], dict[str, Any], dict[str, Any], dict[str, Any]]  # row type, key, other fields, a change of them


def a_group(two: Two) -> Made:
    cells = {"group_description": "all", "metadata_json": {"a": [1, None]}}
    return AccountGroup, {"group_name": "desk"}, cells, {"group_description": None}


def an_account(two: Two) -> Made:
    cells = {"account_name": "Main", "is_paper": False, "account_is_active": True, "account_group_uid": two.group.uid}
    cells |= {"holdings_data_node_uid": two.producer, "metadata_json": {"custodian": "x"}}
    return Account, {"unique_identifier": "main"}, cells, {"account_is_active": False, "account_name": "Old"}


def a_model(two: Two) -> Made:
    cells = {"allocation_model_description": "60/40", "metadata_json": None}
    return AccountAllocationModel, {"allocation_model_name": "balanced"}, cells, {"metadata_json": {"v": 2}}


def an_allocation(two: Two) -> Made:
    cells = {"account_uid": two.accounts[0].uid, "account_allocation_model_uid": two.model.uid, "display_name": "Core", "is_active": False}
    cells |= {"source": "desk", "metadata_json": {}}
    return AccountTargetAllocation, {"unique_identifier": "core"}, cells, {"is_active": True, "source": None}


def a_position_set(two: Two) -> Made:
    key = {"account_target_allocation_uid": two.allocations[0].uid, "position_set_time": NOON}
    return PositionSet, key, {"source": "desk", "metadata_json": {"ticket": 7}}, {"source": "model"}


def a_holdings_set(two: Two) -> Made:
    key = {"account_uid": two.accounts[0].uid, "time_index": NOON}
    return AccountHoldingsSet, key, {"source_data_node_uid": two.producer}, {"source_data_node_uid": None}


def a_fund(two: Two) -> Made:
    cells = {"account_uid": two.accounts[0].uid, "target_portfolio_uid": two.portfolio.uid}
    cells |= {"account_target_allocation_uid": two.allocations[0].uid}
    return VirtualFund, {"unique_identifier": "fund"}, cells, {"account_target_allocation_uid": None}


def a_view(two: Two) -> Made:
    account = two.accounts[0].uid
    first, second = AccountHoldingsSet.create_many({"account_uid": account, "time_index": NOON + timedelta(days=d)} for d in (0, 1))
    key = {"virtual_fund_uid": fund(two).uid, "source_account_holdings_set_uid": first.uid}
    assert second.time_index == NOON + timedelta(days=1)
    return VirtualFundHoldingsSet, key, {"account_uid": account, "time_index": NOON}, {}


@pytest.mark.parametrize("make", [a_group, an_account, a_model, an_allocation, a_position_set, a_holdings_set, a_fund, a_view])
def test_every_kind_of_row_makes_the_round_trip(two: Two, versions: Callable[[], dict[str, str]], make: Callable[[Two], Made]) -> None:
    row, key, cells, change = make(two)
    before = row.count()
    created = row.create(**key, **cells)
    assert created.model_dump(exclude={"uid"}) == {**key, **cells}
    assert row.get(**key) == row.get(uid=created.uid) == created
    assert row.get_many([tuple(key.values())]) == [created]
    assert row.filter(**key, **cells) == [created]
    with pytest.raises(InvalidRow, match=r"exists already\. Use upsert"):
        row.create(**key, **cells)
    written = versions()
    assert row.upsert(**key, **cells) == created
    assert versions() == written
    changed = row.upsert(**{**key, **cells, **change})
    assert changed == created.model_copy(update=change)
    assert row.update(created, **{name: cells[name] for name in change}) == created
    with pytest.raises(InvalidRow, match="is the key and cannot change"):
        row.update(created, **key)
    assert row.count() == before + 1
    row.delete(created)
    assert row.get_or_none(**key) is None
    with pytest.raises(RowNotFound):
        row.delete(created)
    assert row.count() == before


def test_what_is_not_said_of_an_account_is_the_cautious_thing(two: Two) -> None:
    account = Account.get(unique_identifier="c0")
    assert (account.is_paper, account.account_is_active, account.holdings_data_node_uid) == (True, False, None)
    assert AccountTargetAllocation.get(unique_identifier="c0-m").is_active


@pytest.mark.parametrize(
    ("row", "cells", "why"),
    [
        (Account, {"unique_identifier": "x"}, "account_name must be given"),
        (Account, {"unique_identifier": "x", "account_name": "x" * 256}, r"account_name .* has 256 characters; at most 255 fit"),
        (Account, {"unique_identifier": "x", "account_name": "x", "is_paper": None}, "is_paper None"),
        (Account, {"unique_identifier": "x", "account_name": "x", "account_group_uid": uuid.uuid4()}, "names no AccountGroup"),
        (AccountGroup, {"group_name": "x" * 101}, r"group_name .* has 101 characters; at most 100 fit"),
        (AccountGroup, {"group_name": "a\nb"}, r"group_name .* control character"),
        (AccountAllocationModel, {"allocation_model_name": ""}, "allocation_model_name '' is empty"),
        (PositionSet, {"account_target_allocation_uid": uuid.uuid4(), "position_set_time": NOON}, "names no AccountTargetAllocation"),
        (AccountHoldingsSet, {"account_uid": uuid.uuid4(), "time_index": None}, "time_index must be given"),
        (AccountHoldingsSet, {"account_uid": uuid.uuid4(), "time_index": NOON}, "account_uid names no Account row"),
    ],
)
@pytest.mark.usefixtures("started")
def test_refused_with_the_field_and_the_reason(row: type[Row], cells: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidRow, match=why):
        row.create_many([cells])
    assert row.count() == 0


# -- many, and times ----------------------------------------------------------------------------------------------------------


def test_many_rows_cost_a_fixed_number_of_statements(two: Two, statements: Callable[[], Any]) -> None:
    counts = []
    for size in (3, 300):
        with statements() as sent:
            accounts = Account.upsert_many({"unique_identifier": f"a{i:03d}", "account_name": "x"} for i in range(size))
            allocations = AccountTargetAllocation.upsert_many(
                {"unique_identifier": a.unique_identifier, "account_uid": a.uid, "account_allocation_model_uid": two.model.uid}
                for a in accounts
            )
            sets = PositionSet.upsert_many({"account_target_allocation_uid": a.uid, "position_set_time": NOON} for a in allocations)
            AccountHoldingsSet.upsert_many({"account_uid": a.uid, "time_index": NOON} for a in accounts)
            assert PositionSet.get_many([(a.uid, NOON) for a in reversed(allocations)]) == sets[::-1]
        counts.append(len(sent))
    assert counts == [9, 9]
    assert [a.unique_identifier for a in Account.filter(name_contains="A29")] == [f"a{i}" for i in range(290, 300)]
    assert PositionSet.delete_many(sets) == 300


@pytest.mark.parametrize("row", [PositionSet, AccountHoldingsSet])
def test_times_are_kept_in_utc_and_name_one_instant(two: Two, started: Engine, row: type[PositionSet | AccountHoldingsSet]) -> None:
    owner_column, time_column = row.__key__
    owner = two.allocations[0].uid if row is PositionSet else two.accounts[0].uid
    with started.begin() as connection:  # a server whose sessions are not in UTC
        connection.exec_driver_sql(f"ALTER DATABASE \"{started.url.database}\" SET timezone = 'Asia/Tokyo'")
    started.dispose()
    told = datetime.fromisoformat("2024-01-02T21:30:00.000001+05:30")
    made = row.upsert_many([{owner_column: owner, time_column: told}])[0]
    assert getattr(made, time_column) == datetime(2024, 1, 2, 16, 0, 0, 1, tzinfo=UTC)
    assert getattr(made, time_column).tzinfo is UTC
    assert row.upsert_many([{owner_column: owner, time_column: "2024-01-02T16:00:00.000001Z"}]) == [made]
    assert row.count() == 1
    with pytest.raises(NaiveTimestamp, match=f"{row.__name__}.{time_column} is 2024-01-02T16:00:00, without a time zone"):
        row.upsert_many([{owner_column: owner, time_column: datetime(2024, 1, 2, 16)}])


# -- what goes with what ------------------------------------------------------------------------------------------------------


def _hold(engine: Engine, account: Account, quantity: float = 1.0) -> AccountHoldingsSet:
    Asset.upsert(unique_identifier="a")
    head = AccountHoldingsSet.upsert(account_uid=account.uid, time_index=NOON)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO msm__account_holdings (account_uid, time_index, asset_identifier, holdings_set_uid, quantity) "
            "VALUES (%s, %s, 'a', %s, %s)",
            (account.uid, NOON, head.uid, quantity),
        )
    return head


def test_a_group_and_a_producer_go_and_their_accounts_stay(two: Two, started: Engine) -> None:
    head = AccountHoldingsSet.create(account_uid=two.accounts[0].uid, time_index=NOON, source_data_node_uid=two.producer)
    Account.update(two.accounts[0], holdings_data_node_uid=two.producer)
    AccountGroup.delete(two.group)
    with started.begin() as connection:
        connection.exec_driver_sql("DELETE FROM msm__data_node_update")
    assert Account.filter(account_group_uid=None, holdings_data_node_uid=None) == [
        account.model_copy(update={"account_group_uid": None}) for account in two.accounts
    ]
    assert AccountHoldingsSet.get(uid=head.uid).source_data_node_uid is None


def test_a_model_stays_while_an_allocation_follows_it(two: Two) -> None:
    with pytest.raises(InvalidRow, match=r"still referenced by AccountTargetAllocation\.account_allocation_model_uid"):
        AccountAllocationModel.delete(two.model)
    AccountTargetAllocation.delete_many(two.allocations)
    AccountAllocationModel.delete(two.model)


def test_an_account_goes_with_its_mandates_and_funds(two: Two) -> None:
    account, other = two.accounts
    sets = PositionSet.create_many({"account_target_allocation_uid": a.uid, "position_set_time": NOON} for a in two.allocations)
    fund(two, account_target_allocation_uid=two.allocations[0].uid)
    AccountHoldingsSet.create(account_uid=account.uid, time_index=NOON)  # a snapshot that holds nothing
    Account.delete(account)
    assert (Account.filter(), AccountTargetAllocation.filter(), PositionSet.filter()) == ([other], two.allocations[1:], sets[1:])
    assert (VirtualFund.count(), AccountHoldingsSet.count(), Portfolio.count()) == (0, 0, 1)


def test_an_account_stays_while_it_has_holdings(two: Two, started: Engine) -> None:
    head = _hold(started, two.accounts[0])
    with pytest.raises(InvalidRow, match=r"still referenced by AccountHoldings\.account_uid"):
        Account.delete(two.accounts[0])
    assert Account.count() == 2
    with pytest.raises(InvalidRow, match=r"still referenced by AccountHoldings\.asset_identifier"):
        Asset.delete(Asset.get(unique_identifier="a"))
    AccountHoldingsSet.delete(head)  # the snapshot goes with its rows
    Account.delete(two.accounts[0])
    Asset.delete(Asset.get(unique_identifier="a"))


def test_what_a_target_names_stays(two: Two, started: Engine) -> None:
    head = PositionSet.create(account_target_allocation_uid=two.allocations[0].uid, position_set_time=NOON)
    with started.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO msm__target_positions (position_set_uid, time_index, target_type, target_uid, portfolio_uid, "
            "weight_notional_exposure) VALUES (%s, %s, 'portfolio', %s, %s, 1)",
            (head.uid, NOON, two.portfolio.uid, two.portfolio.uid),
        )
    with pytest.raises(InvalidRow, match=r"still referenced by TargetPositions\.portfolio_uid"):
        Portfolio.delete(two.portfolio)
    AccountTargetAllocation.delete(two.allocations[0])  # with its snapshots and their rows
    Portfolio.delete(two.portfolio)
    assert PositionSet.count() == 0


def test_a_fund_follows_an_allocation_of_its_own_account(two: Two) -> None:
    with pytest.raises(InvalidRow, match="account_target_allocation_uid, account_uid names no AccountTargetAllocation"):
        fund(two, account_target_allocation_uid=two.allocations[1].uid)
    made = fund(two, account_target_allocation_uid=two.allocations[0].uid)
    with pytest.raises(InvalidRow, match="account_target_allocation_uid, account_uid names no AccountTargetAllocation"):
        VirtualFund.update(made, account_target_allocation_uid=two.allocations[1].uid)
    with pytest.raises(InvalidRow, match=r"still referenced by VirtualFund\.account_target_allocation_uid"):
        AccountTargetAllocation.delete(two.allocations[0])
    VirtualFund.update(made, account_target_allocation_uid=None)
    AccountTargetAllocation.delete(two.allocations[0])


def test_a_fund_goes_with_its_portfolio(two: Two, started: Engine) -> None:
    head = _hold(started, two.accounts[0])
    view = {"virtual_fund_uid": fund(two).uid, "source_account_holdings_set_uid": head.uid}
    VirtualFundHoldingsSet.create_many([{**view, "account_uid": two.accounts[0].uid, "time_index": NOON}])
    Portfolio.delete(two.portfolio)
    assert (VirtualFund.count(), VirtualFundHoldingsSet.count(), AccountHoldingsSet.count()) == (0, 0, 1)


def test_a_view_is_of_a_snapshot_of_the_funds_own_account_at_its_time(two: Two) -> None:
    mine, yours = AccountHoldingsSet.create_many({"account_uid": a.uid, "time_index": NOON} for a in two.accounts)
    uid = fund(two).uid
    for head, account, time in (
        (mine, two.accounts[1].uid, NOON),
        (yours, two.accounts[0].uid, NOON),
        (yours, two.accounts[1].uid, NOON),
        (mine, two.accounts[0].uid, NOON + timedelta(microseconds=1)),
    ):
        with pytest.raises(InvalidRow, match=r"names no (VirtualFund|AccountHoldingsSet) row"):
            VirtualFundHoldingsSet.create(
                virtual_fund_uid=uid, source_account_holdings_set_uid=head.uid, account_uid=account, time_index=time
            )
    assert VirtualFundHoldingsSet.count() == 0
    VirtualFundHoldingsSet.create(
        virtual_fund_uid=uid, source_account_holdings_set_uid=mine.uid, account_uid=two.accounts[0].uid, time_index=NOON
    )
    with pytest.raises(InvalidRow, match=r"still referenced by VirtualFundHoldingsSet\.source_account_holdings_set_uid"):
        AccountHoldingsSet.delete(mine)
    VirtualFund.delete(uid)
    AccountHoldingsSet.delete(mine)
