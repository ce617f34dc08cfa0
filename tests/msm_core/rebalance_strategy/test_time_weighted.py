"""TimeWeighted: the contract, and cases worked by hand."""

from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

import numpy as np
import pytest

from msm_core.errors import EmptyWindow
from msm_core.rebalance_strategy import TimeWeighted
from msm_core.sessions import Sessions
from tests.contracts import RebalanceContract
from tests.msm_core.rebalance_strategy.by_hand import EVER, closes, everywhere, hand, instant, left, near, weights_after, with_early_close
from tests.runs import Inputs

TIME = {"kind": "time_weighted", "calendar_key": "NYC"}


class TestContract(RebalanceContract):
    payload = {**TIME, "rebalance_on": "signal_change"}
    respellings = [{**payload, "rebalance_start": "09:00"}, {**payload, "execution_lag": 0}]
    others = [
        TIME,
        {**TIME, "execution_lag": 1},
        {**TIME, "execution_lag": 1, "rebalance_on": "signal_change", "rebalance_start": "11:00", "rebalance_end": "16:00"},
        {**TIME, "rebalance_on": "signal_change", "rebalance_start": "10:00"},
        {**TIME, "execution_lag": 2, "rebalance_on": "week_end"},
    ]
    refused = [
        ({**TIME, "rebalance_start": "16:00", "rebalance_end": "9:30"}, "rebalance_start 16:00 is not before rebalance_end 9:30"),
        ({**TIME, "rebalance_end": "noon"}, "'noon' is no time of day"),
    ]

    def test_needs_no_volume(self):
        assert self.spec.liquidity_column is None


def evenly(**options: Any) -> TimeWeighted:
    return TimeWeighted(
        **{"calendar_key": "X", "rebalance_on": "signal_change", "rebalance_start": "14:00", "rebalance_end": "18:00", **options}
    )


def hourly(strategy: TimeWeighted, vectors: Sequence[tuple[str, Mapping[str, float]]], first: str = "01-01 21", **options: Any) -> Inputs:
    """Prices that stand still, sessions 14:00 to 21:00: bars at 15:00 .. 21:00."""
    return hand(strategy, first, {"A": 10, "B": 20}, vectors, bars=30, frequency="1h", **options)


def test_golden_linear_over_the_daily_window():
    # decided on 1 Jan at 21:00, after the window, so it begins on 2 Jan at 14:00: a quarter of 4 hours at 15, 16, 17 and 18
    built = everywhere(hourly(evenly(), [(EVER, {"A": 0.8, "B": -0.4})]), "01-03")
    assert weights_after(built) == near(
        {
            "01-02 15": {"A": 0.2, "B": -0.1},
            "01-02 16": {"A": 0.4, "B": -0.2},
            "01-02 17": {"A": 0.6, "B": -0.3},
            "01-02 18": {"A": 0.8, "B": -0.4},
        }
    )
    assert weights_after(built)["01-02 18"] == {"A": 0.8, "B": -0.4}  # exactly
    assert left(built) == {}


@pytest.mark.parametrize("lag", [1, 2])
def test_golden_lag_counts_sessions_from_the_decision(lag):
    # decided on Mo 1 Jan at 21:00: 1 = Tu 2, 2 = We 3; whatever lies outside the window, it begins at the open
    built = everywhere(hourly(evenly(execution_lag=lag), [(EVER, {"A": 0.8})]), "01-03")
    assert weights_after(built) == near({f"01-0{1 + lag} {15 + k}": {"A": 0.2 * (k + 1)} for k in range(4)})


def test_golden_a_lagged_order_decided_within_a_session_begins_with_its_window():
    # decided on 2 Jan at 16:00, lag 1: 3 Jan, all of its window
    built = everywhere(hourly(evenly(execution_lag=1), [("01-02 16", {"A": 0.8})], start_date=date(2024, 1, 2), first="01-01 15"), "01-04")
    assert weights_after(built) == near({f"01-03 {15 + k}": {"A": 0.2 * (k + 1)} for k in range(4)})


@pytest.mark.parametrize("emitted", ["01-02 16", "2024-01-02T15:30", "2024-01-02T15:00:00.000001"])
def test_golden_an_order_decided_within_the_window_takes_what_is_left_of_it(emitted):
    # decided at 16:00: nothing at once, half of the two hours at 17:00, all at 18:00
    built = everywhere(hourly(evenly(), [(emitted, {"A": 0.8})], start_date=date(2024, 1, 2), first="01-01 15"), "01-03")
    assert weights_after(built) == near({"01-02 17": {"A": 0.4}, "01-02 18": {"A": 0.8}})


@pytest.mark.parametrize(
    ("emitted", "want"),
    [
        ("01-02 18", {"01-02 18": {"A": 0.8}}),  # at the last bar of the window there is no time left: at once
        ("01-02 19", {f"01-03 {15 + k}": {"A": 0.2 * (k + 1)} for k in range(4)}),  # after it: the next session
    ],
)
def test_golden_an_order_decided_at_the_end_of_the_window(emitted, want):
    built = everywhere(hourly(evenly(), [(emitted, {"A": 0.8})], start_date=date(2024, 1, 2), first="01-01 15"), "01-03")
    assert weights_after(built) == near(want)


def test_golden_the_window_is_that_part_of_it_that_lies_in_the_session():
    # 9:00 to 23:00 of a session from 14:00 to 21:00: 7 bars, a seventh each
    built = everywhere(hourly(evenly(rebalance_start="9:00", rebalance_end="23:00", execution_lag=1), [(EVER, {"A": 0.7})]), "01-02")
    assert weights_after(built) == near({("01-02 " + str(15 + k)).removesuffix(" 21"): {"A": 0.1 * (k + 1)} for k in range(7)})


def test_golden_a_window_that_starts_between_bars():
    # 14:30 to 18:10: bars 15, 16, 17 and 18; the last bar in the window ends it: 0.5, 1.5, 2.5 and 3.5 hours of 3.5
    built = everywhere(hourly(evenly(rebalance_start="14:30", rebalance_end="18:10"), [(EVER, {"A": 0.7})]), "01-02")
    assert weights_after(built) == near({f"01-02 {15 + k}": {"A": 0.1 + 0.2 * k} for k in range(4)})


def test_golden_early_close():
    # the session of 2 Jan ends at 17:00, within the window: a third at 15, 16 and 17
    built = everywhere(hourly(evenly(), [(EVER, {"A": 0.9})], sessions=with_early_close("01-02", 17)), "01-03")
    assert weights_after(built) == near({f"01-02 {15 + k}": {"A": 0.3 * (k + 1)} for k in range(3)})


@pytest.mark.parametrize("hour", [15, 16, 17])
def test_golden_a_run_cut_within_a_session_knows_when_the_session_ends(hour):
    """From the calendar: no bar after the cut has been read."""
    one = hourly(evenly(), [(EVER, {"A": 0.8})])
    (built,) = one.run(instant(f"01-02 {hour}"))
    assert weights_after([built]) == near({f"01-02 {15 + k}": {"A": 0.2 * (k + 1)} for k in range(hour - 14)})
    assert left([built]) == {"A": 0.8}
    assert built.trades.order is not None
    assert built.trades.order.active_from == instant("01-01")


def test_golden_a_newer_target_begins_anew():
    # 15:00 a quarter of 0.8; at 16:00 the target becomes 0: nothing at 16:00, half of 0.2 is sold by 17:00, the rest by 18:00
    built = everywhere(hourly(evenly(), [(EVER, {"A": 0.8}), ("01-02 16", {"A": 0.0})]), "01-03")
    assert weights_after(built) == near({"01-02 15": {"A": 0.2}, "01-02 17": {"A": 0.1}, "01-02 18": {"A": 0.0}})


def test_golden_drift_within_the_window():
    # A 10, 11 (16:00), 11 ..: 15:00 0.2; 16:00 growth 1.02, before 0.22 / 1.02 = 11/51, a third of the gap to 0.8 is due
    # 17:00 half of what is left, 18:00 the rest; the value only moves with A: 1.02
    prices = {"A": [10.0] * 2 + [11.0] * 20}
    built = everywhere(hand(evenly(), "01-01", prices, [(EVER, {"A": 0.8})], frequency="1h"), "01-02")
    at_16 = 11 / 51 + (0.8 - 11 / 51) / 3
    want = {"01-02 15": 0.2, "01-02 16": at_16, "01-02 17": (at_16 + 0.8) / 2, "01-02 18": 0.8}
    assert weights_after(built) == near({time: {"A": weight} for time, weight in want.items()})
    assert closes(built)["01-02"] == near(1.02)


@pytest.mark.parametrize(("lag", "first"), [(0, "01-01"), (1, "01-02")])
def test_golden_daily_prices_have_one_bar_and_so_all_is_done_at_it(lag, first):
    strategy = evenly(rebalance_start="9:00", rebalance_end="23:00", execution_lag=lag)
    built = everywhere(hand(strategy, "01-01", {"A": 10}, [(EVER, {"A": 0.8})], bars=3), "01-03")
    assert weights_after(built) == {first: {"A": 0.8}}


def test_golden_orders_of_every_session_are_decided_at_its_close():
    # lag 0 and a window that reaches the close: the decision has no time left, so it is as if ImmediateSignal had traded
    built = everywhere(hourly(evenly(rebalance_on="every_session", rebalance_end="21:00"), [(EVER, {"A": 0.8})]), "01-03")
    assert weights_after(built) == {"01-01": {"A": 0.8}}


def test_a_session_without_a_bar_in_the_window_waits():
    # the session of 2 Jan ends at 15:00, before the window begins
    strategy = evenly(rebalance_start="16:00")
    one = hourly(strategy, [(EVER, {"A": 0.8})], sessions=with_early_close("01-02", 15))
    assert weights_after(everywhere(one, "01-03")) == near({"01-03 17": {"A": 0.4}, "01-03 18": {"A": 0.8}})


def around_the_clock() -> Sessions:
    days = np.arange(np.datetime64("2024-01-01"), np.datetime64("2024-02-01"))
    midnights = days.astype("datetime64[us]")
    return Sessions("24/7", days, midnights, midnights + np.timedelta64(24, "h"), days[0], days[-1])


def test_golden_a_session_that_ends_at_midnight_ends_at_24_00():
    # 06:00, 12:00, 18:00 and 24:00; the window is 12:00 to 24:00: half of it is over at 18:00, all at midnight. Lag 1
    strategy = evenly(rebalance_start="12:00", rebalance_end="24:00", execution_lag=1)
    one = hand(strategy, "2024-01-02T00:00", {"A": 10}, [(EVER, {"A": 0.8})], bars=8, frequency="6h", sessions=around_the_clock())
    built = everywhere(one, "2024-01-03T12:00")
    assert weights_after(built) == near({"01-02 18": {"A": 0.4}, "01-03 00": {"A": 0.8}})


def test_daily_prices_of_a_calendar_without_a_close_lie_outside_the_default_window():
    """They are stamped 24:00; the window ends at 23:00. That is told, with the remedy, and never waited for."""
    strategy = evenly(rebalance_start="9:00", rebalance_end="23:00")
    one = hand(strategy, "2024-01-02T00:00", {"A": 10}, [(EVER, {"A": 0.8})], bars=8, sessions=around_the_clock())
    with pytest.raises(EmptyWindow, match=r"time_weighted: no valuation time of calendar 24/7 lies in 9:00\.\.23:00"):
        one.run(instant("2024-01-05T00:00"))
    late = evenly(rebalance_start="9:00", rebalance_end="24:00")
    one = hand(late, "2024-01-02T00:00", {"A": 10}, [(EVER, {"A": 0.8})], bars=8, sessions=around_the_clock())
    assert weights_after(everywhere(one, "2024-01-05T00:00")) == {"01-02 00": {"A": 0.8}}
