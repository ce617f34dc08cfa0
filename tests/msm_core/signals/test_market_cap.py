"""MarketCap: few sessions by hand, and pandas with its own rolling medians and exponential weights."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from msm_core.frames import Floats
from msm_core.signals import MarketCap, VolatilityControl
from msm_core.signals.base import Request
from tests.contracts import API_PRICES, ASSETS, GAPPY, GONE, ComputedSignalContract

CAPS = API_PRICES | {"time_index_meta_table_uid": "00000000-0000-0000-0000-000000000009"}
MINIMAL = {"kind": "market_cap", "asset_list": ASSETS, "calendar_key": "WEEKDAYS", "price_source": API_PRICES, "market_cap_source": CAPS}
BASE = MINIMAL | {"rolling_atvr_volume_windows": (5, 20), "frequency_trading_percent": 0.88}
CONTROLLED = BASE | {"volatility_control": {"target_volatility": 0.12, "window_sessions": 40}}
NAN = float("nan")


class Traded(ComputedSignalContract):
    warm_up = 1  # what there is of a window counts

    def numbers(self, request: Request) -> Floats:
        """Volumes of some 5 units with zeros, capitalisations of some million: ratios on both sides of the minimum."""
        if request.name == "prices":
            return super().numbers(request)
        rng = np.random.default_rng(3)
        shape = len(request.identifiers), len(self.times)
        if request.name == "volume":
            return np.where(rng.random(shape) < 0.05, 0, rng.uniform(2, 12, shape))
        return super().numbers(request) * rng.uniform(5e3, 15e3, (shape[0], 1))


class TestContract(Traded):
    payload = BASE
    respellings = [
        BASE | {"rolling_atvr_volume_windows": [20, 5]},
        BASE | {"rolling_atvr_volume_windows": [20, 5, 20]},
        BASE | {"minimum_atvr_ratio": 0.1, "min_number_of_assets": 3, "num_top_assets": None, "volatility_control": None},
    ]
    others = [
        MINIMAL,
        BASE | {"rolling_atvr_volume_windows": (5,)},
        BASE | {"market_cap_source": API_PRICES},
        BASE | {"market_cap_column": "capitalisation"},
        BASE | {"volume_column": "turnover"},
        BASE | {"minimum_atvr_ratio": 0.2},
        BASE | {"frequency_trading_percent": 0.5},
        BASE | {"min_number_of_assets": 4},
        BASE | {"num_top_assets": 5},
        BASE | {"volatility_control": {}},
        BASE | {"volatility_control": {"target_volatility": 0.2}},
        BASE | {"volatility_control": {"ewm_span": 22}},
        BASE | {"volatility_control": {"ann_factor": 365}},
        BASE | {"volatility_control": {"window_sessions": 100}},
    ]
    refused = [
        (BASE | {"asset_list": ["A", "B"]}, "names 2 assets, fewer than min_number_of_assets 3"),
        (BASE | {"rolling_atvr_volume_windows": []}, "at least 1 item"),
        (BASE | {"rolling_atvr_volume_windows": [0, 5]}, "greater than or equal to 1"),
        (BASE | {"frequency_trading_percent": 1.1}, "less than or equal to 1"),
        (BASE | {"minimum_atvr_ratio": -0.1}, "greater than or equal to 0"),
        (BASE | {"num_top_assets": 0}, "greater than or equal to 1"),
        (BASE | {"volatility_control": {"target_volatility": 0}}, "greater than 0"),
        (BASE | {"volatility_control": {"ewm_span": 1}}, "greater than or equal to 2"),
        (BASE | {"volatility_control": {"span": 21}}, "Extra inputs"),
    ]

    def by_pandas(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Weights before any volatility control, of every session, and prices."""
        panels = {}
        for name, series in self.bars().items():
            columns = {a: pd.Series(s.values, s.times) for a, s in series.items()}
            columns[GONE] = columns[GONE][: pd.Timestamp(self.delisted[GONE]) + pd.Timedelta(days=1)]
            panels[name] = pd.DataFrame(columns).reindex(self.sessions.closes)
        prices, volume, caps = panels["prices"], panels["volume"], panels["market_cap"]
        dollars = prices * volume
        liquid = dollars.notna() & caps.notna()
        for window in (5, 20):
            liquid &= dollars.rolling(window, min_periods=1).median() * 252 / caps >= 0.1
        liquid &= (volume > 0).astype(float).where(volume.notna()).rolling(20, min_periods=1).mean() > 0.88
        weights = caps.where(liquid, 0)
        weights = weights.div(weights.sum(axis=1), axis=0)[liquid.sum(axis=1) >= 3]
        return weights, prices

    def test_pandas_comes_to_the_same_vectors(self):
        vectors, (expected, prices) = self.emit(self.spec, None, self.last), self.by_pandas()
        share = (expected > 0).mean(axis=None)
        assert 0.2 < share < 0.9  # the filters let some through and some not
        assert vectors.times.tolist() == expected.index.tolist()
        control = self.spec.volatility_control
        scale = np.ones(len(expected))
        if control:
            returns = prices.pct_change(fill_method=None)
            for i, (time, row) in enumerate(expected.iterrows()):
                held = returns.loc[:time, row.index[row > 0]].iloc[-control.window_sessions :]
                realised = (held * row[row > 0]).sum(axis=1, min_count=1).ewm(span=control.ewm_span, adjust=True).std().iloc[-1]
                scale[i] = min(1, control.target_volatility / (realised * np.sqrt(control.ann_factor))) if realised > 0 else 1
            assert 0.2 < (scale < 1).mean() < 0.95
        np.testing.assert_allclose(vectors.weights, expected[list(vectors.assets)].mul(scale, axis=0), rtol=1e-9)


class TestVolatilityControl(TestContract):
    payload = CONTROLLED
    respellings = [BASE | {"volatility_control": {"window_sessions": 40, "target_volatility": 0.12, "ann_factor": 252.0}}]
    others = [BASE, BASE | {"volatility_control": {}}]


class TestHeldPrices(Traded):
    """Prices and capitalisations may be a few days old; a volume counts once, in its own session."""

    payload = BASE | {"price_alignment_policy": {"maximum_staleness": "P6D"}, "rolling_atvr_volume_windows": (1,)}
    respellings = []
    others = [BASE]
    refused = []

    def test_an_asset_without_a_bar_has_no_weight_however_old_a_price_may_be(self):
        vectors = self.emit(self.spec, None, self.last)
        gaps = ~np.isin(self.sessions.closes, self.bars()["volume"][GAPPY].times)
        assert gaps.any()
        assert not vectors.weights[np.isin(vectors.times, self.sessions.closes[gaps]), vectors.assets.index(GAPPY)].any()


class TestTopAssets(Traded):
    payload = CONTROLLED | {"num_top_assets": 4, "min_number_of_assets": 1}
    respellings = []
    others = [BASE, CONTROLLED]
    refused = []


# -- by hand: three sessions, windows of 1 and 3 ---------------------------------------------------------------------------------


def weights(prices: Any, volume: Any, caps: Any, **fields: Any) -> list[float]:
    """The vector at the last session; one list per asset, a number for all sessions alike. Any ratio of 0.1 or more is liquid."""
    length = max(len(row) for panel in (prices, volume, caps) for row in panel if isinstance(row, list))
    names = [f"{i:02d}" for i in range(len(prices))]
    options = {"asset_list": names, "rolling_atvr_volume_windows": (1, length), "frequency_trading_percent": 0, "min_number_of_assets": 1}
    spec = MarketCap.model_validate(MINIMAL | options | fields)
    panels = {"prices": prices, "volume": volume, "market_cap": caps}
    windows = {
        name: np.array([[row if isinstance(row, list) else [row] * length for row in panel]], float) for name, panel in panels.items()
    }
    return spec.target_weights(windows)[0].tolist()


def test_golden_weights_are_parts_of_the_capitalisation_at_the_session():
    # 300 + 100 + 400 = 800; what it was before is no matter
    caps = [[900, 1, 300], [1, 900, 100], [400, 400, 400]]
    assert weights([1, 1, 1], [9, 9, 9], caps) == [0.375, 0.125, 0.5]
    assert weights([1, 1, 1], [9, 9, 9], caps, num_top_assets=2) == [300 / 700, 0.0, 400 / 700]
    assert weights([1, 1, 1], [9, 9, 9], [[1, 1, 5]] * 3, num_top_assets=2) == [0.5, 0.5, 0.0]  # equal: first in bytewise order


def test_golden_every_window_must_reach_the_ratio():
    # capitalisation 2520, so ATVR = median dollar volume * 252 / 2520 = median / 10; the minimum 0.1 is a median of 1
    # 00: 1, 1, 1: both windows 1. 01: 9, 9, 0.9: last 0.9. 02: 0.5, 0.5, 9: three sessions 0.5. 03: price 2 * volume 0.5, 9, 1/2
    prices, caps = [1, 1, 1, [2, 2, 2]], [2520.0] * 4
    volume = [[1, 1, 1], [9, 9, 0.9], [0.5, 0.5, 9], [0.5, 9, 0.5]]
    assert weights(prices, volume, caps) == [0.5, 0.0, 0.0, 0.5]
    assert weights(prices, volume, caps, minimum_atvr_ratio=0.09) == [1 / 3, 1 / 3, 0.0, 1 / 3]
    assert weights(prices, volume, caps, rolling_atvr_volume_windows=[1]) == [1 / 3, 0.0, 1 / 3, 1 / 3]


def test_golden_missing_dollar_volumes_are_left_out_of_the_median():
    caps = [2520.0] * 4
    # 00: (0.8, 1.2) -> 1.0 reaches; 01: (0.8, 1.0) -> 0.9 does not; as zeros or filled forward both would be otherwise
    # 02: a price is missing in the middle, (0.8, 1.2); 03: one number is a window
    volume = [[0.8, NAN, 1.2], [0.8, NAN, 1.0], [0.8, 9, 1.2], [NAN, NAN, 1.0]]
    assert weights([1, 1, [1, NAN, 1], 1], volume, caps) == [1 / 3, 0.0, 1 / 3, 1 / 3]


def test_golden_the_share_of_sessions_that_traded():
    # ten sessions: 00 traded in 9 of 10; 01 in 8 of 10; 02 in 8 of the 8 that are known; 03 in 8 of 9, 0.889
    ones = [9.0] * 8
    volume = [[0.0, *ones, 9.0], [0.0, 0.0, *ones], [NAN, NAN, *ones], [NAN, 0.0, *ones]]
    options = {"frequency_trading_percent": 0.9, "rolling_atvr_volume_windows": [1, 10]}
    assert weights([1] * 4, volume, [1] * 4, **options) == [0.5, 0.0, 0.5, 0.0]
    assert weights([1] * 4, volume, [1] * 4, **options | {"frequency_trading_percent": 0.88}) == [1 / 3, 0.0, 1 / 3, 1 / 3]
    assert weights([1] * 4, volume, [1] * 4, **options | {"rolling_atvr_volume_windows": [1, 8]}) == [0.25] * 4  # the longest only


@pytest.mark.parametrize("panel", ["prices", "volume", "caps"])
def test_an_asset_needs_price_volume_and_capitalisation_at_the_session(panel):
    numbers: dict[str, list[Any]] = {"prices": [1, 1, 1], "volume": [9, 9, 9], "caps": [[5, 5, 5], 5, 5]}
    assert weights(**numbers) == [1 / 3, 1 / 3, 1 / 3]
    numbers[panel][1] = [7, 7, NAN]
    assert weights(**numbers) == [0.5, 0.0, 0.5]
    assert weights(**numbers, rolling_atvr_volume_windows=[3]) == [0.5, 0.0, 0.5]  # a median of the sessions before is not enough
    numbers[panel][1] = [NAN, NAN, 5]
    assert weights(**numbers) == [1 / 3, 1 / 3, 1 / 3]


def test_too_few_liquid_assets_emit_nothing():
    volume = [9, 9, [9, 9, 0]]
    assert weights([1] * 3, volume, [1] * 3, min_number_of_assets=2) == [0.5, 0.5, 0.0]
    assert np.isnan(weights([1] * 3, volume, [1] * 3, min_number_of_assets=3)).all()
    assert np.isnan(weights([1] * 3, [[9, 9, 0]] * 3, [1] * 3)).all()
    assert weights([1] * 3, volume, [1] * 3, min_number_of_assets=2, num_top_assets=1) == [1.0, 0.0, 0.0]  # liquid ones are counted


def test_golden_volatility_control():
    # span 3: alpha 0.5, weights 1, 0.5 of the newest two returns. 00: +10 %, then -10 %; 01: 0, 0; half each: +5 %, -5 %.
    # mean = (0.5 * 5 - 5) / 1.5 = -5/3 %; away 20/3 and -10/3; (0.5 * 400/9 + 100/9) / 1.5 = 200/9; debias 2.25 / (2.25 - 1.25) = 2.25
    # variance 50 (of %): deviation sqrt(50) % = 7.0711 %, times sqrt(4) = 14.142 %; target 7.0711 % halves the weights
    prices, control = [[100, 110, 99], 50], {"ewm_span": 3, "ann_factor": 4, "window_sessions": 2}
    target = {"target_volatility": 0.5**0.5 / 10}
    np.testing.assert_allclose(weights(prices, [9, 9], [1, 1], volatility_control=control | target), [0.25, 0.25], rtol=1e-12)
    assert weights(prices, [9, 9], [1, 1], volatility_control=control | {"target_volatility": 0.15}) == [0.5, 0.5]  # never up


def test_volatility_that_is_0_or_unknown_scales_nothing():
    control = {"volatility_control": {"target_volatility": 1e-9, "window_sessions": 3}}
    assert weights([[5, 5, 5, 5], 1], [9, 9], [1, 1], **control) == [0.5, 0.5]
    assert weights([[NAN, NAN, 5, 6], [NAN, NAN, NAN, 1]], [9, 9], [1, 1], **control) == [0.5, 0.5]  # one return has no deviation
    # the third is no part of it: its returns do not make the others' zeros, of which the deviation would be known
    prices, volume = [[NAN, NAN, 5, 6], [NAN, NAN, NAN, 1], [1, 2, 1, 2]], [9, 9, [9, 9, 9, 0]]
    assert weights(prices, volume, [1, 1, 1], **control, rolling_atvr_volume_windows=[1]) == [0.5, 0.5, 0.0]
    assert sum(weights([[NAN, 9, 5, 6], [NAN, NAN, NAN, 1]], [9, 9], [1, 1], **control)) < 1e-6


def test_volatility_is_that_of_pandas_with_an_asset_that_was_listed_late():
    rng = np.random.default_rng(5)
    prices = np.cumprod(1 + 0.03 * rng.standard_normal((9, 60)), axis=1)
    prices[4, :30], prices[5, 40] = NAN, NAN
    prices[:, :10] = NAN  # nobody: such returns are no zeros
    window = {"window_sessions": 59, "target_volatility": 0.05}
    scaled = weights(prices.tolist(), [99] * 9, [1] * 9, volatility_control=window)
    returns = pd.DataFrame(prices.T).pct_change(fill_method=None)
    realised = (returns / 9).sum(axis=1, min_count=1).ewm(span=21, adjust=True).std().iloc[-1] * 252**0.5
    np.testing.assert_allclose(scaled, [0.05 / realised / 9] * 9, rtol=1e-11)
    half = (returns / 9).sum(axis=1, min_count=1).tail(20).ewm(span=21, adjust=True).std().iloc[-1] * 252**0.5
    shorter = weights(prices.tolist(), [99] * 9, [1] * 9, volatility_control=window | {"window_sessions": 20})
    np.testing.assert_allclose(shorter, [0.05 / half / 9] * 9, rtol=1e-11)
    assert abs(half / realised - 1) > 1e-3


def test_defaults_and_the_length_of_history():
    spec = MarketCap.model_validate(MINIMAL)
    assert (spec.minimum_atvr_ratio, spec.rolling_atvr_volume_windows, spec.frequency_trading_percent) == (0.1, (60, 360), 0.9)
    assert (spec.min_number_of_assets, spec.num_top_assets, spec.volatility_control, spec.history_sessions) == (3, None, None, 360)
    control = VolatilityControl()
    assert (control.target_volatility, control.ewm_span, control.ann_factor, control.window_sessions) == (0.1, 21, 252, 252)
    long = MarketCap.model_validate(MINIMAL | {"volatility_control": {"window_sessions": 400}})
    assert long.history_sessions == 401
    assert [(r.name, r.column, r.zero_allowed) for r in spec.requests] == [
        ("prices", "close", False),
        ("volume", "volume", True),
        ("market_cap", "market_cap", False),
    ]
