"""A second engine: one portfolio, one bar and one asset at a time, in plain Python numbers and datetimes.

Written from design.md sections 3 to 6 and the docstrings of the strategies, not from `msm_core.execution`; it shares no line with it.
It knows whole histories only: no stored state, no batches.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from tests.runs import Inputs

Weights = dict[str, float]


@dataclass
class Result:
    """Values by time from the first purchase on; (before, after) by asset of each trade; goals that are left."""

    values: dict[datetime, float]
    trades: dict[datetime, dict[str, tuple[float, float]]]
    left: Weights


@dataclass(frozen=True)
class Bar:
    time: datetime
    price: float
    volume: float
    liquidity: float


def simulate(one: Inputs, as_of: datetime) -> Result:
    return _Engine(one, as_of).run()


class _Engine:
    def __init__(self, one: Inputs, as_of: datetime) -> None:
        self.configuration, self.strategy = one.configuration, one.configuration.rebalance
        self.assets = one.vectors.assets
        s = one.sessions
        self.dates: list[date] = [d.item() for d in s.dates]
        self.opens: list[datetime] = [t.item() for t in s.opens]
        self.closes: list[datetime] = [t.item() for t in s.closes]
        self.zone = ZoneInfo(s.timezone)
        self.events = {name: [d.item() for d in dates] for name, dates in s.events.items()}
        self.gone_from = {a: self.opens[bisect_right(self.dates, d.item())] for a, d in one.delisted.items()}
        self.staleness = one.configuration.alignment.maximum_staleness
        self.bars = {
            a: [b for b in self._bars(one.series[a]) if b.time <= min(as_of, self.gone_from.get(a, datetime.max))] for a in self.assets
        }
        step = one.configuration.frequency
        self.in_session = [self._times(i, step) for i in range(len(self.dates))]
        self.times = [t for times in self.in_session for t in times]
        self.session_of = {t: i for i, times in enumerate(self.in_session) for t in times}
        emitted = zip(one.vectors.times, one.vectors.weights, strict=True)
        self.vectors = [(t.item(), dict(zip(self.assets, map(float, w), strict=True))) for t, w in emitted if t.item() <= as_of]
        fill = one.configuration.signal.maximum_forward_fill
        self.fill = None if fill is None else fill.item()
        self.cash = self._cash_levels(one)
        self.end = self._end(as_of)

    def _bars(self, series: Any) -> list[Bar]:
        unknown = [float("nan")] * len(series.times)
        columns = (series.values.tolist(), series.volumes.tolist(), unknown if series.liquidity is None else series.liquidity.tolist())
        return [Bar(t.item(), *numbers) for t, *numbers in zip(series.times, *columns, strict=True)]

    def _times(self, session: int, step: timedelta) -> list[datetime]:
        opens, closes = self.opens[session], self.closes[session]
        if step >= timedelta(days=1):
            return [closes]
        times, time = [], opens + step
        while time < closes:
            times.append(time)
            time += step
        return [*times, closes]

    def _cash_levels(self, one: Inputs) -> dict[datetime, float] | None:
        if one.rates is None:
            return None
        published = [(t.item(), float(r)) for t, r in zip(one.rates.times, one.rates.values, strict=True)]
        level, levels, before = 1.0, {}, None
        for time in self.times:
            if time < published[0][0]:
                continue
            if before is not None:
                known = [(t, r) for t, r in published if t <= before]
                if before - known[-1][0] >= one.rate_fill:
                    break
                level *= 1 + known[-1][1] * ((time - before) / timedelta(days=1)) / 360
            levels[time], before = level, time
        return levels

    def _end(self, as_of: datetime) -> datetime:
        ends = [as_of]
        ends += [self.bars[a][-1].time for a in self.assets if not (a in self.gone_from and self.gone_from[a] < as_of)]
        if self.fill is not None:
            ends.append(self.vectors[-1][0] + self.fill - timedelta(microseconds=1))
        if self.cash is not None:
            ends.append(max(t for t in self.cash if t <= as_of))
        return min(ends)

    # -- what is known at a time ----------------------------------------------------------------------------------------------

    def last_bar(self, asset: str, time: datetime) -> Bar | None:
        bars = self.bars[asset]
        place = bisect_right(bars, time, key=lambda b: b.time)
        return bars[place - 1] if place else None

    def price(self, asset: str, time: datetime) -> float | None:
        bar = self.last_bar(asset, time)
        if bar is None or (time - bar.time > self.staleness and not self.gone(asset, time)):
            return None
        return bar.price

    def new_bar(self, asset: str, time: datetime) -> Bar | None:
        """The last bar since the valuation time before."""
        bar, place = self.last_bar(asset, time), bisect_left(self.times, time)
        previous = self.times[place - 1] if place else datetime.min
        return bar if bar and bar.time > previous and time - bar.time <= self.staleness else None

    def gone(self, asset: str, time: datetime) -> bool:
        return asset in self.gone_from and time > self.gone_from[asset]

    def valid(self, time: datetime) -> Weights | None:
        known = [(t, w) for t, w in self.vectors if t <= time]
        return known[-1][1] if known and (self.fill is None or time - known[-1][0] < self.fill) else None

    def clock(self, time: datetime) -> timedelta:
        local = time.replace(tzinfo=UTC).astimezone(self.zone).replace(tzinfo=None)
        return local - datetime.combine(self.dates[self.session_of[time]], datetime.min.time())

    def of_day(self, text: str) -> timedelta:
        hours, minutes = text.split(":")
        return timedelta(hours=int(hours), minutes=int(minutes))

    def in_window(self, time: datetime) -> bool:
        start, end = (self.of_day(text) for text in (self.strategy.rebalance_start, self.strategy.rebalance_end))
        return start < self.clock(time) <= end

    # -- when -----------------------------------------------------------------------------------------------------------------

    def orders(self) -> dict[datetime, tuple[Weights, datetime]]:
        """Targets by the valuation time at which they become orders, and the instant from which they are active."""
        begin = self._first_session()
        if begin is None:
            return {}
        strategy, lag, orders = self.strategy, self.strategy.execution_lag, {}
        previous: Weights | None = None
        for decided in self._instants(begin):
            session, target = self.session_of[decided], self.valid(decided)
            changed, previous = target != previous, target
            if target is None or not self._decides(session, changed) or session + lag >= len(self.dates):
                continue
            late = strategy.carries or (strategy.kind == "calendar_event" and strategy.event == "market_open")
            start = decided if lag == 0 else self.in_session[session + lag][0 if late else -1]
            if start <= self.end:
                orders[start] = (self._limited(target), self.opens[session + lag] if lag else decided)
        return orders

    def _first_session(self) -> int | None:
        for session, close in enumerate(self.closes):
            target = self.valid(close)
            if target is not None and all(w == 0 or self.gone(a, close) or self.price(a, close) is not None for a, w in target.items()):
                return session
        return None

    def _instants(self, begin: int) -> list[datetime]:
        strategy, first = self.strategy, self.closes[begin]
        if strategy.kind == "calendar_event" and strategy.event == "market_open":
            instants = [times[0] for times in self.in_session]
        elif strategy.rebalance_on == "signal_change":
            instants = self.times
        else:
            instants = self.closes
        return [t for t in instants if first <= t <= self.end]

    def _decides(self, session: int, changed: bool) -> bool:
        strategy = self.strategy
        if strategy.kind == "calendar_event":
            return 0 <= session - strategy.event_offset < len(self.dates) and self._is_event(session - strategy.event_offset)
        if strategy.rebalance_on == "signal_change":
            return changed
        day, after = self.dates[session], self.dates[session + 1] if session + 1 < len(self.dates) else None
        if strategy.rebalance_on == "every_session":
            return True
        assert after is not None
        if strategy.rebalance_on == "week_end":
            return day.isocalendar()[:2] != after.isocalendar()[:2]
        months = [(d.year, d.month if strategy.rebalance_on == "month_end" else (d.month - 1) // 3) for d in (day, after)]
        return months[0] != months[1]

    def _is_event(self, session: int) -> bool:
        strategy, day = self.strategy, self.dates[session]
        if strategy.event_type is not None:
            return any(d >= self.dates[0] and bisect_left(self.dates, d) == session for d in self.events[strategy.event_type])
        if strategy.schedule == "every_session":
            return True
        week = [d for d in self.dates if d.isocalendar()[:2] == day.isocalendar()[:2]]
        late = [d for d in week if d.weekday() >= strategy.weekday]
        return day == (late[0] if late else week[-1])

    def _limited(self, target: Weights) -> Weights:
        limits = self.strategy.limits
        if limits is None:
            return target
        assert limits.violation == "clip"
        high = limits.maximum_weight if limits.maximum_weight is not None else float("inf")
        low = max(0.0 if limits.no_short else -float("inf"), limits.minimum_weight if limits.minimum_weight is not None else -float("inf"))
        return {a: max(low, min(high, w)) for a, w in target.items()}

    # -- how ------------------------------------------------------------------------------------------------------------------

    def capacity(self, asset: str, time: datetime) -> float:
        strategy, bar = self.strategy, self.new_bar(asset, time)
        if not hasattr(strategy, "total_notional"):
            return float("inf")  # whatever the price that it is valued at, it trades there
        if bar is None:
            return 0.0
        match strategy.kind:
            case "volume_participation":
                notional, share = bar.price * bar.volume, strategy.max_percent_volume_in_bar
            case "trailing_adv_participation":
                notional, share = bar.price * bar.volume, strategy.max_bar_participation
            case "liquidity_constrained":
                per_unit = bar.price if strategy.available_liquidity_unit == "quantity" else 1.0
                notional, share = per_unit * bar.liquidity, strategy.max_liquidity_fraction
            case _:
                raise NotImplementedError(strategy.kind)
        return notional * share / strategy.total_notional if notional > 0 else 0.0  # NaN is not above 0

    def session_capacity(self, asset: str, session: int) -> float:
        if self.strategy.kind != "trailing_adv_participation":
            return float("inf")
        n, total = self.strategy.lookback_sessions, 0.0
        if session < n:
            return 0.0
        for earlier in range(session - n, session):
            bars = [b for t in self.in_session[earlier] if (b := self.new_bar(asset, t))]
            if all(b.volume != b.volume for b in bars):
                return 0.0
            total += sum(b.price * b.volume for b in bars if b.volume > 0)
        return total / n * self.strategy.max_daily_participation / self.strategy.total_notional

    def due(self, time: datetime, active_from: datetime) -> float:
        """Share of what is left that is due now."""
        if self.strategy.kind != "time_weighted":
            return 1.0
        session = self.session_of[time]
        window = [t for t in self.in_session[session] if self.in_window(t)]
        begins = time - self.clock(time) + self.of_day(self.strategy.rebalance_start)
        start = max(begins, self.opens[session], active_from)
        done = [t for t in window if t < time]
        since = max([start, *done])  # linear over the whole window is linear over what is left of it
        return 1.0 if window[-1] <= since else (time - since) / (window[-1] - since)

    def accepts(self, target: Weights, held: Weights) -> bool:
        if self.strategy.kind != "threshold":
            return True
        for asset in self.assets:
            drift = abs(held[asset] - target[asset])
            if (held[asset] == 0) != (target[asset] == 0):
                return True
            if self.strategy.absolute_band is not None and drift > self.strategy.absolute_band:
                return True
            if self.strategy.relative_band is not None and drift > self.strategy.relative_band * abs(target[asset]):
                return True
        return False

    def run(self) -> Result:
        orders, fee = self.orders(), self.configuration.execution.commission_fee
        drifts = self.configuration.execution.weight_accounting == "drifted"
        result = Result({}, {}, {})
        value, weights, before_time = 1.0, dict.fromkeys(self.assets, 0.0), None
        goals: Weights = {}
        active_from, used, used_in = datetime.min, dict.fromkeys(self.assets, 0.0), -1
        for time in (t for t in self.times if t <= self.end):
            value, before = self._grown(value, weights, before_time, time, drifts, bool(result.trades))
            before_time = time
            after = dict(before)
            if time in orders:
                target, since = orders[time]
                target = {a: 0.0 if self.gone(a, time) else w for a, w in target.items()}
                if self.strategy.carries:
                    goals, active_from = {a: w for a, w in target.items() if w != 0 or before[a] != 0}, since
                elif self.accepts(target, before):
                    after = dict(target)
            if self.strategy.carries and goals and self.in_window(time):
                session = self.session_of[time]
                if used_in != session:
                    used, used_in = dict.fromkeys(self.assets, 0.0), session
                share = self.due(time, active_from)
                for asset, goal in list(goals.items()):
                    most = min(self.capacity(asset, time), max(self.session_capacity(asset, session) - used[asset], 0.0))
                    gap = goal - before[asset]
                    if share >= 1 and abs(gap) <= most:
                        after[asset] = goal
                        del goals[asset]
                    else:
                        step = gap * share
                        after[asset] = before[asset] + max(-most, min(most, step))
                    used[asset] += abs(after[asset] - before[asset])
            for asset in self.assets:
                if self.gone(asset, time):
                    after[asset] = 0.0
                    goals.pop(asset, None)
            turnover = sum(abs(after[a] - before[a]) for a in self.assets)
            value *= 1 - fee * turnover if drifts else 1.0
            if not drifts:
                value -= self.unfeed * fee * turnover
            if turnover > 1e-14:
                result.trades[time] = {a: (before[a], after[a]) for a in self.assets if before[a] != 0 or after[a] != 0}
            weights = after
            if result.trades:
                result.values[time] = value
        result.left = goals
        return result

    def _grown(
        self, value: float, weights: Mapping[str, float], before: datetime | None, time: datetime, drifts: bool, begun: bool
    ) -> tuple[float, Weights]:
        """Value and weights before the trade: step by step from the valuation time before, whatever was traded when."""
        self.unfeed = value  # `target` accounting: fees are a share of the value at the valuation time before
        if before is None or not begun:
            return value, dict(weights)
        ratio = {}
        for asset, weight in weights.items():
            prices = (self.price(asset, before), self.price(asset, time)) if weight else (1.0, 1.0)
            assert prices[0] is not None, (asset, before)
            assert prices[1] is not None, (asset, time)
            ratio[asset] = prices[1] / prices[0]
        spare = 1 - sum(weights.values())
        growth = 1 + sum(w * (ratio[a] - 1) for a, w in weights.items())
        if self.cash is not None:
            growth += spare * (self.cash[time] / self.cash[before] - 1)
        return value * growth, {a: w * ratio[a] / growth if drifts else w for a, w in weights.items()}
