"""Tables against what is declared: the operations with which Alembic would make them so, and sentences about what differs."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from alembic.autogenerate import produce_migrations, render_python_code
from alembic.autogenerate.api import AutogenContext
from alembic.operations import ops
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, MetaData, inspect
from sqlalchemy.dialects import postgresql

from msm_core.models.base import Identifier, StorageTable


def operations(connection: Connection, metadata: MetaData) -> list[ops.MigrateOperation]:
    """What Alembic would do to make the tables of `metadata` what they should be; no other table is looked at."""

    def include_name(name: str | None, type_: str, _parents: object) -> bool:
        return type_ != "table" or name in metadata.tables

    context = MigrationContext.configure(connection, opts={"include_name": include_name, "compare_type": True})
    script = produce_migrations(context, metadata)
    assert script.upgrade_ops is not None
    return list(script.upgrade_ops.ops)


def drift(
    connection: Connection, metadata: MetaData, storages: Sequence[type[StorageTable]], operations: Iterable[ops.MigrateOperation]
) -> list[str]:
    """Sentences `table: difference` of the tables of `metadata`, among them `storages`, that are not what is declared."""
    return [*_collations(connection, metadata), *_differences(operations), *_wrong_keys(connection, storages)]


def rendered(creation: ops.CreateTableOp, context: MigrationContext) -> str:
    """The operations as a revision file would hold them."""

    def plain(type_: str, item: Any, _context: AutogenContext) -> str | Literal[False]:
        return f"sa.String(length={item.length}, collation={item.collation!r})" if isinstance(item, Identifier) else False

    return render_python_code(ops.UpgradeOps([creation]), render_item=plain, migration_context=context)


def _differences(operations: Iterable[ops.MigrateOperation]) -> list[str]:
    """In what the tables that exist differ: columns and keys. An index, a comment or a table of somebody's own is no harm."""
    return [
        f"{operation.table_name}: {text}"
        for operation in operations
        if isinstance(operation, ops.ModifyTableOps)
        for inner in operation.ops
        if (text := _difference(inner))
    ]


def _collations(connection: Connection, metadata: MetaData) -> list[str]:
    """Identifiers that are not compared bytewise, which Alembic does not compare: the order of sums over assets hangs on it."""
    identifiers = {
        (t.name, c.name): c.type.collation for t in metadata.tables.values() for c in t.columns if isinstance(c.type, Identifier)
    }
    live = inspect(connection).get_multi_columns(filter_names=list(metadata.tables))
    return [
        f"{table}: column {c['name']} is collated {collation or 'as the database is'}, not {identifiers[table, c['name']]}"
        for (_, table), found in live.items()
        for c in found
        if (table, c["name"]) in identifiers and (collation := getattr(c["type"], "collation", None)) != identifiers[table, c["name"]]
    ]


def _wrong_keys(connection: Connection, storages: Sequence[type[StorageTable]]) -> list[str]:
    """Of tables that are there, whose primary key is not the grain: Alembic does not compare it either."""
    keys = inspect(connection).get_multi_pk_constraint(filter_names=[s.__tablename__ for s in storages])
    key_of = {table: constraint["constrained_columns"] for (_, table), constraint in keys.items() if constraint}
    return [
        f"{s.__tablename__}: its primary key is ({', '.join(key_of[s.__tablename__])}), not ({', '.join(s.key_columns())})"
        for s in storages
        if s.__tablename__ in key_of and key_of[s.__tablename__] != list(s.key_columns())
    ]


def _difference(operation: ops.MigrateOperation) -> str | None:
    match operation:
        case ops.AddColumnOp():
            return f"it lacks column {operation.column.name}"
        case ops.DropColumnOp():
            return f"it has a column {operation.column_name} beyond"
        case ops.AlterColumnOp(modify_type=type_) if type_ is not None:
            existing, declared = (x.compile(postgresql.dialect()) if x else "unknown" for x in (operation.existing_type, type_))
            return f"column {operation.column_name} is {existing}, not {declared}"
        case ops.AlterColumnOp(modify_nullable=nullable) if nullable is not None:
            return f"column {operation.column_name} must {'' if nullable else 'not '}take nulls"
        case ops.CreateForeignKeyOp() | ops.CreateUniqueConstraintOp():
            return f"it lacks the constraint {operation.constraint_name}"
    return None
