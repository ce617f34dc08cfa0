"""Portfolio construction, pure: from prices, signal vectors and stored state to the rows of one update window.

The window of a portfolio starts at its own watermark and ends where the first of its required assets ends. Nothing here knows other
portfolios, the clock or the database, so batches, workers and splits cannot reach the numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from msm_core.configuration import PortfolioConfiguration, PriceAlignmentPolicy
from msm_core.errors import MissingPrices, ScopeUndetermined
from msm_core.frames import NEVER, TICK, Floats, LastTrade, Series, Times
from msm_core.sessions import Sessions
from msm_core.signals import Vectors
from msm_core.valuation import ACCOUNTINGS, Bars, Events, Opening, Trades


@dataclass(frozen=True)
class Market:
    """Prices of one source aligned to the valuation times of one calendar; shared by every portfolio that asks for the same.

    grid      (T,) valuation times
    assets    (A,) bytewise order
    prices, bar_times, fresh, volumes  (T, A) as in `Bars`
    first_bar, last_bar  (A,) when the first and the last bar that were read became known; NaT where there is none
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
    first_bar: Times
    last_bar: Times
    policy: PriceAlignmentPolicy

    def columns(self, assets: Sequence[str]) -> np.ndarray:
        place = {asset: i for i, asset in enumerate(self.assets)}
        return np.array([place[a] for a in assets], dtype=np.int64)


@dataclass(frozen=True)
class State:
    """What is stored of a portfolio at its watermark; a fresh one has none of it."""

    watermark: np.datetime64
    close: float
    calculated_close: float
    trade_value: float
    last_trade: LastTrade


@dataclass(frozen=True)
class Construction:
    """Rows of one update: values at `times` (T,), and one vector over `assets` (N,) per trade (K, N)."""

    times: Times
    close: Floats
    returns: Floats
    calculated_close: Floats
    assets: tuple[str, ...]
    bars: Bars
    trades: Trades
    prices_before: Floats
    volumes_before: Floats


# -- alignment ----------------------------------------------------------------------------------------------------------------


def align(
    series: Mapping[str, Series], assets: Sequence[str], sessions: Sessions, grid: Times, policy: PriceAlignmentPolicy, source: str,
    column: str, time_label: str,
) -> Market:  # fmt: skip
    """The price of an asset at t is its last bar known at or before t, if t - bar time <= maximum_staleness.

    A bar labelled `session_date` becomes known at that session's close; one whose date is no session belongs to none and is left out.
    """
    shape = (len(grid), len(assets))
    prices, volumes = np.full(shape, np.nan), np.full(shape, np.nan)
    bar_times, first_bar, last_bar = np.full(shape, NEVER), np.full(len(assets), NEVER), np.full(len(assets), NEVER)
    for i, asset in enumerate(assets):
        bars = _known(series[asset], sessions, time_label) if asset in series else None
        if bars is None or not len(bars.times):
            continue
        first_bar[i], last_bar[i] = bars.times[[0, -1]]  # of all bars: a bad last one must be told, not dropped
        bars = _usable(bars) if policy.missing == "hold" else bars
        index = np.searchsorted(bars.times, grid, side="right") - 1
        known = index >= 0
        bar_times[known, i], prices[known, i], volumes[known, i] = (
            array[index[known]] for array in (bars.times, bars.values, bars.volumes)
        )
    fresh = ~np.isnat(bar_times) & (grid[:, None] - bar_times <= np.timedelta64(policy.maximum_staleness))
    prices[~fresh], volumes[~fresh] = np.nan, np.nan
    return Market(source, column, sessions, grid, tuple(assets), prices, bar_times, fresh, volumes, first_bar, last_bar, policy)


def _known(bars: Series, sessions: Sessions, time_label: str) -> Series:
    """Bars stamped with the instant at which they became known."""
    if time_label == "close":
        return bars
    dates = sessions.labelled_dates(bars.times)
    row = np.searchsorted(sessions.dates, dates)
    is_session = np.isin(dates, sessions.dates)
    return Series(sessions.closes[row[is_session]], bars.values[is_session], bars.volumes[is_session])


def _usable(bars: Series) -> Series:
    good = np.isfinite(bars.values) & (bars.values > 0)
    return Series(bars.times[good], bars.values[good], bars.volumes[good])


# -- window and events --------------------------------------------------------------------------------------------------------


def required_assets(configuration: PortfolioConfiguration, held: Sequence[str]) -> tuple[str, ...]:
    """Assets that bound the window: the signal's universe, what is held, the override asset. Raises ScopeUndetermined."""
    universe = configuration.signal.universe
    if not universe:
        raise ScopeUndetermined(portfolio=configuration.identifier)
    return tuple(sorted({*universe, *held, *configuration.signal.override}))


def window_end(
    configuration: PortfolioConfiguration, market: Market, state: State | None, as_of: np.datetime64, signal_end: np.datetime64 | None
) -> np.datetime64:
    """Last instant that may be valued: min over required assets of their last bar, the signal's validity, and `as_of`.

    Raises MissingPrices for a fresh portfolio with assets that have no bar at all.
    """
    required = required_assets(configuration, state.last_trade.held() if state else ())
    last = market.last_bar[market.columns(required)]
    if np.isnat(last).any():
        if state is not None:
            return state.watermark  # nothing new of that asset: exhausted
        absent = ", ".join(a for a, t in zip(required, last, strict=True) if np.isnat(t))
        raise MissingPrices(portfolio=configuration.identifier, source=market.source, column=market.column, assets=absent)
    return min(t for t in (last.min(), signal_end, as_of) if t is not None)


def construct(
    configuration: PortfolioConfiguration, market: Market, vectors: Vectors, state: State | None, end: np.datetime64
) -> Construction | None:
    """The rows after the watermark through `end`, or None where there are none: an exhausted window, or no purchase yet.

    Raises what is wrong with this portfolio (prices, calendar range, value) with asset, time and value.
    """
    if state is None:
        begin, after = _begin(configuration, market, vectors, end)
    else:
        begin, after = None, state.watermark
        market.sessions.require(after, end)
    rows = slice(int(np.searchsorted(market.grid, after, "right")), int(np.searchsorted(market.grid, end, "right")))
    if rows.stop <= rows.start:
        return None
    assets = tuple(sorted({*vectors.assets, *(state.last_trade.held() if state else ())}))
    bars, opening = _bars(market, assets, rows), _opening(state, assets)
    events = _events(configuration, market.sessions, vectors, bars, begin, after, end)
    account = ACCOUNTINGS[configuration.execution.weight_accounting]
    valuation = account(bars, events, configuration.execution.commission_fee, opening, configuration.identifier)
    begun = ~np.isnan(valuation.values)
    if not begun.any():
        return None
    published = _published(configuration, market, rows, valuation.values, begun)
    previous = state.close if state else (1.0 if configuration.signal.override_asset is None else published[0])
    prices_before, volumes_before = _struck(bars, opening, valuation.trades)
    return Construction(
        times=bars.times[begun],
        close=published,
        returns=published / np.append(previous, published[:-1]) - 1.0,
        calculated_close=valuation.values[begun],
        assets=assets,
        bars=bars,
        trades=valuation.trades,
        prices_before=prices_before,
        volumes_before=volumes_before,
    )


def _begin(configuration: PortfolioConfiguration, market: Market, vectors: Vectors, end: np.datetime64) -> tuple[int, np.datetime64]:
    """First session that may decide for a fresh portfolio, and the instant after which its rows may lie (`end` = none yet).

    From `start_date` where one is given; else the first session at which every asset of the target valid there has a price.
    Raises CalendarRangeError when the calendar begins later than that.
    """
    sessions = market.sessions
    if configuration.start_date is not None:
        earliest = np.datetime64(configuration.start_date, "us")
        begin = int(np.searchsorted(sessions.dates, earliest.astype("datetime64[D]")))
    else:
        earliest = _priced_from(market, vectors)
        begin = _first_priced_session(configuration, market, vectors, end)
    if earliest > end:
        return begin, end
    sessions.require(earliest, end)
    return begin, (sessions.closes[begin] - TICK if begin < len(sessions.closes) else end)


def _priced_from(market: Market, vectors: Vectors) -> np.datetime64:
    """The first instant at which some vector is known and all it wants has had its first bar; one that wants nothing waits for all."""
    wanted = vectors.weights != 0
    wanted[~wanted.any(axis=1)] = True
    first_bars = np.where(wanted, market.first_bar[market.columns(vectors.assets)], vectors.times[:, None])
    return np.maximum(first_bars.max(axis=1), vectors.times).min()


def _first_priced_session(configuration: PortfolioConfiguration, market: Market, vectors: Vectors, end: np.datetime64) -> int:
    """Index of the first session at which every asset of the target valid there has a usable price; S where it is too early to tell.

    Raises MissingPrice, or InvalidPrice, when they all have had bars before a session, and yet none can be traded at: bars beside the
    valuation times, for example of another calendar, would leave a portfolio waiting in silence for ever.
    """
    sessions = market.sessions
    candidates = np.flatnonzero(np.isin(sessions.closes, market.grid) & (sessions.closes <= end))
    target = vectors.valid_at(sessions.closes[candidates], configuration.signal.maximum_forward_fill)
    rows = np.searchsorted(market.grid, sessions.closes[candidates])
    prices = market.prices[rows][:, market.columns(vectors.assets)]
    ready = (target >= 0) & ((vectors.weights[target] == 0) | (np.isfinite(prices) & (prices > 0))).all(axis=1)
    if ready.any():
        return int(candidates[ready.argmax()])
    listed = market.first_bar[market.columns(vectors.assets)] <= sessions.closes[candidates][:, None]
    due = (target >= 0) & ((vectors.weights[target] == 0) | listed).all(axis=1)
    if due.any():
        first = int(due.argmax())
        bars = _bars(market, vectors.assets, slice(rows[first], rows[first] + 1))
        bars.require(vectors.weights[target[first]][None, :] != 0, configuration.identifier)
    return len(sessions.closes)


def _events(
    configuration: PortfolioConfiguration, sessions: Sessions, vectors: Vectors, bars: Bars, begin: int | None, after: np.datetime64,
    end: np.datetime64,
) -> Events:  # fmt: skip
    """Trades of the window: targets decided at session closes, executed `execution_lag` sessions later, at closes in (after, end].

    `begin` is the first session that may decide, for a fresh portfolio; an old one has decided since long before.
    """
    strategy = configuration.rebalance
    through = int(np.searchsorted(sessions.closes, end, "right")) - 1
    target = vectors.valid_at(sessions.closes, configuration.signal.maximum_forward_fill)
    changed = _changed(vectors, target)
    if begin is not None and begin < len(changed):
        changed[begin] = True
    deciding = through - strategy.execution_lag  # a later decision is executed after the window
    decided = np.flatnonzero(strategy.decisions(sessions, target, changed, deciding)[: max(deciding + 1, 0)])
    decided = decided[decided >= begin] if begin is not None else decided
    closes = sessions.closes[decided + strategy.execution_lag]
    decided, closes = decided[closes > after], closes[closes > after]
    place = {asset: i for i, asset in enumerate(bars.assets)}
    targets = np.zeros((len(decided), len(bars.assets)))
    targets[:, [place[a] for a in vectors.assets]] = vectors.weights[target[decided]]
    return Events(np.searchsorted(bars.times, closes), targets)


def _changed(vectors: Vectors, target: np.ndarray) -> np.ndarray:
    """(S,) the vector valid at a session differs in content from the one valid a session earlier."""
    previous = np.append(-1, target[:-1])
    changed = target != previous
    both = changed & (target >= 0) & (previous >= 0)
    changed[both] = (vectors.weights[target[both]] != vectors.weights[previous[both]]).any(axis=1)
    return changed


# -- assembling ---------------------------------------------------------------------------------------------------------------


def _bars(market: Market, assets: tuple[str, ...], rows: slice) -> Bars:
    columns = market.columns(assets)
    return Bars(
        times=market.grid[rows],
        assets=assets,
        prices=market.prices[rows][:, columns],
        bar_times=market.bar_times[rows][:, columns],
        fresh=market.fresh[rows][:, columns],
        volumes=market.volumes[rows][:, columns],
        opening_prices=market.prices[rows.start - 1][columns] if rows.start else np.full(len(assets), np.nan),
        column=market.column,
        staleness=str(market.policy.maximum_staleness),
    )


def _opening(state: State | None, assets: tuple[str, ...]) -> Opening:
    if state is None:
        return Opening.fresh(len(assets))
    trade = state.last_trade
    place = {asset: i for i, asset in enumerate(trade.assets)}
    held = np.array([place.get(a, -1) for a in assets], dtype=np.int64)
    weights = np.where(held >= 0, trade.weights[held], 0.0)
    prices, volumes = (np.where(held >= 0, column[held], np.nan) for column in (trade.prices, trade.volumes))
    return Opening(True, state.calculated_close, state.trade_value, weights, prices, volumes)


def _published(configuration: PortfolioConfiguration, market: Market, rows: slice, values: Floats, begun: np.ndarray) -> Floats:
    """The published close: the computed value, or the override asset's price, which must be usable wherever the portfolio is valued."""
    override = configuration.signal.override_asset
    if override is None:
        return values[begun]
    bars = _bars(market, (override,), rows)
    bars.require(begun[:, None], configuration.identifier)
    return bars.prices[begun, 0]


def _struck(bars: Bars, opening: Opening, trades: Trades) -> tuple[Floats, Floats]:
    """(K, N) price and volume of the trade that struck the position that each trade changes; NaN where there was none."""
    none = trades.before == 0
    struck = [
        np.where(none, np.nan, np.vstack([first, later[trades.rows[:-1]]])) if len(trades.rows) else trades.before
        for first, later in ((opening.prices, bars.prices), (opening.volumes, bars.volumes))
    ]
    return struck[0], struck[1]
