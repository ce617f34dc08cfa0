"""LiquidityConstrained: the contract, and cases worked by hand."""

from typing import Any

from msm_core.rebalance_strategy import LiquidityConstrained
from tests.contracts import RebalanceContract
from tests.msm_core.rebalance_strategy.by_hand import EVER, NONE, everywhere, hand, left, near, weights_after

LIQUIDITY = {"kind": "liquidity_constrained", "calendar_key": "NYC"}


class TestContract(RebalanceContract):
    payload = LIQUIDITY
    respellings = [
        {**LIQUIDITY, "available_liquidity_column": "available_notional", "available_liquidity_unit": "notional"},
        {**LIQUIDITY, "max_liquidity_fraction": 1, "total_notional": 50e6},
    ]
    others = [
        {**LIQUIDITY, "rebalance_on": "signal_change"},
        {**LIQUIDITY, "available_liquidity_unit": "quantity", "max_liquidity_fraction": 0.02},
        {**LIQUIDITY, "max_liquidity_fraction": 0.5, "execution_lag": 1, "rebalance_on": "signal_change"},
        {**LIQUIDITY, "available_liquidity_column": "depth"},
        {**LIQUIDITY, "total_notional": 100e6, "rebalance_start": "11:00", "rebalance_end": "16:00", "rebalance_on": "signal_change"},
    ]
    refused = [
        ({**LIQUIDITY, "max_liquidity_fraction": 0}, "greater than 0"),
        ({**LIQUIDITY, "max_liquidity_fraction": 1.5}, "less than or equal to 1"),
        ({**LIQUIDITY, "total_notional": -1}, "greater than 0"),
        ({**LIQUIDITY, "available_liquidity_unit": "shares"}, "'notional' or 'quantity'"),
        ({**LIQUIDITY, "available_liquidity_column": ""}, "at least 1 character"),
    ]

    def test_needs_its_column(self):
        assert self.spec.liquidity_column == "available_notional"
        assert self.family.parse({**LIQUIDITY, "available_liquidity_column": "depth"}).liquidity_column == "depth"


def constrained(**options: Any) -> LiquidityConstrained:
    return LiquidityConstrained(**{"calendar_key": "X", "rebalance_on": "signal_change", "total_notional": 1000.0, **options})


def test_golden_notional():
    # half of the notional, of a portfolio of 1000: 400 is 0.2, 200 is 0.1, 0 and unknown and negative are nothing, 2000 is the rest
    one = hand(
        constrained(max_liquidity_fraction=0.5), "01-01", {"A": 10, "B": 5}, [(EVER, {"A": 0.5, "B": -0.1})], bars=6, accounting="target",
        liquidity={"A": [400, 200, 0, NONE, -100, 2000], "B": [100, 60, 1000, 9, 9, 9]},
    )  # fmt: skip
    built = everywhere(one, "01-08")
    assert weights_after(built) == near(
        {
            "01-01": {"A": 0.2, "B": -0.05},
            "01-02": {"A": 0.3, "B": -0.08},
            "01-03": {"A": 0.3, "B": -0.1},
            "01-08": {"A": 0.5, "B": -0.1},
        }
    )
    assert left(everywhere(one, "01-05")) == {"A": 0.5}


def test_golden_quantity_is_worth_its_price():
    # 20 units at 10 are 200: 0.2 of 1000; 10 at 12 are 120; 50 at 12 are 600, more than is left. Volume plays no part
    one = hand(
        constrained(available_liquidity_unit="quantity"), "01-01", {"A": [10, 12, 12]}, [(EVER, {"A": 0.5})], accounting="target",
        liquidity={"A": [20, 10, 50]}, volumes={"A": [0, 0, 0]},
    )  # fmt: skip
    assert weights_after(everywhere(one, "01-03")) == near({"01-01": {"A": 0.2}, "01-02": {"A": 0.32}, "01-03": {"A": 0.5}})


def test_golden_hourly_over_two_sessions():
    # 100 an hour are 0.1; only bars until 17:00 count: 15, 16 and 17 of each day, 0.5 = 3 x 0.1 on 2 Jan, 2 x 0.1 on 3 Jan
    one = hand(
        constrained(rebalance_end="17:00"), "01-01 21", {"A": 10}, [(EVER, {"A": 0.5})], bars=20, frequency="1h", accounting="target",
        liquidity={"A": 100},
    )  # fmt: skip
    hours = ["01-02 15", "01-02 16", "01-02 17", "01-03 15", "01-03 16"]
    assert weights_after(everywhere(one, "01-03")) == near({hour: {"A": 0.1 * (k + 1)} for k, hour in enumerate(hours)})
