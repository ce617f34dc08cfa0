"""What every rebalance strategy is: a frozen spec that says when and how a portfolio gets from what it holds to what it wants."""

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from msm_core.identity import Spec
from msm_core.sessions import Sessions

RebalanceOn = Literal["every_session", "signal_change", "week_end", "month_end", "quarter_end"]


class RebalanceStrategy(Spec):
    """When a portfolio trades. All of it is explicit and part of the identity.

    calendar_key   a stored calendar's unique_identifier or source_identifier; else a pandas-market-calendars name
    rebalance_on   sessions on which a target is decided
    execution_lag  sessions between the decision and the trade; 0 = trade at the close that the signal saw
    """

    needs_volume: ClassVar[bool] = False

    calendar_key: str = Field(min_length=1, max_length=255)
    rebalance_on: RebalanceOn = "every_session"
    execution_lag: int = Field(default=0, ge=0, le=250)

    def decisions(self, sessions: Sessions, target: np.ndarray, changed: np.ndarray, through: int) -> np.ndarray:
        """Sessions on which a target is decided, as a mask (S,); only those up to index `through` are meaningful.

        target   (S,) index of the signal vector valid at each close, -1 where none is
        changed  (S,) that vector differs from the one valid a session earlier
        Raises CalendarRangeError when a period's end cannot be told yet.
        """
        valid = target >= 0
        match self.rebalance_on:
            case "every_session":
                return valid
            case "signal_change":
                return valid & changed
            case "week_end":
                return valid & sessions.period_ends("week", through)
            case "month_end":
                return valid & sessions.period_ends("month", through)
            case "quarter_end":
                return valid & sessions.period_ends("quarter", through)
