"""What all tables share: naming, comments in the database, and the two families - registry rows and time-indexed storages."""

import re
import uuid
from typing import Any, ClassVar

from sqlalchemy import DateTime, MetaData, String, Uuid
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedColumn, mapped_column
from sqlalchemy.types import TypeEngine

from msm_core.identity import current_namespace, logical_identifier, physical_name, storage_uid

LOADED_NAMESPACE = current_namespace()  # the environment decides once: tables cannot be renamed in a living process

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}

IDENTIFIER_CHARS_MAX = 255


class Identifier(String):
    """An identifier, compared bytewise: the order of sums over assets must not depend on a server's locale."""

    def __init__(self, length: int = IDENTIFIER_CHARS_MAX, collation: str | None = "C") -> None:
        super().__init__(length, collation=collation)


def column(type_: TypeEngine[Any] | type[TypeEngine[Any]], comment: str, *args: Any, **options: Any) -> MappedColumn[Any]:
    """A column with its description, which is stored in the database too."""
    return mapped_column(type_, *args, comment=comment, **options)


def instant(comment: str, **options: Any) -> MappedColumn[Any]:
    return column(DateTime(timezone=True), comment, **options)


def metadata_json() -> MappedColumn[Any]:
    return column(JSONB, "free descriptive facts; never part of an identity", nullable=True)


class MetaTable(DeclarativeBase):
    """Root of all tables. `__concept__` is the bare name; namespace and physical name follow from it."""

    metadata = MetaData(naming_convention=NAMING)
    __concept__: ClassVar[str]

    def __init_subclass__(cls, **options: Any) -> None:
        if "__concept__" in cls.__dict__:
            cls.__tablename__ = physical_name(re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__concept__).lower(), LOADED_NAMESPACE)
        super().__init_subclass__(**options)

    @classmethod
    def logical_name(cls) -> str:
        """The logical identifier: `Asset`, or `ns.Asset` in a namespace."""
        return logical_identifier(cls.__concept__, LOADED_NAMESPACE)


class RegistryTable(MetaTable):
    """A typed registry record; its business key is unique beside the uid."""

    __abstract__ = True
    uid: Mapped[uuid.UUID] = column(
        Uuid, "made by the client; stable for the life of the row", primary_key=True, default=uuid.uuid4, sort_order=-1
    )


class StorageTable(MetaTable):
    """A time-indexed storage. The primary key is the grain in physical order: scope first, so that a series is read in one sweep.

    No foreign keys: they cost 3-5x in writing (lab/perf.md). Identifiers are checked set-based before a batch is written.
    """

    __abstract__ = True
    __storage_kind__: ClassVar[str]
    __scope__: ClassVar[str]  # the column whose value owns progress
    __cadence__: ClassVar[str | None] = None

    @classmethod
    def logical_name(cls) -> str:
        """The logical identifier in the catalogue: `ExternalPricesTS`."""
        return logical_identifier(f"{cls.__concept__}TS", LOADED_NAMESPACE)

    @classmethod
    def storage_uid(cls) -> uuid.UUID:
        return storage_uid(cls.logical_name())

    @classmethod
    def key_columns(cls) -> tuple[str, ...]:
        return tuple(c.name for c in cls.__table__.primary_key)
