"""Sessions of one calendar as arrays: when portfolios are valued, and which sessions end a week, a month, a quarter."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import numpy as np
import pandas as pd

from msm_core.errors import CalendarRangeError, EmptySchedule
from msm_core.frames import DAY, Times, iso

Period = Literal["week", "month", "quarter"]


@dataclass(frozen=True)
class Sessions:
    """The primary sessions of a calendar, in time order.

    calendar            name for errors
    dates               (S,) datetime64[D], local dates
    opens, closes       (S,) datetime64[us], UTC
    valid_from/valid_to datetime64[D]: the local dates that the calendar knows about
    timezone            IANA zone of the local dates
    events              local dates of the calendar's events, ascending, by event type
    """

    calendar: str
    dates: np.ndarray
    opens: Times
    closes: Times
    valid_from: np.datetime64
    valid_to: np.datetime64
    timezone: str = "UTC"
    events: Mapping[str, np.ndarray] = field(default_factory=dict)
    _grids: dict[timedelta, Times] = field(default_factory=dict, init=False, repr=False, compare=False)

    def require(self, start: np.datetime64, end: np.datetime64) -> None:
        """Raises CalendarRangeError when the window (UTC) leaves the calendar's range, EmptySchedule when it holds no session at all."""
        if end < start:
            raise self.out_of_range(f"{iso(start)}..{iso(end)}", "the range is reversed")
        if not self.covers(start, end):
            raise self.out_of_range(f"{iso(start)}..{iso(end)}", "the update window")
        if len(self.closes) == 0:
            raise EmptySchedule(calendar=self.calendar, start=iso(start), end=iso(end))

    def part(self, rows: slice) -> "Sessions":
        """Some of its sessions; what the calendar knows about stays the same."""
        dates, opens, closes = self.dates[rows], self.opens[rows], self.closes[rows]
        return Sessions(self.calendar, dates, opens, closes, self.valid_from, self.valid_to, self.timezone, self.events)

    def covers(self, start: Times | np.datetime64, end: Times | np.datetime64) -> Any:
        """Whether windows (UTC) lie in the calendar's range.

        A session may close on the UTC date after its local one (24/7 closes at the next 00:00), or before it: one day of grace.
        """
        return (start.astype("datetime64[D]") >= self.valid_from - 1) & (end.astype("datetime64[D]") <= self.valid_to + 1)

    def to_local(self, times: Times) -> Times:
        """UTC instants as wall-clock times of the calendar's zone."""
        return pd.DatetimeIndex(times, tz="UTC").tz_convert(self.timezone).tz_localize(None).to_numpy().astype("datetime64[us]")

    def labelled_dates(self, times: Times) -> np.ndarray:
        """Dates that `session_date` stamps mean: the UTC date of 00:00 UTC, else the date of that midnight in the calendar's zone."""
        utc_dates = times.astype("datetime64[D]")
        return np.where(times == utc_dates, utc_dates, self.to_local(times).astype("datetime64[D]"))

    def labels_of(self, dates: np.ndarray, times: Times) -> Times:
        """`times` as `session_date` stamps of `dates` must be: 00:00 of the date, of UTC or, where they are not, of the zone."""
        midnights = dates.astype("datetime64[us]")
        off = times != midnights
        labels = times.copy()
        labels[off] += midnights[off] - self.to_local(times[off])
        return labels

    def valuation_times(self, frequency: timedelta) -> Times:
        """Session closes for a frequency of a day; else every `open + k * frequency` inside each session, and its close."""
        if frequency >= timedelta(days=1):
            return self.closes
        if frequency not in self._grids:  # asked for again and again
            step = np.timedelta64(frequency)
            grids = [
                np.append(np.arange(opens + step, closes, step, dtype="datetime64[us]"), closes)
                for opens, closes in zip(self.opens, self.closes, strict=True)
            ]
            self._grids[frequency] = np.concatenate(grids) if grids else self.closes
        return self._grids[frequency]

    def first_times(self, frequency: timedelta) -> Times:
        """(S,) end of each session's first bar; its close where the session is shorter."""
        return np.minimum(self.opens + np.timedelta64(frequency), self.closes)

    def period_ends(self, period: Period, through: int) -> np.ndarray:
        """Mask (S,) of sessions that are the last of their week (Monday to Sunday), month or quarter; local dates.

        The answer for the newest session depends on sessions to come, so it is only given when the calendar reaches the end of the
        period. Raises CalendarRangeError when a session up to index `through` cannot be told.
        """
        label = _period_label(self.dates, period)
        last_date = _period_last_date(self.dates[-1:], period)[0]
        known = self.valid_to >= last_date
        if not known and through >= len(self.dates) - 1:
            why = f"whether {self.dates[-1]} ends its {period} depends on later sessions"
            raise self.out_of_range(str(last_date), why)
        return np.append(label[1:] != label[:-1], known)

    def out_of_range(self, needed: str, why: str) -> CalendarRangeError:
        """The error that names the calendar and its range."""
        return CalendarRangeError(
            calendar=self.calendar, valid_from=str(self.valid_from), valid_to=str(self.valid_to), needed=needed, why=why
        )


def _period_label(dates: np.ndarray, period: Period) -> np.ndarray:
    if period == "week":
        return (dates.astype("datetime64[D]").astype(np.int64) + 3) // 7  # 1970-01-01 was a Thursday; weeks start on Monday
    months = dates.astype("datetime64[M]").astype(np.int64)
    return months if period == "month" else months // 3


def _period_last_date(dates: np.ndarray, period: Period) -> np.ndarray:
    label = _period_label(dates, period)
    if period == "week":
        return (label * 7 + 3).astype("datetime64[D]")
    months = label + 1 if period == "month" else (label + 1) * 3
    return months.astype("datetime64[M]").astype("datetime64[D]") - DAY
