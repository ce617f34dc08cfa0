"""Accounts, their allocations, and the heads of their snapshots. The rows of snapshots are replaced whole: `msm_core.services`."""

import uuid

from msm_core.api.base import Row
from msm_core.api.fields import Instant, Json
from msm_core.models import (
    AccountAllocationModelTable,
    AccountGroupTable,
    AccountHoldingsSetTable,
    AccountTable,
    AccountTargetAllocationTable,
    PositionSetTable,
    VirtualFundHoldingsSetTable,
    VirtualFundTable,
)


class AccountGroup(Row, table=AccountGroupTable, key=("group_name",)):
    group_name: str
    group_description: str | None = None
    metadata_json: Json | None = None


class Account(Row, table=AccountTable, key=("unique_identifier",)):
    """A custody account. `holdings_data_node_uid` is the progress row of what produces its holdings, if a node does."""

    unique_identifier: str
    account_name: str
    is_paper: bool = True
    account_is_active: bool = False
    account_group_uid: uuid.UUID | None = None
    holdings_data_node_uid: uuid.UUID | None = None
    metadata_json: Json | None = None


class AccountAllocationModel(Row, table=AccountAllocationModelTable, key=("allocation_model_name",)):
    allocation_model_name: str
    allocation_model_description: str | None = None
    metadata_json: Json | None = None


class AccountTargetAllocation(Row, table=AccountTargetAllocationTable, key=("unique_identifier",)):
    """One mandate of an account under a model; `is_active`: its newest position set is what the account should hold."""

    unique_identifier: str
    account_uid: uuid.UUID
    account_allocation_model_uid: uuid.UUID
    display_name: str | None = None
    is_active: bool = True
    source: str | None = None
    metadata_json: Json | None = None


class PositionSet(Row, table=PositionSetTable, key=("account_target_allocation_uid", "position_set_time")):
    """The head of a snapshot of target positions, in force from `position_set_time` on."""

    account_target_allocation_uid: uuid.UUID
    position_set_time: Instant
    source: str | None = None
    metadata_json: Json | None = None


class AccountHoldingsSet(Row, table=AccountHoldingsSetTable, key=("account_uid", "time_index")):
    """The head of a snapshot of holdings."""

    account_uid: uuid.UUID
    time_index: Instant
    source_data_node_uid: uuid.UUID | None = None


class VirtualFund(Row, table=VirtualFundTable, key=("unique_identifier",)):
    """An allocation view of an account that follows a portfolio; no asset, and never among the account's holdings.

    account_target_allocation_uid  the allocation of the same account that asks for it, if any
    """

    unique_identifier: str
    account_uid: uuid.UUID
    target_portfolio_uid: uuid.UUID
    account_target_allocation_uid: uuid.UUID | None = None


class VirtualFundHoldingsSet(Row, table=VirtualFundHoldingsSetTable, key=("virtual_fund_uid", "source_account_holdings_set_uid")):
    """The head of what one fund has of one holdings snapshot; account and time are that snapshot's."""

    virtual_fund_uid: uuid.UUID
    source_account_holdings_set_uid: uuid.UUID
    account_uid: uuid.UUID
    time_index: Instant
