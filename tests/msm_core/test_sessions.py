"""Sessions written down by hand; times are the exchanges' published ones.

Source: https://www.nyse.com/markets/hours-calendars (09:30 to 16:00 New York; early close 13:00).
"""

from datetime import timedelta

import numpy as np
import pytest

from msm_core.errors import CalendarRangeError, EmptySchedule
from msm_core.sessions import Sessions


def times(*texts: str) -> np.ndarray:
    return np.array(texts, "datetime64[us]")


def dates(*texts: str) -> np.ndarray:
    return np.array(texts, "datetime64[D]")


# Friday 2024-03-08 and Monday 2024-03-11: New York's clocks moved on the Sunday between, UTC-5 -> UTC-4
CLOCK_CHANGE = Sessions(
    "XNYS",
    dates("2024-03-08", "2024-03-11"),
    times("2024-03-08T14:30", "2024-03-11T13:30"),
    times("2024-03-08T21:00", "2024-03-11T20:00"),
    np.datetime64("2024-03-08"),
    np.datetime64("2024-03-12"),
    "America/New_York",
)


def on(*days: str, valid_to: str | None = None) -> Sessions:
    day = dates(*days)
    midnights = day.astype("datetime64[us]")
    last = np.datetime64(valid_to, "D") if valid_to else day[-1]
    return Sessions("X", day, midnights + np.timedelta64(9, "h"), midnights + np.timedelta64(17, "h"), day[0], last)


# -- range --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("2024-03-08T21:00", "2024-03-11T20:00"),
        ("2024-03-08T21:00", "2024-03-08T21:00"),
        ("2024-03-09T00:00", "2024-03-09T12:00"),  # a weekend: no session, but within the range
        ("2024-03-07T15:00", "2024-03-13T23:59"),  # a day of grace on either side, for sessions that close on another UTC date
    ],
)
def test_windows_within_the_range(start, end):
    CLOCK_CHANGE.require(np.datetime64(start, "us"), np.datetime64(end, "us"))


@pytest.mark.parametrize(
    ("start", "end", "why"),
    [
        ("2024-03-06T23:59", "2024-03-11T20:00", "the update window"),
        ("2024-03-08T21:00", "2024-03-14T00:00", "the update window"),
        ("2024-03-11T20:00", "2024-03-08T21:00", "the range is reversed"),
    ],
)
def test_windows_outside_the_range(start, end, why):  # R65
    with pytest.raises(CalendarRangeError) as told:
        CLOCK_CHANGE.require(np.datetime64(start, "us"), np.datetime64(end, "us"))
    assert told.value.facts["why"] == why
    assert "calendar XNYS covers 2024-03-08..2024-03-12" in str(told.value)
    assert f"{start.replace('T', ' ')}Z..{end.replace('T', ' ')}Z" in str(told.value)


def test_a_calendar_without_sessions_is_an_error():  # design.md section 3: neither is a no-op
    empty = Sessions("HOLLOW", dates(), times(), times(), np.datetime64("2024-01-01"), np.datetime64("2024-12-31"))
    with pytest.raises(EmptySchedule, match=r"calendar HOLLOW has no session in 2024-02-01 00:00Z\.\.2024-03-01 00:00Z"):
        empty.require(np.datetime64("2024-02-01", "us"), np.datetime64("2024-03-01", "us"))


# -- valuation times ----------------------------------------------------------------------------------------------------------


def test_daily_portfolios_are_valued_at_the_closes():
    assert CLOCK_CHANGE.valuation_times(timedelta(days=1)).tolist() == times("2024-03-08T21:00", "2024-03-11T20:00").tolist()


def test_intraday_grid_starts_at_the_open_and_ends_with_the_close():
    # 14:30 + k h < 21:00, then 21:00 itself; on Monday an hour earlier in UTC
    assert CLOCK_CHANGE.valuation_times(timedelta(hours=1)).astype(str).tolist() == [
        *(f"2024-03-08T{hour}:30:00.000000" for hour in (15, 16, 17, 18, 19, 20)),
        "2024-03-08T21:00:00.000000",
        *(f"2024-03-11T{hour}:30:00.000000" for hour in (14, 15, 16, 17, 18, 19)),
        "2024-03-11T20:00:00.000000",
    ]


@pytest.mark.parametrize(
    ("minutes", "count", "last_two"),
    [
        (5, 78, ("20:55", "21:00")),  # 390 / 5
        (390, 1, None),  # the whole session
        (195, 2, ("17:45", "21:00")),
        (240, 2, ("18:30", "21:00")),  # the rest of the session is a bar of its own
        (720, 1, None),  # longer than the session: its close
    ],
)
def test_grid_sizes(minutes, count, last_two):
    friday = [t for t in CLOCK_CHANGE.valuation_times(timedelta(minutes=minutes)).astype(str) if t.startswith("2024-03-08")]
    assert len(friday) == count
    assert friday[-1] == "2024-03-08T21:00:00.000000"
    if last_two:
        assert [t[11:16] for t in friday[-2:]] == list(last_two)


def test_sessions_that_follow_each_other_share_no_instant():
    midnights = times("2024-01-01", "2024-01-02", "2024-01-03")
    always = Sessions("24/7", dates("2024-01-01", "2024-01-02"), midnights[:-1], midnights[1:], *dates("2024-01-01", "2024-01-02"))
    assert always.valuation_times(timedelta(hours=8)).astype(str).tolist() == [
        "2024-01-01T08:00:00.000000",
        "2024-01-01T16:00:00.000000",
        "2024-01-02T00:00:00.000000",
        "2024-01-02T08:00:00.000000",
        "2024-01-02T16:00:00.000000",
        "2024-01-03T00:00:00.000000",
    ]


def test_no_sessions_no_times():
    empty = Sessions("HOLLOW", dates(), times(), times(), np.datetime64("2024-01-01"), np.datetime64("2024-12-31"))
    assert len(empty.valuation_times(timedelta(days=1))) == len(empty.valuation_times(timedelta(hours=1))) == 0


def test_to_local_follows_the_clock_change():
    local = CLOCK_CHANGE.to_local(times("2024-03-08T21:00", "2024-03-11T20:00", "2024-03-11T03:59:59.999999"))
    assert local.astype(str).tolist() == ["2024-03-08T16:00:00.000000", "2024-03-11T16:00:00.000000", "2024-03-10T23:59:59.999999"]


# -- periods ------------------------------------------------------------------------------------------------------------------


def ends(sessions: Sessions, period: str, through: int | None = None) -> list[str]:
    mask = sessions.period_ends(period, len(sessions.dates) - 1 if through is None else through)
    assert mask.shape == sessions.dates.shape
    return [str(day) for day in sessions.dates[mask]]


def test_weeks_run_from_monday_to_sunday():
    # 2024-12-29 is a Sunday, 30 a Monday; 2025-01-05 a Sunday. The year's end ends no week.
    sessions = on("2024-12-28", "2024-12-29", "2024-12-30", "2024-12-31", "2025-01-05")
    assert ends(sessions, "week") == ["2024-12-29", "2025-01-05"]


def test_weeks_before_1970():
    # 1969-12-28 was a Sunday, 29 a Monday, 1970-01-01 a Thursday, 04 a Sunday
    assert ends(on("1969-12-27", "1969-12-28", "1969-12-29", "1970-01-01", "1970-01-04"), "week") == ["1969-12-28", "1970-01-04"]


def test_weeks_and_months_without_sessions_are_passed_over():
    sessions = on("2024-01-10", "2024-01-24", "2024-04-02", "2024-12-31", valid_to="2025-01-05")
    assert ends(sessions, "week") == ["2024-01-10", "2024-01-24", "2024-04-02", "2024-12-31"]
    assert ends(sessions, "month") == ["2024-01-24", "2024-04-02", "2024-12-31"]
    assert ends(sessions, "quarter") == ["2024-01-24", "2024-04-02", "2024-12-31"]


def test_the_same_month_of_two_years_is_two_months():
    sessions = on("2023-02-28", "2024-02-28", "2024-02-29")
    assert ends(sessions, "month") == ["2023-02-28", "2024-02-29"]


@pytest.mark.parametrize(
    ("period", "needed"),
    [("week", "2024-02-18"), ("month", "2024-02-29"), ("quarter", "2024-03-31")],
)
def test_the_edge_is_told_only_when_the_calendar_reaches_the_end_of_the_period(period, needed):  # R65
    before = str(np.datetime64(needed) - 1)
    for valid_to in ("2024-02-14", before):
        edge = on("2024-01-31", "2024-02-13", "2024-02-14", valid_to=valid_to)
        with pytest.raises(CalendarRangeError, match=f"covers 2024-01-31..{valid_to}, but {needed} is needed"):
            edge.period_ends(period, 2)
        assert "2024-02-14" not in ends(edge, period, through=1)
    assert ends(on("2024-01-31", "2024-02-13", "2024-02-14", valid_to=needed), period)[-1] == "2024-02-14"
