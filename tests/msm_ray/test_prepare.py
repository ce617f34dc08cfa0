"""The static chain and the tables of price policies: made by many at once, after any death, and never over somebody's data."""

import multiprocessing
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pandas as pd
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from psycopg import Connection
from psycopg.errors import UniqueViolation
from sqlalchemy import Engine, create_engine, inspect, text
from sqlalchemy.exc import DBAPIError

import msm_core
from msm_core.configuration import PortfolioConfiguration
from msm_core.data_nodes.interpolated_prices import InterpolatedPrices, resolve_sources
from msm_core.data_nodes.prices import APIDataNode
from msm_core.errors import PrepareBusy, StorageCollision, StorageMismatch, StorageNotPrepared
from msm_core.identity import storage_uid
from msm_core.models import SNAPSHOTS, STORAGES, InterpolatedPricesStorage, MetaTable
from msm_core.sources import Source
from msm_ray import prepare
from tests.factories import equal, frame, open_market, portfolio, progress, relations, rival, run, sql, statuses, versions, walks

CATALOGUE = "msm__time_index_meta_table"
EXTERNAL = "ExternalPricesTS"
ACCOUNTS = {"AccountHoldingsTS", "TargetPositionsTS", "VirtualFundHoldingsTS"}  # what revision 0004 adds to the catalogue
ACCOUNT_TABLES = {
    *("msm__account", "msm__account_group", "msm__account_allocation_model", "msm__account_target_allocation", "msm__position_set"),
    *("msm__target_positions", "msm__account_holdings_set", "msm__account_holdings", "msm__virtual_fund"),
    *("msm__virtual_fund_holdings_set", "msm__virtual_fund_holdings"),
}
MINUTES = "vendor-minutes"
CLEAN = prepare.Preparation(())

PROCESSES = multiprocessing.get_context("forkserver")  # other processes in milliseconds, without any thread of pytest's or Ray's
PROCESSES.set_forkserver_preload([__name__])

# in another process, because a namespace is fixed when the models are first imported
PREPARE_IN_NAMESPACE = """
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import event, inspect
from msm_core.data_nodes.interpolated_prices import InterpolatedPrices, resolve_sources
from msm_core.database import get_engine
from msm_core.models import MetaTable, ExternalPricesStorage, AssetTable
from msm_ray.prepare import prepare, check
engine, notices = get_engine(), []
event.listen(engine, "connect", lambda driver, _: driver.add_notice_handler(lambda told: notices.append(told.message_primary)))
config = {"source_time_index_meta_table_uid": ExternalPricesStorage.storage_uid(), "upsample_frequency_id": "1d"}
rules = [{"intraday_bar_interpolation_rule": rule} for rule in ("ffill", "none")]
policies = [InterpolatedPrices.model_validate({"interpolation_config": config | rule}) for rule in rules]
prepare(engine, policies)
assert check(engine, policies).is_clean
with engine.connect() as connection:
    ours = lambda object, name, type_, reflected, compare_to: type_ != "table" or name in MetaTable.metadata.tables
    context = MigrationContext.configure(connection, opts={"include_object": ours, "compare_type": True})
    assert compare_metadata(context, MetaTable.metadata) == []
    resolved = resolve_sources(connection, policies)
tables = sorted(source.table for source in resolved.sources.values())  # an error has no table
assert len(set(tables)) == 2 and all(inspect(engine).has_table(table) for table in tables)
assert [n for n in notices if "truncated" in n] == []  # Postgres cuts names at 63 bytes and says so in a notice only
identifiers = sorted(storage.logical_name() for storage in resolved.storages.values())
print(ExternalPricesStorage.logical_name(), ExternalPricesStorage.__tablename__, AssetTable.__tablename__, *identifiers)
"""


def tables(engine: Engine) -> set[str]:
    return set(inspect(engine).get_table_names())


# -- policies -----------------------------------------------------------------------------------------------------------------


def policy(frequency: str = "1d", rule: str = "ffill", source: str = EXTERNAL, assets: Sequence[str] | None = None) -> InterpolatedPrices:
    config: dict[str, Any] = {"source_price_instance": APIDataNode.build_from_identifier(source), "asset_list": assets}
    config |= {"upsample_frequency_id": frequency, "intraday_bar_interpolation_rule": rule}
    return InterpolatedPrices.model_validate({"interpolation_config": config})


def minutes(count: int, source: str = MINUTES) -> list[InterpolatedPrices]:
    """Policies 1m, 2m, ... over a source of minutes."""
    return [policy(f"{i + 1}m", source=source) for i in range(count)]


def table_of(price_source: InterpolatedPrices, cadence: str = "1m") -> str:
    return InterpolatedPricesStorage.configured(price_source.source_uid, cadence, *price_source.policy).__tablename__


def register_source(engine: Engine, identifier: str = MINUTES, cadence: str | None = "1m") -> None:
    """Somebody's own table in the catalogue."""
    with rival(engine) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS vendor_bars (asset_identifier text, time_index timestamptz, close float8)")
        connection.execute(
            f"INSERT INTO {CATALOGUE} (uid, identifier, physical_table_name, kind, cadence, schema_fingerprint) "
            "VALUES (%s, %s, 'vendor_bars', 'prices', %s, '')",
            (storage_uid(identifier), identifier, cadence),
        )


def made(engine: Engine) -> set[str]:
    """Tables of policies."""
    return {name for name in tables(engine) if name.startswith("msm__interpolated_prices_")}


def rows(engine: Engine) -> dict[str, dict[str, Any]]:
    """Catalogue rows of policies, by table."""
    found = frame(engine, f"SELECT * FROM {CATALOGUE} WHERE kind = 'interpolated_prices'").to_dict("records")
    return {row["physical_table_name"]: row for row in found}


def state(engine: Engine) -> tuple[Any, Any]:
    """Every relation and, with the transaction that wrote it, every row."""
    return relations(engine), versions(engine)


# -- static chain -------------------------------------------------------------------------------------------------------------


def test_an_empty_database_is_prepared_and_nothing_is_left_to_generate(empty_engine: Engine) -> None:  # R14, R29
    before = prepare.check(empty_engine)
    assert before.pending == ("0001", "0002", "0003", "0004")
    assert set(before.missing) == set(MetaTable.metadata.tables)
    assert "CREATE TABLE msm__portfolios" in prepare.ddl(empty_engine)
    assert tables(empty_engine) == set()  # checking and printing changed nothing

    assert prepare.prepare(empty_engine).pending == ("0001", "0002", "0003", "0004")
    assert prepare.prepare(empty_engine).pending == ()  # R59
    assert prepare.check(empty_engine) == CLEAN
    with empty_engine.connect() as connection:  # `alembic check`
        context = MigrationContext.configure(connection, opts={"version_table": "msm__alembic_version", "compare_type": True})
        assert compare_metadata(context, MetaTable.metadata) == []
        undescribed = connection.execute(
            text("""
                SELECT count(*) FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
                WHERE c.relname = ANY(:tables) AND a.attnum > 0 AND col_description(c.oid, a.attnum) IS NULL
            """),
            {"tables": list(MetaTable.metadata.tables)},
        ).scalar()
        catalogue = connection.execute(text("SELECT identifier, physical_table_name, cadence FROM msm__time_index_meta_table")).all()
    assert undescribed == 0  # every column carries its description in the database
    assert {(i, t) for i, t, _ in catalogue} == {(s.logical_name(), s.__tablename__) for s in (*STORAGES, *SNAPSHOTS)}
    assert ("ExternalPricesTS", "msm__external_prices", "1d") in {tuple(row) for row in catalogue}


def test_downgrade_leaves_nothing(empty_engine: Engine) -> None:
    prepare.prepare(empty_engine)
    with empty_engine.begin() as connection:
        command.downgrade(prepare.alembic_config(connection), "base")
    assert tables(empty_engine) == {"msm__alembic_version"}


def test_the_newest_revision_can_be_taken_back_and_put_on_again_over_data(engine: Engine) -> None:
    (daily,) = made_for(engine, policy())
    with rival(engine) as connection:
        connection.execute("INSERT INTO msm__asset (uid, unique_identifier) VALUES (gen_random_uuid(), 'a')")
        for table in (daily, "msm__external_prices"):
            connection.execute(f"INSERT INTO {table} (asset_identifier, time_index, close) VALUES ('a', '2024-01-02', 0.1)")
        connection.execute("INSERT INTO msm__run (uid, as_of, status, code_version) VALUES (gen_random_uuid(), now(), 'landed', '1')")
        for kind, identifier in (("portfolio", "p"), ("prices", "s/" + "a" * 300)):  # longer than 0001 has room for
            connection.execute(
                "INSERT INTO msm__run_node (run_uid, node_uid, kind, identifier, status, reason) "
                "SELECT uid, gen_random_uuid(), %s, %s, 'landed', 'new' FROM msm__run",
                (kind, identifier),
            )

    def data() -> list[Any]:
        queries = [f"SELECT * FROM {daily}", "SELECT * FROM msm__external_prices", "SELECT uid, unique_identifier FROM msm__asset"]
        queries += [
            "SELECT * FROM msm__run_node WHERE kind = 'portfolio'",
            f"SELECT uid, identifier, cadence FROM {CATALOGUE} WHERE kind NOT IN {later} ORDER BY 2",
        ]
        return [sql(engine, query) for query in queries]

    later = "('rebalance_state', 'target_positions', 'account_holdings', 'virtual_fund_holdings')"  # kinds that 0003 and 0004 bring
    before = data()
    with engine.begin() as connection:
        command.downgrade(prepare.alembic_config(connection), "0001")
    assert sql(engine, f"SELECT identifier FROM {CATALOGUE} WHERE kind IN {later}") == []
    assert data() == before
    assert prepare.check(engine, [policy()]).pending == ("0002", "0003", "0004")
    printed = prepare.ddl(engine, [policy()])
    assert "ADD COLUMN revision" in printed
    assert sorted(re.findall(r"CREATE TABLE (\w+)", printed)) == sorted({"msm__portfolio_rebalance_state", *ACCOUNT_TABLES})
    assert prepare.prepare(engine, [policy()]).pending == ("0002", "0003", "0004")
    assert data() == before
    assert prepare.check(engine, [policy()]) == CLEAN


def test_delisting_and_orders_can_be_taken_back_and_put_on_again(engine: Engine) -> None:
    """Without 0003 nothing is left of either, and every other row is as it was; with it again the schema is what is declared."""
    state, storages = "msm__portfolio_rebalance_state", f"SELECT identifier FROM {CATALOGUE} ORDER BY 1"
    order = "('p', '2024-01-02', 'a', 0.1, '2024-01-02', 0)"
    with rival(engine) as connection:
        connection.execute("INSERT INTO msm__asset (uid, unique_identifier, delisted_on) VALUES (gen_random_uuid(), 'a', '2024-01-02')")
        connection.execute("INSERT INTO msm__asset (uid, unique_identifier) VALUES (gen_random_uuid(), 'b')")
        connection.execute(f"INSERT INTO {state} VALUES {order}")
        for kind, storage in (("rebalance_state", "PortfolioRebalanceStateTS"), ("portfolios", "PortfoliosTS")):
            connection.execute(
                "INSERT INTO msm__data_node_update (uid, kind, storage, scope, epoch, row_count) "
                "VALUES (gen_random_uuid(), %s, %s, 'p', 1, 1)",
                (kind, storage),
            )
    before = [name for (name,) in sql(engine, storages)]
    with engine.begin() as connection:
        command.downgrade(prepare.alembic_config(connection), "0002")
    assert state not in tables(engine)
    assert sql(engine, "SELECT * FROM information_schema.columns WHERE column_name = 'delisted_on'") == []
    assert [name for (name,) in sql(engine, storages)] == [name for name in before if name not in {"PortfolioRebalanceStateTS", *ACCOUNTS}]
    assert sql(engine, "SELECT kind, scope FROM msm__data_node_update") == [("portfolios", "p")]
    assert prepare.check(engine).pending == ("0003", "0004")
    assert prepare.prepare(engine).pending == ("0003", "0004")
    assert prepare.check(engine) == CLEAN
    assert sql(engine, "SELECT unique_identifier, delisted_on FROM msm__asset ORDER BY 1") == [("a", None), ("b", None)]
    assert [name for (name,) in sql(engine, storages)] == before
    assert sql(engine, f"SELECT * FROM {state}") == []
    sql(engine, f"INSERT INTO {state} VALUES {order}")
    with pytest.raises(UniqueViolation):  # one order of an asset at a time
        sql(engine, f"INSERT INTO {state} VALUES {order}")


def test_accounts_can_be_taken_back_and_put_on_again_over_data(engine: Engine) -> None:
    """Without 0004 nothing is left of accounts, and no row of the portfolio side is written; with it again they are there, empty."""
    account, model, allocation, head, asset, held, p, fund, view = (UUID(int=i) for i in range(1, 10))
    owner, at = {"account_uid": account}, {"time_index": datetime(2024, 1, 2, tzinfo=UTC)}
    target = {"target_type": "portfolio", "target_uid": p, "portfolio_uid": p, "weight_notional_exposure": 1.0}
    drawn = {"source_account_holdings_set_uid": held, "virtual_fund_uid": fund, **at}
    rows: list[tuple[str, dict[str, Any]]] = [
        ("asset", {"uid": asset, "unique_identifier": "a"}),
        ("portfolio", {"uid": p, "unique_identifier": "p"}),
        ("external_prices", {"asset_identifier": "a", "close": 0.1, **at}),
        ("data_node_update", {"uid": UUID(int=10), "kind": "portfolios", "storage": "PortfoliosTS", "scope": "p"}),
        ("account", {"uid": account, "unique_identifier": "c", "account_name": "C"}),
        ("account_allocation_model", {"uid": model, "allocation_model_name": "m"}),
        ("account_target_allocation", {"uid": allocation, "unique_identifier": "c-m", "account_allocation_model_uid": model, **owner}),
        ("position_set", {"uid": head, "account_target_allocation_uid": allocation, "position_set_time": at["time_index"]}),
        ("target_positions", {"position_set_uid": head, **target, **at}),
        ("account_holdings_set", {"uid": held, **owner, **at}),
        ("account_holdings", {"holdings_set_uid": held, "asset_identifier": "a", "quantity": 3.0, **owner, **at}),
        ("virtual_fund", {"uid": fund, "unique_identifier": "v", "target_portfolio_uid": p, **owner}),
        ("virtual_fund_holdings_set", {"uid": view, **drawn, **owner}),
        ("virtual_fund_holdings", {"virtual_fund_holdings_set_uid": view, "asset_identifier": "a", "allocated_quantity": 2.0, **drawn}),
    ]
    with engine.begin() as connection:
        for table, cells in rows:
            marks = ", ".join(["%s"] * len(cells))
            connection.exec_driver_sql(f"INSERT INTO msm__{table} ({', '.join(cells)}) VALUES ({marks})", tuple(cells.values()))

    def others() -> dict[str, Any]:
        """Every row, with the transaction that wrote it, of the tables that 0004 has nothing to do with."""
        names = sorted(set(MetaTable.metadata.tables) - ACCOUNT_TABLES - {CATALOGUE})
        return {name: sql(engine, f"SELECT xmin::text, t::text FROM {name} t ORDER BY 2") for name in names}

    catalogue = f"SELECT identifier FROM {CATALOGUE} ORDER BY 1"
    before, storages = others(), [name for (name,) in sql(engine, catalogue)]
    assert set(storages) >= ACCOUNTS
    with engine.begin() as connection:
        command.downgrade(prepare.alembic_config(connection), "0003")
    assert tables(engine) & ACCOUNT_TABLES == set()
    assert [name for (name,) in sql(engine, catalogue)] == [name for name in storages if name not in ACCOUNTS]
    assert others() == before
    assert prepare.check(engine).pending == ("0004",)
    assert prepare.prepare(engine).pending == ("0004",)
    assert prepare.check(engine) == CLEAN
    assert others() == before
    assert [name for (name,) in sql(engine, catalogue)] == storages
    assert [name for name in ACCOUNT_TABLES if sql(engine, f"SELECT * FROM {name}")] == []


def test_a_dropped_table_is_seen_although_the_version_row_says_head(engine: Engine) -> None:  # R56
    sql(engine, "DROP TABLE msm__portfolios")
    assert prepare.check(engine).missing == ("msm__portfolios",)
    assert prepare.prepare(engine).pending == ("msm__portfolios",)  # made again, and told
    assert prepare.check(engine) == CLEAN


def test_a_static_table_that_is_not_what_is_declared_is_told_and_left_alone(engine: Engine) -> None:
    with rival(engine) as connection:
        connection.execute("ALTER TABLE msm__portfolios DROP COLUMN calculated_close")
        connection.execute("ALTER TABLE msm__asset ADD COLUMN colour text")
        connection.execute("ALTER TABLE msm__portfolio_weights ALTER COLUMN weight TYPE numeric")
        connection.execute("ALTER TABLE msm__calendar_session DROP CONSTRAINT fk_msm__calendar_session_calendar_uid")
    found = prepare.check(engine)
    named = {sentence.partition(":")[0]: sentence for sentence in found.drifted}
    assert len(named) == len(found.drifted) == 4
    assert "lacks column calculated_close" in named["msm__portfolios"]
    assert "column colour" in named["msm__asset"]
    assert "column weight is NUMERIC" in named["msm__portfolio_weights"]
    assert "lacks the constraint fk_msm__calendar_session_calendar_uid" in named["msm__calendar_session"]
    assert (found.pending, found.missing, found.is_clean) == ((), (), False)
    before = state(engine)
    assert prepare.prepare(engine).pending == ()
    assert state(engine) == before


@pytest.mark.parametrize("namespace", ["ns", "a_rather_long_namespace_name_30"])
def test_a_namespace_has_tables_and_identifiers_of_its_own(engine: Engine, namespace: str) -> None:  # R6
    environment = {**os.environ, "MSM_AUTO_REGISTER_NAMESPACE": namespace}
    command_line = [sys.executable, "-c", PREPARE_IN_NAMESPACE]
    done = subprocess.run(command_line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *printed, daily, other = done.stdout.split()
    assert printed == [f"{namespace}.ExternalPricesTS", f"msm__external_prices__{namespace}", f"msm__asset__{namespace}"]
    assert all(re.fullmatch(rf"{namespace}\.InterpolatedPricesTS\.[0-9a-f]{{16}}", name) for name in (daily, other))
    assert {f"msm__asset__{namespace}", "msm__asset"} <= tables(engine)
    assert len(made(engine)) == 2
    assert all(len(name) <= 63 for name in tables(engine))


# -- tables of policies -------------------------------------------------------------------------------------------------------


def made_for(engine: Engine, *price_sources: InterpolatedPrices) -> set[str]:
    """Tables that this prepare has made or adopted."""
    return set(prepare.prepare(engine, price_sources).pending)


def test_a_policy_names_its_table_and_nothing_else_does(engine: Engine) -> None:  # R46, R47, R48, R52, R53
    register_source(engine, "vendor-daily", "1d")
    register_source(engine)
    (daily,) = made_for(engine, policy())
    assert daily == "msm__interpolated_prices_2cb23d4b980f15ff"  # for ever: it is in every database
    assert made_for(engine, policy(assets=["a"]), policy("24h")) == set()  # neither the assets nor the spelling
    others = [made_for(engine, other) for other in (policy(rule="none"), policy(source="vendor-daily"), policy("5m", source=MINUTES))]
    others.append(made_for(engine, policy("15m", source=MINUTES)))  # only the frequency differs from the one before
    sql(engine, f"UPDATE {CATALOGUE} SET cadence = '5m' WHERE identifier = '{MINUTES}'")
    others.append(made_for(engine, policy("15m", source=MINUTES)))  # and here only the cadence of the source
    assert made(engine) == {daily}.union(*others)
    assert len(made(engine)) == 6

    bars = {column["name"]: column for column in inspect(engine).get_columns("msm__external_prices")}
    assert all({c["name"]: c for c in inspect(engine).get_columns(name)}.keys() == bars.keys() for name in made(engine))
    row = rows(engine)[daily]
    assert (row["identifier"], row["kind"], row["cadence"]) == ("InterpolatedPricesTS.2cb23d4b980f15ff", "interpolated_prices", "1d")
    assert row["identity_components"] == {
        "source_time_index_meta_table_uid": str(storage_uid(EXTERNAL)),
        "source_cadence": "1d",
        "upsample_frequency_id": "1d",
        "intraday_bar_interpolation_rule": "ffill",
    }


@pytest.mark.parametrize("fixture", ["engine", "empty_engine"])
def test_checking_and_printing_change_nothing_and_what_is_printed_can_be_run_by_hand(fixture: str, request: pytest.FixtureRequest) -> None:
    engine: Engine = request.getfixturevalue(fixture)
    wanted = [policy(), policy(rule="none")]
    names = tuple(sorted(table_of(p, "1d") for p in wanted))
    static = () if fixture == "engine" else ("0001", "0002", "0003", "0004")
    before = state(engine)
    reader = create_engine(engine.url, connect_args={"options": "-c default_transaction_read_only=on"})  # one that may not write
    assert prepare.check(reader, wanted).pending == (*static, *names)
    printed = prepare.ddl(reader, wanted)
    reader.dispose()
    assert state(engine) == before

    with rival(engine, autocommit=True) as connection:
        connection.execute(printed)  # pyright: ignore[reportCallIssue, reportArgumentType]
    assert made(engine) == set(names)
    with rival(engine) as connection:
        connection.execute(f"INSERT INTO {names[0]} (asset_identifier, time_index) VALUES ('a', now())")
    assert prepare.check(engine, wanted).pending == names  # a table without a row in the catalogue
    tables_before = relations(engine), versions(engine, names)
    assert prepare.prepare(engine, wanted).pending == names
    assert (relations(engine), versions(engine, names)) == tables_before  # adopted, without any DDL
    assert set(rows(engine)) == set(names)
    assert prepare.check(engine, wanted) == CLEAN


def over(price_source: InterpolatedPrices, configuration: PortfolioConfiguration) -> PortfolioConfiguration:
    build = configuration.portfolio_build_configuration.model_copy(update={"price_source_instance": price_source})
    return configuration.model_copy(update={"portfolio_build_configuration": build})


def test_a_row_is_not_a_table_and_what_was_computed_into_a_dropped_one_is_computed_again(engine: Engine) -> None:  # R55, R56, R58
    closes = walks("2024-01-02", 8, ["a", "b"])
    closes.iloc[3, 1] = float("nan")  # a gap to fill
    open_market(engine, closes)
    sql(engine, "UPDATE msm__asset SET calendar_uid = (SELECT uid FROM msm__calendar)")
    fleet = [over(policy(), portfolio("p", equal("a", "b")))]
    before = relations(engine)
    report = run(engine, fleet, "2024-01-11 22:00")
    assert statuses(report) == {"p": "failed"}
    assert "msm-ray prepare" in str(report.failures()[0].error)
    assert relations(engine) == before  # a run makes no table

    (table,) = made_for(engine, policy())
    assert statuses(run(engine, fleet, "2024-01-11 22:00")) == {"p": "landed"}
    everything = f"SELECT * FROM {table} ORDER BY 1, 2"
    written = frame(engine, everything)
    assert len(written) == 16
    sql(engine, f"DROP TABLE {table}")
    assert statuses(run(engine, fleet, "2024-01-11 22:00")) == {"p": "failed"}
    epochs = {scope: row["epoch"] for (storage, scope), row in progress(engine).items() if storage.startswith("Interpolated")}
    stale = rows(engine)
    assert prepare.check(engine, [policy()]) == prepare.Preparation((), missing=(table,))
    assert prepare.prepare(engine, [policy()]).pending == (table,)
    assert prepare.check(engine, [policy()]) == CLEAN
    assert rows(engine) == stale
    kept = {scope: row for (storage, scope), row in progress(engine).items() if storage.startswith("Interpolated")}
    assert {scope: (row["watermark"], row["row_count"]) for scope, row in kept.items()} == dict.fromkeys("ab", (pd.NaT, 0))
    assert {scope: row["epoch"] - epochs[scope] for scope, row in kept.items()} == dict.fromkeys("ab", 1)  # a slow writer is fenced off
    assert progress(engine)["PortfoliosTS", "p"]["row_count"] == 8  # of other storages nothing is forgotten
    again = statuses(run(engine, fleet, "2024-01-11 22:00"), "prices")
    assert again == {f"{stale[table]['identifier']}/{scope}": "landed" for scope in "ab"}
    pd.testing.assert_frame_equal(frame(engine, everything), written)


# by what a table is made another one, and the column that must be named
DRIFTS = {
    "DROP COLUMN vwap": "vwap",
    "ADD COLUMN note text": "note",
    "ALTER COLUMN close TYPE numeric": "close",
    "ALTER COLUMN open_time TYPE timestamp": "open_time",
    "ALTER COLUMN asset_identifier TYPE varchar(40)": "asset_identifier",
    "ALTER COLUMN high SET NOT NULL": "high",
    "DROP CONSTRAINT pk_{0}, ADD PRIMARY KEY (time_index, asset_identifier)": "time_index",
    "DROP CONSTRAINT pk_{0}": "time_index",
}


def test_a_table_that_is_not_what_is_declared_is_named_and_left_alone_and_the_others_are_made(engine: Engine) -> None:
    register_source(engine)
    wanted = minutes(len(DRIFTS) + 2)
    names = [table_of(p) for p in wanted]
    *drifting, absent, missing = names
    prepare.prepare(engine, [p for p, name in zip(wanted, names, strict=True) if name != absent])
    with rival(engine) as connection:
        for name, change in zip(drifting, DRIFTS, strict=True):
            connection.execute(f"ALTER TABLE {name} {change.format(name)}")
            connection.execute(f"INSERT INTO {name} (asset_identifier, time_index, high) VALUES ('a', now(), 1)")
        connection.execute(f"DROP TABLE {missing}")
        connection.execute(f"DELETE FROM {CATALOGUE} WHERE physical_table_name = '{drifting[0]}'")
    left_alone = set(relations(engine)), versions(engine, drifting)
    catalogue = rows(engine)
    with pytest.raises(StorageMismatch) as caught:
        prepare.prepare(engine, wanted)
    for told in (str(caught.value), "; ".join(prepare.check(engine, wanted).drifted)):
        for name, column in zip(drifting, DRIFTS.values(), strict=True):
            assert re.search(rf"{name}: [^;]*\b{column}\b", told), (name, column, told)
    assert versions(engine, drifting) == left_alone[1]
    assert left_alone[0] <= set(relations(engine))
    assert {name: rows(engine).get(name) for name in drifting} == {name: catalogue.get(name) for name in drifting}
    assert {absent, missing} <= made(engine)
    found = prepare.check(engine, wanted)
    assert (set(found.pending) - {drifting[0]}, found.missing, found.is_clean) == (set(), (), False)
    assert {sentence.partition(":")[0] for sentence in found.drifted} == set(drifting)


def test_again_nothing_is_done_whatever_a_dba_has_added(engine: Engine) -> None:  # R59
    wanted = [policy(), policy(rule="none")]
    daily, _ = made_for(engine, *wanted)
    before = state(engine)
    assert prepare.prepare(engine, wanted) == CLEAN
    assert state(engine) == before
    with rival(engine) as connection:
        for table in (daily, "msm__portfolios"):
            connection.execute(f"CREATE INDEX ON {table} (time_index)")
            connection.execute(f"CREATE UNIQUE INDEX ON {table} (time_index, close)")
            connection.execute(f"COMMENT ON TABLE {table} IS 'mine'")
            connection.execute(f"COMMENT ON COLUMN {table}.close IS 'mine'")
            connection.execute(f"GRANT SELECT ON {table} TO PUBLIC")
            connection.execute(f"ALTER TABLE {table} SET (fillfactor = 80)")
        connection.execute("CREATE TABLE mine (i int)")
        connection.execute("CREATE VIEW msm__interpolated_prices_mine AS SELECT 1")
    before = state(engine)
    assert prepare.check(engine, wanted) == CLEAN
    assert prepare.prepare(engine, wanted) == CLEAN
    assert prepare.ddl(engine, wanted) == ""
    assert state(engine) == before


def test_a_missing_cadence_becomes_what_the_model_declares(engine: Engine) -> None:  # R57
    sql(engine, f"UPDATE {CATALOGUE} SET cadence = NULL WHERE identifier = '{EXTERNAL}'")
    found = prepare.check(engine, [policy()])
    assert "cadence of ExternalPricesTS" in found.pending
    done = prepare.prepare(engine, [policy()])
    assert (done.repaired, done.problems) == ((EXTERNAL,), ())
    assert set(done.pending) == {table_of(policy(), "1d")}  # derived from the cadence that has just been written
    assert prepare.prepare(engine, [policy()]).repaired == ()
    assert prepare.check(engine, [policy()]) == CLEAN


def test_a_cadence_that_somebody_has_changed_is_the_truth(engine: Engine) -> None:  # R52
    sql(engine, f"UPDATE {CATALOGUE} SET cadence = '5m', description = 'mine' WHERE identifier = '{EXTERNAL}'")
    wanted = policy("1h")
    assert prepare.prepare(engine, [wanted]).repaired == ()
    assert sql(engine, f"SELECT cadence, description FROM {CATALOGUE} WHERE identifier = '{EXTERNAL}'") == [("5m", "mine")]
    assert made(engine) == {table_of(wanted, "5m")} != {table_of(wanted, "1d")}
    with engine.connect() as connection:
        assert resolve_sources(connection, [wanted]).storages[wanted.key].__tablename__ == table_of(wanted, "5m")


def test_two_policies_of_one_name_are_refused(engine: Engine) -> None:
    name, other = "InterpolatedPricesTS.2cb23d4b980f15ff", '{"source_cadence": "1h"}'
    sql(
        engine,
        f"INSERT INTO {CATALOGUE} (uid, identifier, physical_table_name, kind, schema_fingerprint, identity_components) "
        "VALUES (%s, %s, %s, 'interpolated_prices', '', %s)",
        (storage_uid(name), name, table_of(policy(), "1d"), other),
    )
    before = state(engine)
    with pytest.raises(StorageCollision, match=name):
        prepare.prepare(engine, [policy()])
    assert state(engine) == before

    sql(engine, f"DELETE FROM {CATALOGUE} WHERE identifier = '{name}'")
    prepare.prepare(engine, [policy()])
    sql(engine, f"UPDATE {CATALOGUE} SET identity_components = '{other}' WHERE identifier = '{name}'")
    with engine.connect() as connection:  # the runtime does not trust the name either
        assert isinstance(resolve_sources(connection, [policy()]).sources[policy().key], StorageCollision)


def test_a_policy_that_cannot_be_prepared_is_named_and_the_others_are_made(engine: Engine) -> None:
    register_source(engine, "untold", None)
    register_source(engine, "hourly", "1h")
    bad = [policy(source="nowhere"), policy("1h", source="untold"), policy("90m", source="hourly"), policy("1h")]
    good = [policy(), policy("2h", source="hourly")]
    done = prepare.prepare(engine, [*bad, *good])
    assert made(engine) == set(done.pending) == {table_of(good[0], "1d"), table_of(good[1], "1h")}
    assert prepare.check(engine, [*bad, *good]).problems == done.problems
    words = [(str(storage_uid("nowhere")), EXTERNAL), ("untold", "cadence"), ("hourly", "90m", "1h"), (EXTERNAL, "1d", "1h")]
    assert len(done.problems) == len(words)
    for told in words:
        assert [problem for problem in done.problems if all(word in problem for word in told)], told
    with engine.connect() as connection:  # a run says the same
        resolved = resolve_sources(connection, [*bad, *good])
    assert all(isinstance(resolved.sources[p.key], Exception) for p in bad)
    assert all(isinstance(resolved.sources[p.key], Source) for p in good)


def test_table_row_and_revision_commit_together(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:  # R54
    register_source(engine)
    wanted = sorted(minutes(6), key=table_of)
    names = [table_of(p) for p in wanted]
    refused = f"NEW.physical_table_name = '{names[3]}'"
    with rival(engine) as connection:
        connection.execute(f"CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
                           f"$$ BEGIN IF {refused} THEN RAISE 'full'; END IF; RETURN NEW; END $$")  # fmt: skip
        connection.execute(f"CREATE TRIGGER refuse BEFORE INSERT ON {CATALOGUE} FOR EACH ROW EXECUTE FUNCTION refuse()")
    monkeypatch.setattr(prepare, "TABLES_MAX", 2)
    with pytest.raises(DBAPIError, match="full"):
        prepare.prepare(engine, wanted)
    assert made(engine) == set(names[:2]) == set(rows(engine))  # the third is of the fourth's transaction
    sql(engine, f"DROP TRIGGER refuse ON {CATALOGUE}")
    assert set(prepare.prepare(engine, wanted).pending) == set(names[2:])

    # what is recorded are the operations: run again, they make the very same tables
    columns = {name: inspect(engine).get_columns(name) for name in names}
    with engine.begin() as connection:
        for name in names:
            connection.execute(text(f"DROP TABLE {name}"))
            upgrade = f"def upgrade():\n    {rows(engine)[name]['revision']}\nupgrade()"  # as in a revision file
            exec(upgrade, {"sa": sa, "op": Operations(MigrationContext.configure(connection))})
    assert {name: repr(inspect(engine).get_columns(name)) for name in names} == {name: repr(found) for name, found in columns.items()}
    assert prepare.check(engine, wanted) == CLEAN


def test_250_policies_in_transactions_of_100_under_the_names_that_a_run_derives(engine: Engine) -> None:
    register_source(engine)
    wanted = [policy(f"{i + 1}m", rule, MINUTES) for i in range(125) for rule in ("ffill", "none")]
    done = prepare.prepare(engine, wanted)
    assert len(set(done.pending)) == 250
    found = sql(engine, f"SELECT m.physical_table_name, m.xmin::text, c.xmin::text FROM {CATALOGUE} m "
                        "JOIN pg_class c ON c.relname = m.physical_table_name WHERE m.kind = 'interpolated_prices'")  # fmt: skip
    assert {name for name, *_ in found} == set(done.pending)
    assert sorted(Counter(writer for *_, writer in found).values()) == [50, 100, 100]  # a new table holds locks until its commit
    assert all(row == table for _, row, table in found)  # the same transaction
    with engine.connect() as connection:
        resolved = resolve_sources(connection, wanted)
    assert {p.key: source.table for p in wanted if isinstance(source := resolved.sources[p.key], Source)} == {
        p.key: table_of(p) for p in wanted
    }


def test_tables_of_policies_are_no_part_of_the_static_schema(engine: Engine) -> None:  # R49
    (daily,) = made_for(engine, policy())
    assert daily not in MetaTable.metadata.tables
    sql(engine, f"DROP TABLE {daily}")
    assert prepare.check(engine) == CLEAN  # what no policy of the fleet needs is not asked for
    with pytest.raises(StorageNotPrepared, match=daily):
        msm_core.start_engine(models=[InterpolatedPricesStorage.configured(storage_uid(EXTERNAL), "1d", "1d", "ffill")])


@pytest.mark.usefixtures("engine")
def test_the_engine_starts_with_the_static_tables_only() -> None:  # R49
    InterpolatedPricesStorage.configured(storage_uid(EXTERNAL), "1d", "1d", "ffill")  # as a plan does; its table is not there
    attached = msm_core.start_engine()
    assert {model.__tablename__ for model in attached.models} == set(MetaTable.metadata.tables)


def test_a_collision_keeps_no_other_policy_from_its_table(engine: Engine) -> None:
    wanted = [policy(), policy(rule="none")]
    prepare.prepare(engine, wanted[:1])
    sql(engine, f"""UPDATE {CATALOGUE} SET identity_components = '{{"source_cadence": "1h"}}' WHERE kind = 'interpolated_prices'""")
    with pytest.raises(StorageCollision):
        prepare.prepare(engine, wanted)
    assert made(engine) == {table_of(p, "1d") for p in wanted}


def test_what_follows_from_a_missing_cadence_is_pending_too(engine: Engine) -> None:
    sql(engine, f"UPDATE {CATALOGUE} SET cadence = NULL WHERE identifier = '{EXTERNAL}'")
    found, printed = prepare.check(engine, [policy()]), prepare.ddl(engine, [policy()])
    assert prepare.prepare(engine, [policy()]).problems == found.problems
    assert table_of(policy(), "1d") in found.pending
    assert f"CREATE TABLE {table_of(policy(), '1d')}" in printed


def test_a_dropped_catalogue_is_seen(engine: Engine) -> None:
    sql(engine, f"DROP TABLE {CATALOGUE}")
    assert prepare.check(engine, [policy()]).missing == (CATALOGUE,)


def test_another_collation_is_drift(engine: Engine) -> None:
    (daily,) = made_for(engine, policy())
    sql(engine, f'ALTER TABLE {daily} ALTER COLUMN asset_identifier TYPE varchar(255) COLLATE "default"')
    assert [sentence for sentence in prepare.check(engine, [policy()]).drifted if daily in sentence and "asset_identifier" in sentence]


# -- many at once, and deaths -------------------------------------------------------------------------------------------------


def preparing(url: str, wanted: Sequence[InterpolatedPrices], tables_max: int, together: Any, done: Any) -> None:
    """Body of another process."""
    prepare.TABLES_MAX = tables_max
    together.wait()
    done.put(prepare.prepare(create_engine(url), wanted).pending)


@contextmanager
def processes(engine: Engine, count: int, wanted: Sequence[InterpolatedPrices], tables_max: int) -> Iterator[tuple[list[Any], Any]]:
    """`count` processes that prepare at the same moment, and the queue of what they have done."""
    together, done = PROCESSES.Barrier(count), PROCESSES.SimpleQueue()
    arguments = (engine.url.render_as_string(hide_password=False), wanted, tables_max, together, done)
    started = [PROCESSES.Process(target=preparing, args=arguments, daemon=True) for _ in range(count)]
    for process in started:
        process.start()
    try:
        yield started, done
    finally:
        for process in started:
            process.kill()
            process.join()


def test_concurrent_preparers_wait_for_each_other(empty_engine: Engine) -> None:
    with ThreadPoolExecutor(4) as pool:
        done = [f.result() for f in [pool.submit(prepare.prepare, empty_engine) for _ in range(4)]]
    assert sorted(d.pending for d in done) == [(), (), (), ("0001", "0002", "0003", "0004")]


def test_eight_processes_prepare_an_empty_database_at_once(empty_engine: Engine) -> None:
    wanted = [policy(), policy(rule="none")]
    names = sorted(table_of(p, "1d") for p in wanted)
    with processes(empty_engine, 8, wanted, tables_max=1) as (started, done):
        for process in started:
            process.join(60)
        assert [process.exitcode for process in started] == [0] * 8
        assert sorted(done.get() for _ in started) == [()] * 7 + [("0001", "0002", "0003", "0004", *names)]
    assert made(empty_engine) == set(rows(empty_engine)) == set(names)
    assert prepare.check(empty_engine, wanted) == CLEAN


def test_killed_in_the_middle_the_next_one_goes_on(engine: Engine) -> None:
    for seed in range(3):
        source = f"vendor-{seed}"
        register_source(engine, source)
        wanted, before = minutes(60, source), len(made(engine))
        enough = random.Random(seed).randrange(1, 50)
        with processes(engine, 1, wanted, tables_max=5) as ((process,), _), rival(engine, autocommit=True) as connection:
            while count_made(connection) - before < enough:
                assert process.is_alive()
                time.sleep(0.005)
            process.kill()
            process.join()
        found = made(engine)
        assert enough <= len(found) - before < 60
        assert set(rows(engine)) == found  # each with its row
        done = prepare.prepare(engine, wanted)
        assert 0 < len(done.pending) <= 60 - (len(found) - before)
        assert len(made(engine)) - before == 60
        assert prepare.check(engine, wanted) == CLEAN


def count_made(connection: Connection[Any]) -> int:
    found = connection.execute("SELECT count(*) FROM pg_class WHERE relkind = 'r' AND relname LIKE 'msm__interpolated_prices_%'").fetchone()
    return found[0] if found else 0


def test_a_prepare_that_waits_too_long_says_for_what(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "LOCK_SECONDS", 1)
    before = state(engine)
    with rival(engine) as connection:
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (prepare.LOCK_KEY,))
        with pytest.raises(PrepareBusy, match="another `msm-ray prepare` has held the lock for 1 s") as caught:
            prepare.prepare(engine, [policy()])
        assert caught.value.retryable
        assert prepare.check(engine, [policy()]).pending  # looking needs no lock
    assert state(engine) == before
    assert made_for(engine, policy()) == {table_of(policy(), "1d")}
