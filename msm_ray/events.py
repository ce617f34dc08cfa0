"""A run as newline-delimited JSON on stdout: one object per line, as things happen, flushed."""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, get_args

import structlog

from msm_core.data_nodes.base import NodeResult, Status, failure_facts
from msm_ray.plan import Plan
from msm_ray.progress import QUARANTINED, STAGES, Following, Standing
from msm_ray.run import RunReport

log = structlog.get_logger()

PROGRESS_EVERY_SECONDS = 5.0
HELP = """--output ndjson prints one JSON object per line as things happen. Each has event and time (UTC, ISO 8601):

run_started: run, as_of, nodes (per kind: total, work). Again as run_continued: with further nodes of a fleet of thousands, which is
planned in parts while the first ones run, and when nodes that another run held are asked once more.

batch: nodes that came to an end together: kind, rows, seconds (of a worker), and how many landed, up_to_date, failed, skipped, busy.

node: one that failed or was skipped: kind, identifier, status, reason, message.

progress, now and then: nodes (per kind: done, total), quarantined, rows, nodes_per_second, rows_per_second, eta_seconds (null: unknown).

run_finished: the summary, as of --output json. error: reason, message of what ended the command otherwise.

A kind is prices, signal or portfolio."""


class Events:
    """Writes the events of one run."""

    def __init__(self) -> None:
        self._spoke = float("-inf")
        self._started = False

    def emit(self, event: str, **facts: Any) -> None:
        line = json.dumps({"event": event, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), **facts}, default=str)
        try:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
        except BrokenPipeError:
            log.warning("nobody reads the events any more; the run goes on without them")
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def planned(self, run_uid: object, plan: Plan) -> None:
        total, work = Counter(kind for kind, _ in plan.nodes()), Counter(kind for kind, p in plan.nodes() if p.node is not None)
        nodes = {kind: {"total": total[kind], "work": work[kind]} for kind in STAGES}
        self.emit("run_continued" if self._started else "run_started", run=str(run_uid), as_of=plan.as_of.isoformat(), nodes=nodes)
        self._started = True

    def landed(self, results: Sequence[NodeResult], news: Sequence[NodeResult], following: Following) -> None:
        """news  those of the results that had not ended like this before"""
        for kind in STAGES:
            if batch := [r for r in results if r.kind == kind]:
                found = Counter(r.status for r in batch)
                counts = {status: found[status] for status in get_args(Status)}
                self.emit("batch", kind=kind, **counts, rows=sum(r.rows for r in batch), seconds=round(sum(r.seconds for r in batch), 3))
        for result in news:
            if result.status in QUARANTINED:
                self.node(result)
        now = time.monotonic()
        if now - self._spoke >= PROGRESS_EVERY_SECONDS:
            self._spoke = now
            self.progress(following.standing(now), following)

    def node(self, result: NodeResult) -> None:
        self.emit("node", kind=result.kind, identifier=result.identifier, status=result.status, **(result.error or {}))

    def progress(self, whole: Standing, following: Following) -> None:
        nodes = {kind: {"done": stage.done, "total": stage.total} for kind, stage in following.stages.items()}
        facts = {name: _rounded(value) for name, value in whole._asdict().items() if name not in ("done", "total")}
        self.emit("progress", nodes=nodes, **facts)

    def finished(self, report: RunReport) -> None:
        for result in report.failures():
            if result.status == "busy":  # to the end; before, it was asked again
                self.node(result)
        self.emit("run_finished", **report.summary())

    def error(self, error: BaseException) -> None:
        facts = failure_facts(error) if isinstance(error, Exception) else {"reason": "cancelled", "message": "interrupted"}
        self.emit("error", **facts)


def _rounded(value: float | None) -> float | None:
    return round(value, 1) if isinstance(value, float) else value
