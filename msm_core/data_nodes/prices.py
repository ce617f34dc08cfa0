"""Price sources as nodes, and publication of bars for people who have no producer of their own."""

from typing import Literal
from uuid import UUID

import numpy as np
import pandas as pd
from psycopg import sql
from sqlalchemy import Engine

from msm_core.configuration import PRICE_SOURCES, PriceSource
from msm_core.copying import Block, Text, copy_in, execute
from msm_core.database import transaction
from msm_core.errors import InvalidFrame, UnknownAssets
from msm_core.identity import logical_identifier, storage_uid
from msm_core.models import ExternalPricesStorage
from msm_core.storage import known_assets

KEY = ("asset_identifier", "time_index")
NUMBERS = ("open", "high", "low", "close", "volume", "trade_count", "vwap")
TIMES = ("open_time",)
STAGE = "msm_staged_prices"


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


def publish_prices(engine: Engine, frame: pd.DataFrame) -> int:
    """Insert or correct bars in ExternalPrices, whole or not at all; bars that are there already, unchanged, are not written.

    frame   columns time_index (aware, end of the bar), asset_identifier, and any of open, high, low, close, volume, trade_count, vwap
            (float, NaN = unknown) and open_time (aware); one row per asset and time, in any order
    Returns the rows inserted or changed. Raises InvalidFrame, UnknownAssets.
    """
    block = _block(frame)
    names = [sql.Identifier(name) for name in block]
    values = [sql.Identifier(name) for name in block if name not in KEY]
    with transaction(engine) as connection:
        identifiers = set(frame["asset_identifier"])
        unknown = sorted(identifiers - known_assets(connection, identifiers))
        if unknown:
            raise UnknownAssets(owner="prices", assets=", ".join(unknown[:20]))
        stage, target = sql.Identifier(STAGE), sql.Identifier(ExternalPricesStorage.__tablename__)
        execute(connection, sql.SQL("CREATE TEMPORARY TABLE {} (LIKE {}) ON COMMIT DROP").format(stage, target), {})
        copy_in(connection, STAGE, block)
        statement = sql.SQL("""
            INSERT INTO {target} AS t ({names}, interpolated) SELECT {names}, false FROM {stage}
            ON CONFLICT (asset_identifier, time_index) DO UPDATE SET {assignments} WHERE ({old}) IS DISTINCT FROM ({new})
        """).format(
            target=target,
            stage=stage,
            names=sql.SQL(", ").join(names),
            assignments=sql.SQL(", ").join(sql.SQL("{0} = EXCLUDED.{0}").format(name) for name in values),
            old=sql.SQL(", ").join(sql.SQL("t.{}").format(name) for name in values),
            new=sql.SQL(", ").join(sql.SQL("EXCLUDED.{}").format(name) for name in values),
        )
        return execute(connection, statement, {})


def _block(frame: pd.DataFrame) -> Block:
    """The frame as columns in key order. Raises InvalidFrame for what is missing, unknown, naive or given twice."""
    missing = [name for name in KEY if name not in frame]
    unknown = [str(name) for name in frame if name not in (*KEY, *NUMBERS, *TIMES)]
    if missing or unknown or len(frame.columns) <= len(KEY):
        why = f"missing columns {missing or 'none'}, unknown columns {unknown or 'none'}; prices are any of {', '.join(NUMBERS)}"
        raise InvalidFrame(what="prices", why=why)
    if frame.duplicated(list(KEY)).any():
        first = frame[frame.duplicated(list(KEY))].iloc[0]
        raise InvalidFrame(what="prices", why=f"{first['asset_identifier']} has two bars at {first['time_index']}")
    columns = {str(name): pd.Series(column) for name, column in frame.sort_values(list(KEY)).items()}
    codes, categories = pd.factorize(columns["asset_identifier"])
    block: dict[str, np.ndarray | Text] = {"asset_identifier": Text(codes, tuple(categories)), "time_index": _times(columns["time_index"])}
    block |= {name: _times(columns[name]) for name in TIMES if name in columns}
    return block | {name: columns[name].to_numpy(np.float64, na_value=np.nan) for name in NUMBERS if name in columns}


def _times(column: pd.Series) -> np.ndarray:
    if not isinstance(column.dtype, pd.DatetimeTZDtype):
        raise InvalidFrame(what="prices", why=f"{column.name} must be aware datetimes, for example pd.to_datetime(..., utc=True)")
    return column.dt.tz_convert("UTC").dt.tz_localize(None).to_numpy().astype("datetime64[us]")
