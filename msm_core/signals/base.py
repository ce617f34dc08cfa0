"""What every signal is: a frozen spec that says where a portfolio wants to be, before any trading."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Annotated, ClassVar

import numpy as np
from pydantic import AfterValidator, AwareDatetime, Field, StringConstraints

from msm_core.alignment import Market
from msm_core.frames import Floats, SignalRows, Times, utc
from msm_core.identity import Spec, canonical_json, identity_of
from msm_core.price_sources import PriceSource
from msm_core.sessions import Sessions

AssetIdentifier = Annotated[str, StringConstraints(min_length=1, max_length=255)]

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


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
        if len(rows.times) and rows.times[0] == rows.times[-1]:  # one vector: what most batches of a night find
            return cls(rows.times[:1], tuple(rows.assets), rows.weights[None, :])
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


@dataclass(frozen=True)
class Request:
    """Numbers that a computed signal is given: one column of one source, for some assets (or portfolios, or indexes).

    zero_allowed  0 is a valid number of it, as of a volume; a price must be above 0
    """

    name: str
    source: PriceSource
    column: str
    identifiers: tuple[str, ...]
    zero_allowed: bool = False


@dataclass(frozen=True)
class WeightsLocation:
    """Where a signal's vectors are read from: a registered storage with rows (time_index, asset_identifier, column), or a file."""

    source: PriceSource | None
    column: str
    path: str | None = None


@dataclass(frozen=True)
class Inputs:
    """What a signal's `requests` and `weights_location` brought; nothing of it is later than the run's as-of.

    panels  by name of the request, all on one grid: the valuation times of the signal's calendar and frequency
    rows    of the weights location, in key order: time, then asset
    """

    sessions: Sessions | None = None
    panels: Mapping[str, Market] = field(default_factory=dict)
    rows: SignalRows | None = None


NOTHING = Inputs()


class Signal(Spec):
    """Where a portfolio wants to be. Its uid is independent of namespace and of who consumes it.

    override_asset  an asset whose price is published as the portfolio's close; the computed value is kept beside it
    """

    code_version: ClassVar[str] = "1"  # bump when a change of the signal changes numbers that are already stored

    override_asset: AssetIdentifier | None = Field(
        default=None, description="asset whose price is published as the portfolio's close; the computed value is kept beside it"
    )

    def _uid(self) -> str:
        """As of any spec; of a price source only what changes numbers counts."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        sources = {n: canonical_json(s.identity_payload) for n, s in values.items() if isinstance(s, PriceSource)}
        return identity_of({**self.canonical_fields, **sources})

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

    @property
    def requests(self) -> tuple[Request, ...]:
        """Numbers that `emit` must be given; none for a signal that needs nothing."""
        return ()

    @property
    def weights_location(self) -> WeightsLocation | None:
        """Where its vectors are read, for a signal that others compute."""
        return None

    def emit(self, since: np.datetime64 | None, through: np.datetime64, inputs: Inputs = NOTHING) -> Vectors:
        """Vectors with since < time <= through; the same ones however the range is split."""
        raise NotImplementedError

    def explanation(self) -> str:
        """One sentence for people."""
        return (type(self).__doc__ or self.kind).strip().splitlines()[0]


def sorted_unique(identifiers: Sequence[str], what: str) -> tuple[str, ...]:
    """Bytewise order, so that spelling order never reaches a uid. Raises ValueError for duplicates."""
    ordered = tuple(sorted(identifiers))
    if len(set(ordered)) < len(ordered):
        repeated = sorted({a for a, b in pairwise(ordered) if a == b})
        raise ValueError(f"{what} names {', '.join(repeated)} more than once")
    return ordered


Universe = Annotated[tuple[AssetIdentifier, ...], Field(min_length=1), AfterValidator(lambda assets: sorted_unique(assets, "asset_list"))]


class ListedSignal(Signal):
    """A signal whose universe is a list, and whose vectors stay valid for a while."""

    asset_list: Universe = Field(description="assets that the signal may name; they bound its window, and that of its portfolios")
    forward_fill: timedelta | None = Field(
        default=None, gt=timedelta(0), description="how long a vector stays valid; none: until the next one"
    )

    @property
    def universe(self) -> tuple[str, ...]:
        return self.asset_list

    @property
    def maximum_forward_fill(self) -> np.timedelta64 | None:
        return None if self.forward_fill is None else np.timedelta64(self.forward_fill)


class ConstantSignal(Signal):
    """A signal of one vector, emitted at `effective_from` (aware; default 1970-01-01 UTC) and valid for ever."""

    effective_from: AwareDatetime = Field(default=EPOCH, description="instant at which the vector is emitted")

    def weights(self) -> Floats:
        """(N,) target weights in the order of `universe`."""
        raise NotImplementedError

    @property
    def maximum_forward_fill(self) -> np.timedelta64 | None:
        return None

    def emit(self, since: np.datetime64 | None, through: np.datetime64, inputs: Inputs = NOTHING) -> Vectors:
        time = utc(self.effective_from, "effective_from")
        if time > through or (since is not None and time <= since):
            return Vectors(np.empty(0, "datetime64[us]"), self.universe, np.empty((0, len(self.universe))))
        return Vectors(np.array([time]), self.universe, self.weights()[None, :])
