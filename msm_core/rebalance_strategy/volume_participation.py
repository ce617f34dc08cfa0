"""Volume participation: no more of a bar than a share of what was traded in it."""

from typing import Literal

from pydantic import Field

from msm_core.frames import Floats
from msm_core.rebalance_strategy.base import OrderStrategy, Tape


class VolumeParticipation(OrderStrategy):
    """Trade at most a share of each bar's notional per asset; what is left over is traded at later bars.

    A weight changes by at most max_percent_volume_in_bar x price x volume / total_notional in a bar. A bar without volume takes nothing.
    """

    kind: Literal["volume_participation"] = "volume_participation"
    max_percent_volume_in_bar: float = Field(default=0.01, gt=0, le=1, description="largest share of a bar's notional, 0.01 = 1 %")
    total_notional: float = Field(default=50e6, gt=0, description="value of the portfolio in the currency of price x volume")

    @property
    def liquidity_column(self) -> str:
        return "volume"

    def capacity(self, tape: Tape) -> Floats:
        return tape.notional() * (self.max_percent_volume_in_bar / self.total_notional)
