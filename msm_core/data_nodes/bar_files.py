"""CSV and Parquet files of bars: what their columns are, and their rows in chunks, each cell checked.

Cells are text, whatever the file: a number in Parquet is spelled out so that it reads back the same, and one set of rules decides.
"""

import csv
import functools
import gzip
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from msm_core.api.checks import UNSTORABLE, shown
from msm_core.copying import Column, Text
from msm_core.data_nodes.prices import KEY, SLOTS, Bars, requirement, unusable
from msm_core.errors import UnusableFile
from msm_core.frames import Floats, Times
from msm_core.sessions import Sessions
from msm_core.sources import Source

CSV_BLOCK_BYTES = 4 << 20
PARQUET_CELLS = 1 << 20  # of one chunk: a wide file has few rows in each
ERRORS_KEPT = 1000
ERROR_FIELDS = ("row", "asset", "time", "column", "reason")
TIME_NAMES = ("time_index", "time", "datetime", "timestamp", "date")
ASSET_NAMES = ("asset_identifier", "asset", "symbol", "ticker")
INTEGERS = ("smallint", "integer", "bigint")
EARLIEST, LATEST = np.datetime64("1800-01-01", "us"), np.datetime64("2200-01-01", "us")

DATE = r"^\d{4}-\d{2}-\d{2}$"
NAIVE = r"^\d{4}-\d{2}-\d{2}[T ]\d{2}:\d{2}(:\d{2}([.]\d{1,6}0{0,3})?)?"  # to the microsecond: nothing is rounded
OFFSET = r" ?(Z|[+-]\d{2}(:?\d{2})?)$"
NUMBER = r"^[+-]?(\d+[.]?\d*|[.]\d+)([eE][+-]?\d+)?$"

pc: Any = pyarrow.compute  # its functions are made when it is imported: no type checker knows them
Cells = Any  # pa.StringArray (R,), empty where there is nothing
Wrong = tuple[np.ndarray, str]  # mask of cells, and what is wrong with them
Chunks = Iterator[tuple[np.ndarray, list[Cells]]]  # row numbers (R,), columns


class Told:
    """Everything that is wrong with a file: counted and written down as it is found, the first of it kept."""

    def __init__(self, write: Callable[[Sequence[Any]], object] | None) -> None:
        self.write, self.count, self.kept = write, 0, list[dict[str, Any]]()

    def add(self, row: int, asset: str, time: str, column: str, reason: str) -> None:
        self.count += 1
        values = (int(row), asset, time, column, reason)
        if self.write:
            self.write(values)
        if len(self.kept) < ERRORS_KEPT:
            self.kept.append(dict(zip(ERROR_FIELDS, values, strict=True)))

    def first(self) -> str:
        row, *others = self.kept[0].values()
        return ", ".join([f"row {row}", *filter(None, others)])


@contextmanager
def usable_file(file: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise UnusableFile(file=file, why=f"it cannot be used ({error})") from None


def open_bars(path: Path, told: Told) -> tuple[list[str], Chunks]:
    """Column names, and chunks of bounded size. Raises UnusableFile, then or while the chunks are read."""
    name = path.name.lower()
    if not name.endswith((".csv", ".csv.gz", ".parquet")):
        raise UnusableFile(file=path.name, why="the name of a file ends in .csv, .csv.gz or .parquet")
    with usable_file(path.name):
        return _parquet(path) if name.endswith(".parquet") else _csv(path, told)


def _parquet(path: Path) -> tuple[list[str], Chunks]:
    file = pq.ParquetFile(path)
    names = file.schema_arrow.names

    def chunks() -> Chunks:
        first = 1
        with usable_file(path.name), file:
            for batch in file.iter_batches(max(1, PARQUET_CELLS // max(1, len(names)))):
                yield np.arange(first, first + batch.num_rows), [column.cast(pa.string()).fill_null("") for column in batch.columns]
                first += batch.num_rows

    return names, chunks()


def _csv(path: Path, told: Told) -> tuple[list[str], Chunks]:
    """Columns are declared as text: else the first block of the file would decide what they are."""
    with (gzip.open if path.name.lower().endswith(".gz") else open)(path, "rt", encoding="utf-8-sig", newline="") as text:
        names = next(csv.reader(text), [])  # type: ignore[arg-type] - opened as text, by either
    ragged: deque[int] = deque()

    def skip(row: pacsv.InvalidRow) -> str:
        ragged.append(row.number)
        if row.text.strip(", "):
            told.add(row.number, "", "", "", f"the row has {row.actual_columns} cells, the header {row.expected_columns}")
        return "skip"

    reader = pacsv.open_csv(
        path,
        read_options=pacsv.ReadOptions(block_size=CSV_BLOCK_BYTES, use_threads=False),  # else rows are not numbered
        parse_options=pacsv.ParseOptions(invalid_row_handler=skip, ignore_empty_lines=False),  # else they are not counted
        convert_options=pacsv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False),
    )
    if reader.schema.names != names:  # then no column would be known to be text
        raise pa.ArrowInvalid("its first line is no header")

    def chunks() -> Chunks:
        first = 2
        with usable_file(path.name), reader:
            for batch in reader:
                rows = np.setdiff1d(np.arange(first, first + batch.num_rows + len(ragged)), list(ragged))[: batch.num_rows]
                yield rows, batch.columns
                first = int(rows[-1]) + 1 if len(rows) else first
                while ragged and ragged[0] < first:
                    ragged.popleft()

    return names, chunks()


@dataclass(frozen=True)
class Layout:
    """Places of columns in the file.

    asset   None in a wide file
    values  place -> column of the table; in a wide file place -> asset, and `column` is where all of them go
    """

    time: int
    asset: int | None
    values: Mapping[int, str]
    column: str

    @property
    def columns(self) -> list[str]:
        return [self.column] if self.asset is None else list(self.values.values())


def layout_of(file: str, names: Sequence[str], source: Source, column: str | None) -> Layout:
    """What the columns are, matched by name in upper or lower case. Raises UnusableFile, naming everything that is wrong."""
    plain = [name.strip().lower() for name in names]
    time, asset = (next((plain.index(n) for n in wanted if n in plain), None) for wanted in (TIME_NAMES, ASSET_NAMES))
    loadable = sorted(c for c, type_ in source.columns.items() if c not in (*KEY, "interpolated") and type_.split("(")[0] in SLOTS)
    by_name = {name.lower(): name for name in loadable} | {name: name for name in loadable}
    others = [place for place in range(len(names)) if place not in (time, asset)]
    targets = {place: by_name.get(names[place].strip(), by_name.get(plain[place], "")) for place in others}
    strange = [repr(names[place]) for place in others if not targets[place]]
    if asset is None:
        wanted, targets = column or "close", {place: names[place] for place in others}
        wrong = [
            (not strange, f"no column is an asset ({', '.join(ASSET_NAMES)}), and none is named after one"),
            (not all(plain), "a column has no name, so its asset is not known"),
            (
                wanted not in source.numeric,
                f"{source.identifier} has no number {wanted}; --column is one of {', '.join(source.numeric)}",
            ),
        ]
    else:
        wrong = [
            (strange, f"{source.identifier} has no column {', '.join(strange)} to load; it has {', '.join(loadable)}"),
            (column is not None, "--column is for wide files, and this one has a column of assets"),
            (not others, "no column holds values"),
        ]
    twice = sorted({repr(name) for name in targets.values() if list(targets.values()).count(name) > 1} - {"''"})
    wrong += [
        (time is None, f"no column is a time ({', '.join(TIME_NAMES)}); its columns are {', '.join(names) or 'none'}"),
        (twice, f"two columns are called {', '.join(twice)}"),
    ]
    if problems := [why for is_wrong, why in wrong if is_wrong]:
        raise UnusableFile(file=file, why="; ".join(problems))
    assert time is not None  # else it would be told
    return Layout(time, asset, targets, column or "close")


# -- cells --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parser:
    """Cells of one file as bars; what is wrong with them is told, by row within a chunk.

    sessions  of the calendar that was named, if one was
    found     what is wrong with the chunk at hand
    """

    layout: Layout
    source: Source
    sessions: Sessions | None
    told: Told
    found: list[tuple[int, str, str, str, str]] = field(default_factory=list)

    def bars(self, rows: np.ndarray, cells: list[Cells]) -> Bars:
        if not is_filled(cells[self.layout.time]).all():  # a line of nothing is no row
            filled = np.any([is_filled(column) for column in cells], axis=0)
            rows, cells = rows[filled], [column.filter(pa.array(filled)) for column in cells]
        self.found.clear()
        bars = self._bars(rows, cells)
        for error in sorted(self.found, key=lambda error: error[0]):
            self.told.add(*error)
        return bars

    def _bars(self, rows: np.ndarray, cells: list[Cells]) -> Bars:
        stamps, assets = cells[self.layout.time], None if self.layout.asset is None else cells[self.layout.asset]
        tell = functools.partial(self._tell, rows, stamps)
        times, wrong = self._stamped(stamps)
        tell(assets, "", stamps, [*wrong, (~is_filled(stamps), "the time is missing")])
        if assets is None:
            return self._wide(rows, cells, times, tell)
        names, wrong = read_texts(assets)
        tell(assets, "", assets, [*wrong, (~is_filled(assets), "the asset is missing")])
        tell = functools.partial(tell, assets)
        values = {column: self._values(column, cells[place], tell) for place, column in self.layout.values.items()}
        return Bars(rows.astype(np.float64), names, times, values).where(is_filled(assets) & ~np.isnat(times))

    def _wide(self, rows: np.ndarray, cells: list[Cells], times: Times, tell: Callable[..., None]) -> Bars:
        column, assets = self.layout.column, tuple(self.layout.values.values())
        columns = [self._values(column, cells[place], functools.partial(tell, asset)) for place, asset in self.layout.values.items()]
        matrix = np.column_stack(columns)
        r, a = np.nonzero(~np.isnan(matrix) & ~np.isnat(times)[:, None])
        return Bars(rows[r].astype(np.float64), Text(a, assets), times[r], {column: matrix[r, a]})

    def _values(self, column: str, cells: Cells, tell: Callable[..., None]) -> Any:
        """Cells as their column takes them, null where they are empty or wrong."""
        type_ = self.source.columns[column].split("(")[0]
        values: Column
        if SLOTS[type_] == "text":
            values, wrong = read_texts(cells)
        elif SLOTS[type_] == "timestamptz":
            values, dates, wrong = read_instants(cells)
            wrong.append((~np.isnat(dates), "is a date; a time with an offset is needed"))
        else:
            values, wrong = read_numbers(cells)
            wrong.append((unusable(column, values), f"is refused: {requirement(column)}"))
            if type_ in INTEGERS:
                wrong.append((np.isfinite(values) & (values != np.round(values)), f"is not whole, and {column} is {type_}"))
        tell(column, cells, wrong)
        return values

    def _stamped(self, cells: Cells) -> tuple[Times, list[Wrong]]:
        """The time that each row is stored at, NaT where there is none."""
        times, dates, wrong = read_instants(cells)
        is_date, by_date = ~np.isnat(dates), self.source.time_label == "session_date"
        if by_date:
            off = ~np.isnat(times) & (times != times.astype("datetime64[D]"))
            wrong.append((off, "is not 00:00 UTC, and bars of this source are stamped by date"))
            times = np.where(is_date, dates.astype("datetime64[us]"), times)
        elif self.sessions is None:
            wrong.append((is_date, "is a date, and bars of this source are stamped at their end; use --calendar, or times with an offset"))
        if (sessions := self.sessions) is not None:
            at = np.searchsorted(sessions.dates, dates, side="right") - 1
            is_session = is_date & (sessions.dates[at] == dates)
            is_outside = is_date & ((dates < sessions.valid_from) | (dates > sessions.valid_to))
            wrong.append((is_outside, f"is outside calendar {sessions.calendar}, {sessions.valid_from} to {sessions.valid_to}"))
            wrong.append((is_date & ~is_outside & ~is_session, f"is no session of {sessions.calendar}"))
            times = times if by_date else np.where(is_session, sessions.closes[at], times)
        wrong.append(((times < EARLIEST) | (times > LATEST), "lies outside 1800 to 2200; is its unit right?"))
        return times, wrong

    def _tell(self, rows: np.ndarray, stamps: Cells, asset: Cells | str | None, column: str, cells: Cells, wrong: Sequence[Wrong]) -> None:
        for mask, why in wrong:
            for i in np.flatnonzero(mask):
                name = asset or "" if asset is None or isinstance(asset, str) else asset[i].as_py()
                cell = cells[i].as_py()
                self.found.append((rows[i], name, stamps[i].as_py(), column, f"{shown(cell)} {why}" if cell.strip() else why))


def is_filled(cells: Cells) -> np.ndarray:
    return pc.not_equal(pc.utf8_trim_whitespace(cells), "").to_numpy(zero_copy_only=False)


def matches(cells: Cells, form: str) -> np.ndarray:
    return pc.match_substring_regex(cells, form).to_numpy(zero_copy_only=False)


def read_texts(cells: Cells) -> tuple[Text, list[Wrong]]:
    encoded = cells.dictionary_encode()
    codes, words = encoded.indices.to_numpy(), encoded.dictionary.to_pylist()
    unstorable = np.array([bool(UNSTORABLE.search(word)) for word in words], bool)
    storable = tuple("" if bad else word for word, bad in zip(words, unstorable, strict=True))
    return Text(codes, storable), [(unstorable[codes], "holds a NUL character")]


def read_numbers(cells: Cells) -> tuple[Floats, list[Wrong]]:
    """Values (R,), NaN where a cell is empty or no number: one that spells out NaN is none."""
    text = pc.utf8_trim_whitespace(cells)
    is_number = matches(text, NUMBER)
    readable = pc.if_else(pa.array(is_number), text, pa.scalar(None, pa.string()))
    return readable.cast(pa.float64()).to_numpy(zero_copy_only=False), [(~is_number & is_filled(text), "is not a number")]


def read_instants(cells: Cells) -> tuple[Times, np.ndarray, list[Wrong]]:
    """Times (R,) in UTC of cells with an offset, and dates (R,) of bare dates; NaT elsewhere."""
    text = pc.utf8_trim_whitespace(cells)
    is_naive = matches(text, NAIVE + "$")
    times, dates = _parsed(text, NAIVE + OFFSET), _parsed(text, DATE).astype("datetime64[D]")
    unread = is_filled(text) & ~is_naive & np.isnat(times) & np.isnat(dates)
    naive = "has no time zone; give an offset, as in 2024-01-02T21:00:00Z"
    return times, dates, [(is_naive, naive), (unread, "is no time; write 2024-01-02T21:00:00Z, or 2024-01-02 for a session")]


def _parsed(cells: Cells, form: str) -> Times:
    words = cells.to_numpy(zero_copy_only=False).astype(object)
    words[~matches(cells, form)] = None
    parsed = pd.to_datetime(pd.Series(words, dtype=object), utc=True, format="ISO8601", errors="coerce")
    return parsed.dt.tz_localize(None).to_numpy().astype("datetime64[us]")
