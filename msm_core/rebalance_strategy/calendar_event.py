"""Calendar event: rebalance when the calendar says so - a weekday, or events that are stored with it."""

from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from msm_core.errors import NoSuchEvent
from msm_core.rebalance_strategy.base import RebalanceStrategy
from msm_core.sessions import Sessions


class CalendarEvent(RebalanceStrategy):
    """Trade the whole way to the latest valid target at the open or the close of the sessions that a schedule names.

    Stored events (rows of CalendarEvent with an event_date) count for the first session on or after their date. A weekday that is no
    session counts for the next one of its week, or for the last one before it where the week has no other.
    """

    kind: Literal["calendar_event"] = "calendar_event"
    rebalance_on: Literal["every_session"] = Field(default="every_session", description="fixed: the schedule says which sessions")
    event: Literal["market_open", "market_close"] = Field(
        default="market_close", description="when in the session; market_open is its first bar, and needs intraday prices"
    )
    schedule: Literal["every_session", "weekly"] = Field(default="every_session", description="sessions, unless event_type names them")
    weekday: int = Field(default=0, ge=0, le=6, description="day of a weekly schedule, 0 = Monday")
    event_type: str | None = Field(default=None, min_length=1, max_length=64, description="type of the calendar's stored events")
    event_offset: int = Field(default=0, ge=-250, le=250, description="sessions after the event (before it, if negative)")

    @model_validator(mode="after")
    def _one_schedule(self) -> Self:
        if self.event_type is not None and self.schedule != "every_session":
            raise ValueError("give schedule or event_type, not both")
        return self

    @property
    def trades_at_open(self) -> bool:
        return self.event == "market_open"

    def decisions(self, sessions: Sessions, target: np.ndarray, changed: np.ndarray, through: int) -> np.ndarray:
        reach = through - self.event_offset  # the last session whose event matters
        if through >= 0 and reach >= len(target):
            why = f"whether {sessions.dates[through]} lies {-self.event_offset} session(s) before an event depends on later sessions"
            raise sessions.out_of_range("a later date", why)
        named = np.zeros(len(target), bool)
        places = np.flatnonzero(self._scheduled(sessions, reach)) + self.event_offset
        named[places[(places >= 0) & (places < len(target))]] = True
        return (target >= 0) & named

    def _scheduled(self, sessions: Sessions, through: int) -> np.ndarray:
        """(S,) mask of sessions with an event."""
        if self.event_type is not None:
            return self._stored(sessions, self.event_type)
        if self.schedule == "every_session":
            return np.ones(len(sessions.dates), bool)
        days = sessions.dates.astype(np.int64) + 3  # 1970-01-01 was a Thursday; weeks start on Monday
        week, late = days // 7, days % 7 >= self.weekday
        follows = np.append(False, week[1:] == week[:-1])
        first_late = late & ~(follows & np.append(False, late[:-1]))
        return first_late | (sessions.period_ends("week", through) & ~late)

    def _stored(self, sessions: Sessions, event_type: str) -> np.ndarray:
        if event_type not in sessions.events:
            known = ", ".join(sorted(sessions.events)) or "none"
            raise NoSuchEvent(calendar=sessions.calendar, event=event_type, known=known)
        named = np.zeros(len(sessions.dates), bool)
        dates = sessions.events[event_type]
        places = np.searchsorted(sessions.dates, dates[dates >= sessions.valid_from])
        named[places[places < len(named)]] = True
        return named
