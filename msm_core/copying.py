"""Arrays to and from Postgres in its binary formats, without row objects.

`COPY ... (FORMAT binary)` is fed with whole column blocks encoded by numpy; array results become numpy arrays without passing through
Python numbers. Source of both formats: https://www.postgresql.org/docs/current/sql-copy.html and src/backend/utils/adt/arrayfuncs.c.
Why not ADBC, the library: it cannot share a connection with the claim and the progress update, which must be one transaction with
the rows, and was measured at 0.6 of this end to end (lab/perf.md F).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import psycopg
from psycopg import sql
from psycopg.abc import Buffer
from psycopg.adapt import Loader
from psycopg.pq import Format
from psycopg.types.json import set_json_loads
from pydantic_core import from_json
from sqlalchemy import Connection

from msm_core.frames import Floats, Times

COPY_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
COPY_TRAILER = b"\xff\xff"
POSTGRES_EPOCH = np.datetime64("2000-01-01", "us")
ROWS_PER_BLOCK = 8_192  # a block of them stays in the processor's cache
ROWS_MERGED = 65_536  # blocks are put together up to here, and not beyond: it takes memory
ROWS_ALONE = 4_096  # a block that is worth its cost without others
RUNS_MAX = 64  # of rows that are full, or not, in turn; where there are more they go through a mask together
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


def concatenate(blocks: Sequence[Block]) -> Block:
    """Blocks of the same columns, one after the other."""
    if len(blocks) == 1:
        return blocks[0]
    return {name: _concatenate_column([block[name] for block in blocks]) for name in blocks[0]}


def _concatenate_column(parts: Sequence[Column]) -> Column:
    texts = [part for part in parts if isinstance(part, Text)]
    return Text.concatenate(texts) if texts else np.concatenate([part for part in parts if isinstance(part, np.ndarray)])


# -- writing ------------------------------------------------------------------------------------------------------------------


def copy_in(connection: Connection, table: str, *blocks: Block) -> int:
    """Append blocks of the same columns to `table` by one binary COPY inside the running transaction; returns the rows.

    NaN and NaT become NULL. What is in flight is a block at a time, however many there are.
    """
    statement = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT BINARY)").format(
        sql.Identifier(table), sql.SQL(", ").join(sql.Identifier(name) for name in blocks[0])
    )
    with driver_connection(connection).cursor() as cursor, cursor.copy(statement) as copy:
        copy.write(COPY_HEADER)
        for block in _merged(blocks):
            for encoded in encode_rows(block):
                copy.write(encoded)
        copy.write(COPY_TRAILER)
    return sum(map(row_count, blocks))


def _merged(blocks: Iterable[Block]) -> Iterator[Block]:
    """The same rows in fewer blocks: a nightly increment has some rows of each portfolio, and each block costs."""
    waiting, rows = list[Block](), 0
    for block in blocks:
        waiting.append(block)
        rows += row_count(block)
        if rows >= ROWS_MERGED or (len(waiting) == 1 and rows >= ROWS_ALONE):
            yield concatenate(waiting)
            waiting, rows = [], 0
    if waiting:
        yield concatenate(waiting)


def encode_rows(block: Block) -> Iterator[bytes]:
    """Tuples of the COPY format, some thousand at a time: columns side by side in one buffer, without what a row does not use of it."""
    columns = [_TextColumn(column) if isinstance(column, Text) else _ValueColumn(column) for column in block.values()]
    for start in range(0, row_count(block), ROWS_PER_BLOCK):
        rows = slice(start, min(start + ROWS_PER_BLOCK, row_count(block)))
        edges = np.cumsum([2, *(column.width(rows) for column in columns)]).tolist()
        slots = np.empty((rows.stop - rows.start, edges[-1]), np.uint8)
        slots[:, :2].view(">i2")[:, 0] = len(columns)
        for column, begin, end in zip(columns, edges, edges[1:], strict=False):
            column.write(rows, slots[:, begin:end])
        yield b"".join(_squeezed(slots, rows, columns, edges))


def _squeezed(slots: np.ndarray, rows: slice, columns: "Sequence[_TextColumn | _ValueColumn]", edges: Sequence[int]) -> Iterator[bytes]:
    """The rows as they are, run by run; of a run that leaves room unused, what a mask lets through: that is slow, and mostly for a few
    rows, such as a first vector, which has no price before."""
    loose = np.zeros(len(slots), bool)
    for column in columns:
        if (mask := column.loose(rows)) is not None:
            loose |= mask
    turns = np.flatnonzero(loose[1:] != loose[:-1]) + 1
    for begin, end in pairwise([0, *(turns.tolist() if len(turns) <= RUNS_MAX else ()), len(slots)]):
        if not loose[begin:end].any():
            yield slots[begin:end].tobytes()
            continue
        used = np.ones((end - begin, slots.shape[1]), bool)
        for column, left, right in zip(columns, edges, edges[1:], strict=False):
            column.clear(slice(rows.start + begin, rows.start + end), used[:, left:right])
        yield slots[begin:end][used].tobytes()


class _ValueColumn:
    """A float8 or timestamptz column: 4 bytes of length, 8 of data, or a length of -1 and no data; a boolean one: 1 of data."""

    def __init__(self, values: np.ndarray) -> None:
        self.is_boolean = values.dtype.kind == "b"
        self.values = values.astype("datetime64[us]", copy=False) if values.dtype.kind == "M" else values
        null = np.zeros(0, bool) if self.is_boolean else np.isnat(values) if values.dtype.kind == "M" else np.isnan(values)
        self.null = null if null.any() else None  # looked for once: most columns have none

    def width(self, rows: slice) -> int:
        if self.is_boolean:
            return 5
        return 12 if self.null is None or not self.null[rows].all() else 4

    def write(self, rows: slice, slots: np.ndarray) -> None:
        """Fill (R, width) bytes. Views of 4 and 8 bytes: single ones are slow."""
        values, length, data = self.values[rows], slots[:, :4].view(">i4")[:, 0], slots[:, 4:]
        if self.is_boolean:
            length[:], data[:, 0] = 1, values
            return
        if not data.shape[1]:
            length[:] = -1
            return
        if values.dtype.kind == "M":
            data.view(">i8")[:, 0] = (values - POSTGRES_EPOCH).view(np.int64)
        else:
            data.view(">f8")[:, 0] = values
        length[:] = 8 if self.null is None else np.where(self.null[rows], -1, 8)

    def loose(self, rows: slice) -> np.ndarray | None:
        """(R,) mask of rows that may not use all of the width; None = all do."""
        return None if self.null is None or self.null[rows].all() else self.null[rows]

    def clear(self, rows: slice, used: np.ndarray) -> None:
        """In a mask (R, width), strike out the bytes that are not used."""
        if self.null is not None:
            used[self.null[rows], 4:] = False


class _TextColumn:
    """A text column whose categories are encoded once, as items of one width: 4 bytes of length, the text, and padding. As a value
    column otherwise."""

    def __init__(self, column: Text) -> None:
        encoded = [category.encode() for category in column.categories]
        self.codes, self.lengths = column.codes, np.array([4 + len(e) for e in encoded], np.int64)
        self.items = np.array([len(e).to_bytes(4, "big") + e for e in encoded], f"V{self.lengths.max(initial=4)}")

    def width(self, rows: slice) -> int:
        return self.items.itemsize

    def write(self, rows: slice, slots: np.ndarray) -> None:
        slots.view(self.items.dtype)[:, 0] = self.items[self.codes[rows]] if len(self.items) > 1 else self.items[0]

    def loose(self, rows: slice) -> np.ndarray | None:
        is_any_short = bool((self.lengths < self.items.itemsize).any())
        return np.ones(rows.stop - rows.start, bool) if is_any_short else None  # lengths change from row to row: no runs worth finding

    def clear(self, rows: slice, used: np.ndarray) -> None:
        used[:] = np.arange(used.shape[1]) < self.lengths[self.codes[rows], None]


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
        set_json_loads(from_json, cursor)  # stored configurations: in two thirds of the time of json.loads
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
