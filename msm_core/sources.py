"""Price sources: what the catalogue and the database tell of them, and their bars, read set-based and straight into arrays.

A source is anyone's table or view with the price grain. Its names are those of the database, letter by letter: `bars` or `vendor.bars`.
"""

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from functools import cached_property
from typing import NamedTuple

import numpy as np
from psycopg import sql
from sqlalchemy import Connection

from msm_core.copying import fetch
from msm_core.errors import SourceUnusable
from msm_core.frames import BEGINNING, NEVER, Series, SignalRows, utc
from msm_core.interpolation import NUMBERS, Carry, PriceBars
from msm_core.models import (
    AssetTable,
    InterpolatedPricesStorage,
    PortfolioIndexValuesStorage,
    PortfoliosStorage,
    TimeIndexMetaTable,
)

GRAIN = ("asset_identifier", "time_index")
SCOPES = {s.__storage_kind__: s.__scope__ for s in (PortfoliosStorage, PortfolioIndexValuesStorage)}  # values that we publish
TEXT_TYPES = {"text", "character varying"}
TIME_TYPE = "timestamp with time zone"
NUMERIC_TYPES = {"double precision", "real", "numeric", "smallint", "integer", "bigint"}

# -- what there is ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A price storage as the catalogue knows it.

    kind        prices: somebody else's; interpolated_prices: made by this system, under the policy in `components`
    cadence     length of a bar, `1d`; None = not told
    columns     name -> type of its live table
    readable    this role may select
    """

    uid: uuid.UUID
    identifier: str
    table: str
    kind: str
    cadence: str | None
    time_label: str
    components: Mapping[str, str]
    columns: Mapping[str, str]
    readable: bool

    @property
    def margin(self) -> timedelta:
        """How long before it becomes known a bar may be stamped: one labelled by its date, in any time zone."""
        return timedelta(days=2) if self.time_label == "session_date" else timedelta(0)

    @property
    def is_inside(self) -> bool:
        """Written by this very system: read in the claiming transaction, and by nobody's snapshot."""
        return self.kind in ("interpolated_prices", *SCOPES)

    @property
    def scope(self) -> str:
        """The column that says whose numbers a row holds."""
        return SCOPES.get(self.kind, "asset_identifier")

    @cached_property
    def problems(self) -> list[str]:
        """What keeps it from being read, each with its remedy."""
        return grain_problems(self.columns, self.readable, self.scope)

    @cached_property
    def numeric(self) -> list[str]:
        return sorted(name for name, type_ in self.columns.items() if type_.split("(")[0] in NUMERIC_TYPES)


@dataclass(frozen=True)
class LiveTable:
    """A table or view as the database has it now.

    kind      r table, p partitioned table, v view, m materialised view, f foreign table
    columns   name -> type
    readable  this role may select; writable: it may insert and update
    unique    an index allows one row per asset and time, so an upsert can go by it
    rows      an estimate (pg_class.reltuples); None = the server has none
    """

    schema: str
    name: str
    kind: str
    columns: Mapping[str, str]
    readable: bool
    writable: bool
    unique: bool
    rows: int | None

    @property
    def create_index(self) -> str:
        """The statement that makes it unique."""
        return f"CREATE UNIQUE INDEX ON {sql.Identifier(self.schema, self.name).as_string()} ({', '.join(GRAIN)})"


# pg_class is asked by name: to_regclass raises where the role may not use the schema, and one such source would hide all others
LIVE = sql.SQL("""
    SELECT n.nspname::text, c.relname::text, c.relkind::text,
        (SELECT coalesce(jsonb_object_agg(a.attname, format_type(a.atttypid, a.atttypmod)), '{{}}')
         FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped) AS columns,
        has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT') AS readable,
        has_table_privilege(c.oid, 'INSERT') AND has_table_privilege(c.oid, 'UPDATE'),
        EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisunique AND i.indimmediate AND i.indisvalid
            AND i.indpred IS NULL AND i.indexprs IS NULL AND i.indnkeyatts = 2 AND '{{asset_identifier,time_index}}' =
            (SELECT array_agg(a.attname::text ORDER BY 1) FROM pg_attribute a
             WHERE a.attrelid = c.oid AND a.attnum = ANY ((i.indkey::int2[])[0:1]))),
        CASE WHEN c.reltuples >= 0 AND c.relkind <> 'v' THEN c.reltuples::bigint END
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace CROSS JOIN LATERAL string_to_array({name}, '.') p(parts)
    WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND c.relpersistence <> 't'
        AND c.relname = p.parts[cardinality(p.parts)]::name AND c.relname::text = p.parts[cardinality(p.parts)]
        AND CASE cardinality(p.parts) WHEN 1 THEN pg_table_is_visible(c.oid) WHEN 2 THEN n.nspname = p.parts[1] ELSE false END
""")


def live_table(connection: Connection, table: str) -> LiveTable | None:
    """The table or view of that name (`bars`, `vendor.bars`), or None."""
    found = fetch(connection, LIVE.format(name=sql.SQL("%(table)s::text")), {"table": table})
    return LiveTable(*found[0]) if found else None


def grain_problems(columns: Mapping[str, str], readable: bool, scope: str = "asset_identifier") -> list[str]:
    """What keeps a table with these columns (name -> type) from being a price source, each with its remedy; none = it is one."""
    if not columns:
        return ["its table does not exist. Create it, or register the right one with --replace (replace=True)"]
    asset, time = (columns.get(name, "absent") for name in (scope, "time_index"))
    values = [type_.split("(")[0] for name, type_ in columns.items() if name not in GRAIN]
    remedy = "make a view that gives it so"
    wrong = [
        (not readable, "this database role may not read it; GRANT USAGE on its schema and SELECT on it"),
        (asset.split("(")[0] not in TEXT_TYPES, f"{scope} must be text, not {asset}; {remedy}"),
        (time != TIME_TYPE, f"time_index must be {TIME_TYPE}, not {time}; {remedy}"),
        (NUMERIC_TYPES.isdisjoint(values), "it has no numeric column to take prices from"),
    ]
    return [problem for is_wrong, problem in wrong if is_wrong]


def read_sources(connection: Connection, uids: Iterable[uuid.UUID]) -> dict[uuid.UUID, Source]:
    """Catalogue entries by uid; one that is not registered is absent, one whose table does not exist has no columns."""
    found = fetch(connection, _catalogued(sql.SQL("m.uid = ANY(%(uids)s)")), {"uids": list(uids)})
    return {row[0]: Source(*row) for row in found}


def find_sources(connection: Connection, names: Sequence[str] | None) -> list[Source]:
    """Price sources by identifier or uid, all of them for None, in order of identifier."""
    condition = sql.SQL("""
        m.kind IN ('prices', 'interpolated_prices')
        AND (%(names)s::text[] IS NULL OR m.identifier = ANY(%(names)s) OR m.uid::text = ANY(%(names)s))
    """)
    return [Source(*row) for row in fetch(connection, _catalogued(condition), {"names": None if names is None else list(names)})]


def _catalogued(condition: sql.SQL) -> sql.Composed:
    return sql.SQL("""
        SELECT m.uid, m.identifier, m.physical_table_name, m.kind, m.cadence, m.time_label, m.identity_components,
               coalesce(l.columns, '{{}}'), coalesce(l.readable, false)
        FROM {catalogue} m LEFT JOIN LATERAL ({live}) l ON true WHERE {condition} ORDER BY m.identifier
    """).format(
        catalogue=sql.Identifier(TimeIndexMetaTable.__tablename__),
        live=LIVE.format(name=sql.SQL("m.physical_table_name")),
        condition=condition,
    )


# -- bars ---------------------------------------------------------------------------------------------------------------------


def price_coverage(
    connection: Connection, source: Source, column: str, assets: Sequence[str], as_of: datetime
) -> dict[str, tuple[datetime, datetime]]:
    """First and last bar time per asset with a value in `column`, up to `as_of`; an asset without bars is absent."""
    edge = sql.SQL("""
        (SELECT p.time_index FROM {table} p
         WHERE p.{scope} = a.asset AND p.time_index > '-infinity' AND p.time_index <= %(as_of)s AND p.{column} IS NOT NULL
         ORDER BY p.time_index {direction} LIMIT 1)""")
    parts = {"table": foreign_name(*source.table.split(".")), "column": foreign_name(column), "scope": sql.Identifier(source.scope)}
    statement = sql.SQL("SELECT a.asset, {first}, {last} FROM unnest(%(assets)s::text[]) a(asset)").format(
        first=edge.format(direction=sql.SQL("ASC"), **parts), last=edge.format(direction=sql.SQL("DESC"), **parts)
    )
    found = fetch(connection, statement, {"assets": list(assets), "as_of": as_of})
    return {asset: (first, last) for asset, first, last in found if first is not None}


def read_prices(
    connection: Connection, source: Source, column: str, assets: Sequence[str], since: datetime | None, through: datetime,
    liquidity_column: str | None = None,
) -> dict[str, Series]:  # fmt: skip
    """Bars with since <= time <= through, one array row per asset. A null price is no bar. Raises SourceUnusable for duplicate bars.

    Of values that we publish, the assets are portfolios or indexes.
    """
    volume = "coalesce(p.volume::float8, 'NaN')" if "volume" in source.numeric else "'NaN'::float8"
    asked = sql.SQL("coalesce(p.{}::float8, 'NaN')").format(foreign_name(liquidity_column)) if liquidity_column else sql.SQL("NULL::float8")
    statement = sql.SQL("""
        SELECT a.asset, s.times, s.prices, s.volumes, s.liquidity FROM unnest(%(assets)s::text[]) a(asset) CROSS JOIN LATERAL (
            SELECT array_agg(q.time_index), array_agg(q.price), array_agg(q.volume), {aggregate} FROM (
                SELECT p.time_index, p.{column}::float8 AS price, {volume} AS volume, {asked} AS liquidity FROM {table} p
                WHERE p.{scope} = a.asset AND p.time_index >= %(since)s AND p.time_index <= %(through)s AND p.{column} IS NOT NULL
                ORDER BY p.time_index) q) s(times, prices, volumes, liquidity)
        WHERE s.times IS NOT NULL
    """).format(
        scope=sql.Identifier(source.scope),
        column=foreign_name(column),
        volume=sql.SQL(volume),
        asked=asked,
        aggregate=sql.SQL("array_agg(q.liquidity)" if liquidity_column else "NULL"),
        table=foreign_name(*source.table.split(".")),
    )
    found = fetch(connection, statement, {"assets": list(assets), "since": since or BEGINNING, "through": through})
    series = {asset: Series(*arrays) for asset, *arrays in found}
    for asset, bars in series.items():
        if not (np.diff(bars.times) > np.timedelta64(0)).all():
            why = f"{asset} has two bars at one time; make (time_index, asset_identifier) unique"
            raise SourceUnusable(source=source.identifier, why=why)
    return series


def read_weight_rows(connection: Connection, source: Source, column: str, since: datetime | None, through: datetime) -> SignalRows:
    """Rows of a table of weights with since < time <= through, in key order; a null weight is NaN."""
    statement = sql.SQL("""
        SELECT array_agg(q.time_index), array_agg(q.asset_identifier), array_agg(q.weight) FROM (
            SELECT p.time_index, p.asset_identifier::text, coalesce(p.{column}::float8, 'NaN') AS weight FROM {table} p
            WHERE p.time_index > %(since)s AND p.time_index <= %(through)s ORDER BY p.time_index, p.asset_identifier::text COLLATE "C") q
    """).format(column=foreign_name(column), table=foreign_name(*source.table.split(".")))
    times, assets, weights = fetch(connection, statement, {"since": since or BEGINNING, "through": through})[0]
    if times is None:
        return SignalRows(np.empty(0, "datetime64[us]"), [], np.empty(0))
    return SignalRows(times, assets, weights)


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


class AssetFacts(NamedTuple):
    """calendar_uid: None = it trades around the clock; delisted_on: local date of its last trading day, None = it is listed."""

    calendar_uid: uuid.UUID | None
    delisted_on: date | None


def read_assets(connection: Connection, assets: Iterable[str]) -> dict[str, AssetFacts]:
    """What the registry says of those of `assets` that are registered."""
    statement = sql.SQL("SELECT unique_identifier, calendar_uid, delisted_on FROM {table} WHERE unique_identifier = ANY(%(assets)s)")
    found = fetch(connection, statement.format(table=sql.Identifier(AssetTable.__tablename__)), {"assets": sorted(assets)})
    return {asset: AssetFacts(*facts) for asset, *facts in found}


def delistings(assets: Mapping[str, AssetFacts]) -> dict[str, np.datetime64]:
    """Last trading days of those that have one."""
    return {asset: np.datetime64(facts.delisted_on, "D") for asset, facts in assets.items() if facts.delisted_on is not None}


def foreign_name(*parts: str) -> sql.Identifier:
    """A name chosen by others, quoted part by part; psycopg takes a percent sign for a placeholder even inside quotes."""
    return sql.Identifier(*(part.replace("%", "%%") for part in parts))
