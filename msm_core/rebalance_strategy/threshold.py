"""Threshold: leave a portfolio alone until it has drifted too far."""

from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from msm_core.frames import Floats
from msm_core.rebalance_strategy.base import RebalanceStrategy


class Threshold(RebalanceStrategy):
    """Trade the whole portfolio to its target when any asset has drifted out of its band; else nothing.

    A band is absolute (|weight - target| > absolute_band), relative (|weight - target| > relative_band x |target|), or both: the first
    one left counts. An asset that joins or leaves the target is always out of its band.
    """

    kind: Literal["threshold"] = "threshold"
    absolute_band: float | None = Field(default=None, ge=0, description="largest drift in weight, 0.05 = 5 points")
    relative_band: float | None = Field(default=None, ge=0, description="largest drift as a share of the target, 0.25 = a quarter of it")

    @model_validator(mode="after")
    def _one_band_at_least(self) -> Self:
        if self.absolute_band is None and self.relative_band is None:
            raise ValueError("give absolute_band, relative_band or both")
        return self

    def accepts(self, targets: Floats, held: Floats) -> np.ndarray:
        drift = np.abs(held - targets)
        out = (targets == 0) != (held == 0)
        if self.absolute_band is not None:
            out |= drift > self.absolute_band
        if self.relative_band is not None:
            out |= drift > self.relative_band * np.abs(targets)
        return out.any(axis=1)
