"""What accounts should hold: targets in force, portfolios looked through, one account's trouble its own."""

from datetime import datetime
from typing import Any

import pandas as pd
import pytest
from sqlalchemy import Engine

from msm_core import start_engine
from msm_core.api import AccountTargetAllocation, Asset, Portfolio
from msm_core.database import transaction
from msm_core.errors import RowNotFound
from msm_core.services.account_exposure import AccountExposure, accounts_with_targets, expand_account_targets
from msm_core.services.snapshots import TargetSnapshot, replace_target_positions
from tests import factories
from tests.accounts import book
from tests.factories import closes_of, fixed, instant, open_market, portfolio, run, sql

scheduled = factories.scheduled
CLOSES = closes_of("2024-01-02", 4)
PRICES = pd.DataFrame({"A00": [100.0, 110.0, 120.0, 130.0], "A01": [50.0, 50.0, 45.0, 40.0]}, CLOSES)
EARLY, LATE = instant("2024-01-02 12:00"), instant("2024-01-04 12:00")


@pytest.fixture
def fund(engine: Engine) -> dict[str, Any]:
    """P00 bought half A00 and a quarter A01 on Tuesday; on Thursday they weigh 0.6 / 1.075 and 0.225 / 1.075. P01 never traded."""
    open_market(engine, PRICES)
    start_engine()
    book(assets=3, accounts=3)
    bought = portfolio("P00", fixed(A00=0.5, A01=0.25), on="signal_change", fee=0.0, start_date=CLOSES[0].date())
    run(engine, [bought], "2024-01-06")
    return {row.unique_identifier: row.uid for row in (*Asset.filter(), *Portfolio.filter())}


def want(account: int, time: datetime, *positions: dict[str, Any]) -> None:
    replace_target_positions(TargetSnapshot(f"C{account:02d}-core", time, positions))


def mandate(portfolio: Any, weight: float) -> dict[str, Any]:
    return {"portfolio_uid": portfolio, "weight_notional_exposure": weight}


def expand(engine: Engine, accounts: list[str], as_of: Any, net: bool = False) -> AccountExposure:
    with transaction(engine, read_only=True) as connection:
        return expand_account_targets(connection, accounts, instant(as_of), net)


def test_targets_become_exposure_to_assets_and_tell_where_from(engine: Engine, fund: dict[str, Any]) -> None:
    want(
        0, EARLY, {"asset_uid": fund["A02"], "single_asset_quantity": 7.0}, {"portfolio_uid": fund["P00"], "weight_notional_exposure": 0.5}
    )
    found = expand(engine, ["C00"], CLOSES[2])
    assert not found.failures
    shown = found.exposure[["account", "account_target_allocation", "asset_identifier", "source_target", "portfolio_identifier"]]
    assert [tuple(None if pd.isna(v) else v for v in row) for row in shown.itertuples(index=False)] == [
        ("C00", "C00-core", "A02", "A02", None),
        ("C00", "C00-core", "A00", "P00", "P00"),
        ("C00", "C00-core", "A01", "P00", "P00"),
    ]
    assert found.exposure["weight_notional_exposure"].tolist()[1:] == pytest.approx([0.5 * 0.6 / 1.075, 0.5 * 0.225 / 1.075], abs=1e-15)
    assert found.exposure["single_asset_quantity"].tolist()[0] == 7.0
    assert found.exposure["asset_uid"].tolist() == [fund["A02"], fund["A00"], fund["A01"]]


def test_the_newest_set_of_an_active_allocation_is_in_force(engine: Engine, fund: dict[str, Any]) -> None:
    want(0, EARLY, {"asset_uid": fund["A00"], "weight_notional_exposure": 0.1})
    want(0, LATE, {"asset_uid": fund["A01"], "weight_notional_exposure": 0.2})
    assert expand(engine, ["C00"], "2024-01-04 11:59").exposure["asset_identifier"].tolist() == ["A00"]
    assert expand(engine, ["C00"], LATE).exposure["asset_identifier"].tolist() == ["A01"]
    AccountTargetAllocation.update(AccountTargetAllocation.get(unique_identifier="C00-core"), is_active=False)
    assert len(expand(engine, ["C00"], LATE).exposure) == 0


def test_an_account_that_cannot_be_expanded_does_not_keep_the_others(engine: Engine, fund: dict[str, Any]) -> None:
    want(0, EARLY, {"portfolio_uid": fund["P01"], "weight_notional_exposure": 0.5})
    want(1, EARLY, {"portfolio_uid": fund["P00"], "weight_notional_exposure": 0.5})
    want(
        2,
        EARLY,
        {"portfolio_uid": fund["P00"], "weight_notional_exposure": 0.5},
        {"portfolio_uid": fund["P01"], "weight_notional_exposure": 1.0},
    )
    found = expand(engine, ["C00", "C01", "C02"], CLOSES[2])
    assert found.exposure["account"].unique().tolist() == ["C01"]
    assert found.failures.keys() == {"C00", "C02"}
    assert all("P01" in facts["message"] and facts["reason"] == "unresolved_portfolios" for facts in found.failures.values())


def test_netted_there_is_one_row_per_asset(engine: Engine, fund: dict[str, Any]) -> None:
    want(
        0,
        EARLY,
        {"asset_uid": fund["A00"], "weight_notional_exposure": -0.25},
        {"portfolio_uid": fund["P00"], "weight_notional_exposure": 1.0},
    )
    found = expand(engine, ["C00"], CLOSES[0], net=True).exposure
    assert dict(zip(found["asset_identifier"], found["weight_notional_exposure"], strict=True)) == {"A00": 0.25, "A01": 0.25}
    assert "source_target" not in found.columns


def test_statements_do_not_depend_on_accounts_targets_or_portfolios(engine: Engine, fund: dict[str, Any]) -> None:
    run(engine, [portfolio(f"Q{i}", fixed(A00=0.1 * i, A01=0.5), start_date=CLOSES[0].date()) for i in range(9)], "2024-01-06")
    portfolios = [p.uid for p in Portfolio.filter() if p.unique_identifier != "P01"]
    want(0, EARLY, mandate(portfolios[0], 1.0))
    for account in (1, 2):
        want(account, EARLY, *(mandate(uid, 1.0) for uid in portfolios))
    counts = []
    for accounts in (["C00"], ["C00", "C01", "C02"]):
        with factories.statements() as sent:
            assert not expand(engine, accounts, CLOSES[2]).failures
        counts.append(len(sent))
    assert counts[0] == counts[1] <= 18


def test_accounts_are_those_with_a_target_in_force(engine: Engine, fund: dict[str, Any]) -> None:
    want(1, LATE, {"asset_uid": fund["A00"], "weight_notional_exposure": 0.1})
    want(0, EARLY)  # it wants nothing, and says so
    with transaction(engine, read_only=True) as connection:
        assert accounts_with_targets(connection, None, LATE) == ["C00", "C01"]
        assert accounts_with_targets(connection, None, EARLY) == ["C00"]
        assert accounts_with_targets(connection, ["C01", "C02"], LATE) == ["C01"]
        with pytest.raises(RowNotFound, match="nobody"):
            accounts_with_targets(connection, ["C01", "nobody"], LATE)


def test_expansion_writes_nothing(engine: Engine, fund: dict[str, Any]) -> None:
    want(0, EARLY, mandate(fund["P00"], 0.5))
    tables = [name for (name,) in sql(engine, "SELECT relname FROM pg_class WHERE relkind = 'r' AND relname LIKE 'msm%'")]
    before = factories.versions(engine, tables)
    expand(engine, ["C00"], CLOSES[2])
    assert factories.versions(engine, tables) == before
