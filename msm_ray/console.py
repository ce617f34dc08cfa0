"""What people see of a command: logs, tables and errors. stdout is the result; everything else goes to stderr."""

import json
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any

import structlog
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from msm_core.data_nodes.base import failure_facts
from msm_core.database import redact
from msm_core.errors import (
    CalendarNotFound,
    ConfigurationError,
    CyclicPlan,
    DatabaseNotConfigured,
    EmptySchedule,
    InvalidNamespace,
    MsmError,
    RowNotFound,
    RunNotFound,
    SelectionError,
    SourceConflict,
    SourceNotRegistered,
    SourceUnusable,
    StorageCollision,
    StorageMismatch,
    StorageNotPrepared,
    UnknownKind,
    UnusableFile,
)

EXIT_CRASH, EXIT_USAGE = 1, 2
USAGE_ERRORS = (
    *(ConfigurationError, SelectionError, DatabaseNotConfigured, InvalidNamespace, StorageNotPrepared, RunNotFound, RowNotFound),
    *(SourceNotRegistered, SourceUnusable, SourceConflict, UnusableFile, CalendarNotFound, EmptySchedule),
    *(StorageMismatch, StorageCollision, UnknownKind, CyclicPlan),
)


class Output(StrEnum):
    table = "table"
    json = "json"


OutputOption = Annotated[Output, typer.Option("--output", "-o", help="table for people, json for programs (one object on stdout).")]
FILE_WIDTH = 160  # a pipe or a file has no width of its own; rich would fold tables at 80
out = Console()
err = Console(stderr=True)
if not out.is_terminal:
    out.width = FILE_WIDTH


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


def tell_error(error: MsmError, as_json: bool = False) -> int:
    """One clear sentence on stderr, and an object on stdout where asked for; returns the exit code."""
    facts = failure_facts(error)
    if as_json:
        emit_json({"error": facts})
    err.print(f"[red]error:[/red] {escape(facts['message'])}", highlight=False, markup=True, soft_wrap=True)
    return EXIT_USAGE if isinstance(error, USAGE_ERRORS) else EXIT_CRASH
