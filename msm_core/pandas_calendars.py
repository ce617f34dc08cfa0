"""pandas-market-calendars behind a small face: sessions of a range as UTC instants, and refusal where the library would guess."""

from dataclasses import dataclass
from datetime import date, datetime
from typing import Any, Self

from msm_core.errors import CalendarNotFound, ConfigurationError


@dataclass(frozen=True)
class ScheduledSession:
    local_date: date
    opens_at: datetime
    closes_at: datetime
    is_early_close: bool


@dataclass(frozen=True)
class PandasCalendar:
    """A calendar of the library. It is imported on use: half a second that `import msm_core` should not cost."""

    name: str
    calendar: Any

    @classmethod
    def named(cls, name: str) -> Self:
        import pandas_market_calendars

        if name not in pandas_market_calendars.get_calendar_names():
            raise CalendarNotFound(calendar=name)
        return cls(name, pandas_market_calendars.get_calendar(name))

    @property
    def timezone(self) -> str:
        return str(self.calendar.tz)

    def sessions(self, start: date, end: date) -> list[ScheduledSession]:
        """Sessions whose local date is in `start..end`, both included, in order."""
        self._check_bounds(start, end)
        try:
            schedule = self.calendar.schedule(start, end)
            early = set() if schedule.empty else set(self.calendar.early_closes(schedule).index)  # NYSE's fails on an empty one
        except (NotImplementedError, ValueError) as error:  # a few calendars of the library are unfinished, for example ASEX
            raise ConfigurationError(problems=f"calendar {self.name}: pandas-market-calendars cannot schedule it ({error!r})") from error
        times = zip(schedule.index, schedule["market_open"], schedule["market_close"], strict=True)
        return [ScheduledSession(day.date(), opens.to_pydatetime(), closes.to_pydatetime(), day in early) for day, opens, closes in times]

    def bounded(self, start: date, end: date) -> tuple[date, date]:
        """`start..end` cut to what the library knows."""
        first, last = self._bounds()
        return max(start, first or start), min(end, last or end)

    def _bounds(self) -> tuple[date | None, date | None]:
        """Dates outside which the library knows no holidays; only calendars mirrored from exchange_calendars declare any."""
        mirrored = getattr(self.calendar, "_ec_class", None)
        first, last = (mirrored.bound_min(), mirrored.bound_max()) if mirrored else (None, None)
        return (first.date() if first is not None else None, last.date() if last is not None else None)

    def _check_bounds(self, start: date, end: date) -> None:
        """Outside its bounds the library schedules every weekday without a word: XSHG would trade through Chinese New Year."""
        if self.bounded(start, end) != (start, end):
            first, last = self._bounds()
            known = f"{first or 'any date'}..{last or 'any date'}"
            problem = f"pandas-market-calendars knows its holidays in {known} only, and {start}..{end} is asked for"
            raise ConfigurationError(problems=f"calendar {self.name}: {problem}. Shorten the range, or install a newer release")
