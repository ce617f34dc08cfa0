"""Holdings of an account, attributed to its virtual funds: `allocate_from_account_holdings_set`, or plan first and apply later.

A virtual fund is a view: it is no asset, and nothing here writes holdings. All funds together never have more of a snapshot than it holds,
per asset and direction. Who attributes holds the lock of the snapshot's row, and the database sums what is stored before it is kept.
Everything here takes a row, its uid or its business key, raises EngineNotStarted before `start_engine`, RowNotFound for a snapshot that
there is not, and AllocationRefused, with every problem, for what cannot be attributed; then nothing is written.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import numpy as np
import pandas as pd
from psycopg import sql
from sqlalchemy import Connection, RowMapping, text
from sqlalchemy.exc import IntegrityError

from msm_core.api.accounts import AccountHoldingsSet, VirtualFundHoldingsSet
from msm_core.api.base import Row
from msm_core.api.checks import check_text, refusals, shown
from msm_core.api.runtime import one_transaction
from msm_core.database import sqlstate
from msm_core.errors import NaiveTimestamp, UnresolvedPortfolios
from msm_core.models import MetaTable, PortfolioTable
from msm_core.models.accounts import (
    AccountHoldingsSetTable,
    AccountHoldingsStorage,
    AccountTable,
    VirtualFundHoldingsSetTable,
    VirtualFundHoldingsStorage,
    VirtualFundTable,
)
from msm_core.services import allocation
from msm_core.services.allocation import Problem, Strategy, refused

Named = Row | UUID | str  # a row, its uid or its unique_identifier
Demands = pd.DataFrame | Iterable[Mapping[str, Any]]
PriceResolver = Callable[[Sequence[UUID]], pd.DataFrame]
"""Weights and prices of portfolios: rows portfolio_uid, asset_uid, asset_identifier, weight, price."""

TABLES: dict[str, type[MetaTable]] = {
    "account": AccountTable,
    "holdings_set": AccountHoldingsSetTable,
    "holdings": AccountHoldingsStorage,
    "fund": VirtualFundTable,
    "fund_set": VirtualFundHoldingsSetTable,
    "fund_holdings": VirtualFundHoldingsStorage,
    "portfolio": PortfolioTable,
}
FOREIGN_KEY_VIOLATION = "23503"
ALLOCATION_COLUMNS = ["virtual_fund", "virtual_fund_uid", *allocation.ALLOCATION_COLUMNS[1:]]


def _sql(statement: str) -> str:
    names = {name: sql.Identifier(model.__tablename__).as_string() for name, model in TABLES.items()}
    return statement.format(**names)


EXPOSURE = _sql("""
    -- What each virtual fund has by its newest allocation at or before :as_of. The three conditions at the end only select; leave them out
    -- to see every fund. Account and portfolio are joined for their names alone.
    SELECT a.unique_identifier AS account, f.unique_identifier AS virtual_fund, p.unique_identifier AS target_portfolio, s.time_index,
           v.asset_identifier, v.allocated_quantity * v.direction AS quantity, v.allocation_strategy
    FROM (
        SELECT DISTINCT ON (virtual_fund_uid) uid, virtual_fund_uid, time_index FROM {fund_set}
        WHERE time_index <= coalesce(CAST(:as_of AS timestamptz), 'infinity')
        ORDER BY virtual_fund_uid, time_index DESC
    ) s
    JOIN {fund} f ON f.uid = s.virtual_fund_uid
    JOIN {fund_holdings} v ON v.virtual_fund_holdings_set_uid = s.uid
    JOIN {account} a ON a.uid = f.account_uid
    JOIN {portfolio} p ON p.uid = f.target_portfolio_uid
    WHERE (CAST(:accounts AS text[]) IS NULL OR a.unique_identifier = ANY (:accounts) OR a.uid = ANY (CAST(:account_uids AS uuid[])))
      AND (CAST(:funds AS text[]) IS NULL OR f.unique_identifier = ANY (:funds) OR f.uid = ANY (CAST(:fund_uids AS uuid[])))
    ORDER BY f.unique_identifier, v.asset_identifier
""")

_FUNDS = _sql("""
    SELECT f.uid, f.unique_identifier, f.account_uid, f.target_portfolio_uid, p.unique_identifier AS portfolio,
           s.uid IS NOT NULL AS allocated
    FROM {fund} f JOIN {portfolio} p ON p.uid = f.target_portfolio_uid
    LEFT JOIN {fund_set} s ON s.virtual_fund_uid = f.uid AND s.source_account_holdings_set_uid = :holdings_set
    WHERE f.uid = ANY (CAST(:uids AS uuid[])) OR f.unique_identifier = ANY (CAST(:names AS text[]))
    ORDER BY f.unique_identifier
""")

# Sums are of the decimals that quantities print as: a cast of float8 to numeric would keep 15 digits only (see services/allocation.py).
_CAPACITY = _sql("""
    SELECT h.asset_identifier, h.direction, h.quantity AS held_quantity,
           coalesce(sum(v.allocated_quantity::text::numeric), 0) AS allocated_elsewhere
    FROM {holdings} h LEFT JOIN {fund_holdings} v
        ON v.source_account_holdings_set_uid = h.holdings_set_uid AND v.asset_identifier = h.asset_identifier
        AND v.direction = h.direction AND v.virtual_fund_uid <> ALL (CAST(:funds AS uuid[]))
    WHERE h.holdings_set_uid = :holdings_set
    GROUP BY h.asset_identifier, h.direction, h.quantity
""")

_EXCESS = _sql("""
    SELECT v.asset_identifier, v.direction, sum(v.allocated_quantity::text::numeric) AS attributed,
           coalesce(h.quantity::text::numeric, 0) AS held
    FROM {fund_holdings} v LEFT JOIN {holdings} h
        ON h.holdings_set_uid = v.source_account_holdings_set_uid AND h.asset_identifier = v.asset_identifier AND h.direction = v.direction
    WHERE v.source_account_holdings_set_uid = :holdings_set
    GROUP BY v.asset_identifier, v.direction, h.quantity
    HAVING sum(v.allocated_quantity::text::numeric) > coalesce(h.quantity::text::numeric, 0)
    ORDER BY v.asset_identifier, v.direction
""")

_ATTRIBUTE = _sql("""
    INSERT INTO {fund_holdings} (virtual_fund_uid, time_index, asset_identifier, virtual_fund_holdings_set_uid,
                                 source_account_holdings_set_uid, allocated_quantity, direction, allocation_strategy)
    SELECT s.virtual_fund_uid, s.time_index, g.asset, s.uid, s.source_account_holdings_set_uid, g.quantity, g.direction, :strategy
    FROM unnest(CAST(:funds AS uuid[]), CAST(:assets AS text[]), CAST(:quantities AS float8[]), CAST(:directions AS smallint[]))
        g (fund, asset, quantity, direction)
    JOIN {fund_set} s ON s.virtual_fund_uid = g.fund AND s.source_account_holdings_set_uid = :holdings_set
""")

_LOCK = _sql("SELECT FROM {holdings_set} WHERE uid = :uid FOR UPDATE")
_OF_THESE = "source_account_holdings_set_uid = :holdings_set AND (CAST(:funds AS uuid[]) IS NULL OR virtual_fund_uid = ANY (:funds))"
_RELEASE_ROWS = _sql(f"DELETE FROM {{fund_holdings}} WHERE {_OF_THESE}")  # noqa: S608 - names of ours, values are parameters
_RELEASE_SETS = _sql(f"DELETE FROM {{fund_set}} WHERE {_OF_THESE}")  # noqa: S608


@dataclass(frozen=True, eq=False)
class AllocationPlan:
    """Who would get what of one holdings snapshot. Quantities are above 0, allocated ones may be 0; direction has the sign.

    virtual_fund_uids  the funds that it gives a view of the snapshot, by unique_identifier; also those that get nothing
    allocations        virtual_fund, virtual_fund_uid, asset_identifier, direction, requested_quantity, allocated_quantity
    residual           asset_identifier, direction, held_quantity, allocated_elsewhere (by funds that are not of this plan),
                       allocated_quantity, residual_quantity; every held asset is a row
    """

    holdings_set: AccountHoldingsSet
    strategy: Strategy
    overwrite: bool
    virtual_fund_uids: tuple[UUID, ...]
    allocations: pd.DataFrame
    residual: pd.DataFrame


# -- allocating ---------------------------------------------------------------------------------------------------------------------


def allocate_from_account_holdings_set(
    holdings_set: AccountHoldingsSet | UUID,
    demands: Demands,
    strategy: Strategy = "explicit",
    *,
    dry_run: bool = False,
    overwrite: bool = False,
) -> AllocationPlan:
    """`plan_allocation` and, unless `dry_run`, `apply_allocation` under one lock: who comes second shares what the first has left."""
    if dry_run:
        return plan_allocation(holdings_set, demands, strategy, overwrite=overwrite)
    with one_transaction(*TABLES.values()) as connection:
        _lock(connection, _uid(holdings_set))
        plan = plan_allocation(holdings_set, demands, strategy, overwrite=overwrite)
        _store(connection, plan)
        return plan


def plan_allocation(
    holdings_set: AccountHoldingsSet | UUID, demands: Demands, strategy: Strategy = "explicit", *, overwrite: bool = False
) -> AllocationPlan:
    """What each fund would get of the snapshot. Reads only.

    demands    virtual_fund (row, uid or unique_identifier), asset_identifier, quantity in units: negative is short, 0 asks for nothing
    strategy   explicit and strict_feasible: the quantities as given, or, where any is more than is free, none; they differ in what is
               stored: decided by hand, or by a planner. proportional_attribution: per asset and direction the same fraction for all
    overwrite  replaces what these funds have of the snapshot, all of it, and that counts as free; else they must not have anything

    What other funds have of the snapshot is not free.
    """
    frame = demands if isinstance(demands, pd.DataFrame) else pd.DataFrame(list(demands))
    with one_transaction(*TABLES.values()) as connection:
        _print_exactly(connection)
        head = AccountHoldingsSet.get(uid=_uid(holdings_set))
        given = [_name(fund) for fund in frame.get("virtual_fund", ())]
        funds = _funds(connection, given, head.uid)
        uids = tuple(row["uid"] for row in funds)
        capacity = connection.execute(text(_CAPACITY), {"holdings_set": head.uid, "funds": list(uids)}).mappings().all()
    by_name = _by_name(funds)
    if given:
        frame = frame.assign(virtual_fund=[by_name[name]["unique_identifier"] if name in by_name else shown(name) for name in given])
    columns = allocation.RESIDUAL_COLUMNS[:4]
    attribution = allocation.plan(
        pd.DataFrame([dict(row) for row in capacity], columns=columns), frame, strategy, found=_fund_problems(given, funds, head, overwrite)
    )
    uid_of = {row["unique_identifier"]: row["uid"] for row in funds}
    allocations = attribution.allocations.assign(virtual_fund_uid=[uid_of[fund] for fund in attribution.allocations["virtual_fund"]])
    return AllocationPlan(head, strategy, overwrite, uids, allocations[ALLOCATION_COLUMNS], attribution.residual)


def apply_allocation(plan: AllocationPlan) -> list[VirtualFundHoldingsSet]:
    """Store what was planned, in one transaction with a fixed number of statements; returns the views of the funds, in the plan's order.

    With `overwrite` the funds' views keep their uid and their rows are replaced. Refused where the plan is no longer possible: somebody
    has attributed or changed the holdings since, or, without `overwrite`, a fund has a view of the snapshot by now.
    """
    with one_transaction(*TABLES.values()) as connection:
        head = _lock(connection, plan.holdings_set.uid)
        given = list(plan.virtual_fund_uids)
        if problems := _fund_problems(given, _funds(connection, given, head.uid), head, plan.overwrite):
            raise refused("attribution of holdings", problems)
        return _store(connection, plan)


def release_allocations(holdings_set: AccountHoldingsSet | UUID, virtual_funds: Iterable[Named] | Named | None = None) -> int:
    """Give back what these funds, or all, have of the snapshot, with their views of it. Returns the rows of holdings removed."""
    with one_transaction(*TABLES.values()) as connection:
        head = _lock(connection, _uid(holdings_set))
        uids = None
        if virtual_funds is not None:
            given = _names(virtual_funds)
            funds = _funds(connection, given, head.uid)
            if problems := _fund_problems(given, funds, head, overwrite=True):
                raise refused("release of holdings", problems)
            uids = [row["uid"] for row in funds]
        removed = connection.execute(text(_RELEASE_ROWS), {"holdings_set": head.uid, "funds": uids}).rowcount
        connection.execute(text(_RELEASE_SETS), {"holdings_set": head.uid, "funds": uids})
        return removed


# -- demands and exposure -----------------------------------------------------------------------------------------------------------


def demands_of_portfolios(notionals: Mapping[Any, float], resolver: PriceResolver) -> pd.DataFrame:
    """What funds need to hold their target portfolios, as demands: virtual_fund, asset_identifier, quantity = notional * weight / price.

    notionals  money of each fund, named by row, uid or unique_identifier, in the currency of the prices
    resolver   asked once for the portfolios of all funds; a weight of 0 is dropped, and its price does not matter

    Raises UnresolvedPortfolios for portfolios of which it knows no row.
    """
    money = {_name(fund): float(notional) for fund, notional in notionals.items()}
    with one_transaction(VirtualFundTable, VirtualFundHoldingsSetTable, PortfolioTable) as connection:
        funds = _funds(connection, list(money), None)
    by_name = _by_name(funds)
    if problems := _unknown(money, by_name):
        raise refused("demands of portfolios", problems)
    if not funds:
        return pd.DataFrame(columns=allocation.DEMAND_COLUMNS)
    held = resolver(list(dict.fromkeys(row["target_portfolio_uid"] for row in funds)))
    known = set(held.get("portfolio_uid", ()))
    if unknown := sorted({row["portfolio"] for row in funds if row["target_portfolio_uid"] not in known}):
        raise UnresolvedPortfolios(portfolios=", ".join(unknown))
    wanted = [(by_name[fund]["unique_identifier"], by_name[fund]["target_portfolio_uid"], notional) for fund, notional in money.items()]
    return allocation.demands(pd.DataFrame(wanted, columns=["virtual_fund", "portfolio_uid", "notional"]), held)


def virtual_fund_exposure(
    *, accounts: Iterable[Named] | Named | None = None, virtual_funds: Iterable[Named] | Named | None = None, as_of: datetime | None = None
) -> pd.DataFrame:
    """What funds have, by the newest view of each at or before `as_of`: the statement EXPOSURE, whole, without a limit.

    Columns: account, virtual_fund, target_portfolio (unique_identifiers), time_index (UTC), asset_identifier, quantity (units; negative is
    short), allocation_strategy; ordered by virtual_fund and asset_identifier. Unknown names select nothing. Raises NaiveTimestamp.
    """
    if as_of is not None and as_of.tzinfo is None:
        raise NaiveTimestamp(what="as_of", value=as_of.isoformat())
    selected = {**_selection("account", accounts), **_selection("fund", virtual_funds)}
    with one_transaction(*TABLES.values()) as connection:
        result = connection.execute(text(EXPOSURE), {"as_of": as_of, **selected})
        frame = pd.DataFrame([tuple(row) for row in result], columns=list(result.keys()))
    times = pd.to_datetime(frame["time_index"], utc=True).astype("datetime64[us, UTC]")
    return frame.assign(time_index=times, quantity=frame["quantity"].astype(np.float64))


# -- pieces -------------------------------------------------------------------------------------------------------------------------


def _lock(connection: Connection, uid: UUID) -> AccountHoldingsSet:
    """The snapshot's row, ours until the transaction ends. What is read after it is newer than what others did before they let it go:
    that needs READ COMMITTED, whatever a server's default is."""
    connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
    _print_exactly(connection)
    connection.execute(text(_LOCK), {"uid": uid})
    return AccountHoldingsSet.get(uid=uid)


def _store(connection: Connection, plan: AllocationPlan) -> list[VirtualFundHoldingsSet]:
    """Under the lock: views, their rows, and the proof that all funds together have no more than is held."""
    head, funds = plan.holdings_set, list(plan.virtual_fund_uids)
    snapshot = {"source_account_holdings_set_uid": head.uid, "account_uid": head.account_uid, "time_index": head.time_index}
    sets = VirtualFundHoldingsSet.upsert_many([{"virtual_fund_uid": fund, **snapshot} for fund in funds])
    connection.execute(text(_RELEASE_ROWS), {"holdings_set": head.uid, "funds": funds})
    with _still_held():
        connection.execute(text(_ATTRIBUTE), {"holdings_set": head.uid, "strategy": plan.strategy, **_arrays(plan.allocations)})
    if excess := connection.execute(text(_EXCESS), {"holdings_set": head.uid}).mappings().all():
        raise refused("attribution of holdings", [_excess(row) for row in excess])
    return sets


def _print_exactly(connection: Connection) -> None:
    """Floats print as their shortest exact text, whatever a server's default is: what is summed hangs on it."""
    connection.exec_driver_sql("SET LOCAL extra_float_digits = 1")


def _funds(connection: Connection, given: Sequence[UUID | str], holdings_set: UUID | None) -> Sequence[RowMapping]:
    """The funds that there are of `given`, by unique_identifier, and whether they have a view of the snapshot."""
    split = {"uids": [name for name in given if isinstance(name, UUID)], "names": [name for name in given if isinstance(name, str)]}
    return connection.execute(text(_FUNDS), {"holdings_set": holdings_set, **split}).mappings().all()


def _by_name(funds: Iterable[RowMapping]) -> dict[UUID | str, RowMapping]:
    return {name: row for row in funds for name in (row["uid"], row["unique_identifier"])}


def _unknown(given: Iterable[UUID | str], known: Mapping[UUID | str, RowMapping]) -> list[Problem]:
    names = [name for name in dict.fromkeys(given) if name not in known]
    return [{"virtual_fund": str(name), "reason": f"there is no virtual fund {shown(str(name))}"} for name in names]


def _fund_problems(given: Sequence[UUID | str], funds: Sequence[RowMapping], head: AccountHoldingsSet, overwrite: bool) -> list[Problem]:
    def problem(row: RowMapping, why: str) -> Problem:
        return {"virtual_fund": row["unique_identifier"], "reason": f"virtual fund {shown(row['unique_identifier'])} {why}"}

    foreign = [problem(row, "is of another account than the snapshot") for row in funds if row["account_uid"] != head.account_uid]
    again = "has an allocation of this snapshot already; pass overwrite=True to replace it"
    return _unknown(given, _by_name(funds)) + foreign + [problem(row, again) for row in funds if row["allocated"] and not overwrite]


def _excess(row: RowMapping) -> Problem:
    asset, direction, attributed, held = row["asset_identifier"], row["direction"], row["attributed"], row["held"]
    facts = {"asset_identifier": asset, "direction": direction, "demanded": float(attributed), "free": float(held)}
    return {**facts, "reason": f"{shown(asset)} {allocation.SIDES[direction]}: all funds would have {attributed} of {held} held"}


@contextmanager
def _still_held() -> Iterator[None]:
    with refusals(VirtualFundHoldingsStorage):
        try:
            yield
        except IntegrityError as error:
            if sqlstate(error) != FOREIGN_KEY_VIOLATION:
                raise
            reason = "the snapshot no longer holds every asset of the plan, on that side; plan again"
            raise refused("attribution of holdings", [{"reason": reason}]) from None


def _arrays(allocations: pd.DataFrame) -> dict[str, list[Any]]:
    rows = allocations[allocations["allocated_quantity"] != 0]
    columns = {"funds": "virtual_fund_uid", "assets": "asset_identifier", "quantities": "allocated_quantity", "directions": "direction"}
    return {name: rows[column].tolist() for name, column in columns.items()}


def _selection(prefix: str, given: Iterable[Named] | Named | None) -> dict[str, list[Any] | None]:
    names = None if given is None else _names(given)
    texts, uids = ([n for n in names if isinstance(n, kind)] if names is not None else None for kind in (str, UUID))
    return {f"{prefix}s": texts, f"{prefix}_uids": uids}


def _names(given: Iterable[Named] | Named) -> list[UUID | str]:
    return [_name(one) for one in ([given] if isinstance(given, Row | UUID | str) else given)]


def _name(given: Any) -> UUID | str:
    """What names a row in a statement; what can be no name is told like a name that there is not."""
    name = given.uid if isinstance(given, Row) else given if isinstance(given, UUID) else str(given)
    check_text(VirtualFundTable, "unique_identifier", name)
    return name


def _uid(holdings_set: AccountHoldingsSet | UUID) -> UUID:
    return holdings_set.uid if isinstance(holdings_set, AccountHoldingsSet) else holdings_set
