"""Price sources: anyone's table or view is one by a row in the catalogue. It is registered here, never created, moved or changed.

A source has the price grain: asset_identifier, time_index and at least one numeric column. What the catalogue tells of it - cadence,
time label - decides numbers, so it changes only when that is asked for. Table names are those of the database, letter by letter:
`bars` or `vendor.bars`, without quotation marks.
"""

import uuid
from datetime import timedelta
from typing import Any, Literal

from psycopg import sql
from sqlalchemy import Connection, update

from msm_core.api import runtime
from msm_core.api.checks import check_text, check_value, refusals
from msm_core.api.statements import table_of
from msm_core.copying import fetch
from msm_core.errors import ConfigurationError, InvalidRow, SourceConflict, SourceNotRegistered, SourceUnusable
from msm_core.frames import format_frequency, parse_frequency
from msm_core.identity import identity, logical_identifier, storage_uid
from msm_core.models import LOADED_NAMESPACE, ExternalPricesStorage, TimeIndexMetaTable
from msm_core.rows import upsert_rows
from msm_core.sources import GRAIN, LiveTable, Source, find_sources, grain_problems, live_table

TimeLabel = Literal["close", "session_date"]

DAILY = "1d"
NAMED_MAX = 20  # sources spelled out in an error
DECIDING = ("physical_table_name", "cadence", "time_label")  # what a registration may not change in passing
SPELLED = {"physical_table_name": "table", "time_label": "time label"}


# -- registering --------------------------------------------------------------------------------------------------------------


def register_source(
    identifier: str,
    table: str,
    *,
    cadence: str | None = None,
    time_label: TimeLabel = "close",
    description: str | None = None,
    replace: bool = False,
) -> Source:
    """Put a table or view with the price grain in the catalogue; asked again, it writes nothing.

    identifier   what configurations call it; the process namespace is applied. ExternalPricesTS keeps its table
    cadence      length of a bar, `1d`, `5m`, 1d at most; None = not told
    time_label   close: a bar is stamped at its end; session_date: at 00:00 UTC of its session's date (daily bars only)
    description  may change at any time; None leaves the one there is
    replace      let table, cadence and time label change: then what reads the source must be recomputed

    Raises SourceUnusable naming everything that is wrong, SourceConflict where something else is registered, EngineNotStarted.
    """
    name = logical_identifier(identifier)
    with refusals(TimeIndexMetaTable), runtime.connection(TimeIndexMetaTable) as connection:
        spelling, problems = _cadence(cadence, time_label)
        texts = {"identifier": identifier and name, "physical_table_name": table, "description": description}
        refused = [problem for column, value in texts.items() for problem in _refusal(column, value)]
        live = None if refused else live_table(connection, table)
        problems = [*refused, *problems, *([] if refused else _table_problems(connection, name, table, live))]
        if problems or live is None:
            raise SourceUnusable(source=name, why="; ".join(problems))
        asked: dict[str, Any] = {"identifier": name, "namespace": LOADED_NAMESPACE, "cadence": spelling, "time_label": time_label}
        if name == ExternalPricesStorage.logical_name():  # `prepare` tells its table and columns
            asked = {k: v for k, v in asked.items() if k != "cadence" or v}
        else:
            asked["physical_table_name"] = f"{live.schema}.{live.name}"  # the same for every search path
            asked["schema_fingerprint"] = identity({"kind": "schema", "columns": live.columns})
        asked |= {} if description is None else {"description": description}
        _store(connection, asked, live, replace)
        return find_source(connection, name)


def _store(connection: Connection, asked: dict[str, Any], live: LiveTable, replace: bool) -> None:
    """Insert the row, or change what differs of the one there is."""
    new = {"uid": storage_uid(asked["identifier"]), "kind": "prices", "physical_table_name": live.name, "schema_fingerprint": "", **asked}
    stored = upsert_rows(connection, TimeIndexMetaTable, [new], key=("identifier",), update=False)[0]
    if stored["kind"] != "prices":
        raise SourceUnusable(source=stored["identifier"], why=f"this system stores its {stored['kind']} there; choose another identifier")
    changed = {name: value for name, value in asked.items() if stored[name] != value}
    if "physical_table_name" in changed and live_table(connection, stored["physical_table_name"]) == live:
        del changed["physical_table_name"]  # the same table by a shorter name
    differences = [f"{SPELLED.get(name, name)} {stored[name]}, not {changed[name]}" for name in DECIDING if name in changed]
    if differences and not replace:
        raise SourceConflict(source=stored["identifier"], differences=" and ".join(differences))
    if changed:
        columns = table_of(TimeIndexMetaTable).c
        connection.execute(update(TimeIndexMetaTable).where(columns.uid == stored["uid"]).values(changed))


def _refusal(column: str, value: str | None) -> list[str]:
    """Why the catalogue cannot hold that text."""
    try:
        check_text(TimeIndexMetaTable, column, value)
        check_value(TimeIndexMetaTable, table_of(TimeIndexMetaTable).c[column], value, is_key=column == "identifier")
    except InvalidRow as error:
        return [error.facts["why"].replace(column, SPELLED.get(column, column), 1)]
    return []


def _cadence(cadence: str | None, time_label: str) -> tuple[str | None, list[str]]:
    """The one spelling of the cadence, and what is wrong with it and the time label."""
    spelling, problems = None, []
    try:
        length = parse_frequency(cadence) if cadence is not None else None
        spelling = format_frequency(length) if length else None
        if length and length > timedelta(days=1):
            problems.append(f"cadence {cadence} is longer than 1d; leave it out where bars come as they come")
    except (ConfigurationError, OverflowError):
        problems.append(f"cadence {cadence!r} is not of the form 5m, 1h or 1d")
    if time_label not in ("close", "session_date"):
        problems.append(f"time label {time_label!r} is neither close nor session_date")
    elif time_label == "session_date" and spelling != DAILY and not problems:
        problems.append(f"time label session_date is for daily bars only; give cadence {DAILY}, or stamp bars at their close")
    return spelling, problems


def _table_problems(connection: Connection, name: str, table: str, live: LiveTable | None) -> list[str]:
    external = ExternalPricesStorage.logical_name()
    if name.startswith(logical_identifier("InterpolatedPricesTS.", LOADED_NAMESPACE)):
        return ["identifiers of that form are made by this system; choose another"]
    if live is None:
        form = "schema.table at most, each name as the database has it, capitals included and without quotation marks"
        return [f"there is no table or view {table!r} that is {form}"]
    if name == external and live_table(connection, ExternalPricesStorage.__tablename__) != live:
        return [f"{external} is {ExternalPricesStorage.__tablename__}; register {table} under another identifier"]
    statement = sql.SQL("SELECT identifier FROM {} WHERE kind <> 'prices' AND physical_table_name = ANY(%(names)s)")
    own = fetch(connection, statement.format(_catalogue()), {"names": [live.name, f"{live.schema}.{live.name}"]})
    if own:
        return [f"{table} is storage {own[0][0]} of this system; a source is a table that others write"]
    return grain_problems(live.columns, live.readable)


# -- reading ------------------------------------------------------------------------------------------------------------------


def list_sources() -> list[Source]:
    """Every price source in the catalogue, by identifier, this system's interpolated ones included and however many there are.

    One whose table does not exist, or has been renamed, has no columns. Raises EngineNotStarted.
    """
    with runtime.connection(TimeIndexMetaTable) as connection:
        return find_sources(connection, None)


def get_source(source: str | uuid.UUID) -> Source:
    """The source with that identifier (the process namespace is applied) or uid. Raises SourceNotRegistered, EngineNotStarted."""
    with runtime.connection(TimeIndexMetaTable) as connection:
        return find_source(connection, source)


def find_source(connection: Connection, source: str | uuid.UUID) -> Source:
    """As `get_source`, in a transaction of the caller's."""
    names = [str(source), logical_identifier(str(source))]
    if found := find_sources(connection, names):
        return found[0]
    known = [s.identifier for s in find_sources(connection, None)]
    more = f" and {len(known) - NAMED_MAX} more (msm-ray sources list)" if len(known) > NAMED_MAX else ""
    raise SourceNotRegistered(source=str(source), known=(", ".join(known[:NAMED_MAX]) or "none") + more)


def source_hints(connection: Connection, source: Source) -> list[str]:
    """What would make the source faster to read or possible to load; nothing here is an error."""
    live = live_table(connection, source.table)
    if live is None:
        return grain_problems({}, False)
    if live.kind not in "rp":
        return [f"it is no plain table: its own table wants an index on ({', '.join(GRAIN)}), and is what bars are loaded into"]
    return [] if live.unique else [f"reading by asset and time wants an index, and loading needs a unique one: {live.create_index}"]


def source_facts(connection: Connection, source: Source) -> dict[str, Any]:
    """Everything that can be told of a source, as plain data; `estimated_rows` is the server's estimate, None where it has none."""
    live = live_table(connection, source.table)
    statement = sql.SQL("SELECT description FROM {} WHERE uid = %(uid)s").format(_catalogue())
    return {
        "identifier": source.identifier,
        "uid": str(source.uid),
        "table": source.table,
        "kind": source.kind,
        "cadence": source.cadence,
        "time_label": source.time_label,
        "description": fetch(connection, statement, {"uid": source.uid})[0][0],
        "exists": live is not None,
        "readable": source.readable,
        "estimated_rows": live.rows if live else None,
        "columns": dict(sorted(source.columns.items())),
        "hints": source_hints(connection, source),
    }


def _catalogue() -> sql.Identifier:
    return sql.Identifier(TimeIndexMetaTable.__tablename__)
