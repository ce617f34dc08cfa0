"""Fixed weights: the target never changes."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic.dataclasses import dataclass

from msm_core.frames import Floats
from msm_core.signals.base import AssetIdentifier, ConstantSignal, sorted_unique


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class AssetWeight:
    """A dataclass, not a model: a fleet has half a million of them, and these take an eighth of the memory."""

    unique_identifier: AssetIdentifier
    weight: float


class FixedWeights(ConstantSignal):
    """Given weights, for ever.

    Weights are taken as they are: they need not sum to 1 (the rest is cash), and a negative one is a short position.
    """

    kind: Literal["fixed_weights"] = "fixed_weights"
    asset_unique_identifier_weights: tuple[AssetWeight, ...] = Field(
        min_length=1, description="the vector; weights: {AAPL: 0.6} in a fleet file"
    )

    @field_validator("asset_unique_identifier_weights")
    @classmethod
    def _in_asset_order(cls, weights: tuple[AssetWeight, ...]) -> tuple[AssetWeight, ...]:
        names = [w.unique_identifier for w in weights]
        ordered = sorted_unique(names, "asset_unique_identifier_weights")
        if list(ordered) == names:  # as they are stored
            return weights
        by_name = dict(zip(names, weights, strict=True))
        return tuple(by_name[name] for name in ordered)

    @classmethod
    def from_signal_configuration(cls, configuration: Mapping[str, Any] | BaseModel | None = None, **fields: Any) -> "FixedWeights":
        """From a mapping, another model or keywords; `weights={"AAPL": 0.6}` is accepted for the list of pairs."""
        given = configuration.model_dump() if isinstance(configuration, BaseModel) else dict(configuration or {})
        given |= fields
        if "weights" in given:
            pairs = given.pop("weights").items()
            given["asset_unique_identifier_weights"] = [{"unique_identifier": a, "weight": w} for a, w in pairs]
        return cls.model_validate(given)

    @cached_property
    def universe(self) -> tuple[str, ...]:  # type: ignore[override] - the same, worked out once
        return tuple(w.unique_identifier for w in self.asset_unique_identifier_weights)

    def weights(self) -> Floats:
        return np.array([w.weight for w in self.asset_unique_identifier_weights], dtype=np.float64)
