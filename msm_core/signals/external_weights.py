"""External weights: vectors that others computed, in a registered storage or in a file."""

from datetime import timedelta
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import AfterValidator, Field, StringConstraints, model_validator

from msm_core.errors import InvalidInput, RepeatedWeight, UnexpectedAsset
from msm_core.frames import iso
from msm_core.price_sources import AnyPriceSource, PriceSource
from msm_core.signals.base import NOTHING, Inputs, ListedSignal, Vectors, WeightsLocation

FILE_ENDINGS = (".csv", ".csv.gz", ".parquet")


def _as_stored(source: PriceSource) -> PriceSource:
    if source.policy is not None:
        raise ValueError("weights are read as they are stored: give the storage itself, not an interpolation of it")
    return source


def _readable(path: str) -> str:
    if not path.lower().endswith(FILE_ENDINGS):
        raise ValueError(f"the name of a file of weights ends in {', '.join(FILE_ENDINGS)}")
    return path


WeightsSource = Annotated[AnyPriceSource, AfterValidator(_as_stored)]
WeightsPath = Annotated[str, StringConstraints(min_length=1), AfterValidator(_readable)]


class ExternalWeights(ListedSignal):
    """Vectors that others computed, taken as they are.

    The rows of one time are one complete vector: an asset without a row there has target 0. Weights are finite, of any sum; a negative
    one is a short position.
    """

    kind: Literal["external_weights"] = "external_weights"
    weights_source: WeightsSource | None = Field(
        default=None, description="registered storage with time_index, asset_identifier and the weights; or give path"
    )
    path: WeightsPath | None = Field(
        default=None, description="CSV or Parquet file of the same columns, which every worker can read; or give weights_source"
    )
    weight_column: str = Field(default="signal_weight", min_length=1, max_length=63, description="column that holds the weights")
    forward_fill: timedelta | None = Field(
        default=timedelta(days=1), gt=timedelta(0), description="how long a vector stays valid; none: until the next one"
    )

    @model_validator(mode="after")
    def _one_location(self) -> Self:
        if (self.weights_source is None) == (self.path is None):
            raise ValueError("give either weights_source or path")
        return self

    @property
    def weights_location(self) -> WeightsLocation:
        return WeightsLocation(self.weights_source, self.weight_column, self.path)

    def emit(self, since: np.datetime64 | None, through: np.datetime64, inputs: Inputs = NOTHING) -> Vectors:
        """Raises UnexpectedAsset, InvalidInput and RepeatedWeight for rows of the range that cannot be used."""
        assert inputs.rows is not None
        rows = inputs.rows
        first = 0 if since is None else int(np.searchsorted(rows.times, since, "right"))
        due = slice(first, max(first, int(np.searchsorted(rows.times, through, "right"))))
        places = self._places(rows.times[due], rows.assets[due], rows.weights[due])
        times, vector = np.unique(rows.times[due], return_inverse=True)
        weights = np.zeros((len(times), len(self.universe)))
        weights[vector, places] = rows.weights[due]
        return Vectors(times, self.universe, weights)

    def _places(self, times: np.ndarray, assets: list[str], weights: np.ndarray) -> np.ndarray:
        """(R,) place of each row's asset in the universe."""
        by_name = {asset: i for i, asset in enumerate(self.universe)}
        places = np.array([by_name.get(asset, -1) for asset in assets], np.int64)
        if (strange := np.flatnonzero(places < 0)).size:
            raise UnexpectedAsset(**self._facts(times, assets, weights, strange[0]))
        if (unusable := np.flatnonzero(~np.isfinite(weights))).size:
            raise InvalidInput(column=self.weight_column, **self._facts(times, assets, weights, unusable[0]))
        if (repeated := np.flatnonzero((times[1:] == times[:-1]) & (places[1:] == places[:-1]))).size:
            first = int(repeated[0])
            raise RepeatedWeight(other=float(weights[first + 1]), **self._facts(times, assets, weights, first))
        return places

    def _facts(self, times: np.ndarray, assets: list[str], weights: np.ndarray, row: int) -> dict[str, object]:
        source = f"storage {self.weights_source.source_uid}" if self.weights_source else self.path
        value = {"asset": assets[row], "time": iso(times[row]), "value": float(weights[row])}
        return {"owner": f"signal {self.kind}", "source": source, **value}
