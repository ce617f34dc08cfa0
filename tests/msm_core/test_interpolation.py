"""The kernel of interpolated prices: rows worked by hand, and random worlds of nine assets against plain pandas, asset by asset.

A night sees what a nightly job would read: bars after each asset's watermark up to its as-of, and of the nights before only the time,
close and vwap of the last row given out.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date, timedelta
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msm_core.errors import (
    BarOffGrid,
    CalendarRangeError,
    EmptySchedule,
    InvalidPrice,
    MislabelledBar,
    MisplacedBar,
    MsmError,
    PriceGap,
    RepeatedBar,
)
from msm_core.frames import parse_frequency
from msm_core.interpolation import NUMBERS, Carry, Interpolated, Policy, PriceBars, interpolate
from msm_core.pandas_calendars import PandasCalendar
from msm_core.sessions import Sessions

N = 9
ASSETS = [f"a{i}" for i in range(N)]
NULL = float("nan")
FAR = np.datetime64("2100-01-01", "us")
DAY = np.timedelta64(1, "D")
MARGIN = {"close": np.timedelta64(0, "us"), "session_date": 2 * DAY}  # what is read again before a watermark

# -- calendars, policies, bars by hand ----------------------------------------------------------------------------------------


@functools.cache
def sessions_of(name: str, first: str, last: str) -> Sessions:
    calendar = PandasCalendar.named(name)
    found = calendar.sessions(date.fromisoformat(first), date.fromisoformat(last))
    opens, closes = (
        np.array([t.replace(tzinfo=None) for t in times], "datetime64[us]")
        for times in ([s.opens_at for s in found], [s.closes_at for s in found])
    )
    dates = np.array([s.local_date for s in found], "datetime64[D]")
    return Sessions(name, dates, opens, closes, np.datetime64(first), np.datetime64(last), calendar.timezone)


def weekdays(first: str, last: str) -> Sessions:
    """Monday to Friday, 14:30 to 21:00 UTC."""
    days = np.arange(np.datetime64(first, "D"), np.datetime64(last, "D") + 1)
    days = days[np.is_busday(days)]
    opens = days.astype("datetime64[us]") + np.timedelta64(870, "m")
    closes = opens + np.timedelta64(390, "m")
    return Sessions("WEEKDAYS", days, opens, closes, np.datetime64(first), np.datetime64(last))


WEEKS = weekdays("2024-01-01", "2024-01-31")  # 1 January is a Monday
NYSE = functools.partial(sessions_of, "NYSE")


def policy(cadence: str = "1d", frequency: str | None = None, rule: Any = "ffill", label: str = "close") -> Policy:
    return Policy("prices", parse_frequency(cadence), parse_frequency(frequency or cadence), rule, label)


def at(text: str) -> np.datetime64:
    """`01-03`: the close of 3 January; `01-03 15:00`; or a whole timestamp."""
    text = f"{text} 21:00" if len(text) == 5 else text
    return np.datetime64((text if text[4] == "-" else f"2024-{text}").replace(" ", "T"), "us")


def bars_of(given: Mapping[str, Mapping[str, Any]], assets: Sequence[str] = ASSETS) -> PriceBars:
    """`{"a0": {"01-03": 11.0, "01-04": {"close": 12.0, "volume": 5.0}}}`; what is not given is null."""
    rows = [
        (assets.index(a), at(t), v if isinstance(v, Mapping) else {"close": v})
        for a in sorted(given, key=assets.index)
        for t, v in given[a].items()
    ]
    return PriceBars(
        asset=np.array([a for a, _, _ in rows], np.int64),
        times=np.array([t for _, t, _ in rows], "datetime64[us]"),
        numbers={name: np.array([v.get(name, NULL) for _, _, v in rows], float) for name in NUMBERS},
        open_times=np.array([at(v["open_time"]) if "open_time" in v else np.datetime64("NaT") for _, _, v in rows], "datetime64[us]"),
        interpolated=np.zeros(len(rows), bool),
    )


def nothing_stored(count: int = N) -> Carry:
    return Carry(np.full(count, np.datetime64("NaT", "us")), np.full(count, NULL), np.full(count, NULL))


def run(
    bars: PriceBars, sessions: Sessions, rules: Policy, carry: Carry | None = None, as_of: Any = FAR, assets: Sequence[str] = ASSETS
) -> Interpolated:
    return interpolate(bars, assets, sessions, carry or nothing_stored(len(assets)), rules, as_of)


def clean(*args: Any, **options: Any) -> PriceBars:
    """The rows of a run in which nothing is wrong."""
    done = run(*args, **options)
    assert {ASSETS[place]: str(error) for place, error in done.errors.items()} == {}
    return done.bars


def rows_of(bars: PriceBars) -> pd.DataFrame:
    return pd.DataFrame(
        {"asset": bars.asset, "time": bars.times, "open_time": bars.open_times, **bars.numbers, "interpolated": bars.interpolated}
    )


def told(bars: PriceBars, place: int = 0) -> dict[str, tuple[Any, ...]]:
    """`{"01-03 21:00": ("01-03 14:30", open, high, low, close, volume, trade_count, vwap, interpolated)}`; null is None."""
    own = rows_of(bars)[bars.asset == place].drop(columns="asset")
    own[["time", "open_time"]] = own[["time", "open_time"]].apply(lambda column: column.dt.strftime("%m-%d %H:%M"))
    own = own.astype(object).where(own.notna(), None)
    return {time: tuple(row) for time, *row in own.itertuples(index=False)}


def bits(bars: PriceBars) -> dict[str, bytes]:
    """Every column to the bit, in order of (asset, time); a NaN is a null, whichever it is."""
    order = np.lexsort((bars.times, bars.asset))
    columns = {"asset": bars.asset, "times": bars.times, "open_times": bars.open_times, "interpolated": bars.interpolated}
    columns |= {name: np.where(np.isnan(column), NULL, column) for name, column in bars.numbers.items()}
    return {name: column[order].tobytes() for name, column in columns.items()}


def joined(parts: Sequence[PriceBars]) -> PriceBars:
    def all_of(field: str) -> np.ndarray:
        return np.concatenate([getattr(p, field) for p in parts])

    numbers = {name: np.concatenate([p.numbers[name] for p in parts]) for name in NUMBERS}
    return PriceBars(all_of("asset"), all_of("times"), numbers, all_of("open_times"), all_of("interpolated"))


def only(bars: PriceBars, mask: np.ndarray) -> PriceBars:
    numbers = {name: column[mask] for name, column in bars.numbers.items()}
    return PriceBars(bars.asset[mask], bars.times[mask], numbers, bars.open_times[mask], bars.interpolated[mask])


def nine(given: Mapping[str, Any]) -> PriceBars:
    """The same bars for nine assets, prices times 1, 2, 4 ... 256, which changes no mantissa."""
    bars = bars_of(dict.fromkeys(ASSETS, given))
    return replace(bars, numbers={n: c if n in ("volume", "trade_count") else c * 2.0**bars.asset for n, c in bars.numbers.items()})


def assert_nine(bars: PriceBars, expected: Mapping[str, tuple[Any, ...]]) -> None:
    """`expected` for the first asset, and its prices times 2 ** place for the others."""
    for place in range(N):
        scaled = [1, *[2.0**place] * 4, 1, 1, 2.0**place, 1]
        rows = {t: tuple(v if v is None or s == 1 else v * s for v, s in zip(row, scaled, strict=True)) for t, row in expected.items()}
        assert told(bars, place) == rows


# -- the rules, by hand ---------------------------------------------------------------------------------------------------------

FULL = {"open": 10.0, "high": 12.0, "low": 9.0, "close": 11.0, "volume": 500.0, "trade_count": 7.0, "vwap": 10.5}
GAPS = {"01-03": FULL | {"open_time": "01-03 14:30"}, "01-05": 13.0, "01-09": FULL | {"open": NULL, "open_time": "01-09 15:07"}}


def test_every_rule_of_a_gap():  # R45; lessons: back-fill, a null that overwrites its bar, rows manufactured for weekends
    assert_nine(
        clean(nine(GAPS), WEEKS, policy()),
        {  # nothing on 1 and 2 January, before the first bar; nothing on 6 and 7, a weekend; nothing after the last bar
            "01-03 21:00": ("01-03 14:30", 10.0, 12.0, 9.0, 11.0, 500.0, 7.0, 10.5, False),
            "01-04 21:00": ("01-04 14:30", 11.0, 11.0, 11.0, 11.0, 0.0, 0.0, 10.5, True),
            "01-05 21:00": (None, None, None, None, 13.0, None, None, None, False),  # nulls stay null
            "01-08 21:00": ("01-08 14:30", 13.0, 13.0, 13.0, 13.0, 0.0, 0.0, None, True),  # the previous row's vwap: null
            "01-09 21:00": ("01-09 15:07", None, 12.0, 9.0, 11.0, 500.0, 7.0, 10.5, False),
        },
    )


def test_the_gap_after_the_last_stored_bar_is_filled():  # R45; lesson: the schedule began at the first new bar
    carry = Carry(np.full(N, at("01-03")), 11.0 * 2.0 ** np.arange(N), 10.5 * 2.0 ** np.arange(N))
    seen = nine({"01-03": 99.0, "01-08": 13.0})  # a bar at the watermark, read again, is passed over
    assert_nine(
        clean(seen, WEEKS, policy(), carry),
        {
            "01-04 21:00": ("01-04 14:30", 11.0, 11.0, 11.0, 11.0, 0.0, 0.0, 10.5, True),
            "01-05 21:00": ("01-05 14:30", 11.0, 11.0, 11.0, 11.0, 0.0, 0.0, 10.5, True),
            "01-08 21:00": (None, None, None, None, 13.0, None, None, None, False),
        },
    )
    assert len(clean(bars_of({}), WEEKS, policy(), carry).times) == 0  # no new bar, no row
    assert len(clean(bars_of({}), WEEKS, policy()).times) == 0


def test_a_bar_that_its_source_calls_interpolated_stays_so():
    bars = nine({"01-03": FULL, "01-05": FULL})
    rows = told(clean(replace(bars, interpolated=bars.times == at("01-03")), WEEKS, policy()))
    assert [(row[4], row[5], row[-1]) for row in rows.values()] == [(11.0, 500.0, True), (11.0, 0.0, True), (11.0, 500.0, False)]


def test_half_a_year_without_a_bar():  # R45
    year = sessions_of("24/7", "2024-01-01", "2024-12-31")
    rows = rows_of(clean(nine({"01-02 00:00": 5.0, "07-01 00:00": 6.0, "12-31 00:00": 7.0}), year, policy()))
    # from the close of 1 January, 2 January 00:00, to that of 30 December: 366 - 1 days each
    assert rows.groupby("asset").size().tolist() == [365] * N
    assert rows.groupby("asset")["interpolated"].sum().tolist() == [362] * N
    # 2 January to 30 June are 181 rows, 1 July to 30 December 183, and the last day's
    assert rows[rows["asset"] == 8]["close"].value_counts().to_dict() == {5.0 * 256: 181, 6.0 * 256: 183, 7.0 * 256: 1}


def test_one_bar_is_enough():  # lesson: assets with only one bar were skipped
    assert list(told(clean(nine({"01-03": 1.0}), WEEKS, policy()))) == ["01-03 21:00"]


# -- where a daily bar belongs --------------------------------------------------------------------------------------------------

STAMPS = {
    "at the close": ("close", lambda s: s.closes),
    "inside": ("close", lambda s: s.opens + (s.closes - s.opens) // 3),
    "a tick after the open": ("close", lambda s: s.opens + np.timedelta64(1, "us")),
    "date, UTC midnight": ("session_date", lambda s: s.dates.astype("datetime64[us]")),
    "date, local midnight": ("session_date", lambda s: local_midnights(s)),
}
CALENDARS = {
    "24/7": sessions_of("24/7", "2024-01-01", "2024-02-15"),
    "NYSE, clocks forward": NYSE("2024-02-20", "2024-03-28"),
    "NYSE, clocks back, early closes": NYSE("2023-10-20", "2023-12-28"),
    "Tokyo": sessions_of("JPX", "2023-12-20", "2024-02-15"),
    "a session over midnight UTC": sessions_of("CME_Equity", "2024-02-20", "2024-03-28"),
}


def local_midnights(sessions: Sessions) -> np.ndarray:
    local = pd.DatetimeIndex(sessions.dates.astype("datetime64[ns]")).tz_localize(sessions.timezone)
    return local.tz_convert("UTC").tz_localize(None).to_numpy().astype("datetime64[us]")


@pytest.mark.parametrize("stamp", STAMPS)
@pytest.mark.parametrize("calendar", CALENDARS)
def test_a_daily_bar_belongs_to_its_session_however_it_is_stamped(calendar, stamp):
    """R45; lesson: midnight-stamped daily bars, and 24/7 bars, that all turned interpolated with volume 0."""
    sessions, (label, stamped) = CALENDARS[calendar], STAMPS[stamp]
    bars, ends = world(sessions, "1d", seed=3, exact=True)
    place = np.searchsorted(sessions.closes, ends)
    rows = rows_of(clean(replace(bars, times=stamped(sessions)[place]), sessions, policy(label=label)))
    expected = reference(bars, ends, sessions, "1d", "1d")
    pd.testing.assert_frame_equal(rows, expected, check_dtype=False)
    assert rows.loc[~rows["interpolated"], "volume"].sum() == np.nansum(bars.numbers["volume"])  # integers
    assert np.isin(rows["time"].to_numpy(), sessions.closes).all()


def test_holidays_and_early_closes_of_new_york():
    # Thanksgiving, 23 November 2023, has no session; the day after closes at 13:00 in New York, 18:00 UTC
    given = {f"2023-11-{day} {time}": 1.0 for day, time in (("22", "21:00"), ("24", "18:00"), ("27", "21:00"))}
    assert list(told(clean(nine(given), NYSE("2023-11-20", "2023-11-30"), policy()))) == ["11-22 21:00", "11-24 18:00", "11-27 21:00"]


def test_bars_of_days_without_a_session_are_left_out():
    given = {"01-05": 1.0, "01-06": 2.0, "01-07 03:00": 3.0, "01-08": 4.0, "01-15 21:00": 9.0}
    martin_luther_king = told(clean(nine(given), NYSE("2024-01-02", "2024-01-31"), policy()))
    # the bar of 15 January, a holiday, makes no row, nor does it end the gap
    assert {t: row[4] for t, row in martin_luther_king.items()} == {"01-05 21:00": 1.0, "01-08 21:00": 4.0}
    dated = {"01-05 00:00": 1.0, "01-06 00:00": 2.0, "01-08 00:00": 4.0}
    assert {t: row[4] for t, row in told(clean(nine(dated), WEEKS, policy(label="session_date"))).items()} == {
        "01-05 21:00": 1.0,
        "01-08 21:00": 4.0,
    }


# -- the grid of intraday bars --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("days", "first", "last", "count"),
    [
        (("2024-03-08", "2024-03-11"), "2024-03-08 14:35", "2024-03-11 20:00", 2 * 78),  # clocks forward: Monday opens at 13:30 UTC
        (("2024-11-01", "2024-11-04"), "2024-11-01 13:35", "2024-11-04 21:00", 2 * 78),  # and back
        (("2023-11-22", "2023-11-27"), "2023-11-22 14:35", "2023-11-27 21:00", 2 * 78 + 42),  # 09:30 to 13:00 is 210 minutes
        (("2023-07-03", "2023-07-05"), "2023-07-03 13:35", "2023-07-05 20:00", 42 + 78),
    ],
)
def test_grids_over_clock_changes_holidays_and_early_closes(days, first, last, count):
    rows = rows_of(clean(nine({first: 1.0, last: 2.0}), NYSE("2023-06-01", "2024-12-20"), policy("5m")))
    assert rows.groupby("asset").size().tolist() == [count] * N
    one = rows[rows["asset"] == 0]
    assert (one["time"].iloc[0], one["time"].iloc[-1]) == (at(first), at(last))
    gaps = one["time"].diff().dropna()
    assert (gaps[one["time"].dt.date.diff().dropna() == timedelta(0)] == timedelta(minutes=5)).all()
    assert (one["open_time"].iloc[1:-1] == one["time"].iloc[1:-1] - timedelta(minutes=5)).all()


@pytest.mark.parametrize(
    ("cadence", "frequency", "ends"),
    [
        ("1h", "1h", ["15:30", "16:30", "17:30", "18:30", "19:30", "20:30", "21:00"]),  # 6.5 hours: the last slot is a short one
        ("2h", "2h", ["16:30", "18:30", "20:30", "21:00"]),
        ("30m", "1h", ["15:30", "16:30", "17:30", "18:30", "19:30", "20:30", "21:00"]),
        ("65m", "65m", ["15:35", "16:40", "17:45", "18:50", "19:55", "21:00"]),
        ("5m", "1d", ["21:00"]),
        ("5m", "4h", ["18:30", "21:00"]),
    ],
)
def test_slots_and_buckets_end_with_the_session(cadence, frequency, ends):
    rows = clean(nine({"01-03 21:00": 1.0, "01-04 21:00": 2.0}), WEEKS, policy(cadence, frequency))
    assert list(told(rows)) == ["01-03 21:00", *(f"01-04 {end}" for end in ends)]


def test_bars_outside_the_sessions_are_left_out():
    given = {"01-03 14:00": 7.0, "01-03 14:30": 8.0, "01-03 14:35": 1.0, "01-03 21:00": 2.0, "01-03 21:05": 9.0, "01-04 09:13": 9.0}
    rows = told(clean(nine(given), WEEKS, policy("5m")))  # a bar stamped at the open is the last of the hours before
    assert (len(rows), rows["01-03 14:35"][4], rows["01-03 20:55"][4], rows["01-03 21:00"][4]) == (78, 1.0, 1.0, 2.0)


# -- buckets --------------------------------------------------------------------------------------------------------------------


def test_buckets_by_hand():  # R45; lessons: 5m -> 15m did nothing, overlapping windows
    bar = {"trade_count": 2.0}
    given = {
        # 14:30 to 14:45: all three, with nulls; vwap = (100 * 10 + 300 * 12) / 400 = 11.5: a part without vwap has no weight
        "01-03 14:35": bar | {"high": 11.0, "low": 9.0, "close": 10.0, "volume": 100.0, "vwap": 10.0, "open_time": "01-03 14:30"},
        "01-03 14:40": bar | {"open": 10.5, "high": 10.75, "close": 10.5, "volume": 50.0},
        "01-03 14:45": bar | {"open": 10.5, "high": 13.0, "low": 10.0, "close": 12.0, "volume": 300.0, "vwap": 12.0},
        # 14:45 to 15:00: only its second part, and nothing known of it but the close
        "01-03 14:55": 12.5,
        # 15:00 to 15:30: nothing
        # 15:30 to 15:45: its last part; 15:45 to 16:00: incomplete
        "01-03 15:45": bar | {"open": 14.0, "high": 14.5, "low": 13.5, "close": 14.0, "volume": 0.0, "vwap": 14.0},
        "01-03 15:50": 15.0,
    }
    assert_nine(
        clean(nine(given), WEEKS, policy("5m", "15m")),
        {
            "01-03 14:45": ("01-03 14:30", 10.5, 13.0, 9.0, 12.0, 450.0, 6.0, 11.5, False),
            "01-03 15:00": ("01-03 14:45", 12.0, 12.5, 12.0, 12.5, None, None, None, False),  # filled 12.0, 12.5 and filled 12.5
            "01-03 15:15": ("01-03 15:00", 12.5, 12.5, 12.5, 12.5, 0.0, 0.0, None, True),
            "01-03 15:30": ("01-03 15:15", 12.5, 12.5, 12.5, 12.5, 0.0, 0.0, None, True),
            "01-03 15:45": ("01-03 15:30", 12.5, 14.5, 12.5, 14.0, 0.0, 2.0, None, False),
        },
    )


def test_a_bucket_without_a_bar_carries_the_vwap_of_the_bucket_before():
    seen = nine({"01-03 14:35": {"close": 1.0, "volume": 3.0, "vwap": 1.5}, "01-03 15:05": 2.0, "01-03 15:35": 2.0})
    rows = clean(seen, WEEKS, policy("5m", "15m"))
    assert [row[-2] for row in told(rows).values()] == [1.5, 1.5, None, None]
    carry = Carry(np.full(N, at("01-03 14:45")), 1.0 * 2.0 ** np.arange(N), 1.5 * 2.0 ** np.arange(N))
    later = clean(only(seen, seen.times > at("01-03 14:45")), WEEKS, policy("5m", "15m"), carry)
    assert bits(later) == bits(only(rows, rows.times > at("01-03 14:45")))


def test_volumes_are_added_from_left_to_right():
    volumes = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    given = {f"01-03 {14 + (30 + m) // 60}:{(30 + m) % 60:02}": {"close": 1.0, "volume": v} for m, v in enumerate(volumes, start=1)}
    rows = told(clean(nine(given), WEEKS, policy("1m", "9m")))
    assert rows["01-03 14:39"][5] == ((((((((0.1 + 0.2) + 0.3) + 0.4) + 0.5) + 0.6) + 0.7) + 0.8) + 0.9)


def test_a_bucket_opens_no_later_than_its_first_bar():  # lesson: an open_time later than its bar
    """14:30 to 14:45 with a bar, a gap and a bar, from a source that does not tell when its bars open."""
    rows = told(clean(nine({"01-03 14:35": 1.0, "01-03 14:45": 2.0}), WEEKS, policy("5m", "15m")))
    assert rows["01-03 14:45"][0] in (None, "01-03 14:30")


def test_an_infinite_volume_is_not_made_a_number():
    seen = nine({"01-03 14:35": {"close": 1.0, "volume": float("inf")}, "01-03 14:45": {"close": 1.0, "volume": 5.0}})
    assert told(clean(seen, WEEKS, policy("5m", "15m")))["01-03 14:45"][5] == float("inf")


# -- random worlds against pandas -------------------------------------------------------------------------------------------------


_slots: dict[tuple[int, str, str], pd.DataFrame] = {}  # by the id of Sessions that live as long as this module


def slots(sessions: Sessions, cadence: str, frequency: str = "1d") -> pd.DataFrame:
    """start, end and bucket of every slot, walked through one by one."""
    step, bucket, rows = pd.Timedelta(parse_frequency(cadence)), pd.Timedelta(parse_frequency(frequency)), []
    if (id(sessions), cadence, frequency) in _slots:
        return _slots[id(sessions), cadence, frequency]
    for number, (opens, closes) in enumerate(zip(pd.DatetimeIndex(sessions.opens), pd.DatetimeIndex(sessions.closes), strict=True)):
        start = opens
        while start < closes:
            end = closes if cadence == "1d" else min(start + step, closes)
            rows.append((start, end, f"{number}/{(start - opens) // bucket}"))
            start = end
    made = pd.DataFrame(rows, columns=["start", "end", "bucket"]).astype({"start": "datetime64[us]", "end": "datetime64[us]"})
    return _slots.setdefault((id(sessions), cadence, frequency), made)


def world(sessions: Sessions, cadence: str, seed: int, exact: bool = False, assets: int = N) -> tuple[PriceBars, np.ndarray]:
    """Bars stamped at the ends of their slots, and those ends: assets that list and delist, gaps short and long, nulls everywhere.

    exact  prices are multiples of 1/64 and counts integers, so that no sum of them is ever rounded
    """
    random = np.random.default_rng(seed)
    grid = slots(sessions, cadence)
    starts, ends = grid["start"].to_numpy(), grid["end"].to_numpy()
    places = []
    for _ in range(assets):
        first, last = random.integers(0, len(ends) // 2), random.integers(len(ends) // 2, len(ends))
        seen = np.flatnonzero(random.random(last - first + 1) < random.choice([0.2, 0.6, 0.95, 1.0])) + first
        hole = random.integers(0, len(ends))
        places.append(seen[(seen < hole) | (seen > hole + random.integers(0, len(ends) // 4 + 1))])
    place, rows = np.concatenate(places), sum(map(len, places))
    numbers = {}
    for name in NUMBERS:
        values = random.integers(1, 4000, rows) / 64 if exact else random.lognormal(3, 1, rows)
        if name in ("volume", "trade_count"):
            values = np.floor(values) * (random.random(rows) < 0.9) if exact else values
        numbers[name] = np.where(random.random(rows) < (0.0 if name == "close" else 0.15), NULL, values)
    open_times = np.where(random.random(rows) < 0.9, starts[place], np.datetime64("NaT"))
    asset = np.repeat(np.arange(assets), [len(p) for p in places])
    return PriceBars(asset, ends[place], numbers, open_times, np.zeros(rows, bool)), ends[place]


def reference(bars: PriceBars, ends: np.ndarray, sessions: Sessions, cadence: str, frequency: str) -> pd.DataFrame:
    """What the design asks for, one asset after the other in pandas."""
    grid, parts = slots(sessions, cadence, frequency), []
    for asset, own in rows_of(bars).assign(time=ends).groupby("asset"):
        own = own.set_index("time")
        whole = grid[grid["end"].between(own.index[0], own.index[-1])].set_index("end")
        rows = own.reindex(whole.index).assign(asset=asset, interpolated=~whole.index.isin(own.index))
        made = rows["interpolated"]
        rows["close"] = rows["close"].ffill()
        for name in ("open", "high", "low"):
            rows[name] = rows[name].where(~made, rows["close"])
        for name in ("volume", "trade_count"):
            rows[name] = rows[name].where(~made, 0.0)
        rows["vwap"] = own["vwap"].reindex(whole.index, method="ffill")  # the bar before, null or not
        rows["open_time"] = rows["open_time"].where(~made, whole["start"])
        rows.index.name = "time"
        parts.append(rows.reset_index() if cadence == frequency else bucketed(rows, whole["bucket"], grid))
    return pd.concat(parts, ignore_index=True)[["asset", "time", "open_time", *NUMBERS, "interpolated"]]


def bucketed(rows: pd.DataFrame, bucket: pd.Series, grid: pd.DataFrame) -> pd.DataFrame:
    how = {"asset": "first", "open": "first", "high": "max", "low": "min", "close": "last", "interpolated": "all"}
    found = rows.groupby(bucket, sort=False).agg({**how, "open_time": lambda times: times.iloc[0]})
    seen = rows[~rows["interpolated"]]
    for name in ("volume", "trade_count"):
        found[name] = seen[name].groupby(bucket, sort=False).sum(min_count=1).reindex(found.index).where(~found["interpolated"], 0.0)
    priced = seen.dropna(subset=["vwap", "volume"])
    sums = pd.DataFrame({"traded": priced["vwap"] * priced["volume"], "total": priced["volume"]}).groupby(bucket, sort=False).sum()
    vwap = (sums["traded"] / sums["total"]).reindex(found.index)[~found["interpolated"]]
    order = pd.RangeIndex(len(found))
    found["vwap"] = vwap.set_axis(order[~found["interpolated"]]).reindex(order, method="ffill").to_numpy()
    found["time"] = grid.groupby("bucket")["end"].max().reindex(found.index)
    return found[found["time"] <= rows.index[-1]]  # the last one only if a bar reaches its end


GRIDS = {
    "24/7": (CALENDARS["24/7"], [("1d", "1d"), ("1h", "1h"), ("1h", "4h"), ("1h", "1d"), ("30m", "1h")]),
    "NYSE": (NYSE("2023-11-20", "2023-11-29"), [("5m", "5m"), ("5m", "15m"), ("5m", "1d"), ("30m", "1h"), ("1h", "1h"), ("7m", "35m")]),
    "NYSE clocks": (NYSE("2024-03-07", "2024-03-13"), [("1m", "1m"), ("1m", "5m"), ("15m", "1h"), ("5m", "15m"), ("1h", "1d")]),
    "NYSE year": (NYSE("2023-06-01", "2024-05-31"), [("1d", "1d"), ("1h", "1d")]),
    "Tokyo": (sessions_of("JPX", "2024-01-03", "2024-01-15"), [("5m", "15m"), ("15m", "15m"), ("1d", "1d")]),
    "weekdays": (weekdays("2024-01-01", "2024-01-19"), [("10m", "20m"), ("65m", "130m"), ("4h", "4h")]),
}
CASES = [(name, *pair) for name, (_, pairs) in GRIDS.items() for pair in pairs]


@pytest.mark.parametrize(("calendar", "cadence", "frequency"), CASES, ids=lambda value: str(value))
def test_random_worlds_against_pandas(calendar, cadence, frequency):  # R45
    sessions = GRIDS[calendar][0]
    for seed in range(2):
        bars, ends = world(sessions, cadence, seed, exact=True)
        rows = rows_of(clean(bars, sessions, policy(cadence, frequency)))
        expected = reference(bars, ends, sessions, cadence, frequency)
        if cadence != frequency:  # of a bucket whose first part does not tell, see below
            rows["open_time"] = rows["open_time"].where(expected["open_time"].notna())
        pd.testing.assert_frame_equal(rows, expected, check_dtype=False, check_exact=True)


# -- as of, look-ahead, batches ---------------------------------------------------------------------------------------------------

WORLDS = {
    "24/7 daily": (sessions_of("24/7", "2024-01-01", "2024-04-30"), "1d", "1d"),
    "NYSE daily": (NYSE("2023-10-02", "2024-04-12"), "1d", "1d"),
    "NYSE 5m to 15m": (NYSE("2023-11-21", "2023-11-28"), "5m", "15m"),
}
LABELS = [("close", "at the close"), ("close", "inside"), ("session_date", "date, UTC midnight"), ("session_date", "date, local midnight")]


def a_world(name: str, seed: int) -> tuple[PriceBars, Sessions, Policy]:
    """Daily ones are stamped in every way in turn."""
    sessions, cadence, frequency = WORLDS[name]
    bars, ends = world(sessions, cadence, seed)
    if cadence != "1d":
        return bars, sessions, policy(cadence, frequency)
    label, stamp = LABELS[seed % len(LABELS)]
    times = STAMPS[stamp][1](sessions)[np.searchsorted(sessions.closes, ends)]
    return replace(bars, times=times), sessions, policy(cadence, frequency, label=label)


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("seed", range(4))
def test_nothing_after_as_of_matters(name, seed):
    """No look-ahead: what comes after T changes no row up to T, and a run as of T gives the beginning of what a later one gives."""
    bars, sessions, rules = a_world(name, seed)
    random = np.random.default_rng(seed)
    whole = clean(bars, sessions, rules)
    for t in random.choice(slots(sessions, "1d")["end"].to_numpy(), 5) + random.integers(-3, 1, 5) * np.timedelta64(97, "m"):
        later = bars.times > t - (0 * DAY if rules.time_label == "close" else DAY // 2)  # no session ends within half a day of its label
        numbers = {n: np.where(later, random.lognormal(1, 1, len(later)), column) for n, column in bars.numbers.items()}
        changed = replace(bars, numbers=numbers, open_times=np.where(later, np.datetime64("NaT"), bars.open_times))
        other = clean(changed, sessions, rules)
        assert bits(only(other, other.times <= t)) == bits(only(whole, whole.times <= t))
        known = clean(only(bars, bars.times <= t), sessions, rules, as_of=t)
        assert known.times.max(initial=t) <= t
        ends = np.array([known.times[known.asset == a].max(initial=np.datetime64("1970", "us")) for a in range(N)])
        assert bits(known) == bits(only(whole, whole.times <= ends[whole.asset]))
        assert bits(clean(bars, sessions, rules, as_of=t)) == bits(known)  # bars after it, if given, are not used


@pytest.mark.parametrize("name", WORLDS)
def test_neither_order_nor_batch_reaches_the_numbers(name):
    bars, sessions, rules = a_world(name, 11)
    whole = clean(bars, sessions, rules)
    order = np.random.default_rng(5).permutation(N)  # asset `order[i]` takes place i
    place = np.argsort(order)[bars.asset]
    shuffled = only(replace(bars, asset=place), np.argsort(place, kind="stable"))
    mixed = clean(shuffled, sessions, rules)
    assert bits(replace(mixed, asset=order[mixed.asset])) == bits(whole)
    for parts in ([[0], [1, 2, 3], [4, 5, 6, 7, 8]], [[a] for a in range(N)]):
        done = []
        for members in parts:
            own = only(bars, np.isin(bars.asset, members))
            alone = clean(replace(own, asset=own.asset - members[0]), sessions, rules, assets=[ASSETS[m] for m in members])
            done.append(replace(alone, asset=alone.asset + members[0]))
        assert bits(joined(done)) == bits(whole)


# -- errors -----------------------------------------------------------------------------------------------------------------------

NOVEMBER = NYSE("2023-11-01", "2023-11-30")
BAD: dict[str, tuple[Policy, Mapping[str, Any], type[MsmError], str]] = {
    "before the open": (
        policy(),
        {"2023-11-21 12:00": 1.0},
        MisplacedBar,
        "bar of a4 at 2023-11-21 12:00Z belongs to no session of NYSE: that of 2023-11-21 is 2023-11-21 14:30Z to 2023-11-21 21:00Z",
    ),
    "at the open": (policy(), {"2023-11-21 14:30": 1.0}, MisplacedBar, "a4 at 2023-11-21 14:30Z"),
    "after the close": (policy(), {"2023-11-21 21:01": 1.0}, MisplacedBar, "that of 2023-11-21 is"),
    "after an early close": (policy(), {"2023-11-24 21:00": 1.0}, MisplacedBar, "that of 2023-11-24 is 2023-11-24 14:30Z to 2023-11-24 18"),
    "at midnight UTC": (policy(), {"2023-11-22 00:00": 1.0}, MisplacedBar, "that of 2023-11-21 is"),  # 19:00 of the 21st in New York
    "two bars for a session": (policy(), {"2023-11-21 15:00": 1.0, "2023-11-21 21:00": 1.0}, RepeatedBar, "two bars for 2023-11-21 21:00Z"),
    "two dates for a session": (
        policy(label="session_date"),
        {"2023-11-21 00:00": 1.0, "2023-11-21 05:00": 1.0},
        RepeatedBar,
        "a4 has two bars for 2023-11-21 21:00Z. Its cadence is not 1d",
    ),
    "a date at no midnight": (  # 20:00 of the 20th in New York
        policy(label="session_date"),
        {"2023-11-20 00:00": 1.0, "2023-11-21 00:00": 2.0, "2023-11-21 01:00": 3.0},
        MislabelledBar,
        "a4 at 2023-11-21 01:00Z is stamped at no midnight, of UTC or of America/New_York",
    ),
    "a date of another zone": (policy(label="session_date"), {"2023-11-20 23:00": 1.0}, MislabelledBar, "a4 at 2023-11-20 23:00Z"),
    "a stub beyond the close": (policy("1h"), {"2023-11-21 21:30": 1.0}, BarOffGrid, "a4 at 2023-11-21 21:30Z"),
    "two bars for a slot": (policy("5m"), {"2023-11-21 14:35": 1.0, "2023-11-21 14:35:00": 1.0}, RepeatedBar, "not 5m"),
    "off the grid": (policy("5m"), {"2023-11-21 14:37": 1.0}, BarOffGrid, "off the 5m grid of NYSE, whose session opens at 2023-11-21 14"),
    "hours from midnight": (policy("1h", "1d"), {"2023-11-21 15:00": 1.0}, BarOffGrid, "prices: the bar of a4 at 2023-11-21 15:00Z"),
    "NaN": (policy(), {"2023-11-21 21:00": NULL}, InvalidPrice, "prices: close of a4 at 2023-11-21 21:00Z is nan"),
    "infinite": (policy(), {"2023-11-21 21:00": float("inf")}, InvalidPrice, "is inf"),
    "minus infinite": (policy("5m", "15m"), {"2023-11-21 14:45": float("-inf")}, InvalidPrice, "is -inf"),
    "zero": (policy(), {"2023-11-21 15:00": 0.0}, InvalidPrice, "a4 at 2023-11-21 15:00Z is 0.0"),
    "negative": (policy("5m"), {"2023-11-21 14:35": -1.0}, InvalidPrice, "is -1.0"),
    "a gap": (
        policy(rule="none"),
        {"2023-11-20 21:00": 1.0, "2023-11-27 21:00": 1.0},
        PriceGap,
        "prices: a4 lacks 3 bar(s): 2023-11-21 21:00Z, 2023-11-22 21:00Z, 2023-11-24 18:00Z.",
    ),
    "a long gap": (policy("5m", rule="none"), {"2023-11-20 14:35": 1.0, "2023-11-20 15:15": 1.0}, PriceGap, "lacks 7 bar(s)"),
    "before the calendar": (policy(), {"2023-10-30 21:00": 1.0}, CalendarRangeError, "NYSE covers 2023-11-01..2023-11-30, but 2023-10-30"),
    "after the calendar": (policy("5m"), {"2023-11-21 14:35": 1.0, "2023-12-02 21:00": 1.0}, CalendarRangeError, "2023-12-02 21:00Z is"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_asset_is_named_and_the_others_keep_their_bits(case):
    rules, given, error, words = BAD[case]
    cadence = "1d" if rules.is_daily else "5m" if rules.cadence < timedelta(hours=1) else "1h"
    bars, ends = world(NOVEMBER, cadence, 2)
    if rules.time_label == "session_date":
        bars = replace(bars, times=NOVEMBER.dates[np.searchsorted(NOVEMBER.closes, ends)].astype("datetime64[us]"))
    if rules.rule == "none":
        bars = nine({str(end): 5.0 for end in slots(NOVEMBER, cadence)["end"]})
    others = only(bars, bars.asset != 4)
    expected = clean(others, NOVEMBER, rules)
    bad = bars_of({"a4": given})
    parts = [only(others, others.asset < 4), bad, only(others, others.asset > 4)]
    done = run(joined(parts), NOVEMBER, rules)
    assert len(expected.times) > 60
    assert list(done.errors) == [4]
    assert isinstance(done.errors[4], error)
    assert words in str(done.errors[4])
    assert bits(done.bars) == bits(expected)  # it has no rows, good ones before the bad bar included


def test_a_long_gap_is_not_spelled_out():
    told_of = run(nine({"01-02": 1.0, "01-31": 1.0}), WEEKS, policy(rule="none")).errors
    # 3 to 30 January: 20 weekdays
    assert {str(e).partition(". Load")[0] for e in told_of.values()} == {
        f"prices: a{i} lacks 20 bar(s): 2024-01-03 21:00Z, 2024-01-04 21:00Z, 2024-01-05 21:00Z, 2024-01-08 21:00Z, 2024-01-09 21:00Z ..."
        for i in range(N)
    }


def test_the_rule_none_without_a_gap():
    whole = nine({f"01-{day:02}": 1.0 for day in (2, 3, 4, 5, 8, 9)})
    rows = clean(whole, WEEKS, policy(rule="none"))
    assert not rows.interpolated.any()
    assert bits(rows) == bits(clean(whole, WEEKS, policy()))
    carry = Carry(np.full(N, at("01-05")), np.ones(N), np.ones(N))
    assert len(clean(only(whole, whole.times > at("01-05")), WEEKS, policy(rule="none"), carry).times) == 2 * N
    missing = run(only(whole, whole.times > at("01-08")), WEEKS, policy(rule="none"), carry).errors  # the gap after what is stored
    assert {str(e) for e in missing.values()} >= {"prices: a0 lacks 1 bar(s): 2024-01-08 21:00Z. Load them, or choose the rule ffill."}


def test_a_calendar_without_sessions_is_an_error():  # lesson: an incomplete calendar that looks like "nothing to do"
    days = np.array([], "datetime64[D]")
    hollow = Sessions("HOLLOW", days, days.astype("datetime64[us]"), days.astype("datetime64[us]"), WEEKS.valid_from, WEEKS.valid_to)
    for rules in (policy(), policy("5m"), policy(label="session_date")):
        errors = run(bars_of({"a3": {"01-03": 1.0}}), hollow, rules).errors
        assert [type(errors[i]) for i in errors] == [EmptySchedule]


@pytest.mark.parametrize("label", ["close", "session_date"])
@pytest.mark.parametrize(("first", "last"), [("2024-01-01", "2024-01-04"), ("2024-01-04", "2024-01-12")], ids=["too short", "too late"])
def test_a_day_that_the_calendar_does_not_know_is_not_a_day_without_a_session(label, first, last):
    """Lesson: an incomplete calendar that looks like "nothing to do". The bar of 5, or 3, January is a day beyond it."""
    given = {"2024-01-04": ("01-04", "01-05"), "2024-01-12": ("01-03", "01-04")}[last]
    seen = nine({f"{day} {'21:00' if label == 'close' else '00:00'}": 1.0 for day in given})
    errors = run(seen, weekdays(first, last), policy(label=label)).errors
    assert {type(e) for e in errors.values()} == {CalendarRangeError}


def test_what_is_wrong_outside_the_window_is_not_looked_at():
    """A bar behind the watermark, or of a session that is not over, fails nobody."""
    carry = Carry(np.full(N, at("01-04")), np.ones(N), np.ones(N))
    dated = nine({"01-03 00:00": -1.0, "01-04 00:00": NULL, "01-05 00:00": 2.0, "01-08 00:00": 0.0})
    rows = clean(dated, WEEKS, policy(label="session_date"), carry, as_of=at("01-08 20:59"))
    assert list(told(rows)) == ["01-05 21:00"]
    assert len(run(dated, WEEKS, policy(label="session_date"), carry, as_of=at("01-08")).errors) == N


# -- in one run or in many ----------------------------------------------------------------------------------------------------------


def nightly(bars: PriceBars, sessions: Sessions, rules: Policy, cuts: Sequence[Any]) -> PriceBars:
    """One run per as-of in `cuts`; each is given of the ones before what `read_carry` reads of them."""
    carry, parts = nothing_stored(), []
    for as_of in cuts:
        since = np.where(np.isnat(carry.times), np.datetime64("1900", "us"), carry.times - MARGIN[rules.time_label])
        rows = clean(only(bars, (bars.times > since[bars.asset]) & (bars.times <= as_of)), sessions, rules, carry, as_of)
        last = np.flatnonzero(np.append(rows.asset[1:] != rows.asset[:-1], True)) if len(rows.asset) else np.array([], int)
        carry = Carry(carry.times.copy(), carry.close.copy(), carry.vwap.copy())
        for field, column in ((carry.times, rows.times), (carry.close, rows.numbers["close"]), (carry.vwap, rows.numbers["vwap"])):
            field[rows.asset[last]] = column[last]
        parts.append(rows)
    return joined(parts)


@pytest.mark.parametrize("name", WORLDS)
def test_one_run_or_many_give_the_same_bits(name):
    """Design section 8: 100 worlds each, cut at instants that respect neither sessions nor buckets."""
    for seed in range(100):
        bars, sessions, rules = a_world(name, seed)
        random = np.random.default_rng(seed)
        span = int((sessions.closes[-1] - sessions.opens[0]) / np.timedelta64(1, "m"))
        cuts = sessions.opens[0] + np.sort(random.integers(0, span, random.integers(1, 6))) * np.timedelta64(1, "m")
        assert bits(nightly(bars, sessions, rules, [*cuts, FAR])) == bits(clean(bars, sessions, rules)), f"seed {seed}"


SMALL = weekdays("2024-01-04", "2024-01-08")


@settings(max_examples=80, deadline=None)
@given(
    frequency=st.sampled_from(["30m", "1h", "90m", "1d"]),
    seen=st.lists(st.integers(0, 2**39 - 1), min_size=N, max_size=N),
    nulls=st.integers(0, 2**39 - 1),
    cuts=st.lists(st.integers(0, 39), max_size=5),
)
def test_property_one_run_or_many(frequency, seen, nulls, cuts):
    """Three sessions of 13 half hours; bit i of `seen` is the bar of slot i, of `nulls` whether its volume and vwap are known."""
    ends = slots(SMALL, "30m")["end"].to_numpy()
    places = [[i for i in range(39) if mask >> i & 1] for mask in seen]
    place = np.array([p for own in places for p in own], np.int64)
    asset = np.repeat(np.arange(N), [len(own) for own in places])
    known = np.where(nulls >> place & 1, NULL, 1.0)
    numbers = dict.fromkeys(NUMBERS, known * (1 + place + asset / 3)) | {"close": 1 + np.sqrt(place + asset)}
    bars = PriceBars(asset, ends[place], numbers, np.full(len(place), np.datetime64("NaT", "us")), np.zeros(len(place), bool))
    times = [*(SMALL.opens[0] + np.timedelta64(30 * 39 * 4 * c // 39, "m") for c in sorted(cuts)), FAR]
    rules = policy("30m", frequency)
    whole = clean(bars, SMALL, rules)
    assert bits(nightly(bars, SMALL, rules, times)) == bits(whole)
    assert whole.times.tolist() == [t for a in range(N) for t in sorted(set(whole.times[whole.asset == a].tolist()))]
