"""Liquidity constrained: no more of a bar than a share of the liquidity that the source says there is."""

from typing import Literal

import numpy as np
from pydantic import Field

from msm_core.frames import Floats, is_usable
from msm_core.rebalance_strategy.base import OrderStrategy, Tape


class LiquidityConstrained(OrderStrategy):
    """Trade at most a share of the available liquidity that the price source publishes per bar, in money or in units.

    A weight changes by at most max_liquidity_fraction x available notional / total_notional in a bar; of a quantity the notional is
    price x quantity. A bar without liquidity takes nothing.
    """

    kind: Literal["liquidity_constrained"] = "liquidity_constrained"
    available_liquidity_column: str = Field(
        default="available_notional", min_length=1, max_length=63, description="numeric column of the price source"
    )
    available_liquidity_unit: Literal["notional", "quantity"] = Field(default="notional", description="money, or units of the asset")
    max_liquidity_fraction: float = Field(default=1.0, gt=0, le=1, description="largest share of it in a bar")
    total_notional: float = Field(default=50e6, gt=0, description="value of the portfolio in the currency of the liquidity")

    @property
    def liquidity_column(self) -> str:
        return self.available_liquidity_column

    def capacity(self, tape: Tape) -> Floats:
        available = tape.liquidity if self.available_liquidity_unit == "notional" else tape.prices * tape.liquidity
        usable = is_usable(available) & np.isfinite(tape.prices)
        return np.where(usable, available, 0.0) * (self.max_liquidity_fraction / self.total_notional)
