"""The catalogue of storages, the progress of nodes, and the ledger of runs."""

import uuid
from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, Float, ForeignKey, Index, Integer, String, Text, UniqueConstraint, Uuid, func
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped

from msm_core.models.base import Identifier, MetaTable, RegistryTable, column, instant


class TimeIndexMetaTable(RegistryTable):
    """The catalogue: every time-indexed storage, ours and anyone's, with the facts a reader needs."""

    __concept__ = "TimeIndexMetaTable"
    __table_args__ = (CheckConstraint("time_label IN ('close','session_date')", name="time_label"),)
    identifier: Mapped[str] = column(Identifier(), "logical identifier, namespace included", unique=True)
    namespace: Mapped[str] = column(String(31), "namespace, empty for the default one", server_default="", default="")
    physical_table_name: Mapped[str] = column(Identifier(), "table in the database, schema-qualified where it needs to be")
    kind: Mapped[str] = column(String(64), "such as prices, interpolated_prices, signal_weights, portfolio_weights, portfolios")
    cadence: Mapped[str | None] = column(String(16), "length of a bar: 1d, 5m; null where rows come as they come")
    time_label: Mapped[str] = column(
        String(16), "close: a bar is stamped at its end; session_date: at 00:00 of its local date", server_default="close", default="close"
    )
    identity_components: Mapped[dict[str, Any]] = column(
        JSONB, "what the identity of a configured storage is made of", server_default="{}", default=dict
    )
    schema_fingerprint: Mapped[str] = column(String(64), "digest of column names and types when registered")
    revision: Mapped[str | None] = column(Text, "the Alembic operations that made the table of a configured storage")
    description: Mapped[str | None] = column(Text, "what the storage holds")


class DataNodeUpdateTable(RegistryTable):
    """Progress of one (storage, scope): the truth about what is computed, moved in the same transaction as the rows."""

    __concept__ = "DataNodeUpdate"
    __table_args__ = (UniqueConstraint("storage", "scope"), CheckConstraint("epoch >= 0 AND row_count >= 0", name="counts"))
    kind: Mapped[str] = column(String(64), "kind of the storage: interpolated_prices, signal_weights, portfolios ...")
    storage: Mapped[str] = column(Identifier(), "logical identifier of the storage")
    scope: Mapped[str] = column(Identifier(), "value of the storage's scope column: whose rows")
    configuration_hash: Mapped[str | None] = column(String(64), "configuration that the rows were computed from")
    watermark: Mapped[datetime | None] = instant("computed through this instant; null = nothing yet")
    epoch: Mapped[int] = column(
        BigInteger, "moves by one with each committed change: the fence against slow writers", server_default="0", default=0
    )
    row_count: Mapped[int] = column(BigInteger, "rows this scope holds", server_default="0", default=0)
    input_digest: Mapped[str | None] = column(String(64), "sha256 of what the last update read")
    code_version: Mapped[str | None] = column(String(32), "version of the kernel that computed the rows")
    run_uid: Mapped[uuid.UUID | None] = column(Uuid, "run that moved it last")
    updated_at: Mapped[datetime] = instant("when it moved last", server_default=func.now())


class RunTable(RegistryTable):
    """One row per run of the driver. `as_of` is fixed here once; retries reuse it."""

    __concept__ = "Run"
    as_of: Mapped[datetime] = instant("nothing later than this instant is used")
    status: Mapped[str] = column(String(16), "running, landed, partial, failed or cancelled", index=True)
    started_at: Mapped[datetime] = instant("start, by the database's clock", server_default=func.now(), index=True)
    finished_at: Mapped[datetime | None] = instant("end; null while it runs, or if it was killed")
    retry_of: Mapped[uuid.UUID | None] = column(Uuid, "first run of the chain that this one retries", index=True)
    arguments: Mapped[dict[str, Any]] = column(JSONB, "selection, executor, batch size ...", server_default="{}", default=dict)
    summary: Mapped[dict[str, Any] | None] = column(JSONB, "counts and seconds")
    code_version: Mapped[str] = column(String(255), "versions of msm, its kernels and numpy")
    submitter: Mapped[str | None] = column(String(255), "user and host")


class RunNodeTable(MetaTable):
    """What one run did to one node."""

    __concept__ = "RunNode"
    __table_args__ = (Index(None, "node_uid", "recorded_at"),)
    run_uid: Mapped[uuid.UUID] = column(Uuid, "the run", ForeignKey(RunTable.uid, ondelete="CASCADE"), primary_key=True)
    node_uid: Mapped[uuid.UUID] = column(Uuid, "progress row of the node", primary_key=True)
    kind: Mapped[str] = column(String(64), "prices, signal or portfolio")
    identifier: Mapped[str] = column(Identifier(512), "storage/asset_identifier, signal_uid or portfolio_identifier")
    status: Mapped[str] = column(String(16), "landed, up_to_date, failed, skipped or busy")
    reason: Mapped[str] = column(String(64), "why the node was in the plan")
    error: Mapped[dict[str, Any] | None] = column(JSONB, "reason and message of a failure")
    row_count: Mapped[int] = column(BigInteger, "rows written", server_default="0", default=0)
    watermark: Mapped[datetime | None] = instant("computed through this instant afterwards")
    attempts: Mapped[int] = column(Integer, "times the node was tried", server_default="1", default=1)
    seconds: Mapped[float] = column(Float(53), "share of its batch's time", server_default="0", default=0.0)
    recorded_at: Mapped[datetime] = instant("when the result was recorded", server_default=func.now())
