"""Momentum: few assets by hand, and pandas with ranks of its own."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest

from msm_core.signals import Momentum
from tests.contracts import API_PRICES, ASSETS, GONE, ComputedSignalContract

BASE = {
    "kind": "momentum",
    "asset_list": ASSETS,
    "calendar_key": "WEEKDAYS",
    "price_source": API_PRICES,
    "lookback_sessions": 30,
    "skip_sessions": 4,
    "top_assets": 4,
}
NAN = float("nan")


def weights(*prices: Sequence[float], **fields: Any) -> list[float]:
    """The vector at the last of a few prices per asset; assets 00, 01, ... in that order."""
    names = [f"{i:02d}" for i in range(len(prices))]
    spec = Momentum.model_validate(BASE | {"asset_list": names, "lookback_sessions": len(prices[0]) - 1, "skip_sessions": 1} | fields)
    return spec.target_weights({"prices": np.array([prices], dtype=np.float64)})[0].tolist()


class TestContract(ComputedSignalContract):
    payload = BASE
    respellings = [
        BASE | {"asset_list": list(reversed(ASSETS))},
        BASE | {"long_short": False, "price_column": "close", "override_asset": None},
    ]
    others = [
        BASE | {"lookback_sessions": 31},
        BASE | {"skip_sessions": 0},
        BASE | {"top_assets": 3},
        BASE | {"long_short": True},
        BASE | {"emit_on": "week_end"},
    ]
    refused = [
        (BASE | {"skip_sessions": 30}, "skip_sessions 30 must be less than lookback_sessions 30"),
        (BASE | {"lookback_sessions": 21, "skip_sessions": 21}, "must be less"),
        (BASE | {"lookback_sessions": 0}, "greater than or equal to 1"),
        (BASE | {"skip_sessions": -1}, "greater than or equal to 0"),
        (BASE | {"top_assets": 0}, "greater than or equal to 1"),
    ]

    def test_pandas_comes_to_the_same_vectors(self):
        vectors = self.emit(self.family.parse(self.payload | {"long_short": False}), None, self.last)
        bars = {a: pd.Series(s.values, s.times) for a, s in self.bars()["prices"].items()}
        bars[GONE] = bars[GONE][: pd.Timestamp(self.delisted[GONE]) + pd.Timedelta(days=1)]
        prices = pd.DataFrame(bars).reindex(self.sessions.closes)
        rank = (prices.shift(4) / prices.shift(30)).where(prices.notna()).rank(axis=1, ascending=False, method="first")
        top, bottom = rank <= 4, rank.gt(rank.max(axis=1) - 4, axis=0)
        chosen = rank.notna().any(axis=1)
        assert vectors.times.tolist() == self.sessions.closes[30:].tolist() == self.sessions.closes[chosen].tolist()
        assert np.array_equal(vectors.weights, (top * 0.25)[chosen][list(vectors.assets)])
        both = self.emit(self.family.parse(self.payload | {"long_short": True}), None, self.last)
        assert np.array_equal(both.weights, (top * 0.25 - bottom * 0.25)[chosen][list(vectors.assets)])


class TestLongShort(TestContract):
    payload = BASE | {"long_short": True}
    respellings = [payload | {"asset_list": list(reversed(ASSETS))}]
    others = [BASE, payload | {"top_assets": 3}]


class TestWithoutSkip(TestContract):
    payload = BASE | {"skip_sessions": 0, "lookback_sessions": 1}
    respellings = []
    others = [BASE]

    def test_pandas_comes_to_the_same_vectors(self):
        vectors = self.emit(self.spec, None, self.last)
        closes = self.sessions.closes.tolist()
        for row in (0, 40, 150, 380):
            now, before = closes[row + 1], closes[row]
            prices = {a: dict(zip(s.times.tolist(), s.values, strict=True)) for a, s in self.bars()["prices"].items()}
            if row > len(closes) * 3 // 4:
                del prices[GONE]
            gains = {a: p[now] / p[before] for a, p in prices.items() if now in p and before in p}
            best = sorted(gains, key=lambda a: -gains[a])[:4]
            assert dict(zip(vectors.assets, vectors.weights[row], strict=True)) == {a: 0.25 if a in best else 0.0 for a in vectors.assets}


def test_golden_scores_end_at_the_skip_and_start_at_the_lookback():
    # lookback 3, skip 1: third price over the first. 00: 120/100 = +20 %, 01: +50 %, 02: -10 %, 03: +30 %. The second and the last
    # price are not looked at: 00 would win with them.
    prices = [100, 900, 120, 900], [10, 1, 15, 1], [100, 100, 90, 500], [10, 10, 13, 10]
    assert weights(*prices, top_assets=2) == [0.0, 0.5, 0.0, 0.5]
    assert weights(*prices, top_assets=3) == [1 / 3, 1 / 3, 0.0, 1 / 3]
    assert weights(*prices, top_assets=1, long_short=True) == [0.0, 1.0, -1.0, 0.0]
    assert weights(*prices, top_assets=2, long_short=True) == [-0.5, 0.5, -0.5, 0.5]


def test_fewer_eligible_assets_than_asked_for_share_the_whole():
    prices = [1, 1, 2, 2], [1, 1, 3, 3], [1, 1, NAN, 1]
    assert weights(*prices, top_assets=10) == [0.5, 0.5, 0.0]
    assert weights(*prices, top_assets=10, long_short=True) == [-1.0, 1.0, 0.0]  # 2 // 2 = 1
    five = [[1, 1, rise, 1] for rise in (5, 1, 4, 2, 3)]
    assert weights(*five, top_assets=3, long_short=True) == [0.5, -0.5, 0.5, -0.5, 0.0]  # 5 // 2 = 2; the middle one is in neither


def test_equal_scores_go_to_the_asset_that_comes_first():
    same = [[1, 1, 2, 2]] * 4
    assert weights(*same, top_assets=2) == [0.5, 0.5, 0.0, 0.0]
    assert weights(*same, top_assets=1, long_short=True) == [1.0, -1.0, 0.0, 0.0]  # first of those that are left, never both
    assert weights(*same, top_assets=2, long_short=True) == [0.5, 0.5, -0.5, -0.5]
    mixed = [1, 1, 3, 1], [1, 1, 2, 1], [1, 1, 3, 1], [1, 1, 2, 1]
    assert weights(*mixed, top_assets=1, long_short=True) == [1.0, -1.0, 0.0, 0.0]


@pytest.mark.parametrize("unknown", [0, 2, 3])  # at the lookback, at the skip, now
def test_an_asset_needs_both_prices_and_one_at_the_session_itself(unknown):
    best = [1.0, 1.0, 9.0, 9.0]
    best[unknown] = NAN
    assert weights([1, 1, 2, 2], best, [1, 1, 3, 3], top_assets=1) == [0.0, 0.0, 1.0]
    assert weights([1, 1, 2, 2], best, [1, 1, 3, 3], top_assets=1, long_short=True) == [-1.0, 0.0, 1.0]


def test_a_price_between_is_not_needed():
    assert weights([1, 1, 2, 2], [1, NAN, 9, 9], top_assets=1) == [0.0, 1.0]


def test_where_nobody_is_eligible_nothing_is_emitted():
    assert np.isnan(weights([1, 1, NAN, 2], [NAN, 1, 1, 2])).all()
    assert np.isnan(weights([1, 1, NAN, 2], [1, 1, 1, 2], long_short=True)).all()  # one alone cannot be long and short
    assert weights([1, 1, NAN, 2], [1, 1, 1, 2]) == [0.0, 1.0]


def test_defaults():
    spec = Momentum.model_validate({key: BASE[key] for key in ("asset_list", "calendar_key", "price_source")})
    assert (spec.lookback_sessions, spec.skip_sessions, spec.top_assets, spec.long_short, spec.history_sessions) == (
        252,
        21,
        10,
        False,
        253,
    )
