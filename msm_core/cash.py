"""What cash earns: the level of an account that grows by a published rate. Pure; cash is then one more price."""

from dataclasses import dataclass
from datetime import timedelta

import numpy as np

from msm_core.errors import InvalidInput, MissingRate
from msm_core.frames import Floats, Series, Times, iso


@dataclass(frozen=True)
class CashAccount:
    """Levels (U,) of a cash account at `times` (U,), all valuation times up to the last one that its rate is known for.

    It grows by rate x days / day_count from one valuation time to the next, at the rate known at the earlier one; the level is a
    recursion from the first known rate on, so every window sees the same one.

    gaps  (G,) of `times`, before which the rate had expired: no window may contain one
    """

    times: Times
    levels: Floats
    gaps: Times
    rate: str
    source: str

    def require(self, since: np.datetime64, through: np.datetime64) -> None:
        """Raises MissingRate when the rate is not known all the way in (since, through]."""
        if len(missing := self.gaps[(self.gaps > since) & (self.gaps <= through)]):
            raise MissingRate(rate=self.rate, source=self.source, time=iso(missing[0]))

    def at(self, times: Times | np.datetime64) -> Floats:
        """Raises MissingRate for a time that it does not know."""
        index = np.minimum(np.searchsorted(self.times, times), max(len(self.times) - 1, 0))
        known = self.times[index] == times if len(self.times) else np.zeros(np.shape(times), bool)
        if not np.all(known):
            raise MissingRate(rate=self.rate, source=self.source, time=iso(np.atleast_1d(times)[~np.atleast_1d(known)][0]))
        return self.levels[index]


def cash_account(rates: Series, times: Times, forward_fill: timedelta, day_count: int, rate: str, source: str) -> CashAccount:
    """The account of annual `rates` (0.05 = 5 %), each valid for less than `forward_fill`, over valuation times. Raises InvalidInput."""
    if bad := np.flatnonzero(~np.isfinite(rates.values)).tolist():
        facts = {"column": "the rate", "asset": rate, "time": iso(rates.times[bad[0]]), "value": float(rates.values[bad[0]])}
        raise InvalidInput(owner="cash account", source=source, **facts)
    begin = int(np.searchsorted(times, rates.times[0])) if len(rates.times) else len(times)
    known = times[begin:]
    index = np.searchsorted(rates.times, known[:-1], "right") - 1
    valid = known[:-1] - rates.times[index] < np.timedelta64(forward_fill)
    reach = int(np.flatnonzero(valid)[-1]) + 1 if valid.any() else 0  # what comes after may still become known
    days = np.diff(known[: reach + 1]) / np.timedelta64(1, "D")
    growth = np.where(valid[:reach], 1.0 + rates.values[index[:reach]] * days / day_count, 1.0)
    levels = np.cumprod(np.append(1.0, growth))[: len(known)]
    return CashAccount(known[: reach + 1], levels, known[1 : reach + 1][~valid[:reach]], rate, source)
