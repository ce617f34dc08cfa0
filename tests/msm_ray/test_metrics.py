"""The file that a run leaves for Prometheus, read back by Prometheus's own parser. Expected figures are worked in comments."""

import re
import uuid
from datetime import UTC, datetime
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from msm_core.data_nodes.base import NodeResult
from msm_core.errors import UnusableFile
from msm_ray.metrics import Ending, metrics_path, write_metrics
from msm_ray.progress import Following
from msm_ray.run import RunReport
from msm_ray.watch import RunOutput, watching

AS_OF = datetime(2024, 6, 28, tzinfo=UTC)
RUN = uuid.UUID(int=7)
Samples = dict[tuple[str, ...], float]


def samples(path: Path) -> Samples:
    """(name, label values in the order of their names) -> value."""
    families = text_string_to_metric_families(path.read_text())
    return {(s.name, *(value for _, value in sorted(s.labels.items()))): s.value for f in families for s in f.samples}


def a_run() -> Following:
    """Two signals, one failed; four portfolios: one landed with 30 rows, one up to date, one skipped, one still to come."""
    run = Following()
    run.run_uid, run.as_of = RUN, AS_OF
    run.stages["portfolio"].plan("late", 1)
    run.landed([NodeResult("signal", "s", "landed", 5, seconds=1), NodeResult("signal", "t", "failed", seconds=1)], now=2)
    run.landed(
        [
            NodeResult("portfolio", "p", "landed", 30, seconds=1),
            NodeResult("portfolio", "q", "up_to_date"),
            NodeResult("portfolio", "r", "skipped"),
        ],
        now=3,
    )
    return run


def status(found: Samples) -> str:
    (one,) = [key[1] for key, value in found.items() if key[0] == "msm_run_status" and value == 1]
    return one


def test_the_file_tells_what_the_run_did(tmp_path: Path) -> None:
    path = tmp_path / "msm.prom"
    write_metrics(path, a_run(), Ending("partial", 1000.0, 1090.5, datetime(2024, 6, 26, 21, tzinfo=UTC)))
    found = samples(path)
    assert status(found) == "partial"
    assert len([key for key in found if key[0] == "msm_run_status"]) == 4
    assert found["msm_run_start_timestamp_seconds",] == 1000.0
    assert found["msm_run_end_timestamp_seconds",] == 1090.5
    assert found["msm_run_duration_seconds",] == 90.5
    assert found["msm_run_as_of_timestamp_seconds",] == 1719532800  # date -u -d 2024-06-28 +%s
    assert found["msm_run_oldest_watermark_lag_seconds",] == 27 * 3600  # from 26 June 21:00 to 28 June 00:00
    assert found["msm_run_quarantined_nodes",] == 2
    nodes = {key[1:]: value for key, value in found.items() if key[0] == "msm_run_nodes" and value}
    assert nodes == {
        ("signal", "landed"): 1,
        ("signal", "failed"): 1,
        ("portfolio", "landed"): 1,
        ("portfolio", "up_to_date"): 1,
        ("portfolio", "skipped"): 1,
    }
    kinds = ("prices", "signal", "portfolio")
    assert [found["msm_run_rows_written", kind] for kind in kinds] == [0, 5, 30]
    assert [found["msm_run_waiting_nodes", kind] for kind in kinds] == [0, 0, 1]


def test_names_keep_the_conventions_and_no_label_grows_with_the_fleet(tmp_path: Path) -> None:
    path, big = tmp_path / "msm.prom", a_run()
    write_metrics(path, a_run(), Ending("landed", 1.0, 2.0, AS_OF))
    small = samples(path)
    big.landed([NodeResult("portfolio", f"p{i}", "failed") for i in range(1000)], now=9)
    write_metrics(path, big, Ending("landed", 1.0, 2.0, AS_OF))
    assert samples(path).keys() == small.keys()
    for family in text_string_to_metric_families(path.read_text()):
        assert family.type == "gauge"
        assert re.fullmatch(r"msm_run_[a-z_]+", family.name)
        assert not family.name.endswith("_total")
        assert family.documentation.endswith(".")
        assert all(set(sample.labels) <= {"kind", "status"} for sample in family.samples)
        assert all(sample.timestamp is None for sample in family.samples)  # node_exporter refuses a file with timestamps


def test_the_last_good_night_is_remembered_through_bad_ones(tmp_path: Path) -> None:
    path, name = tmp_path / "msm.prom", "msm_run_last_landed_timestamp_seconds"
    write_metrics(path, a_run(), Ending("failed", 0.0, 50.0))
    assert (name,) not in samples(path)
    write_metrics(path, a_run(), Ending("landed", 90.0, 100.0))
    write_metrics(path, a_run(), Ending("partial", 190.0, 200.0))
    write_metrics(path, a_run(), Ending("cancelled", 290.0, 300.0))
    assert (samples(path)[name,], status(samples(path))) == (100.0, "cancelled")
    path.write_text('msm_run_last_landed_timestamp_seconds{ 12\n"')  # another program's work
    write_metrics(path, a_run(), Ending("partial", 390.0, 400.0))
    assert (name,) not in samples(path)


def test_a_reader_sees_one_file_or_the_other_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "msm.prom"
    write_metrics(path, a_run(), Ending("landed", 1.0, 2.0))
    with path.open() as before:
        write_metrics(path, a_run(), Ending("failed", 3.0, 4.0))
        assert 'msm_run_status{status="landed"} 1.0' in before.read()  # replaced, not written over
    assert status(samples(path)) == "failed"
    assert [p.name for p in tmp_path.iterdir()] == ["msm.prom"]


@pytest.mark.parametrize(("error", "told"), [(RuntimeError("the database is gone"), "failed"), (KeyboardInterrupt(), "cancelled")])
def test_a_run_that_crashes_leaves_its_figures_too(tmp_path: Path, error: BaseException, told: str) -> None:
    path = tmp_path / "msm.prom"
    with pytest.raises(type(error)), watching(RunOutput.json, path) as watcher:  # noqa: PT012
        watcher.following = a_run()
        raise error
    found = samples(path)
    assert status(found) == told
    assert found["msm_run_waiting_nodes", "portfolio"] == 1
    assert ("msm_run_oldest_watermark_lag_seconds",) not in found


def test_what_fails_before_there_is_a_plan_is_told_with_what_is_known(tmp_path: Path) -> None:
    path = tmp_path / "msm.prom"
    with pytest.raises(RuntimeError), watching(RunOutput.json, path):
        raise RuntimeError
    found = samples(path)
    assert status(found) == "failed"
    assert ("msm_run_as_of_timestamp_seconds",) not in found
    assert found["msm_run_end_timestamp_seconds",] > 1.7e9


def test_the_environment_names_the_file_and_the_option_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert metrics_path(None) is None
    monkeypatch.setenv("MSM_METRICS_FILE", str(tmp_path / "a.prom"))
    assert metrics_path(None) == tmp_path / "a.prom"
    assert metrics_path(tmp_path / "b.prom") == tmp_path / "b.prom"
    monkeypatch.setenv("MSM_METRICS_FILE", "")
    assert metrics_path(None) is None


def test_the_demo_leaves_the_figures_of_a_real_fleet_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSM_METRICS_FILE", str(tmp_path / "a.prom"))
    with watching(RunOutput.json, with_metrics=False) as watcher:
        watcher.finished(RunReport(RUN, AS_OF, (), 1.0))
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_refused_before_anything_happens(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "absent" / "msm.prom"):
        with pytest.raises(UnusableFile, match="folder that exists"), watching(RunOutput.json, place):
            pytest.fail("the command has begun")


def test_metrics_that_cannot_be_written_in_the_end_make_no_run_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    with watching(RunOutput.json, folder / "msm.prom") as watcher:
        watcher.finished(RunReport(RUN, AS_OF, (), 1.0))
        folder.rmdir()
    told = capsys.readouterr()
    assert "the metrics could not be written" in told.out + told.err
