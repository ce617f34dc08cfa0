"""InverseVolatility: small windows by hand, and pandas with its own rolling deviation."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from msm_core.signals import SIGNALS, InverseVolatility
from tests.contracts import API_PRICES, ASSETS, GONE, WEEKDAYS, ComputedSignalContract

BASE = {"kind": "inverse_volatility", "asset_list": ASSETS, "calendar_key": "WEEKDAYS", "price_source": API_PRICES, "window_sessions": 20}


def signal(**fields: Any) -> InverseVolatility:
    return InverseVolatility.model_validate(BASE | fields)


def weights(*prices: Sequence[float], window: int = 2) -> list[float]:
    """The vector at the last of a few prices per asset."""
    spec = signal(asset_list=[f"{i:02d}" for i in range(len(prices))], window_sessions=window)
    return spec.target_weights({"prices": np.array([prices], dtype=np.float64)})[0].tolist()


class TestContract(ComputedSignalContract):
    payload = BASE
    respellings = [
        BASE | {"asset_list": list(reversed(ASSETS))},
        BASE | {"window_sessions": 20.0, "emit_on": "every_session", "price_column": "close", "forward_fill": None},
        BASE | {"stale_after_sessions": None, "override_asset": None},
    ]
    others = [
        BASE | {"window_sessions": 21},
        BASE | {"asset_list": ASSETS[1:]},
        BASE | {"calendar_key": "XNYS"},
        BASE | {"price_column": "open"},
        BASE | {"emit_on": "month_end"},
        BASE | {"forward_fill": "P5D"},
        BASE | {"stale_after_sessions": 5},
        BASE | {"price_alignment_policy": {"missing": "hold"}},
        BASE | {"price_source": API_PRICES | {"time_index_meta_table_uid": "00000000-0000-0000-0000-000000000002"}},
        {name: value for name, value in BASE.items() if name != "window_sessions"} | {"kind": "momentum"},
    ]
    refused = [
        (BASE | {"window_sessions": 1}, "greater than or equal to 2"),
        (BASE | {"window_sessions": 2.5}, "valid integer"),
        (BASE | {"asset_list": []}, "at least 1 item"),
        (BASE | {"asset_list": ["A", "B", "A"]}, "names A more than once"),
        (BASE | {"emit_on": "sometimes"}, "every_session"),
        (BASE | {"forward_fill": 0}, "greater than"),
    ]

    def test_pandas_comes_to_the_same_vectors(self):
        vectors = self.emit(self.spec, None, self.last)
        bars = {a: pd.Series(s.values, s.times) for a, s in self.bars()["prices"].items()}
        bars[GONE] = bars[GONE][: pd.Timestamp(self.delisted[GONE]) + pd.Timedelta(days=1)]
        prices = pd.DataFrame(bars).reindex(self.sessions.closes)
        inverse = 1 / prices.pct_change(fill_method=None).rolling(20).std()
        expected = inverse.div(inverse.sum(axis=1), axis=0).fillna(0).iloc[20:]  # the first window is full at the 21st close
        assert vectors.times.tolist() == WEEKDAYS.closes[20:].tolist()
        np.testing.assert_allclose(vectors.weights, expected[list(vectors.assets)], rtol=1e-9)


def test_golden_two_returns():
    # A: +10 %, -10 %; B: +20 %, -20 %; C: +50 %, -50 %. The mean is 0, the deviation sqrt(2 r**2 / (2 - 1)) = r * sqrt(2).
    # inverse: 10 : 5 : 2, so 10/17, 5/17, 2/17
    np.testing.assert_allclose(weights([100, 110, 99], [50, 60, 48], [8, 12, 6]), [10 / 17, 5 / 17, 2 / 17], rtol=1e-12)


def test_golden_three_returns():
    # A: +50 %, 0, -50 %: mean 0, sum of squares 0.5, / (3 - 1) = 0.25, deviation 0.5
    # B: +100 %, 0, +50 %: mean 0.5, away 0.5, -0.5, 0: 0.5 / 2 = 0.25, deviation 0.5; a constant gain is no risk
    # C: +25 %, 0, -25 %: 0.125 / 2 = 0.0625, deviation 0.25. Inverse 2 : 2 : 4, exact in binary
    assert weights([2, 3, 3, 1.5], [1, 2, 2, 3], [4, 5, 5, 3.75], window=3) == [0.25, 0.25, 0.5]


def test_an_asset_whose_returns_do_not_vary_has_weight_0():
    assert weights([100, 100, 100], [50, 60, 48], [10, 10, 10]) == [0.0, 1.0, 0.0]
    assert weights([1, 2, 4], [50, 60, 48]) == [0.0, 1.0]  # doubled each time
    growth = [100 * 1.01**i for i in range(8)]
    assert 0 < np.diff(growth / np.roll(growth, 1) - 1)[1:].max() < 1e-15  # nothing but rounding
    assert weights(growth, [50, 60, 48, 50, 60, 48, 50, 60], window=7) == [0.0, 1.0]


def test_an_asset_without_a_full_window_has_weight_0():
    nan = float("nan")
    full = weights([100, 110, 99], [50, 60, 48])
    for partial in ([nan, 60, 48], [50, nan, 48], [50, 60, nan], [nan, nan, nan]):
        assert weights([100, 110, 99], partial, [50, 60, 48]) == [full[0], 0.0, full[1]]


def test_where_no_asset_is_left_nothing_is_emitted():
    assert np.isnan(weights([100, 100, 100], [50, float("nan"), 48])).all()


def test_returns_beyond_all_measure_leave_the_asset_out():
    assert weights([1e-300, 1e300, 1], [50, 60, 48]) == [0.0, 1.0]
    assert weights([1, 1e200, 1], [50, 60, 48]) == [0.0, 1.0]  # its square is not finite


def test_the_window_is_one_price_longer_than_its_returns():
    assert signal(window_sessions=60).history_sessions == 61
    assert SIGNALS.parse({**BASE, "window_sessions": 2}).history_sessions == 3
