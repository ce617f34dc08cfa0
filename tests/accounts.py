"""A small registry of accounts: assets, portfolios, and accounts with one allocation each."""

from dataclasses import dataclass
from datetime import UTC, datetime

import pytest

from msm_core import start_engine
from msm_core.api import Account, AccountAllocationModel, AccountTargetAllocation, Asset, Portfolio

NOON = datetime(2024, 1, 2, 12, tzinfo=UTC)


@dataclass(frozen=True)
class Book:
    """assets A00, A01, ...; portfolios P00, ...; accounts C00, ...; allocations of the accounts, C00-core, ..."""

    assets: list[Asset]
    portfolios: list[Portfolio]
    accounts: list[Account]
    allocations: list[AccountTargetAllocation]


def book(assets: int = 9, portfolios: int = 2, accounts: int = 1) -> Book:
    model = AccountAllocationModel.upsert(allocation_model_name="core")
    made = Account.upsert_many([{"unique_identifier": f"C{i:02d}", "account_name": f"account {i}"} for i in range(accounts)])
    return Book(
        Asset.upsert_many([{"unique_identifier": f"A{i:02d}"} for i in range(assets)]),
        Portfolio.upsert_many([{"unique_identifier": f"P{i:02d}"} for i in range(portfolios)]),
        made,
        AccountTargetAllocation.upsert_many(
            [
                {"unique_identifier": f"{a.unique_identifier}-core", "account_uid": a.uid, "account_allocation_model_uid": model.uid}
                for a in made
            ]
        ),
    )


@pytest.fixture
def small(engine: object) -> Book:
    """Nine assets, two portfolios, one account, on an attached engine."""
    start_engine()
    return book()
