"""Assets and indexes: what prices and published portfolios are keyed by."""

import uuid
from datetime import date

from sqlalchemy import Date, ForeignKey, String, Text, Uuid
from sqlalchemy.orm import Mapped

from msm_core.models.base import Identifier, RegistryTable, column, metadata_json
from msm_core.models.calendars import CalendarTable


class AssetTypeTable(RegistryTable):
    __concept__ = "AssetType"
    asset_type: Mapped[str] = column(String(64), "business key, for example equity", unique=True)
    display_name: Mapped[str | None] = column(String(255), "name for people")
    description: Mapped[str | None] = column(Text, "what assets of this type are")
    metadata_json: Mapped[dict | None] = metadata_json()


class AssetTable(RegistryTable):
    __concept__ = "Asset"
    unique_identifier: Mapped[str] = column(Identifier(), "business key; asset_identifier in every storage", unique=True)
    asset_type: Mapped[str | None] = column(String(64), "type of the asset, for example equity", index=True)
    calendar_uid: Mapped[uuid.UUID | None] = column(
        Uuid, "calendar of its trading sessions; null = it trades around the clock, 24/7", ForeignKey(CalendarTable.uid), index=True
    )
    delisted_on: Mapped[date | None] = column(Date, "local date of its last trading day; null = it is listed")


class IndexTypeTable(RegistryTable):
    __concept__ = "IndexType"
    index_type: Mapped[str] = column(String(64), "business key, for example portfolio", unique=True)
    display_name: Mapped[str | None] = column(String(255), "name for people", index=True)
    description: Mapped[str | None] = column(Text, "what indexes of this type are")
    metadata_json: Mapped[dict | None] = metadata_json()


class IndexTable(RegistryTable):
    __concept__ = "Index"
    unique_identifier: Mapped[str] = column(Identifier(), "business key; portfolio_index_identifier in the publication", unique=True)
    index_type: Mapped[str] = column(String(64), "type of the index, for example portfolio", index=True)
    display_name: Mapped[str] = column(String(255), "name for people", index=True)
    description: Mapped[str | None] = column(Text, "what the index measures")
    metadata_json: Mapped[dict | None] = metadata_json()
