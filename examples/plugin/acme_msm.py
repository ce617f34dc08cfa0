"""Two kinds that msm-ray does not have: a signal and a rebalance strategy. `pyproject.toml` beside this file declares them."""

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from msm_core.frames import Floats
from msm_core.rebalance_strategy import RebalanceStrategy
from msm_core.sessions import Sessions
from msm_core.signals.computed import ComputedSignal

WeekdayName = Literal["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
THURSDAY = 3  # 1970-01-01, from which days are counted, was one


class LowPrice(ComputedSignal):
    """The cheapest assets of a universe by their newest price, in equal parts.

    Of equal prices the asset first in bytewise order is taken. An asset without a price is not held; where none has one, all is cash.
    """

    code_version: ClassVar[str] = "1"  # bump when a change changes numbers that are already stored

    kind: Literal["acme_low_price"] = "acme_low_price"
    count: int = Field(default=3, ge=1, le=10_000, description="how many assets are held")

    @property
    def history_sessions(self) -> int:
        return 1

    def target_weights(self, windows: dict[str, Floats]) -> Floats:
        newest = windows["prices"][:, :, -1]  # (E, N)
        rank = newest.argsort(axis=1, kind="stable").argsort(axis=1)  # NaN comes last
        held = (rank < self.count) & ~np.isnan(newest)
        parts = np.maximum(np.count_nonzero(held, axis=1), 1)
        return np.where(held, (1.0 / parts)[:, None], 0.0)


class Weekday(RebalanceStrategy):
    """Decide on one day of the week, and trade the whole way. A week without a session on that day has no decision."""

    kind: Literal["acme_weekday"] = "acme_weekday"
    rebalance_on: Literal["every_session"] = Field(default="every_session", description="of these, the ones on that day")
    weekday: WeekdayName = Field(description="day on which a target is decided, by the calendar's local dates")

    def decisions(self, sessions: Sessions, target: np.ndarray, changed: np.ndarray, through: int) -> np.ndarray:
        # by the date, not by counting sessions: a calendar may be extended at both ends, and the same days must remain
        days = (sessions.dates.astype("datetime64[D]").astype(np.int64) + THURSDAY) % 7
        return super().decisions(sessions, target, changed, through) & (days == WeekdayName.__args__.index(self.weekday))
