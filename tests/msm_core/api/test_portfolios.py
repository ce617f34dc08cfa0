"""Portfolios are identities; text about them and groups of them stand apart."""

import uuid

import pytest
from sqlalchemy import Engine, func, select

from msm_core.api import Calendar, Index, Portfolio, PortfolioGroup, PortfolioMetadata
from msm_core.errors import RowNotFound
from msm_core.models import MetaTable


def _counts(engine: Engine) -> dict[str, int]:
    with engine.connect() as connection:
        return {name: connection.scalar(select(func.count()).select_from(table)) or 0 for name, table in MetaTable.metadata.tables.items()}


def test_documented_snippet(engine):  # R9, R10, R11, R12
    snippet = """
import msm_core

from msm_core.api.calendars import Calendar
from msm_core.api.portfolios import Portfolio

msm_core.start_engine(models=["Calendar", "CalendarDate", "CalendarSession", "Portfolio"])

calendar = Calendar.create_from_pandas_calendar(
    source_identifier="24/7",
    unique_identifier="CRYPTO_24_7",
    display_name="Crypto 24/7",
    valid_from="2026-05-25",
    valid_to="2026-05-25",
    timezone="UTC",
)

portfolio = Portfolio.upsert(
    unique_identifier="btc-eth-target",
    calendar_uid=calendar.uid,
    calendar_name=calendar.unique_identifier,
)
"""
    first: dict[str, object] = {}
    exec(snippet, first)
    counts = _counts(engine)
    again: dict[str, object] = {}
    exec(snippet, again)
    assert (again["calendar"], again["portfolio"]) == (first["calendar"], first["portfolio"])
    assert _counts(engine) == counts
    portfolio = first["portfolio"]
    assert isinstance(portfolio, Portfolio)
    assert (portfolio.unique_identifier, portfolio.calendar_name) == ("btc-eth-target", "CRYPTO_24_7")


def test_upsert_writes_only_the_identity_row(started):  # R13, R21, R22
    before = _counts(started)
    Portfolio.upsert(unique_identifier="P")
    after = _counts(started)
    assert {name for name in after if after[name] != before[name]} == {"msm__portfolio"}
    assert after["msm__portfolio"] == 1


def test_pointers_and_the_rest_leave_each_other_alone(started):  # R18, R19, R20, R86
    calendar = Calendar.upsert(
        unique_identifier="C", display_name="C", calendar_type="CUSTOM", valid_from="2024-01-01", valid_to="2024-01-31"
    )
    index = Index.upsert(unique_identifier="I", index_type="portfolio", display_name="I")
    producer = uuid.uuid4()
    with started.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO msm__data_node_update (uid, kind, storage, scope) VALUES (%s, 'portfolios', 's', 'P')", (producer,)
        )
    Portfolio.upsert(
        unique_identifier="P", calendar_uid=calendar.uid, portfolio_index_uid=index.uid, backtest_table_price_column_name="vwap"
    )
    Portfolio.upsert_many([{"unique_identifier": "P", "portfolio_data_node_uid": producer}, {"unique_identifier": "Q"}])
    portfolio = Portfolio.upsert(unique_identifier="P", calendar_name="C")
    assert portfolio.calendar_uid == calendar.uid
    assert portfolio.portfolio_index_uid == index.uid
    assert portfolio.portfolio_data_node_uid == producer
    assert portfolio.backtest_table_price_column_name == "vwap"
    assert Portfolio.get(unique_identifier="Q").backtest_table_price_column_name == "close"


def test_metadata_is_edited_without_touching_the_identity(started, versions):  # R23
    PortfolioMetadata.upsert(unique_identifier="P", description="before there is a portfolio")
    portfolio = Portfolio.upsert(unique_identifier="P")
    before = versions()
    PortfolioMetadata.upsert(unique_identifier="P", description="edited")
    after = versions()
    assert [name for name in after if after[name] != before[name]] == ["msm__portfolio_metadata"]
    Portfolio.delete(portfolio)
    assert PortfolioMetadata.get(unique_identifier="P").description == "edited"


def test_groups(started, statements, versions):
    names = [f"p{n:04}" for n in range(1000)]
    Portfolio.upsert_many({"unique_identifier": name} for name in names)
    group = PortfolioGroup.upsert(unique_identifier="core", display_name="Core")
    counts = []
    for size in (10, 1000):
        with statements() as sent:
            group.add_portfolios(names[:size])
        counts.append(len(sent))
    assert counts[0] == counts[1]
    assert [portfolio.unique_identifier for portfolio in group.portfolios()] == names
    before = versions()
    assert group.add_portfolios([names[3], names[3]]) == group
    with pytest.raises(RowNotFound, match="no Portfolio row has unique_identifier 'ghost'"):
        group.add_portfolios(["p0001", "ghost"])
    assert versions() == before
    assert group.remove_portfolios([*names[10:], "ghost"]) == 990
    assert [portfolio.unique_identifier for portfolio in group.portfolios()] == names[:10]
    Portfolio.delete_many(group.portfolios())  # membership goes with the portfolio
    assert group.portfolios() == []
    assert Portfolio.count() == 990
