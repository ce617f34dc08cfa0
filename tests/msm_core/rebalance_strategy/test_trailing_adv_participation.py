"""TrailingADVParticipation: the contract, and cases worked by hand."""

from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

import numpy as np

from msm_core.rebalance_strategy import TrailingADVParticipation
from tests.contracts import RebalanceContract
from tests.msm_core.rebalance_strategy.by_hand import EVER, NONE, everywhere, hand, instant, left, near, weights_after
from tests.runs import Inputs

ADV = {"kind": "trailing_adv_participation", "calendar_key": "NYC", "lookback_sessions": 2, "max_bar_participation": 0.2}


class TestContract(RebalanceContract):
    payload = ADV
    respellings = [{**ADV, "lookback_sessions": 2.0, "max_daily_participation": 0.05}, {**ADV, "total_notional": 50000000.0}]
    others = [
        {**ADV, "rebalance_on": "signal_change", "max_daily_participation": 0.2},
        {**ADV, "lookback_sessions": 1, "max_daily_participation": 0.3, "total_notional": 20e6},
        {**ADV, "lookback_sessions": 3, "execution_lag": 1, "max_daily_participation": 0.1, "rebalance_on": "signal_change"},
        {**ADV, "max_daily_participation": 1.0, "rebalance_start": "10:00", "rebalance_end": "16:00"},
    ]
    refused = [
        ({**ADV, "lookback_sessions": 0}, "greater than or equal to 1"),
        ({**ADV, "lookback_sessions": 1001}, "less than or equal to 1000"),
        ({**ADV, "max_daily_participation": 0}, "greater than 0"),
        ({**ADV, "max_daily_participation": 2}, "less than or equal to 1"),
        ({**ADV, "max_bar_participation": 0}, "greater than 0"),
        ({**ADV, "total_notional": 0}, "greater than 0"),
    ]

    def test_needs_volume_and_history(self):
        assert (self.spec.liquidity_column, self.spec.history_sessions) == ("volume", 3)


def averaged(**options: Any) -> TrailingADVParticipation:
    """A portfolio worth 1000, averages of two sessions; a tenth of the average in a session, half of a bar."""
    return TrailingADVParticipation(
        **{
            "calendar_key": "X", "rebalance_on": "signal_change", "lookback_sessions": 2, "max_daily_participation": 0.1,
            "max_bar_participation": 0.5, "total_notional": 1000.0, **options,
        }
    )  # fmt: skip


def test_golden_average_needs_the_whole_look_back():
    # price 10, volumes 100, 300, 500, 100, 40: notionals 1000, 3000, 5000, 1000, 400
    # 1 and 2 Jan: no two sessions before. 3 Jan: (1000 + 3000) / 2 x 0.1 / 1000 = 0.2; 4 Jan: (3000 + 5000) / 2 -> 0.4, the rest to 0.55
    one = hand(
        averaged(), "01-01", {"A": 10}, [(EVER, {"A": 0.55})], bars=5, accounting="target", volumes={"A": [100, 300, 500, 100, 40]}
    )  # fmt: skip
    built = everywhere(one, "01-05")
    assert weights_after(built) == near({"01-03": {"A": 0.2}, "01-04": {"A": 0.55}})


def test_golden_the_bar_binds():
    # averages as above, but the bar of 3 Jan is 10 x 20 = 200: half of it is 0.1; that of 4 Jan 10 x 10 x 0.5 / 1000 = 0.05
    one = hand(
        averaged(), "01-01", {"A": 10}, [(EVER, {"A": 0.55})], bars=4, accounting="target", volumes={"A": [100, 300, 20, 10]}
    )  # fmt: skip
    assert weights_after(everywhere(one, "01-04")) == near({"01-03": {"A": 0.1}, "01-04": {"A": 0.15}})


def test_golden_a_session_whose_volume_is_unknown_breaks_the_look_back_and_one_without_volume_does_not():
    # A: 2 Jan unknown, so 3 and 4 Jan have no whole look-back; 5 Jan: (3000 + 1000) / 2 -> 0.2
    # B: 2 Jan zero: 3 Jan (1000 + 0) / 2 -> 0.05; 4 Jan (0 + 3000) / 2 -> 0.15; 5 Jan (3000 + 1000) / 2 -> 0.2
    one = hand(
        averaged(), "01-01", {"A": 10, "B": 10}, [(EVER, {"A": 0.5, "B": 0.5})], bars=5, accounting="target",
        volumes={"A": [100, NONE, 300, 100, 900], "B": [100, 0, 300, 100, 900]},
    )  # fmt: skip
    want = {"01-03": {"B": 0.05}, "01-04": {"B": 0.2}, "01-05": {"A": 0.2, "B": 0.4}}
    assert weights_after(everywhere(one, "01-05")) == near(want)


def hourly(volumes: float | Sequence[float], vectors: Sequence[tuple[str, Mapping[str, float]]], **options: Any) -> Inputs:
    """Hours of 1 Jan 15:00 on; 7 of a session, 10 x 30 each: 2100 a session, of which a tenth is 0.21; a bar takes 0.15."""
    return hand(averaged(**options), "01-01 15", {"A": 10}, vectors, bars=40, frequency="1h", accounting="target", volumes={"A": volumes})


def test_golden_daily_cap_over_the_bars_of_a_session():
    # 3 Jan, the first with two sessions before it: 15:00 0.15, 16:00 the 0.06 that are left of 0.21, then nothing; 4 Jan the same
    # 5 Jan: the rest
    built = everywhere(hourly(30, [("01-02", {"A": 0.5})]), "01-05")
    assert weights_after(built) == near(
        {
            "01-03 15": {"A": 0.15},
            "01-03 16": {"A": 0.21},
            "01-04 15": {"A": 0.36},
            "01-04 16": {"A": 0.42},
            "01-05 15": {"A": 0.5},
        }
    )
    assert left(everywhere(hourly(30, [("01-02", {"A": 0.5})]), "01-03 18")) == {"A": 0.5}


def test_golden_a_newer_order_of_the_session_keeps_what_was_used():
    # 15:00 buys 0.15 of A. At 16:00 the target is 0: 0.06 may still be sold today, 0.09 wait for 4 Jan
    built = everywhere(hourly(30, [("01-02", {"A": 0.5}), ("01-03 16", {"A": 0.0})]), "01-05")
    assert weights_after(built) == near({"01-03 15": {"A": 0.15}, "01-03 16": {"A": 0.09}, "01-04 15": {"A": 0.0}})


def test_golden_what_was_used_survives_an_order_that_is_done():
    # 15:00 0.1 is bought and all is done; at 17:00 0.25 is wanted: 0.11 are left of the session's 0.21, the rest on 4 Jan
    one = hourly(30, [("01-02", {"A": 0.1}), ("01-03 17", {"A": 0.25})])
    assert weights_after(everywhere(one, "01-05")) == near({"01-03 15": {"A": 0.1}, "01-03 17": {"A": 0.21}, "01-04 15": {"A": 0.25}})
    (built,) = one.run(instant("01-03 16"))
    assert built.trades.order is not None  # nothing to do, something to remember
    assert (np.isnan(built.trades.order.goals).all(), built.trades.order.used.tolist()) == (True, near([0.1]))
    (closed,) = hourly(30, [("01-02", {"A": 0.1})]).run(instant("01-03"))
    assert closed.trades.order is None  # the session is over


def test_golden_start_date_and_the_history_before_it():
    # bars since 1 Jan, start on 3 Jan: its average is there although nothing was held
    one = hand(
        averaged(), "01-01", {"A": 10}, [(EVER, {"A": 0.55})], bars=5, accounting="target", volumes={"A": [100, 300, 500, 100, 40]},
        start_date=date(2024, 1, 3),
    )  # fmt: skip
    assert weights_after(everywhere(one, "01-05")) == near({"01-03": {"A": 0.2}, "01-04": {"A": 0.55}})
