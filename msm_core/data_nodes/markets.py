"""Blocks of prices for whoever needs them: read set-based, one statement per source and column, and aligned once per distinct use."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import NamedTuple

import numpy as np
from sqlalchemy import Connection

from msm_core.alignment import Market, PriceAlignmentPolicy, align
from msm_core.configuration import PortfolioConfiguration
from msm_core.data_nodes.kept_prices import KEPT
from msm_core.errors import MsmError
from msm_core.frames import Series, earliest, to_datetime, utc
from msm_core.price_sources import SourceKey
from msm_core.sessions import Sessions
from msm_core.sources import Source

KEPT_CELLS_MAX = 6_000_000  # sessions x assets in each process; 41 bytes each


class MarketKey(NamedTuple):
    """Who has the same key shares one aligned block of numbers.

    liquidity_column  read beside the price; none for the volume, which always is
    zero_allowed      0 is a number like others, not a price that is none
    """

    source: SourceKey
    column: str
    calendar_key: str
    frequency: timedelta
    policy: PriceAlignmentPolicy
    liquidity_column: str | None = None
    zero_allowed: bool = False

    @classmethod
    def of(cls, configuration: PortfolioConfiguration) -> "MarketKey":
        """Prices at a portfolio's valuation times; volumes always come along."""
        strategy, asked = configuration.rebalance, configuration.rebalance.liquidity_column
        return cls(
            configuration.price_source.key, configuration.price_column, strategy.calendar_key, configuration.frequency,
            configuration.alignment, None if asked == "volume" else asked,
        )  # fmt: skip


@dataclass(frozen=True)
class Need:
    """Prices of some assets from `since` on (None: from the beginning), and of `history_sessions` sessions before it."""

    key: MarketKey
    assets: Sequence[str]
    since: datetime | None
    history_sessions: int = 0


Calendars = Mapping[str, Sessions | MsmError]
Sources = Mapping[SourceKey, Source | MsmError]
Markets = Mapping[MarketKey, Market | MsmError]  # one that could not be built holds the error, for those who need it
ReadKey = tuple[SourceKey, str, str | None]
Slot = tuple[MarketKey, int | None]


def read_markets(
    connection: Connection, needs: Iterable[Need], sources: Sources, calendars: Calendars, delisted: Mapping[str, np.datetime64],
    as_of: datetime, *, inside: bool, world: str | None = None,
) -> dict[MarketKey, Market | MsmError]:  # fmt: skip
    """Of sources that this system writes (inside), or of those that others do; needs of the rest are passed over.

    world  what all batches of a run read under: bars of it are read, and aligned, once by each process (`KeptPrices`, `KeptMarkets`)
    """
    groups: dict[MarketKey, list[Need]] = {}
    for need in needs:
        source = sources[need.key.source]
        if inside == (isinstance(source, Source) and source.is_inside):
            groups.setdefault(need.key, []).append(need)
    kept = MARKETS.of(world)
    kept.delisted |= delisted
    slots = {key: (key, _span(group, as_of)) for key, group in groups.items()}
    found: dict[MarketKey, Market | MsmError] = {key: market for key, group in groups.items() if (market := kept.find(slots[key], group))}
    missing = {key: kept.extended(slots[key], group) for key, group in groups.items() if key not in found}
    prices = _read(connection, [need for group in missing.values() for need in group], sources, calendars, as_of, world)
    for key, group in missing.items():
        found[key] = kept.keep(slots[key], group, _market(key, group, sources, calendars, prices, kept.delisted, as_of))
    return found


@dataclass
class KeptMarkets:
    """Aligned blocks of outside prices that this process made under the snapshot of a run: a batch that needs no more shares them.

    A block may hold more assets and begin earlier than a batch asks for, as those of a batch's other members do. Windows of much
    different length have blocks of their own: a night needs no decades.
    """

    world: str | None = None
    made: dict[Slot, tuple[Market, Need]] = field(default_factory=dict)
    delisted: dict[str, np.datetime64] = field(default_factory=dict)  # of all assets asked for so far

    def of(self, world: str | None) -> "KeptMarkets":
        """What is kept of one state of the world, nothing for None; of another one it is given up."""
        if world is None:
            return KeptMarkets()
        if world != self.world:
            self.world = world
            self.made.clear()
            self.delisted.clear()
        return self

    def find(self, slot: Slot, needs: Sequence[Need]) -> Market | None:
        market, covered = self.made.get(slot, (None, None))
        return market if covered is not None and _covers(covered, needs) else None

    def extended(self, slot: Slot, needs: Sequence[Need]) -> list[Need]:
        """`needs`, and what is kept already: the block grows to what all batches need, and is made no more."""
        return [*needs, self.made[slot][1]] if slot in self.made else list(needs)

    def keep(self, slot: Slot, needs: Sequence[Need], market: Market | MsmError) -> Market | MsmError:
        self.made.pop(slot, None)
        if isinstance(market, Market) and self.world is not None and market.prices.size <= KEPT_CELLS_MAX:
            while sum(m.prices.size for m, _ in self.made.values()) + market.prices.size > KEPT_CELLS_MAX:
                self.made.pop(next(iter(self.made)))
            history = max(need.history_sessions for need in needs)
            self.made[slot] = (market, Need(slot[0], market.assets, earliest(need.since for need in needs), history))
        return market


def _span(needs: Iterable[Need], as_of: datetime) -> int | None:
    """Length of the longest window, to a factor of two; None = from the beginning."""
    since = earliest(need.since for need in needs)
    return None if since is None else (as_of - since).days.bit_length()


def _covers(covered: Need, needs: Iterable[Need]) -> bool:
    assets = set(covered.assets)
    return all(
        assets.issuperset(need.assets)
        and need.history_sessions <= covered.history_sessions
        and (covered.since is None or (need.since is not None and need.since >= covered.since))
        for need in needs
    )


MARKETS = KeptMarkets()


def _read(
    connection: Connection, needs: Sequence[Need], sources: Sources, calendars: Calendars, as_of: datetime, world: str | None
) -> dict[ReadKey, dict[str, Series] | MsmError]:
    groups: dict[ReadKey, list[Need]] = {}
    for need in needs:
        groups.setdefault((need.key.source, need.key.column, need.key.liquidity_column), []).append(need)
    prices: dict[ReadKey, dict[str, Series] | MsmError] = {}
    for (key, column, liquidity_column), group in groups.items():
        source = sources[key]
        if isinstance(source, MsmError):
            prices[key, column, liquidity_column] = source
            continue
        assets = sorted({a for need in group for a in need.assets})
        since = earliest(_bars_since(need, source, calendars) for need in group)
        try:
            found: dict[str, Series] | MsmError = KEPT.read(world, connection, source, column, assets, since, as_of, liquidity_column)
        except MsmError as error:
            found = error
        prices[key, column, liquidity_column] = found
    return prices


def _bars_since(need: Need, source: Source, calendars: Calendars) -> datetime | None:
    """Time of the oldest bar that may be needed: as much before the first valuation time as staleness and time label allow."""
    if need.since is None:
        return None
    first, sessions = need.since, calendars[need.key.calendar_key]
    if need.history_sessions and isinstance(sessions, Sessions):
        begin = int(np.searchsorted(sessions.closes, utc(first, "since"))) - need.history_sessions
        if begin < 0:
            return None
        first = to_datetime(sessions.opens[begin])
    return first - need.key.policy.maximum_staleness - source.margin


def _market(
    key: MarketKey, needs: Sequence[Need], sources: Sources, calendars: Calendars,
    prices: Mapping[ReadKey, dict[str, Series] | MsmError], delisted: Mapping[str, np.datetime64], as_of: datetime,
) -> Market | MsmError:  # fmt: skip
    sessions, series, source = calendars[key.calendar_key], prices[key.source, key.column, key.liquidity_column], sources[key.source]
    for input_ in (series, sessions):
        if isinstance(input_, MsmError):
            return input_
    assert isinstance(sessions, Sessions)
    assert isinstance(series, dict)
    assert isinstance(source, Source)
    assets = sorted({a for need in needs for a in need.assets})
    times = sessions.valuation_times(key.frequency)
    first = min((series[asset].times[0] for asset in assets if asset in series), default=utc(as_of, "as_of"))
    since = [utc(need.since, "since") for need in needs if need.since]
    begin = min([first, *since])
    grid = times[np.searchsorted(times, begin, "left") : np.searchsorted(times, utc(as_of, "as_of"), "right")]
    return align(
        series, assets, sessions, grid, key.policy, source.identifier, key.column, source.time_label, delisted, key.zero_allowed
    )  # fmt: skip
