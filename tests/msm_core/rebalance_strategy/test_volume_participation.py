"""VolumeParticipation: the contract, and cases worked by hand."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import pytest

from msm_core.errors import EmptyWindow, InvalidPrice
from msm_core.rebalance_strategy import VolumeParticipation
from tests.contracts import RebalanceContract
from tests.msm_core.rebalance_strategy.by_hand import (
    EVER,
    NONE,
    closes,
    everywhere,
    hand,
    instant,
    left,
    near,
    weights_after,
    with_early_close,
)
from tests.runs import YEAR

VOLUME = {"kind": "volume_participation", "calendar_key": "NYC", "max_percent_volume_in_bar": 0.2}


class TestContract(RebalanceContract):
    payload = VOLUME
    respellings = [
        {**VOLUME, "rebalance_start": "09:00", "rebalance_end": "23:00", "total_notional": 50_000_000},
        {**VOLUME, "max_percent_volume_in_bar": "0.2", "rebalance_start": "9:00"},
    ]
    others = [
        {**VOLUME, "rebalance_on": "signal_change"},
        {**VOLUME, "rebalance_on": "signal_change", "execution_lag": 1, "max_percent_volume_in_bar": 0.05},
        {**VOLUME, "execution_lag": 2, "rebalance_on": "week_end", "rebalance_start": "10:00", "rebalance_end": "16:00"},
        {**VOLUME, "total_notional": 20e6, "rebalance_end": "12:30", "rebalance_on": "signal_change", "calendar_key": "OTHER"},
        {**VOLUME, "limits": {"maximum_weight": 0.15, "violation": "clip"}},
    ]
    refused = [
        ({"kind": "volume_participation"}, "Field required"),
        ({**VOLUME, "max_percent_volume_in_bar": 0}, "greater than 0"),
        ({**VOLUME, "max_percent_volume_in_bar": 1.01}, "less than or equal to 1"),
        ({**VOLUME, "total_notional": 0}, "greater than 0"),
        ({**VOLUME, "total_notional": float("inf")}, "finite number"),
        ({**VOLUME, "rebalance_start": "9"}, "'9' is no time of day such as 9:30 or 24:00"),
        ({**VOLUME, "rebalance_start": "24:30"}, "no time of day"),
        ({**VOLUME, "rebalance_end": "25:00"}, "no time of day"),
        ({**VOLUME, "rebalance_end": "12:60"}, "no time of day"),
        ({**VOLUME, "rebalance_start": "12:00", "rebalance_end": "12:00"}, "rebalance_start 12:00 is not before rebalance_end 12:00"),
        ({**VOLUME, "rebalance_start": "23:30"}, "is not before"),
        ({**VOLUME, "execution_lag": -1}, "greater than or equal to 0"),
    ]

    def test_needs_volume(self):  # R38
        assert self.spec.liquidity_column == "volume"


def volume(**options: Any) -> VolumeParticipation:
    """10 % of a bar; a portfolio worth 1000."""
    return VolumeParticipation(
        **{"calendar_key": "X", "rebalance_on": "signal_change", "max_percent_volume_in_bar": 0.1, "total_notional": 1000.0, **options}
    )


def test_golden_capacity_binds_over_several_bars():
    # a unit of volume at 10 is 10 x 0.1 / 1000 = 0.001 of weight
    # A wants 0.5: 0.1, 0.2, no volume, volume unknown, 0.3 of which 0.2 is needed: 0.1, 0.3, -, -, 0.5
    # B wants -0.25: 0.05, 0.1, 0.05, 0.04, 0.02 of the last 0.01 is needed: -0.05, -0.15, -0.2, -0.24, -0.25
    one = hand(
        volume(), "01-01", {"A": 10, "B": 10}, [(EVER, {"A": 0.5, "B": -0.25})], bars=7, accounting="target",
        volumes={"A": [100, 200, 0, NONE, 300, 900, 900], "B": [50, 100, 50, 40, 20, 900, 900]},
    )  # fmt: skip
    built = everywhere(one, "01-09")
    assert weights_after(built) == near(
        {
            "01-01": {"A": 0.1, "B": -0.05},
            "01-02": {"A": 0.3, "B": -0.15},
            "01-03": {"A": 0.3, "B": -0.2},
            "01-04": {"A": 0.3, "B": -0.24},
            "01-05": {"A": 0.5, "B": -0.25},
        }
    )
    assert left(built) == {}
    assert weights_after(built)["01-05"] == {"A": 0.5, "B": -0.25}  # what is done is exactly the target


@pytest.mark.parametrize("seed", range(20))
def test_golden_original_formula(seed):
    """w = w0 + diff * min(1, cumsum(price * volume * pct) / (|diff| * notional)) while prices do not move weights (`target` accounting)."""
    rng = np.random.default_rng(seed)
    names = [f"A{i}" for i in range(9)]
    target, volumes = rng.normal(0, 0.2, 9), rng.uniform(0, 30, (12, 9))
    prices = rng.uniform(5, 50, 9) * rng.uniform(0.98, 1.02, (12, 9))
    volumes[rng.random((12, 9)) < 0.1] = 0.0
    one = hand(
        volume(), "01-01", dict(zip(names, prices.T.tolist(), strict=True)), [(EVER, dict(zip(names, target.tolist(), strict=True)))],
        accounting="target", volumes=dict(zip(names, volumes.T.tolist(), strict=True)),
    )  # fmt: skip
    filled = np.cumsum(prices * volumes * 0.1, axis=0) / (np.abs(target) * 1000.0)
    want = target * np.minimum(1, filled)
    got = weights_after(everywhere(one, "01-16"))
    for row, day in enumerate(YEAR.dates[:12]):
        if (vector := got.get(str(day)[5:])) is not None:
            assert [vector.get(name, 0.0) for name in names] == pytest.approx(want[row].tolist(), rel=1e-12)
        else:
            assert want[row] == pytest.approx(want[row - 1], rel=1e-12)


def test_golden_a_newer_target_supersedes():
    # 0.1 a bar. A 0 -> 0.5: 0.1, 0.2; then the target is 0.05: 0.1, 0.05; B from then on 0.2: 0.1, 0.2
    one = hand(
        volume(), "01-01", {"A": 10, "B": 10}, [(EVER, {"A": 0.5}), ("01-03", {"A": 0.05, "B": 0.2})], bars=7, accounting="target",
        volumes={"A": [100] * 7, "B": [100] * 7},
    )  # fmt: skip
    built = everywhere(one, "01-09")
    assert weights_after(built) == near(
        {
            "01-01": {"A": 0.1},
            "01-02": {"A": 0.2},
            "01-03": {"A": 0.1, "B": 0.1},
            "01-04": {"A": 0.05, "B": 0.2},
        }
    )
    assert weights_after(built)["01-04"] == {"A": 0.05, "B": 0.2}
    assert left(everywhere(one, "01-02")) == {"A": 0.5}  # the next night goes on
    assert left(everywhere(one, "01-03")) == {"A": 0.05, "B": 0.2}


def test_golden_drift_fee_and_what_is_left():
    # fee 1 %. 1 Jan: A 0 -> 0.2 of 1.0 (200 units at 10); value 1 - 0.01 x 0.2 = 0.998
    # 2 Jan: A +10 %: growth 1.02, weight before 0.22 / 1.02 = 11/51; 100 units at 11 are 0.11; value 0.998 x 1.02 x (1 - 0.0011)
    # 3 Jan: A back to 10, -1/11: w = 11/51 + 0.11; growth 1 - w/11; before w x (10/11) / growth; no volume
    # 4 Jan: still at 10; 10 000 units: the rest at once; fee on 1 - before
    one = hand(volume(), "01-01", {"A": [10, 11, 10, 10]}, [(EVER, {"A": 1.0})], volumes={"A": [200, 100, 0, 10_000]}, fee=0.01)
    w = 11 / 51 + 0.11
    before = w * (10 / 11) / (1 - w / 11)
    v2 = 0.998 * 1.02 * (1 - 0.01 * 0.11)
    v3 = v2 * (1 - w / 11)
    built = everywhere(one, "01-04")
    assert weights_after(built) == near({"01-01": {"A": 0.2}, "01-02": {"A": w}, "01-04": {"A": 1.0}})
    assert closes(built) == near({"01-01": 0.998, "01-02": v2, "01-03": v3, "01-04": v3 * (1 - 0.01 * (1 - before))})
    assert built[0].trades.before[:, 0] == near([0, 11 / 51, before])
    assert left(everywhere(one, "01-03")) == {"A": 1.0}


def test_golden_a_done_part_drifts_while_another_is_still_traded():
    # A is done on 1 Jan: 0.5. 2 Jan: A +20 %: growth 1.1, before 0.6 / 1.1 = 6/11, and it stays; B gets 0.1 more: 0.1 / 1.1 + 0.1
    one = hand(
        volume(), "01-01", {"A": [10, 12], "B": [10, 10]}, [(EVER, {"A": 0.5, "B": 0.5})], volumes={"A": [500, 900], "B": [100, 100]}
    )
    assert weights_after(everywhere(one, "01-02")) == near({"01-01": {"A": 0.5, "B": 0.1}, "01-02": {"A": 6 / 11, "B": 0.1 / 1.1 + 0.1}})


def test_golden_every_session_trades_against_drift():
    # as above, but decided anew at every close: A goes back to 0.5
    one = hand(
        volume(rebalance_on="every_session"), "01-01", {"A": [10, 12], "B": [10, 10]}, [(EVER, {"A": 0.5, "B": 0.5})],
        volumes={"A": [500, 900], "B": [100, 100]},
    )  # fmt: skip
    assert weights_after(everywhere(one, "01-02")) == near({"01-01": {"A": 0.5, "B": 0.1}, "01-02": {"A": 0.5, "B": 0.1 / 1.1 + 0.1}})


def test_golden_bars_outside_the_daily_window_are_not_traded_at():
    # decided on 1 Jan at the close (21:00), outside 15:00 to 18:00; of 2 Jan the bars 16, 17 and 18 count; the one at 15:00 does not
    one = hand(
        volume(rebalance_start="15:00", rebalance_end="18:00"), "01-01 20", {"A": 10}, [(EVER, {"A": 0.5})], bars=20, frequency="1h",
        accounting="target", volumes={"A": 100},
    )  # fmt: skip
    assert weights_after(everywhere(one, "01-03 17")) == near(
        {"01-02 16": {"A": 0.1}, "01-02 17": {"A": 0.2}, "01-02 18": {"A": 0.3}, "01-03 16": {"A": 0.4}, "01-03 17": {"A": 0.5}}
    )


def test_golden_a_bar_is_traded_against_once():
    """A price may be held; its volume is not there a second time."""
    one = hand(
        volume(), "01-01", {"A": 10}, [(EVER, {"A": 0.5})], bars=5, accounting="target", volumes={"A": 100}, staleness=timedelta(days=4)
    )
    bar = one.series["A"]
    kept = np.array([True, False, False, True, True])  # Mo 1, Th 4, Fr 5
    one = replace(one, series={"A": bar.kept(kept)})
    assert weights_after(everywhere(one, "01-05")) == near({"01-01": {"A": 0.1}, "01-04": {"A": 0.2}, "01-05": {"A": 0.3}})


def test_a_window_without_valuation_times_is_told():
    one = hand(volume(rebalance_end="20:00"), "01-01", {"A": 10}, [(EVER, {"A": 0.5})], bars=5, volumes={"A": 100})
    with pytest.raises(EmptyWindow, match=r"volume_participation: no valuation time of calendar WEEKDAYS lies in 9:00\.\.20:00") as told:
        one.run(instant("01-05"))
    assert "1260 minutes after midnight" in str(told.value)


def test_a_night_of_short_sessions_only_is_no_empty_window():
    """Only the whole calendar can say that nothing would ever trade."""
    one = hand(
        volume(rebalance_start="18:00", rebalance_end="20:00"), "01-01 18", {"A": 10}, [(EVER, {"A": 0.5})], bars=15, frequency="1h",
        accounting="target", volumes={"A": 100}, sessions=with_early_close("01-02", 17),
    )  # fmt: skip
    want = {"01-03 19": {"A": 0.1}, "01-03 20": {"A": 0.2}}
    assert weights_after(everywhere(one, "01-03")) == near(want)
    nights = one.run(instant("01-01"), instant("01-02 17"), instant("01-03"))
    assert weights_after(nights) == near(want)


def test_what_is_missing_is_told_by_its_name():
    """B is held and has no price on 3 Jan; A, which comes first, has none either, and nobody holds it: it was wanted long ago."""
    vectors = [(EVER, {"A": 1.0}), ("2023-12-29T21:00", {"B": 0.5})]
    one = hand(volume(), "01-01", {"A": [10, 10, 0.0], "B": [10, 10, NONE]}, vectors, volumes={"B": [100] * 3})
    with pytest.raises(InvalidPrice, match="p: close of B at 2024-01-03 21:00Z is nan"):
        one.run(instant("01-03"))


def test_golden_an_order_goes_on_though_the_signal_has_moved_on():
    # decided on Friday 5 for A and B; B has no volume until Thursday 11, when 0.2 of 0.3 are bought
    # the vector of Monday 8 knows no B, but the next decision is on Friday 12: B is sold
    vectors = [(EVER, {"A": 0.1, "B": 0.3}), ("01-08", {"A": 0.1})]
    volumes = {"A": [900] * 6, "B": [0, 0, 0, 0, 200, 900]}
    one = hand(
        volume(rebalance_on="week_end"), "01-05", {"A": 10, "B": 10}, vectors, bars=6, accounting="target", volumes=volumes
    )  # fmt: skip
    want = {"01-05": {"A": 0.1}, "01-11": {"A": 0.1, "B": 0.2}, "01-12": {"A": 0.1, "B": 0.0}}
    assert weights_after(everywhere(one, "01-12")) == near(want)
