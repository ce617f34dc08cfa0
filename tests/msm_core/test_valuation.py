"""Valuation: golden vectors, cases worked by hand, a scalar reference, and properties over random worlds of 9 to 14 assets.

The reference knows nothing but the formulas of design.md section 6, and adds up in asset order, as rule 2 of section 8 asks.
"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msm_core.alignment import Market, PriceAlignmentPolicy
from msm_core.errors import InvalidPrice, InvalidValue, MissingPrice
from msm_core.execution import Job, execute, tape_of
from msm_core.frames import NEVER
from msm_core.rebalance_strategy import ImmediateSignal
from msm_core.sessions import Sessions
from msm_core.valuation import ACCOUNTINGS, Bars, Events, Opening, Trades

START = np.datetime64("2024-01-01T21:00", "us")
DAY = np.timedelta64(1, "D")
UNKNOWN = float("nan")

Weights = Sequence[float]
Prices = Sequence[Sequence[float]]


def bars_of(prices: Prices, fresh: np.ndarray | None = None, opening: Sequence[float] | None = None) -> Bars:
    """Daily bars, each at its valuation time."""
    array = np.array(prices, dtype=np.float64)
    times = START + np.arange(len(array)) * DAY
    return Bars(
        times=times,
        assets=tuple(f"A{i:02}" for i in range(array.shape[1])),
        prices=array,
        details={
            "bar_times": np.repeat(times[:, None], array.shape[1], axis=1),
            "fresh": np.ones(array.shape, bool) if fresh is None else fresh,
            "volumes": np.full(array.shape, UNKNOWN),
        }.__getitem__,
        opening_prices=np.full(array.shape[1], UNKNOWN) if opening is None else np.array(opening, float),
        column="close",
        staleness="0:00:00",
    )


@dataclass(frozen=True)
class Valuation:
    """values (T,) are NaN before the first purchase, else finite and above 0; `trades.values` are those of their rows."""

    values: np.ndarray
    trades: Trades


def at_once(rows: np.ndarray, targets: np.ndarray) -> Events:
    return Events(rows, targets, START + rows * DAY)


def events_of(targets: dict[int, Weights], assets: int) -> Events:
    array = np.array([targets[row] for row in sorted(targets)], float).reshape(-1, assets)
    return at_once(np.array(sorted(targets), dtype=np.int64), array)


def market_of(bars: Bars) -> Market:
    """A market that holds exactly these bars, on a calendar of their days."""
    days = bars.times.astype("datetime64[D]")
    last = days[-1:] if len(days) else np.array(["2024-01-01"], "datetime64[D]")
    sessions = Sessions("DAILY", days, bars.times - np.timedelta64(7, "h"), bars.times, (days if len(days) else last)[0], last[0])
    never = np.full(len(bars.assets), NEVER)
    return Market(
        "bars", bars.column, sessions, bars.times, bars.assets, bars.prices, bars.bar_times, bars.fresh, bars.volumes,
        np.full(bars.prices.shape, UNKNOWN), never, never, never, PriceAlignmentPolicy(),
    )  # fmt: skip


def account(accounting: str, bars: Bars, events: Events, fee: float, opening: Opening) -> Valuation:
    """Trades of a portfolio that goes the whole way at once, and its values."""
    market, strategy = market_of(bars), ImmediateSignal(calendar_key="DAILY")
    job = Job(slice(0, len(bars.times)), np.arange(len(bars.assets)), events, opening, fee)
    (trades,) = execute(strategy, market, tape_of(market, market.sessions.closes), [job], accounting == "drifted")
    assert trades.order is None
    values = ACCOUNTINGS[accounting](bars, trades, opening, fee, "p")
    return Valuation(values, replace(trades, values=values[trades.rows]))


def valued(accounting: str, prices: Prices, targets: dict[int, Weights], fee: float) -> Valuation:
    return account(accounting, bars_of(prices), events_of(targets, len(prices[0])), fee, Opening.fresh(len(prices[0])))


def columns(*series: Sequence[float]) -> list[list[float]]:
    """One row per instant, from one series per asset."""
    return [list(row) for row in zip(*series, strict=True)]


# -- golden vectors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "fee", "returns", "closes"),
    [
        ([[0.5, 0.5]] * 4, 0.00018, [-0.00018, 0.05, 0.10, -0.10], [0.99982, 1.049811, 1.1547921, 1.03931289]),
        ([[1, 0], [0.5, 0.5], [0, 1], [0, 1]], 0.01, [-0.01, 0.09, 0.09, -0.20], [0.99, 1.0791, 1.176219, 0.9409752]),
    ],
)
def test_golden_vectors_of_target_accounting(targets, fee, returns, closes):  # design.md section 6
    prices = columns([100, 110, 121, 121], [50, 50, 55, 44])
    values = valued("target", prices, dict(enumerate(targets)), fee).values
    np.testing.assert_allclose(values, closes, rtol=0, atol=1e-15)
    np.testing.assert_allclose(values / np.append(1.0, values[:-1]) - 1.0, returns, rtol=0, atol=1e-15)


# -- drifted accounting by hand -----------------------------------------------------------------------------------------------


def test_two_assets_drift_and_are_set_back():
    # row 0  buy half and half: turnover 1, value 1 - 0.01 = 0.99
    # row 1  A +10 %: 0.99 * (1 + 0.5 * 0.10) = 1.0395
    # row 2  A 1.21, B 1.10 of their purchase: 0.99 * (1 + 0.5 * 0.21 + 0.5 * 0.10) = 1.14345
    #        weights before 0.605 / 1.155 = 11/21 and 0.55 / 1.155 = 10/21; turnover 2 * (11/21 - 1/2) = 1/21
    #        1.14345 * (1 - 0.01 / 21) = 1.1429055
    # row 3  A -10 %: 1.1429055 * 0.95 = 1.085760225
    got = valued("drifted", columns([100, 110, 121, 108.9], [50, 50, 55, 55]), {0: [0.5, 0.5], 2: [0.5, 0.5]}, 0.01)
    np.testing.assert_allclose(got.values, [0.99, 1.0395, 1.1429055, 1.085760225], rtol=1e-15)
    assert got.trades.rows.tolist() == [0, 2]
    np.testing.assert_allclose(got.trades.before, [[0, 0], [11 / 21, 10 / 21]], rtol=1e-15)
    assert got.trades.after.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    np.testing.assert_allclose(got.trades.values, [0.99, 1.1429055], rtol=1e-15)


def test_cash_is_what_is_left():
    # 60 % A, the rest cash: 1 - 0.01 * 0.6 = 0.994; A +10 %: 0.994 * 1.06 = 1.05364; weight before 0.66 / 1.06 = 33/53,
    # turnover 33/53 - 3/5 = 6/265; 1.05364 * (1 - 0.01 * 6 / 265) = 1.05340144
    got = valued("drifted", columns([100, 110]), {0: [0.6], 1: [0.6]}, 0.01)
    np.testing.assert_allclose(got.values, [0.994, 1.05340144], rtol=1e-15)
    np.testing.assert_allclose(got.trades.before, [[0], [33 / 53]], rtol=1e-15)


def test_long_and_short():
    # 100 % A, -50 % B, fee 0.1 % of 1.5 = 0.0015: 0.9985. A +10 %, B -10 %: 1 + 0.1 + 0.05 = 1.15 -> 1.148275
    # before: 1.1 / 1.15 = 22/23 and -0.45 / 1.15 = -9/23; to 1/2, -1/2: turnover 21/46 + 5/46 = 13/23
    # 1.148275 * (1 - 0.001 * 13 / 23) = 1.148275 - 0.049925 * 0.013 = 1.147625975
    # A +10 %, B -20 %: 1 + 0.05 + 0.10 = 1.15 -> 1.31976987125
    got = valued("drifted", columns([100, 110, 121], [50, 45, 36]), {0: [1.0, -0.5], 1: [0.5, -0.5]}, 0.001)
    np.testing.assert_allclose(got.values, [0.9985, 1.147625975, 1.31976987125], rtol=1e-15)
    np.testing.assert_allclose(got.trades.before[1], [22 / 23, -9 / 23], rtol=1e-15)


def test_an_asset_that_leaves_is_sold_and_one_that_enters_is_bought():  # R76
    # row 0  all in A: 0.99. Row 1  A +10 % is earned: 1.089; A 1 -> 0, B 0 -> 1: turnover 2, 1.089 * 0.98 = 1.06722
    # row 2  B +20 %: 1.280664; what A does is nobody's business any more, nor what B did before
    got = valued("drifted", columns([100, 110, 1], [7, 50, 60]), {0: [1, 0], 1: [0, 1]}, 0.01)
    np.testing.assert_allclose(got.values, [0.99, 1.06722, 1.280664], rtol=1e-15)
    assert got.trades.after.tolist() == [[1, 0], [0, 1]]
    np.testing.assert_allclose(got.trades.before, [[0, 0], [1, 0]], rtol=1e-15)


def test_all_cash():  # R76
    # all in A: 0.99; +10 %: 1.089; sold, turnover 1: 1.089 * 0.99 = 1.07811, and so it stays; there is nothing left to trade
    got = valued("drifted", columns([100, 110, 1, 500]), {0: [1], 1: [0], 2: [0], 3: [0]}, 0.01)
    np.testing.assert_allclose(got.values, [0.99, 1.07811, 1.07811, 1.07811], rtol=1e-15)
    assert got.trades.rows.tolist() == [0, 1]
    assert got.trades.after.tolist() == [[1], [0]]


def test_an_event_without_turnover_is_not_stored():
    # prices stand still until row 3; then A +10 %: weights before 0.55 / 1.05 = 11/21 and 10/21, turnover 1/21
    # 0.99 * 1.05 * (1 - 0.01 / 21) = 1.0395 - 0.000495 = 1.039005
    got = valued("drifted", columns([100, 100, 100, 110], [50, 50, 50, 50]), {row: [0.5, 0.5] for row in range(4)}, 0.01)
    np.testing.assert_allclose(got.values, [0.99, 0.99, 0.99, 1.039005], rtol=1e-15)
    assert got.trades.rows.tolist() == [0, 3]
    np.testing.assert_allclose(got.trades.before[1], [11 / 21, 10 / 21], rtol=1e-15)


def test_one_asset_fully_invested_trades_once():
    # its weight is 1 whatever its price does, so nothing ever changes hands after the purchase: value = 0.99 * price / 100
    prices = [100.0, 101.5, 99.7, 150.3, 420.1, 87.9, 77.1]
    got = valued("drifted", columns(prices), {row: [1.0] for row in range(len(prices))}, 0.01)
    assert got.trades.rows.tolist() == [0]
    np.testing.assert_allclose(got.values, [0.99 * p / 100 for p in prices], rtol=1e-15)


def test_an_event_without_turnover_leaves_the_last_trade_in_place():
    # all in A: 0.99; at +10 % the weight is still 1: no trade; at +21 % half is sold, turnover 1/2:
    # 0.99 * 1.21 * (1 - 0.005) = 1.1919105; then A +10 % on a half: 1.251506025
    got = valued("drifted", columns([100, 110, 121, 133.1]), {0: [1.0], 1: [1.0], 2: [0.5]}, 0.01)
    np.testing.assert_allclose(got.values, [0.99, 1.089, 1.1919105, 1.251506025], rtol=1e-15)
    assert got.trades.rows.tolist() == [0, 2]


def test_target_accounting_of_a_sale():  # R76
    # A earns its +10 % up to the sale: 0.99 * (1 + 0.10 - 0.01) = 1.0791; then nothing
    got = valued("target", columns([100, 110, 55]), {0: [1], 1: [0]}, 0.01)
    np.testing.assert_allclose(got.values, [0.99, 1.0791, 1.0791], rtol=1e-15)
    assert got.trades.rows.tolist() == [0, 1]
    assert (got.trades.before.tolist(), got.trades.after.tolist()) == ([[0], [1]], [[1], [0]])


@pytest.mark.parametrize("accounting", ["drifted", "target"])
def test_nothing_before_the_first_purchase(accounting):
    # two events want nothing at all; the purchase is in row 2: 1 - 0.01 = 0.99, then +10 %
    got = valued(accounting, columns([UNKNOWN, 7, 100, 110]), {0: [0], 1: [0], 2: [1]}, 0.01)
    assert np.isnan(got.values[:2]).all()
    np.testing.assert_allclose(got.values[2:], [0.99, 1.089], rtol=1e-15)
    assert got.trades.rows.tolist() == [2]


@pytest.mark.parametrize("accounting", ["drifted", "target"])
def test_no_events_no_values(accounting):
    got = valued(accounting, columns([100, 110]), {}, 0.01)
    assert np.isnan(got.values).all()
    assert (got.trades.rows.shape, got.trades.after.shape, got.trades.values.shape) == ((0,), (0, 1), (0,))


# -- what cannot be valued ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accounting", ["drifted", "target"])
@pytest.mark.parametrize("value", [UNKNOWN, float("inf"), -float("inf"), 0.0, -0.0, -1.0])
def test_invalid_price(accounting, value):  # design.md section 3
    prices = columns([100, 101, 102], [50, 50, value])
    with pytest.raises(InvalidPrice) as told:
        valued(accounting, prices, {0: [0.5, 0.5]}, 0.01)
    assert {**told.value.facts, "value": repr(told.value.facts["value"])} == {
        "portfolio": "p",
        "column": "close",
        "asset": "A01",
        "time": "2024-01-03 21:00Z",
        "value": repr(float(value)),
    }
    assert str(pickle.loads(pickle.dumps(told.value))) == str(told.value)
    assert str(told.value).startswith(f"p: close of A01 at 2024-01-03 21:00Z is {float(value)}; a price must be finite and above 0.")


@pytest.mark.parametrize("accounting", ["drifted", "target"])
def test_missing_price(accounting):
    bars = bars_of(columns([100, 101, 102], [50, 50, UNKNOWN]))
    bars.fresh[2, 1] = False
    bars.bar_times[2, 1] = np.datetime64("2024-01-02T21:00", "us")
    with pytest.raises(
        MissingPrice, match=r"p: no close of A01 at 2024-01-03 21:00Z \(last bar 2024-01-02 21:00Z, maximum_staleness 0:00:00\)"
    ):
        account(accounting, bars, events_of({0: [0.5, 0.5]}, 2), 0.01, Opening.fresh(2))
    bars.bar_times[2, 1] = np.datetime64("NaT", "us")
    with pytest.raises(MissingPrice, match="last bar never"):
        account(accounting, bars, events_of({0: [0.5, 0.5]}, 2), 0.01, Opening.fresh(2))


@pytest.mark.parametrize("accounting", ["drifted", "target"])
@pytest.mark.parametrize("bad", [UNKNOWN, 0.0, -5.0, float("inf")])
def test_prices_that_nobody_needs_may_be_anything(accounting, bad):
    # B is bought in row 1 and sold in row 3: its prices of rows 1 to 3 count, and no others
    prices = columns([100, 100, 110, 110, 121], [bad, 50, 50, 55, bad])
    got = valued(accounting, prices, {0: [1, 0], 1: [0.5, 0.5], 3: [1, 0]}, 0.0)
    # rows 1 -> 2: A +10 % on a half: 1.05. Row 3: B +10 %; drifted 1 + 0.05 + 0.05, target 1.05 * (1 + 0.05)
    at_3 = {"drifted": 1.10, "target": 1.1025}[accounting]
    np.testing.assert_allclose(got.values, [1, 1, 1.05, at_3, at_3 * 1.1], rtol=1e-15)


@pytest.mark.parametrize("accounting", ["drifted", "target"])
@pytest.mark.parametrize(("row", "targets"), [(1, {1: [0, 1]}), (2, {1: [0, 1]}), (3, {1: [0, 1], 3: [1, 0]})])
def test_prices_are_needed_from_the_purchase_to_the_sale(accounting, row, targets):
    series = [50.0] * 5
    series[row] = UNKNOWN
    with pytest.raises(InvalidPrice) as told:
        valued(accounting, columns([100] * 5, series), {0: [1, 0], **targets}, 0.0)
    assert (told.value.facts["asset"], told.value.facts["time"]) == ("A01", str(START + row * DAY)[:16].replace("T", " ") + "Z")


@pytest.mark.parametrize("accounting", ["drifted", "target"])
def test_the_earliest_unusable_price_is_told(accounting):
    """Whatever else is wrong later on, and at an event: the same error in one run or night by night."""
    prices = columns([10.0] * 7, [10.0, 10.0, UNKNOWN, 10.0, 10.0, UNKNOWN, 10.0])
    with pytest.raises(InvalidPrice) as told:
        valued(accounting, prices, {0: [0.5, 0.5], 5: [0.4, 0.6]}, 0.0)
    assert told.value.facts["time"] == "2024-01-03 21:00Z"  # row 2


@pytest.mark.parametrize("accounting", ["drifted", "target"])
@pytest.mark.parametrize(
    ("weights", "prices", "row", "value"),
    [
        ([2.0], columns([100, 100, 40, 100]), 2, -0.2),  # 1 + 2 * (-0.6)
        ([2.0], columns([100, 100, 50, 100]), 2, 0.0),  # 1 + 2 * (-0.5)
        ([-1.0], columns([100, 250]), 1, -0.5),  # a short: 1 - 1.5
        ([1e300], columns([1, 1e300]), 1, float("inf")),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_ruin_fails_at_its_session(accounting, weights, prices, row, value):  # P13
    with pytest.raises(InvalidValue) as told:
        valued(accounting, prices, {0: weights}, 0.0)
    assert told.value.facts["time"] == str(START + row * DAY)[:16].replace("T", " ") + "Z"
    assert told.value.facts["portfolio"] == "p"
    np.testing.assert_allclose(told.value.facts["value"], value, rtol=1e-12, atol=1e-12)
    assert str(pickle.loads(pickle.dumps(told.value))) == str(told.value)


@pytest.mark.parametrize("last_price", [40.0, 49.9, 50.0])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_ruin_at_an_event_is_not_healed_by_its_fee(last_price):  # P13
    # 200 % of A, fee 1 %: V = 0.98; A -50.1 %: 0.98 * (1 - 1.002) = -0.00196. Ruined, though the weight before, 2 * 0.499 / -0.002 = -499,
    # makes a turnover of 501 and a "fee factor" of 1 - 5.01 = -4.01, and minus times minus is plus.
    with pytest.raises(InvalidValue, match="p: the value at 2024-01-02 21:00Z is"):
        valued("drifted", columns([100, last_price]), {0: [2.0], 1: [2.0]}, 0.01)


# -- the reference ------------------------------------------------------------------------------------------------------------


def reference_drifted(prices: Prices, targets: dict[int, Weights], fee: float, exact: bool = False) -> tuple[list[float], list[int]]:
    """Values and the rows of trades, one number at a time. `exact` takes 1 / g for V(e) / V(t), which may differ in the last bit."""
    assets = len(prices[0])
    value, weights, struck = 1.0, [0.0] * assets, [1.0] * assets
    values, traded = [], []
    for row, now in enumerate(prices):
        ratio = [now[a] / struck[a] if weights[a] != 0 else 1.0 for a in range(assets)]
        total = 0.0
        for a in range(assets):
            total += weights[a] * (ratio[a] - 1.0)
        before_fee = value * (1.0 + total)
        if row in targets:
            before = [
                weights[a] * ratio[a] / (1.0 + total) if exact else weights[a] * ratio[a] * (value / before_fee) for a in range(assets)
            ]
            turnover = 0.0
            for a in range(assets):
                turnover += abs(targets[row][a] - before[a])
            if turnover != 0:
                value = before_fee * (1.0 - fee * turnover)
                weights, struck, before_fee = list(targets[row]), list(now), value
                traded.append(row)
        values.append(before_fee if traded else UNKNOWN)
    return values, traded


def reference_target(prices: Prices, targets: dict[int, Weights], fee: float, exact: bool = False) -> tuple[list[float], list[int]]:
    assets = len(prices[0])
    value, weights = 1.0, [0.0] * assets
    values, traded = [], []
    for row, now in enumerate(prices):
        wanted = targets.get(row, weights)
        earned = turnover = 0.0
        for a in range(assets):
            earned += weights[a] * (now[a] / prices[row - 1][a] - 1.0) if weights[a] != 0 else 0.0
            turnover += abs(wanted[a] - weights[a])
        value = value * (1.0 + (earned - fee * turnover))
        if turnover != 0:
            traded.append(row)
        weights = list(wanted)
        values.append(value if traded else UNKNOWN)
    return values, traded


REFERENCES = {"drifted": reference_drifted, "target": reference_target}


@dataclass(frozen=True)
class World:
    prices: np.ndarray
    events: Events
    fee: float

    @property
    def assets(self) -> int:
        return self.prices.shape[1]

    @property
    def targets(self) -> dict[int, list[float]]:
        return dict(zip(self.events.rows.tolist(), self.events.targets.tolist(), strict=True))

    def value(self, accounting: str, fee: float | None = None) -> Valuation:
        fee = self.fee if fee is None else fee
        return account(accounting, bars_of(self.prices), self.events, fee, Opening.fresh(self.assets))


def world(seed: int, still: float = 0.3, tied: float = 0.2, alone: float = 0.1) -> World:
    """9 to 14 assets over 12 to 40 instants; targets long, short, sold, in cash, and wanted again.

    still  share of instants at which no price moves; tied  share at which all move alike
    alone  how often a stretch of events begins that want one asset and nothing else: idle, though its price moves
    """
    rng = np.random.default_rng(seed)
    assets, times = int(rng.integers(9, 15)), int(rng.integers(12, 41))
    returns = rng.normal(0.0, 0.02, (times, assets)).clip(-0.1, 0.1)
    alike = rng.random(times) < tied
    returns[alike] = returns[alike][:, :1]
    returns[rng.random(times) < still] = 0.0
    prices = rng.uniform(1, 500, assets) * np.cumprod(1.0 + returns, axis=0)
    rows = np.flatnonzero(rng.random(times) < rng.choice([0.1, 0.5, 1.0]))
    rows = rows if len(rows) else np.array([0])
    targets = rng.normal(0.08, 0.06, (len(rows), assets))
    targets[rng.random(targets.shape) < 0.2] = 0.0
    for k in range(1, len(rows)):
        if rng.random() < 0.6:
            targets[k] = targets[k - 1]  # the same again: idle wherever prices stood still
    targets[rng.random(len(rows)) < 0.05] = 0.0  # all cash
    targets[np.cumsum(rng.random(len(rows)) < alone) % 3 == 2] = np.eye(assets)[seed % assets]
    return World(prices, at_once(rows, targets), float(rng.choice([0.0, 0.00018, 0.01])))


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    return left.shape == right.shape and left.tobytes() == right.tobytes()


def assert_same(left: Valuation, right: Valuation) -> None:
    assert same_bits(left.values, right.values)
    assert left.trades.rows.tolist() == right.trades.rows.tolist()
    for name in ("after", "before", "values"):
        assert same_bits(getattr(left.trades, name), getattr(right.trades, name)), name


SEEDS = st.integers(0, 2**32 - 1)
RANDOM = settings(max_examples=60, deadline=None)
both = pytest.mark.parametrize("accounting", ["drifted", "target"])


@both
@RANDOM
@given(seed=SEEDS)
def test_agrees_with_the_reference(accounting, seed):
    it = world(seed, tied=0.0, alone=0.0)  # where rounding decides what is idle, the two may differ
    got = it.value(accounting)
    values, traded = REFERENCES[accounting](it.prices.tolist(), it.targets, it.fee)
    np.testing.assert_allclose(got.values, values, rtol=1e-14)
    assert got.trades.rows.tolist() == traded


@both
@RANDOM
@given(seed=SEEDS, still=st.sampled_from([0.0, 0.5, 0.9, 1.0]), tied=st.sampled_from([0.0, 0.5, 1.0]))
def test_blocks_are_the_scalar_loop_to_the_bit(accounting, seed, still, tied):
    """Idle events by the dozen, and moves all alike, where rounding alone decides whether something trades."""
    it = world(seed, still, tied)
    got = it.value(accounting)
    values, traded = REFERENCES[accounting](it.prices.tolist(), it.targets, it.fee, exact=True)
    assert same_bits(got.values, np.array(values))
    assert got.trades.rows.tolist() == traded


# -- windows ------------------------------------------------------------------------------------------------------------------


def in_windows(accounting: str, it: World, cuts: Sequence[int]) -> Valuation:
    """Window by window, each knowing nothing of the past but the stored numbers: last row, last trade."""
    opening, last_prices = Opening.fresh(it.assets), np.full(it.assets, UNKNOWN)
    parts: list[Valuation] = []
    edges = [0, *sorted(cuts), len(it.prices)]
    for first, end in pairwise(edges):
        inside = (it.events.rows >= first) & (it.events.rows < end)
        bars = bars_of(it.prices[first:end], opening=last_prices) if end > first else None
        if bars is None:
            continue
        events = at_once(it.events.rows[inside] - first, it.events.targets[inside])
        part = account(accounting, bars, events, it.fee, opening)
        if len(part.trades.rows):
            row = part.trades.rows[-1]
            opening = Opening(True, 0.0, part.values[row], part.trades.after[-1], bars.prices[row], bars.volumes[row])
        if opening.started:
            opening = replace(opening, value=part.values[-1])
        last_prices = bars.prices[-1]
        parts.append(Valuation(part.values, replace(part.trades, rows=part.trades.rows + first)))
    trades = Trades(*(np.concatenate([getattr(p.trades, name) for p in parts]) for name in ("rows", "after", "before", "values")))
    return Valuation(np.concatenate([part.values for part in parts]), trades)


@both
@RANDOM
@given(seed=SEEDS, data=st.data())
def test_any_split_is_one_run(accounting, seed, data):  # P1
    it = world(seed)
    cuts = data.draw(st.lists(st.integers(0, len(it.prices)), max_size=8))
    assert_same(in_windows(accounting, it, cuts), it.value(accounting))


@both
@pytest.mark.parametrize("seed", range(20))
def test_one_event_at_a_time_is_all_at_once(accounting, seed):  # P1
    it = world(seed, still=(0.0, 0.5)[seed % 2])
    assert_same(in_windows(accounting, it, it.events.rows.tolist()), it.value(accounting))
    assert_same(in_windows(accounting, it, range(len(it.prices))), it.value(accounting))


@both
@RANDOM
@given(seed=SEEDS, data=st.data())
def test_no_look_ahead(accounting, seed, data):  # P7
    it = world(seed)
    known = data.draw(st.integers(1, len(it.prices)))
    rng = np.random.default_rng(seed)
    prices, targets = it.prices.copy(), it.events.targets.copy()
    prices[known:] *= rng.uniform(0.9, 1.1, prices[known:].shape)
    targets[it.events.rows >= known] *= rng.uniform(0.9, 1.1)
    kept = it.events.rows < known
    changed = World(prices, at_once(it.events.rows, targets), it.fee).value(accounting)
    shorter = World(it.prices[:known], at_once(it.events.rows[kept], it.events.targets[kept]), it.fee).value(accounting)
    for other in (changed, shorter):
        assert same_bits(other.values[:known], it.value(accounting).values[:known])


# -- metamorphic properties ---------------------------------------------------------------------------------------------------


@both
@RANDOM
@given(seed=SEEDS)
def test_memory_order_never_reaches_the_numbers(accounting, seed):  # P4, P5
    it = world(seed)
    wide = np.full((len(it.prices) * 2, it.assets * 3), -1.0)
    wide[::2, ::3] = it.prices
    for prices in (np.asfortranarray(it.prices), wide[::2, ::3]):
        events = at_once(it.events.rows, np.asfortranarray(it.events.targets))
        bars = replace(bars_of(it.prices), prices=prices)
        assert_same(account(accounting, bars, events, it.fee, Opening.fresh(it.assets)), it.value(accounting))


@both
@RANDOM
@given(seed=SEEDS)
def test_prices_times_powers_of_two(accounting, seed):  # P6
    it = world(seed)
    powers = 2.0 ** np.random.default_rng(seed).integers(-20, 21, it.assets)
    assert_same(World(it.prices * powers, it.events, it.fee).value(accounting), it.value(accounting))


@both
@RANDOM
@given(seed=SEEDS, data=st.data())
def test_an_asset_of_weight_zero_changes_nothing(accounting, seed, data):  # P11, design.md section 8, rule 3
    it = world(seed)
    place = data.draw(st.integers(0, it.assets))
    filler = data.draw(st.sampled_from([UNKNOWN, 0.0, 1.0, 1e308, float("inf")]))
    wider = World(
        np.insert(it.prices, place, filler, axis=1), at_once(it.events.rows, np.insert(it.events.targets, place, 0.0, axis=1)), it.fee
    )
    got, want = wider.value(accounting), it.value(accounting)
    assert same_bits(got.values, want.values)
    assert same_bits(np.delete(got.trades.before, place, axis=1), want.trades.before)
    assert got.trades.rows.tolist() == want.trades.rows.tolist()


@both
@RANDOM
@given(seed=SEEDS, data=st.data())
def test_a_higher_fee_never_gives_more(accounting, seed, data):  # P12
    it = world(seed)
    low, high = sorted(data.draw(st.tuples(st.floats(0, 0.02), st.floats(0, 0.02))))
    cheap, dear = it.value(accounting, low).values, it.value(accounting, high).values
    assert (np.isnan(cheap) == np.isnan(dear)).all()
    assert not (dear > cheap).any()


@RANDOM
@given(seed=SEEDS)
def test_buy_and_hold_has_a_closed_form(seed):  # P8
    it = world(seed)
    weights = it.events.targets[0] + 0.01
    values = account("drifted", bars_of(it.prices), events_of({0: weights.tolist()}, it.assets), 0.0, Opening.fresh(it.assets)).values
    closed = 1.0 - weights.sum() + (weights * it.prices / it.prices[0]).sum(axis=1)
    np.testing.assert_allclose(values, closed, rtol=1e-12)


@RANDOM
@given(seed=SEEDS)
def test_constant_returns_have_a_closed_form(seed):  # P9
    rng = np.random.default_rng(seed)
    assets, times = int(rng.integers(9, 15)), 30
    returns, weights = rng.uniform(-0.02, 0.03, assets), rng.normal(0.1, 0.1, assets)
    prices = 100.0 * (1.0 + returns) ** np.arange(times)[:, None]
    targets = dict.fromkeys(range(times), weights.tolist())
    closed = (1.0 + (weights * returns).sum()) ** np.arange(times)
    np.testing.assert_allclose(valued("target", prices.tolist(), targets, 0.0).values, closed, rtol=1e-12)
    np.testing.assert_allclose(valued("drifted", prices.tolist(), targets, 0.0).values, closed, rtol=1e-12)


@RANDOM
@given(seed=SEEDS)
def test_accountings_agree_when_every_instant_is_an_event_and_trading_is_free(seed):
    it = world(seed)
    targets = np.zeros((len(it.prices), it.assets))
    last = np.searchsorted(it.events.rows, np.arange(len(it.prices)), "right") - 1
    targets[last >= 0] = it.events.targets[last[last >= 0]]
    every = World(it.prices, at_once(np.arange(len(it.prices)), targets), 0.0)
    np.testing.assert_allclose(every.value("drifted").values, every.value("target").values, rtol=1e-12)


@both
@RANDOM
@given(seed=SEEDS)
def test_every_value_is_positive_or_the_portfolio_fails(accounting, seed):  # P13
    it = world(seed)
    violent = World(it.prices, at_once(it.events.rows, it.events.targets * 30), it.fee)
    with np.errstate(all="ignore"):
        try:
            values = violent.value(accounting).values
        except InvalidValue:
            return
    begun = ~np.isnan(values)
    assert (values[begun] > 0).all()
    assert np.isfinite(values[begun]).all()
    assert begun[np.argmax(begun) :].all() if begun.any() else True


@RANDOM
@given(seed=SEEDS)
def test_trades_are_complete_vectors_in_order(seed):
    it = world(seed)
    for accounting in ("drifted", "target"):
        trades = it.value(accounting).trades
        assert (np.diff(trades.rows) > 0).all()
        assert set(trades.rows.tolist()) <= set(it.events.rows.tolist())
        assert (trades.after != trades.before).any(axis=1).all()
        for row, after in zip(trades.rows.tolist(), trades.after.tolist(), strict=True):
            assert after == it.targets[row]
        assert not len(trades.rows) or (trades.before[0] == 0).all()
