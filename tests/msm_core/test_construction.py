"""Construction: hand-worked windows on a calendar of weekdays, and random worlds of 9 to 12 assets run whole and night by night."""

import calendar
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date, datetime, timedelta
from typing import Any

import numpy as np
import pytest

from msm_core.alignment import Market, PriceAlignmentPolicy, align
from msm_core.configuration import PortfolioConfiguration
from msm_core.construction import Construction, State, construct, required_assets, window_end
from msm_core.errors import CalendarRangeError, EmptySchedule, InvalidPrice, MissingPrice, MissingPrices, ScopeUndetermined
from msm_core.frames import LastTrade, Series, SignalRows
from msm_core.sessions import Sessions
from msm_core.signals import EqualWeights, FixedWeights, Signal, Vectors
from tests.msm_core.test_valuation import REFERENCES
from tests.runs import YEAR, Inputs, Scripted, portfolio, stored, value_rows, weekdays, weight_rows

HOUR, DAY, TICK = np.timedelta64(1, "h"), np.timedelta64(1, "D"), np.timedelta64(1, "us")
UNKNOWN = float("nan")


# -- a calendar and bars, by hand ---------------------------------------------------------------------------------------------


def at(text: str) -> np.datetime64:
    """`01-02`: the close of 2 January; `01-02 18:00`; or a whole timestamp."""
    if len(text) == 5:
        text += " 21:00"
    return np.datetime64(("2024-" if text[2] == "-" else "") + text.replace(" ", "T"), "us")


def bars(values: Mapping[str, float], volumes: Mapping[str, float] | None = None) -> Series:
    """`{"01-02": 100.0}`"""
    return Series(
        np.array([at(text) for text in values], "datetime64[us]"),
        np.array(list(values.values()), float),
        np.array([(volumes or {}).get(text, UNKNOWN) for text in values], float),
    )


def daily(first: int, *values: float) -> Series:
    """One bar per session from session `first` on."""
    times = YEAR.closes[first : first + len(values)]
    return Series(times, np.array(values, float), np.full(len(values), UNKNOWN))


def vectors_of(*vectors: tuple[str, Mapping[str, float]]) -> Vectors:
    """Vectors as they are read back from storage: rows in key order, an absent asset has no row."""
    rows = sorted((at(time), asset, weight) for time, vector in vectors for asset, weight in vector.items())
    return Vectors.from_rows(
        SignalRows(np.array([t for t, _, _ in rows], "datetime64[us]"), [a for _, a, _ in rows], np.array([w for _, _, w in rows], float))
    )


def market_of(
    series: Mapping[str, Series], grid: np.ndarray, configuration: PortfolioConfiguration, sessions: Sessions = YEAR, label: str = "close"
) -> Market:
    return align(series, sorted(series), sessions, grid, configuration.alignment, "prices", "close", label)


# -- runs ---------------------------------------------------------------------------------------------------------------------


def values(parts: Sequence[Construction]) -> dict[str, float]:
    """`{"01-02": 1.0}`"""
    return {str(t)[5:10]: float(v) for part in parts for t, v in zip(part.times, part.close, strict=True)}


def trades(parts: Sequence[Construction]) -> dict[str, dict[str, float]]:
    """Weights after each trade, by date; assets that are sold included."""
    return {
        str(part.bars.times[row])[5:10]: {
            asset: float(after)
            for asset, after, before in zip(part.assets, part.trades.after[k], part.trades.before[k], strict=True)
            if after != 0 or before != 0
        }
        for part in parts
        for k, row in enumerate(part.trades.rows)
    }


def close_to(**expected: float) -> Any:
    return pytest.approx({key.replace("_", "-")[1:]: value for key, value in expected.items()}, rel=1e-14)


# -- alignment ----------------------------------------------------------------------------------------------------------------


def aligned(series: Series, grid: Sequence[str], *, sessions: Sessions = YEAR, label: str = "close", **policy: Any) -> dict[str, list[Any]]:
    times = np.array([at(text) for text in grid], "datetime64[us]")
    market = align({"A": series}, ["A"], sessions, times, PriceAlignmentPolicy(**policy), "prices", "close", label)
    return {
        "prices": market.prices[:, 0].tolist(),
        "fresh": market.fresh[:, 0].tolist(),
        "times": market.bar_times[:, 0].astype(str).tolist(),
    }


def nan_equal(left: Sequence[float], right: Sequence[float]) -> bool:
    return np.array_equal(np.array(left, float), np.array(right, float), equal_nan=True)


@pytest.mark.parametrize(
    ("staleness", "prices"),
    [
        # bars at the closes of 2 and 4 January; valued at those of 1, 2, 3, 4 and 5
        (timedelta(0), [UNKNOWN, 100, UNKNOWN, 110, UNKNOWN]),
        (timedelta(days=1) - timedelta(microseconds=1), [UNKNOWN, 100, UNKNOWN, 110, UNKNOWN]),
        (timedelta(days=1), [UNKNOWN, 100, 100, 110, 110]),  # inclusive: exactly a day old is fresh
    ],
)
def test_a_price_is_at_most_as_old_as_the_staleness(staleness, prices):  # R61
    got = aligned(bars({"01-02": 100, "01-04": 110}), ["01-01", "01-02", "01-03", "01-04", "01-05"], maximum_staleness=staleness)
    assert nan_equal(got["prices"], prices)
    assert got["fresh"] == [not np.isnan(p) for p in prices]
    assert got["times"][0] == "NaT"
    assert got["times"][2] == "2024-01-02T21:00:00.000000"  # the last known one is told, fresh or not


def test_bars_to_come_are_never_used():  # P7: no back-fill
    got = aligned(bars({"01-03": 100, "01-04 20:59": 110}), ["01-02", "01-03", "01-04"], maximum_staleness=timedelta(days=9))
    assert nan_equal(got["prices"], [UNKNOWN, 100, 110])
    assert nan_equal(aligned(bars({"01-02 21:00:00.000001": 100}), ["01-02"], maximum_staleness=timedelta(days=9))["prices"], [UNKNOWN])


@pytest.mark.parametrize("bad", [UNKNOWN, 0.0, -1.0, float("inf"), -float("inf")])
def test_hold_takes_an_unusable_price_for_no_bar(bad):
    series = bars({"01-02": 100, "01-03": bad, "01-04": 110})
    held = aligned(series, ["01-02", "01-03", "01-04"], missing="hold", maximum_staleness=timedelta(days=1))
    assert (held["prices"], held["fresh"]) == ([100, 100, 110], [True, True, True])
    bounded = aligned(series, ["01-02", "01-03", "01-04"], missing="hold")
    assert nan_equal(bounded["prices"], [100, UNKNOWN, 110])
    assert bounded["fresh"] == [True, False, True]
    failing = aligned(series, ["01-02", "01-03", "01-04"], missing="fail", maximum_staleness=timedelta(days=1))
    assert nan_equal(failing["prices"], [100, bad, 110])
    assert failing["fresh"] == [True, True, True]


NEW_YORK = weekdays("2024-03-04", "2024-03-15", timezone="America/New_York")  # clocks move on Sunday 10 March
TOKYO = weekdays("2024-03-04", "2024-03-15", timezone="Asia/Tokyo", opens=0, closes=6)


@pytest.mark.parametrize(
    ("sessions", "stamps"),
    [
        (NEW_YORK, ["03-08 00:00", "03-11 00:00"]),  # 00:00 UTC of the date
        (NEW_YORK, ["03-08 05:00", "03-11 04:00"]),  # midnight in New York, UTC-5 and UTC-4
        (TOKYO, ["03-08 00:00", "03-11 00:00"]),
        (TOKYO, ["03-07 15:00", "03-10 15:00"]),  # midnight in Tokyo, UTC+9
    ],
)
def test_a_bar_labelled_by_its_date_becomes_known_at_the_close(sessions, stamps):  # lesson: a look-ahead stamp
    hour = str(sessions.closes[0])[11:13]
    series = bars({stamps[0]: 100, stamps[1]: 110})
    grid = ["03-07 23:59", f"03-08 0{int(hour) - 1}:59" if hour == "06" else "03-08 20:59", f"03-08 {hour}:00", f"03-11 {hour}:00"]
    got = aligned(series, grid, sessions=sessions, label="session_date", maximum_staleness=timedelta(days=9))
    assert nan_equal(got["prices"], [UNKNOWN, UNKNOWN, 100, 110])
    assert got["times"][2:] == [f"2024-03-08T{hour}:00:00.000000", f"2024-03-11T{hour}:00:00.000000"]


def test_a_date_without_session_has_no_bar():
    # 9 March is a Saturday, and 18 March lies behind the last session
    series = bars({"03-01 00:00": 1, "03-08 00:00": 100, "03-09 00:00": 999, "03-11 00:00": 110, "03-18 00:00": 999})
    got = aligned(
        series, ["03-08", "03-10", "03-11", "03-15"], sessions=NEW_YORK, label="session_date", maximum_staleness=timedelta(days=9)
    )
    assert got["prices"] == [100, 100, 110, 110]


def test_a_calendar_without_sessions_makes_no_crash_of_the_whole_batch():
    """The portfolio that uses it is told by EmptySchedule; the others of its batch know nothing of it."""
    hollow = Sessions("HOLLOW", YEAR.dates[:0], YEAR.opens[:0], YEAR.closes[:0], YEAR.valid_from, YEAR.valid_to)
    market = align({"A": bars({"01-02": 1.0})}, ["A"], hollow, hollow.closes, PriceAlignmentPolicy(), "prices", "close", "session_date")
    assert market.prices.shape == (0, 1)


def test_first_and_last_bars_volumes_and_assets_without_bars():
    grid = YEAR.closes[1:4]
    series = {"A": bars({"01-02": 10, "01-04": UNKNOWN}, {"01-02": 7.0}), "C": bars({"01-03": 30}, {"01-03": 9.0})}
    market = align(series, ["A", "B", "C"], YEAR, grid, PriceAlignmentPolicy(missing="hold"), "prices", "close", "close")
    assert market.first_bar.astype(str).tolist() == ["2024-01-02T21:00:00.000000", "NaT", "2024-01-03T21:00:00.000000"]
    assert market.last_bar.astype(str).tolist() == ["2024-01-04T21:00:00.000000", "NaT", "2024-01-03T21:00:00.000000"]
    assert nan_equal(market.volumes.ravel(), [7, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, 9, UNKNOWN, UNKNOWN, UNKNOWN])
    assert market.columns(["C", "A"]).tolist() == [2, 0]


# -- the end of a window ------------------------------------------------------------------------------------------------------

TWO = EqualWeights(asset_list=("A", "B"))


def held(*assets: str, watermark: str = "01-03") -> State:
    nothing = np.full(len(assets), UNKNOWN)
    return State(at(watermark), 1.0, 1.0, 1.0, LastTrade(at("01-02"), assets, np.full(len(assets), 0.1), nothing, nothing))


def end_of(signal: Signal, series: Mapping[str, Series], state: State | None = None, as_of: str = "02-01", **options: Any) -> str:
    configuration = portfolio(signal)
    market = market_of(series, YEAR.closes[:20], configuration)
    return str(window_end(configuration, market, state, at(as_of), options.get("signal_end")))[5:16].replace("T", " ")


AHEAD, BEHIND = daily(0, *[1.0] * 20), daily(0, 1.0)


def test_the_end_is_that_of_the_first_asset_to_end():
    series = {"A": daily(0, *[1.0] * 10), "B": daily(0, *[1.0] * 6)}
    assert end_of(TWO, series) == "01-08 21:00"  # B ends with session 5


@pytest.mark.parametrize("state", [None, held("A", "B")])
def test_unrelated_assets_ahead_or_behind_have_no_effect(state):  # R68, R71
    series = {"A": daily(0, *[1.0] * 10), "B": daily(0, *[1.0] * 6), "X": AHEAD, "Y": BEHIND}
    assert end_of(TWO, series, state) == "01-08 21:00"


def test_what_is_held_bounds_the_window_too():  # R70
    series = {"A": daily(0, *[1.0] * 10), "B": daily(0, *[1.0] * 9), "OLD": daily(0, *[1.0] * 5), "GONE": BEHIND}
    assert end_of(TWO, series, held("A", "OLD")) == "01-05 21:00"
    gone = replace(held("A", "GONE"), last_trade=replace(held("A", "GONE").last_trade, weights=np.array([0.1, 0.0])))
    assert end_of(TWO, series, gone) == "01-11 21:00"  # sold: it bounds nothing


def test_the_override_asset_bounds_the_window_too():  # R70
    series = {"A": AHEAD, "B": AHEAD, "NAV": daily(0, *[1.0] * 4)}
    assert end_of(EqualWeights(asset_list=("A", "B"), override_asset="NAV"), series) == "01-04 21:00"


def test_as_of_and_the_signal_bound_the_window():
    series = {"A": AHEAD, "B": AHEAD}
    assert end_of(TWO, series, as_of="01-09 12:00") == "01-09 12:00"
    assert end_of(TWO, series, signal_end=at("01-10")) == "01-10 21:00"
    assert end_of(TWO, series, as_of="01-09 12:00", signal_end=at("01-08")) == "01-08 21:00"


def test_missing_required_assets_are_named():  # R69
    configuration, names = portfolio(EqualWeights(asset_list=("A", "B", "C", "D"))), ["A", "B", "C", "D", "X"]
    series = {"A": AHEAD, "C": AHEAD, "X": AHEAD}
    market = align(series, names, YEAR, YEAR.closes[:20], configuration.alignment, "prices", "close", "close")
    with pytest.raises(MissingPrices, match=r"p: prices has no close for B, D\. Load them") as told:
        window_end(configuration, market, None, at("02-01"), None)
    assert told.value.facts["assets"] == "B, D"


def test_nothing_new_of_a_required_asset_is_an_exhausted_window():  # R63
    configuration = portfolio(TWO)
    market = align({"A": AHEAD}, ["A", "B"], YEAR, YEAR.closes[2:20], PriceAlignmentPolicy(), "prices", "close", "close")
    assert window_end(configuration, market, held("A", "B"), at("02-01"), None) == at("01-03")


def test_without_a_universe_there_is_no_scope():  # R72
    with pytest.raises(ScopeUndetermined, match="p: the signal names no assets"):
        required_assets(portfolio(Scripted(assets=())), ("A",))


def test_required_assets_are_the_union_in_bytewise_order():  # R70
    signal = EqualWeights(asset_list=("b", "A"), override_asset="É")
    assert required_assets(portfolio(signal), ("Z", "a")) == ("A", "Z", "a", "b", "É")


def test_an_exhausted_window_has_no_rows_and_asks_no_calendar():  # R63
    one = Inputs(portfolio(EqualWeights(asset_list=("A",))), {"A": daily(0, 100, 101, 102)}, vectors_of(("1970-01-01T00:00", {"A": 1.0})))
    first, *more = one.run(at("01-03"), at("01-03"), at("02-15"))
    assert more == []
    state = stored(None, first)
    market, vectors = one.night(state, at("01-03"))
    assert vectors is not None
    assert construct(one.configuration, market, vectors, state, at("01-03")) is None


# -- the start of a portfolio -------------------------------------------------------------------------------------------------

EVER = "1970-01-01T00:00"


def started(
    series: Mapping[str, Series], vectors: Vectors, end: str = "01-12", sessions: Sessions = YEAR, **options: Any
) -> dict[str, float]:
    signal = Scripted(assets=tuple(series))
    return values(Inputs(portfolio(signal, **options), series, vectors, sessions).run(at(end)))


def test_a_portfolio_starts_at_the_first_fully_priced_session():
    # A from session 0, B from session 3 (Thu 4), half each: 1; B +10 %: 1.05
    series = {"A": daily(0, *[10.0] * 10), "B": daily(3, 50, 55, 55)}
    assert started(series, vectors_of((EVER, {"A": 0.5, "B": 0.5})), "01-05") == close_to(_01_04=1.0, _01_05=1.05)


@pytest.mark.parametrize("bad", [UNKNOWN, 0.0, -1.0, float("inf")])
def test_an_unusable_price_does_not_start_a_portfolio(bad):
    series = {"A": daily(0, *[10.0] * 10), "B": daily(1, bad, bad, 50, 55)}
    assert started(series, vectors_of((EVER, {"A": 0.5, "B": 0.5})), "01-05") == close_to(_01_04=1.0, _01_05=1.05)


def test_bars_that_never_meet_a_session_are_told_and_not_waited_for():
    # B has bars from Tuesday on, always an hour after the close: the first session after its first bar is Wednesday's
    late = Series(daily(1, 50, 51, 52).times + np.timedelta64(1, "h"), np.array([50.0, 51.0, 52.0]), np.full(3, np.nan))
    series = {"A": daily(0, *[10.0] * 10), "B": late}
    with pytest.raises(MissingPrice, match="no close of B at 2024-01-03"):
        started(series, vectors_of((EVER, {"A": 0.5, "B": 0.5})), "01-05")


def test_an_asset_that_is_not_listed_yet_is_waited_for():
    # A was the target of Monday alone, when it had no bar yet; B has its first bar on Friday night, after the close
    night = daily(0, *[10.0] * 5).times + np.timedelta64(1, "h")
    series = {"A": Series(night, np.full(5, 10.0), np.full(5, np.nan)), "B": Series(night[4:], np.array([50.0]), np.array([np.nan]))}
    series["C"] = daily(0, *[20.0] * 5)
    vectors = vectors_of((EVER, {"A": 1.0}), ("2024-01-01T21:30", {"B": 0.5, "C": 0.5}))
    assert started(series, vectors, "2024-01-05 22:30") == {}


def test_an_asset_of_weight_zero_is_not_waited_for():
    series = {"A": daily(0, 10, 11, 11, 11, 11), "B": daily(3, 50, 55)}
    got = started(series, vectors_of((EVER, {"A": 1.0, "B": 0.0})), "01-05")
    assert got == close_to(_01_01=1.0, _01_02=1.1, _01_03=1.1, _01_04=1.1, _01_05=1.1)


@pytest.mark.parametrize(
    ("start", "first"),
    [
        (date(2024, 1, 2), "01-02"),
        (date(2024, 1, 6), "01-08"),
        (date(2024, 1, 7), "01-08"),
        (date(2024, 1, 8), "01-08"),
    ],  # 6 and 7: weekend
)
def test_start_date(start, first):
    got = started({"A": daily(0, *[10.0] * 12)}, vectors_of((EVER, {"A": 1.0})), "01-09", start_date=start)
    assert next(iter(got)) == first


def test_start_date_is_a_local_date():
    # the session of Tuesday 5 March in Tokyo closes at 06:00 UTC of that day, though it is Tokyo's afternoon
    series = {"A": Series(TOKYO.closes, np.full(len(TOKYO.closes), 10.0), np.full(len(TOKYO.closes), UNKNOWN))}
    got = started(series, vectors_of((EVER, {"A": 1.0})), "03-07", TOKYO, start_date=date(2024, 3, 5))
    assert list(got) == ["03-05", "03-06", "03-07"]


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({"on": "signal_change"}, "01-03"),
        ({"on": "signal_change", "lag": 1}, "01-04"),
        ({"on": "signal_change", "start_date": date(2024, 1, 8)}, "01-08"),
    ],
)
def test_the_first_target_is_a_change(options, first):
    """Though the signal has said the same since 1970: there is nothing to compare with before the first session that may decide."""
    got = started({"A": daily(2, *[10.0] * 10)}, vectors_of((EVER, {"A": 1.0})), "01-10", **options)
    assert next(iter(got)) == first


def test_a_missing_price_at_the_start_date_fails():
    series = {"A": daily(0, *[10.0] * 10), "B": daily(3, *[50.0] * 7)}
    with pytest.raises(MissingPrice, match=r"p: no close of B at 2024-01-02 21:00Z \(last bar never"):
        started(series, vectors_of((EVER, {"A": 0.5, "B": 0.5})), start_date=date(2024, 1, 2))


@pytest.mark.parametrize("options", [{}, {"start_date": date(2024, 1, 1)}])
def test_a_signal_that_becomes_effective_in_the_middle(options):
    # effective at noon of Wednesday 3: bought at that day's close
    series = {"A": daily(0, 10, 11, 12, 15, 18)}
    assert started(series, vectors_of(("01-03 12:00", {"A": 1.0})), "01-05", **options) == close_to(_01_03=1.0, _01_04=1.25, _01_05=1.5)


def test_no_rows_before_anything_is_bought():
    series = {"A": daily(0, *[10.0] * 10)}
    assert started(series, vectors_of(("01-10 21:00:00.000001", {"A": 1.0})), "01-10") == {}
    assert started(series, vectors_of((EVER, {"A": 1.0})), "01-10", start_date=date(2024, 1, 11)) == {}
    assert started(series, vectors_of((EVER, {"A": 1.0})), "01-10", on="month_end") == {}


@pytest.mark.parametrize("emitted", [EVER, "01-03"])
def test_a_signal_that_wants_nothing_has_no_rows(emitted):
    """Nor does it ask for a calendar since 1970."""
    assert started({"A": daily(0, *[10.0] * 10)}, vectors_of((emitted, {"A": 0.0})), "01-10") == {}


def test_the_first_purchase_pays():  # design.md section 6
    built = Inputs(portfolio(TWO, fee=0.01), {"A": daily(0, 10, 11), "B": daily(0, 10, 11)}, vectors_of((EVER, {"A": 0.5, "B": 0.5}))).run(
        at("01-02")
    )
    np.testing.assert_allclose(built[0].close, [0.99, 1.089], rtol=1e-15)
    np.testing.assert_allclose(built[0].returns, [-0.01, 0.1], rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("weights", "fee", "closes", "returns"),
    [
        ([[0.5, 0.5]], 0.00018, [0.99982, 1.049811, 1.1547921, 1.03931289], [-0.00018, 0.05, 0.10, -0.10]),
        ([[1, 0], [0.5, 0.5], [0, 1]], 0.01, [0.99, 1.0791, 1.176219, 0.9409752], [-0.01, 0.09, 0.09, -0.20]),
    ],
)
@pytest.mark.parametrize("nights", [1, 4])
def test_golden_vectors(weights, fee, closes, returns, nights):  # design.md section 6
    series = {"A": daily(0, 100, 110, 121, 121), "B": daily(0, 50, 50, 55, 44)}
    targets = vectors_of(*((f"01-0{k + 1}", dict(zip("AB", w, strict=True))) for k, w in enumerate(weights)))
    built = Inputs(portfolio(Scripted(assets=("A", "B")), fee=fee, accounting="target"), series, targets).run(*YEAR.closes[4 - nights : 4])
    np.testing.assert_allclose(np.concatenate([b.close for b in built]), closes, rtol=0, atol=1e-15)
    np.testing.assert_allclose(np.concatenate([b.returns for b in built]), returns, rtol=0, atol=1e-15)


@pytest.mark.parametrize("options", [{}, {"start_date": date(2023, 12, 28)}])
def test_a_calendar_that_begins_too_late_is_an_error(options):  # R65
    sessions = weekdays("2024-01-08", "2024-12-31")
    with pytest.raises(CalendarRangeError, match=r"calendar WEEKDAYS covers 2024-01-08\.\.2024-12-31"):
        started({"A": daily(0, *[10.0] * 10)}, vectors_of((EVER, {"A": 1.0})), "01-12", sessions, **options)


@pytest.mark.parametrize("options", [{}, {"start_date": date(2024, 2, 1)}])
def test_a_calendar_that_ends_too_early_is_an_error(options):  # R65; lesson: an incomplete calendar that looks like nothing to do
    sessions = weekdays("2023-01-02", "2023-12-29")
    with pytest.raises(CalendarRangeError, match=r"calendar WEEKDAYS covers 2023-01-02\.\.2023-12-29"):
        started({"A": daily(0, *[10.0] * 60)}, vectors_of((EVER, {"A": 1.0})), "03-15", sessions, **options)


@pytest.mark.parametrize("options", [{}, {"start_date": date(2024, 1, 2)}])
def test_a_calendar_without_sessions_is_an_error(options):  # design.md section 3: neither is a no-op
    hollow = Sessions("HOLLOW", YEAR.dates[:0], YEAR.opens[:0], YEAR.closes[:0], YEAR.valid_from, YEAR.valid_to)
    with pytest.raises(EmptySchedule, match="calendar HOLLOW has no session"):
        started({"A": daily(0, *[10.0] * 10)}, vectors_of((EVER, {"A": 1.0})), "01-12", hollow, **options)


@pytest.mark.parametrize("end", ["2025-01-03T21:00", "2025-06-02T21:00"])
def test_a_calendar_that_ends_within_a_window_is_an_error(end):  # R65
    one = Inputs(portfolio(EqualWeights(asset_list=("A",))), {"A": daily(0, *[10.0] * 262)}, vectors_of((EVER, {"A": 1.0})))
    state = stored(None, one.run(at("12-27"))[0])
    market, vectors = one.night(state, at(end))
    assert vectors is not None
    with pytest.raises(CalendarRangeError, match=r"the update window"):
        construct(one.configuration, market, vectors, state, at(end))


def test_rows_up_to_an_instant_do_not_depend_on_a_later_end():  # P7
    """The first vector wants B, which lists on Friday 12; the second, valid from Monday 8, does not: it can be bought that day."""
    series = {"A": daily(0, *[10.0] * 12), "B": daily(9, 5.0, 5.0, 5.0), "C": daily(0, *[20.0] * 12)}
    targets = vectors_of((EVER, {"A": 0.5, "B": 0.5}), ("01-08", {"A": 0.5, "C": 0.5}))
    configuration = portfolio(Scripted(assets=("A", "B", "C")))
    market = market_of(series, YEAR.closes[:12], configuration)
    later = construct(configuration, market, targets, None, at("01-12"))
    assert values([later] if later else []) == close_to(_01_08=1.0, _01_09=1.0, _01_10=1.0, _01_11=1.0, _01_12=1.0)
    earlier = construct(configuration, market, targets, None, at("01-10"))
    assert values([earlier] if earlier else []) == close_to(_01_08=1.0, _01_09=1.0, _01_10=1.0)


# -- signals ------------------------------------------------------------------------------------------------------------------


def test_rows_become_complete_vectors():
    got = vectors_of(("01-02", {"b": 0.5, "É": -0.1}), ("01-03", {"b": 0.0}), ("01-04", {"A": 0.25, "a": 0.75}))
    assert got.assets == ("A", "a", "b", "É")
    assert got.times.tolist() == [datetime(2024, 1, day, 21) for day in (2, 3, 4)]
    assert got.weights.tolist() == [[0, 0, 0.5, -0.1], [0, 0, 0, 0], [0.25, 0.75, 0, 0]]


@pytest.mark.parametrize(
    ("fill", "valid"),
    [
        (None, [-1, 0, 0, 0, 1]),
        (timedelta(days=2), [-1, 0, 0, -1, 1]),  # emitted at s, asked at s + 2 days: t - s < 2 days is false
        (timedelta(days=2, microseconds=1), [-1, 0, 0, 0, 1]),
        (timedelta(days=1), [-1, 0, -1, -1, 1]),
        (timedelta(microseconds=1), [-1, 0, -1, -1, 1]),  # at its own instant a vector is 0 old
    ],
)
def test_forward_fill_is_strict(fill, valid):  # R8, design.md section 4
    targets = vectors_of(("01-02", {"A": 1.0}), ("01-05", {"A": 0.5}))
    got = targets.valid_at(YEAR.closes[:5], None if fill is None else np.timedelta64(fill))  # Mo 1 to Fr 5
    assert got.tolist() == valid


def test_an_expired_vector_trades_no_more():
    # half in A from Tuesday 2, set back daily, valid for less than two days: traded on 2 and 3, and no more on 4 and 5
    series = {"A": daily(0, 10, 10, 11, 12, 13), "B": daily(0, *[1.0] * 5)}
    signal = Scripted(assets=("A", "B"), fill=timedelta(days=2))
    built = Inputs(portfolio(signal), series, vectors_of(("01-02", {"A": 0.5, "B": 0.5}), ("01-05 22:00", {"A": 1.0}))).run(at("01-05"))
    assert trades(built) == {"01-02": {"A": 0.5, "B": 0.5}, "01-03": {"A": 0.5, "B": 0.5}}


def test_a_vector_from_before_the_window_counts_until_the_next():  # lesson: not found when another one lies inside the window
    # night 1 ends on Wednesday 3; the vector of 2 January is that of 4 January too; that of 5 follows
    series = {"A": daily(0, 10, 10, 11, 12, 13, 14), "B": daily(0, 1, 1, 1.2, 1.1, 1.3, 1.5), "C": daily(0, *[7.0] * 6)}
    targets = vectors_of(("01-02", {"A": 0.6, "B": 0.4}), ("01-05", {"B": 0.5, "C": 0.5}))
    one = Inputs(portfolio(Scripted(assets=("A", "B", "C"))), series, targets)
    nights = one.run(at("01-03"), at("01-08"))
    assert len(nights) == 2
    assert trades(nights) == {
        "01-02": {"A": 0.6, "B": 0.4},
        "01-03": {"A": 0.6, "B": 0.4},
        "01-04": {"A": 0.6, "B": 0.4},
        "01-05": {"A": 0.0, "B": 0.5, "C": 0.5},
        "01-08": {"B": 0.5, "C": 0.5},
    }
    # A +10 %, B +20 %: 1.14; A 12/11, B 11/12; then A 13/12, B 13/11; then B 15/13, C flat
    at_4 = 1.14 * (1 + 0.6 / 11 - 0.4 / 12)
    at_5 = at_4 * (1 + 0.6 / 12 + 0.4 * 2 / 11)
    expected = {"01-02": 1.0, "01-03": 1.14, "01-04": at_4, "01-05": at_5, "01-08": at_5 * (1 + 0.5 * 2 / 13)}
    assert values(nights) == pytest.approx(expected, rel=1e-14)


def test_an_asset_that_leaves_is_liquidated_across_nights():  # R76; lesson: no row, no fee, its last return lost
    # A 1.0 at 1 - 0.01 = 0.99. Second night: A +10 % earned = 1.089, then B: turnover 2 -> 1.06722; B +20 % -> 1.280664
    series = {"A": daily(0, 100, 100, 110, 1), "B": daily(0, 9, 9, 50, 60)}
    targets = vectors_of(("01-01", {"A": 1.0}), ("01-03", {"B": 1.0}))
    one = Inputs(portfolio(Scripted(assets=("A", "B")), fee=0.01, on="signal_change"), series, targets)
    for as_ofs in [(at("01-04"),), (at("01-02"), at("01-03"), at("01-04"))]:
        built = one.run(*as_ofs)
        assert values(built) == close_to(_01_01=0.99, _01_02=0.99, _01_03=1.06722, _01_04=1.280664)
        assert trades(built) == {"01-01": {"A": 1.0}, "01-03": {"A": 0.0, "B": 1.0}}
        sale = next(part for part in built if at("01-03") in part.bars.times[part.trades.rows])
        place = sale.assets.index("A")
        assert sale.trades.before[-1, place] == pytest.approx(1.0, rel=1e-15)
        assert (sale.bars.prices[sale.trades.rows[-1], place], sale.prices_before[-1, place]) == (110, 100)


def test_a_nightly_run_pays_no_phantom_fee():  # lesson: weight_before lost when the last weights are read back
    # prices stand still: one purchase, one fee of 1 %, however many nights
    series = {a: daily(0, *[50.0] * 10) for a in "ABCDEFGHI"}
    one = Inputs(
        portfolio(EqualWeights(asset_list=tuple("ABCDEFGHI")), fee=0.01), series, vectors_of((EVER, dict.fromkeys("ABCDEFGHI", 1 / 9)))
    )
    nights = one.run(*YEAR.closes[:10])
    assert len(nights) == 10
    assert list(values(nights).values()) == pytest.approx([0.99] * 10, rel=1e-14)
    assert list(trades(nights)) == ["01-01"]


def test_prices_and_volumes_of_the_trade_before():
    # A is held from Mo 1 to We 3, B from Tu 2 on; volumes as given, null where there is none
    dates = ["01-01", "01-02", "01-03"]
    series = {
        "A": bars(dict(zip(dates, (10, 11, 12), strict=True)), {"01-01": 7.0, "01-03": 9.0}),
        "B": bars(dict(zip(dates, (5, 6, 7), strict=True)), dict(zip(dates, (1, 2, 3), strict=True))),
    }
    targets = vectors_of(("01-01", {"A": 1.0}), ("01-02", {"A": 0.5, "B": 0.5}), ("01-03", {"B": 1.0}))
    one = Inputs(portfolio(Scripted(assets=("A", "B"))), series, targets)
    for as_ofs in [(at("01-03"),), tuple(at(d) for d in dates)]:
        built = one.run(*as_ofs)
        rows = {
            (time[5:10], asset): numbers for time, asset, *numbers in ((r[0], r[1], *map(float.fromhex, r[2:])) for r in weight_rows(built))
        }
        # price_current, price_before, volume_current, volume_before
        assert nan_equal(rows["01-01", "A"][2:], [10, UNKNOWN, 7, UNKNOWN])
        assert nan_equal(rows["01-02", "A"][2:], [11, 10, UNKNOWN, 7])
        assert nan_equal(rows["01-02", "B"][2:], [6, UNKNOWN, 2, UNKNOWN])
        assert nan_equal(rows["01-03", "A"][2:], [12, 11, 9, UNKNOWN])
        assert nan_equal(rows["01-03", "B"][2:], [7, 6, 3, 2])
        assert set(rows) == {("01-01", "A"), ("01-02", "A"), ("01-02", "B"), ("01-03", "A"), ("01-03", "B")}


# -- override -----------------------------------------------------------------------------------------------------------------

NAV = FixedWeights.from_signal_configuration(weights={"A": 1.0}, override_asset="NAV")


def test_an_override_asset_is_published_and_the_computed_value_kept():  # R77
    # A 10, 11, 12.1, 12.1: computed 1, 1.1, 1.21, 1.21; NAV 500, 505, 515.1, 510: returns 1 %, 2 %, 510 / 515.1 - 1
    series = {"A": daily(0, 10, 11, 12.1, 12.1), "NAV": daily(0, 500, 505, 515.1, 510)}
    one = Inputs(portfolio(NAV), series, vectors_of((EVER, {"A": 1.0})))
    for as_ofs in [(at("01-04"),), (at("01-01"), at("01-02"), at("01-04")), tuple(YEAR.closes[:4])]:
        built = one.run(*as_ofs)
        np.testing.assert_array_equal(np.concatenate([b.close for b in built]), [500, 505, 515.1, 510])
        np.testing.assert_allclose(np.concatenate([b.calculated_close for b in built]), [1, 1.1, 1.21, 1.21], rtol=1e-14)
        # the first return of a later night is measured from the price before it, which is read
        np.testing.assert_allclose(np.concatenate([b.returns for b in built])[1:], [0.01, 0.02, 510 / 515.1 - 1], rtol=0, atol=1e-15)
        assert all("NAV" not in part.assets for part in built)


def test_an_override_price_is_never_back_filled():  # R77, P7
    with pytest.raises(MissingPrice, match=r"p: no close of NAV at 2024-01-01 21:00Z \(last bar never"):
        Inputs(portfolio(NAV), {"A": daily(0, 10, 11, 12), "NAV": daily(1, 500, 505)}, vectors_of((EVER, {"A": 1.0}))).run(at("01-03"))


@pytest.mark.parametrize("bad", [UNKNOWN, 0.0, -1.0, float("inf")])
def test_an_unusable_override_price_fails(bad):  # R77
    with pytest.raises(InvalidPrice, match="p: close of NAV at 2024-01-02 21:00Z"):
        Inputs(portfolio(NAV), {"A": daily(0, 10, 11, 12), "NAV": daily(0, 500, bad, 505)}, vectors_of((EVER, {"A": 1.0}))).run(at("01-03"))


def test_an_override_price_may_be_held():  # R77
    one = Inputs(
        portfolio(NAV, staleness=timedelta(days=1), missing="hold"),
        {"A": daily(0, 10, 11, 12), "NAV": daily(0, 500, UNKNOWN, 505)},
        vectors_of((EVER, {"A": 1.0})),
    )
    assert list(values(one.run(at("01-03"))).values()) == [500, 500, 505]


# -- intraday -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("splits", [[], ["01-01 17:00"], ["01-01 18:00", "01-01 21:00", "01-02 18:00", "01-02 20:00"]])
def test_intraday_values_between_the_trades_at_the_closes(splits):
    # sessions 14:00 to 21:00, every three hours and at the close: 17:00, 20:00, 21:00. Decided and bought at the close of 1 January.
    hours = ["01-01 17:00", "01-01 20:00", "01-01 21:00", "01-02 17:00", "01-02 20:00", "01-02 21:00", "01-03 17:00"]
    series = {
        "A": bars(dict(zip(hours, (1, 2, 10, 11, 12, 12, 15), strict=True))),
        "B": bars(dict(zip(hours, (9, 9, 20, 20, 18, 20, 20), strict=True))),
    }
    one = Inputs(portfolio(TWO, fee=0.01, frequency="3h"), series, vectors_of((EVER, {"A": 0.5, "B": 0.5})))
    built = one.run(*(at(s) for s in splits), at("01-03 17:00"))
    # 0.99 at the purchase; 17:00 A +10 %: 1.05; 20:00 A +20 %, B -10 %: 1.05; 21:00 A +20 %: 1.1, before the trade
    # weights before 0.6 / 1.1 = 6/11 and 5/11: turnover 1/11, 0.99 * 1.1 * (1 - 0.01 / 11) = 1.089 - 0.00099 = 1.08801; then A +25 %
    times = [str(t)[5:16].replace("T", " ") for part in built for t in part.times]
    assert times == hours[2:]
    expected = [0.99, 0.99 * 1.05, 0.99 * 1.05, 1.08801, 1.08801 * 1.125]
    np.testing.assert_allclose(np.concatenate([b.close for b in built]), expected, rtol=1e-14)


# -- random worlds ------------------------------------------------------------------------------------------------------------

NAMES = ("AAPL", "BRK.B", "Z", "a", "msft", "É", "é", "ABC", "ABD", "B", "BB", "~")  # bytewise order is not that of a dictionary
HALF_YEAR = slice(20, 140)  # 29 January to 12 July
QUARTER_ENDS = (64, 129)  # 29 March, 28 June


def random_series(rng: np.random.Generator, gaps: float) -> Series:
    closes = YEAR.closes[HALF_YEAR]
    prices = rng.uniform(5, 500) * np.cumprod(1 + rng.normal(0, 0.02, len(closes)).clip(-0.1, 0.1) * (rng.random(len(closes)) < 0.9))
    times = closes - np.where(rng.random(len(closes)) < gaps, 3 * HOUR, 0 * HOUR)  # some bars are stamped before the close
    kept = rng.random(len(closes)) >= gaps / 2
    kept[[0, -1]] = True
    prices[(rng.random(len(closes)) < gaps / 4) & (np.arange(len(closes)) > 3)] = UNKNOWN
    volumes = np.where(rng.random(len(closes)) < 0.5, rng.integers(1, 10**6, len(closes)).astype(float), UNKNOWN)
    return Series(times[kept], prices[kept], volumes[kept])


def random_vectors(rng: np.random.Generator, assets: tuple[str, ...]) -> Vectors:
    """Emitted at closes, between them and on weekends; assets leave and come back; a vector may repeat the one before."""
    span = int((YEAR.closes[135] - YEAR.closes[22]) // np.timedelta64(1, "m"))
    at_random = YEAR.closes[22] + rng.choice(span, 10, replace=False) * np.timedelta64(1, "m")
    always = YEAR.closes[[int(rng.choice([5, 21])), *(i - 1 for i in QUARTER_ENDS)]]
    times = np.unique(np.concatenate([always, at_random, rng.choice(YEAR.closes[24:135], 10, replace=False)]))
    weights = rng.normal(0.09, 0.05, (len(times), len(assets)))
    weights[rng.random(weights.shape) < 0.3] = 0.0
    for k in range(1, len(times)):
        if rng.random() < 0.2:
            weights[k] = weights[k - 1]
    weights[rng.choice(np.flatnonzero(~np.isin(times, always)))] = 0.0  # once, everything is sold
    return Vectors(times, assets, weights)


def random_inputs(seed: int, gaps: bool = False, **options: Any) -> Inputs:
    rng = np.random.default_rng(seed)
    assets = tuple(sorted(rng.choice(NAMES, int(rng.integers(9, 13)), replace=False).tolist(), key=str.encode))
    fill = (None, timedelta(days=4), timedelta(days=30))[seed % 3]
    policy = {"staleness": timedelta(days=30), "missing": "hold"} if gaps else {}
    signal = Scripted(assets=assets, fill=fill, override_asset=assets[0] if seed % 4 == 3 else None)
    return Inputs(
        portfolio(signal, fee=0.001, **policy, **options),
        {a: random_series(rng, 0.3 if gaps else 0.0) for a in assets},
        random_vectors(rng, assets),
    )


LAST = YEAR.closes[HALF_YEAR.stop - 1]
everything = [
    pytest.mark.parametrize("on", ["every_session", "signal_change", "week_end", "month_end", "quarter_end"]),
    pytest.mark.parametrize("lag", [0, 1, 3]),
    pytest.mark.parametrize("accounting", ["drifted", "target"]),
]


def for_everything(test: Any) -> Any:
    for mark in everything:
        test = mark(test)
    return test


def salt(on: str, lag: int, accounting: str) -> int:
    return len(on) * 100 + lag * 10 + len(accounting)


@for_everything
def test_nights_are_one_run_to_the_bit(on, lag, accounting):  # P1, R73, R97
    for k in range(4):
        one = random_inputs(salt(on, lag, accounting) + k, gaps=k == 3, on=on, lag=lag, accounting=accounting)
        whole = one.run(LAST)
        assert len(whole) == 1
        rng = random.Random(k)
        grid = list(YEAR.closes[HALF_YEAR])
        splits = [rng.sample(grid, 7), [t - 5 * HOUR for t in rng.sample(grid[1:], 20)], grid][: 2 if k else 3]
        for split in splits:
            nights = one.run(*sorted(split), LAST)
            assert value_rows(nights) == value_rows(whole)
            assert weight_rows(nights) == weight_rows(whole)


@for_everything
def test_values_agree_with_the_reference(on, lag, accounting):
    """Sessions, validity, decisions and lag re-told with plain loops; values by the scalar reference."""
    for seed in range(3):
        one = random_inputs(seed + salt(on, lag, accounting), on=on, lag=lag, accounting=accounting)
        signal = one.configuration.signal
        days = [d.item() for d in YEAR.dates]
        closes = [c.item() for c in YEAR.closes]
        emitted = [(t.item(), w.tolist()) for t, w in zip(one.vectors.times, one.vectors.weights, strict=True)]
        fill = None if signal.maximum_forward_fill is None else signal.maximum_forward_fill.item()
        valid = [_valid(emitted, close, fill) for close in closes]
        prices = {a: dict(zip([t.item() for t in s.times], s.values.tolist(), strict=True)) for a, s in one.series.items()}
        begin = next(i for i, close in enumerate(closes) if valid[i] is not None and all(close in prices[a] for a in signal.universe))
        end = LAST.item() if fill is None else min(LAST.item(), emitted[-1][0] + fill - timedelta(microseconds=1))
        last = max(i for i, close in enumerate(closes) if close <= end)
        targets = {
            i + lag - begin: valid[i]
            for i in range(begin, last + 1 - lag)
            if valid[i] is not None and _decides(on, i, begin, days, valid)
        }  # fmt: skip
        rows = [[prices[a][close] for a in one.vectors.assets] for close in closes[begin : last + 1]]
        want, traded = REFERENCES[accounting](rows, targets, 0.001, exact=True)
        (built,) = one.run(LAST)
        begun = [i for i, v in enumerate(want) if v == v]
        assert [t.item() for t in built.times] == [closes[begin + i] for i in begun]
        assert built.calculated_close.tolist() == [want[i] for i in begun]
        assert [built.bars.times[r].item() for r in built.trades.rows] == [closes[begin + i] for i in traded]


def _valid(emitted: list[tuple[datetime, list[float]]], close: datetime, fill: timedelta | None) -> list[float] | None:
    before = [(time, weights) for time, weights in emitted if time <= close]
    return before[-1][1] if before and (fill is None or close - before[-1][0] < fill) else None


def _decides(on: str, i: int, begin: int, days: list[date], valid: list[list[float] | None]) -> bool:
    if on == "every_session":
        return True
    if on == "signal_change":
        return i == begin or valid[i] != valid[i - 1]
    day, after = days[i], days[i + 1]
    if on == "week_end":
        return day.isocalendar()[:2] != after.isocalendar()[:2]
    month_is_over = all(
        d.isoweekday() > 5
        for d in (date(day.year, day.month, n) for n in range(day.day + 1, calendar.monthrange(day.year, day.month)[1] + 1))
    )
    return month_is_over and (on == "month_end" or day.month % 3 == 0)


@pytest.mark.parametrize("seed", range(8))
def test_the_order_of_what_is_given_never_reaches_the_numbers(seed):  # P4, R98
    one = random_inputs(seed)
    names = list(one.series)
    random.Random(seed).shuffle(names)
    signal = one.configuration.signal.model_copy(update={"assets": tuple(names)})
    other = Inputs(portfolio(signal, fee=0.001), {a: one.series[a] for a in names}, one.vectors)
    assert value_rows(other.run(LAST)) == value_rows(one.run(LAST))
    assert weight_rows(other.run(LAST)) == weight_rows(one.run(LAST))


@pytest.mark.parametrize("seed", range(8))
def test_unrelated_assets_change_nothing(seed):  # P3, R68, R71
    one = random_inputs(seed)
    rng = np.random.default_rng(seed)
    noise = {f"{prefix}{k}": random_series(rng, 0.0) for prefix in ("!", "M", "zz") for k in range(10)}
    noise["BEHIND"] = Series(*(x[:3] for x in (noise["M0"].times, noise["M0"].values, noise["M0"].volumes)))
    noise["AHEAD"] = Series(YEAR.closes, np.ones(len(YEAR.closes)), np.ones(len(YEAR.closes)))
    noise["BAD"] = Series(YEAR.closes[HALF_YEAR], np.full(120, UNKNOWN), np.full(120, UNKNOWN))
    other = replace(one, series={**noise, **one.series})
    assert value_rows(other.run(LAST)) == value_rows(one.run(LAST))
    assert weight_rows(other.run(*YEAR.closes[30:140:9], LAST)) == weight_rows(one.run(LAST))


@pytest.mark.parametrize("accounting", ["drifted", "target"])
@pytest.mark.parametrize("seed", range(6))
def test_no_look_ahead(seed, accounting):  # P7
    one = random_inputs(seed, accounting=accounting, lag=seed % 3)
    known = YEAR.closes[60]
    rng = np.random.default_rng(seed)

    def later(series: Series) -> Series:
        return replace(
            series, values=np.where(series.times > known, series.values * rng.uniform(0.9, 1.1, len(series.times)), series.values)
        )

    vectors = replace(one.vectors, weights=np.where((one.vectors.times > known)[:, None], one.vectors.weights * 0.9, one.vectors.weights))
    changed = Inputs(one.configuration, {a: later(s) for a, s in one.series.items()}, vectors)
    (left,), (right,) = one.run(LAST), changed.run(LAST)
    limit = str(known)
    assert [r for r in value_rows([left]) if r[0] <= limit] == [r for r in value_rows([right]) if r[0] <= limit] != []
    assert [r for r in weight_rows([left]) if r[0] <= limit] == [r for r in weight_rows([right]) if r[0] <= limit] != []
    assert value_rows([left]) != value_rows([right])


@pytest.mark.parametrize("seed", range(6))
def test_prices_times_powers_of_two(seed):  # P6
    one = random_inputs(seed * 4)  # no override asset, whose price is published as it is
    rng = np.random.default_rng(seed)
    scaled = {a: replace(s, values=s.values * 2.0 ** int(rng.integers(-9, 10))) for a, s in one.series.items()}
    assert value_rows(replace(one, series=scaled).run(LAST)) == value_rows(one.run(LAST))


@pytest.mark.parametrize("nights", [3, 30])
@pytest.mark.parametrize("seed", range(4))
def test_intraday_nights_are_one_run_to_the_bit(seed, nights):  # P1
    rng = np.random.default_rng(seed)
    assets = tuple("ABCDEFGHI")
    grid = YEAR.valuation_times(timedelta(minutes=90))
    grid = grid[(grid > YEAR.opens[5]) & (grid <= YEAR.closes[30])]
    series = {
        a: Series(grid, rng.uniform(5, 500) * np.cumprod(1 + rng.normal(0, 0.01, len(grid))), np.full(len(grid), UNKNOWN)) for a in assets
    }
    emitted = np.append(YEAR.closes[5], np.sort(rng.choice(grid[10:], 9, replace=False)))
    targets = Vectors(emitted, assets, rng.normal(0.1, 0.05, (10, 9)))
    configuration = portfolio(
        Scripted(assets=assets), fee=0.001, frequency="90m", lag=seed % 2, accounting=("drifted", "target")[seed // 2]
    )
    one = Inputs(configuration, series, targets)
    whole = one.run(grid[-1])
    split = one.run(*sorted(rng.choice(grid, nights, replace=False)), grid[-1])
    assert len(split) > 1
    assert value_rows(split) == value_rows(whole)
    assert weight_rows(split) == weight_rows(whole)
