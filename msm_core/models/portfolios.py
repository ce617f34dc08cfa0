"""Portfolios: identity, what describes them, what they are made of. Histories live in storages, never here."""

import uuid
from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, Integer, String, Text, UniqueConstraint, Uuid, func
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, MappedColumn

from msm_core.models.assets import IndexTable
from msm_core.models.base import Identifier, RegistryTable, column, instant, metadata_json
from msm_core.models.calendars import CalendarTable
from msm_core.models.operations import DataNodeUpdateTable


def _producer(comment: str) -> MappedColumn[uuid.UUID | None]:
    return column(Uuid, comment, ForeignKey(DataNodeUpdateTable.uid, ondelete="SET NULL"), nullable=True)


class PortfolioTable(RegistryTable):
    """The canonical portfolio identity row. A portfolio is not an asset."""

    __concept__ = "Portfolio"
    unique_identifier: Mapped[str] = column(Identifier(), "business key; portfolio_identifier in the storages", unique=True)
    calendar_name: Mapped[str | None] = column(Identifier(), "deprecated: use calendar_uid", index=True)
    calendar_uid: Mapped[uuid.UUID | None] = column(
        Uuid, "calendar whose sessions value the portfolio", ForeignKey(CalendarTable.uid, ondelete="RESTRICT"), index=True
    )
    portfolio_index_uid: Mapped[uuid.UUID | None] = column(
        Uuid, "index under which its values are published, if any", ForeignKey(IndexTable.uid, ondelete="SET NULL"), index=True
    )
    portfolio_weights_data_node_uid: Mapped[uuid.UUID | None] = _producer("producer of its weights")
    signal_weights_data_node_uid: Mapped[uuid.UUID | None] = _producer("producer of its signal")
    portfolio_data_node_uid: Mapped[uuid.UUID | None] = _producer("producer of its values")
    backtest_table_price_column_name: Mapped[str] = column(
        String(63), "price column that drives its returns", server_default="close", default="close"
    )


class PortfolioMetadataTable(RegistryTable):
    """Human-facing text, linked by convention only: it is edited without touching the identity row."""

    __concept__ = "PortfolioMetadata"
    unique_identifier: Mapped[str] = column(Identifier(), "unique_identifier of the portfolio; deliberately no foreign key", unique=True)
    description: Mapped[str | None] = column(Text, "what the portfolio is for")


class SignalMetadataTable(RegistryTable):
    __concept__ = "SignalMetadata"
    signal_uid: Mapped[str] = column(Identifier(), "identity of the signal; signal_uid in SignalWeights", unique=True)
    signal_description: Mapped[str | None] = column(Text, "name or explanation for people")


class RebalanceStrategyMetadataTable(RegistryTable):
    __concept__ = "RebalanceStrategyMetadata"
    rebalance_strategy_uid: Mapped[str] = column(Identifier(), "identity of the rebalance strategy", unique=True)
    rebalance_strategy_description: Mapped[str | None] = column(Text, "explanation for people")
    configuration_json: Mapped[dict[str, Any] | None] = column(JSONB, "the strategy's parameters")


class PortfolioConfigurationTable(RegistryTable):
    """What a portfolio is computed from. Every change is a new version; the highest one is run."""

    __concept__ = "PortfolioConfiguration"
    __table_args__ = (UniqueConstraint("portfolio_uid", "version"),)
    portfolio_uid: Mapped[uuid.UUID] = column(Uuid, "the portfolio", ForeignKey(PortfolioTable.uid, ondelete="CASCADE"), nullable=False)
    version: Mapped[int] = column(Integer, "1, 2, 3 ...")
    configuration_hash: Mapped[str] = column(String(64), "identity of what changes numbers; display text is outside", index=True)
    signal_uid: Mapped[str] = column(Identifier(), "identity of the signal it follows", index=True)
    configuration: Mapped[dict[str, Any]] = column(JSONB, "the whole configuration, as validated")
    created_at: Mapped[datetime] = instant("when this version was stored", server_default=func.now())


class PortfolioGroupTable(RegistryTable):
    __concept__ = "PortfolioGroup"
    unique_identifier: Mapped[str] = column(Identifier(), "business key; tag:NAME selects its portfolios", unique=True)
    display_name: Mapped[str | None] = column(String(255), "name for people")
    description: Mapped[str | None] = column(Text, "what the group gathers")
    metadata_json: Mapped[dict[str, Any] | None] = metadata_json()


class PortfolioGroupMembershipTable(RegistryTable):
    __concept__ = "PortfolioGroupMembership"
    __table_args__ = (UniqueConstraint("portfolio_group_uid", "portfolio_uid"),)
    portfolio_group_uid: Mapped[uuid.UUID] = column(Uuid, "the group", ForeignKey(PortfolioGroupTable.uid, ondelete="CASCADE"), index=True)
    portfolio_uid: Mapped[uuid.UUID] = column(Uuid, "the portfolio", ForeignKey(PortfolioTable.uid, ondelete="CASCADE"), index=True)
