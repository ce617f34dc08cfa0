"""Bars of many assets, read set-based and straight into arrays."""

import uuid
from collections.abc import Sequence
from datetime import datetime

import numpy as np
from psycopg import sql
from sqlalchemy import Connection

from msm_core.copying import fetch
from msm_core.frames import NEVER, utc
from msm_core.interpolation import NUMBERS, Carry, PriceBars
from msm_core.models import AssetTable, InterpolatedPricesStorage
from msm_core.storage import BEGINNING, Source, foreign_name


def read_bars(
    connection: Connection, source: Source, assets: Sequence[str], since: Sequence[datetime | None], through: datetime
) -> PriceBars:
    """Bars of each asset with its own since < time <= through (None: from the beginning) and a close, in one statement.

    Columns that the source does not have are null.
    """
    numbers = [name for name in NUMBERS if name in source.numeric]
    columns = {name: f"coalesce(p.{name}::float8, 'NaN')" for name in numbers}  # names of ours, not the source's
    if source.columns.get("open_time") == "timestamp with time zone":
        columns["open_time"] = "coalesce(p.open_time, '-infinity')"  # NaT, once it is an array
    if source.columns.get("interpolated") == "boolean":
        columns["interpolated"] = "coalesce(p.interpolated, false)::int::float8"
    statement = sql.SQL("""
        SELECT a.place, s.* FROM unnest(%(assets)s::text[], %(since)s::timestamptz[]) WITH ORDINALITY a(asset, since, place)
        CROSS JOIN LATERAL (
            SELECT array_agg(q.time_index) AS times, {aggregates} FROM (
                SELECT p.time_index, {columns} FROM {table} p
                WHERE p.asset_identifier = a.asset AND p.time_index > a.since AND p.time_index <= %(through)s AND p.close IS NOT NULL
                ORDER BY p.time_index) q) s
        WHERE s.times IS NOT NULL ORDER BY a.place
    """).format(
        aggregates=sql.SQL(", ").join(sql.SQL("array_agg(q.{0})").format(sql.Identifier(name)) for name in columns),
        columns=sql.SQL(", ").join(sql.SQL(f"{column} AS {{}}").format(sql.Identifier(name)) for name, column in columns.items()),  # type: ignore[arg-type]
        table=foreign_name(*source.table.split(".")),
    )
    parameters = {"assets": list(assets), "since": [s or BEGINNING for s in since], "through": through}
    found = fetch(connection, statement, parameters)
    counts = [len(row[1]) for row in found]
    read = {name: np.concatenate([row[i + 2] for row in found]) for i, name in enumerate(columns)} if found else {}
    rows = sum(counts)
    return PriceBars(
        asset=np.repeat([row[0] - 1 for row in found], counts).astype(np.int64),
        times=np.concatenate([row[1] for row in found]) if found else np.empty(0, "datetime64[us]"),
        numbers={name: read.get(name, np.full(rows, np.nan)) for name in NUMBERS},
        open_times=read.get("open_time", np.full(rows, NEVER)),
        interpolated=read.get("interpolated", np.zeros(rows)) != 0,
    )


def read_carry(
    connection: Connection, storage: type[InterpolatedPricesStorage], assets: Sequence[str], times: Sequence[datetime | None]
) -> Carry:
    """What is stored of each asset at its watermark (None: nothing); an asset whose row is not there has a NaN close."""
    statement = sql.SQL("""
        SELECT k.place, coalesce(p.close, 'NaN'), coalesce(p.vwap, 'NaN')
        FROM unnest(%(assets)s::text[], %(times)s::timestamptz[]) WITH ORDINALITY k(asset, time, place)
        JOIN {table} p ON p.asset_identifier = k.asset AND p.time_index = k.time
    """).format(table=sql.Identifier(storage.__tablename__))
    close, vwap = np.full(len(assets), np.nan), np.full(len(assets), np.nan)
    for place, *values in fetch(connection, statement, {"assets": list(assets), "times": list(times)}):
        close[place - 1], vwap[place - 1] = values
    known = [NEVER if t is None else utc(t, "watermark") for t in times]
    return Carry(np.array(known, "datetime64[us]"), close, vwap)


def read_asset_calendars(connection: Connection, assets: Sequence[str]) -> dict[str, uuid.UUID | None]:
    """Uid of the calendar of each registered asset, None for one that trades around the clock."""
    statement = sql.SQL("SELECT unique_identifier, calendar_uid FROM {table} WHERE unique_identifier = ANY(%(assets)s)")
    return dict(fetch(connection, statement.format(table=sql.Identifier(AssetTable.__tablename__)), {"assets": list(assets)}))
