"""What accounts should hold, asset by asset: the target positions in force, expanded through what their portfolios hold now."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import pandas as pd
from psycopg import sql
from sqlalchemy import Connection

from msm_core.data_nodes.base import failure_facts
from msm_core.errors import MsmError
from msm_core.models import AccountTable, AccountTargetAllocationTable, PositionSetTable
from msm_core.models.accounts import EXPOSURES
from msm_core.services.current_weights import CurrentWeights
from msm_core.services.expansion import expand_portfolio_target_positions
from msm_core.services.reads import owners_of, read_targets, rows_of

OWNER = ("account", "account_target_allocation", "time_index")
ASSET = ("asset_identifier", "asset_uid", *EXPOSURES)
ORIGIN = ("source_target_type", "source_target", "portfolio_identifier", "portfolio_weight")


@dataclass(frozen=True)
class AccountExposure:
    """exposure: rows of OWNER, ASSET and, unless netted, ORIGIN; failures: {"reason", "message"} of the accounts that have none."""

    exposure: pd.DataFrame
    failures: Mapping[str, dict[str, str]]


def expand_account_targets(connection: Connection, accounts: Sequence[str], as_of: datetime, net: bool = False) -> AccountExposure:
    """Of the newest position set, at or before `as_of`, of every active allocation of `accounts`; weights are those of CurrentWeights.

    Statements: a fixed number, whatever the number of accounts, targets and portfolios (see CurrentWeights). An account whose targets
    cannot be expanded is a failure of its own; one that wants nothing has no rows. Raises RowNotFound naming unknown accounts.

    ORIGIN tells where exposure comes from: the target, the portfolio that holds the asset, and its weight in the target.
    """
    targets = read_targets(connection, accounts, as_of)
    resolver = CurrentWeights(as_of, connection)
    identifiers = dict(zip(targets["target_uid"], targets["target"], strict=True))
    if net:
        targets = targets[[*OWNER, "target_type", "asset_uid", "portfolio_uid", *EXPOSURES]]
    found, failures = _expanded(targets, resolver, net)
    names = {**identifiers, **resolver.identifiers()}
    found["asset_identifier"] = found["asset_uid"].map(names)
    if not net:
        found = found.rename(columns={"target": "source_target"})
        found["portfolio_identifier"] = found["portfolio_uid"].map(names)
    return AccountExposure(found[[*OWNER, *ASSET, *(() if net else ORIGIN)]], failures)


def _expanded(targets: pd.DataFrame, resolver: CurrentWeights, net: bool) -> tuple[pd.DataFrame, dict[str, dict[str, str]]]:
    """All at once; where that fails, account by account, with what is read already."""
    try:
        return expand_portfolio_target_positions(targets, resolver, net=net), {}
    except MsmError:
        found, failures = [expand_portfolio_target_positions(targets[:0], net=net)], dict[str, dict[str, str]]()
    for account, rows in targets.groupby("account", sort=False):
        try:
            found.append(expand_portfolio_target_positions(rows, resolver, net=net))
        except MsmError as error:
            failures[str(account)] = failure_facts(error)
    return pd.concat([frame for frame in found if len(frame)] or found, ignore_index=True), failures


def accounts_with_targets(connection: Connection, accounts: Sequence[str] | None, as_of: datetime) -> list[str]:
    """Accounts, of those given or of all, with an active allocation that has a position set at or before `as_of`; bytewise order.

    Raises RowNotFound naming unknown accounts.
    """
    statement = sql.SQL("""
        SELECT o.uid, o.name, EXISTS (
            SELECT FROM {allocation} a JOIN {set} s ON s.account_target_allocation_uid = a.uid
            WHERE a.account_uid = o.uid AND a.is_active AND s.position_set_time <= %(as_of)s)
        FROM ({owners}) o ORDER BY o.name COLLATE "C"
    """).format(
        owners=owners_of(AccountTable, accounts),
        allocation=sql.Identifier(AccountTargetAllocationTable.__tablename__),
        set=sql.Identifier(PositionSetTable.__tablename__),
    )
    return [name for name, wants in rows_of(connection, AccountTable, statement, accounts, as_of=as_of) if wants]
