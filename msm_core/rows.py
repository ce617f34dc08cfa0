"""Set-based writing of registry rows."""

import json
import uuid
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import to_json
from sqlalchemy import Connection, RowMapping, Table, text

from msm_core.errors import InvalidRow
from msm_core.models import MetaTable


def upsert_rows(
    connection: Connection,
    table: type[MetaTable],
    rows: Sequence[Mapping[str, Any]],
    *,
    key: Sequence[str],
    update: bool = True,
) -> list[RowMapping]:
    """As `write_rows`, and one more statement each. Returns the rows as stored, in no particular order."""
    stored: list[RowMapping] = []
    for group in write_rows(connection, table, rows, key=key, update=update):
        names = ", ".join(_quoted(k) for k in key)
        sql = f"SELECT t.* FROM {_quoted(table.__tablename__)} t JOIN {_recordset(_table(table))} USING ({names})"  # noqa: S608
        stored += connection.execute(text(sql), {"rows": document([{k: row[k] for k in key} for row in group])}).mappings().all()
    return stored


def write_rows(
    connection: Connection,
    table: type[MetaTable],
    rows: Sequence[Mapping[str, Any]],
    *,
    key: Sequence[str],
    update: bool = True,
) -> list[list[dict[str, Any]]]:
    """Insert or update `rows` by `key`: one statement per set of supplied columns, whatever the number of rows; returns those sets.

    Only supplied columns are touched, and a row that would not change is not written. Rows travel as one JSON document, so a
    statement has one parameter. `update=False` leaves existing rows alone. Raises InvalidRow for a key that is absent or given twice.
    """
    groups = _by_supplied_columns(table, rows, key)
    for columns, group in groups.items():
        connection.execute(text(_upsert_sql(_table(table), columns, key, update)), {"rows": document(group)})
    return list(groups.values())


def _by_supplied_columns(
    table: type[MetaTable], rows: Sequence[Mapping[str, Any]], key: Sequence[str]
) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    """A heterogeneous batch must not take its SET list from its first row, so rows are grouped by what they supply."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    seen: set[tuple[Any, ...]] = set()
    for row in rows:
        name = tuple(row.get(k) for k in key)
        if name in seen:
            raise InvalidRow(model=table.__concept__, why=f"{dict(zip(key, name, strict=True))} is given twice in one batch")
        seen.add(name)
        complete = {"uid": uuid.uuid4(), **row} if "uid" in _table(table).columns else dict(row)
        groups[tuple(sorted(complete))].append(complete)
    return groups


def _upsert_sql(table: Table, columns: Sequence[str], key: Sequence[str], update: bool) -> str:
    target, names = _quoted(table.name), ", ".join(_quoted(c) for c in columns)
    changing = [_quoted(c) for c in columns if c not in key and c != "uid"]
    conflict = "DO NOTHING"
    if update and changing:
        assignments = ", ".join(f"{c} = EXCLUDED.{c}" for c in changing)
        old, new = (", ".join(f"{side}.{c}" for c in changing) for side in (target, "EXCLUDED"))
        conflict = f"DO UPDATE SET {assignments} WHERE ({old}) IS DISTINCT FROM ({new})"
    return (
        f"INSERT INTO {target} ({names}) SELECT {names} FROM {_recordset(table)} "  # noqa: S608 - quoted names, one parameter
        f"ON CONFLICT ({', '.join(_quoted(k) for k in key)}) {conflict}"
    )


def _recordset(table: Table) -> str:
    return f"jsonb_populate_recordset(NULL::{_quoted(table.name)}, CAST(:rows AS jsonb)) r"


def document(value: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> str:
    """Plain JSON text of rows or of one document; times as ISO, uids as text. Raises ValueError for NaN and infinities."""
    written = to_json(value, inf_nan_mode="constants", fallback=str).decode()
    if "NaN" in written or "Infinity" in written:  # as a number, or as text, which is fine
        json.dumps(value, default=str, allow_nan=False)
    return written


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _table(table: type[MetaTable]) -> Table:
    assert isinstance(table.__table__, Table)
    return table.__table__
