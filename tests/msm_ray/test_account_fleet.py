"""All accounts at once, and the boundary: no fleet changes a row of any account table."""

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from sqlalchemy import Engine

from msm_core import start_engine
from msm_core.api import AccountGroup, Portfolio, VirtualFund
from msm_core.errors import RowNotFound, WorkerLost
from msm_core.models import SNAPSHOTS, MetaTable
from msm_core.services.snapshots import HoldingsSnapshot, TargetSnapshot, replace_account_holdings, replace_target_positions
from msm_core.services.virtual_funds import allocate_from_account_holdings_set
from msm_ray.account_fleet import expand_fleet
from msm_ray.executors import LocalExecutor
from tests import factories
from tests.accounts import book
from tests.factories import fixed, instant, open_market, portfolio, run, walks

scheduled = factories.scheduled
ASSETS = tuple(f"A{i:02d}" for i in range(9))
EARLY = datetime(2024, 1, 2, 12, tzinfo=UTC)
REGISTRY = ("Account", "AccountGroup", "AccountAllocationModel", "AccountTargetAllocation", "PositionSet", "AccountHoldingsSet")
FUNDS = ("VirtualFund", "VirtualFundHoldingsSet")


def account_tables() -> list[str]:
    models = {mapper.class_.__concept__: mapper.class_ for mapper in MetaTable.registry.mappers}
    return [models[concept].__tablename__ for concept in (*REGISTRY, *FUNDS)] + [storage.__tablename__ for storage in SNAPSHOTS]


@pytest.fixture
def filled(engine: Engine) -> pd.DatetimeIndex:
    """Three accounts that want two portfolios and an asset each, and hold assets, half of which are attributed to a fund."""
    closes = open_market(engine, walks("2024-01-02", 40, ASSETS))
    start_engine()
    made = book(assets=9, portfolios=2, accounts=3)
    AccountGroup.upsert(group_name="family")
    fleet = [portfolio(p.unique_identifier, fixed(**dict.fromkeys(ASSETS[i:], 0.1)), on="week_end") for i, p in enumerate(made.portfolios)]
    run(engine, fleet, closes.index[9])
    for i, (account, allocation) in enumerate(zip(made.accounts, made.allocations, strict=True)):
        weight = 0.25 * (i + 1)
        positions: list[dict[str, Any]] = [{"portfolio_uid": p.uid, "weight_notional_exposure": weight} for p in made.portfolios]
        positions.append({"asset_uid": made.assets[0].uid, "single_asset_quantity": 1.0})
        replace_target_positions(TargetSnapshot(allocation, EARLY, positions))
        [held] = replace_account_holdings(HoldingsSnapshot(account, EARLY, [{"asset_identifier": a, "quantity": 10.0} for a in ASSETS]))
        name = f"fund-{account.unique_identifier}"
        VirtualFund.upsert(unique_identifier=name, account_uid=account.uid, target_portfolio_uid=made.portfolios[0].uid)
        demands = [{"virtual_fund": name, "asset_identifier": a, "quantity": 5.0} for a in ASSETS]
        allocate_from_account_holdings_set(held, demands)
    return pd.DatetimeIndex(closes.index)


def test_no_fleet_changes_a_row_of_any_account_table(engine: Engine, filled: pd.DatetimeIndex) -> None:  # R85
    tables = account_tables()
    before = factories.versions(engine, tables)
    assert len(tables) == 11
    assert all(rows > 0 for rows, _ in before.values()), before
    fleet = factories.fleet(ASSETS, 12)
    landed = run(engine, fleet, filled[20])
    run(engine, fleet, filled[30])
    run(engine, fleet, filled[30], full_refresh=True)
    assert landed.rows_written > 0
    assert factories.versions(engine, tables) == before


def test_a_batch_per_worker_or_one_for_all_gives_the_same_rows(engine: Engine, filled: pd.DatetimeIndex) -> None:
    class Three(LocalExecutor):
        slots = 3

    one, three = (expand_fleet(engine, executor, filled[9]) for executor in (LocalExecutor(), Three()))
    pd.testing.assert_frame_equal(one.exposure, three.exposure)
    assert (one.accounts, one.failures, one.exit_code) == (("C00", "C01", "C02"), {}, 0)
    # each account: 9 assets of P00, 8 of P01, and one of its own
    assert one.exposure.groupby("account").size().to_dict() == dict.fromkeys(one.accounts, 18)


def test_progress_counts_accounts_and_chosen_ones_are_alone(engine: Engine, filled: pd.DatetimeIndex) -> None:
    told: list[tuple[int, int]] = []
    found = expand_fleet(engine, LocalExecutor(), filled[9], ["C02", "C00"], on_batch=lambda done, all_: told.append((done, all_)))
    assert found.accounts == ("C00", "C02")
    assert told == [(2, 2)]
    with pytest.raises(RowNotFound, match="nobody"):
        expand_fleet(engine, LocalExecutor(), filled[9], ["nobody"])


def test_a_lost_batch_is_a_failure_of_its_accounts(engine: Engine, filled: pd.DatetimeIndex) -> None:
    class Losing(LocalExecutor):
        slots = 3

        def wait(self) -> tuple[int, Any]:
            ticket, outcome = super().wait()
            return ticket, WorkerLost(why="out of memory") if ticket == 1 else outcome

    found = expand_fleet(engine, Losing(), filled[9])
    assert found.failures.keys() == {"C01"}
    assert found.exposure["account"].unique().tolist() == ["C00", "C02"]
    assert (found.exit_code, found.summary()["expanded"]) == (3, 2)


def test_nobody_wants_anything(engine: Engine) -> None:
    found = expand_fleet(engine, LocalExecutor(), instant("2024-01-03"))
    assert (found.accounts, len(found.exposure), found.exit_code) == ((), 0, 0)


def cli(*arguments: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run([sys.executable, "-m", "msm_ray.cli", *arguments], capture_output=True, text=True, timeout=120)
    return done.returncode, json.loads(done.stdout)


def test_the_command_writes_a_file_and_tells_what_failed(engine: Engine, filled: pd.DatetimeIndex, tmp_path: Path) -> None:
    lost = Portfolio.upsert(unique_identifier="never")
    replace_target_positions(
        TargetSnapshot("C01-core", EARLY, [{"portfolio_uid": lost.uid, "weight_notional_exposure": 1.0}]), overwrite=True
    )
    file, as_of = tmp_path / "exposure.parquet", filled[9].isoformat()
    code, told = cli("accounts", "expand", "--as-of", as_of, "--to", str(file), "--output", "json")
    assert code == 3
    assert (told["accounts"], told["expanded"], told["rows"], told["file"]) == (3, 2, 36, str(file))
    assert [(f["account"], f["reason"]) for f in told["failures"]] == [("C01", "unresolved_portfolios")]
    stored = pd.read_parquet(file)
    found = expand_fleet(engine, LocalExecutor(), filled[9].to_pydatetime()).exposure
    assert stored["weight_notional_exposure"].equals(found["weight_notional_exposure"])
    assert stored["asset_identifier"].tolist() == found["asset_identifier"].tolist()
    netted = cli("accounts", "expand", "--as-of", as_of, "--account", "C00", "--net", "--output", "json")
    assert netted[0] == 0
    rows = netted[1]["exposure"]
    assert len(rows) == 10  # nine assets by weight, one by quantity
    assert {row["asset_identifier"] for row in rows} == set(ASSETS)
