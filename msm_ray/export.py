"""Frames into files for other programs. A file appears whole under its name, or not at all."""

import os
import secrets
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from msm_core.errors import NaiveTimestamp, UnusableFile

SUFFIXES = (".csv", ".csv.gz", ".parquet")
pc: Any = pyarrow.compute  # its functions are made when it is imported: no type checker knows them


def check_path(path: Path) -> None:
    """What can be known before there is anything to write. Raises UnusableFile."""
    if not path.name.lower().endswith(SUFFIXES):
        raise UnusableFile(file=path, why="the name of a file ends in .csv, .csv.gz or .parquet")
    if not path.parent.is_dir():
        raise UnusableFile(file=path, why=f"there is no directory {path.parent}. Make it, or correct the path")
    if path.is_dir():
        raise UnusableFile(file=path, why="it is a directory. Give the name of a file")


def write_frame(frame: pd.DataFrame, path: Path) -> None:
    """The columns of a frame, without its index; a file that is there is replaced. Raises UnusableFile, NaiveTimestamp.

    Times in UTC: ISO text with Z in CSV, timestamp[us, tz=UTC] in Parquet. Floats read back the same; what is missing (NaN, None, NaT) is
    empty in CSV and null in Parquet. UUIDs are text.
    """
    table = pa.Table.from_pandas(pd.DataFrame({name: _plain(frame[name]) for name in frame}), preserve_index=False)
    write_table(table.replace_schema_metadata(None), path)


def write_table(table: pa.Table, path: Path) -> None:
    """As write_frame, of a table whose times are zoned."""
    check_path(path)
    write = _parquet if path.name.lower().endswith(".parquet") else _csv
    with _replacing(path) as part:
        write(table, part, path.name.lower().endswith(".gz"))


def _plain(column: pd.Series) -> pd.Series:
    """Times in UTC microseconds; UUIDs as text, and so is a column of nothing: what it holds today must not decide its type."""
    if column.dtype.kind == "M":
        if column.dt.tz is None:
            raise NaiveTimestamp(what=f"column {column.name}", value=str(column.iloc[0]) if len(column) else "empty")
        return column.dt.tz_convert("UTC").dt.as_unit("us")
    if column.dtype == object:
        texts = column.map(lambda value: str(value) if isinstance(value, uuid.UUID) else value)
        return texts.astype("str") if all(value is None or isinstance(value, str) for value in texts) else texts
    return column


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; what is written there takes its place at the end, or goes away."""
    target = path.resolve()  # of a link, what it leads to
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        with open(part, "rb") as written:
            os.fsync(written.fileno())  # else a name may outlive a crash without its contents
        os.replace(part, target)
    except OSError as error:
        raise UnusableFile(file=path, why=f"it cannot be written ({error.strerror or error})") from None
    finally:
        part.unlink(missing_ok=True)


def _csv(table: pa.Table, path: Path, compressed: bool) -> None:
    for place, field in enumerate(table.schema):
        if pa.types.is_timestamp(field.type):
            table = table.set_column(place, field.name, _iso(table.column(place)))
    with pa.output_stream(path, compression="gzip" if compressed else None) as file:
        pacsv.write_csv(table, file)


def _iso(times: pa.ChunkedArray) -> pa.ChunkedArray:
    """`2024-01-02T21:00:00Z`, with a fraction where any of them has one."""
    seconds = times.cast(pa.timestamp("s", "UTC"), safe=False)
    whole = pc.all(pc.equal(seconds.cast(times.type), times)).as_py() is not False
    return pc.strftime(seconds if whole else times, format="%Y-%m-%dT%H:%M:%SZ")


def _parquet(table: pa.Table, path: Path, _compressed: bool) -> None:
    pq.write_table(table, path)
