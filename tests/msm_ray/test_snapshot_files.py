"""Snapshots from files: what `show` writes can be loaded again, and what is wrong is told whole."""

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from msm_core.errors import RowNotFound, UnusableFile
from msm_core.services.reads import account_holdings, account_targets
from msm_core.services.snapshots import HoldingsSnapshot, TargetSnapshot, replace_account_holdings, replace_target_positions
from msm_ray import cli
from msm_ray.export import write_frame
from msm_ray.snapshot_files import holdings_snapshots, target_snapshots
from tests.accounts import NOON, Book, small

assert small

Cli = Callable[..., tuple[int, Any]]


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    def run(*arguments: str) -> tuple[int, Any]:
        monkeypatch.setattr(sys, "argv", ["msm-ray", "accounts", *arguments, "--output", "json"])
        capsys.readouterr()
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0), json.loads(capsys.readouterr().out)
        return 0, json.loads(capsys.readouterr().out)

    return run


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet"])
def test_what_is_shown_can_be_loaded_again(small: Book, tmp_path: Path, suffix: str) -> None:
    positions: list[dict[str, Any]] = [
        {"asset_uid": small.assets[0].uid, "single_asset_quantity": -1e-7},
        {"asset_uid": small.assets[1].uid, "constant_notional_exposure": 0.1 + 0.2},
        {"portfolio_uid": small.portfolios[0].uid, "weight_notional_exposure": 1 / 3},
    ]
    replace_target_positions(TargetSnapshot("C00-core", NOON, positions))
    holdings = [{"asset_identifier": "A00", "quantity": 1 / 3}, {"asset_identifier": "A01", "quantity": 2.5, "direction": -1}]
    replace_account_holdings(HoldingsSnapshot("C00", NOON, holdings))
    wanted, held = account_targets(), account_holdings()
    for frame, name in ((wanted, "targets"), (held, "holdings")):
        write_frame(frame, tmp_path / f"{name}{suffix}")
    replace_target_positions(TargetSnapshot("C00-core", NOON, []), overwrite=True)
    replace_account_holdings(HoldingsSnapshot("C00", NOON, []), overwrite=True)
    replace_target_positions(target_snapshots(tmp_path / f"targets{suffix}"), overwrite=True)
    replace_account_holdings(holdings_snapshots(tmp_path / f"holdings{suffix}"), overwrite=True)
    pd.testing.assert_frame_equal(account_targets(), wanted)
    pd.testing.assert_frame_equal(account_holdings(), held)


def test_names_that_look_like_numbers_stay_names(small: Book, tmp_path: Path) -> None:
    file = tmp_path / "holdings.csv"
    file.write_text("account,time_index,asset_identifier,quantity\n007,2024-01-02T12:00:00Z,0600,1\n007,2024-01-02T13:00:00+01:00,NA,-2\n")
    [snapshot] = holdings_snapshots(file)
    assert (snapshot.account, snapshot.time_index) == ("007", datetime(2024, 1, 2, 12, tzinfo=UTC))
    assert isinstance(snapshot.holdings, pd.DataFrame)
    assert snapshot.holdings["asset_identifier"].tolist() == ["0600", "NA"]
    assert snapshot.holdings["direction"].tolist() == [1, -1]


BROKEN = [
    ("account,time_index,asset_identifier\n", "no column quantity"),
    ("account,time_index,asset_identifier,quantity\nC00,2024-01-02,A00,1\n", "row 0: .*lacks an offset"),
    ("account,time_index,asset_identifier,quantity\nC00,noon,A00,1\n", "row 0: .*is no instant"),
    ("account,time_index,asset_identifier,quantity\nC00,,A00,1\n", "row 0: .*is no instant"),
]


@pytest.mark.parametrize(("text", "why"), BROKEN)
def test_a_file_that_cannot_be_read_is_told(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "holdings.csv"
    file.write_text(text)
    with pytest.raises(UnusableFile, match=why):
        holdings_snapshots(file)
    with pytest.raises(UnusableFile):
        holdings_snapshots(tmp_path / "absent.csv")
    with pytest.raises(UnusableFile, match="ends in"):
        holdings_snapshots(tmp_path / "holdings.xlsx")


def test_unknown_targets_are_named(small: Book, tmp_path: Path) -> None:
    file = tmp_path / "targets.csv"
    head = "account_target_allocation,time_index,target_type,target,weight_notional_exposure\n"
    file.write_text(f"{head}C00-core,2024-01-02T12:00:00Z,portfolio,nobody,1\nC00-core,2024-01-02T12:00:00Z,asset,A00,1\n")
    with pytest.raises(RowNotFound, match="nobody"):
        target_snapshots(file)


def test_the_command_loads_all_or_nothing(small: Book, tmp_path: Path, run_cli: Cli) -> None:
    file = tmp_path / "holdings.csv"
    head = "account,time_index,asset_identifier,quantity\n"
    file.write_text(f"{head}C00,2024-01-02T12:00:00Z,A00,1\nC00,2024-01-02T12:00:00Z,A01,much\nC00,2024-01-03T12:00:00Z,A99,0\n")
    code, told = run_cli("load-holdings", str(file))
    assert (code, told["stored"]) == (4, 0)
    assert {(p["snapshot"], p["row"], p["field"]) for p in told["problems"]} >= {(0, 1, "quantity"), (1, 0, "quantity")}
    assert account_holdings().empty
    file.write_text(f"{head}C00,2024-01-02T12:00:00Z,A00,1\nC00,2024-01-03T12:00:00Z,A01,-2\n")
    assert run_cli("load-holdings", str(file)) == (0, {"stored": 2, "problems": []})
    assert account_holdings()["quantity"].tolist() == [-2.0]
    code, told = run_cli("load-holdings", str(file))
    assert code == 1
    assert "overwrite" in told["error"]["message"]
    assert run_cli("load-holdings", str(file), "--overwrite")[0] == 0
