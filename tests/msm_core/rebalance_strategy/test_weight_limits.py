"""WeightLimits: bounds on targets, worked by hand."""

from typing import Any

import pytest
from pydantic import ValidationError

from msm_core.errors import WeightOutOfBounds
from msm_core.rebalance_strategy import ImmediateSignal, TimeWeighted, WeightLimits
from tests.msm_core.rebalance_strategy.by_hand import EVER, everywhere, hand, instant, near, weights_after

PRICES = {"A": [10] * 4, "B": [10] * 4, "C": [10] * 4}


def limited(*vectors: Any, accounting: Any = "drifted", **limits: Any) -> dict[str, dict[str, float]]:
    strategy = ImmediateSignal(calendar_key="X", rebalance_on="signal_change", limits=WeightLimits(**limits))
    return weights_after(everywhere(hand(strategy, "01-01", PRICES, vectors, accounting=accounting), "01-04"))


GOOD = (EVER, {"A": 0.5, "B": 0.3, "C": 0.2})


@pytest.mark.parametrize(
    ("limits", "vector", "told"),
    [
        ({"no_short": True}, {"A": 0.5, "B": -0.01}, r"weight of B wanted at 2024-01-02 21:00Z is -0.01, outside 0.0\.\.inf"),
        ({"minimum_weight": -0.1}, {"A": 0.5, "C": -0.2}, r"weight of C wanted at 2024-01-02 21:00Z is -0.2, outside -0.1\.\.inf"),
        ({"maximum_weight": 0.5}, {"A": 0.2, "B": 0.51}, r"weight of B wanted at 2024-01-02 21:00Z is 0.51, outside -inf\.\.0.5"),
        ({"maximum_total_weight": 1.0}, {"A": 0.5, "B": 0.75}, r"sum of weights wanted at 2024-01-02 21:00Z is 1.25, outside -inf\.\.1.0"),
        ({"minimum_total_weight": 0.9}, {"A": 0.5}, r"sum of weights wanted at 2024-01-02 21:00Z is 0.5, outside 0.9\.\.inf"),
        ({"no_short": True, "minimum_weight": -0.1}, {"A": -0.05}, r"weight of A wanted at 2024-01-02 21:00Z is -0.05, outside 0.0\.\.inf"),
    ],
)
def test_a_target_outside_fails_by_asset_time_and_value(limits, vector, told):
    with pytest.raises(WeightOutOfBounds, match="p: the " + told):
        limited(GOOD, ("01-02", vector), **limits)
    # a run that ends before has nothing to complain about
    strategy = ImmediateSignal(calendar_key="X", rebalance_on="signal_change", limits=WeightLimits(**limits))
    assert len(hand(strategy, "01-01", PRICES, [GOOD, ("01-02", vector)]).run(instant("01-01"))) == 1


@pytest.mark.parametrize(
    ("limits", "vector", "want"),
    [
        ({"maximum_weight": 0.4}, {"A": 0.5, "B": 0.3}, {"A": 0.4, "B": 0.3}),  # the rest becomes cash: it is not spread
        ({"no_short": True}, {"A": 0.5, "B": -0.3}, {"A": 0.5}),
        ({"minimum_weight": -0.1, "maximum_weight": 0.2}, {"A": 0.5, "B": -0.3, "C": 0.1}, {"A": 0.2, "B": -0.1, "C": 0.1}),
        ({"maximum_total_weight": 0.8}, {"A": 0.6, "B": 0.4}, {"A": 0.48, "B": 0.32}),  # x 0.8
        ({"maximum_weight": 0.5, "maximum_total_weight": 0.7}, {"A": 0.9, "B": 0.5}, {"A": 0.35, "B": 0.35}),  # 0.5 + 0.5, x 0.7
        ({"maximum_total_weight": 0.5}, {"A": 1.5, "B": -0.5}, {"A": 0.75, "B": -0.25}),  # the sum is 1: x 0.5, the short too
        ({"maximum_total_weight": 1.0}, {"A": 0.5, "B": 0.25}, {"A": 0.5, "B": 0.25}),
    ],
)
def test_golden_clip(limits, vector, want):
    assert limited((EVER, vector), violation="clip", **limits) == {"01-01": near(want)}


def test_a_sum_too_low_cannot_be_clipped():
    with pytest.raises(WeightOutOfBounds, match=r"sum of weights wanted at 2024-01-01 21:00Z is 0.4, outside 0.9\.\.inf"):
        limited((EVER, {"A": 0.9}), violation="clip", maximum_weight=0.4, minimum_total_weight=0.9)


@pytest.mark.parametrize("vector", [{"A": 0.3}, {"A": -0.2}])
def test_a_highest_sum_below_zero_is_nothing_that_scaling_can_reach(vector):
    """It would turn longs into shorts; and a sum of -0.2 is above -0.5 too."""
    with pytest.raises(WeightOutOfBounds, match="sum of weights"):
        limited((EVER, vector), violation="clip", maximum_total_weight=-0.5)
    assert limited((EVER, {"A": -0.6}), violation="clip", maximum_total_weight=-0.5) == {"01-01": {"A": -0.6}}


@pytest.mark.parametrize("violation", ["fail", "clip"])
def test_sums_are_compared_up_to_rounding(violation):
    # ten times 0.1, added up in order, is 0.9999999999999999; three times 0.1 is 0.30000000000000004
    names = [f"A{i}" for i in range(10)]
    limits = WeightLimits(minimum_total_weight=1.0, maximum_total_weight=1.0, violation=violation)
    strategy = ImmediateSignal(calendar_key="X", limits=limits)
    one = hand(strategy, "01-01", {a: [10, 11] for a in names}, [(EVER, dict.fromkeys(names, 0.1))])
    assert weights_after(everywhere(one, "01-01"))["01-01"] == near(dict.fromkeys(names, 0.1))
    assert limited((EVER, {"A": 0.1, "B": 0.1, "C": 0.1}), maximum_total_weight=0.3, violation=violation) == {
        "01-01": near({"A": 0.1, "B": 0.1, "C": 0.1})
    }


def test_limits_bind_targets_and_not_what_drifts():
    # A +50 %: 0.75 / 1.25 = 0.6 while no target is decided
    strategy = ImmediateSignal(calendar_key="X", rebalance_on="signal_change", limits=WeightLimits(maximum_weight=0.5))
    one = hand(strategy, "01-01", {"A": [10, 15], "B": [10, 10]}, [(EVER, {"A": 0.5, "B": 0.5})])
    assert list(weights_after(everywhere(one, "01-02"))) == ["01-01"]


def test_limits_of_an_order_that_takes_time():
    strategy = TimeWeighted(calendar_key="X", rebalance_on="signal_change", limits=WeightLimits(maximum_weight=0.35, violation="clip"))
    one = hand(strategy, "01-01 21", {"A": 10}, [("01-02 14", {"A": 0.7})], bars=20, frequency="1h", start_date=None)
    # decided at 15:00 of 2 Jan; 0.35 in the six hours to 21:00
    assert list(weights_after(everywhere(one, "01-03")).values())[-1] == {"A": 0.35}


@pytest.mark.parametrize(
    ("limits", "complaint"),
    [
        ({"minimum_weight": 0.1}, "must let it be 0"),
        ({"maximum_weight": -0.1}, "must let it be 0"),
        ({"minimum_weight": -0.1, "maximum_weight": -0.2}, "the lowest weight -0.1 is above the highest -0.2"),
        ({"minimum_total_weight": 1.0, "maximum_total_weight": 0.9}, "the lowest weight 1.0 is above the highest 0.9"),
        ({"violation": "ignore"}, "'fail' or 'clip'"),
        ({"maximum_weight": float("inf")}, "finite number"),
    ],
)
def test_refused(limits, complaint):
    with pytest.raises(ValidationError, match=complaint):
        WeightLimits(**limits)
