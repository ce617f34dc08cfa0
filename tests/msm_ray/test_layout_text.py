"""Partitioned storages: the DDL that is printed, and the names."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from sqlalchemy import Engine

from msm_ray import prepare
from tests import factories
from tests.factories import OUTPUTS, rival, sql
from tests.msm_ray import test_layout
from tests.msm_ray.test_layout import CLEAN, LAST, SPREAD, YEARLY, calendar, partitions, value

yearly = test_layout.yearly

# in another process, because a namespace is fixed when the models are first imported
NAMES_IN_NAMESPACE = """
import json, sys
from msm_core.database import get_engine
from msm_core.models import MetaTable
from msm_ray import layout, prepare
engine = get_engine()
prepare.prepare(engine)
made = prepare.lay_out(engine, **json.loads(sys.argv[1]))
assert prepare.check(engine).is_clean
assert not set(made) & (set(MetaTable.metadata.tables) - {s.__tablename__ for s in layout.HOT})
print(*made)
"""


@pytest.mark.parametrize(("asked", "held"), [(YEARLY, ["rest", "y2024"]), (SPREAD, ["h3", "h3"])], ids=["year", "scope"])
def test_the_printed_ddl_makes_the_same_and_loses_no_row(engine: Engine, asked: dict[str, Any], held: list[str]) -> None:
    calendar(engine)
    sql(engine, "GRANT SELECT ON msm__portfolios TO PUBLIC")
    printed = prepare.ddl(engine, **asked)
    assert printed.count("BEGIN;\n") == printed.count("COMMIT;\n") == len(OUTPUTS)
    assert partitions(engine) == {}
    value(engine, "2024-01-02Z", "2019-01-02Z")  # between printing and running it
    with rival(engine) as connection:
        connection.execute(printed)  # type: ignore[arg-type] - the text of this project's own DDL
    assert prepare.check(engine) == prepare.check(engine, **asked) == CLEAN
    where = "SELECT tableoid::regclass::text FROM msm__portfolios ORDER BY time_index"
    assert sql(engine, where) == [(f"msm__portfolios_{suffix}",) for suffix in held]
    assert sql(engine, "SELECT relacl::text LIKE '%=r/%' FROM pg_class WHERE relname = 'msm__portfolios'") == [(True,)]
    assert prepare.ddl(engine) == prepare.ddl(engine, **asked) == ""


@pytest.mark.parametrize(("asked", "count"), [(YEARLY, LAST - 1970 + 2), (SPREAD, 4)], ids=["year", "scope"])
def test_an_empty_database_is_printed_and_made_with_its_partitions(empty_engine: Engine, asked: dict[str, Any], count: int) -> None:
    printed = prepare.ddl(empty_engine, **asked)
    assert factories.relations(empty_engine) == []
    with rival(empty_engine, autocommit=True) as connection:
        connection.execute(printed)  # type: ignore[arg-type] - the text of this project's own DDL
    prepare.prepare(empty_engine)  # the catalogue's rows
    assert prepare.check(empty_engine) == prepare.check(empty_engine, **asked) == CLEAN
    assert len(partitions(empty_engine)) == 3 * count


@pytest.mark.parametrize(
    ("namespace", "asked", "count"),
    [
        ("y2024", YEARLY, LAST - 1970 + 2),
        ("a_rather_long_namespace_name_30", YEARLY, LAST - 1970 + 2),
        ("h0", {"partitions": 64}, 64),
    ],
)
def test_names_are_those_of_a_namespace_and_fit(yearly: Engine, namespace: str, asked: dict[str, Any], count: int) -> None:
    environment = {**os.environ, "MSM_AUTO_REGISTER_NAMESPACE": namespace}
    command_line = [sys.executable, "-c", NAMES_IN_NAMESPACE, json.dumps(asked)]
    done = subprocess.run(command_line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = done.stdout.split()
    assert len(made) == len(set(made)) == 3 * (count + 1)
    assert all(len(name) <= 63 for name in made)
    assert set(made).isdisjoint({*partitions(yearly)} - {*made})
    query = "SELECT DISTINCT inhparent::regclass::text FROM pg_inherits WHERE inhrelid::regclass::text = ANY(%s)"
    assert sorted(name for (name,) in sql(yearly, query, (made,))) == sorted(f"{table}__{namespace}" for table in OUTPUTS)
