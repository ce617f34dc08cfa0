"""FixedWeights: the vectors below are the weights given, put in bytewise order by hand."""

from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pytest
from pydantic import BaseModel, ValidationError

from msm_core.signals import AssetWeight, FixedWeights
from tests.contracts import A_SIGNAL, SignalContract


def pairs(**weights: float) -> list[dict[str, str | float]]:
    return [{"unique_identifier": asset, "weight": weight} for asset, weight in weights.items()]


BASE = {"kind": "fixed_weights", "asset_unique_identifier_weights": pairs(AAPL=0.6, MSFT=0.4), "effective_from": "2020-01-01T00:00:00Z"}


class TestContract(SignalContract):
    payload = BASE
    respellings = [
        BASE | {"asset_unique_identifier_weights": pairs(MSFT=0.4, AAPL=0.6)},
        BASE | {"effective_from": "2020-01-01T05:30:00+05:30"},  # the same instant
        BASE | {"effective_from": datetime(2019, 12, 31, 19, tzinfo=timezone(timedelta(hours=-5)))},
        BASE | {"override_asset": None},
    ]
    others = [
        BASE | {"asset_unique_identifier_weights": pairs(AAPL=0.4, MSFT=0.6)},
        BASE | {"asset_unique_identifier_weights": pairs(AAPL=0.6)},
        BASE | {"asset_unique_identifier_weights": pairs(AAPL=0.6, MSFT=0.4, TSLA=0.0)},  # one more asset that bounds the window
        BASE | {"effective_from": "2020-01-02T00:00:00Z"},
        BASE | {"override_asset": "SPY"},
        BASE | {"override_asset": "QQQ"},
        {"kind": "fixed_weights", "asset_unique_identifier_weights": pairs(AAPL=0.6, MSFT=0.4)},
        {"kind": "fixed_weights", "asset_unique_identifier_weights": pairs(AAPL=0.5, MSFT=0.5)},
        {"kind": "equal_weights", "asset_list": ["AAPL", "MSFT"]},  # the same vector, another signal
        A_SIGNAL,
    ]
    refused = [
        (BASE | {"asset_unique_identifier_weights": []}, "at least 1 item"),
        (BASE | {"asset_unique_identifier_weights": pairs(A=1.0) + pairs(A=0.5)}, "names A more than once"),
        (BASE | {"asset_unique_identifier_weights": pairs(A=float("nan"))}, "finite number"),
        (BASE | {"asset_unique_identifier_weights": pairs(A=float("inf"))}, "finite number"),
        (BASE | {"asset_unique_identifier_weights": [{"unique_identifier": "", "weight": 1.0}]}, "at least 1 character"),
        (BASE | {"asset_unique_identifier_weights": [{"unique_identifier": "A" * 256, "weight": 1.0}]}, "at most 255 characters"),
        (BASE | {"asset_unique_identifier_weights": [{"unique_identifier": "A", "weight": 1.0, "note": "x"}]}, "Unexpected keyword"),
        (BASE | {"effective_from": "2020-01-01T00:00:00"}, "timezone"),
        (BASE | {"override_asset": ""}, "at least 1 character"),
    ]
    first = np.datetime64("2020-01-01", "us")
    last = np.datetime64("2020-12-31", "us")


def test_weights_are_taken_as_they_are_in_bytewise_order():
    # bytes: "A" 0x41 < "BRK.B" 0x42 < "a" 0x61 < "É" 0xC3; the weights sum to 0.7, one is short, one is 0
    signal = FixedWeights.from_signal_configuration(weights={"a": 0.25, "É": 0.0, "BRK.B": -0.3, "A": 0.75})
    assert signal.universe == ("A", "BRK.B", "a", "É")
    vectors = signal.emit(None, np.datetime64("2024-01-01", "us"))
    assert vectors.assets == ("A", "BRK.B", "a", "É")
    assert vectors.weights.tolist() == [[0.75, -0.3, 0.25, 0.0]]


def test_one_vector_in_1970_valid_for_ever():  # design.md section 4
    signal = FixedWeights.from_signal_configuration(weights={"A": 1.0})
    vectors = signal.emit(None, np.datetime64("2024-01-01", "us"))
    assert vectors.times.tolist() == [datetime(1970, 1, 1)]
    assert signal.maximum_forward_fill is None
    assert vectors.valid_at(np.array(["1969-12-31T23:59:59.999999", "1970-01-01", "2262-01-01"], "datetime64[us]"), None).tolist() == [
        -1,
        0,
        0,
    ]


@pytest.mark.parametrize(
    ("since", "through", "emitted"),
    [
        (None, "2020-03-01T11:59:59.999999", False),
        (None, "2020-03-01T12:00", True),
        ("2020-03-01T11:59:59.999999", "2020-03-01T12:00", True),
        ("2020-03-01T12:00", "2024-01-01", False),  # since is exclusive
        ("2024-01-01", "2025-01-01", False),
    ],
)
def test_emitted_once_in_since_through(since, through, emitted):
    signal = FixedWeights.from_signal_configuration(weights={"A": 1.0}, effective_from=datetime(2020, 3, 1, 12, tzinfo=UTC))
    vectors = signal.emit(None if since is None else np.datetime64(since, "us"), np.datetime64(through, "us"))
    assert len(vectors.times) == len(vectors.weights) == int(emitted)
    assert vectors.assets == ("A",)


class Elsewhere(BaseModel):
    """Any model with the fields will do."""

    asset_unique_identifier_weights: list[AssetWeight]


@pytest.mark.parametrize(
    "signal",
    [
        lambda: FixedWeights.from_signal_configuration({"asset_unique_identifier_weights": pairs(A=0.6, B=0.4)}),
        lambda: FixedWeights.from_signal_configuration(asset_unique_identifier_weights=pairs(B=0.4, A=0.6)),
        lambda: FixedWeights.from_signal_configuration(
            Elsewhere(
                asset_unique_identifier_weights=[AssetWeight(unique_identifier="A", weight=0.6), {"unique_identifier": "B", "weight": 0.4}]
            )
        ),
        lambda: FixedWeights.from_signal_configuration({"weights": {"B": 0.4, "A": 0.6}}),
        lambda: FixedWeights.from_signal_configuration(weights={"A": 0.6, "B": 0.4}),
        lambda: FixedWeights.from_signal_configuration({"weights": {"A": 9.0}}, weights={"A": 0.6, "B": 0.4}),  # keywords win
    ],
)
def test_from_signal_configuration(signal):  # R66
    plain = FixedWeights(
        asset_unique_identifier_weights=(AssetWeight(unique_identifier="A", weight=0.6), AssetWeight(unique_identifier="B", weight=0.4))
    )
    assert signal() == plain
    assert signal().uid == plain.uid


def test_from_signal_configuration_leaves_what_it_was_given_alone():
    given = {"weights": {"A": 1.0}}
    FixedWeights.from_signal_configuration(given)
    assert given == {"weights": {"A": 1.0}}


@pytest.mark.parametrize("weights", [{}, {"A": float("nan")}, {"A": "much"}, {"": 1.0}])
def test_from_signal_configuration_refuses_what_the_model_refuses(weights):
    with pytest.raises(ValidationError):
        FixedWeights.from_signal_configuration(weights=weights)


def test_an_integer_weight_is_a_weight():  # 1 and 1.0, 0.0 and -0.0 are one meaning
    uids = {FixedWeights.from_signal_configuration(weights={"A": one, "B": zero}).uid for one in (1, 1.0) for zero in (0, 0.0, -0.0)}
    assert len(uids) == 1
