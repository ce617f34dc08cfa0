"""Alembic environment of the static chain: tables of one namespace, one version table each.

Runs on the connection that `msm-ray prepare` hands over, or, for `alembic check` and `alembic revision` in a checkout, on the
configured database.
"""

from alembic import context
from sqlalchemy import Connection

from msm_core.database import get_engine
from msm_core.identity import physical_name
from msm_core.models import MetaTable


def include_name(name: str | None, type_: str, _parents: object) -> bool:
    """Tables that are not declared here belong to others, or to dynamic storage: never propose to drop them."""
    return type_ != "table" or name in MetaTable.metadata.tables


def run_migrations(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=MetaTable.metadata,
        version_table=physical_name("alembic_version"),
        include_name=include_name,
        compare_type=True,
        compare_server_default=True,
    )
    with context.begin_transaction():
        context.run_migrations()


given: Connection | None = context.config.attributes.get("connection")
if given is not None:
    run_migrations(given)
else:
    with get_engine().begin() as opened:
        run_migrations(opened)
