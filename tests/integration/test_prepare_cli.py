"""`msm-ray prepare` as a user meets it: what it says before, what it does once, and what a run finds."""

import runpy
import sys
from datetime import date
from pathlib import Path

import pytest
from sqlalchemy import Engine

from msm_ray import cli
from tests import factories
from tests.factories import relations, sql, versions
from tests.integration import test_cli
from tests.integration.test_cli import Cli

run_cli, bars = test_cli.run_cli, test_cli.bars
FILLED, EXACT = "msm__interpolated_prices_2cb23d4b980f15ff", "msm__interpolated_prices_b1925342feeb0593"  # of ExternalPricesTS, 1d
CLEAN = {"pending": [], "drifted": [], "missing": []}
NOTHING = CLEAN | {"applied": [], "repaired": [], "problems": []}
HEADER = """
version: 1
calendars:
  UTC247: { pandas_calendar: "24/7", valid_from: 2024-01-01, valid_to: 2024-12-31 }
universes: { some: [a0, a1, a2] }
prices:
  filled: { source: ExternalPricesTS, interpolate: { frequency: 1d, rule: ffill, assets: some } }
  exact: { source: ExternalPricesTS, interpolate: { frequency: 1d, rule: none } }
  absent: { source: no-such-source, interpolate: { frequency: 1d, rule: ffill } }
rebalance:
  weekly: { kind: immediate_signal, calendar_key: UTC247, rebalance_on: week_end }
defaults: { prices: filled, rebalance: weekly, signal: { kind: equal_weights, asset_list: [a0, a1] } }
portfolios:
"""


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    return write_fleet(tmp_path, "{ id: f }", "{ id: e, prices: exact }", "{ id: g }")


def write_fleet(folder: Path, *entries: str) -> Path:
    path = folder / "fleet.yaml"
    path.write_text(HEADER + "".join(f"  - {entry}\n" for entry in entries))
    return path


def test_check_is_three_lists_and_an_exit_code(run_cli: Cli, empty_engine: Engine, fleet: Path) -> None:  # R50, R56
    code, found = run_cli("prepare", "--check", "-f", str(fleet))
    assert code == 10
    assert found.keys() == {"pending", "drifted", "missing"}
    assert (found["pending"], found["drifted"]) == (["0001", "0002", "0003", "0004", FILLED, EXACT], [])
    assert "msm__portfolios" in found["missing"]
    assert relations(empty_engine) == []
    assert run_cli("prepare", "--check")[1]["pending"] == ["0001", "0002", "0003", "0004"]  # nothing can be stored yet

    code, done = run_cli("prepare", "-f", str(fleet))
    assert (code, done) == (0, NOTHING | {"applied": ["0001", "0002", "0003", "0004", FILLED, EXACT], "configurations_stored": 3})
    assert run_cli("prepare", "--check", "-f", str(fleet)) == (0, CLEAN)
    assert run_cli("prepare", "--check") == (0, CLEAN)


def test_again_nothing_is_applied_and_nothing_written(run_cli: Cli, engine: Engine, fleet: Path) -> None:  # R59
    assert run_cli("prepare", "-f", str(fleet))[1]["applied"] == [FILLED, EXACT]
    before = relations(engine), versions(engine)
    assert run_cli("prepare", "-f", str(fleet)) == (0, NOTHING | {"configurations_stored": 0})
    assert run_cli("prepare") == (0, NOTHING)
    assert (relations(engine), versions(engine)) == before


def test_without_a_file_the_stored_fleet_is_prepared(run_cli: Cli, engine: Engine, fleet: Path, tmp_path: Path) -> None:
    run_cli("prepare", "-f", str(fleet))
    sql(engine, f"DROP TABLE {EXACT}")
    assert run_cli("prepare", "--check") == (10, CLEAN | {"missing": [EXACT]})
    only_filled = write_fleet(tmp_path, "{ id: f }")
    assert run_cli("prepare", "--check", "-f", str(only_filled)) == (0, CLEAN)  # of a file, only what the file needs
    assert run_cli("prepare") == (0, NOTHING | {"applied": [EXACT]})
    assert run_cli("prepare", "--check") == (0, CLEAN)


@pytest.mark.usefixtures("bars")
def test_prepare_then_run_and_a_run_alone_makes_no_table(run_cli: Cli, engine: Engine, fleet: Path) -> None:  # R50, R55, R58
    run = ("run", "--executor", "local", "--as-of", "2024-02-10")
    before = relations(engine)
    code, report = run_cli(*run, "-f", str(fleet))
    assert (code, report["landed"]) == (4, 0)
    assert all("msm-ray prepare" in failure["message"] for failure in report["failures"])
    assert len(report["failures"]) == 3
    assert relations(engine) == before

    assert run_cli("prepare") == (0, NOTHING | {"applied": [FILLED, EXACT]})  # `run -f` has stored the fleet
    code, report = run_cli(*run)
    assert (code, report["failures"]) == (0, [])
    assets = "SELECT DISTINCT asset_identifier FROM {} ORDER BY 1"
    assert sql(engine, assets.format(FILLED)) == [("a0",), ("a1",), ("a2",)]  # those that the policy is for
    assert sql(engine, assets.format(EXACT)) == [("a0",), ("a1",)]  # those that the portfolio needs
    checksum = run_cli("verify")[1]
    assert checksum["violations"] == []

    sql(engine, f"DROP TABLE {FILLED}")
    assert run_cli(*run)[0] == 3
    assert run_cli("prepare")[1]["applied"] == [FILLED]
    code, report = run_cli(*run)
    assert (code, report["failures"]) == (0, [])
    assert run_cli("verify")[1] == checksum


@pytest.mark.usefixtures("bars")
def test_partitions_by_year_are_of_the_calendars_that_the_file_brings(run_cli: Cli, engine: Engine, tmp_path: Path) -> None:
    fleet = write_fleet(tmp_path, "{ id: f, prices: exact }", "{ id: g, prices: exact }")
    years = [f"y{year}" for year in range(2024, date.today().year + 3)]
    tables = ("msm__signal_weights", "msm__portfolio_weights", "msm__portfolios")
    made = [name for table in tables for name in (table, *(f"{table}_{part}" for part in (*years, "rest")))]

    code, done = run_cli("prepare", "-f", str(fleet), "--partition-by-year")
    assert (code, done["applied"]) == (0, [EXACT, *made])
    assert run_cli("prepare", "--check") == run_cli("prepare", "--check", "--partition-by-year") == (0, CLEAN)
    assert run_cli("prepare", "-f", str(fleet), "--partition-by-year") == (0, NOTHING | {"configurations_stored": 0})
    assert run_cli("run", "--executor", "local", "--as-of", "2024-02-10")[0] == 0
    assert run_cli("verify")[1]["violations"] == []

    sql(engine, "DROP TABLE msm__portfolios_y2025")
    assert run_cli("prepare", "--check") == (10, CLEAN | {"pending": ["msm__portfolios_y2025"]})
    assert run_cli("prepare") == (0, NOTHING | {"applied": ["msm__portfolios_y2025"]})


@pytest.mark.usefixtures("bars")
def test_partitions_by_scope_are_as_many_as_asked_for(run_cli: Cli, engine: Engine, tmp_path: Path) -> None:
    fleet = write_fleet(tmp_path, *(f"{{ id: f{i}, prices: exact }}" for i in range(16)))
    made = [f"{table}{part}" for table in factories.OUTPUTS for part in ("", "_h0", "_h1", "_h2", "_h3")]
    assert run_cli("prepare", "-f", str(fleet)) == (0, NOTHING | {"applied": [EXACT], "configurations_stored": 16})
    assert run_cli("prepare", "--check", "--partitions", "4") == (10, CLEAN | {"pending": made})
    assert run_cli("prepare", "-f", str(fleet), "--partitions", "4") == (0, NOTHING | {"applied": made, "configurations_stored": 0})
    assert run_cli("prepare", "--check") == run_cli("prepare", "--check", "--partitions", "4") == (0, CLEAN)
    assert run_cli("prepare", "-f", str(fleet), "--partitions", "4") == (0, NOTHING | {"configurations_stored": 0})
    assert run_cli("run", "--executor", "local", "--as-of", "2024-02-10")[0] == 0
    assert run_cli("verify")[1]["violations"] == []

    code, error = run_cli("prepare", "--partitions", "8")
    assert (code, error["error"]["reason"]) == (2, "storage_partitioned")
    assert "msm__portfolios: it has 4 partitions, not 8. Leave them so" in error["error"]["message"]


def test_the_ddl_of_partitions_is_printed(engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    before = relations(engine)
    monkeypatch.setattr(sys, "argv", ["msm-ray", "prepare", "--sql", "--partitions", "2"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    printed = capsys.readouterr().out
    assert 'ATTACH PARTITION "msm__portfolios_h1" FOR VALUES WITH (MODULUS 2, REMAINDER 1);' in printed
    assert relations(engine) == before


@pytest.mark.parametrize("given", [(), ("--check",), ("--sql",)])
def test_one_layout_at_a_time_and_nothing_is_made(run_cli: Cli, empty_engine: Engine, given: tuple[str, ...]) -> None:
    code, error = run_cli("prepare", "--partitions", "4", "--partition-by-year", *given)
    assert (code, error["error"]["reason"]) == (2, "configuration_error")
    assert "--partitions and --partition-by-year exclude each other" in error["error"]["message"]
    for number in ("1", "65", "many"):
        assert run_cli("prepare", "--partitions", number, *given) == (2, None)
    assert relations(empty_engine) == []


def test_the_job_knows_both_layouts(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    job = runpy.run_path(str(Path(__file__).parents[2] / "jobs" / "prepare_storage.py"))
    file = ("--file", str(write_fleet(tmp_path, "{ id: e, prices: exact }")))

    def submit(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["prepare_storage.py", *arguments])
        return job["main"](), *capsys.readouterr()

    before = relations(engine)
    for refused, told in ((("4", "--partition-by-year"), "exclude each other"), (("65",), "--partitions 65: give a number from 2 to 64")):
        code, out, err = submit(*file, "--partitions", *refused)
        assert (code, out, told in err) == (2, "", True)
    assert relations(engine) == before
    code, out, _ = submit(*file, "--partitions", "4")
    assert (code, out) == (0, "16 revisions and tables applied\n1 configurations new or changed\n")  # 1 + 3 * (1 + 4)
    code, out, _ = submit("--partitions", "4")
    assert (code, out) == (0, "0 revisions and tables applied\n")
    assert sql(engine, "SELECT count(*) FROM pg_class WHERE relispartition AND relkind = 'r'") == [(12,)]


def test_storages_with_rows_stay_as_they_are(run_cli: Cli, engine: Engine) -> None:
    sql(engine, "INSERT INTO msm__portfolios VALUES ('p', '2024-01-02', 1, 0, 1, '2024-01-02')")
    before = relations(engine)
    for arguments in (("--check",), ("--sql",), ()):
        code, error = run_cli("prepare", "--partition-by-year", *arguments)
        assert (code, error["error"]["reason"]) == (2, "storage_not_empty")
        assert "msm__portfolios. Empty all of them (TRUNCATE" in error["error"]["message"]
    assert relations(engine) == before
    assert run_cli("prepare", "--check") == (0, CLEAN)


def test_what_cannot_be_prepared_is_named_and_the_rest_is_made(run_cli: Cli, engine: Engine, tmp_path: Path) -> None:
    fleet = write_fleet(tmp_path, "{ id: f }", "{ id: a, prices: absent }")
    code, found = run_cli("prepare", "--check", "-f", str(fleet))
    assert (code, found["pending"], len(found["problems"])) == (10, [FILLED], 1)
    code, done = run_cli("prepare", "-f", str(fleet))
    assert (code, done["applied"], done["configurations_stored"]) == (3, [FILLED], 2)
    assert done["problems"] == found["problems"]
    assert "Register it" in done["problems"][0]


def test_drift_is_an_error_that_names_table_and_column(run_cli: Cli, engine: Engine, fleet: Path) -> None:
    run_cli("prepare", "-f", str(fleet))
    sql(engine, f"ALTER TABLE {FILLED} DROP COLUMN vwap")
    sql(engine, f"DROP TABLE {EXACT}")
    code, found = run_cli("prepare", "--check")
    assert (code, found["pending"], found["missing"], len(found["drifted"])) == (10, [], [EXACT], 1)
    assert FILLED in found["drifted"][0]
    assert "vwap" in found["drifted"][0]
    code, error = run_cli("prepare")
    assert code not in (0, 10)
    assert found["drifted"][0] in error["error"]["message"]
    assert run_cli("prepare", "--check")[1]["missing"] == []  # the other one is made all the same


def test_sql_is_printed_and_changes_nothing(
    empty_engine: Engine, fleet: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["msm-ray", "prepare", "-f", str(fleet), "--sql"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    printed = capsys.readouterr().out
    assert all(f"CREATE TABLE {name} (" in printed for name in ("msm__portfolios", FILLED, EXACT))
    assert relations(empty_engine) == []


def test_people_are_told_what_was_repaired_and_what_is_to_do(
    engine: Engine, fleet: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # R57
    sql(engine, "UPDATE msm__time_index_meta_table SET cadence = NULL WHERE identifier = 'ExternalPricesTS'")

    def told(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["msm-ray", "prepare", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), capsys.readouterr().out

    code, text = told("--check")
    assert (code, "msm-ray prepare" in text, "ExternalPricesTS" in text) == (10, True, True)
    code, text = told("-f", str(fleet))
    assert code == 0
    assert "Cadence of ExternalPricesTS was missing" in text
    assert "2 revisions and tables applied, 3 configurations new or changed" in text
    assert told("--check") == (0, "0 pending · 0 drifted · 0 missing\n")
