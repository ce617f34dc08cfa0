"""Calendars as rows. Dates and times below are the exchanges' published ones, not the library's.

Source: https://www.nyse.com/markets/hours-calendars (early close 13:00 New York on 3 July 2024, closed on 4 July).
"""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta

import pytest

from msm_core.api import Calendar, CalendarDate, CalendarSession
from msm_core.errors import CalendarNotFound, ConfigurationError, EmptySchedule, InvalidRow

NYSE = {"source_identifier": "NYSE", "unique_identifier": "XNYS", "display_name": "New York"}
ALWAYS = {"source_identifier": "24/7", "unique_identifier": "ALWAYS", "display_name": "24/7"}


def _sessions(calendar: Calendar) -> dict[str, CalendarSession]:
    return {str(session.local_date): session for session in CalendarSession.filter(calendar_uid=calendar.uid)}


def _dates(calendar: Calendar) -> dict[str, CalendarDate]:
    return {str(day.local_date): day for day in CalendarDate.filter(calendar_uid=calendar.uid)}


def test_a_week_with_an_early_close_and_a_holiday(started):  # R10, R27
    calendar = Calendar.create_from_pandas_calendar(**NYSE, valid_from="2024-07-01", valid_to=date(2024, 7, 7), metadata_json={"a": 1})
    assert (calendar.source, calendar.source_identifier, calendar.timezone) == ("pandas_market_calendars", "NYSE", "America/New_York")
    assert (calendar.valid_from, calendar.valid_to, calendar.calendar_type) == (date(2024, 7, 1), date(2024, 7, 7), "TRADING")
    kinds = {day: (d.is_business_day, d.is_early_close, d.is_holiday, d.is_weekend) for day, d in _dates(calendar).items()}
    assert kinds == {
        "2024-07-01": (True, False, False, False),
        "2024-07-02": (True, False, False, False),
        "2024-07-03": (True, True, False, False),
        "2024-07-04": (False, False, True, False),
        "2024-07-05": (True, False, False, False),
        "2024-07-06": (False, False, False, True),
        "2024-07-07": (False, False, False, True),
    }
    sessions = _sessions(calendar)
    assert list(sessions) == ["2024-07-01", "2024-07-02", "2024-07-03", "2024-07-05"]
    early = sessions["2024-07-03"]
    # New York is UTC-4 in July: 09:30 -> 13:30Z, 13:00 -> 17:00Z
    assert (early.opens_at, early.closes_at) == (datetime(2024, 7, 3, 13, 30, tzinfo=UTC), datetime(2024, 7, 3, 17, 0, tzinfo=UTC))
    assert sessions["2024-07-05"].closes_at == datetime(2024, 7, 5, 20, 0, tzinfo=UTC)
    assert all(s.is_primary and s.session_label == "regular" and s.timezone == "America/New_York" for s in sessions.values())


@pytest.mark.parametrize(
    ("friday", "closes_friday", "closes_monday"),
    [("2024-03-08", 21, 20), ("2024-11-01", 20, 21)],  # clocks move on the Sundays 10 March and 3 November 2024; close is 16:00 New York
)
def test_sessions_over_a_clock_change(started, friday, closes_friday, closes_monday):
    monday = date.fromisoformat(friday) + timedelta(days=3)
    sessions = _sessions(Calendar.create_from_pandas_calendar(**NYSE, valid_from=friday, valid_to=monday))
    assert [s.closes_at.hour for s in sessions.values() if s.closes_at] == [closes_friday, closes_monday]


def test_long_histories_are_whole(started, statements, versions):
    with statements() as sent:
        calendar = Calendar.create_from_pandas_calendar(**NYSE, valid_from="1990-01-01", valid_to="2024-12-31")
    # 365 * 35 years + 9 leap days (1992 ... 2024)
    assert CalendarDate.count(calendar_uid=calendar.uid) == 365 * 35 + 9
    sessions = _sessions(calendar)
    years = {year: sum(day.startswith(year) for day in sessions) for year in ("1990", "2001", "2024")}
    assert years == {"1990": 253, "2001": 248, "2024": 252}  # 2001: closed 11-14 September
    before = versions()
    with statements() as sent_again:
        assert Calendar.create_from_pandas_calendar(**NYSE, valid_from="1990-01-01", valid_to="2024-12-31") == calendar  # R11
    assert versions() == before
    assert len(sent) == len(sent_again) < 15


def test_always_open(started):
    calendar = Calendar.create_from_pandas_calendar(**ALWAYS, valid_from="2024-02-28", valid_to="2024-03-02")
    sessions = _sessions(calendar)
    assert list(sessions) == ["2024-02-28", "2024-02-29", "2024-03-01", "2024-03-02"]
    for day, session in sessions.items():
        midnight = datetime.fromisoformat(day).replace(tzinfo=UTC)
        assert (session.opens_at, session.closes_at) == (midnight, midnight + timedelta(days=1))
    saturday = _dates(calendar)["2024-03-02"]
    assert (saturday.is_business_day, saturday.is_weekend, saturday.is_holiday) == (True, True, False)


@pytest.mark.parametrize(
    ("second", "horizon"),
    [
        (("2024-02-05", "2024-02-09"), ("2024-02-01", "2024-02-29")),  # narrower: never shrinks
        (("2024-02-20", "2024-03-15"), ("2024-02-01", "2024-03-15")),  # later
        (("2024-01-15", "2024-02-10"), ("2024-01-15", "2024-02-29")),  # earlier
        (("2024-01-15", "2024-03-15"), ("2024-01-15", "2024-03-15")),  # around
        (("2024-04-08", "2024-04-12"), ("2024-02-01", "2024-04-12")),  # apart, later
        (("2023-12-04", "2023-12-08"), ("2023-12-04", "2024-02-29")),  # apart, earlier
    ],
)
def test_a_second_range_leaves_no_day_of_the_horizon_open(started, second, horizon):
    first = Calendar.create_from_pandas_calendar(**NYSE, valid_from="2024-02-01", valid_to="2024-02-29")
    calendar = Calendar.create_from_pandas_calendar(**NYSE, valid_from=second[0], valid_to=second[1])
    assert calendar.uid == first.uid
    assert (str(calendar.valid_from), str(calendar.valid_to)) == horizon
    days = _dates(calendar)
    assert (min(days), max(days), len(days)) == (*horizon, (calendar.valid_to - calendar.valid_from).days + 1)
    closed = {"2023-12-25", "2024-01-01", "2024-01-15", "2024-02-19", "2024-03-29"}  # NYSE holidays between December and April
    business = {day for day, d in days.items() if not d.is_weekend and day not in closed}
    assert set(_sessions(calendar)) == business


def test_revisions_are_taken_inside_the_range_asked_for_only(started):
    calendar = Calendar.create_from_pandas_calendar(**NYSE, valid_from="2024-07-01", valid_to="2024-07-12")
    wrong = datetime(2024, 7, 2, 12, tzinfo=UTC)
    CalendarSession.upsert_many(
        [
            {"calendar_uid": calendar.uid, "local_date": "2024-07-02", "opens_at": wrong - timedelta(hours=1), "closes_at": wrong},
            {"calendar_uid": calendar.uid, "local_date": "2024-07-04"},  # as if an older release had not known the holiday
            {"calendar_uid": calendar.uid, "local_date": "2024-07-07"},
            {"calendar_uid": calendar.uid, "local_date": "2024-07-03", "session_label": "pre-market", "is_primary": False},
        ]
    )
    CalendarDate.upsert(calendar_uid=calendar.uid, local_date=date(2024, 7, 4), is_business_day=True, is_holiday=False, holiday_name="kept")
    Calendar.create_from_pandas_calendar(**NYSE, valid_from="2024-07-01", valid_to="2024-07-05")
    sessions = CalendarSession.filter(calendar_uid=calendar.uid)
    days = [(str(s.local_date), s.session_label) for s in sessions]
    assert [s for s in days if s[0] <= "2024-07-05"] == [
        ("2024-07-01", "regular"),
        ("2024-07-02", "regular"),
        ("2024-07-03", "pre-market"),
        ("2024-07-03", "regular"),
        ("2024-07-05", "regular"),
    ]
    assert ("2024-07-07", "regular") in days
    assert sessions[1].closes_at == datetime(2024, 7, 2, 20, tzinfo=UTC)
    holiday = _dates(calendar)["2024-07-04"]
    assert (holiday.is_business_day, holiday.is_holiday, holiday.holiday_name) == (False, True, "kept")


def test_a_hand_made_or_incomplete_calendar_is_materialised_whole(started):
    hollow = Calendar.upsert(
        unique_identifier="XNYS", display_name="by hand", calendar_type="TRADING", valid_from="2024-01-01", valid_to="2024-01-31"
    )
    calendar = Calendar.create_from_pandas_calendar(**NYSE, valid_from="2024-01-10", valid_to="2024-01-12")
    assert (calendar.uid, calendar.display_name) == (hollow.uid, "New York")
    assert len(_dates(calendar)) == 31
    assert len(_sessions(calendar)) == 21  # 23 weekdays less New Year's Day and 15 January
    # another source for the same calendar must not leave days of the old one behind: 15 January is an ordinary Monday for 24/7
    Calendar.create_from_pandas_calendar(**ALWAYS | {"unique_identifier": "XNYS"}, valid_from="2024-01-10", valid_to="2024-01-12")
    assert len(_sessions(calendar)) == 31


def test_another_label_makes_no_second_session(started):
    calendar = Calendar.create_from_pandas_calendar(**NYSE, valid_from="2024-07-01", valid_to="2024-07-05")
    Calendar.create_from_pandas_calendar(**NYSE, valid_from="2024-07-01", valid_to="2024-07-05", session_label="RTH", timezone="UTC")
    assert {(s.session_label, s.timezone) for s in _sessions(calendar).values()} == {("RTH", "UTC")}


def test_two_callers_extend_one_after_the_other(started):
    ranges = [("2024-01-01", "2024-03-31"), ("2024-06-01", "2024-09-30"), ("2023-06-01", "2023-12-31"), ("2024-02-01", "2024-12-31")]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda r: Calendar.create_from_pandas_calendar(**ALWAYS, valid_from=r[0], valid_to=r[1]), ranges))
    calendar = Calendar.get(unique_identifier="ALWAYS")
    assert (calendar.valid_from, calendar.valid_to) == (date(2023, 6, 1), date(2024, 12, 31))
    assert CalendarDate.count(calendar_uid=calendar.uid) == CalendarSession.count(calendar_uid=calendar.uid) == 214 + 366


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"source_identifier": "NYES"}, CalendarNotFound, "'NYES' is neither"),
        ({"valid_from": "2024-07-09"}, ConfigurationError, "valid_from 2024-07-09 is after valid_to 2024-07-08"),
        ({"valid_from": "2024-07-04", "valid_to": "2024-07-04"}, EmptySchedule, "XNYS has no session in 2024-07-04..2024-07-04"),
        ({"valid_from": "yesterday"}, InvalidRow, "valid_from 'yesterday'"),
        ({"timezone": "New York"}, InvalidRow, "timezone 'New York'"),
        ({"session_label": ""}, InvalidRow, "session_label ''"),
        ({"unique_identifier": "a\0"}, InvalidRow, "unique_identifier .* NUL"),
        ({"source_identifier": "XSHG", "valid_to": "2060-01-01"}, ConfigurationError, "knows its holidays in 1990-12-03..20"),
        ({"source_identifier": "ASEX"}, ConfigurationError, "cannot schedule it"),
    ],
)
def test_refused_and_nothing_written(started, arguments, error, text):  # R65
    with pytest.raises(error, match=text):
        Calendar.create_from_pandas_calendar(**NYSE | {"valid_from": "2024-07-01", "valid_to": "2024-07-08"} | arguments)
    assert Calendar.count() == CalendarDate.count() == CalendarSession.count() == 0
