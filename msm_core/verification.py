"""Self-checks over what is stored: one exact digest that does not depend on row order, and violations of what must always hold."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from psycopg import sql
from sqlalchemy import Connection

from msm_core.copying import fetch
from msm_core.data_nodes.registration import read_configurations
from msm_core.frames import iso, utc
from msm_core.models import (
    LOADED_NAMESPACE,
    AssetTable,
    DataNodeUpdateTable,
    InterpolatedPricesStorage,
    PortfolioRebalanceStateStorage,
    PortfoliosStorage,
    PortfolioTable,
    PortfolioWeightsStorage,
    SignalWeightsStorage,
    StorageTable,
    TimeIndexMetaTable,
)

AUDITED: tuple[type[StorageTable], ...] = (SignalWeightsStorage, PortfolioWeightsStorage, PortfoliosStorage, PortfolioRebalanceStateStorage)
REACHING = ("portfolios", "interpolated_prices")  # kinds of storages that have a row at every watermark
EXAMPLES_MAX = 20


@dataclass(frozen=True)
class Verification:
    """checksum: 64 hex digits over every stored signal weight, portfolio weight, value and interpolated bar; violations: sentences."""

    checksum: str
    rows: int
    violations: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        return {"checksum": self.checksum, "rows": self.rows, "violations": list(self.violations)}


@dataclass(frozen=True)
class _ScopeTotals:
    rows: int
    newest: np.datetime64
    digest: str


def verify(connection: Connection) -> Verification:
    """Digest and audit: one scan per storage, and one more of values."""
    totals = {storage: _totals(connection, storage) for storage in _audited(connection)}
    violations = [v for storage in totals for v in _progress_violations(connection, storage, totals[storage])]
    violations += _unknown(connection, AssetTable, "asset_identifier", [s for s in totals if "asset_identifier" in s.key_columns()])
    violations += _unknown(connection, PortfolioTable, "portfolio_identifier", AUDITED[1:])
    violations += _wrong_returns(connection)
    violations += _wrong_identities(connection)
    rows = sum(scope.rows for scopes in totals.values() for scope in scopes.values())
    return Verification(_digest(totals), rows, tuple(violations))


def checksum(connection: Connection) -> str:
    """The digest alone."""
    return _digest({storage: _totals(connection, storage) for storage in _audited(connection)})


def _audited(connection: Connection) -> list[type[StorageTable]]:
    """The outputs of every fleet, and the interpolated storages that the catalogue names."""
    statement = sql.SQL("""
        SELECT identity_components FROM {table} WHERE kind = %(kind)s AND namespace = %(namespace)s
           AND to_regclass(quote_ident(physical_table_name)) IS NOT NULL ORDER BY identifier
    """).format(table=_name(TimeIndexMetaTable))
    found = fetch(connection, statement, {"kind": InterpolatedPricesStorage.__storage_kind__, "namespace": LOADED_NAMESPACE})
    return [*AUDITED, *(InterpolatedPricesStorage.configured_by(components) for (components,) in found)]


def _totals(connection: Connection, storage: type[StorageTable]) -> dict[str, _ScopeTotals]:
    """Rows, newest time and digest per scope.

    The digest adds up 64 bits of each row's md5 over its exact binary values: a sum is free of order, exact in numeric, and counts
    repetitions, which xor would cancel.
    """
    fields = sql.SQL(" || ").join(_bytes(column.name, column.type.python_type) for column in storage.__table__.columns)
    statement = sql.SQL("""
        SELECT {scope}, count(*), max(time_index), sum(('x' || left(md5({fields}), 16))::bit(64)::bigint::numeric)::text
        FROM {table} GROUP BY 1
    """).format(scope=sql.Identifier(storage.__scope__), fields=fields, table=_name(storage))
    found = fetch(connection, statement, {})
    return {scope: _ScopeTotals(rows, utc(newest, "time_index"), digest) for scope, rows, newest, digest in found}


def _bytes(column: str, type_: type) -> sql.Composed:
    """A value as bytes; null is empty, which no value of these types is, and text ends in a byte that no text contains."""
    if type_ is str:
        convert = sql.SQL("convert_to({0}, 'UTF8') || '\\x00'")
    elif type_ is float:
        convert = sql.SQL("coalesce(float8send({0}), '\\x')")
    else:
        convert = sql.SQL("coalesce({send}({{0}}), '\\x')".format(send="boolsend" if type_ is bool else "timestamptz_send"))
    return convert.format(sql.Identifier(column))


def _digest(totals: dict[type[StorageTable], dict[str, _ScopeTotals]]) -> str:
    digest = hashlib.sha256()
    for storage, scopes in totals.items():
        for scope, total in sorted(scopes.items()):
            digest.update(f"{storage.__concept__}\0{scope}\0{total.rows}\0{total.digest}\n".encode())
    return digest.hexdigest()


def _progress_violations(connection: Connection, storage: type[StorageTable], totals: dict[str, _ScopeTotals]) -> list[str]:
    """Progress and rows must tell the same: values and prices reach their watermark, the others do not pass it, counts agree."""
    statement = sql.SQL("SELECT scope, watermark, row_count FROM {table} WHERE storage = %(storage)s").format(
        table=_name(DataNodeUpdateTable)
    )
    progress = {s: (w, n) for s, w, n in fetch(connection, statement, {"storage": storage.logical_name()})}
    found = [f"{storage.__concept__}: {scope} has rows but no progress" for scope in sorted(totals.keys() - progress.keys())]
    for scope, (watermark, rows) in sorted(progress.items()):
        stored = totals.get(scope)
        if rows != (stored.rows if stored else 0):
            found.append(f"{storage.__concept__}: {scope} holds {stored.rows if stored else 0} rows, its progress says {rows}")
        reached = None if watermark is None else utc(watermark, "watermark")
        if stored is None:
            continue
        beyond = reached is None or stored.newest > reached
        if beyond or (storage.__storage_kind__ in REACHING and stored.newest != reached):
            found.append(f"{storage.__concept__}: {scope} reaches {iso(stored.newest)}, its progress says {iso(reached)}")
    return found


def _unknown(connection: Connection, registry: type, column: str, storages: Sequence[type[StorageTable]]) -> list[str]:
    statement = sql.SQL("""
        SELECT DISTINCT s.{column} FROM {storage} s
        WHERE NOT EXISTS (SELECT FROM {registry} r WHERE r.unique_identifier = s.{column}) LIMIT %(limit)s
    """)
    violations = []
    for storage in storages:
        query = statement.format(column=sql.Identifier(column), storage=_name(storage), registry=_name(registry))
        unknown = sorted(value for (value,) in fetch(connection, query, {"limit": EXAMPLES_MAX}))
        violations += [f"{storage.__concept__}: {column} {value} is not registered" for value in unknown]
    return violations


def _wrong_returns(connection: Connection) -> list[str]:
    """Every stored return is close / previous close - 1, to the bit; the first one has no previous row to compare with."""
    statement = sql.SQL("""
        SELECT portfolio_identifier, time_index FROM (
            SELECT portfolio_identifier, time_index, "return" AS stored,
                   close / lag(close) OVER (PARTITION BY portfolio_identifier ORDER BY time_index) - 1 AS computed FROM {table}) r
        WHERE stored <> computed LIMIT %(limit)s
    """).format(table=_name(PortfoliosStorage))
    found = fetch(connection, statement, {"limit": EXAMPLES_MAX})
    return [f"Portfolios: {identifier} at {time.isoformat()}: return is not close / previous close - 1" for identifier, time in found]


def _wrong_identities(connection: Connection) -> list[str]:
    """Hash and signal uid stored with each newest configuration, on which every run relies, are what they are by its content."""
    stored = read_configurations(connection).configurations
    anew = [(c.model_copy().configuration_hash, c.signal.model_copy().uid) for c in stored]  # a copy remembers nothing
    wrong = [c.identifier for c, found in zip(stored, anew, strict=True) if (c.configuration_hash, c.signal_uid) != found]
    return [f"Portfolio {i}: the identity stored with its configuration is not that of its content" for i in wrong[:EXAMPLES_MAX]]


def _name(table: type) -> sql.Identifier:
    return sql.Identifier(table.__tablename__)
