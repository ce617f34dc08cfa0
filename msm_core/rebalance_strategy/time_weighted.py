"""Time weighted: an order is worked off evenly over the daily window."""

from typing import Literal

import numpy as np

from msm_core.frames import Times
from msm_core.rebalance_strategy.base import OrderStrategy, Tape, of_day


class TimeWeighted(OrderStrategy):
    """Trade linearly over the daily window: after half of its time half is done, after its last bar all of it.

    An order begins with its session's window, or at the bar at which it is decided.
    """

    kind: Literal["time_weighted"] = "time_weighted"

    def pace(self, tape: Tape) -> tuple[Times, Times]:
        times, session = tape.schedule, tape.schedule_session
        inside = self.in_window(tape, times, session)
        if not inside.any():
            return tape.times, tape.times  # nothing is traded
        times, session = times[inside], session[inside]
        starts = times - tape.clock(times, session) + of_day(self.rebalance_start)
        since = np.maximum(starts, tape.sessions.opens[session])
        follows = np.flatnonzero(session[1:] == session[:-1]) + 1
        since[follows] = times[follows - 1]
        until = times[np.searchsorted(session, session, "right") - 1]
        row = np.minimum(np.searchsorted(times, tape.times), len(times) - 1)  # bars outside the window are not traded at
        return since[row], until[row]
