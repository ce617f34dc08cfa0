"""IntradayTrend: two short sessions by hand, and a loop over pandas rows for a whole market."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest

from msm_core.alignment import PriceAlignmentPolicy, align
from msm_core.frames import Series
from msm_core.sessions import Sessions
from msm_core.signals import IntradayTrend
from msm_core.signals.base import Inputs, Vectors
from tests.contracts import API_PRICES, ASSETS, GONE, ComputedSignalContract, weekday_sessions

BASE = {
    "kind": "intraday_trend",
    "asset_list": ASSETS,
    "calendar_key": "WEEKDAYS",
    "price_source": API_PRICES,
    "bar_frequency": "30m",
}
SHORT = weekday_sessions("2023-05-01", "2023-06-30")  # 45 sessions of 13 bars


class TestContract(ComputedSignalContract):
    payload = BASE
    sessions = SHORT
    periods = ()
    first = SHORT.opens[0]
    last = SHORT.closes[-1]
    respellings = [
        BASE | {"asset_list": list(reversed(ASSETS))},
        BASE | {"emit_on": "every_session", "open_column": "open"},
    ]
    others = [
        BASE | {"bar_frequency": "5m"},
        BASE | {"bar_frequency": "1h"},
        BASE | {"open_column": "vwap"},
        BASE | {"price_column": "vwap"},
        BASE | {"asset_list": ASSETS[1:]},
    ]
    refused = [
        (BASE | {"bar_frequency": "1d"}, "not shorter than 1d"),
        (BASE | {"bar_frequency": "24h"}, "not shorter than 1d"),
        (BASE | {"bar_frequency": "0m"}, "not of the form"),
        (BASE | {"bar_frequency": "half an hour"}, "not of the form"),
        (BASE | {"emit_on": "week_end"}, "every_session"),
    ]

    def test_a_loop_over_rows_comes_to_the_same_vectors(self):
        vectors = self.emit(self.spec, None, self.last)
        series = {
            name: {a: dict(zip(s.times.tolist(), s.values, strict=True)) for a, s in bars.items()} for name, bars in self.bars().items()
        }
        closes, opens = series["prices"], series["open"]
        gone = pd.Timestamp(self.delisted[GONE])
        expected: dict[pd.Timestamp, dict[str, float]] = {}
        times = pd.Series(self.times, index=pd.DatetimeIndex(self.times).normalize())
        days = [[t.to_pydatetime() for t in times[day]] for day in times.index.unique()]
        for before, day in pairwise(days):
            for asset in ASSETS:
                listed = asset != GONE or day[0] < gone + pd.Timedelta(days=1)
                known = before[0] in opens[asset] and before[-1] in closes[asset]
                direction = 0 if not known else 1 if closes[asset][before[-1]] > opens[asset][before[0]] else -1
                count, last = 0, closes[asset].get(before[-1])
                for time in day:
                    price = closes[asset].get(time)
                    count += bool(price and last and listed and (price - last) * direction > 0)
                    last = price
                    expected.setdefault(time, {})[asset] = direction * count / 13 / 11 if time != day[-1] else 0.0
        assert vectors.times.tolist() == list(expected)
        np.testing.assert_allclose(vectors.weights, pd.DataFrame(expected).T[list(vectors.assets)], rtol=1e-12, atol=0)
        assert (vectors.weights > 0).any()
        assert (vectors.weights < 0).any()

    def test_it_is_flat_at_every_close(self):
        vectors = self.emit(self.spec, None, self.last)
        assert not vectors.weights[np.isin(vectors.times, SHORT.closes)].any()

    def test_vectors_are_the_same_when_a_run_begins_at_any_bar(self):
        bars, whole = self.bars(), self.emit(self.spec, None, self.last)
        for since, through in pairwise(self.times[20:60]):
            part = self.emit_from(bars, since, through)
            assert part.times.tolist() == [through.item()]
            assert part.weights.tobytes() == whole.weights[whole.times == through].tobytes()


class TestStubBars(TestContract):
    """An hour does not divide 6.5 hours: the seventh bar of a session is a short one."""

    payload = BASE | {"bar_frequency": "60m"}
    respellings = [BASE | {"bar_frequency": "1h"}]
    others = [BASE]

    def test_a_loop_over_rows_comes_to_the_same_vectors(self):
        vectors = self.emit(self.spec, None, self.last)
        assert len(vectors.times) == 44 * 7
        counts = vectors.weights * 7 * 11
        np.testing.assert_allclose(counts, np.round(counts), atol=1e-9)


# -- by hand: sessions of four bars of an hour ---------------------------------------------------------------------------------

DAYS = np.array(["2024-01-02", "2024-01-03", "2024-01-04"], "datetime64[D]")
MIDNIGHTS = DAYS.astype("datetime64[us]")
SESSIONS = Sessions("FOUR", DAYS, MIDNIGHTS + np.timedelta64(10, "h"), MIDNIGHTS + np.timedelta64(14, "h"), DAYS[0], DAYS[-1])
GRID = SESSIONS.valuation_times(pd.Timedelta("1h").to_pytimedelta())


def emitted(
    bars: Mapping[str, tuple[float, Sequence[float | None]]], sessions: Sessions = SESSIONS, begin: int = 0, **fields: Any
) -> Vectors:
    """bars: per asset the open of every session's first bar, and closes in order; None where there is no bar."""
    spec = IntradayTrend.model_validate(BASE | {"asset_list": sorted(bars), "bar_frequency": "1h"} | fields)
    grid = sessions.valuation_times(spec.frequency)
    times = {a: np.array([c is not None for c in closes]) for a, (_, closes) in bars.items()}
    numbers = {
        "prices": {a: np.array([c for c in closes if c is not None], float) for a, (_, closes) in bars.items()},
        "open": {a: np.full(int(times[a].sum()), float(opens)) for a, (opens, _) in bars.items()},
    }
    panels = {
        name: align(
            {a: Series(grid[: len(times[a])][times[a]], v, np.full(len(v), np.nan)) for a, v in values.items()},
            spec.universe, sessions, grid[begin:], PriceAlignmentPolicy(), "Bars", name, "close",
        )
        for name, values in numbers.items()
    }  # fmt: skip
    return spec.emit(None, grid[-1], Inputs(sessions, panels))


def test_golden_long_and_short():
    # first session: A opens at 10, closes at 12: long. B opens at 10, closes at 10: not above, so short.
    # second, A: 13 over night +, 12 -, 14 +, 15 last bar: counts 1, 1, 2. B: 9 -, 8 -, 8 nothing, 7: counts 1, 2, 2.
    # weight = count / 4 bars / 2 assets, 0 at the last bar. Third: A 10 -> 15 long: 16, 15, 17; B 10 -> 7 short: 6, 7, 5.
    a = [11, 9, 13, 12, 13, 12, 14, 15, 16, 15, 17, 18]
    b = [11, 9, 13, 10, 9, 8, 8, 7, 6, 7, 5, 4]
    vectors = emitted({"A": (10, a), "B": (10, b)})
    assert vectors.times.tolist() == GRID[4:].tolist()  # a session before which there is none emits nothing
    assert (vectors.weights * 8).tolist() == [[1, -1], [1, -2], [2, -2], [0, 0], [1, -1], [1, -1], [2, -2], [0, 0]]
    assert not np.signbit(vectors.weights[3]).any()


def test_golden_a_missing_bar_agrees_with_nothing():
    # long; second session 13, none, 14, 15: counts 1, 1 (missing), 1 (against a bar that is not there), 0 at the close
    # third, after 10 -> 15: none, 16, 17, 18: over night missing 0; 16 against none 0; 17 1; 0
    a = [11, 9, 13, 12, 13, None, 14, 15, None, 16, 17, 18]
    assert (emitted({"A": (10, a)}).weights[:, 0] * 4).tolist() == [1, 1, 1, 0, 0, 0, 1, 0]


def test_a_grid_that_begins_with_the_first_bar_is_as_one_that_begins_before():
    a = [None, None, 13, 12, 13, 12, 14, 15, 16, 15, 17, 18]
    whole = emitted({"A": (10, a)})
    assert whole.times.tolist() == GRID[8:].tolist()  # without its first bar the first session has no open
    for begin in (1, 2, 3, 4):
        part = emitted({"A": (10, a)}, begin=begin)
        assert part.times.tolist() == GRID[8:].tolist()
        assert part.weights.tobytes() == whole.weights.tobytes()


@pytest.mark.parametrize("missing", [0, 3])  # the first bar has the open, the last one the close
def test_an_asset_without_open_or_close_of_the_session_before_has_weight_0(missing):
    a: list[float | None] = [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22]
    a[missing] = None
    vectors = emitted({"A": (10, a), "B": (10, [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22])})
    assert (vectors.weights * 8).tolist() == [[0, 1], [0, 2], [0, 3], [0, 0], [1, 1], [2, 2], [3, 3], [0, 0]]
    alone = emitted({"A": (10, a)})
    assert alone.times.tolist() == GRID[8:].tolist()  # where no asset has a direction nothing is emitted


def test_golden_round_the_clock():
    """24/7: a session opens where the one before closes."""
    opens = MIDNIGHTS.copy()
    sessions = Sessions("ALWAYS", DAYS, opens, opens + np.timedelta64(1, "D"), DAYS[0], DAYS[-1])
    up = [float(i) for i in range(2, 14)]
    vectors = emitted({"A": (1, up)}, sessions, bar_frequency="6h")
    assert vectors.times[0] == np.datetime64("2024-01-03T06:00")
    assert (vectors.weights[:, 0] * 4).tolist() == [1, 2, 3, 0, 1, 2, 3, 0]


def test_defaults():
    spec = IntradayTrend.model_validate({key: BASE[key] for key in ("asset_list", "calendar_key", "price_source")})
    assert (spec.bar_frequency, spec.open_column, spec.emit_on, spec.history_sessions) == ("5m", "open", "every_session", 2)
    assert IntradayTrend.model_validate(BASE | {"bar_frequency": "120m"}).bar_frequency == "2h"
