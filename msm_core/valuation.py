"""Valuation: from prices, events and targets to portfolio values. Pure arrays; the same bits however the window is split.

A portfolio is valued at T instants over N assets, the assets in bytewise order. An *event* is an instant at which the strategy
wants a target vector; `msm_core.execution` makes trades of events. Between two trades nothing is stored, and values follow from the
position struck at the last one. Formulas: design.md section 6; numerical rules: section 8.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from msm_core.errors import InvalidPrice, InvalidValue, MissingPrice
from msm_core.frames import Floats, Times, is_usable, iso, ordered_sum

WeightAccounting = Literal["drifted", "target"]

CODE_VERSION = "1"  # bump when a change of this module, or of an events rule, changes numbers


@dataclass(frozen=True)
class Bars:
    """Prices aligned to the valuation times of one portfolio.

    times      (T,) UTC
    assets     (N,) identifiers, bytewise order
    prices     (T, N) last bar within the staleness; NaN where there is none, and where the source says NaN
    details    gives bar_times, fresh and volumes by name, which are seldom asked for
    opening_prices (N,) aligned price at the watermark; NaN where unknown
    column, staleness: for errors
    complete   every price is known to be usable; False = not known
    cash       (T,) level of the cash account, `opening_cash` at the watermark; None = cash earns nothing
    """

    times: Times
    assets: tuple[str, ...]
    prices: Floats
    details: Callable[[str], np.ndarray]
    opening_prices: Floats
    column: str
    staleness: str
    cash: Floats | None = None
    opening_cash: float = 1.0
    complete: bool = False

    @cached_property
    def bar_times(self) -> Times:
        """(T, N) time of the last bar at or before; NaT where there is none."""
        return self.details("bar_times")

    @cached_property
    def fresh(self) -> np.ndarray:
        """(T, N) that bar is within the staleness."""
        return self.details("fresh")

    @cached_property
    def volumes(self) -> Floats:
        """(T, N) of the bar used; NaN where unknown."""
        return self.details("volumes")

    def valid(self) -> np.ndarray:
        """(T, N) mask of prices that may be used: finite and above 0."""
        return is_usable(self.prices)

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
    """When the strategy wants what.

    rows         (E,) increasing indices into the valuation times
    targets      (V, N) distinct vectors
    active_from  (E,) instant from which each order is active
    which        (E,) the vector of each event; by default one each
    """

    rows: np.ndarray
    targets: Floats
    active_from: Times
    which: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def __post_init__(self) -> None:
        if len(self.which) < len(self.rows):
            object.__setattr__(self, "which", np.arange(len(self.rows)))


@dataclass(frozen=True)
class Order:
    """What a strategy that takes its time has still to do.

    at           the watermark at which this was so
    goals        (N,) target weights; NaN = nothing is to be done of the asset
    active_from  the order was decided, or its session began; NaT = nothing is to be done at all
    used         (N,) sum of weight changes in the session of `at`
    """

    at: np.datetime64
    goals: Floats
    active_from: np.datetime64
    used: Floats


@dataclass(frozen=True)
class Opening:
    """The stored state that a window goes on from, N assets; nothing else of the past is needed.

    started      something was bought before; False = value 1.0, nothing held, no rows yet
    value        calculated value at the watermark; `target` accounting recurs from it
    trade_value  value right after the last trade, fee paid; `drifted` accounting recurs from it
    weights      struck at the last trade; 0 = not held
    prices, volumes  of the last trade; NaN where not held or unknown
    cash         level of the cash account at the last trade
    order        what was left to do
    """

    started: bool
    value: float
    trade_value: float
    weights: Floats
    prices: Floats
    volumes: Floats
    cash: float = 1.0
    order: Order | None = None

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
    values  (K,) value right after the trade, fee paid; of `drifted` accounting only
    order   what is left to do after the window
    """

    rows: np.ndarray
    after: Floats
    before: Floats
    values: Floats
    order: Order | None = None


def value_drifted(bars: Bars, trades: Trades, opening: Opening, fee_rate: float, portfolio: str) -> Floats:
    """(T,) self-financing values, NaN before the first purchase: between trades the position drifts with prices.

    With e the last trade, w its weights and V(e) its value, at any later t
        V(t) = V(e) * g,   g = 1 + sum_a w_a * (P_a(t) / P_a(e) - 1) + (1 - sum_a w_a) * (C(t) / C(e) - 1)
        w_before_a = w_a * (P_a(t) / P_a(e)) / g                       since V(e) / V(t) = 1 / g
        V(t+) = V(t) * (1 - f * sum_a |w_after_a - w_before_a|)        C is the level of the cash account, constant by default

    Trades come with their value: `msm_core.execution` reckons the same. Raises MissingPrice, InvalidPrice, InvalidValue.
    Source: design.md section 6; `bt` agrees (tests/golden).
    """
    _require(bars, trades, opening, portfolio)
    rows = np.arange(len(bars.times))
    last = np.searchsorted(trades.rows, rows, side="right")  # 0 = the opening position, k = the k-th trade of this window
    is_trade = np.zeros(len(rows), bool)
    is_trade[trades.rows] = True
    between = np.flatnonzero(~is_trade)
    since = last[between]
    values = np.empty(len(rows))
    values[trades.rows] = trades.values
    if not len(between):
        return _checked(values, last, bars, opening, portfolio)
    vectors = np.vstack([opening.weights, trades.after])
    struck = np.where(vectors != 0, np.vstack([opening.prices, bars.prices[trades.rows]]), 1.0)
    held = vectors[since]
    growth = _growth(held, bars.prices[between], struck[since])
    if bars.cash is not None:
        spare = 1.0 - ordered_sum(held)
        growth = growth + spare * (bars.cash[between] / np.append(opening.cash, bars.cash[trades.rows])[since] - 1.0)
    values[between] = np.append(opening.trade_value, trades.values)[since] * (1.0 + growth)
    return _checked(values, last, bars, opening, portfolio)


def value_target(bars: Bars, trades: Trades, opening: Opening, fee_rate: float, portfolio: str) -> Floats:
    """(T,) constant-mix values: weights are set back to the target at every valuation time, free of charge; a changed target pays.

    R(t) = sum_a w_before_a * r_a(t) - f * sum_a |w_a - w_before_a|,   V(t) = V(t-1) * (1 + R(t)),   w_before = previous target
    and what is not invested, 1 - sum_a w_before_a, earns what the cash account does.

    fee_rate  f, a fraction of traded value; the first purchase pays it too
    Raises MissingPrice, InvalidPrice, InvalidValue. Source: design.md section 6 (the document's original arithmetic).
    """
    _require(bars, trades, opening, portfolio)
    rows = np.arange(len(bars.times))
    vectors = np.vstack([opening.weights, trades.after])
    last = np.searchsorted(trades.rows, rows, side="right")
    held, wanted = vectors[np.searchsorted(trades.rows, rows, side="left")], vectors[last]
    returns = _ratio(held, bars.prices, np.vstack([bars.opening_prices, bars.prices[:-1]])) - 1.0
    change = ordered_sum(held * returns) - fee_rate * ordered_sum(np.abs(wanted - held))
    if bars.cash is not None:
        earned = (1.0 - ordered_sum(held)) * (bars.cash / np.append(bars.opening_cash, bars.cash[:-1]) - 1.0)
        change = change + np.where(_begun_before(rows, trades, opening), earned, 0.0)
    values = np.cumprod(np.append(opening.value, 1.0 + change))[1:]  # a recursion from the stored value, never seed * cumprod
    return _checked(values, last, bars, opening, portfolio)


ACCOUNTINGS = {"drifted": value_drifted, "target": value_target}


def _require(bars: Bars, trades: Trades, opening: Opening, portfolio: str) -> None:
    """Prices without which there is no value: of what is held into an instant, and of what is held from it on."""
    if bars.complete or bars.valid().all():
        return
    rows = np.arange(len(bars.times))
    held = np.vstack([opening.weights, trades.after])
    held = (held != 0) & ~np.isnan(held)  # NaN follows from a price that is asked for by itself
    into, onwards = (held[np.searchsorted(trades.rows, rows, side=side)] for side in ("left", "right"))
    bars.require(into | onwards, portfolio)


def _begun_before(rows: np.ndarray, trades: Trades, opening: Opening) -> np.ndarray:
    """(T,) mask of instants before which something was bought: from then on cash is the portfolio's."""
    return opening.started | (np.searchsorted(trades.rows, rows, side="left") > 0)


def _growth(held: Floats, prices: Floats, struck: Floats) -> Floats:
    """(R,) what a position has earned since it was struck, as a share of the value then. `struck` is used up."""
    with np.errstate(invalid="ignore"):  # 0 times an infinite price, which is nobody's
        ratio = np.divide(prices, struck, out=struck)
        ratio -= 1.0
        ratio *= held
    if np.isnan(ratio).any():
        ratio[held == 0] = 0.0  # of what is not held the price need not be known
    return ordered_sum(ratio, out=ratio)


def _ratio(held: Floats, prices: Floats, struck: Floats) -> Floats:
    """prices / struck where held; 1 elsewhere, because 0 weight times an unknown price must stay 0."""
    return np.divide(prices, struck, out=np.ones_like(prices), where=held != 0)


def _checked(values: Floats, last: np.ndarray, bars: Bars, opening: Opening, portfolio: str) -> Floats:
    """`values` with NaN before the first purchase. Raises InvalidValue for the earliest one that is not finite and above 0."""
    begun = np.full(len(values), opening.started) | (last > 0)
    bad = begun & ~is_usable(values)
    if bad.any():
        row = int(bad.argmax())
        raise InvalidValue(portfolio=portfolio, time=iso(bars.times[row]), value=float(values[row]))
    return np.where(begun, values, np.nan)
