"""CSV and Parquet files of weights that others computed: one row per time and asset, read whole and checked before any of it is used."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from msm_core.api.checks import shown
from msm_core.copying import Text
from msm_core.data_nodes.bar_files import (
    EARLIEST,
    LATEST,
    Cells,
    Told,
    is_filled,
    matches,
    open_bars,
    read_instants,
    read_numbers,
    read_texts,
)
from msm_core.errors import UnusableFile
from msm_core.frames import SignalRows

TIME, ASSET = "time_index", "asset_identifier"
FINER = r":\d{2}[.]\d{6}\d*[1-9]"  # digits beyond microseconds


def read_weight_file(path: str, column: str) -> SignalRows:
    """The rows of a file in key order: time, then asset. An asset that a time has twice stays twice.

    path    .csv, .csv.gz or .parquet, with columns time_index (with an offset), asset_identifier and `column`; others are ignored
    Raises UnusableFile, naming the first row that is wrong.
    """
    if not Path(path).is_file():
        raise UnusableFile(file=path, why="there is no such file here. Put it where every worker can read it, or correct path")
    told = Told(None)
    names, chunks = open_bars(Path(path), told)
    places = _places(path, names, column)
    parts = [_rows(numbers, [cells[place] for place in places], column, told) for numbers, cells in chunks]
    if told.count:
        why = f"{told.count} errors; the first: {told.first()}. Correct the file; nothing of it was used"
        raise UnusableFile(file=path, why=why)
    return _sorted(parts)


def _places(path: str, names: Sequence[str], column: str) -> list[int]:
    """Places of the three columns. Raises UnusableFile."""
    plain = [name.strip() for name in names]
    wanted = (TIME, ASSET, column)
    if missing := [name for name in wanted if name not in plain]:
        why = f"it has no column {', '.join(missing)}; its columns are {', '.join(names) or 'none'}. Rename them, or correct weight_column"
        raise UnusableFile(file=path, why=why)
    if twice := [name for name in wanted if plain.count(name) > 1]:
        raise UnusableFile(file=path, why=f"two columns are called {', '.join(twice)}. Remove one")
    return [plain.index(name) for name in wanted]


def _rows(numbers: np.ndarray, cells: list[Cells], column: str, told: Told) -> tuple[np.ndarray, Text, np.ndarray]:
    """Times (R,), assets (R,) and weights (R,) of one chunk; what is wrong with it is told, row by row."""
    some = np.any([is_filled(column_cells) for column_cells in cells], axis=0)
    numbers, cells = numbers[some], [column_cells.filter(some) for column_cells in cells]  # a line of nothing is no row
    stamps, assets, values = cells
    times, dates, wrong_times = read_instants(stamps)
    names, wrong_names = read_texts(assets)
    weights, wrong_weights = read_numbers(values)
    fine = matches(stamps, FINER)
    wrong_times = [(fine, "is finer than a microsecond, and nothing is rounded"), *((mask & ~fine, why) for mask, why in wrong_times)]
    wrong_times += [
        (~is_filled(stamps), "the time is missing"),
        (~np.isnat(dates), "is a date; give the instant with an offset, as in 2024-01-02T21:00:00Z"),
        ((times < EARLIEST) | (times > LATEST), "lies outside 1800 to 2200; is its unit right?"),
    ]
    wrong_names += [(~is_filled(assets), "the asset is missing")]
    wrong_weights += [
        (~is_filled(values), "the weight is missing; write 0 for none"),
        (np.isinf(weights), "is too large for a number"),
    ]
    found = [
        (int(row), cells_of[row].as_py(), name, why)
        for name, cells_of, wrong in ((TIME, stamps, wrong_times), (ASSET, assets, wrong_names), (column, values, wrong_weights))
        for mask, why in wrong
        for row in np.flatnonzero(mask)
    ]
    for row, cell, name, why in sorted(found, key=lambda error: error[0]):
        told.add(numbers[row], assets[row].as_py(), stamps[row].as_py(), name, f"{shown(cell)} {why}" if cell.strip() else why)
    return times, names, weights


def _sorted(parts: list[tuple[np.ndarray, Text, np.ndarray]]) -> SignalRows:
    if not parts:
        return SignalRows(np.empty(0, "datetime64[us]"), [], np.empty(0))
    times, names, weights = zip(*parts, strict=True)
    text = Text.concatenate(names)
    times, weights = np.concatenate(times), np.concatenate(weights)
    assets = np.array(text.categories, dtype=object)[text.codes]
    order = np.lexsort((np.unique(assets, return_inverse=True)[1], times))
    return SignalRows(times[order], assets[order].tolist(), weights[order])
