"""Threshold: the contract, and cases worked by hand."""

from typing import Any

import pytest

from msm_core.rebalance_strategy import Threshold
from tests.contracts import RebalanceContract
from tests.msm_core.rebalance_strategy.by_hand import EVER, closes, everywhere, hand, near, weights_after

BAND = {"kind": "threshold", "calendar_key": "NYC", "absolute_band": 0.01}


class TestContract(RebalanceContract):
    payload = BAND
    respellings = [{**BAND, "absolute_band": "0.010"}, {**BAND, "relative_band": None}, {**BAND, "rebalance_on": "every_session"}]
    others = [
        {"kind": "threshold", "calendar_key": "NYC", "relative_band": 0.1},
        {**BAND, "relative_band": 0.5},
        {**BAND, "rebalance_on": "signal_change"},
        {**BAND, "absolute_band": 0.0},
        {**BAND, "absolute_band": 0.03, "rebalance_on": "week_end", "execution_lag": 1},
    ]
    refused = [
        ({"kind": "threshold", "calendar_key": "NYC"}, "give absolute_band, relative_band or both"),
        ({**BAND, "absolute_band": -0.1}, "greater than or equal to 0"),
        ({**BAND, "relative_band": -0.1}, "greater than or equal to 0"),
        ({**BAND, "absolute_band": float("nan")}, "finite number"),
    ]


def banded(**options: Any) -> Threshold:
    return Threshold(**{"calendar_key": "X", **options})


def test_golden_absolute_band():
    # half and half at 0.99 (fee 1 %). A +10 %: 11/21 = 0.5238, out by 0.0238, within 0.03
    # A +21 %: 0.605 / 1.105 = 121/221 = 0.5475: out; turnover 2 x (121/221 - 1/2) = 21/221
    # value 0.99 x 1.105 x (1 - 0.01 x 21/221); then A +10 % from a half: x 1.05, within the band again
    one = hand(banded(absolute_band=0.03), "01-01", {"A": [100, 110, 121, 133.1], "B": [50] * 4}, [(EVER, {"A": 0.5, "B": 0.5})], fee=0.01)
    built = everywhere(one, "01-04")
    assert weights_after(built) == {"01-01": {"A": 0.5, "B": 0.5}, "01-03": {"A": 0.5, "B": 0.5}}
    assert built[0].trades.before[1] == near([121 / 221, 100 / 221])
    v = 0.99 * 1.105 * (1 - 0.01 * 21 / 221)
    assert closes(built) == near({"01-01": 0.99, "01-02": 0.99 * 1.05, "01-03": v, "01-04": v * 1.05})


@pytest.mark.parametrize(("band", "traded"), [(0.25, False), (0.2499, True)])
def test_golden_a_weight_at_the_edge_of_its_band_stays(band, traded):
    # held 0.5, 0.25 wanted: out by exactly 0.25; constant mix, so nothing drifts
    one = hand(
        banded(absolute_band=band), "01-01", {"A": [10, 10, 10]}, [(EVER, {"A": 0.5}), ("01-02", {"A": 0.25})], accounting="target"
    )  # fmt: skip
    assert weights_after(everywhere(one, "01-03")) == {"01-01": {"A": 0.5}, **({"01-02": {"A": 0.25}} if traded else {})}


def test_golden_relative_band():
    # A 0.1, B 0.9. A +22 %: 0.122 / 1.022 = 0.11937, 19.4 % above its target: stays. A +23 %: 0.123 / 1.023 = 0.12023, 20.2 %: out
    # measured against the target (0.1), not against what is held (16.8 %)
    one = hand(banded(relative_band=0.2), "01-01", {"A": [100, 122, 123], "B": [50] * 3}, [(EVER, {"A": 0.1, "B": 0.9})])
    built = everywhere(one, "01-03")
    assert weights_after(built) == {"01-01": {"A": 0.1, "B": 0.9}, "01-03": {"A": 0.1, "B": 0.9}}
    assert built[0].trades.before[1] == near([0.123 / 1.023, 0.9 / 1.023])


def test_golden_relative_band_of_a_short():
    # A -0.1 of 1.0: +30 %: value 1 - 0.03 = 0.97, weight -0.13 / 0.97 = -0.13402, 34 % of |target| away
    one = hand(banded(relative_band=0.3), "01-01", {"A": [100, 120, 130]}, [(EVER, {"A": -0.1})])  # +20 %: -0.12 / 0.98 = -0.1224, 22 %
    assert list(weights_after(everywhere(one, "01-03"))) == ["01-01", "01-03"]


@pytest.mark.parametrize(
    ("bands", "days"),
    [
        # 11/21 on 2 Jan: out by 0.0238 = 4.8 %; 121/221 on 3 Jan: 0.0475 = 9.5 %
        ({"absolute_band": 0.03, "relative_band": 0.2}, ["01-01", "01-03"]),  # the absolute one is left first
        ({"absolute_band": 0.3, "relative_band": 0.04}, ["01-01", "01-02", "01-03"]),  # the relative one, each day anew
        ({"absolute_band": 0.3, "relative_band": 0.2}, ["01-01"]),
        ({"absolute_band": 0.0}, ["01-01", "01-02", "01-03"]),
    ],
)
def test_golden_the_first_band_left_counts(bands, days):
    one = hand(banded(**bands), "01-01", {"A": [100, 110, 121], "B": [50] * 3}, [(EVER, {"A": 0.5, "B": 0.5})])
    assert list(weights_after(everywhere(one, "01-03"))) == days


def test_golden_an_asset_that_joins_or_leaves_is_out_of_its_band():
    # C joins with 0.001 on 2 Jan, and leaves on 3 Jan; each time the whole portfolio is set to its target
    vectors = [(EVER, {"A": 0.5, "B": 0.5}), ("01-02", {"A": 0.5, "B": 0.499, "C": 0.001}), ("01-03", {"A": 0.51, "B": 0.49})]
    one = hand(banded(absolute_band=0.2, relative_band=9.0), "01-01", {"A": [10] * 4, "B": [10] * 4, "C": [10] * 4}, vectors)
    assert weights_after(everywhere(one, "01-04")) == {
        "01-01": {"A": 0.5, "B": 0.5},
        "01-02": {"A": 0.5, "B": 0.499, "C": 0.001},
        "01-03": {"A": 0.51, "B": 0.49, "C": 0.0},
    }


def test_golden_a_target_of_nothing_is_acted_on():
    one = hand(banded(absolute_band=0.9), "01-01", {"A": [10] * 3}, [(EVER, {"A": 0.1}), ("01-02", {"A": 0.0})])
    assert weights_after(everywhere(one, "01-03")) == {"01-01": {"A": 0.1}, "01-02": {"A": 0.0}}


def test_golden_a_target_that_was_passed_over_is_compared_again():
    # the new target of 2 Jan is within the band; on 3 Jan A has moved +10 %: 0.55 / 1.05 = 11/21, out by 0.0438 of 0.48
    vectors = [(EVER, {"A": 0.5, "B": 0.5}), ("01-02", {"A": 0.48, "B": 0.52})]
    one = hand(banded(absolute_band=0.04), "01-01", {"A": [100, 100, 110], "B": [50] * 3}, vectors)
    assert weights_after(everywhere(one, "01-03")) == {"01-01": {"A": 0.5, "B": 0.5}, "01-03": {"A": 0.48, "B": 0.52}}


def test_golden_constant_mix_has_no_drift_to_be_out_by():
    """`target` accounting sets weights back by itself; only a new target can be out of the band."""
    one = hand(
        banded(absolute_band=0.001), "01-01", {"A": [100, 150, 220], "B": [50] * 3}, [(EVER, {"A": 0.5, "B": 0.5})], accounting="target"
    )
    assert list(weights_after(everywhere(one, "01-03"))) == ["01-01"]


def test_golden_only_decisions_look_at_the_band():
    # out of it since 2 Jan; week ends are Friday 5 and Friday 12
    prices = {"A": [100, 150, 150, 150, 150, 150, 160, 160, 160, 160], "B": [50] * 10}
    one = hand(banded(absolute_band=0.01, rebalance_on="week_end"), "01-01", prices, [(EVER, {"A": 0.5, "B": 0.5})])
    assert list(weights_after(everywhere(one, "01-12"))) == ["01-05", "01-12"]
