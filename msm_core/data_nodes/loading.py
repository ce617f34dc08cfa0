"""Files of bars into a registered table: read in chunks, checked row by row, staged, merged - whole or not at all.

1. The header says what the columns are: long (one row per asset and time) or wide (one column per asset).
2. Each chunk becomes `Bars`. Everything wrong with a cell is told with its row; a row that has a key is staged all the same.
3. What only the whole file can tell - rows given twice, assets that nobody registered - is asked of the stage.
4. Nothing wrong: one merge. Anything wrong: LoadRefused, and the transaction takes everything back.
"""

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from uuid import UUID

import psycopg
from psycopg import sql
from sqlalchemy import Connection, Engine

from msm_core.api.checks import check_value, shown
from msm_core.api.sources import find_source
from msm_core.api.statements import table_of
from msm_core.copying import execute, fetch
from msm_core.data_nodes.bar_files import ERROR_FIELDS, Parser, Told, layout_of, open_bars, usable_file
from msm_core.data_nodes.calendars import resolve_calendars
from msm_core.data_nodes.prices import Stage
from msm_core.database import redact, retrying, transaction
from msm_core.errors import ConfigurationError, EmptySchedule, InvalidRow, LoadRefused, MsmError, SourceUnusable, UnusableFile
from msm_core.frames import iso, utc
from msm_core.models import AssetTable
from msm_core.rows import write_rows
from msm_core.sessions import Sessions
from msm_core.sources import Source, grain_problems, live_table
from msm_core.storage import find_calendars


@dataclass(frozen=True)
class LoadReport:
    """What a load did. Bars: rows of a long file, filled cells of a wide one; first and last are None of an empty file."""

    source: str
    table: str
    bars_read: int
    rows_written: int
    assets: int
    assets_created: int
    first: datetime | None
    last: datetime | None


def load_prices(
    engine: Engine,
    path: Path,
    source_key: str | UUID,
    *,
    column: str | None = None,
    calendar: str | None = None,
    create_assets: bool = False,
    errors: Path | None = None,
    progress: Callable[[int], None] = lambda bars: None,
) -> LoadReport:
    """Insert or correct bars of a CSV (.csv, .csv.gz) or Parquet file in the table of a registered source; again, it writes nothing.

    column         where the values of a wide file go; default: close
    calendar       key of the calendar at whose session closes bare dates are stamped
    create_assets  register unknown assets; with `calendar`, it becomes the calendar of loaded assets that have none
    errors         CSV file for everything that is wrong
    progress       called with the number of bars read so far

    An empty cell is null. Rows are numbered as in the file; the header of a CSV is row 1. Raises LoadRefused, with the first errors,
    for wrong rows; UnusableFile, SourceNotRegistered, SourceUnusable, CalendarNotFound before. Then nothing is loaded.
    """

    def load() -> LoadReport:
        with _telling(path, errors) as told, transaction(engine) as connection:
            execute(connection, sql.SQL("SET LOCAL statement_timeout = 0"), {})  # the merge takes as long as the file is long
            source = _loadable(connection, source_key)
            sessions, calendar_uid = _calendar(connection, calendar, create_assets)
            names, chunks = open_bars(path, told)
            layout = layout_of(path.name, names, source, column)
            stage = Stage(connection, source.table, {name: source.columns[name] for name in layout.columns}, _is_marked(source))
            parser = Parser(layout, source, sessions, told)
            for rows, cells in chunks:
                stage.add(parser.bars(rows, cells))
                progress(stage.rows)
            unknown = _told_by_stage(stage, told, create_assets)
            if told.count:
                raise LoadRefused(file=path.name, count=told.count, first=told.first(), errors=told.kept)
            if create_assets:
                new = [{"unique_identifier": asset} for asset in unknown]
                write_rows(connection, AssetTable, new, key=("unique_identifier",), update=False)
            if create_assets and calendar_uid:
                stage.give_calendar(calendar_uid)
            written = _merged(stage, source)
            assets, first, last = stage.span()
            return LoadReport(source.identifier, source.table, stage.rows, written, assets, len(unknown), first, last)

    return retrying()(load)


def _told_by_stage(stage: Stage, told: "Told", create_assets: bool) -> list[str]:
    """Tells of rows that are given twice and of assets that cannot be; returns those that are not registered."""
    for row, asset, time in stage.repeated():
        told.add(row, asset, iso(utc(time, "time")), "", "asset and time are given twice in the file")
    unknown = stage.unknown_assets()
    for asset, row in unknown:
        if why := _unregistrable(asset) if create_assets else "is not registered; register it (Asset.upsert), or use --create-assets":
            told.add(row, asset, "", "", f"asset {shown(asset)} {why}")
    return [asset for asset, _ in unknown]


def _merged(stage: Stage, source: Source) -> int:
    try:
        return stage.merge()
    except psycopg.Error as error:
        if (error.sqlstate or "")[:2] not in ("22", "23", "42"):  # data, constraints, rights: the file or the table is to blame
            raise
        why = redact(error.diag.message_primary or "no reason given")
        raise SourceUnusable(source=source.identifier, why=f"the database refused the rows ({why}), so nothing was loaded") from None


@contextmanager
def _telling(file: Path, errors: Path | None) -> Iterator[Told]:
    """With a path for errors, all of them are also written there, from anew: old ones would be taken for this file's."""
    if errors is None:
        yield Told(None)
        return
    if errors.resolve() == file.resolve():
        raise UnusableFile(file=str(errors), why="errors would overwrite the file that is loaded; give --errors another name")
    with usable_file(str(errors)):
        text = errors.open("w", newline="", encoding="utf-8")
    with text:
        write = csv.writer(text).writerow
        write(ERROR_FIELDS)
        yield Told(write)


# -- where it goes ------------------------------------------------------------------------------------------------------------


def _loadable(connection: Connection, key: str | UUID) -> Source:
    """The registered source. Raises SourceNotRegistered, and SourceUnusable where it cannot be loaded."""
    source = find_source(connection, key)
    table = live_table(connection, source.table)
    problems = grain_problems(source.columns, source.readable)
    if source.kind != "prices":
        problems = ["this system makes it from another source; load into that one"]
    elif table and table.kind not in "rp":
        problems = ["it is a view; load into its table, registered as a source of its own"]
    elif table and not problems:
        problems += [] if table.writable else ["this database role may not write it; GRANT INSERT, UPDATE on it"]
        problems += [] if table.unique else [f"loading needs one row per asset and time. Run: {table.create_index}"]
    if problems:
        raise SourceUnusable(source=source.identifier, why="; ".join(problems))
    return source


def _is_marked(source: Source) -> bool:
    return source.columns.get("interpolated") == "boolean"


def _calendar(connection: Connection, key: str | None, is_given_to_assets: bool) -> tuple[Sessions | None, UUID | None]:
    """Sessions of the calendar and, where it is stored, its uid."""
    if key is None:
        return None, None
    now = fetch(connection, sql.SQL("SELECT now()"), {})[0][0]
    sessions, stored = resolve_calendars(connection, [key], now)[key], find_calendars(connection, [key]).get(key)
    if isinstance(sessions, MsmError):
        raise sessions
    if not len(sessions.dates):
        raise EmptySchedule(calendar=key, start=sessions.valid_from, end=sessions.valid_to)
    if is_given_to_assets and not stored:
        raise ConfigurationError(problems=f"calendar {key!r} is not stored, so assets cannot have it. Use create_from_pandas_calendar")
    return sessions, stored[0][1] if stored else None


def _unregistrable(asset: str) -> str | None:
    """Why no asset can be called that."""
    try:
        check_value(AssetTable, table_of(AssetTable).c.unique_identifier, asset, is_key=True)
    except InvalidRow as error:
        return error.facts["why"]
    return "has spaces at its ends" if asset != asset.strip() else None
