"""CalendarEvent: the contract, and cases worked by hand."""

from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from msm_core.errors import CalendarRangeError, NoSuchEvent
from msm_core.rebalance_strategy import CalendarEvent
from msm_core.sessions import Sessions
from tests.contracts import RebalanceContract, weekday_sessions
from tests.msm_core.rebalance_strategy.by_hand import EVER, closes, everywhere, hand, near, weights_after, with_holiday
from tests.runs import YEAR

EVENT = {"kind": "calendar_event", "calendar_key": "NYC"}


class TestContract(RebalanceContract):
    sessions = replace(
        weekday_sessions("2023-01-02", "2023-12-29"), events={"fomc": np.array(["2023-02-01", "2023-03-25"], "datetime64[D]")}
    )
    payload = {**EVENT, "schedule": "weekly"}
    respellings = [{**payload, "weekday": 0}, {**payload, "event": "market_close"}, {**payload, "rebalance_on": "every_session"}]
    others = [
        EVENT,
        {**EVENT, "schedule": "weekly", "weekday": 4, "event": "market_open"},
        {**EVENT, "event_type": "fomc"},
        {**EVENT, "event_type": "fomc", "event_offset": -1, "event": "market_open", "execution_lag": 1},
        {**EVENT, "schedule": "weekly", "weekday": 2, "event_offset": 1},
        {**EVENT, "schedule": "weekly", "weekday": 6, "event_offset": -2},
    ]
    refused = [
        ({**EVENT, "schedule": "weekly", "event_type": "fomc"}, "give schedule or event_type, not both"),
        ({**EVENT, "weekday": 7}, "less than or equal to 6"),
        ({**EVENT, "event": "lunch"}, "'market_open' or 'market_close'"),
        ({**EVENT, "event_offset": 251}, "less than or equal to 250"),
        ({**EVENT, "event_type": ""}, "at least 1 character"),
        ({**EVENT, "rebalance_on": "week_end"}, "Input should be 'every_session'"),
    ]


def decided(strategy: CalendarEvent, sessions: Sessions, through: int | None = None) -> list[str]:
    target = np.zeros(len(sessions.dates), int)
    last = len(target) - 1 if through is None else through
    mask = strategy.decisions(sessions, target, target != 0, last)[: last + 1]
    return [str(d)[5:] for d in sessions.dates[: last + 1][mask]]


def weekly(weekday: int, offset: int = 0) -> CalendarEvent:
    return CalendarEvent(calendar_key="X", schedule="weekly", weekday=weekday, event_offset=offset)


# 2024: Mo 1 January; Monday 15 is a holiday; Friday 29 March is one, and so is Monday 1 April here
HOLIDAYS = with_holiday("01-15", "03-29", "04-01")
JANUARY, EASTER = HOLIDAYS.part(slice(0, 19)), HOLIDAYS.part(slice(54, 67))  # 1 to 26 January; 18 March to 5 April: known through December


@pytest.mark.parametrize(
    ("weekday", "sessions", "dates"),
    [
        (0, JANUARY, ["01-01", "01-08", "01-16", "01-22"]),  # Monday 15 is a holiday: Tuesday
        (2, JANUARY, ["01-03", "01-10", "01-17", "01-24"]),
        (4, JANUARY, ["01-05", "01-12", "01-19", "01-26"]),
        (6, JANUARY, ["01-05", "01-12", "01-19", "01-26"]),  # no session on Sunday, and none after it in its week: the last one before
        (4, EASTER, ["03-22", "03-28", "04-05"]),  # Good Friday: Thursday
        (0, EASTER, ["03-18", "03-25", "04-02"]),  # Easter Monday: Tuesday
        (5, EASTER, ["03-22", "03-28", "04-05"]),
    ],
)
def test_golden_weekly(weekday, sessions, dates):
    assert decided(weekly(weekday), sessions) == dates


def test_golden_weekly_with_an_offset():
    # the session after Friday 5 is Monday 8; that after Friday 12 is Tuesday 16, for Monday is a holiday
    assert decided(weekly(4, 1), JANUARY) == ["01-08", "01-16", "01-22"]
    assert decided(weekly(0, -1), HOLIDAYS, 17) == ["01-05", "01-12", "01-19"]  # through Thursday 25: Monday 29 counts for Friday 26
    assert decided(weekly(0, -1), HOLIDAYS, 18) == ["01-05", "01-12", "01-19", "01-26"]


def stored(offset: int = 0) -> CalendarEvent:
    return CalendarEvent(calendar_key="X", event_type="fomc", event_offset=offset)


def with_events(*dates: str, sessions: Sessions = HOLIDAYS) -> Sessions:
    return replace(sessions, events={"fomc": np.array([f"2024-{d}" if len(d) == 5 else d for d in dates], "datetime64[D]")})


@pytest.mark.parametrize(
    ("offset", "dates"),
    [
        # Wednesday 10; Sunday 14, so Tuesday 16, for Monday is a holiday; Tuesday 16 itself, the same session
        (0, ["01-10", "01-16"]),
        (1, ["01-11", "01-17"]),
        (-1, ["01-09", "01-12"]),
        (-2, ["01-08", "01-11"]),
        (3, ["01-16", "01-19"]),
    ],
)
def test_golden_stored_events(offset, dates):
    assert decided(stored(offset), with_events("01-10", "01-14", "01-16"), 30) == dates


def test_golden_events_that_the_calendar_does_not_reach():
    # before its first date: nobody knows which session came first after it; after its last: not yet
    assert decided(stored(), with_events("2023-12-28", "01-03", "2025-02-03")) == ["01-03"]
    late = replace(with_events("01-03", "2023-12-29"), valid_from=np.datetime64("2023-12-28"))  # known: Monday is the first after Friday
    assert decided(stored(), late) == ["01-01", "01-03"]


@pytest.mark.parametrize("strategy", [stored(-2), weekly(0, -2), CalendarEvent(calendar_key="X", event_offset=-2)])
def test_sessions_before_an_event_that_may_yet_come_cannot_be_told(strategy):  # R65
    sessions = with_events("01-10", "02-05", sessions=JANUARY)
    end = len(sessions.dates) - 1
    decided(strategy, sessions, end - 2)
    for through in (end - 1, end):
        with pytest.raises(CalendarRangeError, match=r"calendar WEEKDAYS covers 2024-01-01\.\.") as told:
            decided(strategy, sessions, through)
        assert "2 session(s) before an event depends on later sessions" in str(told.value)


def test_the_end_of_a_week_that_is_not_known_is_told():  # R65
    sessions = replace(JANUARY.part(slice(0, 17)), valid_to=np.datetime64("2024-01-24"))  # through Wednesday 24
    with pytest.raises(CalendarRangeError, match="2024-01-28 is needed"):
        decided(weekly(4), sessions)
    assert decided(weekly(4), sessions, 15) == ["01-05", "01-12", "01-19"]


def test_an_event_type_that_there_is_not_is_told():
    with pytest.raises(NoSuchEvent, match="calendar WEEKDAYS has no event of type 'fomc'; it has: ecb, nfp"):
        decided(stored(), replace(HOLIDAYS, events={"nfp": np.array([], "datetime64[D]"), "ecb": np.array([], "datetime64[D]")}))
    with pytest.raises(NoSuchEvent, match="it has: none"):
        decided(stored(), HOLIDAYS)


def test_golden_market_open_is_the_first_valuation_time():
    # sessions 14:00 to 21:00, hourly: 15:00. Decided there, by the vector known there. A 10 -> 20 at 16:00 of 3 Jan
    opens = CalendarEvent(calendar_key="X", event="market_open")
    prices = {"A": [10.0] * 9 + [20.0] * 20, "B": [10.0] * 29}
    one = hand(opens, "01-01 21", prices, [(EVER, {"A": 0.5, "B": 0.5})], frequency="1h")
    built = everywhere(one, "01-04")
    # We 3 Jan 16:00 is bar 9: 1 + 7 (2 Jan) + 15:00 = 9 bars before it. Bought on 2 Jan; on 4 Jan 1.0 / 1.5 = 2/3, set back
    assert list(weights_after(built)) == ["01-02 15", "01-04 15"]
    assert built[0].trades.before[1] == near([2 / 3, 1 / 3])
    assert "01-01" not in closes(built)


def test_golden_market_open_of_an_event_with_lag():
    # event on Tuesday 9 January, lag 1: the first bar of Wednesday 10
    strategy = CalendarEvent(calendar_key="X", event="market_open", event_type="fomc", execution_lag=1)
    one = hand(strategy, "01-08 15", {"A": 10}, [(EVER, {"A": 0.5})], bars=28, frequency="1h", sessions=with_events("01-09", sessions=YEAR))
    assert weights_after(everywhere(one, "01-11")) == {"01-10 15": {"A": 0.5}}


def test_market_open_needs_intraday_prices():
    with pytest.raises(ValidationError, match="calendar_event trades at the open: portfolio_prices_frequency must be intraday"):
        hand(CalendarEvent(calendar_key="X", event="market_open"), "01-01", {"A": 10}, [(EVER, {"A": 0.5})])


def test_golden_market_close_of_a_weekly_schedule():
    # bought on Monday 8, the first Monday with a price; A doubles on 9 Jan, and on Tuesday 16 (Monday is a holiday) it is set back
    prices = {"A": [10.0] + [20.0] * 10, "B": [10.0] * 11}
    one = hand(weekly(0), "01-08", prices, [(EVER, {"A": 0.5, "B": 0.5})], sessions=HOLIDAYS)
    built = everywhere(one, "01-17")
    assert list(weights_after(built)) == ["01-08", "01-16"]
    assert closes(built)["01-17"] == near(1.5)
