"""Trailing ADV participation: no more in a session than a share of the average daily volume before it, nor of any one bar."""

from typing import Literal

import numpy as np
from pydantic import Field

from msm_core.frames import Floats
from msm_core.rebalance_strategy.base import OrderStrategy, Tape


class TrailingADVParticipation(OrderStrategy):
    """Trade at most a share of the average daily notional of the sessions before, and at most a share of each bar.

    The average is over lookback_sessions completed sessions, all of them with a bar; an asset with fewer is not traded. A weight changes
    by at most max_daily_participation x average / total_notional in a session, and max_bar_participation x price x volume /
    total_notional in a bar.
    """

    kind: Literal["trailing_adv_participation"] = "trailing_adv_participation"
    lookback_sessions: int = Field(default=20, ge=1, le=1000, description="completed sessions that are averaged")
    max_daily_participation: float = Field(default=0.05, gt=0, le=1, description="largest share of the average in a session")
    max_bar_participation: float = Field(default=0.10, gt=0, le=1, description="largest share of a bar's notional")
    total_notional: float = Field(default=50e6, gt=0, description="value of the portfolio in the currency of price x volume")

    @property
    def liquidity_column(self) -> str:
        return "volume"

    @property
    def history_sessions(self) -> int:
        return self.lookback_sessions + 1  # what is new in the very first bar of a tape cannot be told

    def capacity(self, tape: Tape) -> Floats:
        return tape.notional() * (self.max_bar_participation / self.total_notional)

    def session_capacity(self, tape: Tape) -> Floats:
        first, last = (int(tape.session[0]), int(tape.session[-1])) if len(tape.session) else (0, -1)
        assets = tape.prices.shape[1]
        traded, present = np.zeros((last - first + 1, assets)), np.zeros((last - first + 1, assets), bool)
        np.add.at(traded, tape.session - first, tape.notional())  # bar by bar, in order
        np.logical_or.at(present, tape.session - first, np.isfinite(tape.volumes))
        average, whole = np.zeros_like(traded), np.zeros(traded.shape, bool)
        n = self.lookback_sessions
        if len(traded) > n:
            total = traded[: len(traded) - n].copy()
            whole[n:] = present[: len(traded) - n]
            for lag in range(1, n):
                total = total + traded[lag : lag + len(total)]
                whole[n:] &= present[lag : lag + len(total)]
            average[n:] = total / n
        usable = np.where(whole, average, 0.0) * (self.max_daily_participation / self.total_notional)
        return usable[tape.session - first]
