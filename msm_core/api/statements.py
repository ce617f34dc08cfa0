"""The row statements that `rows.upsert_rows` does not cover. Rows travel as one JSON parameter, so their number has no limit."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import to_jsonable_python
from sqlalchemy import ColumnElement, Connection, RowMapping, Table, and_, bindparam, column, delete, func, or_, select, update
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.sql.selectable import TableValuedAlias

from msm_core.models import MetaTable

Name = tuple[Any, ...]  # the values of a key


def table_of(model: type[MetaTable]) -> Table:
    assert isinstance(model.__table__, Table)
    return model.__table__


def name_of(row: Mapping[str, Any] | RowMapping, by: Sequence[str]) -> Name:
    return tuple(row[k] for k in by)


def fetch(connection: Connection, table: Table, by: Sequence[str], wanted: Sequence[Mapping[str, Any]]) -> dict[Name, RowMapping]:
    """The rows that exist of `wanted`, under their names."""
    given = _given(table, by, [{k: row[k] for k in by} for row in wanted])
    query = select(table).join(given, _same(table, given, by))
    return {name_of(row, by): row for row in connection.execute(query).mappings()}


def change(connection: Connection, table: Table, by: Sequence[str], columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Set `columns` of the rows named by `by`; a row that is equal already is not written."""
    given = _given(table, (*by, *columns), rows)
    differs = or_(*(table.c[c].is_distinct_from(given.c[c]) for c in columns))
    connection.execute(update(table).values({c: given.c[c] for c in columns}).where(_same(table, given, by), differs))


def remove(connection: Connection, table: Table, by: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> int:
    """Delete the rows named by `by`; returns how many there were."""
    given = _given(table, by, rows)
    return connection.execute(delete(table).where(_same(table, given, by))).rowcount


def _given(table: Table, names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> TableValuedAlias:
    columns = [column(name, table.c[name].type) for name in names]
    document = bindparam("given", to_jsonable_python(rows), JSONB)
    return func.jsonb_to_recordset(document).table_valued(*columns, name="given").render_derived(with_types=True)


def _same(table: Table, given: TableValuedAlias, by: Sequence[str]) -> ColumnElement[bool]:
    return and_(*(table.c[k] == given.c[k] for k in by))
