"""Inside a session, ever more of the direction of the session before, as the bars agree with it; flat at the close."""

from datetime import timedelta
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, Field

from msm_core.errors import ConfigurationError
from msm_core.frames import Floats, Times, format_frequency, parse_frequency
from msm_core.sessions import Sessions
from msm_core.signals.base import Inputs, Request
from msm_core.signals.computed import ComputedSignal


def _shorter_than_a_day(value: str) -> str:
    try:
        frequency = parse_frequency(value)
    except ConfigurationError as error:
        raise ValueError(str(error)) from None  # as one of the problems of the whole configuration
    if frequency >= timedelta(days=1):
        raise ValueError(f"{value} is not shorter than 1d")
    return format_frequency(frequency)


class IntradayTrend(ComputedSignal):
    """The direction of the session before, held in proportion to the bars of the session so far that agreed with it.

    direction = +1 where close / open - 1 of the session before is above 0, else -1; open is that of its first bar, close of its last.
    weight at bar k = direction * (bars 1..k whose return has the direction's sign) / (bars in the session) / (assets in the universe);
    0 at the session's last bar. A bar's return is against the bar before, the first one's against the last bar of the session before;
    where either is missing it agrees with nothing. An asset without direction has weight 0; a session in which no asset has one emits
    nothing. A vector is emitted at every bar, the number of which is the calendar's.
    """

    kind: Literal["intraday_trend"] = "intraday_trend"
    bar_frequency: Annotated[str, AfterValidator(_shorter_than_a_day)] = Field(
        default="5m", description="length of the price source's bars, such as 5m or 1h; less than 1d"
    )
    open_column: str = Field(default="open", min_length=1, max_length=63, description="column of the price source, a bar's first price")
    emit_on: Literal["every_session"] = Field(default="every_session", description="fixed: a vector at every bar of every session")

    @property
    def frequency(self) -> timedelta:
        return parse_frequency(self.bar_frequency)

    @property
    def history_sessions(self) -> int:
        """The session itself and the one before, both from their first bar on."""
        return 2

    @property
    def requests(self) -> tuple[Request, ...]:
        return (*super().requests, Request("open", self.price_source, self.open_column, self.universe))

    def weights_at(self, inputs: Inputs, values: dict[str, Floats], rows: np.ndarray) -> Floats:
        """(E, N) target weights at some rows of the grid, of which only those from the session before the first one on are looked at."""
        assert inputs.sessions is not None
        sessions, grid, prices = inputs.sessions, inputs.panels["prices"].grid, values["prices"]
        step = np.timedelta64(self.frequency)
        begin = int(np.searchsorted(sessions.closes, grid[rows[0]]))
        wanted = slice(begin, int(np.searchsorted(sessions.closes, grid[rows[-1]])) + 1)
        opens, closes = sessions.opens[wanted], sessions.closes[wanted]
        bars = -((opens - closes) // step)  # rounded up: the last one may be shorter

        direction, known = self._directions(sessions, grid, values, wanted)
        first = np.searchsorted(grid, opens, "right")  # row of each session's first bar
        start = max(int(first[0]) - 1, 0)
        seen = prices[start : int(rows[-1]) + 1]
        returns = np.vstack([np.full((1, seen.shape[1]), np.nan), seen[1:] / seen[:-1] - 1])
        session = np.searchsorted(closes, grid[start : start + len(seen)])
        agrees = known[session] & np.where(direction[session] > 0, returns > 0, returns < 0)
        count = np.vstack([np.zeros((1, seen.shape[1]), np.int64), np.cumsum(agrees, axis=0)])  # of the bars before each row

        session = session[rows - start]
        agreed = count[rows - start + 1] - count[first[session] - start]
        weights = direction[session] * agreed / bars[session][:, None] / len(self.universe)
        weights[grid[rows] == closes[session]] = 0
        weights[(~known[session]).all(axis=1)] = np.nan
        return weights

    def _directions(self, sessions: Sessions, grid: Times, values: dict[str, Floats], wanted: slice) -> tuple[np.ndarray, np.ndarray]:
        """(S, N) 1 or -1 of the sessions wanted, and whether it is known."""
        before = np.arange(wanted.start, wanted.stop) - 1
        opened = sessions.first_times(self.frequency)[before]  # when its first bar is known
        ratio = _at(grid, values["prices"], sessions.closes[before]) / _at(grid, values["open"], opened)
        known = ~np.isnan(ratio) & (before >= 0)[:, None]
        return np.where(ratio - 1 > 0, 1, -1), known


def _at(grid: Times, values: Floats, times: Times) -> Floats:
    """(S, N) the rows of those times, NaN where the grid has none."""
    row = np.minimum(np.searchsorted(grid, times), len(grid) - 1)
    return np.where((grid[row] == times)[:, None], values[row], np.nan)
