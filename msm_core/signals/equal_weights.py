"""Equal weights: 1 / N for each asset of the universe."""

from typing import Literal

import numpy as np
from pydantic import Field, field_validator

from msm_core.frames import Floats
from msm_core.signals.base import AssetIdentifier, ConstantSignal, sorted_unique


class EqualWeights(ConstantSignal):
    """1 / N for each of the N assets of a universe."""

    kind: Literal["equal_weights"] = "equal_weights"
    asset_list: tuple[AssetIdentifier, ...] = Field(min_length=1, description="assets that get 1 / N each")

    @field_validator("asset_list")
    @classmethod
    def _in_asset_order(cls, assets: tuple[str, ...]) -> tuple[str, ...]:
        return sorted_unique(assets, "asset_list")

    @property
    def universe(self) -> tuple[str, ...]:
        return self.asset_list

    def weights(self) -> Floats:
        return np.full(len(self.asset_list), 1.0 / len(self.asset_list))
