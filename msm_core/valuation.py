"""Valuation: from prices, events and targets to portfolio values. Pure arrays; the same bits however the window is split.

A portfolio is valued at T instants over N assets, the assets in bytewise order. An *event* is an instant at which the strategy
wants a target vector; it counts only if something trades. Between two such events nothing is stored, and values follow from the
position struck at the last one. Formulas: design.md section 6; numerical rules: section 8.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from msm_core.errors import InvalidPrice, InvalidValue, MissingPrice
from msm_core.frames import Floats, Times, iso, ordered_sum

WeightAccounting = Literal["drifted", "target"]

CODE_VERSION = "1"  # bump when a change of this module, or of an events rule, changes numbers


@dataclass(frozen=True)
class Bars:
    """Prices aligned to the valuation times of one portfolio.

    times      (T,) UTC
    assets     (N,) identifiers, bytewise order
    prices     (T, N) last bar within the staleness; NaN where there is none, and where the source says NaN
    bar_times  (T, N) time of the last bar at or before; NaT where there is none
    fresh      (T, N) that bar is within the staleness
    volumes    (T, N) of the bar used; NaN where unknown
    opening_prices (N,) aligned price at the watermark; NaN where unknown
    column, staleness: for errors
    """

    times: Times
    assets: tuple[str, ...]
    prices: Floats
    bar_times: Times
    fresh: np.ndarray
    volumes: Floats
    opening_prices: Floats
    column: str
    staleness: str

    def valid(self) -> np.ndarray:
        """(T, N) mask of prices that may be used: finite and above 0."""
        return np.isfinite(self.prices) & (self.prices > 0)

    def require(self, needed: np.ndarray, portfolio: str) -> None:
        """Raises MissingPrice or InvalidPrice for the earliest unusable cell among the needed ones, a mask (T, N)."""
        bad = needed & ~self.valid()
        if not bad.any():
            return
        row, asset = (int(i) for i in np.argwhere(bad)[0])
        facts = {"portfolio": portfolio, "column": self.column, "asset": self.assets[asset], "time": iso(self.times[row])}
        if self.fresh[row, asset]:
            raise InvalidPrice(**facts, value=float(self.prices[row, asset]))
        raise MissingPrice(**facts, last=iso(self.bar_times[row, asset]), staleness=self.staleness)


@dataclass(frozen=True)
class Events:
    """When the strategy wants what: rows (E,) increasing indices into the valuation times, targets (E, N)."""

    rows: np.ndarray
    targets: Floats


@dataclass(frozen=True)
class Opening:
    """The stored state that a window goes on from, N assets; nothing else of the past is needed.

    started      something was bought before; False = value 1.0, nothing held, no rows yet
    value        calculated value at the watermark; `target` accounting recurs from it
    trade_value  value right after the last trade, fee paid; `drifted` accounting recurs from it
    weights      struck at the last trade; 0 = not held
    prices, volumes  of the last trade; NaN where not held or unknown
    """

    started: bool
    value: float
    trade_value: float
    weights: Floats
    prices: Floats
    volumes: Floats

    @classmethod
    def fresh(cls, assets: int) -> "Opening":
        unknown = np.full(assets, np.nan)
        return cls(False, 1.0, 1.0, np.zeros(assets), unknown, unknown)


@dataclass(frozen=True)
class Trades:
    """Events at which something traded, K of them: one complete vector each.

    rows    (K,) indices into the valuation times
    after   (K, N) weights after the trade
    before  (K, N) weights before it
    values  (K,) value right after the trade, fee paid
    """

    rows: np.ndarray
    after: Floats
    before: Floats
    values: Floats


@dataclass(frozen=True)
class Valuation:
    """values (T,) are NaN before the first purchase, else finite and above 0."""

    values: Floats
    trades: Trades


def value_drifted(bars: Bars, events: Events, fee_rate: float, opening: Opening, portfolio: str) -> Valuation:
    """Self-financing values: between trades the position drifts with prices.

    With e the last trade, w its weights and V(e) its value, at any later t
        V(t) = V(e) * g,   g = 1 + sum_a w_a * (P_a(t) / P_a(e) - 1)
        w_before_a = w_a * (P_a(t) / P_a(e)) / g                       since V(e) / V(t) = 1 / g
        V(t+) = V(t) * (1 - f * sum_a |w_target_a - w_before_a|)

    fee_rate  f, a fraction of traded value; the first purchase pays it too
    Raises MissingPrice, InvalidPrice, InvalidValue. Source: design.md section 6; `bt` agrees (tests/golden).
    """
    bars.require(_needed(bars, events, opening), portfolio)
    trades = _drifted_trades(bars, events, fee_rate, opening)
    rows = np.arange(len(bars.times))
    last = np.searchsorted(trades.rows, rows, side="right")  # 0 = the opening position, k = the k-th trade of this window
    held = np.vstack([opening.weights, trades.after])[last]
    struck = np.vstack([opening.prices, bars.prices[trades.rows]])[last]
    values = np.append(opening.trade_value, trades.values)[last] * _growth(held, bars.prices, struck)[0]
    return Valuation(_checked(values, last, bars, opening, portfolio), trades)


def value_target(bars: Bars, events: Events, fee_rate: float, opening: Opening, portfolio: str) -> Valuation:
    """Constant-mix values: weights are set back to the target at every valuation time, free of charge; a changed target pays.

    R(t) = sum_a w_before_a * r_a(t) - f * sum_a |w_a - w_before_a|,   V(t) = V(t-1) * (1 + R(t)),   w_before = previous target

    Raises MissingPrice, InvalidPrice, InvalidValue. Source: design.md section 6 (the document's original arithmetic).
    """
    bars.require(_needed(bars, events, opening), portfolio)
    previous = np.vstack([opening.weights, events.targets[:-1]]) if len(events.rows) else events.targets
    changed = (events.targets != previous).any(axis=1)
    traded, after, before = events.rows[changed], events.targets[changed], previous[changed]
    rows = np.arange(len(bars.times))
    vectors = np.vstack([opening.weights, after])
    last = np.searchsorted(traded, rows, side="right")
    held, wanted = vectors[np.searchsorted(traded, rows, side="left")], vectors[last]
    returns = _ratio(held, bars.prices, np.vstack([bars.opening_prices, bars.prices[:-1]])) - 1.0
    change = ordered_sum(held * returns) - fee_rate * ordered_sum(np.abs(wanted - held))
    values = np.cumprod(np.append(opening.value, 1.0 + change))[1:]  # a recursion from the stored value, never seed * cumprod
    return Valuation(_checked(values, last, bars, opening, portfolio), Trades(traded, after, before, values[traded]))


ACCOUNTINGS = {"drifted": value_drifted, "target": value_target}


def _needed(bars: Bars, events: Events, opening: Opening) -> np.ndarray:
    """(T, N) mask of prices without which there is no value: of what is held into an instant, and of what is wanted from it on.

    An event that does not trade wants exactly what is held, so the pattern of targets is the pattern of holdings.
    """
    rows = np.arange(len(bars.times))
    wanted = np.vstack([opening.weights, events.targets]) != 0
    into, onwards = (wanted[np.searchsorted(events.rows, rows, side=side)] for side in ("left", "right"))
    return into | onwards


def _drifted_trades(bars: Bars, events: Events, fee_rate: float, opening: Opening) -> Trades:
    """The events that trade, as if by a loop: an event without turnover is passed over, so the position struck before it lives on.

    Almost always every event trades, so a whole block is computed at once on that assumption, kept up to its first idle event, and
    the next block starts behind that one: small at first, doubling. Every block size gives the same bits.
    """
    blocks: list[Trades] = []
    value, weights, prices = opening.trade_value, opening.weights, opening.prices
    start, size = 0, len(events.rows)
    while start < len(events.rows):
        rows, targets = events.rows[start : start + size], events.targets[start : start + size]
        block, idle = _trade_every(bars, rows, targets, fee_rate, value, weights, prices)
        kept = int(idle.argmax()) if idle.any() else len(rows)
        if kept:
            blocks.append(Trades(rows[:kept], targets[:kept], block.before[:kept], block.values[:kept]))
            value, weights, prices = block.values[kept - 1], targets[kept - 1], bars.prices[rows[kept - 1]]
        start += kept + (1 if kept < len(rows) else 0)
        size = size * 2 if kept == len(rows) else 1
    if not blocks:
        return Trades(events.rows[:0], events.targets[:0], events.targets[:0], np.zeros(0))
    return Trades(*(np.concatenate([getattr(b, name) for b in blocks]) for name in ("rows", "after", "before", "values")))


def _trade_every(
    bars: Bars, rows: np.ndarray, targets: Floats, fee_rate: float, value: float, weights: Floats, prices: Floats
) -> tuple[Trades, np.ndarray]:
    """Trades at all of `rows` from a position (value, weights, prices), and the mask (E,) of those where nothing changed hands."""
    held = np.vstack([weights, targets[:-1]])
    growth, ratio = _growth(held, bars.prices[rows], np.vstack([prices, bars.prices[rows[:-1]]]))
    with np.errstate(divide="ignore", invalid="ignore"):  # a ruined portfolio is told by its value, later
        before = held * ratio / growth[:, None]
    turnover = ordered_sum(np.abs(targets - before))
    factors = np.column_stack([growth, 1.0 - fee_rate * turnover]).ravel()  # drift, fee, drift, fee ...
    drifted, traded = np.cumprod(np.append(value, factors))[1:].reshape(-1, 2).T
    values = np.where(drifted > 0, traded, drifted)  # a fee on a ruin must not make it positive again
    return Trades(rows, targets, before, values), turnover == 0


def _growth(held: Floats, prices: Floats, struck: Floats) -> tuple[Floats, Floats]:
    """(R,) growth of a position since it was struck, and (R, N) price ratios."""
    ratio = _ratio(held, prices, struck)
    return 1.0 + ordered_sum(held * (ratio - 1.0)), ratio


def _ratio(held: Floats, prices: Floats, struck: Floats) -> Floats:
    """prices / struck where held; 1 elsewhere, because 0 weight times an unknown price must stay 0."""
    return np.divide(prices, struck, out=np.ones_like(prices), where=held != 0)


def _checked(values: Floats, last: np.ndarray, bars: Bars, opening: Opening, portfolio: str) -> Floats:
    """`values` with NaN before the first purchase. Raises InvalidValue for the earliest one that is not finite and above 0."""
    begun = np.full(len(values), opening.started) | (last > 0)
    bad = begun & ~(np.isfinite(values) & (values > 0))
    if bad.any():
        row = int(bad.argmax())
        raise InvalidValue(portfolio=portfolio, time=iso(bars.times[row]), value=float(values[row]))
    return np.where(begun, values, np.nan)
