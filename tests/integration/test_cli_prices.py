"""`msm-ray sources` and `msm-ray prices load` as a user meets them: from somebody else's table and a file to a portfolio."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from msm_core.models import ExternalPricesStorage
from msm_ray import cli
from tests import factories
from tests.integration import test_cli

run_cli = test_cli.run_cli
Cli = Callable[..., tuple[int, Any]]

PRICES = ExternalPricesStorage.__tablename__
FLEET = """
version: 1
calendars: { WEEKDAYS: { pandas_calendar: "NYSE", valid_from: 2024-01-01, valid_to: 2024-12-31 } }
prices: { mine: { source: VendorBars } }
rebalance: { daily: { kind: immediate_signal, calendar_key: WEEKDAYS, rebalance_on: every_session } }
defaults: { prices: mine, rebalance: daily }
portfolios:
  - { id: p, signal: { kind: fixed_weights, weights: { A: 1.0 } } }
"""


@pytest.fixture
def vendor(engine: Engine) -> Engine:
    """A table of somebody else's, in a schema of their own, and a calendar."""
    columns = "asset_identifier text, time_index timestamptz, close numeric(18,6)"
    factories.sql(engine, f"CREATE SCHEMA vendor; CREATE TABLE vendor.bars ({columns})")
    return engine


def lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What people see of a command that succeeds."""
    monkeypatch.setattr(sys, "argv", ["msm-ray", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return capsys.readouterr().out + f"exit {stop.value.code or 0}"


def test_from_a_strangers_table_and_a_file_to_a_portfolio(run_cli: Cli, vendor: Engine, tmp_path: Path) -> None:
    """Breaks: somebody with a table of their own and a CSV cannot get a portfolio without writing Python."""
    (tmp_path / "fleet.yaml").write_text(FLEET)
    assert run_cli("prepare", "-f", "fleet.yaml")[0] == 0
    register = ("sources", "register", "VendorBars", "--table", "vendor.bars", "--cadence", "1d")
    code, facts = run_cli(*register, "--description", "closes")
    assert code == 0
    assert {"table": "vendor.bars", "cadence": "1d", "time_label": "close", "description": "closes"}.items() <= facts.items()
    (tmp_path / "closes.csv").write_text("date,A\n2024-01-04,100\n2024-01-05,110\n2024-01-08,99\n")
    load = ("prices", "load", "closes.csv", "--source", "VendorBars", "--calendar", "WEEKDAYS", "--create-assets")
    code, refused = run_cli(*load)
    assert code == 2
    assert facts["hints"][0].rsplit(": ")[1] in refused["error"]["message"]  # CREATE UNIQUE INDEX ...
    factories.sql(vendor, facts["hints"][0].rsplit(": ")[1])
    code, report = run_cli(*load)
    counts = {name: report[name] for name in ("bars_read", "rows_written", "assets", "assets_created")}
    assert (code, counts) == (0, {"bars_read": 3, "rows_written": 3, "assets": 1, "assets_created": 1})
    assert (report["first"], report["last"]) == ("2024-01-04 21:00:00+00:00", "2024-01-08 21:00:00+00:00")
    assert run_cli(*load)[1]["rows_written"] == 0
    assert run_cli("run", "--executor", "local", "--as-of", "2024-01-09")[0] == 0
    # bought at 100 for a fee of 1.8 bps, +10 % and -10 %: 0.99982 * 1.1 * 0.9
    assert factories.values(vendor, "p")["close"].iloc[-1] == pytest.approx(0.99982 * 0.99, rel=1e-12)


def test_listing_and_showing(run_cli: Cli, vendor: Engine, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks: nobody sees what prices there are, or an estimate passes for a count."""
    run_cli("sources", "register", "VendorBars", "--table", "vendor.bars")
    factories.sql(vendor, "INSERT INTO vendor.bars VALUES ('A', now(), 1), ('B', now(), 1); ANALYZE vendor.bars")
    code, listed = run_cli("sources", "list")
    assert (code, [s["identifier"] for s in listed["sources"]]) == (0, ["ExternalPricesTS", "VendorBars"])
    code, shown = run_cli("sources", "show", "VendorBars")
    assert (code, shown["estimated_rows"], shown["exists"], shown["columns"]["close"]) == (0, 2, True, "numeric(18,6)")
    assert run_cli("sources", "show", shown["uid"])[1] == shown
    text = lines(capsys, monkeypatch, "sources", "show", "VendorBars")
    assert "about 2, by the server's estimate" in text
    assert "hint: reading by asset and time wants an index" in text
    assert text.endswith("exit 0")
    factories.sql(vendor, "DROP TABLE vendor.bars")
    assert "no such table" in lines(capsys, monkeypatch, "sources", "list")
    assert run_cli("sources", "show", "VendorBars")[1]["exists"] is False


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("sources", "register", "V", "--table", "vendor.nothing"), "no table or view"),
        (("sources", "register", "ExternalPricesTS", "--table", PRICES, "--cadence", "1h"), "--replace"),
        (("sources", "show", "nowhere"), "Known: ExternalPricesTS"),
        (("prices", "load", "absent.csv", "--source", "ExternalPricesTS"), "absent.csv"),
        (("prices", "load", "a.csv", "--source", "nowhere"), "Known: ExternalPricesTS"),
        (("prices", "load", "a.csv", "--source", "ExternalPricesTS", "--calendar", "NOSUCH"), "NOSUCH"),
    ],
)
def test_usage_errors_exit_with_2(run_cli: Cli, tmp_path: Path, arguments: tuple[str, ...], told: str) -> None:
    """Breaks: a script takes a spelling mistake for a crash, or for success."""
    (tmp_path / "a.csv").write_text("time,asset,close\n")
    code, result = run_cli(*arguments)
    assert code == 2
    assert told in result["error"]["message"]


def test_wrong_rows_exit_with_4(run_cli: Cli, engine: Engine, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks: a night's script goes on with half the prices, or the errors cannot be found among 3 000."""
    rows = "".join(f"2024-01-{1 + i % 28:02}T21:00Z,[/odd {i}],-1\n" for i in range(1500))
    (tmp_path / "bad.csv").write_text(f"time,asset,close\n{rows}")
    load = ("prices", "load", "bad.csv", "--source", "ExternalPricesTS", "--errors", "errors.csv")
    code, result = run_cli(*load)
    assert (code, result["rows_written"], result["error_count"], len(result["errors"])) == (4, 0, 3000, 1000)  # 1500 prices, 1500 assets
    assert result["errors"][0] == {
        "row": 2,
        "asset": "[/odd 0]",
        "time": "2024-01-01T21:00Z",
        "column": "close",
        "reason": "'-1' is refused: a price must be finite and above 0",
    }
    assert len((tmp_path / "errors.csv").read_text().splitlines()) == 3001
    text = lines(capsys, monkeypatch, *load)
    assert "3,000 errors, nothing was loaded; the first 20" in text
    assert "[/odd 19]" in text  # names of others are no markup
    assert "\\" not in text  # and are not escaped twice
    assert "[/odd 20]" not in text
    assert "errors.csv" in text
    assert text.endswith("exit 4")
    assert factories.sql(engine, f"SELECT count(*) FROM {PRICES}") == [(0,)]


@pytest.mark.parametrize("verb", [("sources", "register"), ("prices", "load")])
def test_help_teaches_by_example(capsys: Any, monkeypatch: pytest.MonkeyPatch, verb: tuple[str, str]) -> None:
    """Breaks: the first thing people ask for tells them nothing to copy."""
    text = lines(capsys, monkeypatch, *verb, "--help")
    assert f"Example: msm-ray {' '.join(verb)}" in " ".join(text.split())
