"""Following a command that runs a fleet: bars on a terminal, lines elsewhere, events for programs, figures for Prometheus."""

import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import structlog
import typer
from rich.console import RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from msm_core.data_nodes.base import NodeResult
from msm_ray.console import err
from msm_ray.events import Events
from msm_ray.metrics import Ending, metrics_path, write_metrics
from msm_ray.plan import Plan
from msm_ray.progress import STAGES, Following, Standing
from msm_ray.run import Observer, RunReport

log = structlog.get_logger()

LINE_EVERY_SECONDS = 10.0
TEXT_WIDTH, BAR_WIDTHS = 71, (8, 40)  # columns of everything but the bars; of a bar, least and most


class RunOutput(StrEnum):
    table = "table"
    json = "json"
    ndjson = "ndjson"


RunOutputOption = Annotated[
    RunOutput,
    typer.Option(
        "--output", "-o", help="table for people; json for programs: one object on stdout; ndjson: one per line, as things happen (below)."
    ),
]
MetricsOption = Annotated[
    Path | None,
    typer.Option(help="Leave the run's figures here for node_exporter's textfile collector, NAME.prom. Default: MSM_METRICS_FILE."),
]


class Watcher(Observer):
    """Follows one run. `lines` tells it on stderr every ten seconds."""

    def __init__(self, events: Events | None, lines: bool) -> None:
        self.following, self.events = Following(), events
        self.report: RunReport | None = None
        self._lines, self._spoke = lines, time.monotonic()

    def planned(self, run_uid: uuid.UUID, plan: Plan) -> None:
        self.following.planned(run_uid, plan)
        if self.events:
            self.events.planned(run_uid, plan)

    def landed(self, results: Sequence[NodeResult]) -> None:
        if not results:  # a lost batch, of which the halves are under way
            return
        now = time.monotonic()
        news = self.following.landed(results, now)
        if self.events:
            self.events.landed(results, news, self.following)
        if self._lines and now - self._spoke >= LINE_EVERY_SECONDS:
            self._spoke = now
            log.info(line(self.following, now))

    def finished(self, report: RunReport) -> None:
        self.report = report
        if self.events:
            self.events.finished(report)


@contextmanager
def watching(output: RunOutput, metrics_file: Path | None = None, *, with_metrics: bool = True) -> Iterator[Watcher]:
    """Follow one command, whatever its end. An error is an event too, and raised again; it is left in the metrics as a failed run.

    metrics_file  default: MSM_METRICS_FILE. Raises UnusableFile before anything else happens.
    with_metrics  False = the file is for the runs of a real fleet: leave it alone
    """
    events = Events() if output == RunOutput.ndjson else None
    # events that come to the same terminal are all there is to see; bars would run through them
    on_terminal = err.is_interactive and sys.stderr.isatty() and not (events and sys.stdout.isatty())
    watcher, began, path = Watcher(events, lines=not on_terminal), time.time(), None
    try:
        path = metrics_path(metrics_file) if with_metrics else None
        with _live(watcher.following) if on_terminal else nullcontext():
            yield watcher
    except BaseException as error:
        if events:
            events.error(error)
        _leave(path, watcher, Ending("failed" if isinstance(error, Exception) else "cancelled", began, time.time()))
        raise
    if report := watcher.report:
        _leave(path, watcher, Ending(report.status, began, time.time(), report.oldest_watermark))


def _leave(path: Path | None, watcher: Watcher, ending: Ending) -> None:
    """What has landed has landed: metrics that cannot be written make no run fail."""
    if path is None:
        return
    try:
        write_metrics(path, watcher.following, ending)
    except OSError as error:
        log.warning("the metrics could not be written", file=str(path), error=str(error))


def _live(following: Following) -> Live:
    """stdout is left alone: it may be a file, and rich would turn to the terminal what is written there."""
    began = time.monotonic()
    return Live(
        get_renderable=lambda: bars(following, time.monotonic() - began, time.monotonic(), err.width),
        console=err,
        refresh_per_second=4,
        transient=True,
        redirect_stdout=False,
    )


def bars(following: Following, elapsed: float, now: float, width: int) -> RenderableType:
    """A bar per stage that has nodes, and a last row for the whole run; `width` in columns, 80 are enough."""
    if following.run_uid is None:
        return Text(f"starting  {_clock(elapsed)}")
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    table.add_column("")
    for name in ("nodes", "nodes/s", "rows/s", "quarantined", "ETA"):
        table.add_column(name, justify="right", no_wrap=True)
    room = min(max(width - TEXT_WIDTH, BAR_WIDTHS[0]), BAR_WIDTHS[1])
    for kind, name in STAGES.items():
        standing = following.standing(now, kind)
        if standing.total:
            table.add_row(name, ProgressBar(total=standing.total, completed=standing.done, width=room), *_cells(standing))
    table.add_row(Text("elapsed", style="dim"), Text(_clock(elapsed), style="dim"), *_cells(following.standing(now)))
    return table


def line(following: Following, now: float) -> str:
    """The same facts: `signals 41/41 · portfolios 12,345/30,000 · 120 nodes/s · 45,000 rows/s · 3 quarantined · ETA 2:31`."""
    stages = {name: following.standing(now, kind) for kind, name in STAGES.items()}
    whole = following.standing(now)
    facts = [f"{name} {s.done:,}/{s.total:,}" for name, s in stages.items() if s.total]
    facts += [f"{_rate(whole.nodes_per_second)} nodes/s", f"{_rate(whole.rows_per_second)} rows/s"]
    return " · ".join([*facts, f"{whole.quarantined:,} quarantined", f"ETA {_eta(whole)}"])


def _cells(standing: Standing) -> tuple[RenderableType, ...]:
    bad = Text(f"{standing.quarantined:,}", style="red" if standing.quarantined else "")
    rates = (_rate(standing.nodes_per_second), _rate(standing.rows_per_second))
    return (f"{standing.done:,}/{standing.total:,}", *rates, bad, _eta(standing))


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}" if value < 10 else f"{value:,.0f}"


def _eta(standing: Standing) -> str:
    return "-" if standing.eta_seconds is None else _clock(standing.eta_seconds)


def _clock(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
