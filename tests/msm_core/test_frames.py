"""ordered_sum against a plain Python loop, to the bit; times and frequencies against tables."""

from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msm_core.errors import ConfigurationError, NaiveTimestamp
from msm_core.frames import LastTrade, in_order, iso, ordered_sum, parse_frequency, to_datetime, utc


def loop_sum(row: list[float]) -> float:
    total = row[0]
    for value in row[1:]:
        total += value
    return total


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    return left.shape == right.shape and left.dtype == right.dtype and left.tobytes() == right.tobytes()


def expected(values: np.ndarray) -> np.ndarray:
    flat = values.reshape(-1, values.shape[-1])
    return np.array([loop_sum(row.tolist()) for row in flat]).reshape(values.shape[:-1])


def wild(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of either sign over twelve orders of magnitude: no two orders of addition agree."""
    return rng.normal(size=shape) * 10.0 ** rng.integers(-6, 7, shape)


@pytest.mark.parametrize("assets", [1, 2, 7, 8, 9, 15, 16, 17, 100, 129, 500])
@pytest.mark.parametrize("times", [1, 2, 9, 64, 501])  # the last: column by column
def test_ordered_sum_is_the_loop_in_every_memory_order(times, assets):  # design.md section 8, rule 2
    values = wild(np.random.default_rng(assets * 1000 + times), (times, assets))
    want = expected(values)
    assert same_bits(ordered_sum(np.ascontiguousarray(values)), want)
    assert same_bits(ordered_sum(np.asfortranarray(values)), want)
    padded = np.full((times * 3, assets * 2), np.nan)
    padded[::3, ::2] = values
    assert same_bits(ordered_sum(padded[::3, ::2]), want)
    assert same_bits(ordered_sum(values[:, ::-1][:, ::-1]), want)
    assert same_bits(ordered_sum(values[::-1]), want[::-1])
    assert same_bits(ordered_sum(values[:, ::-1]), expected(values[:, ::-1].copy()))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 40), st.integers(9, 60))
def test_ordered_sum_of_a_batch_is_that_of_each_row(seed, portfolios, times, assets):  # P5
    rng = np.random.default_rng(seed)
    values = wild(rng, (portfolios, times, assets))
    whole = ordered_sum(values)
    assert same_bits(whole, expected(values))
    assert same_bits(np.moveaxis(ordered_sum(np.moveaxis(values, 0, 1)), 0, 1).copy(), whole)
    cut = int(rng.integers(0, times + 1))
    assert same_bits(np.concatenate([ordered_sum(values[:, :cut]), ordered_sum(values[:, cut:])], axis=1), whole)
    for p in range(portfolios):
        for t in range(times):
            assert same_bits(ordered_sum(values[p, t]), whole[p, t])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 20))
def test_a_zero_anywhere_changes_nothing(seed, place):  # P11
    values = wild(np.random.default_rng(seed), (7, 20))
    assert same_bits(ordered_sum(np.insert(values, place, 0.0, axis=1)), ordered_sum(values))


def test_names_in_order():
    assert in_order(("a", "é"), ["Z", "a"], {}) == ("Z", "a", "é")  # by bytes, each once
    assert in_order() == ()


def test_ordered_sum_by_hand():
    # 1e16 + 1 = 1e16 (the 1 is lost), - 1e16 = 0, + 1 = 1; any other order says 2 or 0
    assert ordered_sum(np.array([1e16, 1.0, -1e16, 1.0])) == 1.0
    assert ordered_sum(np.array([[1.0, 2.0, 4.0], [-1.0, 0.5, 0.25]])).tolist() == [7.0, -0.25]
    assert np.isnan(ordered_sum(np.array([1.0, np.nan, 1.0])))


def test_these_numbers_tell_orders_apart():
    """The control: numpy's own sum fails the test above, from 9 assets on."""
    values = np.asfortranarray(wild(np.random.default_rng(0), (64, 9)))
    assert not same_bits(np.ascontiguousarray(values).sum(axis=1), expected(values))


def test_no_assets_sum_to_zero():
    assert ordered_sum(np.zeros((3, 0))).tolist() == [0.0, 0.0, 0.0]
    assert ordered_sum(np.zeros(0)) == 0.0


def test_held_leaves_out_what_was_sold():  # R76
    nothing = np.full(4, np.nan)
    trade = LastTrade(np.datetime64("2024-01-02", "us"), ("A", "B", "C", "D"), np.array([0.5, 0.0, -0.1, -0.0]), nothing, nothing)
    assert trade.held() == ("A", "C")


# -- times --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "instant"),
    [
        (datetime(2024, 3, 10, 21, tzinfo=UTC), "2024-03-10T21:00:00.000000"),
        (datetime(2024, 3, 10, 16, tzinfo=timezone(timedelta(hours=-5))), "2024-03-10T21:00:00.000000"),
        (datetime(2024, 3, 11, 2, 30, tzinfo=timezone(timedelta(hours=5, minutes=30))), "2024-03-10T21:00:00.000000"),
        (pd.Timestamp("2024-11-04 16:00", tz="America/New_York"), "2024-11-04T21:00:00.000000"),  # winter time: UTC-5
        (pd.Timestamp("2024-11-01 16:00", tz="America/New_York"), "2024-11-01T20:00:00.000000"),  # summer time: UTC-4
        (datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC), "1969-12-31T23:59:59.999999"),
    ],
)
def test_utc(value, instant):
    time = utc(value, "time")
    assert time == np.datetime64(instant)
    assert time.dtype == np.dtype("datetime64[us]")
    assert to_datetime(time) == value
    assert to_datetime(time).tzinfo is UTC


@pytest.mark.parametrize("value", [datetime(2024, 1, 1), pd.Timestamp("2024-01-01")])
def test_naive_timestamps_are_refused(value):  # design.md section 3
    with pytest.raises(NaiveTimestamp, match=r"start is 2024-01-01T00:00:00, without a time zone"):
        utc(value, "start")


@pytest.mark.parametrize(
    ("time", "text"),
    [
        (np.datetime64("2026-11-20T21:00", "us"), "2026-11-20 21:00Z"),
        (np.datetime64("2026-11-20T21:00:05", "us"), "2026-11-20 21:00:05Z"),
        (np.datetime64("2026-11-20", "D"), "2026-11-20 00:00Z"),
        (np.datetime64("NaT", "us"), "never"),
        (None, "never"),
    ],
)
def test_iso(time, text):
    assert iso(time) == text


@pytest.mark.parametrize(("text", "length"), [("1d", 86400), ("5m", 300), ("90m", 5400), ("1h", 3600), ("10d", 864000)])
def test_parse_frequency(text, length):
    assert parse_frequency(text) == timedelta(seconds=length)


@pytest.mark.parametrize("text", ["", "d", "0d", "01d", "1", "1D", "1 d", "-1d", "1.5h", "1w", "1mo", "1d\n", "1d1h"])
def test_frequencies_refused(text):
    with pytest.raises(ConfigurationError, match="is not of the form 5m, 1h or 1d"):
        parse_frequency(text)
