"""A run's figures in Prometheus's text format, for the textfile collector of node_exporter. No label grows with the fleet.

    msm_run_status{status}                     1 for what the run came to: landed, partial, failed or cancelled; 0 for the others
    msm_run_start_timestamp_seconds            when the command began, Unix time; likewise ..._end_...
    msm_run_last_landed_timestamp_seconds      end of the last run of which everything landed, kept from the file before
    msm_run_duration_seconds
    msm_run_as_of_timestamp_seconds            the run's as-of, Unix time
    msm_run_nodes{kind,status}                 nodes that came to an end; kind: prices, signal or portfolio
    msm_run_waiting_nodes{kind}                nodes that a run left behind when it crashed
    msm_run_quarantined_nodes                  failed and skipped, of all kinds
    msm_run_rows_written{kind}
    msm_run_oldest_watermark_lag_seconds       as-of minus the watermark of the most stale portfolio, failed ones too

A sample that is not known, such as the as-of of a run that found no database, is left out.
"""

import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import get_args

from prometheus_client import CollectorRegistry, Gauge, write_to_textfile
from prometheus_client.parser import text_string_to_metric_families

from msm_core.data_nodes.base import Status
from msm_core.errors import UnusableFile
from msm_core.settings import Settings
from msm_ray.progress import Following

RUN_STATUSES = ("landed", "partial", "failed", "cancelled")
LAST_LANDED = "msm_run_last_landed_timestamp_seconds"


@dataclass(frozen=True)
class Ending:
    """How a command that runs a fleet ended; times are Unix seconds."""

    status: str
    began: float
    ended: float
    oldest_watermark: datetime | None = None


def metrics_path(given: Path | None) -> Path | None:
    """The file asked for, or that of MSM_METRICS_FILE. Raises UnusableFile where it could not be written: at the end it is too late."""
    path = given or Settings().metrics_file
    if path is None or path == Path():  # an empty variable
        return None
    path = path.expanduser().absolute()
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise UnusableFile(file=str(path), why="metrics cannot be written there. Name a file in a folder that exists and is writable")
    return path


def write_metrics(path: Path, following: Following, ending: Ending) -> None:
    """Replace the file as a whole: a reader sees the one of before, or this. Raises OSError."""
    registry = CollectorRegistry()

    def gauge(name: str, about: str, value: float | None = None, labels: tuple[str, ...] = ()) -> Gauge:
        made = Gauge(name, about, labels, registry=registry)
        if value is not None:
            made.set(value)
        return made

    status = gauge("msm_run_status", "1 for the status of the last run, 0 for the others.", labels=("status",))
    for name in RUN_STATUSES:
        status.labels(name).set(name == ending.status)
    gauge("msm_run_start_timestamp_seconds", "When the last run began, Unix time.", ending.began)
    gauge("msm_run_end_timestamp_seconds", "When the last run ended, Unix time.", ending.ended)
    gauge("msm_run_duration_seconds", "How long the last run took.", ending.ended - ending.began)
    last_landed = ending.ended if ending.status == "landed" else _last_landed(path)
    if last_landed is not None:
        gauge(LAST_LANDED, "When the last run of which everything landed ended, Unix time.", last_landed)
    if following.as_of:
        gauge("msm_run_as_of_timestamp_seconds", "As-of of the last run, Unix time.", following.as_of.timestamp())
    if following.as_of and ending.oldest_watermark:
        lag = (following.as_of - ending.oldest_watermark).total_seconds()
        gauge("msm_run_oldest_watermark_lag_seconds", "As-of minus the watermark of the most stale portfolio.", lag)
    nodes = gauge("msm_run_nodes", "Nodes of the last run that came to an end.", labels=("kind", "status"))
    waiting = gauge("msm_run_waiting_nodes", "Nodes that the last run left behind.", labels=("kind",))
    rows = gauge("msm_run_rows_written", "Rows that the last run wrote.", labels=("kind",))
    for kind, stage in following.stages.items():
        for name in get_args(Status):
            nodes.labels(kind, name).set(stage.counts[name])
        waiting.labels(kind).set(len(stage.waiting))
        rows.labels(kind).set(stage.rows)
    quarantined = sum(stage.quarantined for stage in following.stages.values())
    gauge("msm_run_quarantined_nodes", "Nodes of the last run that failed or were skipped.", quarantined)
    write_to_textfile(str(path), registry)


def _last_landed(path: Path) -> float | None:
    """As the file of the run before has it; None when there is none that can be read."""
    try:
        families = list(text_string_to_metric_families(path.read_text()))
    except (OSError, ValueError):
        return None
    return next((sample.value for family in families for sample in family.samples if sample.name == LAST_LANDED), None)
