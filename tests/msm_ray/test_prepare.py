"""The static chain: from nothing to head and back, in any namespace, by many at once."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine, inspect, text

from msm_core.models import STORAGES, MetaTable
from msm_ray import prepare

# in another process, because a namespace is fixed when the models are first imported
PREPARE_IN_NAMESPACE = """
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from msm_core.database import get_engine
from msm_core.models import MetaTable, ExternalPricesStorage, AssetTable
from msm_ray.prepare import prepare, check
engine = get_engine()
prepare(engine)
assert check(engine).missing == () and check(engine).pending == ()
with engine.connect() as connection:
    ours = lambda object, name, type_, reflected, compare_to: type_ != "table" or name in MetaTable.metadata.tables
    context = MigrationContext.configure(connection, opts={"include_object": ours, "compare_type": True})
    assert compare_metadata(context, MetaTable.metadata) == []
print(ExternalPricesStorage.logical_name(), ExternalPricesStorage.__tablename__, AssetTable.__tablename__)
"""


def tables(engine: Engine) -> set[str]:
    return set(inspect(engine).get_table_names())


def test_an_empty_database_is_prepared_and_nothing_is_left_to_generate(empty_engine: Engine) -> None:  # R14, R29
    before = prepare.check(empty_engine)
    assert before.pending == ("0001", "0002")
    assert set(before.missing) == set(MetaTable.metadata.tables)
    assert "CREATE TABLE msm__portfolios" in prepare.ddl(empty_engine)
    assert tables(empty_engine) == set()  # checking and printing changed nothing

    assert prepare.prepare(empty_engine).pending == ("0001", "0002")
    assert prepare.prepare(empty_engine).pending == ()  # R59
    assert prepare.check(empty_engine) == prepare.Preparation((), ())
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
    assert {(i, t) for i, t, _ in catalogue} == {(s.logical_name(), s.__tablename__) for s in STORAGES}
    assert ("ExternalPricesTS", "msm__external_prices", "1d") in {tuple(row) for row in catalogue}


def test_downgrade_leaves_nothing(empty_engine: Engine) -> None:
    prepare.prepare(empty_engine)
    with empty_engine.begin() as connection:
        command.downgrade(prepare.alembic_config(connection), "base")
    assert tables(empty_engine) == {"msm__alembic_version"}


def test_a_dropped_table_is_seen_although_the_version_row_says_head(engine: Engine) -> None:  # R56
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE msm__portfolios"))
    assert prepare.check(engine).missing == ("msm__portfolios",)


def test_concurrent_preparers_wait_for_each_other(empty_engine: Engine) -> None:
    with ThreadPoolExecutor(4) as pool:
        done = [f.result() for f in [pool.submit(prepare.prepare, empty_engine) for _ in range(4)]]
    assert sorted(d.pending for d in done) == [(), (), (), ("0001", "0002")]


@pytest.mark.parametrize("namespace", ["ns", "a_rather_long_namespace_name_30"])
def test_a_namespace_has_tables_and_identifiers_of_its_own(engine: Engine, namespace: str) -> None:  # R6
    environment = {**os.environ, "MSM_AUTO_REGISTER_NAMESPACE": namespace}
    command_line = [sys.executable, "-c", PREPARE_IN_NAMESPACE]
    printed = subprocess.run(command_line, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert printed == [f"{namespace}.ExternalPricesTS", f"msm__external_prices__{namespace}", f"msm__asset__{namespace}"]
    assert {f"msm__asset__{namespace}", "msm__asset"} <= tables(engine)
    assert all(len(name) <= 63 for name in tables(engine))
