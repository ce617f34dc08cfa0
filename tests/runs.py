"""Portfolios run whole, night by night, or in a batch, without a database: what the tests of construction and execution stand on.

A night sees what a nightly job would read: bars from the watermark on (earlier ones as far as staleness and a strategy's history ask)
to its as-of, the vectors that may still matter, and the stored rows of the nights before; nothing else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from typing import Any, Literal
from uuid import UUID

import numpy as np
import pandas as pd

from msm_core.alignment import Market, PriceAlignmentPolicy, align
from msm_core.cash import CashAccount, cash_account
from msm_core.configuration import (
    BacktestingWeightsConfig,
    CashRate,
    PortfolioBuildConfiguration,
    PortfolioConfiguration,
    PortfolioExecutionConfiguration,
    PortfolioMarketsConfig,
)
from msm_core.construction import Construction, OpenOrder, State, construct, window_end
from msm_core.frames import NEVER, TICK, LastTrade, Series, SignalRows
from msm_core.price_sources import PriceSource
from msm_core.rebalance_strategy import ImmediateSignal, RebalanceStrategy
from msm_core.sessions import Sessions
from msm_core.signals import Signal, Vectors
from msm_core.valuation import Trades

DAY = np.timedelta64(1, "D")


class Prices(PriceSource):
    """Not in the registry: only tests know it."""

    kind: Literal["prices_of_this_test"] = "prices_of_this_test"

    @property
    def source_uid(self) -> UUID:
        return UUID(int=0)


class Scripted(Signal):
    """A signal whose vectors the test writes down. Not in the registry either."""

    kind: Literal["scripted"] = "scripted"
    assets: tuple[str, ...]
    fill: timedelta | None = None

    @property
    def universe(self) -> tuple[str, ...]:
        return tuple(sorted(self.assets))

    @property
    def maximum_forward_fill(self) -> np.timedelta64 | None:
        return None if self.fill is None else np.timedelta64(self.fill)


def portfolio(
    signal: Signal,
    *,
    strategy: RebalanceStrategy | None = None,
    fee: float = 0.0,
    accounting: Literal["drifted", "target"] = "drifted",
    on: Any = "every_session",
    lag: int = 0,
    frequency: str = "1d",
    start_date: date | None = None,
    staleness: timedelta = timedelta(0),
    missing: Literal["fail", "hold"] = "fail",
    cash: bool = False,
) -> PortfolioConfiguration:
    """on, lag: of an ImmediateSignal, where no strategy is given."""
    rate = CashRate(source=Prices(), identifier="RATE", day_count=360) if cash else None
    return PortfolioConfiguration(
        portfolio_build_configuration=PortfolioBuildConfiguration(
            price_source_instance=Prices(),
            portfolio_prices_frequency=frequency,
            start_date=start_date,
            price_alignment_policy=PriceAlignmentPolicy(maximum_staleness=staleness, missing=missing),
            execution_configuration=PortfolioExecutionConfiguration(commission_fee=fee, weight_accounting=accounting, cash_rate=rate),
            backtesting_weights_configuration=BacktestingWeightsConfig(
                signal_weights_instance=signal,
                rebalance_strategy_instance=strategy or ImmediateSignal(calendar_key="WEEKDAYS", rebalance_on=on, execution_lag=lag),
            ),
        ),
        portfolio_markets_configuration=PortfolioMarketsConfig(portfolio_identifier="p"),
    )


def weekdays(first: str, last: str, valid_to: str | None = None, timezone: str = "UTC", opens: int = 14, closes: int = 21) -> Sessions:
    days = np.arange(np.datetime64(first, "D"), np.datetime64(last, "D") + 1)
    days = days[np.is_busday(days)]
    midnights = days.astype("datetime64[us]")
    hour = np.timedelta64(1, "h")
    through = np.datetime64(valid_to or last, "D")
    return Sessions("WEEKDAYS", days, midnights + opens * hour, midnights + closes * hour, np.datetime64(first, "D"), through, timezone)


YEAR = weekdays("2024-01-01", "2024-12-31")  # 1 January is a Monday: sessions 0..4 are Mo 1 to Fr 5, 5..9 are Mo 8 to Fr 12


def stored(before: State | None, built: Construction) -> State:
    """What the database holds after these rows."""
    trades, trade, value = built.trades, before and before.last_trade, before and before.trade_value
    if len(trades.rows):
        row = trades.rows[-1]
        listed = np.flatnonzero((trades.after[-1] != 0) | (trades.before[-1] != 0))
        names = tuple(built.assets[i] for i in listed)
        trade = LastTrade(
            built.bars.times[row], names, trades.after[-1][listed], built.bars.prices[row][listed], built.bars.volumes[row][listed]
        )
        value = float(built.calculated_close[built.times == trade.time][0])
    assert trade is not None
    assert value is not None
    return State(built.times[-1], float(built.close[-1]), float(built.calculated_close[-1]), value, trade, stored_order(built))


def stored_order(built: Construction) -> OpenOrder | None:
    """Rows of the assets of which something is left to do, or was used in the last session."""
    order = built.trades.order
    if order is None:
        return None
    assert order.at == built.times[-1]
    kept = np.flatnonzero(~np.isnan(order.goals) | (order.used != 0))
    active_from = order.active_from if (~np.isnan(order.goals)).any() else NEVER
    return OpenOrder(active_from, tuple(built.assets[i] for i in kept), order.goals[kept], order.used[kept]) if len(kept) else None


@dataclass(frozen=True)
class Inputs:
    """All there will ever be to read; a night reads a part of it.

    delisted  local date of an asset's last day
    rates     of cash, annual; valid for `rate_fill`
    """

    configuration: PortfolioConfiguration
    series: Mapping[str, Series]
    vectors: Vectors
    sessions: Sessions = YEAR
    delisted: Mapping[str, np.datetime64] = field(default_factory=dict)
    rates: Series | None = None
    rate_fill: timedelta = timedelta(days=7)

    @property
    def last(self) -> np.datetime64:
        """The close of the last session of the random markets."""
        return self.sessions.closes[-SPARE]

    def night(self, state: State | None, as_of: np.datetime64) -> tuple[Market, Vectors | None]:
        since = self._since(state)
        seen = {asset: _between(s, self._bars_since(since), as_of) for asset, s in self.series.items()}
        grid = self.sessions.valuation_times(self.configuration.frequency)
        first = min([s.times[0] for s in seen.values() if len(s.times)], default=as_of)
        grid = grid[(grid >= (first if since is None else min(first, since))) & (grid <= as_of)]
        series, policy = {a: s for a, s in seen.items() if len(s.times)}, self.configuration.alignment
        market = align(series, sorted(seen), self.sessions, grid, policy, "prices", "close", "close", self.delisted)
        return market, self._vectors(state, as_of)

    def _since(self, state: State | None) -> np.datetime64 | None:
        if state is not None:
            return state.watermark
        start = self.configuration.start_date
        return None if start is None else np.datetime64(start, "us") - DAY

    def _bars_since(self, since: np.datetime64 | None) -> np.datetime64 | None:
        if since is None:
            return None
        history = self.configuration.rebalance.history_sessions
        if history:
            begin = int(np.searchsorted(self.sessions.closes, since)) - history
            if begin < 0:
                return None
            since = self.sessions.opens[begin]
        return since - np.timedelta64(self.configuration.alignment.maximum_staleness)

    def _vectors(self, state: State | None, as_of: np.datetime64) -> Vectors | None:
        """From the one valid at the oldest decision that still matters to the newest emitted; assets are those that have rows."""
        last = int(np.searchsorted(self.vectors.times, as_of, "right"))
        first = 0
        if state is not None:
            session = int(np.searchsorted(self.sessions.closes, state.watermark, "right")) - self.configuration.rebalance.execution_lag - 2
            decision = self.sessions.closes[max(session, 0)]
            first = max(int(np.searchsorted(self.vectors.times, decision, "right")) - 1, 0)
        times, weights = self.vectors.times[first:last], self.vectors.weights[first:last]
        if not len(times):
            return None
        kept = weights != 0
        kept[~kept.any(axis=1), 0] = True  # a vector of zeros is stored as one row
        row, asset = np.nonzero(kept)
        return Vectors.from_rows(SignalRows(times[row], [self.vectors.assets[a] for a in asset], weights[row, asset]))

    def cash(self, as_of: np.datetime64) -> CashAccount | None:
        if self.rates is None:
            return None
        times = self.sessions.valuation_times(self.configuration.frequency)
        rates = _between(self.rates, None, as_of)
        return cash_account(rates, times[times <= as_of], self.rate_fill, 360, "RATE", "prices")

    def end(self, market: Market, vectors: Vectors, state: State | None, as_of: np.datetime64, cash: CashAccount | None) -> np.datetime64:
        fill = self.configuration.signal.maximum_forward_fill
        signal_end = None if fill is None else vectors.times[-1] + fill - TICK
        end = window_end(self.configuration, market, state, as_of, signal_end)
        return end if cash is None else min(end, cash.times[-1] if len(cash.times) else market.sessions.opens[0])

    def run(self, *as_ofs: np.datetime64) -> list[Construction]:
        """One run per as-of, in order, each going on from what the one before left."""
        return [built for built, _ in self.nights(*as_ofs)]

    def nights(self, *as_ofs: np.datetime64) -> list[tuple[Construction, State]]:
        """The same, each with what is stored after it."""
        state: State | None = None
        done: list[tuple[Construction, State]] = []
        for as_of in as_ofs:
            market, vectors = self.night(state, as_of)
            if vectors is None:
                continue
            cash = self.cash(as_of)
            end = self.end(market, vectors, state, as_of, cash)
            if state is not None and end <= state.watermark:
                continue  # R63: exhausted
            built = construct(self.configuration, market, vectors, state, end, cash)
            if built is not None:
                state = stored(state, built)
                done.append((built, state))
        return done

    def perturbed(self, known: np.datetime64, rng: np.random.Generator) -> "Inputs":
        """Prices, volumes, liquidity, vectors and rates later than `known` are others."""

        def later(series: Series) -> Series:
            n = len(series.times)
            changed = [
                None if column is None else np.where(series.times > known, column * rng.uniform(0.9, 1.1, n), column)
                for column in (series.values, series.volumes, series.liquidity)
            ]
            assert changed[0] is not None
            assert changed[1] is not None
            return Series(series.times, changed[0], changed[1], changed[2])

        weights = np.where((self.vectors.times > known)[:, None], self.vectors.weights * rng.uniform(0.5, 1.0), self.vectors.weights)
        rates = None if self.rates is None else later(self.rates)
        return replace(
            self, series={a: later(s) for a, s in self.series.items()}, vectors=replace(self.vectors, weights=weights), rates=rates
        )

    def renamed(self, names: Mapping[str, str]) -> "Inputs":
        order = sorted(self.vectors.assets, key=lambda a: names[a])
        columns = [self.vectors.assets.index(a) for a in order]
        vectors = Vectors(self.vectors.times, tuple(names[a] for a in order), self.vectors.weights[:, columns])
        signal = self.configuration.signal.model_copy(update={"assets": vectors.assets})
        return replace(
            self,
            configuration=with_parts(self.configuration, signal=signal),
            series={names[a]: s for a, s in self.series.items()},
            vectors=vectors,
            delisted={names[a]: d for a, d in self.delisted.items()},
        )

    def narrowed(self, assets: Sequence[str], **parts: Any) -> "Inputs":
        """A portfolio of some of the assets; `parts` as of `with_parts`."""
        columns = [self.vectors.assets.index(a) for a in assets]
        vectors = Vectors(self.vectors.times, tuple(assets), self.vectors.weights[:, columns])
        signal = self.configuration.signal.model_copy(update={"assets": tuple(assets)})
        return replace(
            self,
            configuration=with_parts(self.configuration, signal=signal, **parts),
            series={a: self.series[a] for a in assets},
            vectors=vectors,
        )


def with_parts(
    configuration: PortfolioConfiguration, signal: Signal | None = None, strategy: RebalanceStrategy | None = None, fee: float | None = None
) -> PortfolioConfiguration:
    """The same portfolio, some of it exchanged."""
    build, execution = configuration.portfolio_build_configuration, configuration.execution
    weights = build.backtesting_weights_configuration
    return configuration.model_copy(
        update={
            "portfolio_build_configuration": build.model_copy(
                update={
                    "execution_configuration": execution if fee is None else execution.model_copy(update={"commission_fee": fee}),
                    "backtesting_weights_configuration": weights.model_copy(
                        update={
                            "signal_weights_instance": signal or configuration.signal,
                            "rebalance_strategy_instance": strategy or configuration.rebalance,
                        }
                    ),
                }
            )
        }
    )


def _between(series: Series, since: np.datetime64 | None, through: np.datetime64) -> Series:
    return series.kept((series.times <= through) & (since is None or series.times >= since))


def value_rows(parts: Sequence[Construction]) -> list[tuple[str, ...]]:
    """Rows of the values storage, to the bit."""
    return [
        (str(time), *(float(n).hex() for n in numbers))
        for part in parts
        for time, *numbers in zip(part.times, part.close, part.returns, part.calculated_close, strict=True)
    ]


def weight_rows(parts: Sequence[Construction]) -> list[tuple[str, ...]]:
    """Rows of the weights storage, to the bit: every asset held before or after the trade."""
    rows = []
    for part in parts:
        for k, row in enumerate(part.trades.rows):
            for a, asset in enumerate(part.assets):
                after, before = part.trades.after[k, a], part.trades.before[k, a]
                if after != 0 or before != 0:
                    numbers = (
                        after,
                        before,
                        part.bars.prices[row, a],
                        part.prices_before[k, a],
                        part.bars.volumes[row, a],
                        part.volumes_before[k, a],
                    )
                    rows.append((str(part.bars.times[row]), asset, *(float(n).hex() for n in numbers)))
    return rows


def order_rows(parts: Sequence[Construction]) -> list[tuple[str, ...]]:
    """Rows of what is left to do after the last of some runs, to the bit."""
    order = stored_order(parts[-1]) if parts else None
    if order is None:
        return []
    rows = zip(order.assets, order.goals, order.used, strict=True)
    return [(asset, str(order.active_from), float(goal).hex(), float(used).hex()) for asset, goal, used in rows]


def trade_bits(trades: Trades) -> tuple[Any, ...]:
    order = trades.order
    left = None if order is None else (str(order.at), order.goals.tobytes(), str(order.active_from), order.used.tobytes())
    return trades.rows.tolist(), trades.after.tobytes(), trades.before.tobytes(), trades.values.tobytes(), left


def all_rows(parts: Sequence[Construction]) -> tuple[list[tuple[str, ...]], ...]:
    return value_rows(parts), weight_rows(parts), order_rows(parts)


# -- random markets -----------------------------------------------------------------------------------------------------------

NAMES = ("AAPL", "ABC", "ABD", "B", "BB", "BRK.B", "Z", "a", "msft", "~", "É", "é")  # bytewise order is not that of a dictionary


def new_york(first: str, last: str, early: Sequence[str] = (), events: Mapping[str, Sequence[str]] | None = None) -> Sessions:
    """Weekdays 9:30 to 16:00 of New York, 13:00 on `early` dates; knows the dates through the Sunday after `last`, a Friday."""
    days = np.arange(np.datetime64(first, "D"), np.datetime64(last, "D") + 1)
    days = days[np.is_busday(days)]
    closes = np.where(np.isin(days, np.array(early, "datetime64[D]")), 13 * 60, 16 * 60)
    local = [days.astype("datetime64[us]") + np.asarray(m, "timedelta64[m]") for m in (np.full(len(days), 570), closes)]
    utc = [
        pd.DatetimeIndex(t, tz="America/New_York").tz_convert("UTC").tz_localize(None).to_numpy().astype("datetime64[us]") for t in local
    ]
    named = {name: np.array(dates, "datetime64[D]") for name, dates in (events or {}).items()}
    return Sessions("NYC", days, *utc, days[0], np.datetime64(last, "D") + 2, "America/New_York", named)


EVENTS = {"fomc": ["2024-01-31", "2024-03-06", "2024-03-16", "2024-03-20", "2024-04-27", "2024-05-01"]}
DAILY = new_york("2024-01-01", "2024-07-05", ["2024-03-05", "2024-05-24"], EVENTS)  # 135 sessions
SPARE = 6  # sessions that the calendars know ahead of the bars
INTRADAY = new_york("2024-03-01", "2024-04-05", ["2024-03-05", "2024-03-06", "2024-03-28"], EVENTS)  # clocks move on 10 March


def random_inputs(
    seed: int, strategy: RebalanceStrategy, *, intraday: bool = False, start: int = 0, assets_min: int = 9, **options: Any
) -> Inputs:
    """A portfolio of 9 to 12 assets and its market: gaps and stale bars, missing and zero volumes, a delisting, a cash rate, in turns.

    start  first session of the bars
    """
    rng = np.random.default_rng([seed, int(intraday)])
    sessions = INTRADAY if intraday else DAILY
    names = rng.choice(NAMES, int(rng.integers(assets_min, 13)), replace=False).tolist()
    assets = tuple(sorted(names, key=str.encode))
    times = sessions.valuation_times(timedelta(minutes=30) if intraday else timedelta(days=1))
    times = times[(times > sessions.opens[start]) & (times <= sessions.closes[-SPARE])]
    gaps = 0.2 if seed % 3 == 1 else 0.0
    last_day = {assets[-1]: sessions.dates[int(len(sessions.dates) * rng.uniform(0.3, 0.75))]} if seed % 2 else {}
    series = {a: _random_series(rng, times, gaps, sessions, last_day.get(a)) for a in assets}
    rates = None
    if seed % 4 >= 2:
        weeks = sessions.opens[start] - DAY + np.arange(45) * 5 * DAY
        rates = Series(weeks, rng.uniform(-0.01, 0.08, 45), np.full(45, np.nan))
    policy: dict[str, Any] = {"staleness": timedelta(days=20), "missing": "hold"} if gaps else {}
    chosen = {"fee": float(rng.choice([0.0, 0.0005, 0.01])), "accounting": ("drifted", "target")[seed // 2 % 2], **policy, **options}
    signal = Scripted(assets=assets, fill=None if seed % 5 else timedelta(days=9))
    configuration = portfolio(
        signal, strategy=strategy, frequency="30m" if intraday else "1d", cash=rates is not None, **chosen
    )  # fmt: skip
    return Inputs(configuration, series, _random_vectors(rng, times, assets), sessions, last_day, rates, timedelta(days=20))


def _random_series(rng: np.random.Generator, times: np.ndarray, gaps: float, sessions: Sessions, last_day: np.datetime64 | None) -> Series:
    """price x volume is some 10 million a bar, liquidity half a million, both at times 0 or unknown."""
    n = len(times)
    prices = rng.uniform(5, 500) * np.cumprod(1 + rng.normal(0, 0.02, n).clip(-0.1, 0.1) * (rng.random(n) < 0.9))
    volumes, liquidity = rng.uniform(0, 2e7, n) / prices, rng.uniform(0, 1e6, n)
    for column in (volumes, liquidity):
        column[rng.random(n) < 0.1] = 0.0
        column[rng.random(n) < 0.1] = np.nan
    stamps = times - np.where(rng.random(n) < gaps, np.timedelta64(7, "m"), np.timedelta64(0, "m"))
    kept = rng.random(n) >= gaps
    kept[[0, 1, 2, -1]] = True
    if last_day is not None:
        last = int(np.searchsorted(times, sessions.closes[np.searchsorted(sessions.dates, last_day)]))
        kept[last] = True
        kept[last + 1 :] = False
    return Series(stamps, prices, volumes, liquidity).kept(kept)


def _random_vectors(rng: np.random.Generator, times: np.ndarray, assets: tuple[str, ...]) -> Vectors:
    """Emitted at valuation times and between them; assets leave and come back, some are sold short; a vector may repeat the one before."""
    between = times[0] + rng.choice(int((times[-1] - times[0]) // TICK), 8, replace=False) * TICK
    emitted = np.unique(np.concatenate([times[:1], between, rng.choice(times[1:-1], 8, replace=False)]))
    weights = rng.normal(0.09, 0.05, (len(emitted), len(assets)))
    weights[rng.random(weights.shape) < 0.3] = 0.0
    for k in range(1, len(emitted)):
        if rng.random() < 0.2:
            weights[k] = weights[k - 1]
    weights[rng.integers(4, len(emitted))] = 0.0  # once, everything is sold
    return Vectors(emitted, assets, weights)
