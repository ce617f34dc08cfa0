"""All SQL on the time-indexed tables that this system writes, prices apart: scoped reads, progress, appends.

Set-based: no statement per portfolio, asset or day.

Progress belongs to (storage, scope), in `DataNodeUpdate`; `max(time_index)` is never asked of a whole table. A change of progress is
a compare-and-set on `epoch` in the same transaction as the rows (design.md section 7, lab/reliability.md section 3).
"""

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

import numpy as np
from psycopg import sql
from sqlalchemy import Connection

from msm_core.copying import Block, Statement, copy_in, execute, fetch
from msm_core.errors import ProgressConflict, StorageNotPrepared
from msm_core.frames import LastTrade, SignalRows, to_datetime, utc
from msm_core.identity import node_uid
from msm_core.models import (
    LOADED_NAMESPACE,
    CalendarEventTable,
    CalendarSessionTable,
    CalendarTable,
    DataNodeUpdateTable,
    MetaTable,
    PortfolioRebalanceStateStorage,
    PortfoliosStorage,
    PortfolioWeightsStorage,
    SignalWeightsStorage,
    StorageTable,
)
from msm_core.rows import document, write_rows
from msm_core.sessions import Sessions

# -- what there is ------------------------------------------------------------------------------------------------------------


def verify_prepared(connection: Connection, tables: Iterable[type[MetaTable]] | None = None) -> None:
    """Raises StorageNotPrepared naming every table that is declared but does not exist; never creates one."""
    names = [t.__tablename__ for t in tables] if tables is not None else list(MetaTable.metadata.tables)
    statement = sql.SQL("SELECT n FROM unnest(%(names)s::text[]) n WHERE to_regclass(quote_ident(n)) IS NULL")
    missing = sorted(name for (name,) in fetch(connection, statement, {"names": names}))
    if missing:
        raise StorageNotPrepared(tables=", ".join(missing))


# -- calendars ----------------------------------------------------------------------------------------------------------------


def find_calendars(connection: Connection, keys: Iterable[str]) -> dict[str, list[tuple[str, uuid.UUID]]]:
    """Stored calendars per key: (unique_identifier, uid) of the one so identified, else of every one with that source_identifier."""
    statement = sql.SQL("""
        SELECT k.key, c.unique_identifier, c.uid FROM unnest(%(keys)s::text[]) k(key)
        JOIN {table} c ON c.unique_identifier = k.key
            OR (c.source_identifier = k.key AND NOT EXISTS (SELECT FROM {table} o WHERE o.unique_identifier = k.key))
        ORDER BY 1, 2
    """).format(table=_name(CalendarTable))
    found: dict[str, list[tuple[str, uuid.UUID]]] = {}
    for key, identifier, uid in fetch(connection, statement, {"keys": sorted(set(keys))}):
        found.setdefault(key, []).append((identifier, uid))
    return found


def read_sessions(connection: Connection, uids: Iterable[uuid.UUID]) -> dict[uuid.UUID, Sessions]:
    """All primary sessions of stored calendars."""
    statement = sql.SQL("""
        SELECT c.uid, c.unique_identifier, c.valid_from, c.valid_to, c.timezone, s.dates, s.opens, s.closes,
               (SELECT coalesce(jsonb_object_agg(e.event_type, e.dates), '{{}}') FROM (
                    SELECT t.event_type, jsonb_agg(DISTINCT t.event_date ORDER BY t.event_date) AS dates FROM {event} t
                    WHERE t.calendar_uid = c.uid AND t.event_date IS NOT NULL GROUP BY 1) e)
        FROM {calendar} c CROSS JOIN LATERAL (
            SELECT coalesce(array_agg(q.date), '{{}}'), coalesce(array_agg(q.opens_at), '{{}}'), coalesce(array_agg(q.closes_at), '{{}}')
            FROM (
                SELECT t.local_date::timestamp AT TIME ZONE 'UTC' AS date, t.opens_at, t.closes_at FROM {session} t
                WHERE t.calendar_uid = c.uid AND t.is_primary AND t.opens_at IS NOT NULL AND t.closes_at IS NOT NULL
                ORDER BY t.closes_at) q) s(dates, opens, closes)
        WHERE c.uid = ANY(%(uids)s)
    """).format(calendar=_name(CalendarTable), session=_name(CalendarSessionTable), event=_name(CalendarEventTable))
    return {
        uid: Sessions(
            name,
            dates.astype("datetime64[D]"),
            opens,
            closes,
            np.datetime64(first),
            np.datetime64(last),
            zone,
            {type_: np.array(days, "datetime64[D]") for type_, days in events.items()},
        )
        for uid, name, first, last, zone, dates, opens, closes, events in fetch(connection, statement, {"uids": list(uids)})
    }


# -- where rows lie -----------------------------------------------------------------------------------------------------------


def partitions_of(connection: Connection, storage: type[StorageTable], scopes: Sequence[str]) -> dict[str, int]:
    """Which partition of a hash-partitioned storage the rows of each scope lie in, or will; nothing for any other storage."""
    statement = sql.SQL("""
        SELECT s.scope, r.remainder
        FROM pg_partitioned_table p CROSS JOIN LATERAL (SELECT count(*)::int FROM pg_inherits i WHERE i.inhparent = p.partrelid) c(modulus)
        CROSS JOIN LATERAL generate_series(0, c.modulus - 1) r(remainder) CROSS JOIN unnest(%(scopes)s::varchar[]) s(scope)
        WHERE p.partrelid = to_regclass({name})
          AND CASE WHEN p.partstrat = 'h' THEN satisfies_hash_partition(p.partrelid, c.modulus, r.remainder, s.scope) END
    """).format(name=sql.Literal(_name(storage).as_string()))
    return dict(fetch(connection, statement, {"scopes": list(scopes)}))


# -- signals, weights, values -------------------------------------------------------------------------------------------------

RECENT = sql.SQL("interval '400 days'")  # looked at first: in a storage with a partition per year, the rest of them is left alone


def read_signal_weights(connection: Connection, signal_uids: Sequence[str], since: datetime, through: datetime) -> dict[str, SignalRows]:
    """Every vector emitted in (since, through], and the last one at or before `since`: it may still be valid."""
    statement = sql.SQL("""
        SELECT u.signal_uid, s.times, s.assets, s.weights FROM unnest(%(uids)s::text[]) u(signal_uid) CROSS JOIN LATERAL (
            SELECT array_agg(q.time_index), array_agg(q.asset_identifier::text), array_agg(q.signal_weight) FROM (
                SELECT w.time_index, w.asset_identifier, w.signal_weight FROM {table} w
                WHERE w.signal_uid = u.signal_uid AND w.time_index <= %(through)s AND w.time_index >= coalesce(
                    (SELECT max(m.time_index) FROM {table} m WHERE m.signal_uid = u.signal_uid
                        AND m.time_index <= %(since)s AND m.time_index > %(since)s - {recent}),
                    (SELECT max(m.time_index) FROM {table} m WHERE m.signal_uid = u.signal_uid AND m.time_index <= %(since)s), %(since)s)
                ORDER BY w.time_index, w.asset_identifier) q) s(times, assets, weights)
        WHERE s.times IS NOT NULL
    """).format(table=_name(SignalWeightsStorage), recent=RECENT)
    found = fetch(connection, statement, {"uids": list(signal_uids), "since": since, "through": through})
    return {signal_uid: SignalRows(*columns) for signal_uid, *columns in found}


def last_trades(connection: Connection, portfolios: Sequence[str], through: datetime | None = None) -> dict[str, LastTrade]:
    """The last weights vector per portfolio, struck at or before `through`; a portfolio that never traded is absent."""
    columns = """
        array_agg(q.time_index), array_agg(q.asset_identifier::text), array_agg(q.weight),
        array_agg(coalesce(q.price_current, 'NaN')), array_agg(coalesce(q.volume_current, 'NaN'))
    """
    found = _of_last_vectors(connection, portfolios, sql.SQL(columns), through)
    return {i: LastTrade(times[0], tuple(assets), weights, prices, volumes) for i, times, assets, weights, prices, volumes in found}


def held_assets(connection: Connection, portfolios: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Assets that have a weight in the last vector per portfolio, bytewise order: all that a plan needs of it."""
    columns = sql.SQL("coalesce(array_agg(q.asset_identifier::text) FILTER (WHERE q.weight <> 0), array[]::text[])")
    return {i: tuple(assets) for i, assets in _of_last_vectors(connection, portfolios, columns, None)}


def _of_last_vectors(
    connection: Connection, portfolios: Sequence[str], columns: Statement, through: datetime | None
) -> list[tuple[Any, ...]]:
    """(portfolio, columns): aggregates of the rows `q` of the last vector of each, in the order of assets; one without any is absent."""
    statement = sql.SQL("""
        SELECT u.id, s.* FROM unnest(%(ids)s::text[]) u(id) CROSS JOIN LATERAL (
            SELECT {columns} FROM (
                SELECT w.* FROM {table} w
                WHERE w.portfolio_identifier = u.id AND w.time_index = coalesce(
                    (SELECT max(m.time_index) FROM {table} m WHERE m.portfolio_identifier = u.id {through} AND m.time_index > (
                        SELECT max(p.watermark) - {recent} FROM {progress} p WHERE p.storage = %(storage)s AND p.scope = ANY(%(ids)s))),
                    (SELECT max(m.time_index) FROM {table} m WHERE m.portfolio_identifier = u.id {through}))
                ORDER BY w.asset_identifier) q HAVING count(*) > 0) s
    """).format(
        columns=columns,
        table=_name(PortfolioWeightsStorage),
        progress=_name(DataNodeUpdateTable),
        recent=RECENT,
        through=sql.SQL("" if through is None else "AND m.time_index <= %(through)s"),
    )
    given = {"ids": list(portfolios), "storage": PortfolioWeightsStorage.logical_name()}
    return fetch(connection, statement, given if through is None else given | {"through": through})


def last_values(connection: Connection, portfolios: Sequence[str], through: datetime) -> dict[str, tuple[np.datetime64, float]]:
    """(time, calculated_close) of the last value per portfolio at or before `through`; one without any is absent."""
    statement = sql.SQL("""
        SELECT u.id, v.time_index, v.calculated_close FROM unnest(%(ids)s::text[]) u(id) CROSS JOIN LATERAL (
            SELECT p.time_index, p.calculated_close FROM {table} p
            WHERE p.portfolio_identifier = u.id AND p.time_index <= %(through)s ORDER BY p.time_index DESC LIMIT 1) v
    """).format(table=_name(PortfoliosStorage))
    found = fetch(connection, statement, {"ids": list(portfolios), "through": through})
    return {i: (utc(time, "time_index"), value) for i, time, value in found}


ValueKey = tuple[str, np.datetime64]


def read_values(connection: Connection, keys: Iterable[ValueKey]) -> dict[ValueKey, tuple[float, float]]:
    """(close, calculated_close) at each (portfolio_identifier, time)."""
    statement = sql.SQL("""
        SELECT k.id, k.time, v.close, v.calculated_close
        FROM unnest(%(ids)s::text[], %(times)s::timestamptz[]) k(id, time) CROSS JOIN LATERAL (
            SELECT p.close, p.calculated_close FROM {table} p WHERE p.portfolio_identifier = k.id AND p.time_index = k.time OFFSET 0) v
    """).format(table=_name(PortfoliosStorage))
    unique = sorted(set(keys))
    found = fetch(connection, statement, {"ids": [k for k, _ in unique], "times": [to_datetime(t) for _, t in unique]})
    return {(i, utc(time, "time_index")): (close, calculated) for i, time, close, calculated in found}


def read_orders(connection: Connection, portfolios: Sequence[str]) -> dict[str, tuple[np.ndarray, list[str], np.ndarray, np.ndarray]]:
    """(times from which they are active, assets, target weights, used weights) of unfinished orders; NaT and NaN where null."""
    statement = sql.SQL("""
        SELECT o.portfolio_identifier, array_agg(coalesce(o.active_from, '-infinity') ORDER BY o.asset_identifier),
               array_agg(o.asset_identifier::text ORDER BY o.asset_identifier),
               array_agg(coalesce(o.target_weight, 'NaN') ORDER BY o.asset_identifier), array_agg(o.used_weight ORDER BY o.asset_identifier)
        FROM {table} o WHERE o.portfolio_identifier = ANY(%(ids)s) GROUP BY 1
    """).format(table=_name(PortfolioRebalanceStateStorage))
    return {i: columns for i, *columns in fetch(connection, statement, {"ids": list(portfolios)})}  # type: ignore[misc]


# -- progress -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scope:
    """Whose rows in which storage: the owner of one progress row."""

    storage: type[StorageTable]
    value: str

    @cached_property
    def uid(self) -> uuid.UUID:
        return node_uid(self.storage.logical_name(), self.value, LOADED_NAMESPACE)  # not the environment: it is read for every uid


@dataclass(frozen=True)
class Progress:
    uid: uuid.UUID
    watermark: datetime | None
    epoch: int
    row_count: int
    configuration_hash: str | None
    code_version: str | None


ProgressRows = Mapping[uuid.UUID, Progress]


@dataclass(frozen=True)
class Advance:
    """A change of one progress row, with the rows that belong to it; `replace` deletes the scope's rows first."""

    scope: Scope
    epoch: int
    watermark: datetime | None
    row_count: int
    configuration_hash: str
    code_version: str
    input_digest: str
    block: Block | None
    replace: bool


MOVED_COLUMNS = ("watermark", "row_count", "configuration_hash", "code_version", "input_digest")


def ensure_progress(connection: Connection, scopes: Iterable[Scope]) -> None:
    """A progress row for each scope; existing ones stay as they are."""
    rows = [{"uid": s.uid, "kind": s.storage.__storage_kind__, "storage": s.storage.logical_name(), "scope": s.value} for s in set(scopes)]
    write_rows(connection, DataNodeUpdateTable, rows, key=("storage", "scope"), update=False)


def reset_progress(connection: Connection, storages: Sequence[str]) -> None:
    """Nothing is computed any more in `storages`, given by logical name: their tables are new."""
    statement = sql.SQL("""
        UPDATE {table} SET watermark = NULL, row_count = 0, input_digest = NULL, epoch = epoch + 1, updated_at = now()
        WHERE storage = ANY(%(storages)s) AND watermark IS NOT NULL
    """).format(table=_name(DataNodeUpdateTable))
    execute(connection, statement, {"storages": list(storages)})


def read_progress(connection: Connection, uids: Iterable[uuid.UUID]) -> dict[uuid.UUID, Progress]:
    return _progress(connection, uids, sql.SQL(""))


def claim(connection: Connection, uids: Iterable[uuid.UUID]) -> dict[uuid.UUID, Progress]:
    """Lock progress rows in uid order, without waiting; rows that another run holds are absent. The transaction's first query."""
    return _progress(connection, uids, sql.SQL("FOR UPDATE SKIP LOCKED"))


def _progress(connection: Connection, uids: Iterable[uuid.UUID], lock: sql.SQL) -> dict[uuid.UUID, Progress]:
    statement = sql.SQL("""
        SELECT uid, watermark, epoch, row_count, configuration_hash, code_version
        FROM {table} WHERE uid = ANY(%(uids)s) ORDER BY uid {lock}
    """).format(table=_name(DataNodeUpdateTable), lock=lock)
    return {row[0]: Progress(*row) for row in fetch(connection, statement, {"uids": sorted(uids)})}


def commit_advances(connection: Connection, advances: Sequence[Advance], run_uid: uuid.UUID | None) -> None:
    """Delete what is replaced, append the rows, move the progress: all of it or, by raising ProgressConflict, none.

    Rows above a watermark cannot exist, so blocks go straight into their tables, in key order. The caller's transaction commits.
    """
    by_storage: dict[type[StorageTable], list[Advance]] = {}
    for advance in advances:
        by_storage.setdefault(advance.scope.storage, []).append(advance)
    for storage, group in by_storage.items():
        _delete_scopes(connection, storage, [a.scope.value for a in group if a.replace])
        blocks = [a.block for a in sorted(group, key=lambda a: a.scope.value) if a.block is not None]
        if blocks:
            copy_in(connection, storage.__tablename__, *blocks)
    _move_progress(connection, advances, run_uid)


def _delete_scopes(connection: Connection, storage: type[StorageTable], scopes: list[str]) -> None:
    if scopes:
        statement = sql.SQL("DELETE FROM {table} WHERE {scope} = ANY(%(scopes)s)")
        execute(connection, statement.format(table=_name(storage), scope=sql.Identifier(storage.__scope__)), {"scopes": scopes})


def _move_progress(connection: Connection, advances: Sequence[Advance], run_uid: uuid.UUID | None) -> None:
    rows = [{"uid": a.scope.uid, "epoch": a.epoch} | {column: getattr(a, column) for column in MOVED_COLUMNS} for a in advances]
    assignments = sql.SQL(", ").join(sql.SQL("{0} = x.{0}").format(sql.Identifier(column)) for column in MOVED_COLUMNS)
    statement = sql.SQL("""
        UPDATE {table} p SET epoch = p.epoch + 1, run_uid = %(run)s, updated_at = now(), {assignments}
        FROM jsonb_populate_recordset(NULL::{table}, %(rows)s::jsonb) x WHERE p.uid = x.uid AND p.epoch = x.epoch
    """).format(table=_name(DataNodeUpdateTable), assignments=assignments)
    moved = execute(connection, statement, {"rows": document(rows), "run": run_uid})
    if moved != len(advances):
        raise ProgressConflict(count=len(advances) - moved, nodes=", ".join(a.scope.value for a in advances[:5]))


# -- names --------------------------------------------------------------------------------------------------------------------


def _name(table: type[MetaTable]) -> sql.Identifier:
    return sql.Identifier(table.__tablename__)
