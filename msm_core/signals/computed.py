"""Signals that are computed from prices, at the closes of a calendar's sessions, each from a window of fixed length.

A vector at t is a function of its window alone: the last `history_sessions` sessions through t. That is what makes the same bits come
out of one run or of many (design.md section 8, rule 4), and what bounds how much a nightly run reads.
"""

from collections.abc import Iterator
from datetime import timedelta
from typing import Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from pydantic import Field

from msm_core.alignment import Market, PriceAlignmentPolicy
from msm_core.errors import FitFailed, InvalidInput, MissingPrices
from msm_core.frames import Floats, Times, is_usable, iso
from msm_core.price_sources import AnyPriceSource, PublishedValues
from msm_core.sessions import Sessions
from msm_core.signals.base import NOTHING, Inputs, ListedSignal, Request, Vectors

EmitOn = Literal["every_session", "week_end", "month_end", "quarter_end"]
PERIODS: dict[str, Literal["week", "month", "quarter"]] = {"week_end": "week", "month_end": "month", "quarter_end": "quarter"}
WINDOW_CELLS_MAX = 2_000_000  # numbers of all windows that are looked at together: bounds memory, never the result


class ComputedSignal(ListedSignal):
    """A signal that is computed from prices. An asset that lacks a number in its window has weight 0 in that vector."""

    calendar_key: str = Field(min_length=1, max_length=255, description="calendar whose session closes are looked at")
    price_source: AnyPriceSource = Field(description="prices that the signal sees; a name of the fleet file's prices section")
    price_column: str = Field(default="close", min_length=1, max_length=63, description="numeric column of the price source")
    emit_on: EmitOn = Field(default="every_session", description="sessions at which a vector is emitted")
    price_alignment_policy: PriceAlignmentPolicy = Field(
        default=PriceAlignmentPolicy(), description="which bar prices an asset at a close, as for portfolios"
    )
    stale_after_sessions: int | None = Field(
        default=None, ge=1, le=10_000, description="an asset silent for longer leaves the universe; none: the signal waits for it"
    )

    @property
    def frequency(self) -> timedelta:
        """Of the grid that it is computed on; a day = session closes."""
        return timedelta(days=1)

    @property
    def history_sessions(self) -> int:
        """Sessions in the window of one vector, its own included."""
        raise NotImplementedError

    @property
    def requests(self) -> tuple[Request, ...]:
        return (Request("prices", self.price_source, self.price_column, self.universe),)

    def target_weights(self, windows: dict[str, Floats]) -> Floats:
        """(E, N) target weights, in the order of `universe`; a row with a NaN emits nothing.

        windows  per request (E, n, L): numbers of the n identifiers over the last L = history_sessions closes, the newest last;
                 NaN where there is none
        """
        raise NotImplementedError

    def emit(self, since: np.datetime64 | None, through: np.datetime64, inputs: Inputs = NOTHING) -> Vectors:
        """Raises InvalidInput for a number that is none, CalendarRangeError where a period's end cannot be told yet."""
        assert inputs.sessions is not None
        grid = next(iter(inputs.panels.values())).grid
        rows = self.emission_rows(inputs.sessions, grid, since, through)
        values = {r.name: self._numbers(inputs.panels[r.name], r, through) for r in self.requests}
        weights = np.concatenate(
            [self.weights_at(inputs, values, part) for part in self._parts(rows, values)] or [np.empty((0, len(self.universe)))]
        )
        emitted = ~np.isnan(weights).any(axis=1)
        return Vectors(grid[rows[emitted]], self.universe, weights[emitted])

    def emission_rows(self, sessions: Sessions, grid: Times, since: np.datetime64 | None, through: np.datetime64) -> np.ndarray:
        """Rows of the grid in (since, through] at which a vector is due."""
        due = (grid <= through) & (True if since is None else grid > since)
        if self.emit_on in PERIODS:
            newest = int(np.searchsorted(sessions.closes, grid[due][-1], "left")) if due.any() else -1
            ends = sessions.period_ends(PERIODS[self.emit_on], newest)
            due &= np.isin(grid, sessions.closes[ends])
        return np.flatnonzero(due)

    def weights_at(self, inputs: Inputs, values: dict[str, Floats], rows: np.ndarray) -> Floats:
        """(E, N) target weights at some rows of the grid. Raises FitFailed, naming the time, of signals that are fitted."""
        try:
            return self.target_weights({name: _windows(panel, rows, self.history_sessions) for name, panel in values.items()})
        except FitFailed as error:
            time = iso(inputs.panels["prices"].grid[int(rows[error.facts["window"]])])
            raise FitFailed(**error.facts | {"time": time}) from None

    def computed_through(self, inputs: Inputs, since: np.datetime64 | None, as_of: np.datetime64) -> np.datetime64 | None:
        """The newest time of the grid at which every asset of the universe is known, or None.

        An asset past its `delisted_on`, or silent for longer than `stale_after_sessions`, holds nobody back.
        Raises MissingPrices for assets without any bar, unless something was computed before or they may be silent.
        """
        end = as_of
        grid = next(iter(inputs.panels.values())).grid
        for request in self.requests:
            panel = inputs.panels[request.name]
            covered = panel.covered_through(as_of)
            if self.stale_after_sessions is not None:
                covered = covered[~panel.silent(np.arange(len(panel.assets)), self.stale_after_sessions)]
            if np.isnat(covered).any():
                if since is not None or isinstance(request.source, PublishedValues):
                    return None  # a portfolio that is tracked may not have begun
                absent = [a for a, t in zip(panel.assets, panel.last_bar, strict=True) if np.isnat(t)]
                raise MissingPrices(portfolio=f"signal {self.kind}", source=panel.source, column=panel.column, assets=", ".join(absent))
            end = min(end, *covered) if len(covered) else end
        known = grid[grid <= end]
        return known[-1] if len(known) else None

    def _numbers(self, panel: Market, request: Request, through: np.datetime64) -> Floats:
        """(T, n) the panel's numbers, NaN where an asset is gone. Raises InvalidInput."""
        values = panel.prices.copy()
        gone = panel.gone(np.arange(len(panel.assets)), panel.grid)
        bad = panel.fresh & ~gone & ~is_usable(values, request.zero_allowed) & (panel.grid <= through)[:, None]
        if bad.any():
            row, asset = (int(i) for i in np.argwhere(bad)[0])
            facts = {"asset": panel.assets[asset], "time": iso(panel.grid[row]), "value": float(values[row, asset])}
            raise InvalidInput(owner=f"signal {self.kind}", source=panel.source, column=panel.column, **facts)
        values[gone] = np.nan
        return values

    def _parts(self, rows: np.ndarray, values: dict[str, Floats]) -> Iterator[np.ndarray]:
        cells = max(panel.shape[1] for panel in values.values()) * self.history_sessions
        size = max(WINDOW_CELLS_MAX // cells, 1)
        return (rows[i : i + size] for i in range(0, len(rows), size))


def _windows(values: Floats, rows: np.ndarray, length: int) -> Floats:
    """(E, n, L) the last `length` rows through each of `rows`, which ascend; NaN before the first one."""
    first, end = int(rows[0]) - length + 1, int(rows[-1]) + 1
    columns = np.full((values.shape[1], end - first), np.nan)  # transposed once, so that every window is copied from one place
    columns[:, max(-first, 0) :] = values[max(first, 0) : end].T
    return np.ascontiguousarray(sliding_window_view(columns, length, axis=1).swapaxes(0, 1)[rows - rows[0]])
