"""Bars of outside sources that this process has read under the snapshot of a run: the next batch of the run need not read them again.

All workers of a run see one state of the world, so what is kept is what would be read. Each worker process reads each asset once in a
run, whatever the number of batches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np
from sqlalchemy import Connection

from msm_core.frames import BEGINNING, Series, utc
from msm_core.sources import Source, read_prices

KEPT_BYTES_MAX = 256 * 1024 * 1024  # in each process; about 4 000 assets over ten years of days

SeriesKey = tuple[str, str, str | None, str]  # source uid, column, liquidity column, asset


@dataclass
class KeptPrices:
    """world  names the state that is kept, None = none; `since` and `series` are per asset, None for one without bars."""

    world: str | None = None
    since: dict[SeriesKey, datetime] = field(default_factory=dict)
    series: dict[SeriesKey, Series | None] = field(default_factory=dict)
    size_bytes: int = 0

    def read(
        self, world: str | None, connection: Connection, source: Source, column: str, assets: Sequence[str], since: datetime | None,
        through: datetime, liquidity_column: str | None = None,
    ) -> dict[str, Series]:  # fmt: skip
        """As `read_prices`, in one statement or in none. `world` must name everything that the answer hangs on, `through` too."""
        if world is None:
            return read_prices(connection, source, column, assets, since, through, liquidity_column)
        if world != self.world:
            self.forget(world)
        first = since or BEGINNING
        keys: dict[str, SeriesKey] = {asset: (str(source.uid), column, liquidity_column, asset) for asset in assets}
        missing = [asset for asset, key in keys.items() if key not in self.since or self.since[key] > first]
        answer = {asset: self.series[key] for asset, key in keys.items() if key in self.since}
        if missing:
            found = read_prices(connection, source, column, missing, since, through, liquidity_column)
            answer |= {asset: found.get(asset) for asset in missing}
            self._keep(world, {keys[asset]: answer[asset] for asset in missing}, first)
        cut = {asset: _from(answer[asset], first) for asset in assets}
        return {asset: series for asset, series in cut.items() if series is not None}

    def forget(self, world: str | None) -> None:
        self.world, self.size_bytes = world, 0
        self.since.clear()
        self.series.clear()

    def _keep(self, world: str, found: Mapping[SeriesKey, Series | None], since: datetime) -> None:
        """What would be too much takes the place of everything before it, or is not kept."""
        arrays = [array for series in found.values() for array in _arrays(series)]
        for array in arrays:
            array.flags.writeable = False  # many look at it
        new = sum(array.nbytes for array in arrays)
        if self.size_bytes + new > KEPT_BYTES_MAX:
            self.forget(world)
        if new <= KEPT_BYTES_MAX:
            self.size_bytes += new - sum(array.nbytes for key in found for array in _arrays(self.series.get(key)))
            self.series |= found
            self.since |= dict.fromkeys(found, since)


KEPT = KeptPrices()


def _arrays(series: Series | None) -> list[np.ndarray]:
    return [array for array in vars(series).values() if array is not None] if series else []


def _from(series: Series | None, since: datetime) -> Series | None:
    """Its bars at `since` and after; None where there are none."""
    if series is None or since == BEGINNING:
        return series
    rows = slice(int(np.searchsorted(series.times, utc(since, "since"))), None)
    return series.kept(rows) if rows.start < len(series.times) else None
