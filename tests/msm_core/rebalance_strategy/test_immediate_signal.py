"""ImmediateSignal on sessions written down by hand.

New York around two year ends and a quarter end, weekdays without the exchange's holidays:
    2020-12-25 Christmas (Fri), 2021-01-01 New Year (Fri); 2024-03-29 Good Friday; 2024-12-25, 2025-01-01, 2025-01-09 (day of mourning).
Source: https://www.nyse.com/markets/hours-calendars
"""

from datetime import date

import numpy as np
import pytest

from msm_core.alignment import align
from msm_core.configuration import PortfolioConfiguration
from msm_core.construction import construct
from msm_core.errors import CalendarRangeError
from msm_core.frames import Series
from msm_core.rebalance_strategy import ImmediateSignal
from msm_core.sessions import Sessions
from msm_core.signals import Vectors
from tests.contracts import A_STRATEGY, RebalanceContract, nest

HOLIDAYS = ["2020-12-25", "2021-01-01", "2024-03-29", "2024-12-25", "2025-01-01", "2025-01-09"]
HOUR = np.timedelta64(1, "h")


def weekdays(first: str, last: str, known_through: str | None = None) -> Sessions:
    """Sessions 14:30 to 21:00 UTC of a calendar that knows the dates first..known_through (default: last)."""
    days = np.arange(np.datetime64(first, "D"), np.datetime64(last, "D") + 1)
    days = days[np.is_busday(days, holidays=HOLIDAYS)]
    midnights = days.astype("datetime64[us]")
    through = np.datetime64(known_through or last, "D")
    return Sessions("XNYS", days, midnights + 870 * np.timedelta64(1, "m"), midnights + 21 * HOUR, np.datetime64(first, "D"), through)


def always(first: str, last: str) -> Sessions:
    days = np.arange(np.datetime64(first, "D"), np.datetime64(last, "D") + 1)
    midnights = days.astype("datetime64[us]")
    return Sessions("24/7", days, midnights, midnights + 24 * HOUR, days[0], days[-1])


class TestContract(RebalanceContract):
    payload = A_STRATEGY
    respellings = [
        {**A_STRATEGY, "rebalance_on": "every_session"},
        {**A_STRATEGY, "execution_lag": 0},
        {**A_STRATEGY, "execution_lag": 0.0},
    ]
    others = [
        {**A_STRATEGY, "calendar_key": "24/7"},
        {**A_STRATEGY, "execution_lag": 1},
        *({**A_STRATEGY, "rebalance_on": on} for on in ("signal_change", "week_end", "month_end", "quarter_end")),
    ]
    refused = [
        ({"kind": "immediate_signal"}, "Field required"),  # R8: the calendar is never guessed
        ({**A_STRATEGY, "calendar_key": ""}, "at least 1 character"),
        ({**A_STRATEGY, "rebalance_on": "whenever"}, "Input should be 'every_session'"),
        ({**A_STRATEGY, "execution_lag": -1}, "greater than or equal to 0"),
        ({**A_STRATEGY, "execution_lag": 251}, "less than or equal to 250"),
        ({**A_STRATEGY, "execution_lag": 0.5}, "integer"),
    ]
    sessions = weekdays("2023-01-02", "2023-12-31")  # a Sunday

    def test_needs_no_volume(self):  # R37
        assert self.spec.liquidity_column is None


def decided(on: str, sessions: Sessions, through: int | None = None) -> list[str]:
    """Dates decided on when one target is valid throughout, and new at the first session only."""
    target = np.zeros(len(sessions.dates), int)
    changed = target != np.append(-1, target[:-1])
    through = len(target) - 1 if through is None else through
    decisions = ImmediateSignal(calendar_key="XNYS", rebalance_on=on).decisions(sessions, target, changed, through)
    return [str(day) for day in sessions.dates[: through + 1][decisions[: through + 1]]]


@pytest.mark.parametrize(
    ("on", "first", "last", "dates"),
    [
        # the week of 2020-12-28 (ISO 2020-W53) ends on Thursday, for Friday is New Year; the next on Friday 8 January
        ("week_end", "2020-12-21", "2021-01-10", ["2020-12-24", "2020-12-31", "2021-01-08"]),
        # the week of 2024-12-30 (ISO 2025-W01) holds both years: 31 December does not end it
        ("week_end", "2024-12-23", "2025-01-12", ["2024-12-27", "2025-01-03", "2025-01-10"]),
        ("week_end", "2024-03-18", "2024-04-07", ["2024-03-22", "2024-03-28", "2024-04-05"]),  # Good Friday
        (
            "month_end",
            "2024-01-29",
            "2024-04-30",
            ["2024-01-31", "2024-02-29", "2024-03-28", "2024-04-30"],
        ),  # leap year; 31 March is Easter
        ("month_end", "2020-11-16", "2021-01-31", ["2020-11-30", "2020-12-31", "2021-01-29"]),  # 31 January 2021 is a Sunday
        ("quarter_end", "2024-02-01", "2024-12-31", ["2024-03-28", "2024-06-28", "2024-09-30", "2024-12-31"]),  # 30 June is a Sunday
        ("quarter_end", "2020-12-01", "2021-03-31", ["2020-12-31", "2021-03-31"]),
        ("signal_change", "2024-12-23", "2024-12-31", ["2024-12-23"]),
        ("every_session", "2024-12-23", "2024-12-31", ["2024-12-23", "2024-12-24", "2024-12-26", "2024-12-27", "2024-12-30", "2024-12-31"]),
    ],
)
def test_rebalance_on(on, first, last, dates):
    assert decided(on, weekdays(first, last)) == dates


def test_weeks_that_never_close_end_on_sunday():
    # 2024-12-29 and 2025-01-05 are Sundays; the local date counts, though a 24/7 session closes at 00:00 of the next day
    assert decided("week_end", always("2024-12-26", "2025-01-05")) == ["2024-12-29", "2025-01-05"]
    assert decided("month_end", always("2024-12-26", "2025-01-31")) == ["2024-12-31", "2025-01-31"]


@pytest.mark.parametrize(
    ("on", "edge", "complete"),
    [
        # 2024-12-18 is a Wednesday: neither its week, nor month, nor quarter is over
        ("week_end", "2024-12-18", "2024-12-22"),
        ("month_end", "2024-12-18", "2024-12-31"),
        ("quarter_end", "2024-12-18", "2024-12-31"),
        # Friday 2024-11-29 is the last weekday of November, but a calendar that knows no later date cannot tell
        ("week_end", "2024-11-29", "2024-12-01"),
        ("month_end", "2024-11-29", "2024-11-30"),
        ("quarter_end", "2024-11-29", "2024-12-31"),
    ],
)
def test_period_end_at_the_edge_of_the_calendar(on, edge, complete):  # R65
    sessions = weekdays("2024-09-02", edge)
    with pytest.raises(CalendarRangeError, match=f"calendar XNYS covers 2024-09-02..{edge}, but {complete} is needed") as told:
        decided(on, sessions)
    assert told.value.facts["why"] == f"whether {edge} ends its {on.removesuffix('_end')} depends on later sessions"
    # a session earlier nothing is in doubt, and the edge itself is no answer yet
    assert edge not in decided(on, sessions, through=len(sessions.dates) - 2)
    # the same sessions, once the calendar knows that no session follows within the period
    assert decided(on, weekdays("2024-09-02", edge, known_through=complete))[-1] == edge


def test_nothing_in_doubt_for_rules_without_periods():
    assert decided("every_session", weekdays("2024-12-16", "2024-12-18"))[-1] == "2024-12-18"
    assert decided("signal_change", weekdays("2024-12-16", "2024-12-18")) == ["2024-12-16"]


def test_signal_change_is_where_the_vector_changed_and_is_valid():
    #           Mo  Tu  We  Th  Fr: the vector of Tuesday is no longer valid on Thursday, and valid again on Friday
    target = np.array([-1, 0, 0, -1, 0])
    changed = np.array([False, True, False, True, True])
    decisions = ImmediateSignal(calendar_key="X", rebalance_on="signal_change").decisions(
        weekdays("2024-01-08", "2024-01-12"), target, changed, 4
    )
    assert decisions.tolist() == [False, True, False, False, True]


# -- execution ----------------------------------------------------------------------------------------------------------------


def traded(on: str, lag: int, sessions: Sessions, end: str) -> list[str]:
    """Dates of the trades of a 30/70 portfolio whose two prices never move together, so that every event trades."""
    closes = sessions.closes
    steps = np.arange(len(closes), dtype=float)
    prices = {
        "A": Series(closes, 100 + steps, np.full(len(closes), np.nan)),
        "B": Series(closes, 50 + steps**2, np.full(len(closes), np.nan)),
    }
    configuration: PortfolioConfiguration = nest(
        {
            "kind": "fixed_weights",
            "asset_unique_identifier_weights": [{"unique_identifier": a, "weight": w} for a, w in (("A", 0.3), ("B", 0.7))],
        },
        {"kind": "immediate_signal", "calendar_key": "XNYS", "rebalance_on": on, "execution_lag": lag},
    )
    market = align(prices, ["A", "B"], sessions, closes, configuration.alignment, "prices", "close", "close")
    vectors = Vectors(np.array(["1970-01-01"], "datetime64[us]"), ("A", "B"), np.array([[0.3, 0.7]]))
    built = construct(configuration, market, vectors, None, np.datetime64(end, "us") + 21 * HOUR)
    return [] if built is None else [str(t.astype("datetime64[D]")) for t in built.bars.times[built.trades.rows]]


@pytest.mark.parametrize(
    ("on", "lag", "dates"),
    [
        # decided on 29 February (Thu) and 28 March (Thu; Good Friday follows)
        ("month_end", 0, ["2024-02-29", "2024-03-28"]),
        ("month_end", 1, ["2024-03-01", "2024-04-01"]),
        ("month_end", 3, ["2024-03-05", "2024-04-03"]),  # Fri 1, Mon 4, Tue 5 March; Mon 1, Tue 2, Wed 3 April
        ("quarter_end", 0, ["2024-03-28"]),
        ("quarter_end", 3, ["2024-04-03"]),
        ("signal_change", 0, ["2024-02-26"]),
        ("signal_change", 1, ["2024-02-27"]),
        ("signal_change", 3, ["2024-02-29"]),
    ],
)
def test_execution_lag_counts_sessions(on, lag, dates):
    assert traded(on, lag, weekdays("2024-02-26", "2024-04-30"), "2024-04-19") == dates


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_execution_lag_of_daily_decisions(lag):
    # Monday 26 February to Monday 4 March: six sessions, of which the first `lag` only wait
    sessions = ["2024-02-26", "2024-02-27", "2024-02-28", "2024-02-29", "2024-03-01", "2024-03-04"]
    assert traded("every_session", lag, weekdays("2024-02-26", "2024-03-31"), "2024-03-04") == sessions[lag:]


def test_a_decision_waits_for_its_session():
    # decided on Thursday 28 March; three sessions later is Wednesday 3 April
    assert traded("quarter_end", 3, weekdays("2024-03-01", "2024-04-30"), "2024-04-02") == []
    assert traded("quarter_end", 3, weekdays("2024-03-01", "2024-04-30"), "2024-04-03") == ["2024-04-03"]


def test_portfolio_at_the_edge_of_the_calendar():  # R65
    sessions = weekdays("2024-02-26", "2024-03-13")
    assert traded("month_end", 0, sessions, "2024-03-12") == ["2024-02-29"]
    with pytest.raises(CalendarRangeError, match="2024-03-31 is needed"):
        traded("month_end", 0, sessions, "2024-03-13")
    assert traded("every_session", 0, sessions, "2024-03-13")[-1] == str(date(2024, 3, 13))
