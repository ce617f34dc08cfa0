"""Physical layout of the hot storages: plain tables, or partitioned by year or by scope. Only `prepare` comes here.

A storage becomes partitioned on request, while it is empty; each later `prepare` makes the partitions that are missing.

By year (UTC), and one for the rest: the years reach from the first stored session to two years from now. Rows of a year without a
partition are in the rest, where every query finds them; they move when the year is made.

By scope: so many partitions by a hash of the portfolio, or the signal; their number stays what it was. A scope's rows are all in one, so
two transactions whose scopes lie in different partitions extend different indexes, and neither waits for the other.

A new partition takes its table alone, so a run waits for it, or it for the run. Before, the epochs of all progress move: a transaction
whose snapshot is older would not find the moved rows, so it must not be able to claim any more, and starts again.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from psycopg import sql
from sqlalchemy import Connection, inspect
from sqlalchemy.dialects import postgresql

from msm_core.copying import Statement, driver_connection, execute, fetch
from msm_core.errors import ConfigurationError, StorageMismatch, StorageNotEmpty, StoragePartitioned
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
BY_YEAR = "RANGE (time_index)"  # as pg_get_partkeydef tells it; what is partitioned in a way that is not ours is somebody's own
FIRST_YEAR = 1970  # while no session is stored
YEARS_AHEAD = 2
PARTITIONS_MIN, PARTITIONS_MAX = 2, 64  # by scope: a query of many scopes opens and locks them all

Wish = Literal["year"] | int | None  # a partition per year, so many by scope, or as each storage is


@dataclass(frozen=True)
class Part:
    """A partition: how its name ends, its bound, and the condition of the rows that the rest may hold of it."""

    suffix: str
    bound: sql.Composable
    moved: sql.Composable | None = None


@dataclass(frozen=True)
class Layout:
    """What one storage lacks. `convert`: it is a plain table and is to be partitioned by `key`."""

    storage: type[StorageTable]
    convert: bool
    key: str
    parts: Sequence[Part]

    @property
    def tables(self) -> list[str]:
        """Names of what is to be made."""
        converted = [self.storage.__tablename__] if self.convert else []
        return [*converted, *(partition_name(self.storage, part.suffix) for part in self.parts)]

    def statements(self) -> list[Statement]:
        """The DDL. It keeps every row, also where it is run by hand after somebody has written."""
        made = [s for part in self.parts for s in _partition(self.storage, part)]
        return _conversion(self.storage, self.key, made) if self.convert else made

    def sql(self, connection: Connection) -> list[str]:
        """A whole transaction as text."""
        statements = [*_alone(self.storage), *self.statements(), *(_grants(connection, self.storage) if self.convert else ())]
        return ["BEGIN", *(statement.as_string(driver_connection(connection)).strip() for statement in statements), "COMMIT"]


def wish(yearly: bool, partitions: int | None) -> Wish:
    """What is asked for, as one. Raises ConfigurationError for both at once, and for a number out of range."""
    if partitions is None:
        return "year" if yearly else None
    if yearly:
        raise ConfigurationError(problems="--partitions and --partition-by-year exclude each other: a table has one layout. Give one.")
    if not PARTITIONS_MIN <= partitions <= PARTITIONS_MAX:
        raise ConfigurationError(problems=f"--partitions {partitions}: give a number from {PARTITIONS_MIN} to {PARTITIONS_MAX}.")
    return partitions


def partition_name(storage: type[StorageTable], suffix: str) -> str:
    """`y2024` of a year, `rest` of the rest, `h0` by scope. At most 63 bytes, and never that of another table of ours."""
    return physical_name(f"{storage.__storage_kind__}_{suffix}", LOADED_NAMESPACE)


def lacking(connection: Connection, wanted: Wish = None, storages: Sequence[type[StorageTable]] = HOT) -> list[Layout]:
    """What partitioned ones among `storages` lack; with a wish, also plain ones, and those that are not there yet.

    A year is there when any partition holds a part of it. Raises StorageNotEmpty, StoragePartitioned for a table that is partitioned
    otherwise than wanted, and StorageMismatch for a partition's name that is taken; all three only of what would be made.
    """
    statement = sql.SQL("""
        WITH parts AS (
            SELECT i.inhparent, pg_get_expr(c.relpartbound, c.oid) AS bound FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid)
        SELECT t.name, c.relkind::text, pg_get_partkeydef(c.oid),
               ARRAY(SELECT y FROM generate_series(%(first)s::int, %(last)s::int) y WHERE NOT EXISTS (
                   SELECT FROM parts p WHERE p.inhparent = c.oid AND p.bound <> 'DEFAULT'
                      AND coalesce(substring(p.bound FROM 'FROM \\(''(.*?)''\\)')::timestamptz, '-infinity') < {end}
                      AND coalesce(substring(p.bound FROM 'TO \\(''(.*?)''\\)')::timestamptz, 'infinity') > {start})),
               ARRAY(SELECT p.bound FROM parts p WHERE p.inhparent = c.oid)
        FROM unnest(%(names)s::text[]) WITH ORDINALITY t(name, place) LEFT JOIN pg_class c ON c.oid = to_regclass(quote_ident(t.name))
        ORDER BY t.place
    """).format(start=sql.SQL("make_timestamptz(y, 1, 1, 0, 0, 0, 'UTC')"), end=sql.SQL("make_timestamptz(y + 1, 1, 1, 0, 0, 0, 'UTC')"))
    first, last = _span(connection)
    of = {storage.__tablename__: storage for storage in storages}
    layouts: list[Layout] = []
    otherwise: list[str] = []
    for name, kind, found, years, bounds in fetch(connection, statement, {"names": list(of), "first": first, "last": last}):
        by_scope = f"HASH ({of[name].__scope__})"
        asked = {None: None, "year": BY_YEAR}.get(wanted, by_scope)
        convert = asked is not None and kind in (None, "r")
        key = asked if convert else found
        spread = [tuple(map(int, re.findall(r"\d+", bound))) for bound in bounds] if key == by_scope else []  # modulus, remainder
        count = max((modulus for modulus, _ in spread), default=wanted)
        if asked and key is None:
            raise StorageMismatch(differences=f"{name}: it is no table")
        if asked not in (None, key):
            otherwise.append(f"{name}: it is partitioned by {key}, not {asked}")
        elif key == by_scope and wanted not in (None, count):
            otherwise.append(f"{name}: it has {count} partitions, not {wanted}")
        elif key == BY_YEAR:
            rest = [] if "DEFAULT" in bounds else [Part("rest", sql.SQL("DEFAULT"))]
            layouts.append(Layout(of[name], convert, BY_YEAR, [*(_year(year) for year in years), *rest]))
        elif key == by_scope and isinstance(count, int):  # one without any partition does not tell how many it is to have
            missing = [r for r in range(count) if all(r % modulus != remainder for modulus, remainder in spread)]
            layouts.append(Layout(of[name], convert, by_scope, [_remainder(count, r) for r in missing]))
    if otherwise:
        raise StoragePartitioned(differences="; ".join(otherwise), all=", ".join(s.__tablename__ for s in HOT))
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


def _conversion(storage: type[StorageTable], key: str, partitions: Sequence[Statement]) -> list[Statement]:
    """A partitioned table in the place of a plain one, with its columns, comments and checks."""
    new, old = _table(storage), sql.Identifier(physical_name(f"{storage.__storage_kind__}_plain", LOADED_NAMESPACE))
    constraint = postgresql.dialect().identifier_preparer.format_constraint(storage.__table__.primary_key)  # type: ignore[attr-defined]
    columns = sql.SQL(", ").join(sql.Identifier(name) for name in storage.key_columns())
    return [
        sql.SQL("ALTER TABLE {} RENAME TO {}").format(new, old),
        sql.SQL("CREATE TABLE {} (LIKE {} INCLUDING ALL EXCLUDING INDEXES) PARTITION BY {}").format(new, old, sql.SQL(key)),  # type: ignore[arg-type]
        *partitions,
        sql.SQL("INSERT INTO {} SELECT * FROM {}").format(new, old),
        sql.SQL("DROP TABLE {}").format(old),
        sql.SQL("ALTER TABLE {} ADD CONSTRAINT {} PRIMARY KEY ({})").format(new, sql.SQL(constraint), columns),  # type: ignore[arg-type]
    ]


def _partition(storage: type[StorageTable], part: Part) -> list[Statement]:
    """A table of its own, comments included, filled with what the rest holds of it (no other partition does), and its becoming one."""
    table, partition = _table(storage), sql.Identifier(partition_name(storage, part.suffix))
    create = sql.SQL("CREATE TABLE {} (LIKE {} INCLUDING ALL)").format(partition, table)
    attach = sql.SQL("ALTER TABLE {} ATTACH PARTITION {} {}").format(table, partition, part.bound)
    if part.moved is None:
        return [create, attach]
    move = sql.SQL("WITH moved AS (DELETE FROM {} WHERE {} RETURNING *) INSERT INTO {} SELECT * FROM moved")
    return [create, move.format(table, part.moved, partition), attach]


def _year(year: int) -> Part:
    start, end = (sql.Literal(datetime(y, 1, 1, tzinfo=UTC).isoformat()) for y in (year, year + 1))
    bound, moved = sql.SQL("FOR VALUES FROM ({}) TO ({})"), sql.SQL("time_index >= {} AND time_index < {}")
    return Part(f"y{year}", bound.format(start, end), moved.format(start, end))


def _remainder(modulus: int, remainder: int) -> Part:
    bound = sql.SQL("FOR VALUES WITH (MODULUS {}, REMAINDER {})").format(sql.Literal(modulus), sql.Literal(remainder))
    return Part(f"h{remainder}", bound)


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
