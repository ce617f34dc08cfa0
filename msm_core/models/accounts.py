"""Accounts: what they should hold, what they do hold, and the views that attribute holdings to portfolios.

Portfolio construction never comes here. Snapshots have some thousand rows a day, so their storages keep real foreign keys and checks;
keys over several columns hold a row to the very time and account of the snapshot that it belongs to.
"""

import uuid
from datetime import datetime
from typing import Any

from sqlalchemy import (
    Boolean,
    CheckConstraint,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    SmallInteger,
    String,
    Text,
    UniqueConstraint,
    Uuid,
    false,
    true,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, MappedColumn

from msm_core.models.assets import AssetTable
from msm_core.models.base import Identifier, RegistryTable, StorageTable, column, instant, metadata_json
from msm_core.models.operations import DataNodeUpdateTable
from msm_core.models.portfolios import PortfolioTable
from msm_core.models.storages import FINITE, POSITIVE


def _reference(target: Any, comment: str, ondelete: str, **options: Any) -> MappedColumn[Any]:
    return column(Uuid, comment, ForeignKey(target, ondelete=ondelete), **options)


# -- registry -----------------------------------------------------------------------------------------------------------------


class AccountGroupTable(RegistryTable):
    __concept__ = "AccountGroup"
    group_name: Mapped[str] = column(String(100), "business key", unique=True)
    group_description: Mapped[str | None] = column(Text, "what the group gathers")
    metadata_json: Mapped[dict[str, Any] | None] = metadata_json()


class AccountTable(RegistryTable):
    """A custody account."""

    __concept__ = "Account"
    unique_identifier: Mapped[str] = column(Identifier(), "business key", unique=True)
    account_name: Mapped[str] = column(String(255), "name for people", index=True)
    is_paper: Mapped[bool] = column(Boolean, "it holds no real money", server_default=true(), default=True)
    account_is_active: Mapped[bool] = column(Boolean, "it may be traded", server_default=false(), default=False, index=True)
    account_group_uid: Mapped[uuid.UUID | None] = _reference(AccountGroupTable.uid, "the group, if any", "SET NULL", index=True)
    holdings_data_node_uid: Mapped[uuid.UUID | None] = _reference(DataNodeUpdateTable.uid, "producer of its holdings", "SET NULL")
    metadata_json: Mapped[dict[str, Any] | None] = metadata_json()


class AccountAllocationModelTable(RegistryTable):
    __concept__ = "AccountAllocationModel"
    allocation_model_name: Mapped[str] = column(String(100), "business key", unique=True)
    allocation_model_description: Mapped[str | None] = column(Text, "how accounts of the model are allocated")
    metadata_json: Mapped[dict[str, Any] | None] = metadata_json()


class AccountTargetAllocationTable(RegistryTable):
    """One mandate of an account under a model; its target positions come as position sets."""

    __concept__ = "AccountTargetAllocation"
    __table_args__ = (UniqueConstraint("uid", "account_uid"),)
    unique_identifier: Mapped[str] = column(Identifier(), "business key", unique=True)
    account_uid: Mapped[uuid.UUID] = _reference(AccountTable.uid, "the account", "CASCADE", nullable=False, index=True)
    account_allocation_model_uid: Mapped[uuid.UUID] = _reference(
        AccountAllocationModelTable.uid, "the model it follows", "RESTRICT", nullable=False, index=True
    )
    display_name: Mapped[str | None] = column(String(255), "name for people")
    is_active: Mapped[bool] = column(Boolean, "its target positions are in force", server_default=true(), default=True, index=True)
    source: Mapped[str | None] = column(String(255), "who decided it")
    metadata_json: Mapped[dict[str, Any] | None] = metadata_json()


class PositionSetTable(RegistryTable):
    """A snapshot of the target positions of one allocation."""

    __concept__ = "PositionSet"
    __table_args__ = (
        UniqueConstraint("account_target_allocation_uid", "position_set_time"),
        UniqueConstraint("uid", "position_set_time"),
    )
    account_target_allocation_uid: Mapped[uuid.UUID] = _reference(
        AccountTargetAllocationTable.uid, "the allocation", "CASCADE", nullable=False
    )
    position_set_time: Mapped[datetime] = instant("from here on these are the targets, UTC")
    source: Mapped[str | None] = column(String(255), "who decided them")
    metadata_json: Mapped[dict[str, Any] | None] = metadata_json()


class AccountHoldingsSetTable(RegistryTable):
    """A snapshot of what an account holds."""

    __concept__ = "AccountHoldingsSet"
    __table_args__ = (UniqueConstraint("account_uid", "time_index"), UniqueConstraint("uid", "account_uid", "time_index"))
    account_uid: Mapped[uuid.UUID] = _reference(AccountTable.uid, "the account", "CASCADE", nullable=False)
    time_index: Mapped[datetime] = instant("when it was so, UTC")
    source_data_node_uid: Mapped[uuid.UUID | None] = _reference(DataNodeUpdateTable.uid, "producer of the snapshot", "SET NULL")


class VirtualFundTable(RegistryTable):
    """Binds an account to a target portfolio. It is no asset and holds nothing: holdings of the account are attributed to it."""

    __concept__ = "VirtualFund"
    __table_args__ = (
        UniqueConstraint("uid", "account_uid"),
        ForeignKeyConstraint(
            ["account_target_allocation_uid", "account_uid"],
            [AccountTargetAllocationTable.uid, AccountTargetAllocationTable.account_uid],
        ),
    )
    unique_identifier: Mapped[str] = column(Identifier(), "business key", unique=True)
    account_uid: Mapped[uuid.UUID] = _reference(AccountTable.uid, "account whose holdings it views", "CASCADE", nullable=False, index=True)
    target_portfolio_uid: Mapped[uuid.UUID] = _reference(
        PortfolioTable.uid, "portfolio that it follows", "CASCADE", nullable=False, index=True
    )
    account_target_allocation_uid: Mapped[uuid.UUID | None] = column(
        Uuid, "allocation of the same account that asks for it, if any", nullable=True, index=True
    )


class VirtualFundHoldingsSetTable(RegistryTable):
    """One allocation view: what one fund has of one holdings snapshot of its own account."""

    __concept__ = "VirtualFundHoldingsSet"
    __table_args__ = (
        UniqueConstraint("virtual_fund_uid", "source_account_holdings_set_uid"),
        UniqueConstraint("uid", "virtual_fund_uid", "source_account_holdings_set_uid", "time_index"),
        ForeignKeyConstraint(["virtual_fund_uid", "account_uid"], [VirtualFundTable.uid, VirtualFundTable.account_uid], ondelete="CASCADE"),
        ForeignKeyConstraint(
            ["source_account_holdings_set_uid", "account_uid", "time_index"],
            [AccountHoldingsSetTable.uid, AccountHoldingsSetTable.account_uid, AccountHoldingsSetTable.time_index],
            ondelete="RESTRICT",
        ),
        Index(None, "source_account_holdings_set_uid"),
    )
    virtual_fund_uid: Mapped[uuid.UUID] = column(Uuid, "the fund")
    source_account_holdings_set_uid: Mapped[uuid.UUID] = column(Uuid, "the snapshot that it is a view of")
    account_uid: Mapped[uuid.UUID] = column(Uuid, "account of both")
    time_index: Mapped[datetime] = instant("time of that snapshot, UTC")


# -- snapshots ----------------------------------------------------------------------------------------------------------------

ONE_TARGET = (
    "(target_type = 'asset' AND asset_uid IS NOT NULL AND portfolio_uid IS NULL AND target_uid = asset_uid) OR "
    "(target_type = 'portfolio' AND portfolio_uid IS NOT NULL AND asset_uid IS NULL AND target_uid = portfolio_uid)"
)
EXPOSURES = ("weight_notional_exposure", "constant_notional_exposure", "single_asset_quantity")
ONE_DIRECTION = "direction IN (1, -1)"


def _exposure(comment: str) -> MappedColumn[Any]:
    return column(Float(53), comment, nullable=True)


def _direction() -> MappedColumn[Any]:
    return column(SmallInteger, "1 = long, -1 = short", server_default="1", default=1, nullable=False)


class SnapshotStorage(StorageTable):
    """Rows of snapshots: written by the services, replaced whole, and no part of any fleet."""

    __abstract__ = True


class TargetPositionsStorage(SnapshotStorage):
    """What an allocation wants: each row one asset or one portfolio, and one exposure to it. A portfolio is a mandate, never a holding."""

    __concept__ = "TargetPositions"
    __storage_kind__ = "target_positions"
    __scope__ = "position_set_uid"
    __table_args__ = (
        CheckConstraint("target_type IN ('asset', 'portfolio')", name="target_type"),
        CheckConstraint(ONE_TARGET, name="one_target"),
        CheckConstraint(f"num_nonnulls({', '.join(EXPOSURES)}) = 1", name="one_exposure"),
        CheckConstraint("target_type = 'asset' OR single_asset_quantity IS NULL", name="quantity_of_assets_only"),
        CheckConstraint(" AND ".join(FINITE.format(name) for name in EXPOSURES), name="finite"),
        ForeignKeyConstraint(
            ["position_set_uid", "time_index"], [PositionSetTable.uid, PositionSetTable.position_set_time], ondelete="CASCADE"
        ),
    )
    position_set_uid: Mapped[uuid.UUID] = column(Uuid, "the snapshot", primary_key=True)
    time_index: Mapped[datetime] = instant("its position_set_time, UTC", primary_key=True)
    target_type: Mapped[str] = column(String(32), "asset or portfolio", primary_key=True)
    target_uid: Mapped[uuid.UUID] = column(Uuid, "asset_uid or portfolio_uid, whichever it is", primary_key=True)
    asset_uid: Mapped[uuid.UUID | None] = _reference(AssetTable.uid, "the asset", "RESTRICT", index=True)
    portfolio_uid: Mapped[uuid.UUID | None] = _reference(PortfolioTable.uid, "the portfolio", "RESTRICT", index=True)
    weight_notional_exposure: Mapped[float | None] = _exposure("fraction of the account's notional; negative is short")
    constant_notional_exposure: Mapped[float | None] = _exposure("amount of money; negative is short")
    single_asset_quantity: Mapped[float | None] = _exposure("units of the asset; negative is short; never of a portfolio")
    metadata_json: Mapped[dict[str, Any] | None] = metadata_json()


class AccountHoldingsStorage(SnapshotStorage):
    """What an account holds, as its custodian sees it: assets, never virtual funds."""

    __concept__ = "AccountHoldings"
    __storage_kind__ = "account_holdings"
    __scope__ = "account_uid"
    __table_args__ = (
        CheckConstraint(ONE_DIRECTION, name="direction"),
        CheckConstraint(POSITIVE.format("quantity"), name="positive"),
        ForeignKeyConstraint(
            ["holdings_set_uid", "account_uid", "time_index"],
            [AccountHoldingsSetTable.uid, AccountHoldingsSetTable.account_uid, AccountHoldingsSetTable.time_index],
            ondelete="CASCADE",
        ),
        UniqueConstraint("holdings_set_uid", "asset_identifier", "direction"),
    )
    account_uid: Mapped[uuid.UUID] = column(Uuid, "the account", ForeignKey(AccountTable.uid, ondelete="RESTRICT"), primary_key=True)
    time_index: Mapped[datetime] = instant("when it was so, UTC", primary_key=True)
    asset_identifier: Mapped[str] = column(
        Identifier(), "Asset.unique_identifier", ForeignKey(AssetTable.unique_identifier, ondelete="RESTRICT"), primary_key=True, index=True
    )
    holdings_set_uid: Mapped[uuid.UUID] = column(Uuid, "the snapshot", nullable=False)
    quantity: Mapped[float] = column(Float(53), "units held, above 0; direction has the sign", nullable=False)
    direction: Mapped[int] = _direction()
    is_trade_snapshot: Mapped[bool | None] = column(Boolean, "taken for a trade", nullable=True)
    target_trade_time: Mapped[datetime | None] = instant("when that trade was due, UTC", nullable=True)
    extra_details: Mapped[dict[str, Any] | None] = column(JSONB, "free descriptive facts", nullable=True)


class VirtualFundHoldingsStorage(SnapshotStorage):
    """What of a holdings snapshot is attributed to a fund: exposure, not custody."""

    __concept__ = "VirtualFundHoldings"
    __storage_kind__ = "virtual_fund_holdings"
    __scope__ = "virtual_fund_uid"
    __table_args__ = (
        CheckConstraint(ONE_DIRECTION, name="direction"),
        CheckConstraint(POSITIVE.format("allocated_quantity"), name="positive"),
        ForeignKeyConstraint(
            ["virtual_fund_holdings_set_uid", "virtual_fund_uid", "source_account_holdings_set_uid", "time_index"],
            [
                VirtualFundHoldingsSetTable.uid,
                VirtualFundHoldingsSetTable.virtual_fund_uid,
                VirtualFundHoldingsSetTable.source_account_holdings_set_uid,
                VirtualFundHoldingsSetTable.time_index,
            ],
            ondelete="CASCADE",
        ),
        ForeignKeyConstraint(
            ["source_account_holdings_set_uid", "asset_identifier", "direction"],
            [AccountHoldingsStorage.holdings_set_uid, AccountHoldingsStorage.asset_identifier, AccountHoldingsStorage.direction],
            ondelete="RESTRICT",
        ),
        Index(None, "source_account_holdings_set_uid", "asset_identifier", "direction"),
    )
    virtual_fund_uid: Mapped[uuid.UUID] = column(Uuid, "the fund", ForeignKey(VirtualFundTable.uid, ondelete="CASCADE"), primary_key=True)
    time_index: Mapped[datetime] = instant("time of the source snapshot, UTC", primary_key=True)
    asset_identifier: Mapped[str] = column(
        Identifier(), "Asset.unique_identifier", ForeignKey(AssetTable.unique_identifier, ondelete="RESTRICT"), primary_key=True, index=True
    )
    virtual_fund_holdings_set_uid: Mapped[uuid.UUID] = column(Uuid, "the allocation view", nullable=False, index=True)
    source_account_holdings_set_uid: Mapped[uuid.UUID] = column(Uuid, "the snapshot that it is of", nullable=False)
    allocated_quantity: Mapped[float] = column(Float(53), "units attributed, above 0; direction has the sign", nullable=False)
    direction: Mapped[int] = _direction()
    allocation_strategy: Mapped[str] = column(
        String(64), "explicit, proportional_attribution or strict_feasible", server_default="explicit", default="explicit", nullable=False
    )
    target_trade_time: Mapped[datetime | None] = instant("when the trade that it is for is due, UTC", nullable=True)
    extra_details: Mapped[dict[str, Any] | None] = column(JSONB, "free descriptive facts", nullable=True)


SNAPSHOTS: tuple[type[SnapshotStorage], ...] = (TargetPositionsStorage, AccountHoldingsStorage, VirtualFundHoldingsStorage)
