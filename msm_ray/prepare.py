"""Schema preparation: the only place that creates or changes tables. Driver only, under one lock, applied by Alembic.

1. The static chain in `migrations/` is upgraded to its head.
2. The catalogue rows of the static storages are written, in the same transaction.

Workers never come here: they verify (`storage.verify_prepared`) and refuse with the command to run.
"""

import io
from dataclasses import dataclass
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, inspect

import msm_core
from msm_core.database import check_server
from msm_core.identity import identity, physical_name
from msm_core.models import LOADED_NAMESPACE, STORAGES, MetaTable, StorageTable, TimeIndexMetaTable
from msm_core.rows import upsert_rows

LOCK_KEY = int(identity({"kind": "prepare_lock", "namespace": LOADED_NAMESPACE})[:15], 16)  # 60 bits: fits bigint, never python's hash()
LOCK_TIMEOUT = "120s"


@dataclass(frozen=True)
class Preparation:
    """What `prepare` did, or, with `check`, what it would do."""

    pending: tuple[str, ...]
    missing: tuple[str, ...]


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


def check(engine: Engine) -> Preparation:
    """What is pending or missing, without changing anything; the physical tables are looked at, not only the version row."""
    check_server(engine)
    with engine.connect() as connection:
        present = set(inspect(connection).get_table_names())
        missing = tuple(sorted(set(MetaTable.metadata.tables) - present))
        return Preparation(pending_revisions(connection), missing)


def prepare(engine: Engine) -> Preparation:
    """Bring the schema to its head. Idempotent; concurrent callers wait for each other and find nothing left to do."""
    check_server(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(%s)", (LOCK_KEY,))
        pending = pending_revisions(connection)
        command.upgrade(alembic_config(connection), "head")
        upsert_rows(connection, TimeIndexMetaTable, [_catalogue_row(storage) for storage in STORAGES], key=("identifier",))
    return Preparation(pending, check(engine).missing)


def ddl(engine: Engine) -> str:
    """The SQL of every pending revision, as text."""
    output = io.StringIO()
    with engine.connect() as connection:
        pending = pending_revisions(connection)
    if pending:
        command.upgrade(alembic_config(None, output), f"{_before(pending[0])}:head", sql=True)
    return output.getvalue()


def _before(revision: str) -> str:
    parent = ScriptDirectory.from_config(alembic_config()).get_revision(revision).down_revision
    return str(parent or "base")


def _catalogue_row(storage: type[StorageTable]) -> dict[str, object]:
    return {
        "uid": storage.storage_uid(),
        "identifier": storage.logical_name(),
        "namespace": LOADED_NAMESPACE,
        "physical_table_name": storage.__tablename__,
        "kind": storage.__storage_kind__,
        "cadence": storage.__cadence__,
        "time_label": "close",
        "identity_components": {},
        "schema_fingerprint": fingerprint(storage),
        "description": (storage.__doc__ or "").strip(),
    }


def fingerprint(storage: type[StorageTable]) -> str:
    return identity({"kind": "schema", "columns": {c.name: str(c.type) for c in storage.__table__.columns}})
