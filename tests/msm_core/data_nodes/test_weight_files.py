"""Weight files: what is read is written down by hand beside the file, in CSV and in Parquet."""

import gzip
from datetime import datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from msm_core.data_nodes.weight_files import read_weight_file
from msm_core.errors import UnusableFile

HEADER = "time_index,asset_identifier,signal_weight\n"


def csv_file(tmp_path, text, name="weights.csv"):
    path = tmp_path / name
    with gzip.open(path, "wb") if name.endswith(".gz") else open(path, "wb") as file:
        file.write(text.encode())
    return str(path)


def rows(path, column="signal_weight"):
    read = read_weight_file(path, column)
    assert (read.times.dtype, read.weights.dtype) == (np.dtype("datetime64[us]"), np.float64)
    return list(zip(read.times.tolist(), read.assets, read.weights.tolist(), strict=True))


def refused(path, column="signal_weight"):
    with pytest.raises(UnusableFile) as caught:
        read_weight_file(path, column)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["weights.csv", "WEIGHTS.CSV", "weights.csv.gz"])
def test_csv_rows_come_out_by_time_then_asset_in_bytes(tmp_path, name):
    # 16:00 in New York in January is 21:00 UTC; bytes: "B" 0x42 < "a" 0x61 < "É" 0xC3
    text = (
        "note,signal_weight,asset_identifier,time_index\n"
        "x,0.25,É,2024-01-03T21:00:00Z\n"
        ",-1e-1,a,2024-01-03 16:00:00-05:00\n"
        "\n"
        '"y, z",.5,B,2024-01-03T21:00+00\n'
        "x, 1 ,a,2024-01-02T21:00:00.000001Z\n"
    )
    third = datetime(2024, 1, 3, 21)
    assert rows(csv_file(tmp_path, text, name)) == [
        (datetime(2024, 1, 2, 21, 0, 0, 1), "a", 1.0),
        (third, "B", 0.5),
        (third, "a", -0.1),
        (third, "É", 0.25),
    ]


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
@pytest.mark.parametrize("zone", ["UTC", "America/New_York"])
def test_parquet_reads_back_to_the_bit(tmp_path, unit, zone):
    rng = np.random.default_rng(1)
    times = pd.date_range("2024-01-02 21:00", periods=50, freq="D", tz="UTC")
    frame = pd.DataFrame(
        {"time_index": np.repeat(times, 9), "asset_identifier": [f"A{i}" for i in range(9)] * 50, "w": rng.normal(size=450)}
    )
    frame["asset_identifier"] = frame["asset_identifier"].astype("category")
    shuffled = frame.sample(frac=1, random_state=2)
    shuffled["time_index"] = shuffled["time_index"].dt.tz_convert(zone).dt.as_unit(unit)
    shuffled.to_parquet(tmp_path / "w.parquet", index=False)
    read = read_weight_file(str(tmp_path / "w.parquet"), "w")
    assert read.times.tolist() == [t.tz_localize(None).to_pydatetime() for t in frame["time_index"]]
    assert read.assets == frame["asset_identifier"].tolist()
    assert read.weights.tobytes() == frame["w"].to_numpy().tobytes()


def test_a_large_csv_reads_as_pandas_reads_it(tmp_path):
    rng = np.random.default_rng(3)
    times = pd.date_range("2000-01-03 21:00", periods=4_000, freq="D", tz="UTC")
    frame = pd.DataFrame(
        {
            "time_index": np.repeat(times, 30),
            "asset_identifier": [f"A{i:02}" for i in range(30)] * 4_000,
            "signal_weight": rng.normal(size=120_000),
        }
    )
    path = str(tmp_path / "w.csv")
    frame.sample(frac=1, random_state=2).to_csv(path, index=False)  # several blocks
    read = read_weight_file(path, "signal_weight")
    assert read.weights.tobytes() == frame["signal_weight"].to_numpy().tobytes()
    assert read.assets == frame["asset_identifier"].tolist()


def test_a_repeated_row_stays_repeated_in_its_order(tmp_path):  # the signal refuses it, by name
    text = HEADER + "2024-01-02T21:00Z,A,2\n2024-01-02T21:00Z,A,1\n"
    assert [weight for _, _, weight in rows(csv_file(tmp_path, text))] == [2.0, 1.0]


def test_a_file_of_nothing_but_its_header_has_no_rows(tmp_path):
    assert rows(csv_file(tmp_path, HEADER)) == []
    types = {"time_index": pa.timestamp("us", "UTC"), "asset_identifier": pa.string(), "signal_weight": pa.float64()}
    empty = pa.table({name: pa.array([], type_) for name, type_ in types.items()})
    pq.write_table(empty, tmp_path / "w.parquet")
    assert rows(str(tmp_path / "w.parquet")) == []


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("2024-01-02T21:00:00,A,1", "row 4, A, 2024-01-02T21:00:00, time_index, '2024-01-02T21:00:00' has no time zone; give an offset"),
        ("2024-01-02,A,1", "is a date; give the instant with an offset"),
        ("yesterday,A,1", "is no time; write 2024-01-02T21:00:00Z"),
        (",A,1", "the time is missing"),
        ("2024-01-02T21:00:00.0000001Z,A,1", "is finer than a microsecond, and nothing is rounded"),
        ("0024-01-02T21:00:00Z,A,1", "lies outside 1800 to 2200"),
        ("2024-01-02T21:00:00Z,,1", "the asset is missing"),
        ("2024-01-02T21:00:00Z,A,", "row 4, A, 2024-01-02T21:00:00Z, signal_weight, the weight is missing; write 0 for none"),
        ("2024-01-02T21:00:00Z,A,NaN", "'NaN' is not a number"),
        ("2024-01-02T21:00:00Z,A,inf", "'inf' is not a number"),
        ("2024-01-02T21:00:00Z,A,1e999", "'1e999' is too large for a number"),
        ('2024-01-02T21:00:00Z,A,"1,5"', "'1,5' is not a number"),
        ("2024-01-02T21:00:00Z,A", "row 4, the row has 2 cells, the header 3"),
    ],
)
def test_a_wrong_cell_is_told_with_its_row_and_what_to_do(tmp_path, line, complaint):
    text = HEADER + "2024-01-02T21:00:00Z,A,1\n2024-01-02T21:00:00Z,B,1\n" + line + "\n2024-01-03T21:00:00Z,A,1\n"
    told = refused(csv_file(tmp_path, text))
    assert complaint in told
    assert "1 errors" in told
    assert "row 4" in told


def test_all_errors_are_counted_and_the_first_row_is_told(tmp_path):
    told = refused(csv_file(tmp_path, HEADER + "2024-01-02T21:00Z,A,1\n2024-01-02T21:00Z,B,x\n2024-01-02T21:00,,y\n"))
    assert "4 errors; the first: row 3, B, 2024-01-02T21:00Z, signal_weight, 'x' is not a number. Correct the file" in told


@pytest.mark.parametrize(
    ("column", "values", "complaint"),
    [
        ("time_index", pa.array([0, 1], pa.timestamp("us")), "has no time zone"),
        ("time_index", pa.array([0, 1], pa.timestamp("ns", "UTC")), "finer than a microsecond"),
        ("time_index", pa.array([0, None], pa.timestamp("us", "UTC")), "the time is missing"),
        ("time_index", pa.array([0, 1], pa.int64()), "is no time"),
        ("asset_identifier", pa.array(["A", None]), "the asset is missing"),
        ("signal_weight", pa.array([0.5, None]), "the weight is missing"),
        ("signal_weight", pa.array([0.5, float("nan")]), "is not a number"),
        ("signal_weight", pa.array([0.5, float("-inf")]), "is not a number"),
        ("signal_weight", pa.array([True, False]), "is not a number"),
    ],
)
def test_a_wrong_cell_of_a_parquet_file_is_told_with_its_row(tmp_path, column, values, complaint):
    columns = {
        "time_index": pa.array([0, 1], pa.timestamp("us", "UTC")),
        "asset_identifier": pa.array(["A", "B"]),
        "signal_weight": pa.array([1.0, 2.0]),
    }
    pq.write_table(pa.table(columns | {column: values}), tmp_path / "w.parquet")
    assert complaint in refused(str(tmp_path / "w.parquet"))


def test_columns_that_are_missing_or_there_twice_are_named(tmp_path):
    told = refused(csv_file(tmp_path, "time,asset_identifier,weight\n"))
    assert "no column time_index, signal_weight; its columns are time, asset_identifier, weight." in told
    assert "correct weight_column" in told
    assert "two columns are called signal_weight" in refused(csv_file(tmp_path, HEADER.strip() + ",signal_weight\n"))
    assert rows(csv_file(tmp_path, "time_index,asset_identifier,w\n2024-01-02T21:00Z,A,3\n"), "w") == [(datetime(2024, 1, 2, 21), "A", 3.0)]


def test_a_file_that_cannot_be_used_is_named(tmp_path):
    assert "there is no such file here. Put it where every worker can read it" in refused(str(tmp_path / "absent.csv"))
    assert "ends in .csv" in refused_with(tmp_path, "weights.txt", HEADER)
    (tmp_path / "w.parquet").write_bytes(b"no parquet")
    (tmp_path / "w.csv.gz").write_bytes(b"no gzip")
    for name in ("w.parquet", "w.csv.gz"):
        with pytest.raises(UnusableFile, match=f"{name}: it cannot be used"):
            read_weight_file(str(tmp_path / name), "signal_weight")


def refused_with(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(UnusableFile) as caught:
        read_weight_file(str(tmp_path / name), "signal_weight")
    return str(caught.value)
