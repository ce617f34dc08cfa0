"""Portfolio construction, pure: from prices, signal vectors and stored state to the rows of one update window.

The window of a portfolio starts at its own watermark and ends where the first of its required assets ends. Three steps: `prepared`
finds the window and the events of one portfolio, `msm_core.execution` makes trades of the events of many, `finished` values one.
Nothing here knows other portfolios, the clock or the database, so batches, workers and splits cannot reach the numbers.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from msm_core.alignment import Market
from msm_core.cash import CashAccount
from msm_core.configuration import PortfolioConfiguration
from msm_core.decisions import decided_events
from msm_core.errors import MissingPrices, ScopeUndetermined
from msm_core.execution import Job, execute, tape_of
from msm_core.frames import TICK, Floats, LastTrade, Times, in_order, is_usable, iso
from msm_core.signals import Vectors
from msm_core.signals.computed import ComputedSignal
from msm_core.valuation import ACCOUNTINGS, Bars, Opening, Order, Trades

SEARCHED = 64  # sessions at a time


@dataclass(frozen=True)
class OpenOrder:
    """What is stored of an order under way: what is still to do of each asset, and what its session has used up.

    goals  target weights, NaN = nothing is to be done; active_from NaT = of no asset
    """

    active_from: np.datetime64
    assets: tuple[str, ...]
    goals: Floats
    used: Floats


@dataclass(frozen=True)
class State:
    """What is stored of a portfolio at its watermark; a fresh one has none of it."""

    watermark: np.datetime64
    close: float
    calculated_close: float
    trade_value: float
    last_trade: LastTrade
    order: OpenOrder | None = None

    def held(self) -> tuple[str, ...]:
        """Assets that it holds, and those that it is about to."""
        return in_order(self.last_trade.held(), self.order.assets if self.order else ())


@dataclass(frozen=True)
class Window:
    """One portfolio about to be executed: rows of the market's grid, over `assets` (N,)."""

    configuration: PortfolioConfiguration
    market: Market
    rows: slice
    assets: tuple[str, ...]
    bars: Bars
    job: Job
    state: State | None


@dataclass(frozen=True)
class Construction:
    """Rows of one update: values at `times` (T,), one vector over `assets` (N,) per trade (K, N), and the order that is left.

    window  what it was made of
    """

    times: Times
    close: Floats
    returns: Floats
    calculated_close: Floats
    assets: tuple[str, ...]
    bars: Bars
    opening: Opening
    trades: Trades
    window: Window

    @cached_property
    def input_digest(self) -> str:
        """sha256 of the bars that it was computed from, and of the weights."""
        bars = self.window.market.digests(self.window.job.columns, self.window.rows)
        digest = hashlib.sha256(b"".join(bars))
        for part in ("\0".join(self.assets).encode(), self.bars.times.tobytes(), self.trades.after.tobytes()):
            digest.update(part)
        return digest.hexdigest()

    @cached_property
    def volumes(self) -> Floats:
        """(K, N) volume of the bar of each trade; NaN where unknown."""
        return self.window.market.volumes[(self.window.rows.start + self.trades.rows)[:, None], self.window.job.columns]

    @cached_property
    def prices(self) -> Floats:
        """(K, N) price of each trade."""
        prices = self.bars.prices
        return prices if len(self.trades.rows) == len(prices) else prices[self.trades.rows]

    @property
    def prices_before(self) -> Floats:
        """(K, N) price of the trade that struck the position that each trade changes; NaN where there was none."""
        return _before(self.opening.prices, self.prices, self.trades)

    @property
    def volumes_before(self) -> Floats:
        """(K, N) volume of the bar of that trade; NaN where there was none, or it is unknown."""
        return _before(self.opening.volumes, self.volumes, self.trades)


# -- window -------------------------------------------------------------------------------------------------------------------


def required_assets(configuration: PortfolioConfiguration, held: Sequence[str]) -> tuple[str, ...]:
    """Assets that bound the window: the signal's universe, what is held, the override asset. Raises ScopeUndetermined."""
    universe = configuration.signal.universe
    if not universe:
        raise ScopeUndetermined(portfolio=configuration.identifier)
    return in_order(universe, held, configuration.signal.override)


def window_end(
    configuration: PortfolioConfiguration, market: Market, state: State | None, as_of: np.datetime64, signal_end: np.datetime64 | None
) -> np.datetime64:
    """Last instant that may be valued: min over required assets of their last bar, the signal's reach, and `as_of`.

    An asset that is past its `delisted_on` by then bounds nothing, nor does one that its signal lets go for its silence: what is held of
    it has the price that the alignment policy gives it. Raises MissingPrices for a fresh portfolio with assets that have no
    bar at all.
    """
    required = required_assets(configuration, state.held() if state else ())
    last = market.covered_through(as_of)[market.columns(required)]
    last[_let_go(configuration, market, required)] = as_of
    if np.isnat(last).any():
        if state is not None:
            return state.watermark  # nothing new of that asset: exhausted
        absent = ", ".join(a for a, t in zip(required, last, strict=True) if np.isnat(t))
        raise MissingPrices(portfolio=configuration.identifier, source=market.source, column=market.column, assets=absent)
    return min(t for t in (last.min(), signal_end, as_of) if t is not None)


def _let_go(configuration: PortfolioConfiguration, market: Market, assets: Sequence[str]) -> np.ndarray:
    """(N,) mask of assets that the signal does not wait for any more, judged by the portfolio's own prices."""
    signal, named = configuration.signal, np.zeros(len(assets), bool)
    if isinstance(signal, ComputedSignal) and signal.stale_after_sessions is not None:
        universe = set(signal.universe)
        named = np.array([asset in universe for asset in assets])
        named[named] = market.silent(market.columns([a for a in assets if a in universe]), signal.stale_after_sessions)
    return named


def prepared(
    configuration: PortfolioConfiguration, market: Market, vectors: Vectors, state: State | None, end: np.datetime64,
    cash: CashAccount | None = None,
) -> Window | None:  # fmt: skip
    """The window after the watermark through `end`, or None where there is none: exhausted, or no purchase yet.

    Raises what is wrong with this portfolio before anything is traded: prices, calendar range, limits of weights.
    """
    after = state.watermark if state else _begin(configuration, market, vectors, end)
    if state is not None:
        market.sessions.require(after, end)
    rows = slice(int(np.searchsorted(market.grid, after, "right")), int(np.searchsorted(market.grid, end, "right")))
    if rows.stop <= rows.start:
        return None
    assets = in_order(vectors.assets, state.held() if state else ())
    bars, opening = _bars(market, assets, rows), _opening(state, assets)
    levels = None
    if cash is not None:
        cash.require(state.last_trade.time if state else market.grid[rows][0], market.grid[rows][-1])
        levels = np.ones(len(market.grid))
        levels[rows] = cash.at(market.grid[rows])
        bars = replace(bars, cash=levels[rows], opening_cash=float(cash.at(state.watermark)) if state else 1.0)
        opening = replace(opening, cash=float(cash.at(state.last_trade.time)) if state else 1.0)
    events = decided_events(configuration, market.sessions, vectors, bars, state is None, after, end)
    job = Job(rows, market.columns(assets), events, opening, configuration.execution.commission_fee, levels)
    return Window(configuration, market, rows, assets, bars, job, state)


def executed(windows: Sequence[Window]) -> list[Trades | Exception]:
    """The trades of each window, or what is wrong. Windows of one market whose strategies trade alike go through one loop over bars."""
    done: dict[int, Trades | Exception] = {}
    groups: dict[tuple[int, str, str, bool], list[int]] = {}
    for i, window in enumerate(windows):
        execution = window.configuration.execution
        key = (id(window.market), window.configuration.rebalance.execution_key, execution.weight_accounting, window.bars.cash is not None)
        groups.setdefault(key, []).append(i)
    for members in groups.values():
        done |= zip(members, _executed([windows[i] for i in members]), strict=True)
    return [done[i] for i in range(len(windows))]


def _executed(windows: Sequence[Window]) -> Sequence[Trades | Exception]:
    """One by one where a strategy raises: it may be about one portfolio."""
    configuration, market = windows[0].configuration, windows[0].market
    try:
        tape = tape_of(market, market.sessions.valuation_times(configuration.frequency))
        drifts = configuration.execution.weight_accounting == "drifted"
        return execute(configuration.rebalance, market, tape, [window.job for window in windows], drifts)
    except Exception as error:
        return [error] if len(windows) == 1 else [trades for window in windows for trades in _executed([window])]


def finished(window: Window, trades: Trades) -> Construction | None:
    """The rows of a window, or None where nothing was bought yet. Raises what is wrong with asset, time and value."""
    configuration, market, bars, opening, state = window.configuration, window.market, window.bars, window.job.opening, window.state
    account = ACCOUNTINGS[configuration.execution.weight_accounting]
    values = account(bars, trades, opening, configuration.execution.commission_fee, configuration.identifier)
    begun = ~np.isnan(values)
    if not begun.any():
        return None
    published = _published(configuration, market, window.rows, values, begun)
    previous = state.close if state else (1.0 if configuration.signal.override_asset is None else published[0])
    return Construction(
        times=bars.times[begun],
        close=published,
        returns=published / np.append(previous, published[:-1]) - 1.0,
        calculated_close=values[begun],
        assets=window.assets,
        bars=bars,
        opening=opening,
        trades=trades,
        window=window,
    )


def construct(
    configuration: PortfolioConfiguration, market: Market, vectors: Vectors, state: State | None, end: np.datetime64,
    cash: CashAccount | None = None,
) -> Construction | None:  # fmt: skip
    """All three steps for one portfolio."""
    window = prepared(configuration, market, vectors, state, end, cash)
    if window is None:
        return None
    trades = executed([window])[0]
    if isinstance(trades, Exception):
        raise trades
    return finished(window, trades)


def current_weights(
    configuration: PortfolioConfiguration, market: Market, trade: LastTrade, growth: float, at: np.datetime64
) -> tuple[Floats, Floats]:
    """Weights and prices (N,), over the assets of its last trade, that a portfolio has at a valuation time `at`.

    growth = V(at) / V(trade), fees of the trade paid. Under `drifted` accounting w * (P(at) / P(trade)) / growth, under `target` the
    weights as struck (design.md section 6); what they lack to 1 is cash. A price is NaN where nothing is held and none is known.
    Raises MissingPrice or InvalidPrice of what is held, MissingPrices where `at` is no valuation time any more.
    """
    row = int(np.searchsorted(market.grid, at))
    if row == len(market.grid) or market.grid[row] != at:
        assets = f"any asset at {iso(at)}, which is no valuation time of calendar {market.sessions.calendar}"
        raise MissingPrices(portfolio=configuration.identifier, source=market.source, column=market.column, assets=assets)
    bars, held = _bars(market, trade.assets, slice(row, row + 1)), trade.weights != 0
    bars.require(held[None, :], configuration.identifier)
    prices = bars.prices[0]
    if configuration.execution.weight_accounting == "target":
        return trade.weights, prices
    return np.where(held, trade.weights * (prices / trade.prices) / growth, 0.0), prices


def _begin(configuration: PortfolioConfiguration, market: Market, vectors: Vectors, end: np.datetime64) -> np.datetime64:
    """The instant after which the rows and decisions of a fresh portfolio may lie; `end` = there are none yet.

    From `start_date` where one is given; else the first session at which every asset of the target valid there has a price.
    Raises CalendarRangeError when the calendar begins later than that.
    """
    sessions = market.sessions
    if configuration.start_date is not None:
        earliest = np.datetime64(configuration.start_date, "us")
        begin = int(np.searchsorted(sessions.dates, earliest.astype("datetime64[D]")))
        if earliest > end:
            return end
        sessions.require(earliest, end)
        return sessions.opens[begin] if begin < len(sessions.dates) else end
    earliest = _priced_from(market, vectors)
    begin = _first_priced_session(configuration, market, vectors, end)
    if earliest > end:
        return end
    sessions.require(earliest, end)
    return sessions.closes[begin] - TICK if begin < len(sessions.closes) else end


def _priced_from(market: Market, vectors: Vectors) -> np.datetime64:
    """The first instant at which some vector is known and all it wants has had its first bar; one that wants nothing waits for all."""
    columns = market.columns(vectors.assets)
    wanted = (vectors.weights != 0) & ~market.gone(columns, vectors.times)
    wanted[~wanted.any(axis=1)] = True
    wanted &= ~(np.isnat(market.first_bar) & ~np.isnat(market.gone_from))[columns]  # delisted before anything was read of it
    first_bars = np.where(wanted, market.first_bar[columns], vectors.times[:, None])
    return np.maximum(first_bars.max(axis=1), vectors.times).min()


def _first_priced_session(configuration: PortfolioConfiguration, market: Market, vectors: Vectors, end: np.datetime64) -> int:
    """Index of the first session at which every asset of the target valid there has a usable price; S where it is too early to tell.

    Raises MissingPrice, or InvalidPrice, when they all have had bars before a session, and yet none can be traded at: bars beside the
    valuation times, for example of another calendar, would leave a portfolio waiting in silence for ever.
    """
    sessions = market.sessions
    if not len(market.grid):
        return len(sessions.closes)
    on_grid = market.grid.take(np.searchsorted(market.grid, sessions.closes), mode="clip") == sessions.closes
    candidates = np.flatnonzero(on_grid & (sessions.closes <= end))
    columns = market.columns(vectors.assets)
    for begin in range(0, len(candidates), SEARCHED):  # almost always one of the first is it
        part = candidates[begin : begin + SEARCHED]
        target, unwanted = _wants(configuration, market, vectors, part)
        prices = market.prices[np.searchsorted(market.grid, sessions.closes[part])].take(columns, axis=1)
        ready = (target >= 0) & (unwanted | is_usable(prices)).all(axis=1)
        if ready.any():
            return int(part[ready.argmax()])
    target, unwanted = _wants(configuration, market, vectors, candidates)
    listed = market.first_bar[columns] <= sessions.closes[candidates][:, None]
    due = (target >= 0) & (unwanted | listed).all(axis=1)
    if due.any():
        first = int(due.argmax())
        row = int(np.searchsorted(market.grid, sessions.closes[candidates[first]]))
        bars = _bars(market, vectors.assets, slice(row, row + 1))
        bars.require(~unwanted[first][None, :], configuration.identifier)
    return len(sessions.closes)


def _wants(configuration: PortfolioConfiguration, market: Market, vectors: Vectors, sessions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(S,) vector valid at the closes of some sessions, -1 = none, and mask (S, N) of assets that it can do without."""
    closes = market.sessions.closes[sessions]
    target = vectors.valid_at(closes, configuration.signal.maximum_forward_fill)
    return target, (vectors.weights[target] == 0) | market.gone(market.columns(vectors.assets), closes)


# -- assembling ---------------------------------------------------------------------------------------------------------------


def _bars(market: Market, assets: tuple[str, ...], rows: slice) -> Bars:
    columns = market.columns(assets)
    return Bars(
        times=market.grid[rows],
        assets=assets,
        prices=market.prices[rows].take(columns, axis=1),
        details=lambda name: getattr(market, name)[rows].take(columns, axis=1),
        opening_prices=market.prices[rows.start - 1][columns] if rows.start else np.full(len(assets), np.nan),
        column=market.column,
        staleness=str(market.policy.maximum_staleness),
        complete=bool(market.priced[rows].all()),
    )


def _opening(state: State | None, assets: tuple[str, ...]) -> Opening:
    if state is None:
        return Opening.fresh(len(assets))
    trade = state.last_trade
    weights, prices, volumes = trade.weights, trade.prices, trade.volumes
    if trade.assets != assets:
        held = _places(assets, trade.assets)
        weights = np.where(held >= 0, weights[held], 0.0)
        prices, volumes = (np.where(held >= 0, column[held], np.nan) for column in (prices, volumes))
    return Opening(True, state.calculated_close, state.trade_value, weights, prices, volumes, order=_order(state, assets))


def _places(assets: Sequence[str], among: Sequence[str]) -> np.ndarray:
    """(N,) where each asset stands among some others; -1 = nowhere."""
    place = {asset: i for i, asset in enumerate(among)}
    return np.array([place.get(asset, -1) for asset in assets], dtype=np.int64)


def _order(state: State, assets: tuple[str, ...]) -> Order | None:
    if state.order is None:
        return None
    own = _places(assets, state.order.assets)
    goals, used = np.where(own >= 0, state.order.goals[own], np.nan), np.where(own >= 0, state.order.used[own], 0.0)
    return Order(state.watermark, goals, state.order.active_from, used)


def _published(configuration: PortfolioConfiguration, market: Market, rows: slice, values: Floats, begun: np.ndarray) -> Floats:
    """The published close: the computed value, or the override asset's price, which must be usable wherever the portfolio is valued."""
    override = configuration.signal.override_asset
    if override is None:
        return values[begun]
    bars = _bars(market, (override,), rows)
    bars.require(begun[:, None], configuration.identifier)
    return bars.prices[begun, 0]


def _before(first: Floats, later: Floats, trades: Trades) -> Floats:
    struck = np.empty_like(trades.before)
    struck[:1] = first
    struck[1:] = later[:-1]
    struck[trades.before == 0] = np.nan
    return struck
