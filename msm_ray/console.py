"""What people see while a command works: logs, a live bar and tables. stdout is the result; everything else goes to stderr."""

import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated, Any

import structlog
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from msm_core.data_nodes.base import NodeResult
from msm_core.database import redact
from msm_ray.plan import Plan


class Output(StrEnum):
    table = "table"
    json = "json"


OutputOption = Annotated[Output, typer.Option("--output", "-o", help="table for people, json for programs (one object on stdout).")]
FILE_WIDTH = 160  # a pipe or a file has no width of its own; rich would fold tables at 80
out = Console()
err = Console(stderr=True)
if not out.is_terminal:
    out.width = FILE_WIDTH
LOG_EVERY_SECONDS = 10.0


def configure_logging(verbose: bool) -> None:
    """Structured lines on stderr; every text passes the one redacting filter."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _redacted,
            structlog.dev.ConsoleRenderer(colors=err.is_terminal),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG if verbose else logging.INFO),
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),  # looked up at each use: the stream may be replaced
    )


def _redacted(_logger: Any, _method: str, event: Any) -> Any:
    return {name: redact(value) if isinstance(value, str) else value for name, value in event.items()}


def narrate(text: str) -> None:
    """One step of a longer command, on stderr."""
    err.print(f"[green]•[/green] {escape(text)}", highlight=False)


def emit_json(document: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(document, indent=2, default=str) + "\n")


def emit_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    table = Table(title=title, title_justify="left", header_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*("" if value is None else escape(str(value)) for value in row))  # a name may look like markup
    out.print(table)


class Watcher:
    """Follows a run: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._task = progress.add_task("planning", total=None) if progress else None
        self._seen: Counter[str] = Counter()
        self._rows, self._spoke = 0, time.monotonic()

    def __call__(self, plan: Plan, results: Sequence[NodeResult]) -> None:
        self._seen.update(r.status for r in results)
        self._rows += sum(r.rows for r in results)
        total = len(plan.work()) + len(plan.settled())
        done = sum(self._seen.values())
        bad = self._seen["failed"] + self._seen["skipped"]
        text = f"{self._rows:,} rows" + (f", [red]{bad} failed[/red]" if bad else "")
        if self._progress and self._task is not None:
            self._progress.update(self._task, description=text, total=total, completed=min(done, total))
        elif time.monotonic() - self._spoke > LOG_EVERY_SECONDS:
            self._spoke = time.monotonic()
            err.print(f"{done} of {total} nodes, {self._rows:,} rows, {bad} failed", highlight=False)


@contextmanager
def watching() -> Iterator[Watcher]:
    if not err.is_terminal:
        yield Watcher(None)
        return
    columns = (
        SpinnerColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as progress:
        yield Watcher(progress)
