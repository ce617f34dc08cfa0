"""Weights proportional to 1 / realised volatility."""

from typing import Literal

import numpy as np
from pydantic import Field

from msm_core.frames import Floats, ordered_sum
from msm_core.signals.computed import ComputedSignal

NOISE = 1e-15  # a simple return is a quotient less 1, so it carries some units of 2**-53: a deviation up to this is none


class InverseVolatility(ComputedSignal):
    """Weights proportional to 1 / volatility of the simple returns of a fixed window.

    The volatility is the sample standard deviation (ddof 1). An asset without a full window, or whose returns do not vary, gets 0;
    where no asset is left, nothing is emitted.
    """

    kind: Literal["inverse_volatility"] = "inverse_volatility"
    window_sessions: int = Field(default=60, ge=2, le=10_000, description="returns in the window, so one price more")

    @property
    def history_sessions(self) -> int:
        return self.window_sessions + 1

    def target_weights(self, windows: dict[str, Floats]) -> Floats:
        prices = windows["prices"]
        with np.errstate(over="ignore", invalid="ignore"):  # returns that are not finite make a NaN, or a deviation whose inverse is 0
            returns = prices[..., 1:] / prices[..., :-1] - 1
            away = returns - (ordered_sum(returns) / self.window_sessions)[..., None]
            volatility = np.sqrt(ordered_sum(away * away) / (self.window_sessions - 1))
        usable = volatility > NOISE  # not where a price is missing: NaN goes through every step
        inverse = np.where(usable, 1 / np.where(usable, volatility, 1), 0)
        total = ordered_sum(inverse)
        return inverse / np.where(total > 0, total, np.nan)[:, None]
