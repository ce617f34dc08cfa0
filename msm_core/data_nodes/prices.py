"""Price sources as nodes, and the one road by which bars get into a table: checked, staged, merged - whole or not at all.

Frames come by `publish_prices` or a producer of one's own (`ExternalPrices`), files by `msm_core.data_nodes.loading`.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

import numpy as np
import pandas as pd
from psycopg import sql
from sqlalchemy import Connection, Engine

from msm_core.configuration import PriceTypeNames
from msm_core.copying import Column, Text, copy_in, driver_connection, execute, fetch
from msm_core.data_nodes.base import NodeResult
from msm_core.database import get_engine, retrying, transaction
from msm_core.errors import InvalidFrame, UnknownAssets
from msm_core.frames import Floats, Times, iso, to_datetime, utc
from msm_core.identity import logical_identifier, storage_uid
from msm_core.models import AssetTable, ExternalPricesStorage
from msm_core.price_sources import PRICE_SOURCES, PriceSource
from msm_core.sources import NUMERIC_TYPES, foreign_name
from msm_core.storage import verify_prepared

KEY = ("asset_identifier", "time_index")
PRICES = frozenset(str(name) for name in PriceTypeNames)
SIZES = frozenset(("volume", "trade_count"))
NUMBERS = ("open", "high", "low", "close", "volume", "trade_count", "vwap")
TIMES = ("open_time",)
STAGE = "msm_staged_prices"
SLOTS = {  # type of a column -> type in the stage
    **dict.fromkeys(NUMERIC_TYPES, "float8"),
    "timestamp with time zone": "timestamptz",
    "text": "text",
    "character varying": "text",
}


@PRICE_SOURCES.register
class APIDataNode(PriceSource):
    """A node that only points: a storage in the catalogue, written by whoever writes it."""

    kind: Literal["api_data_node"] = "api_data_node"
    time_index_meta_table_uid: UUID

    @classmethod
    def build_from_table_uid(cls, uid: UUID | str) -> "APIDataNode":
        """The storage with that catalogue uid; whether it is registered is checked when a plan is made."""
        return cls(time_index_meta_table_uid=UUID(str(uid)))

    @classmethod
    def build_from_identifier(cls, identifier: str) -> "APIDataNode":
        """The storage with that logical identifier, for example `ExternalPricesTS`; the process namespace is applied."""
        return cls(time_index_meta_table_uid=storage_uid(logical_identifier(identifier)))

    @property
    def source_uid(self) -> UUID:
        return self.time_index_meta_table_uid


class ExternalPrices(PriceSource):
    """A producer of bars of one's own. A subclass gives `update`; what it needs to know are its fields.

    Configurations never hold it: what they get is a pointer to ExternalPrices, where `run` publishes.
    """

    kind: str = "external_prices"

    def update(self) -> pd.DataFrame:
        """The bars there are, in the form that `publish_prices` takes."""
        raise NotImplementedError

    def run(
        self, debug_mode: bool = True, update_tree: bool = True, force_update: bool = False, as_of: datetime | None = None
    ) -> NodeResult:
        """Publish what `update` gives; asked again, it writes nothing.

        debug_mode, update_tree, force_update  accepted for callers of the documented form; a producer depends on no other node
        as_of                                  bars after this instant are left out; default: none are
        Raises StorageNotPrepared before anything is produced, InvalidFrame, UnknownAssets.
        """
        engine, started = get_engine(), time.perf_counter()
        with engine.connect() as connection:
            verify_prepared(connection)
        bars = _bars(self.update())
        if as_of is not None:
            bars = bars.where(bars.times <= utc(as_of, "as_of"))
        rows = _publish(engine, bars)
        newest = to_datetime(bars.times.max()) if len(bars.times) else None
        seconds = time.perf_counter() - started
        return NodeResult("prices", ExternalPricesStorage.logical_name(), "landed" if rows else "up_to_date", rows, newest, seconds=seconds)

    @property
    def source_uid(self) -> UUID:
        return ExternalPricesStorage.storage_uid()

    @property
    def pointer(self) -> PriceSource:
        return APIDataNode(time_index_meta_table_uid=self.source_uid)


def publish_prices(engine: Engine, frame: pd.DataFrame) -> int:
    """Insert or correct bars in ExternalPrices, whole or not at all; bars that are there already, unchanged, are not written.

    frame   columns time_index (aware, end of the bar), asset_identifier, and any of open, high, low, close, volume, trade_count, vwap
            (float, NaN = unknown) and open_time (aware); one row per asset and time, in any order
    Returns the rows inserted or changed. Raises InvalidFrame, naming the first bar that is wrong, and UnknownAssets.
    """
    return _publish(engine, _bars(frame))


# -- checked ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bars:
    """Bars of any assets: rows (R,) says where each stands in what was given; NaN, NaT and empty text are null."""

    rows: Floats
    assets: Text
    times: Times
    values: Mapping[str, Column]

    def where(self, mask: np.ndarray) -> "Bars":
        def kept(column: Column) -> Any:
            return Text(column.codes[mask], column.categories) if isinstance(column, Text) else column[mask]

        return Bars(self.rows[mask], kept(self.assets), self.times[mask], {name: kept(column) for name, column in self.values.items()})


def unusable(column: str, values: Floats) -> np.ndarray:
    """Mask of numbers that may not stand in that column; NaN is null, and may."""
    low = values <= 0 if column.lower() in PRICES else values < 0 if column.lower() in SIZES else np.zeros(len(values), bool)
    return np.isinf(values) | low


def requirement(column: str) -> str:
    """What `unusable` asks of that column."""
    if column.lower() in PRICES:
        return "a price must be finite and above 0"
    return f"{column} must be finite and 0 or more" if column.lower() in SIZES else "a number must be finite"


def _bars(frame: pd.DataFrame) -> Bars:
    """The frame, checked. Raises InvalidFrame for what is missing, unknown, naive, given twice, or no price."""
    missing = [name for name in KEY if name not in frame]
    unknown = [str(name) for name in frame if name not in (*KEY, *NUMBERS, *TIMES)]
    if missing or unknown or len(frame.columns) <= len(KEY):
        why = f"missing columns {missing or 'none'}, unknown columns {unknown or 'none'}; prices are any of {', '.join(NUMBERS)}"
        raise InvalidFrame(what="prices", why=why)
    codes, assets = pd.factorize(frame["asset_identifier"])
    times = _times(frame["time_index"])
    keyless = (codes < 0) | np.isnat(times)
    if keyless.any() or not all(isinstance(asset, str) for asset in assets):
        raise InvalidFrame(what="prices", why=f"row {int(keyless.argmax())} has no asset_identifier (a text) or no time_index")
    repeated = frame.duplicated(list(KEY)).to_numpy()
    if repeated.any():
        raise InvalidFrame(what="prices", why=f"{assets[codes[repeated][0]]} has two bars at {iso(times[repeated][0])}")
    values: dict[str, Column] = {name: _times(frame[name]) for name in TIMES if name in frame}
    for name in (name for name in NUMBERS if name in frame):
        numbers = values[name] = frame[name].to_numpy(np.float64, na_value=np.nan)
        if (wrong := unusable(name, numbers)).any():
            bar = f"{name} of {assets[codes[wrong][0]]} at {iso(times[wrong][0])} is {numbers[wrong][0]}"
            raise InvalidFrame(what="prices", why=f"{bar}; {requirement(name)}")
    return Bars(np.arange(len(frame), dtype=np.float64), Text(codes, tuple(assets)), times, values)


def _times(column: Any) -> Times:
    if not isinstance(column.dtype, pd.DatetimeTZDtype):
        raise InvalidFrame(what="prices", why=f"{column.name} must be aware datetimes, for example pd.to_datetime(..., utc=True)")
    return column.dt.tz_convert("UTC").dt.tz_localize(None).to_numpy().astype("datetime64[us]")


# -- staged and merged --------------------------------------------------------------------------------------------------------


def _publish(engine: Engine, bars: Bars) -> int:
    types = {name: "timestamp with time zone" if name in TIMES else "double precision" for name in bars.values}

    def publish() -> int:
        with transaction(engine) as connection:
            stage = Stage(connection, ExternalPricesStorage.__tablename__, types, marks=True)
            stage.add(bars)
            if unknown := sorted(asset for asset, _ in stage.unknown_assets()):
                raise UnknownAssets(owner="prices", assets=", ".join(unknown[:20]))
            return stage.merge()

    return retrying()(publish)


class Stage:
    """Bars on their way into a table, in a temporary one that ends with the transaction.

    table    `bars` or `vendor.bars`, unique by asset and time
    columns  its columns that are given -> their types, all of them in SLOTS
    marks    it has a column `interpolated`, which observed bars have false
    """

    def __init__(self, connection: Connection, table: str, columns: Mapping[str, str], marks: bool) -> None:
        self.connection, self.table, self.marks, self.rows = connection, foreign_name(*table.split(".")), marks, 0
        self.types = {name: type_.split("(")[0] for name, type_ in columns.items()}
        self.slots = {name: f"v{place}" for place, name in enumerate(columns)}  # names of ours: theirs may be any text
        slots = "".join(f", {self.slots[name]} {SLOTS[type_]}" for name, type_ in self.types.items())
        statement = f'CREATE TEMPORARY TABLE {STAGE} ("row" float8, asset text COLLATE "C", time timestamptz{slots}) ON COMMIT DROP'
        execute(connection, sql.SQL(statement), {})  # type: ignore[arg-type] - words of ours only

    def add(self, bars: Bars) -> None:
        block = {"row": bars.rows, "asset": bars.assets, "time": bars.times}
        block |= {slot: bars.values[name] for name, slot in self.slots.items()}
        self.rows += copy_in(self.connection, STAGE, block)

    def repeated(self) -> Iterator[tuple[int, str, datetime]]:
        """(row, asset, time) of every row whose asset and time another row has too, in order; streamed, however many there are."""
        statement = sql.SQL("""
            SELECT s.row::bigint, s.asset, s.time FROM {stage} s
            WHERE (s.asset, s.time) IN (SELECT asset, time FROM {stage} GROUP BY 1, 2 HAVING count(*) > 1) ORDER BY 1, 2
        """)
        with driver_connection(self.connection).cursor(name="repeated") as cursor:
            yield from cursor.execute(statement.format(stage=sql.Identifier(STAGE)))

    def unknown_assets(self) -> list[tuple[str, int]]:
        """Assets that are not registered, with the first row of each, in the order of those rows."""
        statement = sql.SQL("""
            SELECT s.asset, min(s.row)::bigint FROM {stage} s LEFT JOIN {assets} a ON a.unique_identifier = s.asset
            WHERE a.uid IS NULL GROUP BY 1 ORDER BY 2, 1
        """).format(stage=sql.Identifier(STAGE), assets=sql.Identifier(AssetTable.__tablename__))
        return fetch(self.connection, statement, {})

    def give_calendar(self, uid: UUID) -> None:
        """Make it the calendar of the staged assets that have none."""
        statement = sql.SQL("""
            UPDATE {assets} SET calendar_uid = %(uid)s WHERE calendar_uid IS NULL AND unique_identifier IN (SELECT asset FROM {stage})
        """).format(stage=sql.Identifier(STAGE), assets=sql.Identifier(AssetTable.__tablename__))
        execute(self.connection, statement, {"uid": uid})

    def span(self) -> tuple[int, datetime | None, datetime | None]:
        """Number of assets, first and last time."""
        statement = sql.SQL("SELECT count(DISTINCT asset), min(time), max(time) FROM {}").format(sql.Identifier(STAGE))
        return fetch(self.connection, statement, {})[0]

    def merge(self) -> int:
        """Insert what is new, change what differs; returns the rows written. A null overwrites; a column that is not given stays."""
        names = [foreign_name(name) for name in self.types]
        changes = [sql.SQL("{0} = EXCLUDED.{0}").format(name) for name in names]
        same = "({old}) IS DISTINCT FROM ({new})"
        statement = sql.SQL("""
            INSERT INTO {table} AS t (asset_identifier, time_index, {names}) SELECT asset, time, {values} FROM {stage} ORDER BY asset, time
            ON CONFLICT (asset_identifier, time_index) DO UPDATE SET {changes} WHERE {differs}
        """).format(
            table=self.table,
            stage=sql.Identifier(STAGE),
            names=sql.SQL(", ").join([*names, *([sql.SQL("interpolated")] if self.marks else [])]),
            values=sql.SQL(", ").join([*map(self._value, self.types), *([sql.SQL("false")] if self.marks else [])]),
            changes=sql.SQL(", ").join([*changes, *([sql.SQL("interpolated = false")] if self.marks else [])]),
            differs=sql.SQL(f"{same} OR t.interpolated" if self.marks else same).format(
                old=sql.SQL(", ").join(sql.SQL("t.{}").format(name) for name in names),
                new=sql.SQL(", ").join(sql.SQL("EXCLUDED.{}").format(name) for name in names),
            ),
        )
        return execute(self.connection, statement, {})

    def _value(self, name: str) -> sql.Composed:
        """The staged value as its column takes it. A cast from float8 to numeric keeps 15 digits only; by way of text all are kept."""
        form = {"numeric": "{}::text::numeric", "text": "nullif({}, '')", "character varying": "nullif({}, '')"}
        return sql.SQL(form.get(self.types[name], "{}")).format(sql.Identifier(self.slots[name]))  # type: ignore[arg-type]
