"""Time and number helpers that everything pure stands on: UTC microsecond arrays, frequencies, and the one ordered sum.

Times inside the core are numpy `datetime64[us]` arrays and mean UTC; Postgres keeps microseconds too, so nothing is rounded.
"""

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain, compress

import numpy as np
import pandas as pd

from msm_core.errors import ConfigurationError, NaiveTimestamp

Times = np.ndarray  # datetime64[us], UTC
Floats = np.ndarray  # float64

DAY = np.timedelta64(1, "D")
TICK = np.timedelta64(1, "us")  # the resolution of stored times
NEVER = np.datetime64("NaT", "us")
TALL = 500  # rows from which on it is faster to add columns than to accumulate each row
BEGINNING = datetime.min.replace(tzinfo=UTC)  # before every bar


@dataclass(frozen=True)
class Series:
    """Bars of one asset in time order: times (B,), values (B,) of the price column as stored, volumes (B,) NaN where unknown.

    liquidity  (B,) of the column that a strategy asks for beside the price; None where none was asked for
    """

    times: Times
    values: Floats
    volumes: Floats
    liquidity: Floats | None = None

    def kept(self, rows: np.ndarray | slice) -> "Series":
        """Some of its bars, by a mask or a slice."""
        liquidity = None if self.liquidity is None else self.liquidity[rows]
        return Series(self.times[rows], self.values[rows], self.volumes[rows], liquidity)


@dataclass(frozen=True)
class SignalRows:
    """Stored rows of one signal in key order: times (R,), assets (R,), weights (R,)."""

    times: Times
    assets: list[str]
    weights: Floats


@dataclass(frozen=True)
class LastTrade:
    """The last stored weights vector of a portfolio, struck at `time`; NaN where a number is null."""

    time: np.datetime64
    assets: tuple[str, ...]
    weights: Floats
    prices: Floats
    volumes: Floats

    def held(self) -> tuple[str, ...]:
        return tuple(compress(self.assets, (self.weights != 0).tolist()))


def in_order(*names: Iterable[str]) -> tuple[str, ...]:
    """Each of the names once, in bytewise order. Fast where they come in order, which they nearly always do."""
    return tuple(sorted(dict.fromkeys(chain.from_iterable(names))))


def is_usable(values: Floats, zero_allowed: bool = False) -> np.ndarray:
    """Mask of what a price, or a portfolio's value, may be: finite and above 0; or 0 where that is allowed, as for a volume."""
    usable = np.isfinite(values)
    usable &= values >= 0 if zero_allowed else values > 0
    return usable


def ordered_sum(values: Floats, out: Floats | None = None) -> Floats:
    """Sum over the last axis, strictly left to right, shape (..., N) -> (...).

    The only sum over assets allowed on a persisted path: numpy's `.sum` is pairwise and its bits depend on shape and memory order,
    a dot product's on the BLAS. `accumulate` defines every partial sum, so it is sequential whatever the batch.
    out: room for the partial sums, of the shape of `values`; may be `values` itself. Source: design.md section 8, rule 2.
    """
    if values.shape[-1] == 0:
        return np.zeros(values.shape[:-1])
    if values.size > TALL * values.shape[-1]:  # whole columns at a time: the same additions, in a third of the time
        total = values[..., 0].copy()
        for place in range(1, values.shape[-1]):
            total += values[..., place]
        return total
    return np.add.accumulate(values, axis=-1, out=out)[..., -1]


def utc(value: datetime | pd.Timestamp, what: str) -> np.datetime64:
    """A time-zone aware instant as UTC microseconds. Raises NaiveTimestamp."""
    if value.tzinfo is None:
        raise NaiveTimestamp(what=what, value=value.isoformat())
    return np.datetime64(value.astimezone(UTC).replace(tzinfo=None), "us")


def to_datetime(time: np.datetime64) -> datetime:
    """UTC microseconds as an aware datetime."""
    return time.astype("datetime64[us]").item().replace(tzinfo=UTC)


def earliest(times: Iterable[datetime | None]) -> datetime | None:
    """The first of some starts, at least one; None is the beginning."""
    known = list(times)
    return None if None in known else min(time for time in known if time is not None)


def iso(time: np.datetime64 | None) -> str:
    """`2026-11-20 21:00Z`, for errors and tables; `never` for no time."""
    if time is None or np.isnat(time):
        return "never"
    value = to_datetime(time)
    return value.strftime("%Y-%m-%d %H:%M:%SZ") if value.second or value.microsecond else value.strftime("%Y-%m-%d %H:%MZ")


@functools.cache
def parse_frequency(frequency: str) -> timedelta:
    """`1d`, `5m`, `1h` as a length of time. Raises ConfigurationError."""
    match = re.fullmatch(r"([1-9]\d*)([mhd])", frequency)
    if not match:
        raise ConfigurationError(problems=f"frequency {frequency!r} is not of the form 5m, 1h or 1d")
    unit = {"m": "minutes", "h": "hours", "d": "days"}[match[2]]
    return timedelta(**{unit: int(match[1])})


def format_frequency(frequency: timedelta) -> str:
    """The one spelling of a length of time: the greatest unit that divides it."""
    minutes = frequency // timedelta(minutes=1)
    for unit, length in (("d", 1440), ("h", 60)):
        if minutes % length == 0:
            return f"{minutes // length}{unit}"
    return f"{minutes}m"
