"""Local alignment: the bars of a source at the valuation times of a calendar. Pure, and nothing of it is stored."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Literal

import numpy as np
from pydantic import Field

from msm_core.frames import NEVER, Floats, Series, Times, is_usable
from msm_core.identity import Spec
from msm_core.sessions import Sessions

DIGESTS_KEPT_MAX = 100_000  # windows may begin anywhere


class PriceAlignmentPolicy(Spec):
    """Which bar prices an asset at a valuation time.

    maximum_staleness  the last bar at or before t counts if it is at most this old; 0 = a bar at t itself
    missing            fail: an unusable price (NaN, 0, negative, infinite) fails the portfolio;
                       hold: it counts as no bar, so the last good one is held, within the staleness
    """

    kind: Literal["price_alignment"] = "price_alignment"
    missing: Literal["fail", "hold"] = Field(default="fail", description="what an unusable price does: fail, or hold the last good one")
    maximum_staleness: timedelta = Field(default=timedelta(0), ge=timedelta(0), description="oldest bar that counts; 0: one at that time")


@dataclass(frozen=True)
class Market:
    """Numbers of one source aligned to the valuation times of one calendar; shared by everything that asks for the same.

    grid      (T,) valuation times
    assets    (A,) bytewise order
    prices, bar_times, fresh, volumes  (T, A) as in `Bars`
    liquidity (T, A) of the column that a strategy asks for beside the price, by default the volume; NaN where unknown
    first_bar, last_bar  (A,) when the first and the last bar that were read became known; NaT where there is none
    gone_from (A,) the open of the first session after the asset's `delisted_on`; NaT for one that is listed
    """

    source: str
    column: str
    sessions: Sessions
    grid: Times
    assets: tuple[str, ...]
    prices: Floats
    bar_times: Times
    fresh: np.ndarray
    volumes: Floats
    liquidity: Floats
    first_bar: Times
    last_bar: Times
    gone_from: Times
    policy: PriceAlignmentPolicy
    places: Mapping[str, int] = field(init=False, compare=False)
    _digests: dict[tuple[int, int, int], bytes] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "places", {asset: i for i, asset in enumerate(self.assets)})

    @cached_property
    def priced(self) -> np.ndarray:
        """(T,) mask of valuation times at which every asset has a usable price, finite and above 0."""
        return np.asarray(np.all(is_usable(self.prices), axis=1))

    def columns(self, assets: Sequence[str]) -> np.ndarray:
        return np.fromiter(map(self.places.__getitem__, assets), np.int64, len(assets))

    def digests(self, columns: np.ndarray, rows: slice) -> list[bytes]:
        """sha256 of the prices and volumes of each of some assets; worked out once for all portfolios that hold it."""
        keys = [(column, rows.start, rows.stop) for column in columns.tolist()]
        if len(self._digests) > DIGESTS_KEPT_MAX:
            self._digests.clear()
        for key in keys:
            if key not in self._digests:
                bars = (block[rows, key[0]].tobytes() for block in (self.prices, self.volumes))
                self._digests[key] = hashlib.sha256(b"".join(bars)).digest()
        return [self._digests[key] for key in keys]

    def gone(self, columns: np.ndarray, times: Times) -> np.ndarray:
        """(T, N) mask: the asset is past its `delisted_on` at that time; it can be held no longer."""
        return times[:, None] > self.gone_from[columns]  # false for NaT

    def silent(self, columns: np.ndarray, sessions_max: int) -> np.ndarray:
        """(N,) mask of assets whose last bar is more than `sessions_max` sessions before the newest one of them all.

        When all of them are late nobody is silent: it is the source that is waited for.
        """
        last = self.last_bar[columns]
        session = np.searchsorted(self.sessions.closes, last)  # that the bar belongs to; after all others for NaT
        known = ~np.isnat(last)
        return ~known | (session.max(where=known, initial=-1) - session > sessions_max) if known.any() else np.zeros(len(last), bool)

    def viewed(self, assets: Sequence[str], grid: Times) -> "Market":
        """Some assets on a grid that begins no later: nothing is known of the rows before its own."""
        columns, rows = self.columns(assets), len(grid) - len(self.grid)

        def block(values: np.ndarray, nothing: object) -> np.ndarray:
            return np.concatenate([np.full((rows, len(columns)), nothing, values.dtype), values[:, columns]])

        return Market(
            self.source, self.column, self.sessions, grid, tuple(assets), block(self.prices, np.nan), block(self.bar_times, NEVER),
            block(self.fresh, False), block(self.volumes, np.nan), block(self.liquidity, np.nan), self.first_bar[columns],
            self.last_bar[columns], self.gone_from[columns], self.policy,
        )  # fmt: skip

    def covered_through(self, as_of: np.datetime64) -> Times:
        """(A,) how far each asset is known: its last bar; `as_of` for one that is delisted by then."""
        return np.where(self.gone_from < as_of, as_of, self.last_bar)


def align(
    series: Mapping[str, Series], assets: Sequence[str], sessions: Sessions, grid: Times, policy: PriceAlignmentPolicy, source: str,
    column: str, time_label: str, delisted: Mapping[str, np.datetime64] | None = None, zero_allowed: bool = False,
) -> Market:  # fmt: skip
    """The price of an asset at t is its last bar known at or before t, if t - bar time <= maximum_staleness.

    A bar labelled `session_date` becomes known at that session's close; one whose date is no session belongs to none and is left out.
    delisted: local date of the last day of assets that have one; later bars do not count, and the last price before it stays.
    zero_allowed: 0 is a number like others, as of a volume; to the policy `hold` it is one too.
    """
    shape = (len(grid), len(assets))
    prices, volumes, liquidity = (np.full(shape, np.nan) for _ in range(3))
    bar_times, first_bar, last_bar = np.full(shape, NEVER), np.full(len(assets), NEVER), np.full(len(assets), NEVER)
    gone_from = np.array([_gone_from(sessions, (delisted or {}).get(asset)) for asset in assets], "datetime64[us]")
    for i, asset in enumerate(assets):
        bars = _known(series[asset], sessions, time_label) if asset in series else None
        if bars is not None and not np.isnat(gone_from[i]):
            bars = bars.kept(bars.times <= gone_from[i])
        if bars is None or not len(bars.times):
            continue
        first_bar[i], last_bar[i] = bars.times[[0, -1]]  # of all bars: a bad last one must be told, not dropped
        if policy.missing == "hold":
            bars = bars.kept(is_usable(bars.values, zero_allowed))
        index = np.searchsorted(bars.times, grid, side="right") - 1
        known = index >= 0
        asked = bars.volumes if bars.liquidity is None else bars.liquidity
        pairs = ((bar_times, bars.times), (prices, bars.values), (volumes, bars.volumes), (liquidity, asked))
        for block, values in pairs:
            block[known, i] = values[index[known]]
    fresh = ~np.isnat(bar_times) & (grid[:, None] - bar_times <= np.timedelta64(policy.maximum_staleness))
    prices[~(fresh | (grid[:, None] > gone_from))] = np.nan
    volumes[~fresh], liquidity[~fresh] = np.nan, np.nan
    return Market(
        source, column, sessions, grid, tuple(assets), prices, bar_times, fresh, volumes, liquidity, first_bar, last_bar, gone_from, policy
    )  # fmt: skip


def _gone_from(sessions: Sessions, delisted_on: np.datetime64 | None) -> np.datetime64:
    if delisted_on is None:
        return NEVER
    session = int(np.searchsorted(sessions.dates, delisted_on, "right"))
    return sessions.opens[session] if session < len(sessions.dates) else NEVER


def _known(bars: Series, sessions: Sessions, time_label: str) -> Series:
    """Bars stamped with the instant at which they became known."""
    if time_label == "close":
        return bars
    dates = sessions.labelled_dates(bars.times)
    is_session = np.isin(dates, sessions.dates)
    row = np.searchsorted(sessions.dates, dates)[is_session]
    kept = bars.kept(is_session)
    return Series(sessions.closes[row], kept.values, kept.volumes, kept.liquidity)
