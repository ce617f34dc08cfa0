"""What every signal is: a frozen spec that says where a portfolio wants to be, before any trading."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Annotated

import numpy as np
from pydantic import AwareDatetime, StringConstraints

from msm_core.frames import Floats, SignalRows, Times, utc
from msm_core.identity import Spec

AssetIdentifier = Annotated[str, StringConstraints(min_length=1, max_length=255)]

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
CODE_VERSION = "1"  # bump when a change of a signal changes numbers that are already stored


@dataclass(frozen=True)
class Vectors:
    """Complete allocation vectors, in time order: an asset absent from a vector has target 0.

    times (V,) UTC; assets (N,) bytewise order; weights (V, N) finite, any sum, negative is short
    """

    times: Times
    assets: tuple[str, ...]
    weights: Floats

    @classmethod
    def from_rows(cls, rows: SignalRows) -> "Vectors":
        """Stored rows, in key order, as vectors."""
        times, row = np.unique(rows.times, return_inverse=True)
        assets = tuple(sorted(set(rows.assets)))
        place = {asset: i for i, asset in enumerate(assets)}
        weights = np.zeros((len(times), len(assets)))
        weights[row, [place[a] for a in rows.assets]] = rows.weights
        return cls(times, assets, weights)

    def valid_at(self, times: Times, maximum_forward_fill: np.timedelta64 | None) -> np.ndarray:
        """(T,) index of the vector valid at each time, -1 where none is.

        The last vector emitted at s <= t is valid iff t - s < maximum_forward_fill (strict); None = for ever.
        """
        index = np.searchsorted(self.times, times, side="right") - 1
        if maximum_forward_fill is None or not len(self.times):
            return index
        age = times - self.times[np.maximum(index, 0)]
        return np.where((index >= 0) & (age < maximum_forward_fill), index, -1)


class Signal(Spec):
    """Where a portfolio wants to be. Its uid is independent of namespace and of who consumes it.

    override_asset  an asset whose price is published as the portfolio's close; the computed value is kept beside it
    """

    override_asset: AssetIdentifier | None = None

    @property
    def override(self) -> tuple[str, ...]:
        """The override asset, if any, as a collection."""
        return (self.override_asset,) if self.override_asset else ()

    @property
    def universe(self) -> tuple[str, ...]:
        """Assets that the signal may ever name, bytewise order: they bound the window of its portfolios."""
        raise NotImplementedError

    @property
    def maximum_forward_fill(self) -> np.timedelta64 | None:
        """How long a vector stays valid; None = until the next one."""
        raise NotImplementedError

    def emit(self, since: np.datetime64 | None, through: np.datetime64) -> Vectors:
        """Vectors with since < time <= through; the same ones however the range is split."""
        raise NotImplementedError

    def explanation(self) -> str:
        """One sentence for people."""
        return (type(self).__doc__ or self.kind).strip().splitlines()[0]


class ConstantSignal(Signal):
    """A signal of one vector, emitted at `effective_from` (aware; default 1970-01-01 UTC) and valid for ever."""

    effective_from: AwareDatetime = EPOCH

    def weights(self) -> Floats:
        """(N,) target weights in the order of `universe`."""
        raise NotImplementedError

    @property
    def maximum_forward_fill(self) -> np.timedelta64 | None:
        return None

    def emit(self, since: np.datetime64 | None, through: np.datetime64) -> Vectors:
        time = utc(self.effective_from, "effective_from")
        due = time <= through and (since is None or time > since)
        rows = slice(0, 1 if due else 0)
        return Vectors(np.array([time])[rows], self.universe, self.weights()[None, :][rows])


def sorted_unique(identifiers: Sequence[str], what: str) -> tuple[str, ...]:
    """Bytewise order, so that spelling order never reaches a uid. Raises ValueError for duplicates."""
    ordered = tuple(sorted(identifiers))
    repeated = sorted({a for a, b in pairwise(ordered) if a == b})
    if repeated:
        raise ValueError(f"{what} names {', '.join(repeated)} more than once")
    return ordered
