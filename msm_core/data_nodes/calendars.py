"""Calendar keys to sessions: a stored calendar by unique_identifier, then by source_identifier, only then the library itself."""

import functools
from collections.abc import Iterable
from datetime import date, datetime

import numpy as np
import structlog
from sqlalchemy import Connection

from msm_core.errors import CalendarNotFound, ConfigurationError, MsmError
from msm_core.pandas_calendars import PandasCalendar
from msm_core.sessions import Sessions
from msm_core.storage import find_calendars, read_sessions

log = structlog.get_logger()

FALLBACK_FROM = date(1970, 1, 1)


def resolve_calendars(connection: Connection, keys: Iterable[str], as_of: datetime) -> dict[str, Sessions | MsmError]:
    """Sessions per calendar key, or the error that says why there are none: a failed look-up never picks another calendar."""
    keys = sorted(set(keys))
    found = find_calendars(connection, keys)
    stored = read_sessions(connection, [matches[0][1] for matches in found.values()])
    resolved: dict[str, Sessions | MsmError] = {}
    for key in keys:
        matches = found.get(key, [])
        if len(matches) > 1:
            names = ", ".join(name for name, _ in matches)
            resolved[key] = ConfigurationError(
                problems=f"calendar key {key!r} is the source of several calendars ({names}); use one of those"
            )
        elif matches:
            resolved[key] = stored[matches[0][1]]
        else:
            resolved[key] = _from_library(key, as_of.year + 1)
    return resolved


@functools.cache
def _from_library(key: str, year_to: int) -> Sessions | MsmError:
    """The fallback for calendars that nobody stored; a new release of the library may change it, so it is logged."""
    try:
        calendar = PandasCalendar.named(key)
        start, end = calendar.bounded(FALLBACK_FROM, date(year_to, 12, 31))
        sessions = calendar.sessions(start, end)
    except CalendarNotFound as error:
        return error
    log.warning("calendar is not stored; using pandas-market-calendars", calendar=key)
    return Sessions(
        calendar=key,
        dates=np.array([s.local_date for s in sessions], "datetime64[D]"),
        opens=np.array([s.opens_at.replace(tzinfo=None) for s in sessions], "datetime64[us]"),
        closes=np.array([s.closes_at.replace(tzinfo=None) for s in sessions], "datetime64[us]"),
        valid_from=np.datetime64(start),
        valid_to=np.datetime64(end),
        timezone=calendar.timezone,
    )
