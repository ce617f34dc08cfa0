"""Attaching: in foreign-key order, without creating anything, for one database at a time."""

import importlib.metadata
import subprocess
import sys

import pytest
from sqlalchemy import inspect

import msm_core
from msm_core import start_engine
from msm_core.api import Asset, Calendar, Portfolio, PortfolioGroup
from msm_core.errors import DatabaseUnavailable, EngineNotStarted, NamespaceChanged, StorageNotPrepared, UnknownModel
from msm_core.models import STORAGES, CalendarTable, ExternalPricesStorage, MetaTable


def test_dependencies_come_along_and_first(engine):  # R9, R29
    assert start_engine(["Portfolio"]).names == ("Calendar", "DataNodeUpdate", "Index", "Portfolio")
    extended = start_engine(models=["PortfolioGroupMembership", "ExternalPricesStorage"])
    assert extended.names == (
        "Calendar",
        "DataNodeUpdate",
        "Index",
        "Portfolio",
        "PortfolioGroup",
        "PortfolioGroupMembership",
        "ExternalPrices",
    )
    assert extended.engine is engine


def test_all_static_models_in_an_order_that_foreign_keys_allow(engine):  # R28, R29, R49
    models = start_engine().models
    tables = [model.__table__ for model in models]
    assert {table.name for table in tables} == set(MetaTable.metadata.tables)
    assert set(STORAGES) < set(models)
    for place, table in enumerate(tables):
        assert {key.column.table for key in table.foreign_keys} <= set(tables[:place])


@pytest.mark.parametrize("selector", ["Calendar", "CalendarTable", CalendarTable, Calendar])
def test_selectors_of_one_model(engine, selector):
    assert start_engine([selector]).models == (CalendarTable,)


def test_a_single_name_and_a_storage_by_its_catalogue_name(engine):
    assert start_engine("Calendar").models == (CalendarTable,)
    assert start_engine(["ExternalPricesTS"]).models == (CalendarTable, ExternalPricesStorage)


@pytest.mark.parametrize("selector", ["Calender", "", dict, MetaTable.metadata])
def test_unknown_selector(selector):
    with pytest.raises(UnknownModel, match=r"Known models: Account, .*Asset, AssetType, Calendar"):
        start_engine([selector])


def test_rows_need_their_tables_attached(engine):
    with pytest.raises(EngineNotStarted, match="start_engine"):
        Portfolio.count()
    start_engine(["Calendar", "PortfolioGroup"])
    with pytest.raises(EngineNotStarted) as caught:
        Portfolio.upsert(unique_identifier="P")
    assert caught.value.facts["models"] == "Portfolio"
    with pytest.raises(EngineNotStarted) as caught:  # dates and sessions are written too
        Calendar.create_from_pandas_calendar("24/7", "C", "C", "2024-01-01", "2024-01-01")
    assert caught.value.facts["models"] == "CalendarDate, CalendarSession"
    with pytest.raises(EngineNotStarted):
        PortfolioGroup.upsert(unique_identifier="g").add_portfolios([])


def test_unprepared_database_is_refused_and_left_as_it_is(empty_engine):  # R58
    with pytest.raises(StorageNotPrepared, match=r"missing: msm__asset_type\. Run `msm-ray prepare`"):
        start_engine(["AssetType"])
    assert inspect(empty_engine).get_table_names() == []
    with pytest.raises(EngineNotStarted):
        Asset.count()


def test_a_dropped_table_is_noticed(engine):  # R56: a name in the catalogue is not a table
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE msm__external_prices")
    start_engine(["Portfolio"])
    with pytest.raises(StorageNotPrepared, match=r"missing: msm__external_prices\. Run"):
        start_engine()


def test_attachment_belongs_to_the_database(started, monkeypatch):
    url = started.url.set(drivername="postgresql").render_as_string(hide_password=False)
    Asset.upsert(unique_identifier="A")
    monkeypatch.setenv("MSM_DATABASE_URL", f"{url}_other")
    with pytest.raises(EngineNotStarted):
        Asset.count()
    with pytest.raises(DatabaseUnavailable):
        start_engine()
    monkeypatch.setenv("MSM_DATABASE_URL", url)
    assert Asset.count() == 1


def test_namespace_cannot_change_in_a_living_process(engine, monkeypatch):  # R6
    monkeypatch.setenv("MSM_AUTO_REGISTER_NAMESPACE", "other")
    with pytest.raises(NamespaceChanged, match="loaded for namespace '', but 'other'"):
        start_engine()


def test_import_is_light_and_the_version_is_the_packages():
    code = "import sys, msm_core; print(*(m for m in ('sqlalchemy', 'pandas', 'pandas_market_calendars') if m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
    code = "import sys, msm_core.api; print('pandas_market_calendars' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
    assert msm_core.__version__ == importlib.metadata.version("msm-ray")
