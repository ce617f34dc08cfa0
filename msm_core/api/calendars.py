"""Calendar rows, and how a calendar of pandas-market-calendars becomes rows.

A calendar says which local dates it covers (`valid_from..valid_to`, both included); every date inside has a CalendarDate and
every scheduled one a CalendarSession. Sessions are stored, so a new release of the library changes nothing until it is asked for.
"""

import uuid
from datetime import date, timedelta
from typing import Any, Literal, Self

from sqlalchemy import Connection, RowMapping, any_, delete, func, literal, or_, select
from sqlalchemy.dialects.postgresql import ARRAY, DATE

from msm_core.api import runtime
from msm_core.api.base import Row
from msm_core.api.checks import refusals
from msm_core.api.fields import Instant, Json, Zone
from msm_core.errors import ConfigurationError, EmptySchedule
from msm_core.models import CalendarDateTable, CalendarEventTable, CalendarSessionTable, CalendarTable
from msm_core.pandas_calendars import PandasCalendar, ScheduledSession
from msm_core.rows import upsert_rows, write_rows

SOURCE = "pandas_market_calendars"
DAY = timedelta(days=1)

CalendarType = Literal["TRADING", "SETTLEMENT", "FIXING", "BUSINESS", "HOLIDAY", "EVENT", "CUSTOM"]


class Calendar(Row, table=CalendarTable, key=("unique_identifier",)):
    """`valid_from` and `valid_to` are local dates, both included; `timezone` is the zone of those dates."""

    unique_identifier: str
    display_name: str
    calendar_type: CalendarType
    timezone: Zone = "UTC"
    source: str | None = None
    source_identifier: str | None = None
    valid_from: date
    valid_to: date
    metadata_json: Json | None = None

    @classmethod
    def create_from_pandas_calendar(
        cls,
        source_identifier: str,
        unique_identifier: str,
        display_name: str,
        valid_from: date | str,
        valid_to: date | str,
        calendar_type: CalendarType = "TRADING",
        timezone: str | None = None,
        session_label: str = "regular",
        metadata_json: Json | None = None,
    ) -> Self:
        """Store a calendar of pandas-market-calendars with its dates and sessions, in one transaction; asked again, it writes nothing.

        valid_from, valid_to  local dates, both included, `2026-05-25` or a date. The stored range never shrinks: a range that
                              extends it, or lies apart, is materialised together with the gap between
        timezone              IANA name; None = the library's own for this calendar
        session_label         label of the sessions; they are the primary ones, one per scheduled day

        Inside the range asked for, revised times are updated and sessions that the library no longer schedules are deleted.
        Opening and closing instants are UTC; a 24/7 session closes at 00:00 of the next day. Raises CalendarNotFound,
        EmptySchedule, InvalidRow, and ConfigurationError for a reversed range or one whose holidays the library does not know.
        """
        source = PandasCalendar.named(source_identifier)
        asked = cls._payload(
            {
                "unique_identifier": unique_identifier,
                "display_name": display_name,
                "calendar_type": calendar_type,
                "timezone": timezone or source.timezone,
                "source": SOURCE,
                "source_identifier": source_identifier,
                "valid_from": valid_from,
                "valid_to": valid_to,
                **({} if metadata_json is None else {"metadata_json": metadata_json}),
            }
        )
        CalendarSession._checked({"session_label": session_label})
        if asked["valid_from"] > asked["valid_to"]:
            raise ConfigurationError(problems=f"calendar {unique_identifier}: valid_from {valid_from} is after valid_to {valid_to}")
        models = (CalendarTable, CalendarDateTable, CalendarSessionTable)
        with refusals(CalendarTable), runtime.connection(*models) as connection:
            stored = _claimed(connection, asked)
            start, end = _to_materialise(connection, stored, asked)
            sessions = source.sessions(start, end)
            if not any(asked["valid_from"] <= session.local_date <= asked["valid_to"] for session in sessions):
                raise EmptySchedule(calendar=unique_identifier, start=asked["valid_from"], end=asked["valid_to"])
            asked["valid_from"] = min(asked["valid_from"], stored["valid_from"])
            asked["valid_to"] = max(asked["valid_to"], stored["valid_to"])
            rows = upsert_rows(connection, CalendarTable, [asked], key=cls.__key__)
            _materialise(connection, rows[0], session_label, start, end, sessions)
        return cls._read(rows[0])


class CalendarDate(Row, table=CalendarDateTable, key=("calendar_uid", "local_date")):
    """What a local date is. `is_holiday`: a weekday without a session; a session on a Saturday is a business day and a weekend day."""

    calendar_uid: uuid.UUID
    local_date: date
    is_business_day: bool = False
    is_holiday: bool = False
    is_weekend: bool = False
    is_early_close: bool = False
    holiday_name: str | None = None
    metadata_json: Json | None = None


class CalendarSession(Row, table=CalendarSessionTable, key=("calendar_uid", "local_date", "session_label")):
    """One opening of a venue; `opens_at` and `closes_at` are instants (UTC). Portfolios are valued at the close of primary sessions."""

    calendar_uid: uuid.UUID
    local_date: date
    session_label: str = "regular"
    opens_at: Instant | None = None
    closes_at: Instant | None = None
    timezone: Zone = "UTC"
    is_primary: bool = True
    metadata_json: Json | None = None


class CalendarEvent(
    Row,
    table=CalendarEventTable,
    key=("calendar_uid", "event_date", "event_type", "event_label", "target_type", "target_identifier"),
):
    """Something that happens on a local date, to the whole calendar or to one target; `event_time` is the instant (UTC), if known."""

    calendar_uid: uuid.UUID
    event_date: date
    event_time: Instant | None = None
    event_type: str
    event_label: str = ""
    target_type: str = ""
    target_uid: uuid.UUID | None = None
    target_identifier: str = ""
    metadata_json: Json | None = None


# -- from the library to rows ------------------------------------------------------------------------------------------------------


def _claimed(connection: Connection, asked: dict[str, Any]) -> RowMapping:
    """The calendar's row, made if absent, and locked so that two callers extend it one after the other."""
    write_rows(connection, CalendarTable, [asked], key=("unique_identifier",), update=False)
    columns = CalendarTable.__table__.c
    query = select(CalendarTable.__table__).where(columns.unique_identifier == asked["unique_identifier"])
    return connection.execute(query.with_for_update(key_share=True)).mappings().one()  # portfolios may still refer to it meanwhile


def _to_materialise(connection: Connection, stored: RowMapping, asked: dict[str, Any]) -> tuple[date, date]:
    """The range asked for, widened until nothing is left open between it and the stored one.

    If the stored range is not whole, or came from somewhere else, it is made again with the rest.
    """
    first, last, columns = stored["valid_from"], stored["valid_to"], CalendarDateTable.__table__.c
    stored_days = select(func.count()).where(columns.calendar_uid == stored["uid"], columns.local_date.between(first, last))
    whole = connection.execute(stored_days).scalar_one() == (last - first).days + 1
    if whole and all(stored[name] == asked[name] for name in ("source", "source_identifier")):
        return min(asked["valid_from"], last + DAY), max(asked["valid_to"], first - DAY)
    return min(asked["valid_from"], first), max(asked["valid_to"], last)


def _materialise(
    connection: Connection, calendar: RowMapping, session_label: str, start: date, end: date, sessions: list[ScheduledSession]
) -> None:
    uid, by_day = calendar["uid"], {session.local_date: session for session in sessions}
    days = [start + n * DAY for n in range((end - start).days + 1)]
    dates = [_date_row(uid, day, by_day.get(day)) for day in days]
    write_rows(connection, CalendarDateTable, dates, key=CalendarDate.__key__)
    columns = CalendarSessionTable.__table__.c
    unscheduled = any_(literal([day for day in days if day not in by_day], ARRAY(DATE)))
    connection.execute(
        delete(CalendarSessionTable).where(
            columns.calendar_uid == uid,
            columns.local_date.between(start, end),
            columns.is_primary,
            or_(columns.local_date == unscheduled, columns.session_label != session_label),
        )
    )
    rows = [_session_row(calendar, session_label, session) for session in sessions]
    write_rows(connection, CalendarSessionTable, rows, key=CalendarSession.__key__)


def _date_row(calendar_uid: uuid.UUID, day: date, session: ScheduledSession | None) -> dict[str, Any]:
    is_weekend = day.weekday() >= 5
    return {
        "calendar_uid": calendar_uid,
        "local_date": day,
        "is_business_day": session is not None,
        "is_weekend": is_weekend,
        "is_holiday": session is None and not is_weekend,
        "is_early_close": session is not None and session.is_early_close,
    }


def _session_row(calendar: RowMapping, session_label: str, session: ScheduledSession) -> dict[str, Any]:
    return {
        "calendar_uid": calendar["uid"],
        "local_date": session.local_date,
        "session_label": session_label,
        "opens_at": session.opens_at,
        "closes_at": session.closes_at,
        "timezone": calendar["timezone"],
        "is_primary": True,
    }
