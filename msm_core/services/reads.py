"""What is stored, as DataFrames: the newest weights, values, holdings and target positions of some owners or of all.

Each read is one statement, however many owners there are, and returns every row: nothing is cut off. The database gathers the rows of an
owner into arrays, so no row becomes an object on its way. The newest snapshot of an owner is one probe of the key of its table.

Rows come sorted by their keys, identifiers bytewise; times are UTC; NaN is where the database has null. An owner that stored nothing has
no rows here. `as_of`, `start` and `end` are instants with a time zone, and a row at that very instant is part of the answer.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
from psycopg import sql
from sqlalchemy import Connection

from msm_core.api import runtime
from msm_core.api.base import not_found
from msm_core.api.checks import check_text
from msm_core.copying import fetch
from msm_core.frames import to_datetime, utc
from msm_core.models import (
    AccountAllocationModelTable,
    AccountHoldingsSetTable,
    AccountHoldingsStorage,
    AccountTable,
    AccountTargetAllocationTable,
    AssetTable,
    MetaTable,
    PortfoliosStorage,
    PortfolioTable,
    PortfolioWeightsStorage,
    PositionSetTable,
    TargetPositionsStorage,
)

Names = Iterable[str] | str | None  # unique_identifiers; None = all there are

TEXT, TIME, NUMBER, WHOLE, UID = "str", "datetime64[us]", "float64", "int64", "object"
WEIGHTS = {
    "portfolio_identifier": TEXT,
    "time_index": TIME,
    "asset_identifier": TEXT,
    "weight": NUMBER,
    "weight_before": NUMBER,
    "price_current": NUMBER,
}
VALUES = {"portfolio_identifier": TEXT, "time_index": TIME, "close": NUMBER, "return": NUMBER, "calculated_close": NUMBER}
HOLDINGS = {
    "account": TEXT,
    "time_index": TIME,
    "asset_identifier": TEXT,
    "direction": WHOLE,
    "quantity": NUMBER,
    "holdings_set_uid": UID,
}
TARGETS = {
    "account": TEXT,
    "account_target_allocation": TEXT,
    "account_allocation_model": TEXT,
    "position_set_uid": UID,
    "time_index": TIME,
    "target_type": TEXT,
    "target_uid": UID,
    "asset_uid": UID,
    "portfolio_uid": UID,
    "target": TEXT,
    "weight_notional_exposure": NUMBER,
    "constant_notional_exposure": NUMBER,
    "single_asset_quantity": NUMBER,
}


# -- portfolios ---------------------------------------------------------------------------------------------------------------


def latest_portfolio_weights(portfolios: Names = None, *, as_of: datetime | None = None) -> pd.DataFrame:
    """The last stored vector of each portfolio, at or before `as_of`; without it, the last one that there is.

    Columns portfolio_identifier, time_index (the event), asset_identifier, weight (after the trade), weight_before, price_current. An asset
    that was sold at the event has weight 0. Raises RowNotFound naming unknown portfolios, NaiveTimestamp, EngineNotStarted.
    """
    with runtime.connection(PortfolioTable, PortfolioWeightsStorage) as connection:
        return read_latest_weights(connection, portfolios, as_of)


def read_latest_weights(connection: Connection, portfolios: Names, as_of: datetime | None) -> pd.DataFrame:
    statement = sql.SQL("""
        SELECT o.uid, o.name, r.* FROM ({owners}) o CROSS JOIN LATERAL (
            SELECT array_agg(q.time_index), array_agg(q.asset_identifier::text), array_agg(q.weight), array_agg(q.weight_before),
                   array_agg(coalesce(q.price_current, 'NaN')) FROM (
                SELECT w.* FROM {weights} w WHERE w.portfolio_identifier = o.name AND w.time_index = (
                    SELECT m.time_index FROM {weights} m WHERE m.portfolio_identifier = o.name
                        AND m.time_index <= coalesce(%(as_of)s, 'infinity'::timestamptz) ORDER BY m.time_index DESC LIMIT 1)
                ORDER BY w.asset_identifier) q) r
        ORDER BY o.name COLLATE "C"
    """).format(owners=owners_of(PortfolioTable, portfolios), weights=_name(PortfolioWeightsStorage))
    return _frame(rows_of(connection, PortfolioTable, statement, portfolios, as_of=as_of), WEIGHTS)


def portfolio_values(
    portfolios: Names = None, *, start: datetime | None = None, end: datetime | None = None, latest_only: bool = False
) -> pd.DataFrame:
    """Values of each portfolio from `start` to `end`, both included; with `latest_only` the last row of that span.

    Columns portfolio_identifier, time_index (a session close), close, return (a fraction, fees included), calculated_close.
    Raises RowNotFound naming unknown portfolios, NaiveTimestamp, EngineNotStarted.
    """
    with runtime.connection(PortfolioTable, PortfoliosStorage) as connection:
        return read_portfolio_values(connection, portfolios, start, end, latest_only)


def read_portfolio_values(
    connection: Connection, portfolios: Names, start: datetime | None, end: datetime | None, latest_only: bool = False
) -> pd.DataFrame:
    statement = sql.SQL("""
        SELECT o.uid, o.name, r.* FROM ({owners}) o CROSS JOIN LATERAL (
            SELECT array_agg(q.time_index), array_agg(q.close), array_agg(q.return), array_agg(q.calculated_close) FROM (
                SELECT v.time_index, v.close, v.return, v.calculated_close FROM {values} v WHERE v.portfolio_identifier = o.name
                    AND v.time_index BETWEEN coalesce(%(start)s, '-infinity'::timestamptz) AND coalesce(%(end)s, 'infinity'::timestamptz)
                ORDER BY v.time_index {newest}) q) r
        ORDER BY o.name COLLATE "C"
    """).format(
        owners=owners_of(PortfolioTable, portfolios),
        values=_name(PortfoliosStorage),
        newest=sql.SQL("DESC LIMIT 1" if latest_only else ""),
    )
    return _frame(rows_of(connection, PortfolioTable, statement, portfolios, start=start, end=end), VALUES)


# -- accounts -----------------------------------------------------------------------------------------------------------------


def account_holdings(accounts: Names = None, *, as_of: datetime | None = None) -> pd.DataFrame:
    """The newest snapshot of what each account holds, at or before `as_of`. An account whose newest snapshot is empty has no rows.

    Columns account, time_index, asset_identifier, direction (1 or -1), quantity (signed: below 0 is short), holdings_set_uid.
    Raises RowNotFound naming unknown accounts, NaiveTimestamp, EngineNotStarted.
    """
    with runtime.connection(AccountTable, AccountHoldingsSetTable, AccountHoldingsStorage) as connection:
        return read_holdings(connection, accounts, as_of)


def read_holdings(connection: Connection, accounts: Names, as_of: datetime | None) -> pd.DataFrame:
    statement = sql.SQL("""
        SELECT o.uid, o.name, r.times, r.assets, r.directions, r.quantities, s.uid FROM ({owners}) o
        LEFT JOIN LATERAL (
            SELECT h.uid, h.time_index FROM {sets} h WHERE h.account_uid = o.uid
                AND h.time_index <= coalesce(%(as_of)s, 'infinity'::timestamptz) ORDER BY h.time_index DESC LIMIT 1) s ON true
        CROSS JOIN LATERAL (
            SELECT array_agg(q.time_index), array_agg(q.asset_identifier::text), array_agg(q.direction),
                   array_agg(q.quantity * q.direction) FROM (
                SELECT h.* FROM {holdings} h WHERE h.account_uid = o.uid AND h.time_index = s.time_index
                ORDER BY h.asset_identifier) q) r(times, assets, directions, quantities)
        ORDER BY o.name COLLATE "C"
    """).format(owners=owners_of(AccountTable, accounts), sets=_name(AccountHoldingsSetTable), holdings=_name(AccountHoldingsStorage))
    return _frame(rows_of(connection, AccountTable, statement, accounts, as_of=as_of), HOLDINGS)


def account_targets(accounts: Names = None, *, as_of: datetime | None = None) -> pd.DataFrame:
    """The target positions in force: of every active allocation its newest position set, at or before `as_of`.

    Without `as_of` that is the newest set that there is, also one that is still to come into force. An allocation whose newest set is empty
    has no rows. Whether an allocation is active is what its row says now.

    Columns account, account_target_allocation, account_allocation_model (their names), position_set_uid, time_index, target_type,
    target_uid, asset_uid and portfolio_uid (one of these two is None), target (unique_identifier of either), and the three exposures, of
    which one is set: weight_notional_exposure, constant_notional_exposure, single_asset_quantity. Sorted by account, allocation,
    target_type and target.
    Raises RowNotFound naming unknown accounts, NaiveTimestamp, EngineNotStarted.
    """
    allocations = (AccountTable, AccountTargetAllocationTable, AccountAllocationModelTable, PositionSetTable)
    with runtime.connection(*allocations, TargetPositionsStorage, AssetTable, PortfolioTable) as connection:
        return read_targets(connection, accounts, as_of)


def read_targets(connection: Connection, accounts: Names, as_of: datetime | None) -> pd.DataFrame:
    statement = sql.SQL("""
        SELECT o.uid, o.name, a.unique_identifier::text, m.allocation_model_name::text, s.uid,
               r.times, r.types, r.uids, r.targets, r.weights, r.amounts, r.quantities
        FROM ({owners}) o
        LEFT JOIN {allocations} a ON a.account_uid = o.uid AND a.is_active
        LEFT JOIN {models} m ON m.uid = a.account_allocation_model_uid
        LEFT JOIN LATERAL (
            SELECT p.uid, p.position_set_time FROM {sets} p WHERE p.account_target_allocation_uid = a.uid
                AND p.position_set_time <= coalesce(%(as_of)s, 'infinity'::timestamptz) ORDER BY p.position_set_time DESC LIMIT 1
        ) s ON true
        CROSS JOIN LATERAL (
            SELECT array_agg(q.time_index), array_agg(q.target_type::text), array_agg(q.target_uid), array_agg(q.target::text),
                   array_agg(coalesce(q.weight_notional_exposure, 'NaN')), array_agg(coalesce(q.constant_notional_exposure, 'NaN')),
                   array_agg(coalesce(q.single_asset_quantity, 'NaN')) FROM (
                SELECT t.*, coalesce(x.unique_identifier, y.unique_identifier) AS target FROM {targets} t
                LEFT JOIN {assets} x ON x.uid = t.asset_uid LEFT JOIN {portfolios} y ON y.uid = t.portfolio_uid
                WHERE t.position_set_uid = s.uid AND t.time_index = s.position_set_time
                ORDER BY t.target_type COLLATE "C", target) q) r(times, types, uids, targets, weights, amounts, quantities)
        ORDER BY o.name COLLATE "C", a.unique_identifier
    """).format(
        owners=owners_of(AccountTable, accounts),
        allocations=_name(AccountTargetAllocationTable),
        models=_name(AccountAllocationModelTable),
        sets=_name(PositionSetTable),
        targets=_name(TargetPositionsStorage),
        assets=_name(AssetTable),
        portfolios=_name(PortfolioTable),
    )
    found = rows_of(connection, AccountTable, statement, accounts, as_of=as_of)
    targets = _frame(found, {name: kind for name, kind in TARGETS.items() if name not in ("asset_uid", "portfolio_uid")})
    for kind in ("asset", "portfolio"):  # one uid is read, not three: making them is most of the time
        targets[f"{kind}_uid"] = targets["target_uid"].where(targets["target_type"] == kind, None)
    return targets[list(TARGETS)]


# -- statements ---------------------------------------------------------------------------------------------------------------


def owners_of(model: type[MetaTable], names: Names) -> sql.Composed:
    """(uid, name) of all rows of a registry, or of those asked for; the uid is null where there is no such row."""
    statement = "SELECT t.uid, t.unique_identifier AS name FROM {table} t"
    if names is not None:
        statement = "SELECT t.uid, n.name FROM unnest(%(names)s::text[]) n(name) LEFT JOIN {table} t ON t.unique_identifier = n.name"
    return sql.SQL(statement).format(table=_name(model))


def rows_of(
    connection: Connection, model: type[MetaTable], statement: sql.Composed, names: Names, **instants: datetime | None
) -> list[tuple[Any, ...]]:
    """Rows of a statement about owners, without the uid that comes first. Raises RowNotFound, NaiveTimestamp."""
    asked = sorted({names} if isinstance(names, str) else set(names or ()))
    for name in asked:
        check_text(model, "unique_identifier", name)
    bounds = {what: None if time is None else to_datetime(utc(time, what)) for what, time in instants.items()}
    found = fetch(connection, statement, {"names": asked, **bounds})
    if unknown := [(name,) for uid, name, *_ in found if uid is None]:
        raise not_found(model, ("unique_identifier",), unknown)
    return [row[1:] for row in found]


def _name(model: type[MetaTable]) -> sql.Identifier:
    return sql.Identifier(model.__tablename__)


# -- frames -------------------------------------------------------------------------------------------------------------------


def _frame(found: Sequence[tuple[Any, ...]], columns: Mapping[str, str]) -> pd.DataFrame:
    """One row per element of the arrays: what is no array belongs to each of them, and where arrays are null there is no row."""
    place = list(columns).index("time_index")
    groups = [row for row in found if row[place] is not None]
    counts = np.array([len(row[place]) for row in groups], int)
    parts = zip(*groups, strict=True) if groups else ((),) * len(columns)
    return pd.DataFrame({name: _column(p, counts, kind) for (name, kind), p in zip(columns.items(), parts, strict=True)})


def _column(parts: Sequence[Any], counts: np.ndarray, kind: str) -> pd.Series:
    if parts and isinstance(parts[0], np.ndarray):
        values = np.concatenate(parts)
    elif parts and isinstance(parts[0], list):
        values = np.fromiter(chain.from_iterable(parts), object if kind in (TEXT, UID) else kind, counts.sum())
    else:
        values = np.repeat(np.array(parts, object), counts)
    series = pd.Series(values, dtype=kind)
    return series.dt.tz_localize("UTC") if kind == TIME else series
