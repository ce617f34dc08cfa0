"""Arrays to and from Postgres in its binary formats, without row objects.

`COPY ... (FORMAT binary)` is fed with whole column blocks encoded by numpy; array results become numpy arrays without passing through
Python numbers. Source of both formats: https://www.postgresql.org/docs/current/sql-copy.html and src/backend/utils/adt/arrayfuncs.c.
Why not ADBC, the library: it cannot share a connection with the claim and the progress update, which must be one transaction with
the rows, and was measured at 0.6 of this end to end (lab/perf.md F).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import psycopg
from psycopg import sql
from psycopg.abc import Buffer
from psycopg.adapt import Loader
from psycopg.pq import Format
from sqlalchemy import Connection

from msm_core.frames import Floats, Times

COPY_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
COPY_TRAILER = b"\xff\xff"
NULL_LENGTH = np.frombuffer(b"\xff\xff\xff\xff", np.uint8)
POSTGRES_EPOCH = np.datetime64("2000-01-01", "us")
ROWS_PER_BLOCK = 8_192  # a block of them stays in the processor's cache
ARRAY_HEADER_BYTES = 20  # one dimension
FLOAT8_ARRAY_OID = 1022
TIMESTAMPTZ_ARRAY_OID = 1185


@dataclass(frozen=True)
class Text:
    """A text column by dictionary: codes (R,) into categories."""

    codes: np.ndarray
    categories: tuple[str, ...]

    @classmethod
    def constant(cls, value: str, rows: int) -> "Text":
        return cls(np.zeros(rows, np.int64), (value,))

    @classmethod
    def concatenate(cls, parts: Sequence["Text"]) -> "Text":
        offsets = np.cumsum([0, *(len(part.categories) for part in parts[:-1])])
        codes = np.concatenate([part.codes + offset for part, offset in zip(parts, offsets, strict=True)])
        return cls(codes, tuple(category for part in parts for category in part.categories))


Column = np.ndarray | Text  # float64, datetime64[us], bool; text by dictionary
Block = Mapping[str, Column]
Statement = sql.SQL | sql.Composed


def row_count(block: Block) -> int:
    first = next(iter(block.values()))
    return len(first.codes) if isinstance(first, Text) else len(first)


def concatenate(blocks: Sequence[Block]) -> dict[str, Column]:
    """Blocks of the same columns, one after the other."""
    return {name: _concatenate_column([block[name] for block in blocks]) for name in blocks[0]}


def _concatenate_column(parts: Sequence[Column]) -> Column:
    texts = [part for part in parts if isinstance(part, Text)]
    return Text.concatenate(texts) if texts else np.concatenate([part for part in parts if isinstance(part, np.ndarray)])


# -- writing ------------------------------------------------------------------------------------------------------------------


def copy_in(connection: Connection, table: str, block: Block) -> int:
    """Append `block` to `table` by binary COPY inside the running transaction; returns the rows. NaN and NaT become NULL."""
    statement = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT BINARY)").format(
        sql.Identifier(table), sql.SQL(", ").join(sql.Identifier(name) for name in block)
    )
    rows = row_count(block)
    with driver_connection(connection).cursor() as cursor, cursor.copy(statement) as copy:
        copy.write(COPY_HEADER)
        for encoded in encode_rows(block):
            copy.write(encoded)
        copy.write(COPY_TRAILER)
    return rows


def encode_rows(block: Block) -> Iterator[bytes]:
    """Tuples of the COPY format, some thousand at a time: fields side by side, then a mask squeezes out what a row does not use."""
    columns = [_TextTable.of(column) if isinstance(column, Text) else column for column in block.values()]
    for start in range(0, row_count(block), ROWS_PER_BLOCK):
        rows = slice(start, start + ROWS_PER_BLOCK)
        fields = [column.encode(rows) if isinstance(column, _TextTable) else _encode_values(column[rows]) for column in columns]
        count = len(fields[0].slots)
        head = np.broadcast_to(np.frombuffer(len(fields).to_bytes(2, "big"), np.uint8), (count, 2))
        slots = np.concatenate([head, *(field.slots for field in fields)], axis=1)
        if all(field.used is None for field in fields):
            yield slots.tobytes()
            continue
        used, begin = np.ones(slots.shape, bool), 2
        for field in fields:
            end = begin + field.slots.shape[1]
            if field.used is not None:
                used[:, begin:end] = field.used
            begin = end
        yield slots[used].tobytes()


class _Field(NamedTuple):
    """One column of some rows: bytes (R, width), and which of them each row uses; None = all."""

    slots: np.ndarray
    used: np.ndarray | None


def _encode_values(values: np.ndarray) -> _Field:
    """A float8 or timestamptz column: 4 bytes of length, 8 of data, or a length of -1 and no data; a boolean one: 1 of data."""
    if values.dtype.kind == "b":
        slots = np.zeros((len(values), 5), np.uint8)
        slots[:, 3], slots[:, 4] = 1, values
        return _Field(slots, None)
    if values.dtype.kind == "M":
        null, data = np.isnat(values), (values.astype("datetime64[us]") - POSTGRES_EPOCH).astype(">i8")
    else:
        null, data = np.isnan(values), values.astype(">f8")
    if null.all():
        return _Field(np.broadcast_to(NULL_LENGTH, (len(values), 4)), None)
    slots = np.empty((len(values), 12), np.uint8)
    slots[:, :4] = (0, 0, 0, 8)
    slots[:, 4:] = data.view(np.uint8).reshape(-1, 8)
    if not null.any():
        return _Field(slots, None)
    slots[null, :4] = NULL_LENGTH
    used = np.ones(slots.shape, bool)
    used[null, 4:] = False
    return _Field(slots, used)


@dataclass(frozen=True)
class _TextTable:
    """The categories of a text column, encoded once: table (C, width), lengths (C,) with their own 4 bytes, codes (R,)."""

    table: np.ndarray
    lengths: np.ndarray
    codes: np.ndarray

    @classmethod
    def of(cls, column: Text) -> "_TextTable":
        encoded = [category.encode() for category in column.categories]
        lengths = np.array([len(e) for e in encoded], np.int64)
        table = np.zeros((len(encoded), 4 + int(lengths.max(initial=0))), np.uint8)
        table[:, :4] = lengths.astype(">i4").view(np.uint8).reshape(-1, 4)
        for row, text in zip(table, encoded, strict=True):
            row[4 : 4 + len(text)] = np.frombuffer(text, np.uint8)
        return cls(table, lengths + 4, column.codes)

    def encode(self, rows: slice) -> _Field:
        codes = self.codes[rows]
        lengths = self.lengths[codes]
        width = int(lengths.max(initial=0))
        used = None if (lengths == width).all() else np.arange(width) < lengths[:, None]
        return _Field(self.table[codes, :width], used)


# -- reading ------------------------------------------------------------------------------------------------------------------


class _FloatArray(Loader):
    format = Format.BINARY

    def load(self, data: Buffer) -> Floats:
        return _elements(data, ">f8").astype(np.float64)


class _TimeArray(Loader):
    format = Format.BINARY

    def load(self, data: Buffer) -> Times:
        return POSTGRES_EPOCH + _elements(data, ">i8").astype("timedelta64[us]")


def _elements(data: Buffer, dtype: str) -> np.ndarray:
    """Elements of a one-dimensional array without nulls: each is 4 bytes of length and 8 of data."""
    if len(data) < ARRAY_HEADER_BYTES:
        return np.empty(0, dtype)
    return np.frombuffer(data, [("length", ">i4"), ("value", dtype)], offset=ARRAY_HEADER_BYTES)["value"]


def fetch(connection: Connection, statement: Statement, parameters: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Rows of a query; float8[] and timestamptz[] columns arrive as numpy arrays."""
    with driver_connection(connection).cursor(binary=True) as cursor:
        cursor.adapters.register_loader(FLOAT8_ARRAY_OID, _FloatArray)
        cursor.adapters.register_loader(TIMESTAMPTZ_ARRAY_OID, _TimeArray)
        return cursor.execute(statement, parameters).fetchall()


def execute(connection: Connection, statement: Statement, parameters: Mapping[str, Any]) -> int:
    """Run a statement without result; returns the rows it touched."""
    with driver_connection(connection).cursor() as cursor:
        return cursor.execute(statement, parameters).rowcount


def driver_connection(connection: Connection) -> psycopg.Connection[Any]:
    """The psycopg connection below; it shares the running transaction."""
    driver = connection.connection.driver_connection
    assert isinstance(driver, psycopg.Connection)
    return driver
