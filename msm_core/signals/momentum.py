"""The assets that rose most over a past stretch, in equal parts."""

from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from msm_core.frames import Floats
from msm_core.signals.computed import ComputedSignal


class Momentum(ComputedSignal):
    """The best assets by their return over `lookback_sessions`, the newest `skip_sessions` left out, in equal parts.

    score at session s = P(s - skip) / P(s - lookback) - 1. An asset needs both prices, and one at s itself: it is traded there.
    The best k = top_assets get 1/k each; with `long_short` the worst k get -1/k as well. Where fewer are eligible k is smaller: all of
    them, or half of them with `long_short`, so that no asset is in both. Equal scores: first in bytewise order. Where k is 0, nothing
    is emitted.
    """

    kind: Literal["momentum"] = "momentum"
    lookback_sessions: int = Field(default=252, ge=1, le=10_000, description="sessions back to the price that the return starts from")
    skip_sessions: int = Field(default=21, ge=0, le=9_999, description="newest sessions that the return leaves out; less than the lookback")
    top_assets: int = Field(default=10, ge=1, le=100_000, description="assets held long; with long_short as many are held short")
    long_short: bool = Field(default=False, description="hold the worst assets short as well")

    @model_validator(mode="after")
    def _something_is_left(self) -> Self:
        if self.skip_sessions >= self.lookback_sessions:
            raise ValueError(f"skip_sessions {self.skip_sessions} must be less than lookback_sessions {self.lookback_sessions}")
        return self

    @property
    def history_sessions(self) -> int:
        return self.lookback_sessions + 1

    def target_weights(self, windows: dict[str, Floats]) -> Floats:
        prices = windows["prices"]
        now, end, start = prices[..., -1], prices[..., -1 - self.skip_sessions], prices[..., 0]
        with np.errstate(over="ignore"):
            score = np.where(np.isnan(now), np.nan, end / start - 1)
        eligible = np.count_nonzero(~np.isnan(score), axis=1)
        k = np.minimum(self.top_assets, eligible // 2 if self.long_short else eligible)[:, None]
        part = 1 / np.where(k > 0, k, np.nan)  # NaN where nobody is chosen: nothing is emitted
        long = _place(-score) < k
        weights = np.where(long, part, 0 * part)
        if self.long_short:
            short = _place(np.where(long, np.nan, score)) < k
            weights = np.where(short, -part, weights)
        return weights


def _place(values: Floats) -> np.ndarray:
    """(E, N) place of each value in its row, the lowest first; equal ones in column order, NaN last."""
    return np.argsort(np.argsort(values, axis=1, kind="stable"), axis=1, kind="stable")
