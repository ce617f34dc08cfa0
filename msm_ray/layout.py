"""Physical layout of the hot storages: plain tables, or one partition per year (UTC) and one for the rest. Only `prepare` comes here.

A storage becomes partitioned on request, while it is empty. Its years reach from the first stored session to two years from now; each later
`prepare` makes the years that are missing. Rows of a year without a partition are in the rest, where every query finds them; they move
when the year is made.

A new year takes its table alone, so a run waits for it, or it for the run. Before, the epochs of all progress move: a transaction whose
snapshot is older would not find the moved rows, so it must not be able to claim any more, and starts again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from psycopg import sql
from sqlalchemy import Connection, inspect
from sqlalchemy.dialects import postgresql

from msm_core.copying import Statement, driver_connection, execute, fetch
from msm_core.errors import StorageMismatch, StorageNotEmpty
from msm_core.identity import physical_name
from msm_core.models import (
    LOADED_NAMESPACE,
    CalendarSessionTable,
    DataNodeUpdateTable,
    PortfoliosStorage,
    PortfolioWeightsStorage,
    SignalWeightsStorage,
    StorageTable,
)
from msm_core.storage import reset_progress

HOT: tuple[type[StorageTable], ...] = (SignalWeightsStorage, PortfolioWeightsStorage, PortfoliosStorage)
KEY = "RANGE (time_index)"  # as pg_get_partkeydef tells it; what is partitioned in any other way is somebody's own
FIRST_YEAR = 1970  # while no session is stored
YEARS_AHEAD = 2


@dataclass(frozen=True)
class Layout:
    """What one storage lacks. `convert`: it is a plain table and is to be partitioned; `rest`: it has no partition for the rest."""

    storage: type[StorageTable]
    convert: bool
    years: Sequence[int]
    rest: bool

    @property
    def tables(self) -> list[str]:
        """Names of what is to be made."""
        rest = [partition_name(self.storage, None)] if self.rest else []
        converted = [self.storage.__tablename__] if self.convert else []
        return [*converted, *(partition_name(self.storage, year) for year in self.years), *rest]

    def statements(self) -> list[Statement]:
        """The DDL. It keeps every row, also where it is run by hand after somebody has written."""
        made = [s for year in self.years for s in _year(self.storage, year)]
        if self.rest:
            made += _partition(self.storage, None, sql.SQL("DEFAULT"))
        return _conversion(self.storage, made) if self.convert else made

    def sql(self, connection: Connection) -> list[str]:
        """A whole transaction as text."""
        statements = [*_alone(self.storage), *self.statements(), *(_grants(connection, self.storage) if self.convert else ())]
        return ["BEGIN", *(statement.as_string(driver_connection(connection)).strip() for statement in statements), "COMMIT"]


def partition_name(storage: type[StorageTable], year: int | None) -> str:
    """Of a year, or None: of the rest. At most 63 bytes, and never that of another table of ours."""
    return physical_name(f"{storage.__storage_kind__}_{'rest' if year is None else f'y{year}'}", LOADED_NAMESPACE)


def lacking(connection: Connection, yearly: bool = False, storages: Sequence[type[StorageTable]] = HOT) -> list[Layout]:
    """What partitioned ones among `storages` lack; with `yearly`, also plain ones, and those that are not there yet.

    A year is there when any partition holds a part of it. Raises StorageNotEmpty, and StorageMismatch for a table that is partitioned
    otherwise, or a partition's name that is taken; both only of what would be made.
    """
    statement = sql.SQL("""
        WITH parts AS (
            SELECT i.inhparent, pg_get_expr(c.relpartbound, c.oid) AS bound FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid)
        SELECT t.name, c.relkind::text, pg_get_partkeydef(c.oid),
               ARRAY(SELECT y FROM generate_series(%(first)s::int, %(last)s::int) y WHERE NOT EXISTS (
                   SELECT FROM parts p WHERE p.inhparent = c.oid AND p.bound <> 'DEFAULT'
                      AND coalesce(substring(p.bound FROM 'FROM \\(''(.*?)''\\)')::timestamptz, '-infinity') < {end}
                      AND coalesce(substring(p.bound FROM 'TO \\(''(.*?)''\\)')::timestamptz, 'infinity') > {start})),
               NOT EXISTS (SELECT FROM parts p WHERE p.inhparent = c.oid AND p.bound = 'DEFAULT')
        FROM unnest(%(names)s::text[]) WITH ORDINALITY t(name, place) LEFT JOIN pg_class c ON c.oid = to_regclass(quote_ident(t.name))
        ORDER BY t.place
    """).format(start=sql.SQL("make_timestamptz(y, 1, 1, 0, 0, 0, 'UTC')"), end=sql.SQL("make_timestamptz(y + 1, 1, 1, 0, 0, 0, 'UTC')"))
    first, last = _span(connection)
    names = {storage.__tablename__: storage for storage in storages}
    layouts: list[Layout] = []
    for name, kind, key, years, rest in fetch(connection, statement, {"names": list(names), "first": first, "last": last}):
        if key == KEY or (yearly and kind in (None, "r")):
            layouts.append(Layout(names[name], kind != "p", years, rest))
        elif yearly:
            raise StorageMismatch(differences=f"{name}: it is partitioned by {key}, not {KEY}" if key else f"{name}: it is no table")
    layouts = [layout for layout in layouts if layout.tables]
    _refuse(connection, layouts)
    return layouts


def lay_out(connection: Connection, layout: Layout) -> list[str]:
    """Make what a storage lacks, in the running transaction; returns the names of the tables made."""
    for statement in _alone(layout.storage):
        execute(connection, statement, {})
    if layout.convert:
        _refuse(connection, [layout])  # a run may have written meanwhile
    grants = _grants(connection, layout.storage) if layout.convert else []
    for statement in (*layout.statements(), *grants):
        execute(connection, statement, {})
    if layout.convert:
        reset_progress(connection, [layout.storage.logical_name()])  # a table that is new, as one that was dropped
    return layout.tables


def _span(connection: Connection) -> tuple[int, int]:
    """First and last year to make, by the stored sessions and the database's clock."""
    first = None
    if inspect(connection).has_table(CalendarSessionTable.__tablename__):
        statement = sql.SQL("SELECT extract(year FROM min(local_date))::int FROM {}").format(_table(CalendarSessionTable))
        ((first,),) = fetch(connection, statement, {})
    ((now,),) = fetch(connection, sql.SQL("SELECT extract(year FROM now() AT TIME ZONE 'UTC')::int"), {})
    return first or FIRST_YEAR, now + YEARS_AHEAD


def _refuse(connection: Connection, layouts: Sequence[Layout]) -> None:
    """Raises StorageNotEmpty for plain tables with rows, StorageMismatch for what stands in the way."""
    plain = [x.storage for x in layouts if x.convert and inspect(connection).has_table(x.storage.__tablename__)]
    filled = [s.__tablename__ for s in plain if fetch(connection, sql.SQL("SELECT FROM {} LIMIT 1").format(_table(s)), {})]
    if filled:
        raise StorageNotEmpty(tables=", ".join(filled), all=", ".join(s.__tablename__ for s in HOT))
    wanted = [name for x in layouts for name in x.tables if name not in [s.__tablename__ for s in HOT]]
    taken = sql.SQL(
        "SELECT n || ': it is there, but no partition' FROM unnest(%(new)s::text[]) n WHERE to_regclass(quote_ident(n)) IS NOT NULL"
    )
    own = sql.SQL("""
        SELECT c.relname || ': it has ' || o.what || ' of somebody''s own' FROM pg_class c CROSS JOIN LATERAL (
            SELECT 'the index ' || i.indexrelid::regclass::text FROM pg_index i WHERE i.indrelid = c.oid AND NOT i.indisprimary
            UNION ALL SELECT 'the trigger ' || t.tgname FROM pg_trigger t WHERE t.tgrelid = c.oid AND NOT t.tgisinternal
            UNION ALL SELECT 'the policy ' || p.polname FROM pg_policy p WHERE p.polrelid = c.oid
            UNION ALL SELECT 'the view ' || r.ev_class::regclass::text FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid
                WHERE d.classid = 'pg_rewrite'::regclass AND d.refobjid = c.oid AND r.ev_class <> c.oid) o(what)
        WHERE c.oid = ANY(SELECT to_regclass(quote_ident(n)) FROM unnest(%(old)s::text[]) n)
    """)
    names = {"new": wanted, "old": [s.__tablename__ for s in plain]}
    if found := sorted({sentence for query in (taken, own) for (sentence,) in fetch(connection, query, names)}):
        raise StorageMismatch(differences="; ".join(found))


# -- statements -----------------------------------------------------------------------------------------------------------------


def _alone(storage: type[StorageTable]) -> list[Statement]:
    """Wait for what is under way, and let what has only looked start again; in the order in which a batch locks: progress, then rows."""
    storages = sql.SQL(", ").join(sql.Literal(s.logical_name()) for s in HOT)
    return [
        sql.SQL("UPDATE {} SET epoch = epoch + 1, updated_at = now() WHERE storage IN ({})").format(_table(DataNodeUpdateTable), storages),
        sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(_table(storage)),
    ]


def _conversion(storage: type[StorageTable], partitions: Sequence[Statement]) -> list[Statement]:
    """A partitioned table in the place of a plain one, with its columns, comments and checks."""
    new, old = _table(storage), sql.Identifier(physical_name(f"{storage.__storage_kind__}_plain", LOADED_NAMESPACE))
    constraint = postgresql.dialect().identifier_preparer.format_constraint(storage.__table__.primary_key)  # type: ignore[attr-defined]
    columns = sql.SQL(", ").join(sql.Identifier(name) for name in storage.key_columns())
    return [
        sql.SQL("ALTER TABLE {} RENAME TO {}").format(new, old),
        sql.SQL("CREATE TABLE {} (LIKE {} INCLUDING ALL EXCLUDING INDEXES) PARTITION BY {}").format(new, old, sql.SQL(KEY)),
        *partitions,
        sql.SQL("INSERT INTO {} SELECT * FROM {}").format(new, old),
        sql.SQL("DROP TABLE {}").format(old),
        sql.SQL("ALTER TABLE {} ADD CONSTRAINT {} PRIMARY KEY ({})").format(new, sql.SQL(constraint), columns),  # type: ignore[arg-type]
    ]


def _year(storage: type[StorageTable], year: int) -> list[Statement]:
    """A partition, filled with what the rest holds of its year; no other partition does."""
    start, end = (sql.Literal(datetime(y, 1, 1, tzinfo=UTC).isoformat()) for y in (year, year + 1))
    create, attach = _partition(storage, year, sql.SQL("FOR VALUES FROM ({}) TO ({})").format(start, end))
    move = sql.SQL("""
        WITH moved AS (DELETE FROM {} WHERE time_index >= {} AND time_index < {} RETURNING *) INSERT INTO {} SELECT * FROM moved
    """).format(_table(storage), start, end, _name(storage, year))
    return [create, move, attach]


def _partition(storage: type[StorageTable], year: int | None, bound: Statement) -> list[Statement]:
    """A table of its own, comments included, and its becoming a partition."""
    table, partition = _table(storage), _name(storage, year)
    return [
        sql.SQL("CREATE TABLE {} (LIKE {} INCLUDING ALL)").format(partition, table),
        sql.SQL("ALTER TABLE {} ATTACH PARTITION {} {}").format(table, partition, bound),
    ]


def _grants(connection: Connection, storage: type[StorageTable]) -> list[Statement]:
    """The rights on a table and its columns, and its owner, as statements."""
    statement = sql.SQL("""
        WITH this AS (SELECT oid, relowner, relacl FROM pg_class WHERE oid = to_regclass(quote_ident(%(table)s))),
        rights AS (
            SELECT a.privilege_type AS what, a.grantee, a.is_grantable FROM this, aclexplode(relacl) a
            UNION ALL
            SELECT a.privilege_type || format(' (%%I)', t.attname), a.grantee, a.is_grantable
            FROM this JOIN pg_attribute t ON t.attrelid = this.oid, aclexplode(t.attacl) a)
        SELECT format('GRANT %%s ON %%I TO %%s%%s', string_agg(what, ', '), %(table)s,
                      CASE grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END,
                      CASE WHEN is_grantable THEN ' WITH GRANT OPTION' ELSE '' END)
        FROM rights, this WHERE grantee <> relowner GROUP BY grantee, is_grantable
        UNION ALL SELECT format('ALTER TABLE %%I OWNER TO %%I', %(table)s, pg_get_userbyid(relowner)) FROM this
    """)
    return [sql.SQL(text) for (text,) in fetch(connection, statement, {"table": storage.__tablename__})]


def _table(table: type) -> sql.Identifier:
    return sql.Identifier(table.__tablename__)


def _name(storage: type[StorageTable], year: int | None) -> sql.Identifier:
    return sql.Identifier(partition_name(storage, year))
