"""Arrays to and from Postgres in its binary formats, without row objects.

`COPY ... (FORMAT binary)` is fed with whole column blocks encoded by numpy; array results become numpy arrays without passing through
Python numbers. Source of both formats: https://www.postgresql.org/docs/current/sql-copy.html and src/backend/utils/adt/arrayfuncs.c.
Why not ADBC, the library: it cannot share a connection with the claim and the progress update, which must be one transaction with
the rows, and was measured at 0.6 of this end to end (lab/perf.md F).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
ROWS_PER_BLOCK = 65_536  # bounds the memory of one encoded block to some 10 MB
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
        for start in range(0, rows, ROWS_PER_BLOCK):
            copy.write(encode_rows(block, slice(start, start + ROWS_PER_BLOCK)))
        copy.write(COPY_TRAILER)
    return rows


def encode_rows(block: Block, rows: slice) -> bytes:
    """Tuples of the COPY format: every field gets a slot of its greatest width, then a mask squeezes out what is not used."""
    fields = [_encode_text(column, rows) if isinstance(column, Text) else _encode_values(column[rows]) for column in block.values()]
    count = len(fields[0][0])
    head = np.broadcast_to(np.frombuffer(len(fields).to_bytes(2, "big"), np.uint8), (count, 2))
    slots = np.hstack([head, *(slot for slot, _ in fields)])
    used = np.hstack([np.ones((count, 2), bool), *(mask for _, mask in fields)])
    return slots[used].tobytes()


def _encode_values(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slots and mask of a float8 or timestamptz column, (R, 12): 4 bytes of length, 8 of data; of a boolean one, (R, 5)."""
    if values.dtype.kind == "b":
        slots = np.zeros((len(values), 5), np.uint8)
        slots[:, 3], slots[:, 4] = 1, values
        return slots, np.ones(slots.shape, bool)
    if values.dtype.kind == "M":
        null, data = np.isnat(values), (values.astype("datetime64[us]") - POSTGRES_EPOCH).astype(">i8")
    else:
        null, data = np.isnan(values), values.astype(">f8")
    slots = np.empty((len(values), 12), np.uint8)
    slots[:, :4] = (0, 0, 0, 8)
    slots[null, :4] = NULL_LENGTH
    slots[:, 4:] = data.view(np.uint8).reshape(-1, 8)
    used = np.ones(slots.shape, bool)
    used[null, 4:] = False
    return slots, used


def _encode_text(column: Text, rows: slice) -> tuple[np.ndarray, np.ndarray]:
    encoded = [category.encode() for category in column.categories]
    lengths = np.array([len(e) for e in encoded])
    width = 4 + int(lengths.max(initial=0))
    table = np.zeros((len(encoded), width), np.uint8)
    table[:, :4] = lengths.astype(">i4").view(np.uint8).reshape(-1, 4)
    for row, text in zip(table, encoded, strict=True):
        row[4 : 4 + len(text)] = np.frombuffer(text, np.uint8)
    codes = column.codes[rows]
    return table[codes], (np.arange(width) < 4 + lengths[:, None])[codes]


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
