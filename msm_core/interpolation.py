"""Interpolation of price bars, pure: from the bars of a source to one bar per slot of each asset's calendar, without gaps.

1. The sessions of a calendar are cut into slots of the source's cadence, anchored at the open; a daily slot is the session.
2. Every bar is put into its slot. One that has no place is refused by name; one of a day, or hours, without a session is left out.
3. From the slot after the watermark, or the first bar ever, to the last bar, a slot without a bar is filled from the one before.
4. Slots are merged into the disjoint buckets of a coarser frequency; only a bucket that is reached to its end is given out.

All assets of a calendar go through each step together: a loop over bars or assets exists for errors only. Nothing is added up across
assets, so a batch cannot reach the numbers; and what a later window needs of an earlier one is the last row given out, no more.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal

import numpy as np

from msm_core.errors import BarOffGrid, InvalidPrice, MislabelledBar, MisplacedBar, MsmError, PriceGap, RepeatedBar
from msm_core.frames import DAY, NEVER, Floats, Times, format_frequency, is_usable, iso, ordered_sum
from msm_core.sessions import Sessions

CODE_VERSION = "1"  # bump when the numbers change

InterpolationRule = Literal["ffill", "none"]
PRICES = ("open", "high", "low", "close")
COUNTS = ("volume", "trade_count")
NUMBERS = (*PRICES, *COUNTS, "vwap")
MARGIN = 2 * DAY  # between a date's label and its session, in any time zone
NAMED_MAX = 5  # slots of a gap spelled out in an error


@dataclass(frozen=True)
class Policy:
    """How bars are interpolated. `frequency` is a whole multiple of `cadence`, the length of a bar of the source."""

    source: str
    cadence: timedelta
    frequency: timedelta
    rule: InterpolationRule
    time_label: str

    @property
    def is_daily(self) -> bool:
        return self.cadence >= timedelta(days=1)


@dataclass(frozen=True)
class PriceBars:
    """Bars of many assets in long form, in order of (asset, time).

    asset         (R,) place of the asset in the list of assets
    times         (R,) as the source stamps them; given out: the end of the slot, UTC
    numbers       name -> (R,) float64, NaN = null; all of NUMBERS
    open_times    (R,) start of the bar, NaT = null
    interpolated  (R,) bool
    """

    asset: np.ndarray
    times: Times
    numbers: Mapping[str, Floats]
    open_times: Times
    interpolated: np.ndarray

    def take(self, rows: np.ndarray) -> "PriceBars":
        """The rows of a mask (R,)."""
        if rows.all():
            return self
        return self._rows(rows)

    def part(self, rows: slice, begin: int = 0) -> "PriceBars":
        """A stretch of rows, as views; the places of its assets count from `begin`."""
        part = self._rows(rows)
        return replace(part, asset=part.asset - begin)

    def _rows(self, rows: np.ndarray | slice) -> "PriceBars":
        numbers = {name: column[rows] for name, column in self.numbers.items()}
        return PriceBars(self.asset[rows], self.times[rows], numbers, self.open_times[rows], self.interpolated[rows])


@dataclass(frozen=True)
class Carry:
    """What is stored at the watermark of each asset: times (A,), NaT for an asset without any row; close (A,); vwap (A,), NaN = null."""

    times: Times
    close: Floats
    vwap: Floats


@dataclass(frozen=True)
class Interpolated:
    """Bars after each asset's watermark, and the errors of those that have none, by place of the asset."""

    bars: PriceBars
    errors: Mapping[int, MsmError]


@dataclass(frozen=True)
class _Grid:
    """Slots of a stretch of sessions: starts (K,), ends (K,), ends_bucket (K,) bool: the last slot of its bucket."""

    starts: Times
    ends: Times
    ends_bucket: np.ndarray


def interpolate(
    bars: PriceBars, assets: Sequence[str], sessions: Sessions, carry: Carry, policy: Policy, as_of: np.datetime64
) -> Interpolated:
    """The bars of `assets`, which all trade in `sessions`, that come after what is stored and are complete at `as_of`.

    bars  those of the source after each asset's watermark, up to `as_of`, with a close; earlier ones are passed over
    An asset with a bar that cannot be used, with a gap under the rule `none`, or beyond the calendar is among the errors, whole.
    """
    faults = _Faults(assets, policy, sessions)
    _require_range(bars, sessions, carry, faults)
    begin = _first_session(bars, sessions, carry)
    grid = _grid(sessions, begin, bars, policy)
    slot = _slots(bars, grid, sessions, begin, policy, faults)
    fresh = np.isnat(carry.times)
    after = np.where(fresh, -1, np.searchsorted(grid.ends, carry.times, "right") - 1)
    due = slot >= 0
    due[due] = (slot[due] > after[bars.asset[due]]) & (grid.ends[slot[due]] <= as_of)
    _require_values(bars, slot, due, grid, faults)
    due &= ~faults.of(bars)
    bars, slot = bars.take(due), slot[due]
    first, last = _window(bars.asset, slot, after, fresh, grid)
    if policy.rule == "none":
        _require_no_gap(bars.asset, slot, first, last, grid, faults)
        last[list(faults.errors)] = first[list(faults.errors)] - 1
    given = slot <= last[bars.asset]
    filled, place = _filled(bars.take(given), slot[given], first, last, carry, grid)
    return Interpolated(filled if policy.frequency == policy.cadence else _merged(filled, place, carry, grid), faults.errors)


# -- slots --------------------------------------------------------------------------------------------------------------------


def _first_session(bars: PriceBars, sessions: Sessions, carry: Carry) -> int:
    """Index of a session at or before everything that matters: a grid of minutes over all sessions of a calendar would be large."""
    times = [t.min() for t in (bars.times, carry.times[~np.isnat(carry.times)]) if len(t)]
    return max(int(np.searchsorted(sessions.closes, min(times) - MARGIN)) - 1, 0) if times else 0


def _grid(sessions: Sessions, begin: int, bars: PriceBars, policy: Policy) -> _Grid:
    """Slots `open + k * cadence`, and the close, of the sessions from `begin` through that of the last bar."""
    through = int(np.searchsorted(sessions.opens, bars.times.max() + MARGIN, "right")) if len(bars.times) else begin
    opens, closes = sessions.opens[begin:through], sessions.closes[begin:through]
    if policy.is_daily:
        return _Grid(opens, closes, np.ones(len(closes), bool))
    cadence = np.timedelta64(policy.cadence)
    slots = -((opens - closes) // cadence)  # rounded up: the last slot may be a short one, up to the close
    session = np.repeat(np.arange(len(slots)), slots)
    number = np.arange(len(session)) - np.repeat(np.cumsum(slots) - slots, slots)
    starts = opens[session] + number * cadence
    per_bucket = policy.frequency // policy.cadence
    ends_bucket = (number % per_bucket == per_bucket - 1) | (number == slots[session] - 1)
    return _Grid(starts, np.minimum(starts + cadence, closes[session]), ends_bucket)


def _slots(bars: PriceBars, grid: _Grid, sessions: Sessions, begin: int, policy: Policy, faults: "_Faults") -> np.ndarray:
    """(R,) slot of each bar; -1 for one that is left out: it lies on a day, or in hours, without a session."""
    if policy.time_label == "session_date":
        dates = sessions.labelled_dates(bars.times)
        faults.each(faults.mislabelled, bars, sessions.labels_of(dates, bars.times) != bars.times)
        inside = np.isin(dates, sessions.dates)
        slot = np.searchsorted(sessions.dates, dates) - begin
    else:
        slot = np.searchsorted(grid.ends, bars.times, "left")
        inside = slot < len(grid.ends)
        inside[inside] = bars.times[inside] > grid.starts[slot[inside]]
        dates = np.full(len(slot), sessions.valid_from)  # of the others; these are in the calendar
        dates[~inside] = sessions.to_local(bars.times[~inside]).astype("datetime64[D]")
        if policy.is_daily:  # one bar stands for its whole day: one beside the session of its day is stamped wrongly
            faults.each(faults.misplaced, bars, ~inside & np.isin(dates, sessions.dates))
        else:
            off = inside.copy()
            off[inside] = grid.ends[slot[inside]] != bars.times[inside]
            faults.each(faults.off_grid, bars, off | (~inside & _begins_inside(bars.times - np.timedelta64(policy.cadence), grid)))
    faults.each(faults.beyond_calendar, bars, ~inside & ((dates < sessions.valid_from) | (dates > sessions.valid_to)))
    return np.where(inside & (slot >= 0), slot, -1)


def _begins_inside(starts: Times, grid: _Grid) -> np.ndarray:
    """(R,) whether a bar that ends after a session begins within it: it is no bar of the hours after, but a part of it is."""
    slot = np.searchsorted(grid.ends, starts, "right")
    inside = slot < len(grid.ends)
    inside[inside] = starts[inside] >= grid.starts[slot[inside]]
    return inside


def _window(asset: np.ndarray, slot: np.ndarray, after: np.ndarray, fresh: np.ndarray, grid: _Grid) -> tuple[np.ndarray, np.ndarray]:
    """(A,) first and last slot of each asset; the last is the end of the last bucket that its bars reach, first - 1 where none is."""
    first, last = after + 1, after.copy()
    if len(asset):
        present, begins = np.unique(asset, return_index=True)
        ends = np.append(begins[1:], len(asset)) - 1
        first[present] = np.where(fresh[present], slot[begins], first[present])
        whole = np.maximum.accumulate(np.where(grid.ends_bucket, np.arange(len(grid.ends)), -1))
        last[present] = np.maximum(whole[slot[ends]], first[present] - 1)
    return first, last


# -- rows ---------------------------------------------------------------------------------------------------------------------


def _filled(
    bars: PriceBars, slot: np.ndarray, first: np.ndarray, last: np.ndarray, carry: Carry, grid: _Grid
) -> tuple[PriceBars, np.ndarray]:
    """One row per slot from `first` to `last` of each asset, and the slots (N,): observed bars untouched, the others filled."""
    count = last - first + 1
    begins = np.cumsum(count) - count
    asset = np.repeat(np.arange(len(count)), count)
    place = np.arange(len(asset)) - begins[asset] + first[asset]
    row = np.full(len(asset), -1)
    row[begins[bars.asset] + slot - first[bars.asset]] = np.arange(len(slot))
    seen = row >= 0
    recent, own = _carried(row, bars.asset, asset)
    close = np.where(own, _at(bars.numbers["close"], recent), carry.close[asset])
    numbers = {name: np.where(seen, _at(bars.numbers[name], row), close) for name in PRICES}
    numbers |= {name: np.where(seen, _at(bars.numbers[name], row), 0.0) for name in COUNTS}
    numbers["vwap"] = np.where(own, _at(bars.numbers["vwap"], recent), carry.vwap[asset])
    open_times = np.where(seen, _at(bars.open_times, row, NEVER), grid.starts[place])
    made = np.where(seen, _at(bars.interpolated, row, True), True)
    return PriceBars(asset, grid.ends[place], numbers, open_times, made), place


def _merged(bars: PriceBars, place: np.ndarray, carry: Carry, grid: _Grid) -> PriceBars:
    """Disjoint buckets: first open, last close, highest high, lowest low, summed counts, and vwap by volume.

    A null is passed over; a bucket of nulls stays null. A bucket made of filled slots only is a filled bar itself: the vwap of the
    bucket before, no volume.
    """
    stops = np.flatnonzero(grid.ends_bucket[place]) + 1
    starts = np.append(0, stops[:-1]) if len(stops) else stops
    width = int((stops - starts).max(initial=1))
    part = starts[:, None] + np.arange(width)
    padded = part >= stops[:, None]
    part[padded] = 0
    parts = {name: np.where(padded, np.nan, column[part]) for name, column in bars.numbers.items()}
    made = np.logical_and.reduce(padded | bars.interpolated[part], axis=1)
    numbers = {
        "open": _first_known(parts["open"]),
        "high": np.fmax.reduce(parts["high"], axis=1),
        "low": np.fmin.reduce(parts["low"], axis=1),
        "close": bars.numbers["close"][stops - 1],
    }
    observed = ~(padded | bars.interpolated[part])
    for name in COUNTS:
        unknown = (observed & np.isnan(parts[name])).any(axis=1) & ~(observed & ~np.isnan(parts[name])).any(axis=1)
        numbers[name] = np.where(unknown, np.nan, ordered_sum(_or_zero(parts[name])))
    numbers["vwap"] = _merged_vwap(parts, made, bars.asset[starts], carry)
    return PriceBars(bars.asset[starts], bars.times[stops - 1], numbers, bars.open_times[starts], made)


def _merged_vwap(parts: Mapping[str, Floats], made: np.ndarray, asset: np.ndarray, carry: Carry) -> Floats:
    weight = np.where(np.isnan(parts["vwap"]), 0.0, _or_zero(parts["volume"]))
    total = ordered_sum(weight)
    with np.errstate(invalid="ignore"):  # of an infinite volume nothing can be told
        traded = ordered_sum(weight * _or_zero(parts["vwap"]))
        vwap = np.where(total > 0, traded / np.where(total > 0, total, 1.0), np.nan)
    recent, own = _carried(np.where(made, -1, np.arange(len(made))), asset, asset)
    return np.where(own, _at(vwap, recent), carry.vwap[asset])


def _carried(row: np.ndarray, of: np.ndarray, asset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) the last row that is not -1 at or before each place, and whether it is one of the place's own asset and not of another."""
    recent = np.maximum.accumulate(row)
    own = recent >= 0
    own[own] = of[recent[own]] == asset[own]
    return recent, own


def _at(column: np.ndarray, rows: np.ndarray, absent: object = np.nan) -> np.ndarray:
    """`column` at `rows`; where there is no column, `absent`: what stands at a negative row is not used."""
    return column[rows] if len(column) else np.full(len(rows), absent, column.dtype)


def _or_zero(parts: Floats) -> Floats:
    return np.where(np.isnan(parts), 0.0, parts)


def _first_known(parts: np.ndarray) -> np.ndarray:
    """(B,) the first of each row (B, P) that is not null, null where all are."""
    return np.take_along_axis(parts, (~np.isnan(parts)).argmax(axis=1)[:, None], axis=1)[:, 0]


# -- errors -------------------------------------------------------------------------------------------------------------------


class _Faults:
    """The first error of each asset."""

    def __init__(self, assets: Sequence[str], policy: Policy, sessions: Sessions) -> None:
        self.assets, self.policy, self.sessions = assets, policy, sessions
        self.errors: dict[int, MsmError] = {}

    def each(self, note: Callable[[PriceBars, int], None], bars: PriceBars, bad: np.ndarray) -> None:
        """Note the first bad bar of each asset that has some."""
        for row in self.first_rows(bars, bad):
            note(bars, row)

    def first_rows(self, bars: PriceBars, bad: np.ndarray) -> list[int]:
        """The first bad bar of each asset that has some."""
        rows = np.flatnonzero(bad)
        return rows[np.unique(bars.asset[rows], return_index=True)[1]].tolist()

    def add(self, bars: PriceBars, row: int, error: MsmError) -> None:
        self.errors.setdefault(int(bars.asset[row]), error)

    def of(self, bars: PriceBars) -> np.ndarray:
        """(R,) whether the bar's asset has failed."""
        return np.isin(bars.asset, list(self.errors)) if self.errors else np.zeros(len(bars.asset), bool)

    def facts(self, bars: PriceBars, row: int, time: Any) -> dict[str, str]:
        return {"source": self.policy.source, "asset": self.assets[int(bars.asset[row])], "time": iso(time)}

    def beyond_calendar(self, bars: PriceBars, row: int) -> None:
        asset = self.assets[int(bars.asset[row])]
        self.add(bars, row, self.sessions.out_of_range(iso(bars.times[row]), f"a bar of {asset}"))

    def mislabelled(self, bars: PriceBars, row: int) -> None:
        self.add(bars, row, MislabelledBar(**self.facts(bars, row, bars.times[row]), timezone=self.sessions.timezone))

    def misplaced(self, bars: PriceBars, row: int) -> None:
        sessions = self.sessions
        date = sessions.to_local(bars.times[row : row + 1]).astype("datetime64[D]")[0]
        session = int(np.searchsorted(sessions.dates, date))
        hours = {"date": str(date), "opens": iso(sessions.opens[session]), "closes": iso(sessions.closes[session])}
        self.add(bars, row, MisplacedBar(**self.facts(bars, row, bars.times[row]), calendar=sessions.calendar, **hours))

    def off_grid(self, bars: PriceBars, row: int) -> None:
        opens = self.sessions.opens[int(np.searchsorted(self.sessions.opens, bars.times[row])) - 1]
        grid = {"cadence": format_frequency(self.policy.cadence), "calendar": self.sessions.calendar, "opens": iso(opens)}
        self.add(bars, row, BarOffGrid(**self.facts(bars, row, bars.times[row]), **grid))


def _require_range(bars: PriceBars, sessions: Sessions, carry: Carry, faults: _Faults) -> None:
    """The calendar must know every day from an asset's watermark, or its first bar, to its last bar."""
    present, begins = np.unique(bars.asset, return_index=True)
    ends = np.append(begins[1:], len(bars.asset)) - 1
    since = np.where(np.isnat(carry.times[present]), bars.times[begins], carry.times[present]) if len(present) else bars.times
    through = np.maximum(since, bars.times[ends]) if len(present) else bars.times
    for i in np.flatnonzero(~sessions.covers(since, through) | (len(sessions.closes) == 0)).tolist():
        try:
            sessions.require(since[i], through[i])
        except MsmError as error:
            faults.errors[int(present[i])] = error


def _require_values(bars: PriceBars, slot: np.ndarray, due: np.ndarray, grid: _Grid, faults: _Faults) -> None:
    """One bar per slot, and a close that is finite and above 0."""
    rows = np.flatnonzero(due)
    repeated, unusable = np.zeros(len(due), bool), np.zeros(len(due), bool)
    repeated[rows[1:]] = (slot[rows[1:]] <= slot[rows[:-1]]) & (bars.asset[rows[1:]] == bars.asset[rows[:-1]])
    for row in faults.first_rows(bars, repeated):
        facts = faults.facts(bars, row, grid.ends[slot[row]])
        faults.add(bars, row, RepeatedBar(**facts, cadence=format_frequency(faults.policy.cadence)))
    close = bars.numbers["close"]
    unusable[rows] = ~is_usable(close[rows])
    for row in faults.first_rows(bars, unusable):
        facts = faults.facts(bars, row, bars.times[row])
        faults.add(bars, row, InvalidPrice(portfolio=facts.pop("source"), column="close", value=float(close[row]), **facts))


def _require_no_gap(asset: np.ndarray, slot: np.ndarray, first: np.ndarray, last: np.ndarray, grid: _Grid, faults: _Faults) -> None:
    given = slot <= last[asset]
    present, seen = np.unique(asset[given], return_counts=True)
    for i in present[last[present] - first[present] + 1 > seen].tolist():
        missing = np.setdiff1d(np.arange(int(first[i]), int(last[i]) + 1), slot[asset == i])
        times = ", ".join(map(iso, grid.ends[missing[:NAMED_MAX]])) + (" ..." if len(missing) > NAMED_MAX else "")
        faults.errors[i] = PriceGap(source=faults.policy.source, asset=faults.assets[i], count=len(missing), times=times)
