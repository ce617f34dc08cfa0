"""Schema preparation: the only place that creates or changes tables. Driver only, under one lock, applied by Alembic.

1. The static chain in `migrations/` is upgraded to its head, and the catalogue rows of the static storages are written with it.
2. The tables of the price policies that a fleet needs are derived from what the catalogue says of their sources, compared with the
   tables that are there, and made where they are missing - also when a catalogue row says that they exist: a row is not a table.
3. Storages that are partitioned, by year or by scope, get the partitions that they lack, see `layout`.

Every transaction that looks and makes begins with the lock, so no lost connection lets two of them in at once. Tables are made in
transactions of at most `TABLES_MAX`, with their catalogue rows and the rendered operations, because every new table holds locks until
its transaction ends. Killed at any point, the next `prepare` goes on. Workers never come here: they verify, and refuse with the command
to run.
"""

import io
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.operations import Operations, ops
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from psycopg import sql
from sqlalchemy import Connection, Engine, MetaData, inspect
from sqlalchemy.exc import OperationalError

import msm_core
from msm_core.copying import fetch
from msm_core.data_nodes.interpolated_prices import storage_of
from msm_core.database import check_server, sqlstate
from msm_core.errors import MsmError, PrepareBusy, SourceNotRegistered, StorageCollision, StorageMismatch
from msm_core.identity import identity, physical_name
from msm_core.models import LOADED_NAMESPACE, SNAPSHOTS, STORAGES, MetaTable, StorageTable, TimeIndexMetaTable
from msm_core.price_sources import PriceSource, SourceKey
from msm_core.rows import write_rows
from msm_core.sources import TIME_TYPE, Source, read_sources
from msm_core.storage import reset_progress
from msm_ray import comparison, layout

LOCK_KEY = int(identity({"kind": "prepare_lock", "namespace": LOADED_NAMESPACE})[:15], 16)  # 60 bits: fits bigint, never python's hash()
LOCK_SECONDS = 120
TABLES_MAX = 100  # per transaction: 64 locks per connection are the default, and a table takes four
CATALOGUE = TimeIndexMetaTable.__tablename__
DECLARED_TYPES = {"asset_identifier": "text", "time_index": TIME_TYPE, "close": "double precision"}  # of a storage not made yet

Storage = type[StorageTable]


@dataclass(frozen=True)
class Preparation:
    """What `prepare` did, or, with `check`, what it would do.

    pending   revisions of the static chain, tables of price policies that have never been made, partitions
    drifted   tables that are not what is declared, and in what; nothing is ever done about them
    missing   tables that should exist, by the models or the catalogue, and do not
    repaired  storages whose catalogue row lacked the cadence that their model declares
    problems  price policies that cannot be prepared, and why
    """

    pending: tuple[str, ...]
    drifted: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    repaired: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def is_clean(self) -> bool:
        return not (self.pending or self.drifted or self.missing)


def check(engine: Engine, price_sources: Iterable[PriceSource] = (), *, yearly: bool = False, partitions: int | None = None) -> Preparation:
    """What is pending, drifted or missing, without changing anything; the physical tables are looked at, not only their rows.

    yearly, partitions  as of `lay_out`, whose errors it raises
    """
    wish = layout.wish(yearly, partitions)
    check_server(engine)
    with engine.connect() as connection:
        present = set(inspect(connection).get_table_names())
        static = pending_revisions(connection)
        wanted, problems = _wanted(connection, price_sources)
        found = _compare(connection, wanted)
        rows = _catalogued(connection, wanted) if CATALOGUE in present else {}
        unlisted = [s.__tablename__ for s in wanted if s.logical_name() not in rows]
        incomplete = [] if static or CATALOGUE not in present else _without_cadence(connection)
        parts = [name for lacking in layout.lacking(connection, wish) for name in lacking.tables]
        return Preparation(
            pending=(*static, *unlisted, *(f"cadence of {name}" for name in incomplete), *parts),
            drifted=(*([] if static else _static_drift(connection)), *found.drifted),
            missing=tuple(sorted({*MetaTable.metadata.tables} - present | {*found.creations} - {*unlisted})),
            problems=tuple(problems),
        )


def prepare(engine: Engine, price_sources: Iterable[PriceSource] = ()) -> Preparation:
    """Bring the static schema to its head and make the tables that `price_sources` need.

    Idempotent; concurrent callers wait for each other and find nothing left to do. Everything that can be made is made first; then
    raises StorageCollision, or StorageMismatch for tables that are not what is declared; PrepareBusy after two minutes of waiting.
    """
    check_server(engine)
    with _working(engine) as connection:
        made = list(pending_revisions(connection))
        command.upgrade(alembic_config(connection), "head")
        made += _restore_static(connection)
        repaired = _catalogue_static(connection)
        wanted, problems = _wanted(connection, price_sources)
    drifted: list[str] = []
    collisions: list[StorageCollision] = []
    for i in range(0, len(wanted), TABLES_MAX):
        with _working(engine) as connection:
            found = _compare(connection, wanted[i : i + TABLES_MAX])
            made += _make(connection, found, collisions)
            drifted += found.drifted
    if collisions:
        raise collisions[0]
    if drifted:
        raise StorageMismatch(differences="; ".join(drifted))
    made += lay_out(engine)
    return Preparation(tuple(made), repaired=tuple(repaired), problems=tuple(problems))


def lay_out(engine: Engine, *, yearly: bool = False, partitions: int | None = None) -> tuple[str, ...]:
    """Make the partitions that partitioned storages lack; with one of the options, make plain storages partitioned that are empty.

    yearly      a partition per year; which years there must be follows from the stored calendars: call it after they have been stored
    partitions  so many by scope, 2 to 64

    One transaction per storage, so that no more than one is locked. Returns the names of the tables made. Raises StorageNotEmpty,
    StoragePartitioned, StorageMismatch, PrepareBusy; ConfigurationError for both options at once, or a number out of range.
    """
    wish = layout.wish(yearly, partitions)
    with engine.connect() as connection:
        storages = [lacking.storage for lacking in layout.lacking(connection, wish)]
    made: list[str] = []
    for storage in storages:
        with _working(engine) as connection:
            for lacking in layout.lacking(connection, wish, [storage]):
                made += layout.lay_out(connection, lacking)
    return tuple(made)


def ddl(engine: Engine, price_sources: Iterable[PriceSource] = (), *, yearly: bool = False, partitions: int | None = None) -> str:
    """The SQL of everything that is pending, as text; `yearly` and `partitions` as of `lay_out`, whose errors it raises."""
    wish = layout.wish(yearly, partitions)
    output = io.StringIO()
    with engine.connect() as connection:
        static = pending_revisions(connection)
        found = _compare(connection, _wanted(connection, price_sources)[0])
        parts = [text for lacking in layout.lacking(connection, wish) for text in lacking.sql(connection)]
    if static:
        command.upgrade(alembic_config(None, output), f"{_before(static[0])}:head", sql=True)
    offline = MigrationContext.configure(dialect_name="postgresql", opts={"as_sql": True, "output_buffer": output})
    for operation in found.creations.values():
        Operations(offline).invoke(operation)
    output.writelines(f"{text};\n\n" for text in parts)
    return output.getvalue()


# -- static chain -------------------------------------------------------------------------------------------------------------


def migrations_path() -> Path:
    """The chain's folder: inside an installed wheel, beside the package in a checkout or a Ray working directory."""
    package = Path(msm_core.__file__).parent
    inside = package / "migrations"
    return inside if inside.is_dir() else package.parent / "migrations"


def alembic_config(connection: Connection | None = None, output: io.StringIO | None = None) -> Config:
    config = Config(output_buffer=output) if output else Config()
    config.set_main_option("script_location", str(migrations_path()).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def pending_revisions(connection: Connection) -> tuple[str, ...]:
    script = ScriptDirectory.from_config(alembic_config())
    context = MigrationContext.configure(connection, opts={"version_table": physical_name("alembic_version")})
    current = context.get_current_revision()
    return tuple(r.revision for r in reversed(list(script.iterate_revisions("head", current or "base"))) if r.revision != current)


def _before(revision: str) -> str:
    parent = ScriptDirectory.from_config(alembic_config()).get_revision(revision).down_revision
    return str(parent or "base")


def _restore_static(connection: Connection) -> list[str]:
    """Make static tables that the chain has made and somebody has dropped; what was computed into them is to be computed again."""
    operations = comparison.operations(connection, MetaTable.metadata)
    creations = {o.table_name: o for o in operations if isinstance(o, ops.CreateTableOp)}
    indexes = [o for o in operations if isinstance(o, ops.ModifyTableOps) and o.table_name in creations]
    for operation in [*creations.values(), *(inner for outer in indexes for inner in outer.ops)]:
        Operations(MigrationContext.configure(connection)).invoke(operation)
    reset_progress(connection, [s.logical_name() for s in STORAGES if s.__tablename__ in creations])
    return list(creations)


def _static_drift(connection: Connection) -> list[str]:
    return comparison.drift(connection, MetaTable.metadata, (*STORAGES, *SNAPSHOTS), comparison.operations(connection, MetaTable.metadata))


@contextmanager
def _working(engine: Engine) -> Iterator[Connection]:
    """A transaction under the lock of all preparers of this namespace; it ends with the transaction, however that ends."""
    try:
        with engine.begin() as connection:
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{LOCK_SECONDS}s'")  # an ALTER waits for running runs, too
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(%s)", (LOCK_KEY,))
            yield connection
    except OperationalError as error:
        if sqlstate(error) != "55P03":
            raise
        raise PrepareBusy(seconds=LOCK_SECONDS) from None


# -- catalogue ----------------------------------------------------------------------------------------------------------------


def _catalogue_static(connection: Connection) -> list[str]:
    """Rows of the static storages; returns those whose cadence was missing. One that is there is the truth, whatever the model says."""
    repaired = _without_cadence(connection)
    statement = sql.SQL("SELECT identifier, cadence, time_label, description FROM {}").format(sql.Identifier(CATALOGUE))
    told = {
        name: dict(zip(("cadence", "time_label", "description"), facts, strict=True)) for name, *facts in fetch(connection, statement, {})
    }
    rows = [_catalogue_row(storage) for storage in (*STORAGES, *SNAPSHOTS)]
    kept = [row | {n: v for n, v in told.get(str(row["identifier"]), {}).items() if v is not None} for row in rows]
    write_rows(connection, TimeIndexMetaTable, kept, key=("identifier",))
    return repaired


def _without_cadence(connection: Connection) -> list[str]:
    """Static storages whose catalogue row lacks the cadence that their model declares."""
    names = [s.logical_name() for s in STORAGES if s.__cadence__]
    statement = sql.SQL("SELECT identifier FROM {} WHERE identifier = ANY(%(names)s) AND cadence IS NULL ORDER BY 1")
    return [name for (name,) in fetch(connection, statement.format(sql.Identifier(CATALOGUE)), {"names": names})]


def _catalogued(connection: Connection, storages: Sequence[Storage]) -> dict[str, Mapping[str, str]]:
    """Identity components of those storages that have a catalogue row, by identifier."""
    statement = sql.SQL("SELECT identifier, identity_components FROM {} WHERE identifier = ANY(%(names)s)")
    return dict(fetch(connection, statement.format(sql.Identifier(CATALOGUE)), {"names": [s.logical_name() for s in storages]}))


def _catalogue_row(storage: Storage) -> dict[str, object]:
    return {
        "uid": storage.storage_uid(),
        "identifier": storage.logical_name(),
        "namespace": LOADED_NAMESPACE,
        "physical_table_name": storage.__tablename__,
        "kind": storage.__storage_kind__,
        "cadence": storage.__cadence__,
        "time_label": "close",
        "identity_components": getattr(storage, "__metatable_extra_hash_components__", {}),
        "schema_fingerprint": fingerprint(storage),
        "description": (storage.__doc__ or "").strip(),
    }


def fingerprint(storage: Storage) -> str:
    return identity({"kind": "schema", "columns": {c.name: str(c.type) for c in storage.__table__.columns}})


# -- tables of price policies -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Storages against the tables that there are: what makes those that are missing, and sentences `table: difference`."""

    storages: Sequence[Storage]
    creations: Mapping[str, ops.CreateTableOp]
    drifted: Sequence[str]

    @property
    def unmade(self) -> list[Storage]:
        return [s for s in self.storages if s.__tablename__ in self.creations]


def _wanted(connection: Connection, price_sources: Iterable[PriceSource]) -> tuple[list[Storage], list[str]]:
    """Storages of the interpolated ones among `price_sources`, and what is wrong with those that have none."""
    interpolated: dict[SourceKey, PriceSource] = {p.key: p for p in price_sources if p.policy is not None}
    if not interpolated:
        return [], []
    sources = _declared_sources()
    if inspect(connection).has_table(CATALOGUE):
        for uid, source in read_sources(connection, {p.source_uid for p in interpolated.values()}).items():
            declared = sources.get(uid)
            sources[uid] = replace(source, cadence=declared.cadence) if declared and source.cadence is None else source
    storages: dict[str, Storage] = {}
    problems = []
    for price_source in interpolated.values():
        try:
            if price_source.source_uid not in sources:
                known = ", ".join(sorted(s.identifier for s in sources.values()))
                raise SourceNotRegistered(source=str(price_source.source_uid), known=known)
            storage = storage_of(price_source, sources[price_source.source_uid])
            storages[storage.__tablename__] = storage
        except MsmError as error:
            problems.append(str(error))
    return [storages[name] for name in sorted(storages)], sorted(problems)


def _declared_sources() -> dict[uuid.UUID, Source]:
    """The static storages as their models declare them, for a database that does not have them yet."""
    facts = {"time_label": "close", "components": {}, "columns": DECLARED_TYPES, "readable": True}
    return {
        s.storage_uid(): Source(s.storage_uid(), s.logical_name(), s.__tablename__, s.__storage_kind__, s.__cadence__, **facts)
        for s in STORAGES
        if s.__cadence__
    }


def _compare(connection: Connection, storages: Sequence[Storage]) -> Comparison:
    if not storages:
        return Comparison([], {}, [])
    metadata = MetaData(naming_convention=MetaTable.metadata.naming_convention)
    for storage in storages:
        storage.__table__.to_metadata(metadata)  # type: ignore[attr-defined] - a Table, as every mapped class of ours has
    names = list(metadata.tables)
    statement = sql.SQL(
        "SELECT relname FROM pg_class WHERE relname = ANY(%(names)s) AND relkind NOT IN ('r', 'p') AND pg_table_is_visible(oid)"
    )
    others = {name for (name,) in fetch(connection, statement, {"names": names})}
    operations = comparison.operations(connection, metadata)
    creations = {o.table_name: o for o in operations if isinstance(o, ops.CreateTableOp)}
    no_tables = [f"{name}: it is no table" for name in sorted(others)]
    creations = {name: creation for name, creation in creations.items() if name not in others}
    return Comparison(storages, creations, [*comparison.drift(connection, metadata, storages, operations), *no_tables])


def _make(connection: Connection, found: Comparison, collisions: list[StorageCollision]) -> list[str]:
    """Make what is missing, with catalogue rows and the rendered operations, in the running transaction; returns what was made."""
    rows = _catalogued(connection, found.storages)
    drifted = {sentence.partition(":")[0] for sentence in found.drifted}
    context = MigrationContext.configure(connection)
    wanted: list[dict[str, object]] = []
    made: list[Storage] = []
    for storage in found.storages:
        name, given = storage.logical_name(), _catalogue_row(storage)
        if name in rows and rows[name] != given["identity_components"]:
            collisions.append(StorageCollision(storage=name, stored=rows[name], given=given["identity_components"]))
            continue
        if creation := found.creations.get(storage.__tablename__):
            Operations(context).invoke(creation)
            given["revision"] = comparison.rendered(creation, context)
            made.append(storage)
        elif name not in rows:
            made.append(storage)
        if storage.__tablename__ not in drifted:
            wanted.append(given)
    write_rows(connection, TimeIndexMetaTable, wanted, key=("identifier",))
    reset_progress(connection, [s.logical_name() for s in made if s.__tablename__ in found.creations])  # of a table that was dropped
    return [s.__tablename__ for s in made]
