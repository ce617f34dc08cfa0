"""Calendars are rows: which days are business days, when sessions open and close, what happens on a date."""

import uuid
from datetime import date, datetime

from sqlalchemy import Boolean, CheckConstraint, Date, ForeignKey, Index, String, UniqueConstraint, Uuid, text
from sqlalchemy.orm import Mapped, MappedColumn

from msm_core.models.base import Identifier, RegistryTable, column, instant, metadata_json


class CalendarTable(RegistryTable):
    __concept__ = "Calendar"
    __table_args__ = (
        CheckConstraint("valid_to >= valid_from", name="valid_range"),
        CheckConstraint("calendar_type IN ('TRADING','SETTLEMENT','FIXING','BUSINESS','HOLIDAY','EVENT','CUSTOM')", name="calendar_type"),
        Index(None, "source", "source_identifier"),
    )
    unique_identifier: Mapped[str] = column(Identifier(), "business key; calendar_key of a rebalance strategy", unique=True)
    display_name: Mapped[str] = column(String(255), "name for people")
    calendar_type: Mapped[str] = column(String(64), "TRADING, SETTLEMENT, FIXING, BUSINESS, HOLIDAY, EVENT or CUSTOM", index=True)
    timezone: Mapped[str] = column(String(64), "IANA zone of local dates", server_default="UTC", default="UTC")
    source: Mapped[str | None] = column(String(128), "where the sessions came from, for example pandas_market_calendars")
    source_identifier: Mapped[str | None] = column(Identifier(), "name of the calendar at its source, for example NYSE")
    valid_from: Mapped[date] = column(Date, "first local date that is materialised")
    valid_to: Mapped[date] = column(Date, "last local date that is materialised")
    metadata_json: Mapped[dict | None] = metadata_json()


def _calendar_uid() -> MappedColumn[uuid.UUID]:
    return column(Uuid, "the calendar", ForeignKey(CalendarTable.uid, ondelete="CASCADE"), nullable=False)


class CalendarDateTable(RegistryTable):
    __concept__ = "CalendarDate"
    __table_args__ = (UniqueConstraint("calendar_uid", "local_date"), Index(None, "calendar_uid", "is_business_day"))
    calendar_uid: Mapped[uuid.UUID] = _calendar_uid()
    local_date: Mapped[date] = column(Date, "date in the calendar's zone", index=True)
    is_business_day: Mapped[bool] = column(Boolean, "a session is scheduled", server_default=text("false"), default=False)
    is_holiday: Mapped[bool] = column(Boolean, "a weekday without a session", server_default=text("false"), default=False)
    is_weekend: Mapped[bool] = column(Boolean, "Saturday or Sunday", server_default=text("false"), default=False)
    is_early_close: Mapped[bool] = column(Boolean, "the session closes early", server_default=text("false"), default=False)
    holiday_name: Mapped[str | None] = column(String(255), "name of the holiday, where known")
    metadata_json: Mapped[dict | None] = metadata_json()


class CalendarSessionTable(RegistryTable):
    __concept__ = "CalendarSession"
    __table_args__ = (
        UniqueConstraint("calendar_uid", "local_date", "session_label"),
        CheckConstraint("closes_at > opens_at", name="closes_after_open"),
    )
    calendar_uid: Mapped[uuid.UUID] = _calendar_uid()
    local_date: Mapped[date] = column(Date, "date in the calendar's zone")
    session_label: Mapped[str] = column(String(64), "regular, or a venue's own name", server_default="regular", default="regular")
    opens_at: Mapped[datetime | None] = instant("opening instant, UTC")
    closes_at: Mapped[datetime | None] = instant("closing instant, UTC: a valuation time")
    timezone: Mapped[str] = column(String(64), "IANA zone of the session", server_default="UTC", default="UTC")
    is_primary: Mapped[bool] = column(Boolean, "portfolios are valued on primary sessions", server_default=text("true"), default=True)
    metadata_json: Mapped[dict | None] = metadata_json()


class CalendarEventTable(RegistryTable):
    __concept__ = "CalendarEvent"
    __table_args__ = (
        UniqueConstraint(
            "calendar_uid",
            "event_date",
            "event_type",
            "event_label",
            "target_type",
            "target_identifier",
            postgresql_nulls_not_distinct=True,
        ),
    )
    calendar_uid: Mapped[uuid.UUID] = _calendar_uid()
    event_date: Mapped[date | None] = column(Date, "local date of the event")
    event_time: Mapped[datetime | None] = instant("instant of the event, UTC")
    event_type: Mapped[str] = column(String(64), "for example rebalance, expiry, announcement")
    event_label: Mapped[str] = column(String(255), "which one of several", server_default="", default="")
    target_type: Mapped[str] = column(String(64), "kind of row the event is about, or empty", server_default="", default="")
    target_uid: Mapped[uuid.UUID | None] = column(Uuid, "row the event is about")
    target_identifier: Mapped[str] = column(Identifier(), "unique_identifier of that row, or empty", server_default="", default="")
    metadata_json: Mapped[dict | None] = metadata_json()
