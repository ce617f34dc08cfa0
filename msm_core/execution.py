"""Execution: from orders to trades. One loop over bars, vectorised over portfolios and assets; the same for every strategy.

P portfolios that share a market and a way of trading go through it together. At each bar where anything may happen, what they hold
has drifted to `before`; decided targets become orders; the strategy's hooks say how much of an order the bar takes; what changed hands
is a trade. Portfolios do not see each other: all of it is elementwise, or a sum over one portfolio's assets in order, and padding has
weight 0, so a batch of one and a batch of a thousand get the same bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from msm_core.alignment import Market
from msm_core.frames import NEVER, TICK, Floats, Times, ordered_sum
from msm_core.rebalance_strategy import RebalanceStrategy
from msm_core.rebalance_strategy.base import Tape
from msm_core.valuation import Events, Opening, Order, Trades

CELLS_MAX = 16_000_000  # bars x portfolios x assets that are executed together: bounds memory, never the result


@dataclass(frozen=True)
class Job:
    """One portfolio's window: what is to be executed.

    rows     of the market's grid
    columns  (N,) of the market's assets
    cash     (T,) level of its cash account at each row of the grid; None = cash earns nothing
    """

    rows: slice
    columns: np.ndarray
    events: Events
    opening: Opening
    fee_rate: float
    cash: Floats | None = None


def tape_of(market: Market, frequency_times: Times) -> Tape:
    """The market as strategies see it. `frequency_times`: all valuation times of its calendar."""
    before = np.append(np.datetime64(-(2**62), "us"), market.grid[:-1])
    new = market.fresh & (market.bar_times > before[:, None])
    closes = market.sessions.closes
    session = np.searchsorted(closes, market.grid)
    span = slice(0, 0)
    if len(market.grid):
        last = closes[min(session[-1], len(closes) - 1)]
        span = slice(int(np.searchsorted(frequency_times, market.grid[0])), int(np.searchsorted(frequency_times, last, "right")))
    schedule = frequency_times[span]
    return Tape(market, new, session, schedule, np.searchsorted(closes, schedule), frequency_times)


def execute(strategy: RebalanceStrategy, market: Market, tape: Tape, jobs: Sequence[Job], drifts: bool) -> list[Trades]:
    """The trades of each job, in their order. drifts: weights move with prices between trades; else they are set back, free of charge.

    Raises EmptyWindow. A price or a value that is none becomes NaN in its own portfolio only; valuation names it.
    """
    done: list[Trades | None] = [None] * len(jobs)
    by_width = sorted(range(len(jobs)), key=lambda i: len(jobs[i].columns))
    while by_width:
        part = _fitting(jobs, by_width)
        for i, trades in zip(part, _Execution(strategy, market, tape, [jobs[i] for i in part], drifts).run(), strict=True):
            done[i] = trades
        by_width = by_width[len(part) :]
    return [trades for trades in done if trades is not None]


def _fitting(jobs: Sequence[Job], order: Sequence[int]) -> list[int]:
    """The first of `order` that fit into memory together; at least one."""
    part = list[int]()
    for i in order:
        bars = jobs[i].rows.stop - jobs[i].rows.start
        if part and bars * (len(part) + 1) * len(jobs[i].columns) > CELLS_MAX:
            break
        part.append(i)
    return part


class _Execution:
    """P portfolios on their way through the bars; arrays are (P, N), padded with weight 0."""

    def __init__(self, strategy: RebalanceStrategy, market: Market, tape: Tape, jobs: Sequence[Job], drifts: bool) -> None:
        self.strategy, self.market, self.tape, self.jobs, self.drifts = strategy, market, tape, jobs, drifts
        shape = (len(jobs), max(len(job.columns) for job in jobs))
        self.columns, self.real = np.zeros(shape, np.int64), np.zeros(shape, bool)
        self.weights, self.struck, self.used = np.zeros(shape), np.ones(shape), np.zeros(shape)
        self.goals, self.pending = np.zeros(shape), np.zeros(shape, bool)
        self.active_from, self.used_in = np.full(len(jobs), NEVER), np.full(len(jobs), -1)
        for p, job in enumerate(jobs):
            self._open(p, job)
        self.value = np.array([job.opening.trade_value for job in jobs])
        self.fee_rate = np.array([job.fee_rate for job in jobs])
        self.priced = market.priced
        self.has_cash = any(job.cash is not None for job in jobs)
        unmoved = np.ones(len(tape.times)) if self.has_cash else np.empty(0)
        self.cash = np.column_stack([unmoved if job.cash is None else job.cash for job in jobs])  # (T, P) levels
        self.cash_struck = np.array([job.opening.cash for job in jobs])
        self.spare = np.where([job.opening.started for job in jobs], 1.0 - ordered_sum(self.weights), 0.0)  # weight of cash
        self.gone_from = np.where(self.real, market.gone_from[self.columns], NEVER)
        self.tradable = strategy.tradable(tape)
        self.capacity, self.session_capacity = strategy.capacity(tape), strategy.session_capacity(tape)
        self.pace = strategy.pace(tape)
        self._list_targets()
        self.delists = not np.isnat(self.gone_from).all()

    def _open(self, p: int, job: Job) -> None:
        width, opening = slice(len(job.columns)), job.opening
        self.columns[p, width], self.real[p, width] = job.columns, True
        self.weights[p, width] = opening.weights
        self.struck[p, width] = np.where(opening.weights != 0, opening.prices, 1.0)
        if opening.order is not None:
            order = opening.order
            self.pending[p, width] = ~np.isnan(order.goals)
            self.goals[p, width] = np.where(np.isnan(order.goals), 0.0, order.goals)
            self.active_from[p], self.used[p, width] = order.active_from, order.used
            self.used_in[p] = np.searchsorted(self.market.sessions.closes, order.at)

    def _list_targets(self) -> None:
        """All target vectors of all portfolios in one block (V, N), where those of each begin, and when orders are active from."""
        counts = [len(job.events.targets) for job in self.jobs]
        self.first_vector = np.cumsum([0, *counts])
        self.vectors = np.zeros((max(self.first_vector[-1], 1), self.weights.shape[1]))
        for job, begin, count in zip(self.jobs, self.first_vector.tolist(), counts, strict=False):
            self.vectors[begin : begin + count, : len(job.columns)] = job.events.targets
        self.starts = np.full((len(self.tape.times), len(self.jobs)), NEVER) if self.strategy.carries else np.empty((0, 0))

    def run(self) -> list[Trades]:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # a ruined portfolio is told by its value, later
            kept = self._kept()
        return [self._trades(p, kept) for p in range(len(self.jobs))]

    def _kept(self) -> "_Kept":
        strategy, tape = self.strategy, self.tape
        carries = strategy.carries
        decided, live, visited = self._agenda()
        is_decided: np.ndarray = np.any(decided >= 0, axis=1)
        kept = _Kept(len(visited), self.weights.shape)
        for row in visited.tolist():
            new = decided[row] if is_decided[row] else None
            acting = np.zeros(len(self.jobs), bool)
            gone = (self.gone_from < tape.times[row]) & live[row, :, None] if self.delists else None
            if new is None and not (carries and self.pending.any()) and gone is None:
                continue
            prices = np.take(self.market.prices[row], self.columns)
            growth, before = self._drifted(row, prices)
            after = before
            if new is not None:
                taken = new >= 0
                targets = self._targets(new, gone)
                if (accepted := strategy.accepts(targets, before)) is not None:
                    taken = taken & accepted
                if carries:
                    self._order(taken, targets, before, row)
                else:
                    acting = taken
                    after = _chosen(taken, targets, before)
            if carries:
                acting = live[row]
                if self.tradable[row]:
                    after = self._traded(row, before, acting)
            if gone is not None:
                sold = gone & (before != 0)
                after = np.where(gone, 0.0, after)
                self.pending &= ~gone
                acting = acting | sold.any(axis=1)
            change = after - before
            turnover = ordered_sum(np.abs(change, out=change), out=change)
            traded = acting & ~(turnover == 0)
            if traded.any():
                self._settle(row, traded, after, prices, growth, turnover)
                kept.add(row, traded, after, before, self.value)
        return kept

    def _agenda(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Place (T, P) of the vector decided on at each row, -1 = none; mask (T, P) of rows in the window; rows that are looked at."""
        jobs, bars = self.jobs, len(self.tape.times)
        live = np.zeros((bars, len(jobs)), bool)
        decided = np.full((bars, len(jobs)), -1, np.int64)
        looked_at = np.zeros(bars, bool)
        for p, job in enumerate(jobs):
            live[job.rows, p] = True
            rows = job.events.rows + job.rows.start
            decided[rows, p] = self.first_vector[p] + job.events.which
            looked_at[rows] = True
            if self.strategy.carries:
                self.starts[rows, p] = job.events.active_from
            if self.delists:  # what is held of a gone asset is sold at the first bar after, or at once
                left = self.gone_from[p][~np.isnat(self.gone_from[p])]
                sales = np.maximum(np.searchsorted(self.tape.times, left, "right"), job.rows.start)
                looked_at[sales[sales < job.rows.stop]] = True
        if self.strategy.carries:
            looked_at |= live.any(axis=1)
        return decided, live, np.flatnonzero(looked_at)

    def _drifted(self, row: int, prices: Floats) -> tuple[Floats, Floats]:
        """(P,) growth since the last trade and (P, N) weights now."""
        if not self.drifts:
            return np.ones(len(self.jobs)), self.weights
        ratio = prices / self.struck
        if not self.priced[row]:
            ratio = np.where(self.weights != 0, ratio, 1.0)  # 0 weight times an unknown price must stay 0
        before = self.weights * ratio
        ratio -= 1.0  # in place from here on: this is the loop
        ratio *= self.weights
        earned = ordered_sum(ratio, out=ratio)
        if self.has_cash:
            earned = earned + self.spare * (self.cash[row] / self.cash_struck - 1.0)
        growth = 1.0 + earned
        before /= growth[:, None]
        return growth, before

    def _targets(self, new: np.ndarray, gone: np.ndarray | None) -> Floats:
        """(P, N) what is wanted where something is decided; whatever elsewhere."""
        targets = self.vectors[new]
        return targets if gone is None else np.where(gone, 0.0, targets)

    def _order(self, taken: np.ndarray, targets: Floats, before: Floats, row: int) -> None:
        """Orders replace what was still to do of older ones. Of what is neither held nor wanted there is nothing to do."""
        self.goals = np.where(taken[:, None], targets, self.goals)
        self.pending = np.where(taken[:, None], self.real & ((targets != 0) | (before != 0)), self.pending)
        self.active_from = np.where(taken, self.starts[row], self.active_from)

    def _traded(self, row: int, before: Floats, live: np.ndarray) -> Floats:
        """Weights after what this bar takes of the orders; a part that is done is exactly its goal."""
        todo = self.pending & live[:, None]
        gap = self.goals - before
        share = self._share(row)
        step, whole = (gap, True) if share is None else (gap * share[:, None], (share >= 1.0)[:, None])
        if self.capacity is not None:
            most = np.take(self.capacity[row], self.columns)
            if self.session_capacity is not None:
                session = self.tape.session[row]
                begun = live & (self.used_in != session)
                self.used[begun], self.used_in[begun] = 0.0, session
                most = np.minimum(most, np.maximum(np.take(self.session_capacity[row], self.columns) - self.used, 0.0))
            whole = whole & (np.abs(gap) <= most)
            step = np.minimum(np.maximum(step, -most), most)
        after = np.where(todo, np.where(whole, self.goals, before + step), before)
        self.pending = self.pending & ~(todo & whole)
        if self.session_capacity is not None:
            self.used = self.used + np.where(todo, np.abs(after - before), 0.0)
        return after

    def _share(self, row: int) -> Floats | None:
        """(P,) share of what is still to do that is due at the bar."""
        if self.pace is None:
            return None
        since, until = (times[row] for times in self.pace)
        since = np.where(self.active_from > since, self.active_from, since)
        left, gone = (until - since) / TICK, (self.tape.times[row] - since) / TICK
        return np.where(left > 0, gone / np.where(left > 0, left, 1.0), 1.0)

    def _settle(self, row: int, traded: np.ndarray, after: Floats, prices: Floats, growth: Floats, turnover: Floats) -> None:
        """Fees are paid, and the new position is struck."""
        drifted = self.value * growth
        value = np.where(drifted > 0, drifted * (1.0 - self.fee_rate * turnover), drifted)  # a fee on a ruin must not make it positive
        self.value = np.where(traded, value, self.value)
        self.weights = _chosen(traded, after, self.weights)
        struck = prices if self.priced[row] else np.where(after != 0, prices, 1.0)
        self.struck = _chosen(traded, struck, self.struck)
        if self.has_cash:
            self.spare = np.where(traded, 1.0 - ordered_sum(self.weights), self.spare)
            self.cash_struck = np.where(traded, self.cash[row], self.cash_struck)

    def _trades(self, p: int, kept: "_Kept") -> Trades:
        """A portfolio's own trades, and what is left of its order."""
        job, width = self.jobs[p], slice(len(self.jobs[p].columns))
        own = np.flatnonzero(kept.traded[: kept.count, p])
        after, before = (block[p, : kept.count, width] for block in (kept.after, kept.before))
        if len(own) < kept.count:
            after, before = after[own], before[own]
        return Trades(kept.rows[own] - job.rows.start, after, before, kept.values[own, p], self._left(p, width))

    def _left(self, p: int, width: slice) -> Order | None:
        """What is still to do, and what the last session has used up; None = nothing to remember."""
        job = self.jobs[p]
        pending = self.pending[p, width]
        row = job.rows.stop - 1
        session = self.tape.session[row]
        over = self.used_in[p] != session or self.tape.times[row] == self.market.sessions.closes[session]
        used = np.zeros(len(pending)) if over else self.used[p, width]
        if not pending.any() and not used.any():
            return None
        active_from = self.active_from[p] if pending.any() else NEVER
        return Order(self.tape.times[job.rows][-1], np.where(pending, self.goals[p, width], np.nan), active_from, used)


def _chosen(mask: np.ndarray, these: Floats, others: Floats) -> Floats:
    """(P, N) the rows of `these` where the mask (P,) says so, else of `others`."""
    return these if mask.all() else np.where(mask[:, None], these, others)


class _Kept:
    """The trades of P portfolios over N assets, row by row: room for `rows` rows, portfolio by portfolio."""

    def __init__(self, rows: int, shape: tuple[int, int]) -> None:
        portfolios, assets = shape
        self.count = 0
        self.rows = np.empty(rows, np.int64)
        self.traded, self.values = np.empty((rows, portfolios), bool), np.empty((rows, portfolios))
        self.after, self.before = np.empty((portfolios, rows, assets)), np.empty((portfolios, rows, assets))

    def add(self, row: int, traded: np.ndarray, after: Floats, before: Floats, values: Floats) -> None:
        at = self.count
        self.rows[at], self.traded[at], self.values[at] = row, traded, values
        self.after[:, at], self.before[:, at] = after, before
        self.count += 1
