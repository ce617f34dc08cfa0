"""ExternalWeights: a few rows by hand, and random rows against a pivot by pandas."""

import random
from datetime import datetime, timedelta
from uuid import UUID

import numpy as np
import pandas as pd
import pytest

from msm_core.errors import InvalidInput, MsmError, RepeatedWeight, UnexpectedAsset
from msm_core.frames import SignalRows
from msm_core.signals import SIGNALS, ExternalWeights
from msm_core.signals.base import Inputs, WeightsLocation
from tests.contracts import API_PRICES, ASSETS, SignalContract, random_split

BASE = {"kind": "external_weights", "asset_list": ASSETS, "weights_source": API_PRICES}
FILE = {"kind": "external_weights", "asset_list": ASSETS, "path": "/shared/weights.parquet"}
NAN = float("nan")


def signal(**fields) -> ExternalWeights:
    return ExternalWeights.model_validate(FILE | fields)


def rows_of(*rows: tuple[str, str, float]) -> SignalRows:
    times, assets, weights = zip(*rows, strict=True) if rows else ((), (), ())
    return SignalRows(np.array(times, "datetime64[us]"), list(assets), np.array(weights, dtype=np.float64))


def emit(rows: SignalRows, since=None, through="2030-01-01", spec: ExternalWeights | None = None):
    since = None if since is None else np.datetime64(since, "us")
    return (spec or signal()).emit(since, np.datetime64(through, "us"), Inputs(rows=rows))


def random_rows(seed: int, vectors: int = 150) -> SignalRows:
    """Vectors at random times, each of some assets, in key order."""
    rng = np.random.default_rng(seed)
    start = np.datetime64("2022-01-03T21:00", "us")
    rows = []
    for minutes in sorted(rng.choice(500_000, vectors, replace=False)):
        for asset in np.sort(rng.choice(len(ASSETS), rng.integers(1, len(ASSETS) + 1), replace=False)):
            rows.append((start + np.timedelta64(int(minutes), "m"), ASSETS[asset], rng.normal()))
    return rows_of(*rows)


class TestContract(SignalContract):
    payload = BASE
    splits = 200
    respellings = [
        BASE | {"asset_list": list(reversed(ASSETS))},
        BASE | {"weight_column": "signal_weight", "path": None, "override_asset": None},
        BASE | {"forward_fill": 86_400},
        BASE | {"forward_fill": timedelta(hours=24)},
    ]
    others = [
        FILE,
        FILE | {"path": "/shared/weights.csv"},
        BASE | {"asset_list": ASSETS[1:]},
        BASE | {"weight_column": "weight"},
        BASE | {"forward_fill": None},
        BASE | {"forward_fill": "P2D"},
        BASE | {"override_asset": "SPY"},
        BASE | {"weights_source": API_PRICES | {"time_index_meta_table_uid": "00000000-0000-0000-0000-000000000002"}},
        {"kind": "equal_weights", "asset_list": ASSETS},
    ]
    refused = [
        (BASE | {"path": "/shared/weights.csv"}, "either weights_source or path"),
        (BASE | {"weights_source": None}, "either weights_source or path"),
        (FILE | {"path": ""}, "at least 1 character"),
        (FILE | {"path": "/shared/weights.xlsx"}, "ends in .csv, .csv.gz, .parquet"),
        (FILE | {"asset_list": []}, "at least 1 item"),
        (FILE | {"asset_list": ["A", "A"]}, "names A more than once"),
        (FILE | {"forward_fill": 0}, "greater than"),
        (FILE | {"weight_column": ""}, "at least 1 character"),
    ]
    rows = random_rows(1)
    first = rows.times[0]
    last = rows.times[-1]

    def emit(self, spec, since, through):
        return spec.emit(since, through, Inputs(rows=self.rows))

    def test_pandas_pivots_to_the_same_vectors(self):
        vectors = self.emit(self.spec, None, self.last)
        frame = pd.DataFrame({"t": self.rows.times, "a": self.rows.assets, "w": self.rows.weights})
        expected = frame.pivot(index="t", columns="a", values="w").fillna(0.0)[list(ASSETS)]
        assert len(expected) == 150
        assert vectors.times.tolist() == [t.to_pydatetime() for t in expected.index]
        assert vectors.assets == ASSETS
        assert np.array_equal(vectors.weights, expected.to_numpy())

    def test_rows_to_come_are_not_looked_at(self):
        rng = np.random.default_rng(2)
        whole = self.emit(self.spec, None, self.last)
        for t in rng.choice(self.rows.times, 20):
            later = self.rows.times > t
            assets = [("stranger" if is_later else a) for a, is_later in zip(self.rows.assets, later, strict=True)]
            other = SignalRows(self.rows.times, assets, np.where(later, np.nan, self.rows.weights))
            early = self.spec.emit(None, t, Inputs(rows=other))
            assert early.weights.tobytes() == whole.weights[whole.times <= t].tobytes()


def test_golden_two_vectors():
    # the universe in bytewise order is B, a, É; an asset without a row has target 0, and a sum of 0.4 leaves 0.6 in cash
    spec = signal(asset_list=["É", "a", "B"])
    first, second, third = "2024-01-02T21:00", "2024-01-03T20:59:59.999999", "2024-01-03T21:00"
    rows = rows_of((first, "B", 0.5), (first, "a", -0.1), (second, "É", 1.25), (third, "a", 0.0))
    vectors = emit(rows, spec=spec)
    assert vectors.assets == ("B", "a", "É")
    assert vectors.times.tolist() == [datetime(2024, 1, 2, 21), datetime(2024, 1, 3, 20, 59, 59, 999_999), datetime(2024, 1, 3, 21)]
    assert vectors.weights.tolist() == [[0.5, -0.1, 0.0], [0.0, 0.0, 1.25], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("since", "through", "emitted"),
    [
        (None, "2024-01-02T20:59:59.999999", []),
        (None, "2024-01-02T21:00", [1.0]),
        ("2024-01-02T20:59:59.999999", "2024-01-02T21:00", [1.0]),
        ("2024-01-02T21:00", "2024-01-03T21:00", [2.0]),  # since is exclusive, through is not
        ("2024-01-03T21:00", "2024-01-05", []),
        ("2024-01-05", "2024-01-02T21:00", []),  # a range that is none
        (None, "2024-01-05", [1.0, 2.0]),
    ],
)
def test_vectors_of_the_range_and_no_others(since, through, emitted):
    rows = rows_of(("2024-01-02T21:00", "MSFT", 1.0), ("2024-01-03T21:00", "MSFT", 2.0))
    vectors = emit(rows, since, through)
    assert vectors.weights[:, ASSETS.index("MSFT")].tolist() == emitted
    assert vectors.weights.shape == (len(emitted), len(ASSETS))


def test_no_rows_are_no_vectors():
    vectors = emit(rows_of())
    assert (vectors.times.dtype, vectors.times.shape, vectors.weights.shape) == (np.dtype("datetime64[us]"), (0,), (0, len(ASSETS)))
    assert vectors.weights.dtype == np.float64


@pytest.mark.parametrize(
    ("row", "error", "value"),
    [
        (("2024-01-02T21:00", "GHOST", 0.5), UnexpectedAsset, "0.5"),
        (("2024-01-02T21:00", "MSFT", NAN), InvalidInput, "nan"),
        (("2024-01-02T21:00", "MSFT", float("-inf")), InvalidInput, "-inf"),
        (("2024-01-02T21:00", "AAPL", 0.75), RepeatedWeight, "0.25 and 0.75"),
    ],
)
@pytest.mark.parametrize("fields", [{}, {"path": None, "weights_source": API_PRICES}])
def test_a_row_that_cannot_be_used_is_told_with_signal_asset_time_and_value(row, error, value, fields):
    rows = rows_of(("2024-01-01T21:00", "AAPL", 1.0), ("2024-01-02T21:00", "AAPL", 0.25), row)
    with pytest.raises(error) as caught:
        emit(rows, spec=signal(**fields))
    source = str(UUID(int=1)) if fields else "/shared/weights.parquet"
    told = str(caught.value)
    assert all(fact in told for fact in ("external_weights", row[1], "2024-01-02 21:00Z", value, source)), told
    assert isinstance(caught.value, MsmError)
    assert len(emit(rows, through="2024-01-01T21:00").times) == 1  # nothing is wrong yet
    assert len(emit(rows, since="2024-01-02T21:00").times) == 0  # and no longer


def test_the_first_bad_row_is_the_one_that_is_told():
    with pytest.raises(InvalidInput, match=r"of BRK\.B at 2024-01-02 21:00Z"):
        emit(rows_of(("2024-01-02T21:00", "AAPL", 0.5), ("2024-01-02T21:00", "BRK.B", NAN), ("2024-01-03T21:00", "AAPL", NAN)))


def test_the_same_asset_at_two_times_is_not_repeated():
    assert emit(rows_of(("2024-01-02T21:00", "AAPL", 0.5), ("2024-01-03T21:00", "AAPL", 0.5))).weights.shape == (2, 11)


def test_where_the_weights_are():
    assert signal(weight_column="w").weights_location == WeightsLocation(None, "w", "/shared/weights.parquet")
    stored = SIGNALS.parse(BASE)
    assert stored.weights_location == WeightsLocation(stored.weights_source, "signal_weight", None)
    assert stored.weights_source.source_uid == UUID(int=1)
    assert stored.requests == ()


def test_weights_are_never_interpolated():
    config = {
        "source_time_index_meta_table_uid": str(UUID(int=1)),
        "upsample_frequency_id": "1d",
        "intraday_bar_interpolation_rule": "ffill",
        "asset_list": ["AAPL"],
    }
    interpolated = {"kind": "interpolated_prices", "interpolation_config": config}
    with pytest.raises(ValueError, match="weights are read as they are stored"):
        SIGNALS.parse(BASE | {"weights_source": interpolated})


def test_forward_fill():
    assert signal().maximum_forward_fill == np.timedelta64(1, "D")
    assert signal(forward_fill=None).maximum_forward_fill is None


def test_splits_of_one_row_each_come_to_the_same_bits():
    rows = random_rows(7, 40)
    whole = emit(rows)
    for seed in range(20):
        since, parts = None, []
        for through in random_split(rows.times[0] - np.timedelta64(1, "us"), rows.times[-1], random.Random(seed)):
            parts.append(emit(rows, since, through).weights)
            since = through
        assert np.concatenate(parts).tobytes() == whole.weights.tobytes()
