"""The one road from storage to storage: claim, read, compute, append, advance - a batch of nodes in one transaction.

1. What others own (prices, calendars) is read in a transaction of its own, under the run's snapshot where there is one.
2. The progress rows of the batch are claimed; a node that a rival holds, or has moved, is reported `busy`.
3. What we own (signals, weights, values) is read in the claiming transaction, set-based.
4. Every node is computed in its own try/except: a failure drops out, the rest land.
5. Rows are appended and progress is advanced by compare-and-set; commit, or nothing.

Transient errors repeat the whole unit. A constraint error at write time halves the batch until the culprit stands alone.
"""

import hashlib
import time
import traceback
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np
from sqlalchemy import Connection, Engine

from msm_core.database import redact, retrying, sqlstate, transaction
from msm_core.errors import MsmError, NodeFailed
from msm_core.storage import Advance, ProgressRows, Scope, claim, commit_advances

Status = Literal["landed", "up_to_date", "failed", "skipped", "busy"]
CONSTRAINT_CLASSES = ("22", "23")  # data exception, integrity violation: one row is to blame


@dataclass(frozen=True)
class NodeResult:
    """What happened to one node; `error` is {"reason", "message"} of a failure, redacted."""

    kind: str
    identifier: str
    status: Status
    rows: int = 0
    watermark: datetime | None = None
    error: dict[str, str] | None = None
    seconds: float = 0.0
    attempts: int = 1


class Node(Protocol):
    """A node in a batch: what it is called, and the progress rows that it moves together, its own first."""

    @property
    def identifier(self) -> str: ...
    @property
    def scopes(self) -> tuple[Scope, ...]: ...
    @property
    def expected_epoch(self) -> int | None: ...


N = TypeVar("N", bound=Node)
N_contra = TypeVar("N_contra", bound=Node, contravariant=True)


class NodeKind(Protocol[N_contra]):
    """How one kind of node reads and computes. `update` returns the advances of one node, none when there is nothing new."""

    @property
    def name(self) -> str: ...
    def read_outside(self, connection: Connection, nodes: Sequence[N_contra], as_of: datetime, world: str | None) -> Any: ...
    def read_inside(self, connection: Connection, nodes: Sequence[N_contra], progress: ProgressRows, outside: Any) -> Any: ...
    def update(self, node: N_contra, progress: ProgressRows, outside: Any, inside: Any, as_of: datetime) -> list[Advance]: ...
    def finish(self, connection: Connection, nodes: Sequence[N_contra]) -> None: ...


@dataclass(frozen=True)
class Batch(Generic[N]):
    """Nodes of one kind that travel, read and commit together."""

    kind: NodeKind[N]
    nodes: tuple[N, ...]
    as_of: datetime
    run_uid: uuid.UUID | None = None
    snapshot: str | None = None

    @property
    def world(self) -> str | None:
        """Names the one state of outside inputs that all batches of the run read; a snapshot's id alone may come again."""
        return f"{self.run_uid} {self.snapshot} {self.as_of.isoformat()}" if self.run_uid and self.snapshot else None


def update_batch(engine: Engine, batch: Batch[N]) -> list[NodeResult]:
    """Bring the batch's nodes up to date. A node's own failure is reported, never raised; only a lost database raises."""
    started = time.perf_counter()
    results = _update(engine, batch, batch.nodes, _read_outside(engine, batch))
    share = (time.perf_counter() - started) / max(len(results), 1)
    return [NodeResult(**{**vars(r), "seconds": share}) for r in results]


def _read_outside(engine: Engine, batch: Batch[Any]) -> Any:
    for attempt in retrying():
        with attempt, transaction(engine, read_only=True, snapshot=batch.snapshot) as connection:
            return batch.kind.read_outside(connection, batch.nodes, batch.as_of, batch.world)
    raise AssertionError("unreachable: the last attempt raises")


def _update(engine: Engine, batch: Batch[N], nodes: Sequence[N], outside: Any) -> list[NodeResult]:
    try:
        for attempt in retrying():
            with attempt:
                return _attempt(engine, batch, nodes, outside)
    except Exception as error:
        if sqlstate(error)[:2] not in CONSTRAINT_CLASSES:
            raise
        if len(nodes) == 1:
            return [_failure(batch.kind.name, nodes[0], error)]
        half = len(nodes) // 2
        return [*_update(engine, batch, nodes[:half], outside), *_update(engine, batch, nodes[half:], outside)]
    raise AssertionError("unreachable: the last attempt raises")


def _attempt(engine: Engine, batch: Batch[N], nodes: Sequence[N], outside: Any) -> list[NodeResult]:
    kind, results, advances, landed = batch.kind, list[NodeResult](), list[Advance](), list[N]()
    with transaction(engine) as connection:
        progress = claim(connection, [s.uid for node in nodes for s in node.scopes])
        ready = [node for node in nodes if _is_ours(node, progress)]
        results += [NodeResult(kind.name, node.identifier, "busy") for node in nodes if not _is_ours(node, progress)]
        inside = kind.read_inside(connection, ready, progress, outside)
        for node in ready:
            try:
                moved = kind.update(node, progress, outside, inside, batch.as_of)
            except Exception as error:
                results.append(_failure(kind.name, node, error))
                continue
            results.append(_outcome(kind.name, node, moved, progress))
            if moved:
                advances += moved
                landed.append(node)
        if advances:
            commit_advances(connection, advances, batch.run_uid)
            kind.finish(connection, landed)
    return results


def _is_ours(node: Node, progress: ProgressRows) -> bool:
    """All progress rows of the node are claimed, and stand where the plan saw them."""
    claimed = all(scope.uid in progress for scope in node.scopes)
    return claimed and node.expected_epoch in (None, progress[node.scopes[0].uid].epoch)


def _outcome(kind: str, node: Node, moved: Sequence[Advance], progress: ProgressRows) -> NodeResult:
    if not moved:
        return NodeResult(kind, node.identifier, "up_to_date", watermark=progress[node.scopes[0].uid].watermark)
    rows = sum(a.row_count if a.replace else a.row_count - progress[a.scope.uid].row_count for a in moved)
    return NodeResult(kind, node.identifier, "landed", rows, moved[0].watermark)


def _failure(kind: str, node: Node, error: Exception) -> NodeResult:
    return NodeResult(kind, node.identifier, "failed", error=failure_facts(error))


def failure_facts(error: Exception) -> dict[str, str]:
    """{"reason", "message"} of any error, without secrets; an unforeseen one also tells where it came from."""
    if isinstance(error, MsmError):
        return {"reason": error.reason, "message": redact(str(error))}
    unforeseen = NodeFailed(type=type(error).__name__, text=redact(str(error)).strip())
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno})" if frames else ""
    return {"reason": unforeseen.reason, "message": f"{unforeseen}{where}"}


def input_digest(*arrays: np.ndarray | Sequence[str]) -> str:
    """sha256 of what an update read, for provenance."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes() if isinstance(array, np.ndarray) else "\0".join(array).encode())
    return digest.hexdigest()
