"""The ledger: what every run did to every node. A report for people and for `retry`; the truth about data is in DataNodeUpdate."""

import getpass
import platform
import socket
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
from psycopg import sql
from sqlalchemy import Connection, Engine

import msm_core
from msm_core.copying import execute, fetch
from msm_core.data_nodes.base import NodeResult
from msm_core.errors import RunNotFound
from msm_core.identity import node_uid
from msm_core.models import LOADED_NAMESPACE, DataNodeUpdateTable, PortfoliosStorage, RunNodeTable, RunTable, SignalWeightsStorage
from msm_core.plugins import code_version
from msm_core.rows import document, write_rows
from msm_core.storage import Scope

RUN, NODE = (sql.Identifier(table.__tablename__) for table in (RunTable, RunNodeTable))
SCOPES = {"signal": SignalWeightsStorage, "portfolio": PortfoliosStorage}


def start_run(engine: Engine, as_of: datetime, arguments: Mapping[str, Any], retry_of: uuid.UUID | None = None) -> uuid.UUID:
    uid = uuid.uuid4()
    versions = f"msm {msm_core.__version__}, {code_version()}, numpy {np.__version__}, python {platform.python_version()}"
    row = {
        "uid": uid,
        "as_of": as_of,
        "status": "running",
        "arguments": dict(arguments),
        "code_version": versions,
        "submitter": _submitter(),
    }
    with engine.begin() as connection:
        write_rows(connection, RunTable, [row | {"retry_of": retry_of}], key=("uid",))
    return uid


def record(engine: Engine, run_uid: uuid.UUID, results: Sequence[NodeResult], reasons: Mapping[tuple[str, str], str]) -> None:
    """Results of one batch, in one statement. Of prices that are up to date, thousands of assets a night, there is nothing to tell."""
    rows = [
        {
            "run_uid": run_uid,
            "node_uid": _uid(r.kind, r.identifier),
            "kind": r.kind,
            "identifier": r.identifier,
            "status": r.status,
            "reason": reasons.get((r.kind, r.identifier), "dependency"),
            "error": r.error,
            "row_count": r.rows,
            "watermark": r.watermark,
            "attempts": r.attempts,
            "seconds": r.seconds,
        }
        for r in results
        if (r.kind, r.status) != ("prices", "up_to_date")
    ]
    if rows:
        with engine.begin() as connection:
            write_rows(connection, RunNodeTable, rows, key=("run_uid", "node_uid"))


def _uid(kind: str, identifier: str) -> uuid.UUID:
    """Progress row of a node."""
    if kind == "prices":
        storage, _, asset = identifier.partition("/")
        return node_uid(storage, asset, LOADED_NAMESPACE)
    return Scope(SCOPES[kind], identifier).uid


def finish_run(engine: Engine, run_uid: uuid.UUID, status: str, summary: Mapping[str, Any]) -> None:
    statement = sql.SQL("UPDATE {run} SET status = %(status)s, summary = %(summary)s::jsonb, finished_at = now() WHERE uid = %(uid)s")
    with engine.begin() as connection:
        execute(connection, statement.format(run=RUN), {"status": status, "summary": document(summary), "uid": run_uid})


def recent_runs(connection: Connection, limit: int) -> list[dict[str, Any]]:
    """Newest runs first."""
    statement = sql.SQL("""
        SELECT uid::text, status, as_of, started_at, finished_at, arguments, summary, retry_of::text
        FROM {run} ORDER BY started_at DESC LIMIT %(limit)s
    """).format(run=RUN)
    names = ("run", "status", "as_of", "started_at", "finished_at", "arguments", "summary", "retry_of")
    return [dict(zip(names, row, strict=True)) for row in fetch(connection, statement, {"limit": limit})]


UNFINISHED = ["failed", "skipped", "busy"]


def find_run(connection: Connection, run: str | None) -> tuple[uuid.UUID, datetime]:
    """(root of the retry chain, its as-of) of a run given by uid or how it begins; by default the newest with something unfinished.

    Raises RunNotFound.
    """
    statement = sql.SQL("""
        SELECT coalesce(r.retry_of, r.uid), r.as_of FROM {run} r
        WHERE starts_with(r.uid::text, %(run)s)
           OR (%(run)s::text IS NULL AND EXISTS (SELECT FROM {node} n WHERE n.run_uid = r.uid AND n.status = ANY(%(unfinished)s)))
        ORDER BY r.started_at DESC
    """).format(run=RUN, node=NODE)
    for root, as_of in dict(fetch(connection, statement, {"run": run, "unfinished": UNFINISHED})).items():
        if run is not None or unfinished(connection, root):
            return root, as_of
    raise RunNotFound(run=run or "with anything to retry")


def unfinished(connection: Connection, root: uuid.UUID) -> list[tuple[str, str]]:
    """(kind, identifier) of signals and portfolios whose newest result in the run and all its retries is failed, skipped or busy.

    Prices come along with the portfolios that wait for them.
    """
    statement = sql.SQL("""
        SELECT kind, identifier FROM (
            SELECT DISTINCT ON (n.node_uid) n.kind, n.identifier, n.status
            FROM {node} n JOIN {run} r ON r.uid = n.run_uid
            WHERE (r.uid = %(root)s OR r.retry_of = %(root)s) AND n.kind <> 'prices' ORDER BY n.node_uid, r.started_at DESC) newest
        WHERE status = ANY(%(unfinished)s) ORDER BY 1, 2
    """).format(run=RUN, node=NODE)
    return [(kind, identifier) for kind, identifier in fetch(connection, statement, {"root": root, "unfinished": UNFINISHED})]


def last_results(connection: Connection) -> dict[str, dict[str, Any]]:
    """Newest result per portfolio: status, error, watermark. One index probe each, however long the history of runs."""
    statement = sql.SQL("""
        SELECT d.scope, n.status, n.error, n.watermark FROM {progress} d CROSS JOIN LATERAL (
            SELECT status, error, watermark FROM {node} WHERE node_uid = d.uid ORDER BY recorded_at DESC LIMIT 1) n
        WHERE d.storage = %(storage)s
    """).format(progress=sql.Identifier(DataNodeUpdateTable.__tablename__), node=NODE)
    found = fetch(connection, statement, {"storage": PortfoliosStorage.logical_name()})
    return {identifier: {"status": status, "error": error, "watermark": watermark} for identifier, status, error, watermark in found}


def failed_portfolios(connection: Connection) -> set[str]:
    """Portfolios whose newest result is a failure."""
    return {identifier for identifier, r in last_results(connection).items() if r["status"] in ("failed", "skipped")}


def _submitter() -> str:
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (KeyError, OSError):  # a container whose uid has no name
        return f"unknown@{socket.gethostname()}"
