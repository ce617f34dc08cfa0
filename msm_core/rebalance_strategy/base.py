"""What every rebalance strategy is: a frozen spec that says when and how a portfolio gets from what it holds to what it wants.

When: `decisions` names the sessions at which a target is taken; `execution_lag` sessions later it becomes an order. How: the hooks
below say, for arrays of portfolios and assets at once, how much of an order is traded at a bar; `msm_core.execution` is the one loop
that asks them. A strategy that does not override them trades the whole way at once.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
from pydantic import AfterValidator, Field, model_validator

from msm_core.alignment import Market
from msm_core.errors import EmptyWindow, WeightOutOfBounds
from msm_core.frames import Floats, Times, is_usable, iso, ordered_sum
from msm_core.identity import Spec
from msm_core.sessions import Sessions

ROUNDING = 1e-9  # of a sum of weights: ten times 0.1 is a little less than 1

RebalanceOn = Literal["every_session", "signal_change", "week_end", "month_end", "quarter_end"]


class WeightLimits(Spec):
    """Bounds on targets. A target outside them fails the portfolio by name, or is cut back to them."""

    kind: Literal["weight_limits"] = "weight_limits"
    no_short: bool = Field(default=False, description="no weight below 0")
    minimum_weight: float | None = Field(default=None, description="lowest weight of an asset")
    maximum_weight: float | None = Field(default=None, description="highest weight of an asset")
    minimum_total_weight: float | None = Field(default=None, description="lowest sum of weights, up to rounding; the rest is cash")
    maximum_total_weight: float | None = Field(default=None, description="highest sum of weights, up to rounding")
    violation: Literal["fail", "clip"] = Field(
        default="fail", description="clip: weights are cut to their bounds, then scaled down to the highest sum; a sum too low still fails"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for low, high in ((self.minimum_weight, self.maximum_weight), (self.minimum_total_weight, self.maximum_total_weight)):
            if low is not None and high is not None and low > high:
                raise ValueError(f"the lowest weight {low} is above the highest {high}")
        if (self.minimum_weight or 0) > 0 or (self.maximum_weight or 0) < 0:
            raise ValueError("the bounds of a weight must let it be 0: an asset that is not wanted has weight 0")
        return self

    def applied(self, targets: Floats, assets: tuple[str, ...], times: Times, portfolio: str) -> Floats:
        """Targets (E, N) within the bounds. Raises WeightOutOfBounds."""
        lowest = max((-np.inf if self.minimum_weight is None else self.minimum_weight), 0.0 if self.no_short else -np.inf)
        highest = np.inf if self.maximum_weight is None else self.maximum_weight
        total_lowest = -np.inf if self.minimum_total_weight is None else self.minimum_total_weight
        total_highest = np.inf if self.maximum_total_weight is None else self.maximum_total_weight
        if self.violation == "clip":
            targets = np.clip(targets, lowest, highest)
            total = ordered_sum(targets)
            over = (total > total_highest) & (total_highest >= 0)  # scaling cannot make a sum negative
            targets[over] = targets[over] * (total_highest / total[over])[:, None]
        bad = np.argwhere((targets < lowest) | (targets > highest))
        if len(bad):
            event, asset = (int(i) for i in bad[0])
            facts = {"what": f"weight of {assets[asset]}", "value": float(targets[event, asset]), "lowest": lowest, "highest": highest}
            raise WeightOutOfBounds(portfolio=portfolio, time=iso(times[event]), **facts)
        total = ordered_sum(targets)
        wrong = np.flatnonzero((total < total_lowest - ROUNDING) | (total > total_highest + ROUNDING))
        if len(wrong):
            facts = {"what": "sum of weights", "value": float(total[wrong[0]]), "lowest": total_lowest, "highest": total_highest}
            raise WeightOutOfBounds(portfolio=portfolio, time=iso(times[wrong][0]), **facts)
        return targets


@dataclass(frozen=True)
class Tape:
    """What a strategy may see of a market, bar by bar: T valuation times, A assets.

    new       (T, A) mask of bars that are new at that time: a bar is traded against once
    session   (T,) index of the session that each valuation time lies in
    schedule, schedule_session  (U,) all valuation times from the first one of the tape to the end of its last session, future ones too
    calendar_times  all valuation times of the calendar
    """

    market: Market
    new: np.ndarray
    session: np.ndarray
    schedule: Times
    schedule_session: np.ndarray
    calendar_times: Times

    @property
    def sessions(self) -> Sessions:
        return self.market.sessions

    @property
    def times(self) -> Times:
        """(T,) valuation times."""
        return self.market.grid

    @cached_property
    def prices(self) -> Floats:
        """(T, A) of new bars; NaN where there is none. Like volumes and liquidity made for those strategies only that look."""
        return np.where(self.new, self.market.prices, np.nan)

    @cached_property
    def volumes(self) -> Floats:
        return np.where(self.new, self.market.volumes, np.nan)

    @cached_property
    def liquidity(self) -> Floats:
        return np.where(self.new, self.market.liquidity, np.nan)

    def notional(self) -> Floats:
        """(T, A) price x volume of each bar; 0 where there is no bar, no volume or no usable price."""
        with np.errstate(invalid="ignore"):  # 0 x infinity
            value = self.prices * self.volumes
        return np.where(is_usable(value), value, 0.0)

    def clock(self, times: Times, session: np.ndarray) -> np.ndarray:
        """Time since local midnight of the session's date; a session that closes at midnight closes at 24:00."""
        return self.sessions.to_local(times) - self.sessions.dates[session].astype("datetime64[us]")


class RebalanceStrategy(Spec):
    """When a portfolio trades. All of it is explicit and part of the identity."""

    code_version: ClassVar[str] = "1"  # bump when a change of the strategy changes numbers that are already stored
    carries: ClassVar[bool] = False  # what a bar leaves undone of an order lives on, until it is done or a newer order replaces it

    calendar_key: str = Field(
        min_length=1, max_length=255,
        description="a stored calendar's unique_identifier or source_identifier; else a pandas-market-calendars name",
    )  # fmt: skip
    rebalance_on: RebalanceOn = Field(default="every_session", description="sessions on which a target is decided")
    execution_lag: int = Field(
        default=0, ge=0, le=250, description="sessions between the decision and the trade; 0: at the close that the signal saw"
    )
    limits: WeightLimits | None = Field(default=None, description="bounds on the targets")

    # -- when -----------------------------------------------------------------------------------------------------------------

    def decisions(self, sessions: Sessions, target: np.ndarray, changed: np.ndarray, through: int) -> np.ndarray:
        """Sessions on which a target is decided, as a mask (S,); only those up to index `through` are meaningful.

        target   (S,) index of the signal vector valid at each decision time, -1 where none is
        changed  (S,) that vector differs from the one valid at the decision time before
        For `signal_change` on an intraday grid, S are valuation times.
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

    @property
    def decides_by_target(self) -> bool:
        """Whether `decisions` looks at nothing but its `target` and `changed`: then it may be given a part of the sessions."""
        own = type(self).decisions is not RebalanceStrategy.decisions  # of a subclass, which may look at the calendar
        return self.rebalance_on in ("every_session", "signal_change") and not own

    @property
    def trades_at_open(self) -> bool:
        """Decided, and traded, at the first valuation time of a session instead of its close."""
        return False

    # -- how ------------------------------------------------------------------------------------------------------------------

    @property
    def liquidity_column(self) -> str | None:
        """Numeric column of the price source that it cannot do without, beside the price."""
        return None

    @property
    def history_sessions(self) -> int:
        """Sessions before a bar that `capacity` and `session_capacity` look at."""
        return 0

    def tradable(self, tape: Tape) -> np.ndarray:
        """(T,) mask of bars at which it may trade. Raises EmptyWindow where that can be none."""
        return np.ones(len(tape.times), bool)

    def capacity(self, tape: Tape) -> Floats | None:
        """(T, A) greatest change of a weight at each bar; None = no limit."""
        return None

    def session_capacity(self, tape: Tape) -> Floats | None:
        """(T, A) greatest sum of changes of a weight in the bar's session; None = no limit."""
        return None

    def pace(self, tape: Tape) -> tuple[Times, Times] | None:
        """(T,) since and (T,) until: at a bar that ends at t the share (t - s) / (until - s) of what is still to do is due.

        s is `since`, or the instant from which the order is active if that is later. None = all of it is due at once.
        """
        return None

    def accepts(self, targets: Floats, held: Floats) -> np.ndarray | None:
        """(P,) mask of portfolios that act on targets (P, N) decided now while they hold `held` (P, N); None = all of them."""
        return None

    @cached_property
    def execution_key(self) -> str:
        """Portfolios whose strategies have the same one are executed together: only when they decide may differ."""
        own = {name: value for name, value in self.model_dump(mode="json").items() if name not in RebalanceStrategy.model_fields}
        return f"{self.kind if own or self.carries or type(self).accepts is not RebalanceStrategy.accepts else ''}{sorted(own.items())}"


CLOCK = re.compile(r"([01]?\d|2[0-4]):([0-5]\d)")


def _clock(value: str) -> str:
    match = CLOCK.fullmatch(value)
    if not match or (match[1] == "24" and match[2] != "00"):
        raise ValueError(f"{value!r} is no time of day such as 9:30 or 24:00")
    return f"{int(match[1])}:{match[2]}"


Clock = Annotated[str, AfterValidator(_clock)]


def of_day(clock: str) -> np.timedelta64:
    hours, minutes = clock.split(":")
    return np.timedelta64(int(hours) * 60 + int(minutes), "m").astype("timedelta64[us]")


class OrderStrategy(RebalanceStrategy):
    """A strategy whose orders take time: inside a daily window, and over to the next session until they are done."""

    carries: ClassVar[bool] = True

    rebalance_start: Clock = Field(default="9:00", description="start of the daily window, local time of the calendar; bars after it count")
    rebalance_end: Clock = Field(default="23:00", description="end of the daily window, local time, included; 24:00 = midnight")

    @model_validator(mode="after")
    def _window_is_one(self) -> Self:
        if of_day(self.rebalance_start) >= of_day(self.rebalance_end):
            raise ValueError(f"rebalance_start {self.rebalance_start} is not before rebalance_end {self.rebalance_end}")
        return self

    def in_window(self, tape: Tape, times: Times, session: np.ndarray) -> np.ndarray:
        clock = tape.clock(times, session)
        return (clock > of_day(self.rebalance_start)) & (clock <= of_day(self.rebalance_end))

    def tradable(self, tape: Tape) -> np.ndarray:
        inside = self.in_window(tape, tape.times, tape.session)
        if not inside.any():
            self._require_some_time(tape)
        return inside

    def _require_some_time(self, tape: Tape) -> None:
        """Raises EmptyWindow if there is none in the whole calendar; a few sessions, such as those that close early, may well have none."""
        session = np.searchsorted(tape.sessions.closes, tape.calendar_times)
        if len(session) and not self.in_window(tape, tape.calendar_times, session).any():
            last = str(tape.clock(tape.calendar_times, session).max().astype("timedelta64[m]"))
            raise EmptyWindow(
                kind=self.kind, start=self.rebalance_start, end=self.rebalance_end, calendar=tape.sessions.calendar, last=last
            )
