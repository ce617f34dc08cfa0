"""`msm-ray sources`: whose tables prices are read from. `msm-ray prices`: bars from files, for people without a producer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import msm_core
from msm_core.api import get_source, list_sources, register_source, runtime
from msm_core.api.sources import source_facts
from msm_core.errors import LoadRefused
from msm_core.models import TimeIndexMetaTable
from msm_core.sources import Source
from msm_ray.console import Output, OutputOption, emit_json, emit_table, err, out
from msm_ray.session import connect

EXIT_NOTHING_LOADED = 4
ERRORS_SHOWN = 20

sources_app = typer.Typer(
    help="""Price sources: tables and views that portfolios read prices from, whoever writes them.

    A source has a text column asset_identifier, a timestamptz column time_index and numbers; what else it has does not matter.
    A table that is shaped otherwise becomes one by a view. Nothing of it is copied or changed.""",
    no_args_is_help=True,
)
prices_app = typer.Typer(help="Bars from files, into the table of a registered source.", no_args_is_help=True)


class TimeLabelName(StrEnum):
    close = "close"
    session_date = "session_date"


@sources_app.command("register")
def sources_register(
    identifier: Annotated[str, typer.Argument(help="What configurations call it.")],
    table: Annotated[str, typer.Option(help="table or schema.table, spelled as the database has it, without quotation marks.")],
    cadence: Annotated[str | None, typer.Option(help="Length of a bar: 1d, 1h, 5m. Needed for interpolation.")] = None,
    time_label: Annotated[
        TimeLabelName, typer.Option(help="close: stamped at the end of the bar; session_date: at 00:00 UTC of the session's date.")
    ] = TimeLabelName.close,
    description: Annotated[str | None, typer.Option(help="What it holds; may change at any time.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Let table, cadence or time label change.")] = False,
    output: OutputOption = Output.table,
) -> None:
    """Put a table or view in the catalogue. Idempotent; anything that does not fit is named, with its remedy.

    Example: msm-ray sources register VendorBars --table vendor.bars --cadence 1d

    Then, in fleet.yaml: prices: { daily: { source: VendorBars } }
    """
    _start()
    source = register_source(identifier, table, cadence=cadence, time_label=time_label.value, description=description, replace=replace)
    _show(source, output)


@sources_app.command("list")
def sources_list(output: OutputOption = Output.table) -> None:
    """Every price source in the catalogue, and whether its table exists."""
    _start()
    rows = [(s.identifier, s.table, s.kind, s.cadence, s.time_label, _state(s)) for s in list_sources()]
    columns = ("identifier", "table", "kind", "cadence", "time_label", "state")
    if output == Output.json:
        emit_json({"sources": [dict(zip(columns, row, strict=True)) for row in rows]})
    else:
        emit_table(f"{len(rows)} price sources", columns, rows)


@sources_app.command("show")
def sources_show(
    identifier: Annotated[str, typer.Argument(help="Identifier or uid.")],
    output: OutputOption = Output.table,
) -> None:
    """One source: its facts, columns and types, how many rows about, and what would make it better to read."""
    _start()
    _show(get_source(identifier), output)


@prices_app.command("load")
def prices_load(
    file: Annotated[Path, typer.Argument(help=".csv, .csv.gz or .parquet", dir_okay=False)],
    source: Annotated[str, typer.Option(help="Registered source to load into, for example ExternalPricesTS.")],
    column: Annotated[str | None, typer.Option(help="Where the values of a wide file go; default: close.")] = None,
    calendar: Annotated[str | None, typer.Option(help="Bare dates are stamped at this calendar's session closes.")] = None,
    create_assets: Annotated[
        bool, typer.Option("--create-assets", help="Register unknown assets; --calendar becomes that of loaded assets without one.")
    ] = False,
    errors: Annotated[Path | None, typer.Option(help="Write everything that is wrong to this CSV file.", dir_okay=False)] = None,
    output: OutputOption = Output.table,
) -> None:
    """Insert or correct bars, whole or not at all: any wrong row, and nothing is loaded (exit 4). Loading it again writes nothing.

    Long: one row per asset and time. A column of times (time_index, time, datetime, timestamp or date), one of assets
    (asset_identifier, asset, symbol or ticker), and any columns of the source's table. Wide: a column of times, and one per asset.

    A time needs an offset: 2024-01-02T21:00:00Z. A bare date needs --calendar, or a source with time label session_date.

    Example: msm-ray prices load closes.csv --source ExternalPricesTS --calendar NYSE --create-assets
    """
    from msm_core.data_nodes.loading import load_prices  # it takes pyarrow, which no other verb needs

    engine = _start()
    try:
        with _counting(file.name) as progress:
            report = load_prices(
                engine, file, source, column=column, calendar=calendar, create_assets=create_assets, errors=errors, progress=progress
            )
    except LoadRefused as refused:
        _show_errors(refused, errors, output)
        raise typer.Exit(EXIT_NOTHING_LOADED) from None
    if output == Output.json:
        emit_json(asdict(report))
        return
    span = f", {report.first:%Y-%m-%d %H:%MZ} to {report.last:%Y-%m-%d %H:%MZ}" if report.first and report.last else ""
    created = f" ({report.assets_created} of them new)" if report.assets_created else ""
    out.print(
        f"{report.source}: {report.bars_read:,} bars read, {report.rows_written:,} rows inserted or changed; "
        f"{report.assets} assets{created}{span}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _start() -> Any:
    connect()
    return msm_core.start_engine(models=[TimeIndexMetaTable]).engine


def _state(source: Source) -> str:
    return "no such table" if not source.columns else "readable" if source.readable else "not readable"


def _show(source: Source, output: Output) -> None:
    with runtime.connection(TimeIndexMetaTable) as connection:
        facts = source_facts(connection, source)
    if output == Output.json:
        emit_json(facts)
        return
    about = (
        "unknown; ANALYZE would tell" if facts["estimated_rows"] is None else f"about {facts['estimated_rows']:,}, by the server's estimate"
    )
    shown = {k: v for k, v in facts.items() if k not in ("columns", "hints", "exists", "readable", "estimated_rows")}
    rows = [*shown.items(), ("state", _state(source)), ("rows", about)]
    emit_table("Price source", ("fact", "value"), rows)
    emit_table("Columns", ("column", "type"), facts["columns"].items())
    for hint in facts["hints"]:
        out.print(f"hint: {hint}", highlight=False, markup=False, soft_wrap=True)


def _show_errors(refused: LoadRefused, path: Path | None, output: Output) -> None:
    count, kept = refused.facts["count"], refused.facts["errors"]
    if output == Output.json:
        emit_json({"rows_written": 0, "error_count": count, "errors": kept, "errors_file": path and str(path)})
        return
    rows = [tuple(error.values()) for error in kept[:ERRORS_SHOWN]]
    title = f"{count:,} errors, nothing was loaded" + (f"; the first {ERRORS_SHOWN}" if count > ERRORS_SHOWN else "")
    emit_table(title, tuple(kept[0]), rows)
    if path or count > ERRORS_SHOWN:
        out.print(f"All of them: {path}" if path else "All of them: --errors FILE.csv", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _counting(file: str) -> Iterator[Callable[[int], None]]:
    """Bars read so far, on a terminal."""
    if not err.is_terminal:
        yield lambda bars: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task(file, total=None)
        yield lambda bars: progress.update(task, description=f"{file}: {bars:,} bars")
