"""EqualWeights: 1 / N, worked by hand for N = 1, 3, 4."""

from datetime import UTC, datetime

import numpy as np
import pytest

from msm_core.signals import EqualWeights
from tests.contracts import SignalContract

BASE = {"kind": "equal_weights", "asset_list": ["AAPL", "MSFT", "TSLA"], "effective_from": "2020-01-01T00:00:00Z"}


class TestContract(SignalContract):
    payload = BASE
    respellings = [
        BASE | {"asset_list": ["TSLA", "AAPL", "MSFT"]},
        BASE | {"asset_list": ("MSFT", "TSLA", "AAPL")},
        BASE | {"effective_from": "2019-12-31T19:00:00-05:00"},
        BASE | {"override_asset": None},
    ]
    others = [
        BASE | {"asset_list": ["AAPL", "MSFT"]},
        BASE | {"asset_list": ["AAPL", "MSFT", "tsla"]},
        BASE | {"effective_from": "2020-01-01T00:00:01Z"},
        BASE | {"override_asset": "SPY"},
        {"kind": "equal_weights", "asset_list": ["AAPL", "MSFT", "TSLA"]},
        {
            "kind": "fixed_weights",
            "asset_unique_identifier_weights": [{"unique_identifier": a, "weight": 1 / 3} for a in ("AAPL", "MSFT", "TSLA")],
        },
    ]
    refused = [
        (BASE | {"asset_list": []}, "at least 1 item"),
        (BASE | {"asset_list": ["A", "B", "A", "B", "C"]}, "names A, B more than once"),
        (BASE | {"asset_list": ["A", ""]}, "at least 1 character"),
        (BASE | {"asset_list": ["A", None]}, "valid string"),
        (BASE | {"effective_from": "2020-01-01"}, "timezone"),
    ]
    first = np.datetime64("2020-01-01", "us")
    last = np.datetime64("2021-01-01", "us")


@pytest.mark.parametrize(
    ("assets", "weights"),
    [
        (("A",), [1.0]),
        (("D", "C", "B", "A"), [0.25, 0.25, 0.25, 0.25]),
        (("C", "B", "A"), [0.3333333333333333, 0.3333333333333333, 0.3333333333333333]),  # the double nearest to 1/3
    ],
)
def test_one_over_n(assets, weights):
    vectors = EqualWeights(asset_list=assets).emit(None, np.datetime64("2024-01-01", "us"))
    assert vectors.assets == tuple(reversed(assets)) if len(assets) > 1 else assets
    assert vectors.weights.tolist() == [weights]
    assert vectors.times.tolist() == [datetime(1970, 1, 1)]


def test_effective_from():
    signal = EqualWeights(asset_list=("A", "B"), effective_from=datetime(2024, 5, 6, 21, tzinfo=UTC))
    close = np.datetime64("2024-05-06T21:00", "us")
    assert len(signal.emit(None, close - np.timedelta64(1, "us")).times) == 0
    assert signal.emit(close - np.timedelta64(1, "us"), close).times.tolist() == [datetime(2024, 5, 6, 21)]
    assert len(signal.emit(close, close + np.timedelta64(1, "D")).times) == 0
    assert signal.maximum_forward_fill is None
