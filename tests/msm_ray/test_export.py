"""Files that others read: whole, exact to the last bit, and never half written."""

import gzip
import os
import uuid
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from msm_core.errors import NaiveTimestamp, UnusableFile
from msm_ray import export
from msm_ray.export import check_path, write_frame, write_table

UID = uuid.UUID("00000000-0000-4000-8000-000000000001")
NUMBERS = [0.1 + 0.2, 5e-324, 1.7976931348623157e308, -0.0, float("nan")]
STAMPS = ("2024-01-02 21:00Z", "2024-07-02 20:00Z", "NaT", "1969-12-31 23:59:59Z", "2024-01-02 21:00Z")
TIMES = pd.DatetimeIndex([pd.Timestamp(stamp) for stamp in STAMPS], tz="UTC")


@pytest.fixture
def frame() -> pd.DataFrame:
    """Names that CSV must quote, numbers that need every digit, and gaps."""
    return pd.DataFrame(
        {
            "name": ["plain", "a,b", 'say "x"', "two\nlines", None],
            "time_index": TIMES.tz_convert("America/New_York"),
            "number": NUMBERS,
            "direction": [1, -1, 1, -1, 1],
            "uid": [UID, None, UID, UID, UID],
        },
        index=[9, 8, 7, 6, 5],
    )


def test_csv_as_it_stands(frame: pd.DataFrame, tmp_path: Path) -> None:
    """Breaks: times without an offset, an index nobody asked for, names that shift the columns, numbers that are rounded."""
    write_frame(frame, tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text() == (
        '"name","time_index","number","direction","uid"\n'
        f'"plain","2024-01-02T21:00:00Z",0.30000000000000004,1,"{UID}"\n'
        '"a,b","2024-07-02T20:00:00Z",5e-324,-1,\n'
        f'"say ""x""",,1.7976931348623157e+308,1,"{UID}"\n'
        f'"two\nlines","1969-12-31T23:59:59Z",-0,-1,"{UID}"\n'
        f',"2024-01-02T21:00:00Z",,1,"{UID}"\n'
    )


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "A.CSV"])
def test_csv_reads_back_to_the_bit(tmp_path: Path, name: str) -> None:
    """Breaks: weights that are written and loaded again are other weights."""
    bits = np.random.default_rng(3).integers(0, 2**63, 5_000).view(np.float64)
    numbers = bits[np.isfinite(bits)]
    write_frame(pd.DataFrame({"number": numbers}), tmp_path / name)
    text = (gzip.open if name.endswith(".gz") else open)(tmp_path / name, "rt").read()
    assert [float(line) for line in text.splitlines()[1:]] == numbers.tolist()


def test_fractions_of_a_second_are_kept(tmp_path: Path) -> None:
    """Breaks: two events of one second fall together."""
    times = pd.to_datetime(["2024-01-02 21:00:00.000001Z", "2024-01-02 21:00Z"], format="ISO8601")
    write_frame(pd.DataFrame({"time_index": times}), tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text().splitlines()[1:] == ['"2024-01-02T21:00:00.000001Z"', '"2024-01-02T21:00:00.000000Z"']


def test_parquet_types_and_values(frame: pd.DataFrame, tmp_path: Path) -> None:
    """Breaks: times of another zone or unit, uids as bytes, NaN where a reader looks for null."""
    write_frame(frame, tmp_path / "a.parquet")
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.schema.field("time_index").type == pa.timestamp("us", tz="UTC")
    assert [f.name for f in table.schema] == list(frame.columns)
    assert table.column("time_index").to_pylist()[:3] == [*TIMES[:2].to_pydatetime(), None]
    assert table.column("uid").to_pylist() == [str(UID), None, str(UID), str(UID), str(UID)]
    assert table.column("number").to_pylist() == [*NUMBERS[:4], None]
    assert str(table.column("number").to_pylist()[3]) == "-0.0"
    assert table.column("name").null_count == 1


def test_types_do_not_depend_on_what_is_there_today(frame: pd.DataFrame, tmp_path: Path) -> None:
    """Breaks: a column of uids that is empty one day has another type, and readers of many files fail."""
    for name, rows in (("full", frame), ("none", frame.assign(uid=None)), ("empty", frame[:0])):
        write_frame(rows, tmp_path / f"{name}.parquet")
    schemas = [pq.read_schema(tmp_path / f"{name}.parquet") for name in ("full", "none", "empty")]
    assert schemas[0].equals(schemas[1])
    assert schemas[0].equals(schemas[2])


def test_a_table_is_written_as_a_frame_is(tmp_path: Path) -> None:
    """Breaks: somebody with Arrow has to go through pandas."""
    write_table(pa.table({"t": pa.array([0], pa.timestamp("us", "UTC")), "x": [0.1]}), tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text() == '"t","x"\n"1970-01-01T00:00:00Z",0.1\n'


def test_nobody_sees_half_a_file(frame: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks: a disk that is full, or a reader that comes early, turns yesterday's file into the beginning of today's."""
    path = tmp_path / "a.csv"
    path.write_text("yesterday")
    seen: list[tuple[str, bool]] = []
    write = export._csv

    def failing(table: pa.Table, part: Path, compressed: bool) -> None:
        write(table, part, compressed)
        seen.append((path.read_text(), part.parent == tmp_path))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_csv", failing)
    with pytest.raises(UnusableFile, match=r"a\.csv: it cannot be written \(No space left on device\)"):
        write_frame(frame, path)
    assert seen == [("yesterday", True)]
    assert os.listdir(tmp_path) == ["a.csv"]
    assert path.read_text() == "yesterday"
    monkeypatch.undo()
    write_frame(frame, path)
    assert os.listdir(tmp_path) == ["a.csv"]
    assert path.read_text().startswith('"name"')


def test_others_may_read_the_file(frame: pd.DataFrame, tmp_path: Path) -> None:
    """Breaks: a file for colleagues that only its writer can open, or a link that becomes a file of its own."""
    (tmp_path / "real.csv").write_text("")
    (tmp_path / "link.csv").symlink_to(tmp_path / "real.csv")
    mask = os.umask(0o022)
    try:
        write_frame(frame, tmp_path / "link.csv")
    finally:
        os.umask(mask)
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "real.csv").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "real.csv").stat().st_size > 0


@pytest.mark.parametrize("name", ["a.xlsx", "a", "a.csv.zip", "csv", "a.parquet.gz"])
def test_other_names_are_refused_with_the_three(tmp_path: Path, name: str) -> None:
    """Breaks: CSV under the name of a spreadsheet."""
    with pytest.raises(UnusableFile, match=r"\.csv, \.csv\.gz or \.parquet"):
        write_frame(pd.DataFrame({"x": [1.0]}), tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    """Breaks: hours of reading end in a trace."""
    with pytest.raises(UnusableFile, match="there is no directory"):
        check_path(tmp_path / "absent" / "a.csv")
    (tmp_path / "d.csv").mkdir()
    with pytest.raises(UnusableFile, match="it is a directory"):
        check_path(tmp_path / "d.csv")


def test_times_without_a_zone_are_refused(tmp_path: Path) -> None:
    """Breaks: local times pass for UTC."""
    with pytest.raises(NaiveTimestamp, match="column time_index"):
        write_frame(pd.DataFrame({"time_index": pd.to_datetime(["2024-01-02 21:00"])}), tmp_path / "a.csv")
