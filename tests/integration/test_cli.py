"""The command line as a user meets it, against a real database: exit codes, JSON, quarantine, retry."""

import json
import runpy
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import structlog
from sqlalchemy import Engine, text

import msm_core
from msm_core.api import Asset, Calendar, CalendarDate, CalendarSession
from msm_core.data_nodes.prices import publish_prices
from msm_core.embedded import EmbeddedPostgres
from msm_core.models import ExternalPricesStorage
from msm_ray import cli
from msm_ray.executors import LocalExecutor

ASSETS = [f"a{i}" for i in range(10)]
SESSIONS = 60
PRICES = ExternalPricesStorage.__tablename__
HEADER = """
version: 1
calendars:
  UTC247: { pandas_calendar: "24/7", valid_from: 2024-01-01, valid_to: 2024-12-31 }
prices:
  daily: { source: ExternalPricesTS }
rebalance:
  weekly: { kind: immediate_signal, calendar_key: UTC247, rebalance_on: week_end }
defaults: { prices: daily, rebalance: weekly }
portfolios:
"""

Cli = Callable[..., tuple[int, Any]]


@pytest.fixture
def run_cli(engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    """Runs `msm-ray ...`, in this process; returns the exit code and the parsed stdout, of ndjson a list. `--output json` unless given."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, Any]:
        told = arguments if "--output" in arguments else (*arguments, "--output", "json")
        monkeypatch.setattr(sys, "argv", ["msm-ray", *told])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = capsys.readouterr().out
        if told[-1] == "ndjson":
            return code, [json.loads(line) for line in printed.splitlines()]
        return code, json.loads(printed) if printed else None

    return run


@pytest.fixture
def bars(engine: Engine) -> None:
    """Ten assets, 60 daily bars from 2024-01-02 00:00Z (the close of the 24/7 session of 2024-01-01)."""
    msm_core.start_engine(models=[Asset, Calendar, CalendarDate, CalendarSession])
    Asset.upsert_many([{"unique_identifier": a} for a in ASSETS])
    times = pd.date_range("2024-01-02", periods=SESSIONS, tz="UTC")
    paths = 100 * np.exp(np.cumsum(np.random.default_rng(7).normal(0, 0.02, (SESSIONS, len(ASSETS))), axis=0))
    wide = pd.DataFrame(paths, index=times, columns=ASSETS)
    publish_prices(engine, wide.rename_axis("time_index").reset_index().melt("time_index", var_name="asset_identifier", value_name="close"))


def write_fleet(path: Path, entries: list[str]) -> Path:
    path.write_text(HEADER + "".join(f"  - {entry}\n" for entry in entries))
    return path


def good_entries(count: int) -> list[str]:
    universes = [sorted({ASSETS[(i + k) % 9] for k in range(2 + i % 7)}) for i in range(count)]  # a9 is left to the NaN portfolio
    return [
        f"{{ id: good-{i:02d}, signal: {{ kind: equal_weights, asset_list: [{', '.join(universe)}] }}, tags: [good] }}"
        for i, universe in enumerate(universes)
    ]


BAD_ENTRIES = [
    "{ id: bad-nan, signal: { kind: equal_weights, asset_list: [a0, a9] } }",
    "{ id: bad-asset, signal: { kind: equal_weights, asset_list: [a0, nowhere] } }",
    "{ id: bad-calendar, signal: { kind: equal_weights, asset_list: [a0] }, rebalance: { kind: immediate_signal, calendar_key: NOSUCH } }",
]


@pytest.mark.usefixtures("bars")
def test_three_bad_portfolios_are_named_and_the_other_47_land(run_cli: Cli, engine: Engine, tmp_path: Path) -> None:
    fleet = write_fleet(tmp_path / "fleet.yaml", [*good_entries(47), *BAD_ENTRIES])
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE {PRICES} SET close = 'NaN' WHERE asset_identifier = 'a9' AND time_index = '2024-02-01'"))

    code, result = run_cli("run", "-f", str(fleet), "--executor", "local", "--as-of", "2024-02-29")

    assert code == 3
    assert (result["landed"], result["failed"], result["up_to_date"], result["skipped"]) == (47, 3, 0, 0)
    reasons = {f["identifier"]: (f["reason"], f["message"]) for f in result["failures"]}
    assert reasons.keys() == {"bad-nan", "bad-asset", "bad-calendar"}
    assert reasons["bad-nan"][0] == "invalid_price"
    assert "close of a9 at 2024-02-01 00:00Z is nan" in reasons["bad-nan"][1]
    assert reasons["bad-asset"][0] == "unknown_assets"
    assert "nowhere" in reasons["bad-asset"][1]
    assert reasons["bad-calendar"][0] == "calendar_not_found"
    assert json.loads((tmp_path / "run_results.json").read_text())["landed"] == 47
    with engine.connect() as connection:  # nothing half-written of the failed ones
        rows = connection.execute(text("SELECT count(*) FROM msm__portfolios WHERE portfolio_identifier LIKE 'bad-%'")).scalar()
    assert rows == 0

    # the remedies that the messages name, one each; then retry runs exactly those three, at the original as-of
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE {PRICES} SET close = 100 WHERE close = 'NaN'"))
        connection.execute(text(f"INSERT INTO {PRICES} (asset_identifier, time_index, close) SELECT 'nowhere', time_index, close "
                                f"FROM {PRICES} WHERE asset_identifier = 'a1'"))  # fmt: skip
    Asset.upsert(unique_identifier="nowhere")
    Calendar.create_from_pandas_calendar("24/7", "NOSUCH", "made at last", date(2024, 1, 1), date(2024, 12, 31))
    code, result = run_cli("retry", "--executor", "local")
    assert code == 0
    assert (result["landed"], result["failed"], result["up_to_date"]) == (3, 0, 0)
    assert result["as_of"] == "2024-03-01T00:00:00+00:00"

    code, result = run_cli("run", "--executor", "local", "--as-of", "2024-02-29")  # the stored fleet: all there
    assert (code, result["landed"], result["up_to_date"], result["rows_written"]) == (0, 0, 50, 0)
    code, result = run_cli("retry", "--executor", "local")
    assert (code, result["landed"]) == (0, 0)
    code, result = run_cli("verify")
    assert (code, result["violations"]) == (0, [])


@pytest.mark.usefixtures("bars")
def test_selecting_planning_and_refreshing(run_cli: Cli, tmp_path: Path) -> None:
    fleet = write_fleet(tmp_path / "fleet.yaml", good_entries(4))
    code, result = run_cli("prepare", "-f", str(fleet))
    assert (code, result["pending"], result["missing"], result["configurations_stored"]) == (0, [], [], 4)
    code, plan = run_cli("plan", "--as-of", "2024-02-10", "--exit-code")
    assert code == 10
    assert plan["summary"]["portfolios"] == {"new": 4}
    assert run_cli("run", "--select", "portfolio:good-0[01]", "--executor", "local", "--as-of", "2024-02-10")[1]["landed"] == 2
    assert run_cli("run", "--executor", "local", "--as-of", "2024-02-10")[1]["landed"] == 2
    before = run_cli("verify")[1]["checksum"]
    code, result = run_cli("run", "--full-refresh", "--executor", "local", "--as-of", "2024-02-10")
    assert (code, result["landed"]) == (0, 4)
    assert run_cli("verify")[1]["checksum"] == before
    code, status = run_cli("status")
    assert (code, status["portfolios"]) == (0, {"landed": 4})
    assert run_cli("plan", "--as-of", "2024-02-10", "--exit-code")[0] == 0


@pytest.mark.usefixtures("bars")
def test_verify_sees_every_kind_of_damage(run_cli: Cli, engine: Engine, tmp_path: Path) -> None:
    run_cli("run", "-f", str(write_fleet(tmp_path / "fleet.yaml", good_entries(3))), "--executor", "local", "--as-of", "2024-02-10")
    clean = run_cli("verify")[1]
    damages = [
        "UPDATE msm__portfolios SET close = close * (1 + 1e-15) WHERE portfolio_identifier = 'good-01' AND time_index = '2024-02-01'",
        "DELETE FROM msm__portfolios WHERE portfolio_identifier = 'good-01' AND time_index = '2024-02-11'",
        "DELETE FROM msm__portfolio_weights WHERE portfolio_identifier = 'good-00'",
        "UPDATE msm__portfolio_weights SET asset_identifier = 'ghost' WHERE asset_identifier = 'a1' AND portfolio_identifier = 'good-01'",
        "DELETE FROM msm__data_node_update WHERE scope = 'good-02'",
    ]
    for damage in damages:
        with engine.connect() as connection, connection.begin() as undone:
            connection.execute(text(damage))
            found = cli.verify_storages(connection)
            undone.rollback()
        assert found.violations, damage
        assert found.checksum != clean["checksum"] or "data_node_update" in damage
    assert run_cli("verify")[1] == clean


@pytest.mark.usefixtures("bars")
def test_a_run_is_told_event_by_event_and_left_for_prometheus(
    run_cli: Cli, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = write_fleet(tmp_path / "fleet.yaml", [*good_entries(5), BAD_ENTRIES[1]])
    path = tmp_path / "msm.prom"
    local = ("--executor", "local", "--output", "ndjson")

    code, events = run_cli("run", "-f", str(fleet), "--as-of", "2024-02-10", "--metrics-file", str(path), "--batch-size", "2", *local)

    assert code == 3
    assert [e["event"] for e in (events[0], events[-1])] == ["run_started", "run_finished"]
    assert events[0]["nodes"]["portfolio"] == {"total": 6, "work": 5}
    started, finished = events[0], events[-1]
    assert (finished["run"], finished["status"], finished["landed"], finished["failed"]) == (started["run"], "partial", 5, 1)
    batches = [e for e in events if e["event"] == "batch"]
    assert sum(b["landed"] for b in batches if b["kind"] == "portfolio") == 5
    assert sum(b["rows"] for b in batches) == finished["rows_written"]
    nodes = [(e["kind"], e["identifier"], e["status"], e["reason"]) for e in events if e["event"] == "node"]
    assert ("portfolio", "bad-asset", "failed", "unknown_assets") in nodes
    assert events == sorted(events, key=lambda e: e["time"])
    metrics = path.read_text()
    assert 'msm_run_status{status="partial"} 1.0' in metrics
    assert 'msm_run_nodes{kind="portfolio",status="failed"} 1.0' in metrics
    # five land at the 24/7 close of 2024-02-11 00:00Z, which is the as-of; the sixth has no value at all
    assert "msm_run_oldest_watermark_lag_seconds 0.0" in metrics
    assert finished["oldest_watermark"] == "2024-02-11T00:00:00+00:00"

    # three nights later nothing of a0 has come: who holds it stays behind, by three days
    Asset.upsert(unique_identifier="nowhere")
    with engine.begin() as connection:
        connection.execute(text(f"DELETE FROM {PRICES} WHERE asset_identifier = 'a0' AND time_index > '2024-02-11'"))
    monkeypatch.setenv("MSM_METRICS_FILE", str(path))
    code, events = run_cli("run", "--as-of", "2024-02-13", *local)
    assert f"msm_run_oldest_watermark_lag_seconds {3 * 86400.0}" in path.read_text()

    code, events = run_cli("run", "--as-of", "soon", *local)
    assert (code, [e["event"] for e in events]) == (2, ["error"])
    assert events[0]["reason"] == "configuration_error"
    assert 'msm_run_status{status="failed"} 1.0' in path.read_text()


def test_events_are_for_the_verbs_that_have_some(run_cli: Cli) -> None:
    assert run_cli("retry", "--output", "ndjson")[1][0]["status"] == "nothing to retry"
    assert run_cli("status", "--output", "ndjson")[0] == 2


def test_the_job_prints_what_the_command_does(
    run_cli: Cli, bars: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = runpy.run_path(str(Path(__file__).parents[2] / "jobs" / "run_fleet.py"))
    monkeypatch.setitem(job["run"].__globals__, "make_executor", lambda *arguments: LocalExecutor())

    def submit(*arguments: str) -> tuple[int, list[Any]]:
        monkeypatch.setattr(sys, "argv", ["run_fleet.py", *arguments])
        structlog.reset_defaults()
        capsys.readouterr()
        code = job["main"]()
        assert structlog.is_configured()  # else a warning would stand among the events: by default it goes to stdout
        return code, capsys.readouterr().out.splitlines()

    run_cli("prepare", "-f", str(write_fleet(tmp_path / "fleet.yaml", good_entries(2))))
    code, lines = submit("--as-of", "2024-02-10", "--metrics-file", str(tmp_path / "msm.prom"))
    assert (code, len(lines), json.loads(lines[0])["landed"], json.loads(lines[0])["failures"]) == (0, 1, 2, [])
    assert 'msm_run_status{status="landed"} 1.0' in (tmp_path / "msm.prom").read_text()
    code, lines = submit("--as-of", "2024-02-10", "--output", "ndjson")
    assert (code, json.loads(lines[-1])["up_to_date"]) == (0, 2)
    code, lines = submit("--as-of", "soon", "--output", "ndjson")
    assert (code, [json.loads(line)["event"] for line in lines]) == (2, ["error"])
    code, lines = submit("--as-of", "soon")
    assert (code, json.loads("".join(lines))["error"]["reason"]) == (2, "configuration_error")


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("run", "--as-of", "2024-01-01T00:00:00"), 2, "needs an offset"),
        (("run", "--as-of", "soon"), 2, "neither a date"),
        (("run", "--select", "colour:red"), 2, "colour"),
        (("retry", "ffffffff"), 2, "the ledger has no run"),
        (("validate", "-f", "absent.yaml"), 2, "absent.yaml"),
    ],
)
def test_usage_errors_exit_with_2_and_say_why(run_cli: Cli, arguments: tuple[str, ...], code: int, told: str) -> None:
    got, result = run_cli(*arguments)
    assert got == code
    assert told in result["error"]["message"]


def test_unprepared_database_is_refused_before_anything(empty_engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:  # R58
    monkeypatch.setattr(sys, "argv", ["msm-ray", "run", "--executor", "local"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "msm-ray prepare" in capsys.readouterr().err
    with empty_engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'")).scalar() == 0


def test_the_embedded_database_by_its_verbs(
    run_cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("MSM_HOME", str(home))
    assert run_cli("db", "url")[0] == 2  # nothing runs yet
    try:
        assert run_cli("db", "start")[1]["running"] is True
        assert run_cli("db", "url")[1]["url"].startswith("postgresql://msm:")
        assert run_cli("db", "stop") == (0, {"stopped": True})
        assert run_cli("db", "stop") == (0, {"stopped": False})
        assert run_cli("db", "status")[1]["running"] is False
    finally:
        EmbeddedPostgres(home=home).destroy()
