"""What a row may hold: the checks on a value before it is sent, and the database's own refusals in our words."""

import json
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import CheckConstraint, Column, ForeignKeyConstraint, String, UniqueConstraint
from sqlalchemy.dialects.postgresql import JSONB, dialect
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError

from msm_core.database import redact, sqlstate
from msm_core.errors import InvalidRow
from msm_core.models import MetaTable
from msm_core.models.base import Identifier

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
UNSTORABLE = re.compile("[\x00\ud800-\udfff]")  # Postgres text takes neither NUL nor half a surrogate pair
SHOWN_CHARS_MAX = 60
Rule = ForeignKeyConstraint | UniqueConstraint | CheckConstraint
NAMES = dialect().identifier_preparer  # names of constraints as the database has them: cut, with a digest, where too long


# -- values -----------------------------------------------------------------------------------------------------------------------


def check_value(model: type[MetaTable], column: Column[Any], value: object, *, is_key: bool) -> None:
    """Raises InvalidRow, naming the field, for a value of the right type that the column cannot or should not hold.

    Identifiers (the key, and columns of type Identifier) have 1..255 characters, none of them a control character, in NFC.
    """
    problem = None
    if isinstance(value, str):
        problem = _text_problem(column, value, is_key)
    elif isinstance(column.type, JSONB) and value is not None:
        problem = _json_problem(value)
    if problem:
        text = f" {shown(value)}" if isinstance(value, str) else ""
        raise InvalidRow(model=model.__concept__, why=f"{column.name}{text} {problem}")


def check_text(model: type[MetaTable], name: str, value: object) -> None:
    """Raises InvalidRow for text that Postgres cannot even compare with."""
    if isinstance(value, str) and UNSTORABLE.search(value):
        raise InvalidRow(model=model.__concept__, why=f"{name} {shown(value)} holds a NUL character or half a surrogate pair")


def shown(value: object) -> str:
    """A value in an error: short, and with nothing in it that a terminal would act on."""
    text = ascii(value)
    return text if len(text) <= SHOWN_CHARS_MAX else f"{text[:SHOWN_CHARS_MAX]}..."


def _text_problem(column: Column[Any], value: str, is_key: bool) -> str | None:
    length = column.type.length if isinstance(column.type, String) else None
    if length is not None and len(value) > length:
        return f"has {len(value)} characters; at most {length} fit"
    if not (is_key or isinstance(column.type, Identifier)):
        return None
    if not value and getattr(column.default, "arg", None) != "":  # a column with that default takes empty for `none`
        return "is empty; an identifier has 1 character or more"
    if CONTROL.search(value):
        return "holds a control character"
    if not unicodedata.is_normalized("NFC", value):
        # two spellings that look alike would be two rows
        return "is not NFC-normalised; pass it through unicodedata.normalize('NFC', ...)"
    return None


def _json_problem(value: object) -> str | None:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        return f"is not JSON: {error}"
    if any(UNSTORABLE.search(text) for text in _texts(value)):
        return "holds a NUL character or half a surrogate pair"
    return None


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


# -- refusals ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def refusals(model: type[MetaTable]) -> Iterator[None]:
    """Turns what the database refuses into InvalidRow with the remedy; the driver's error, which may hold values, stays behind."""
    try:
        yield
    except (IntegrityError, DataError) as error:
        raise InvalidRow(model=model.__concept__, why=_why(model, error)) from None


def _why(model: type[MetaTable], error: DBAPIError) -> str:
    diagnostics: Any = getattr(error.orig, "diag", None)
    match sqlstate(error), _constraint(diagnostics):
        case (("23503" | "23001"), ForeignKeyConstraint() as key) if key.table.name == model.__tablename__:
            target = _concept(key.referred_table.name)
            value = re.search(r"=\((.*?)\)", diagnostics.message_detail or "")
            named = f" ({shown(value[1])[1:-1]})" if value else ""
            return f"{_columns(key)} names no {target} row{named}. Store the {target} first, or correct the name"
        case (("23503" | "23001"), ForeignKeyConstraint() as key):  # Postgres 18 tells RESTRICT (23001) from the rest
            return f"the row is still referenced by {_concept(key.table.name)}.{_columns(key)}. Repoint or delete those rows first"
        case "23505", UniqueConstraint() as unique:
            return f"{_columns(unique)} is taken by another row. Use upsert to change that row, or choose another value"
        case "23514", CheckConstraint() as check:
            return f"the rule {check.sqltext} is broken. Correct the values"
        case "23505", _:
            return "the uid is taken by another row. Leave uid out"
    text = redact(str(getattr(diagnostics, "message_primary", None) or "unknown reason"))
    return f"the database refused it ({text}). Correct the values"


def _constraint(diagnostics: Any) -> Rule | None:
    name, table_name = getattr(diagnostics, "constraint_name", None), getattr(diagnostics, "table_name", None)
    table = MetaTable.metadata.tables.get(table_name) if table_name else None
    for constraint in table.constraints if table is not None else ():
        if isinstance(constraint, Rule) and NAMES.format_constraint(constraint) == name:
            return constraint
    return None


def _columns(constraint: ForeignKeyConstraint | UniqueConstraint) -> str:
    return ", ".join(c.name for c in constraint.columns)


def _concept(table_name: str) -> str:
    concepts = {m.class_.__tablename__: m.class_.__concept__ for m in MetaTable.registry.mappers}
    return concepts.get(table_name, table_name)
