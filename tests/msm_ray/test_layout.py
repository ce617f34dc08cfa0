"""Partitioned storages: the same numbers as in plain tables, and nothing that is compared, refused or made goes astray.

What holds of both layouts, and of the one by year; test_spread_layout has the one by scope, test_layout_text what is printed and named.
"""

import re
import threading
import uuid
from collections.abc import Sequence
from datetime import date
from typing import Any

import psycopg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine

from msm_core.configuration import PortfolioConfiguration
from msm_core.database import transaction
from msm_core.errors import StorageMismatch, StorageNotEmpty
from msm_core.models import MetaTable
from msm_core.verification import checksum, verify
from msm_ray import prepare
from tests import factories
from tests.factories import (
    OUTPUTS,
    closes_of,
    equal,
    fixed,
    load_prices,
    portfolio,
    register_assets,
    rival,
    run,
    schedule,
    sql,
    walks,
)

scheduled = factories.scheduled

ASSETS = [f"a{i}" for i in range(9)]
LAST = date.today().year + 2  # the database's clock is this machine's
FIRST = 2023  # of the calendar
SESSIONS = 60  # from 2023-11-20 to 2024-02-09
NIGHTS = ("2023-12-15", "2023-12-29", "2024-01-03", "2024-01-04", "2024-03-01")
CLEAN = prepare.Preparation(())
YEARLY, SPREAD = {"yearly": True}, {"partitions": 4}
both = pytest.mark.parametrize("asked", [YEARLY, SPREAD], ids=["year", "scope"])


def names(table: str, years: Sequence[int] = range(FIRST, LAST + 1)) -> list[str]:
    return [*(f"{table}_y{year}" for year in years), f"{table}_rest"]


def partitions(engine: Engine) -> dict[str, str]:
    """Bounds by partition, as Postgres tells them."""
    found = sql(
        engine, "SELECT relname::text, pg_get_expr(relpartbound, oid) FROM pg_class WHERE relispartition AND relkind = 'r' ORDER BY 1"
    )
    return dict(found)


def calendar(engine: Engine) -> None:
    factories.store_calendar(engine, f"{FIRST}-01-02", "2024-12-31")


@pytest.fixture
def yearly(engine: Engine) -> Engine:
    """A database whose hot storages are partitioned, with the calendar."""
    calendar(engine)
    prepare.lay_out(engine, yearly=True)
    return engine


def market(engine: Engine) -> None:
    register_assets(engine, ASSETS)
    load_prices(engine, walks("2023-11-20", SESSIONS, ASSETS))


def fleet() -> list[PortfolioConfiguration]:
    """Four signals with every rhythm; the fixed one emits in 1970, which has no partition."""
    vectors = [(time, dict.fromkeys(ASSETS[i : i + 5], 0.2)) for i, time in enumerate(closes_of("2023-11-24", 44)[::15])]
    signals = [equal(*ASSETS), equal(*ASSETS[:5]), fixed(a0=0.5, a8=0.3, a4=-0.1), schedule(*vectors)]
    rhythms = ("every_session", "week_end", "month_end", "signal_change")
    return [
        portfolio(f"p{i:02}", signals[i % 4], on=rhythms[i // 4 % 4], accounting=("drifted", "target")[i % 2], lag=i % 3, fee=0.001)
        for i in range(16)
    ]


def digest(engine: Engine) -> str:
    with transaction(engine, read_only=True) as connection:
        assert verify(connection).violations == ()
        return checksum(connection)


# -- numbers ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "held"), [(YEARLY, ["y2023", "y2024"]), (SPREAD, ["h0", "h1", "h2", "h3"])], ids=["year", "scope"])
def test_every_road_leaves_the_same_bits_as_in_plain_tables(engine: Engine, asked: dict[str, Any], held: list[str]) -> None:
    calendar(engine)
    market(engine)
    assert run(engine, fleet(), "2024-03-01").exit_code == 0
    plain, dumped = digest(engine), factories.dump(engine)

    sql(engine, f"TRUNCATE {', '.join(OUTPUTS)}")
    prepare.lay_out(engine, **asked)
    for night in NIGHTS:  # by the new tables alone, progress begins anew
        assert run(engine, fleet(), night, registered=True).exit_code == 0
    assert (digest(engine), factories.dump(engine)) == (plain, dumped)

    assert run(engine, fleet(), "2024-03-01", full_refresh=True).exit_code == 0
    assert (digest(engine), factories.dump(engine)) == (plain, dumped)

    for table in ("msm__portfolios", "msm__portfolio_weights"):
        found = sql(engine, f"SELECT DISTINCT tableoid::regclass::text FROM {table} ORDER BY 1")
        assert found == [(f"{table}_{suffix}",) for suffix in held]


def test_what_emits_in_1970_is_in_the_rest(yearly: Engine) -> None:
    market(yearly)
    assert run(yearly, fleet(), NIGHTS[0]).exit_code == 0
    assert sql(yearly, "SELECT DISTINCT extract(year FROM time_index)::int FROM ONLY msm__signal_weights_rest") == [(1970,)]


@both
def test_a_night_that_failed_is_retried_to_the_same_bits(engine: Engine, asked: dict[str, Any]) -> None:
    calendar(engine)
    prepare.lay_out(engine, **asked)
    market(engine)
    assert run(engine, fleet(), "2024-03-01").exit_code == 0
    whole = factories.dump(engine)
    sql(engine, f"TRUNCATE {', '.join(OUTPUTS)}")
    sql(engine, "UPDATE msm__data_node_update SET watermark = NULL, epoch = 0, row_count = 0")

    assert run(engine, fleet(), NIGHTS[1]).exit_code == 0
    refused = "ALTER TABLE msm__portfolio_weights ADD CONSTRAINT broken CHECK (portfolio_identifier <> 'p03' OR time_index < '2024-01-01')"
    sql(engine, refused)  # of the years, only the new one can break it
    report = run(engine, fleet(), "2024-03-01", registered=True)
    assert {i: s for i, s in factories.statuses(report).items() if s != "landed"} == {"p03": "failed"}
    sql(engine, "ALTER TABLE msm__portfolio_weights DROP CONSTRAINT broken")
    assert factories.statuses(run(engine, fleet(), "2024-03-01", registered=True))["p03"] == "landed"
    assert factories.dump(engine) == whole
    digest(engine)


# -- what is made -------------------------------------------------------------------------------------------------------------


def test_partitions_reach_from_the_first_session_to_two_years_ahead(engine: Engine) -> None:
    calendar(engine)
    wanted = [name for table in OUTPUTS for name in (table, *names(table))]
    assert prepare.check(engine) == CLEAN
    assert prepare.check(engine, yearly=True).pending == tuple(wanted)
    assert partitions(engine) == {}
    sql(engine, f"ALTER DATABASE {engine.url.database} SET timezone TO 'Asia/Tokyo'")
    engine.dispose()  # connections of before are in UTC
    assert prepare.lay_out(engine, yearly=True) == tuple(wanted)
    bounds = partitions(engine)
    assert sorted(bounds) == sorted(name for table in OUTPUTS for name in names(table))
    assert bounds["msm__portfolios_rest"] == "DEFAULT"
    with rival(engine) as connection:  # 2024 begins and ends at midnight UTC, whoever looks
        connection.execute("SET TIME ZONE 'Asia/Tokyo'")
        shown = "SELECT pg_get_expr(relpartbound, oid) FROM pg_class WHERE relname = 'msm__portfolios_y2024'"
        assert connection.execute(shown).fetchall() == [("FOR VALUES FROM ('2024-01-01 09:00:00+09') TO ('2025-01-01 09:00:00+09')",)]
    assert prepare.lay_out(engine, yearly=True) == ()
    assert prepare.prepare(engine).pending == ()
    assert prepare.check(engine) == prepare.check(engine, yearly=True) == CLEAN


def test_without_calendars_they_begin_with_1970(engine: Engine) -> None:
    pending = prepare.check(engine, yearly=True).pending
    assert [name for name in pending if "portfolios" in name][1:] == names("msm__portfolios", range(1970, LAST + 1))


@both
def test_alembic_finds_nothing_to_do_and_downgrade_leaves_nothing(engine: Engine, asked: dict[str, Any]) -> None:
    calendar(engine)
    prepare.lay_out(engine, **asked)
    with engine.begin() as connection:
        command.check(prepare.alembic_config(connection))  # by migrations/env.py; raises where something would be generated
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        differences = compare_metadata(context, MetaTable.metadata)
        strangers = {d[1].name for d in differences if d[0] == "remove_table"}  # without env.py's filter, children are somebody's tables
        assert strangers == {*partitions(engine), "msm__alembic_version"}
        assert len(differences) == sum(1 for d in differences if d[0].startswith("remove_"))
    with engine.begin() as connection:
        command.downgrade(prepare.alembic_config(connection), "base")
    assert sql(engine, "SELECT relname::text FROM pg_class WHERE relname LIKE 'msm\\_\\_%%' AND relkind IN ('r', 'p')") == [
        ("msm__alembic_version",)
    ]


@both
def test_parents_and_partitions_are_what_the_migrations_made(engine: Engine, asked: dict[str, Any]) -> None:
    def described(*tables: str) -> dict[str, list[tuple[Any, ...]]]:
        columns = """SELECT attname::text, format_type(atttypid, atttypmod), attnotnull, attcollation, col_description(attrelid, attnum)
                     FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 ORDER BY attnum"""
        checks = "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = %s::regclass AND contype IN ('c', 'p') ORDER BY 1"
        return {t: [*sql(engine, columns, (t,)), *sql(engine, checks, (t,))] for t in tables}

    key = "SELECT conname::text FROM pg_constraint WHERE conrelid = 'msm__portfolios'::regclass AND contype = 'p'"
    plain, plain_key = described(*OUTPUTS), sql(engine, key)
    calendar(engine)
    prepare.lay_out(engine, **asked)
    assert described(*OUTPUTS) == plain
    assert sql(engine, key) == plain_key
    parents = dict(sql(engine, "SELECT i.inhrelid::regclass::text, i.inhparent::regclass::text FROM pg_inherits i"))
    made = described(*partitions(engine))
    assert {parents[name] for name in made} == {*OUTPUTS}
    assert all(facts == plain[parents[name]] for name, facts in made.items())


@both
def test_rights_and_owner_are_kept(engine: Engine, asked: dict[str, Any]) -> None:
    calendar(engine)
    worker, owner = (f"layout_{uuid.uuid4().hex[:8]}" for _ in range(2))  # roles belong to the whole server
    try:
        sql(engine, f"CREATE ROLE {worker}; CREATE ROLE {owner}")
        sql(engine, f"GRANT SELECT, INSERT, DELETE ON msm__portfolios TO {worker}; GRANT SELECT ON msm__portfolio_weights TO PUBLIC")
        sql(engine, f"GRANT UPDATE (close) ON msm__portfolios TO {worker}; ALTER TABLE msm__signal_weights OWNER TO {owner}")
        rights = """SELECT c.relname::text, c.relowner, coalesce(a.attname::text, ''), r.grantee, r.privilege_type
                    FROM pg_class c LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attacl IS NOT NULL,
                    aclexplode(coalesce(a.attacl, c.relacl)) r WHERE c.relname = ANY(%s) ORDER BY 1, 2, 3, 4, 5"""
        before = sql(engine, rights, (list(OUTPUTS),))
        prepare.lay_out(engine, **asked)
        assert sql(engine, rights, (list(OUTPUTS),)) == before
        with rival(engine) as connection:
            connection.execute("SELECT set_config('role', %s, true)", (worker,))
            connection.execute("INSERT INTO msm__portfolios VALUES ('p', '2024-01-02', 1, 0, 1, '2024-01-02')")
            assert connection.execute("SELECT count(*) FROM msm__portfolios").fetchone() == (1,)
    finally:
        sql(engine, f"DROP OWNED BY {worker}, {owner} CASCADE")
        sql(engine, f"DROP ROLE {worker}; DROP ROLE {owner}")


def value(engine: Engine, *times: str) -> None:
    for time in times:
        sql(engine, "INSERT INTO msm__portfolios VALUES ('p', %s, 1, 0, 1, %s)", (time, time))


def progress(engine: Engine, storage: str, epoch: int = 0) -> None:
    insert = (
        "INSERT INTO msm__data_node_update (uid, kind, storage, scope, epoch, row_count) VALUES (gen_random_uuid(), 'k', %s, 'p', %s, 0)"
    )
    sql(engine, insert, (storage, epoch))


def drop(engine: Engine, *tables: str) -> None:
    for table in tables:
        sql(engine, f"DROP TABLE {table}")


def test_a_year_that_is_missing_is_pending_and_takes_its_rows_out_of_the_rest(yearly: Engine) -> None:
    drop(yearly, "msm__portfolios_y2024", "msm__portfolios_y2025")
    value(yearly, "2023-12-31 23:59:59.999999Z", "2024-01-01 00:00Z", "2024-12-31 23:59:59.999999Z", "2025-01-01 00:00Z", "2019-06-03Z")
    for storage in ("PortfoliosTS", "SignalWeightsTS", "ExternalPricesTS"):
        progress(yearly, storage, epoch=7)
    with transaction(yearly, read_only=True) as connection:
        before = checksum(connection)
    assert prepare.check(yearly).pending == ("msm__portfolios_y2024", "msm__portfolios_y2025")
    assert prepare.check(yearly).is_clean is False

    assert prepare.prepare(yearly).pending == ("msm__portfolios_y2024", "msm__portfolios_y2025")
    assert prepare.check(yearly) == CLEAN
    where = "SELECT tableoid::regclass::text, time_index::text FROM msm__portfolios ORDER BY time_index"
    assert sql(yearly, where) == [
        ("msm__portfolios_rest", "2019-06-03 00:00:00+00"),
        ("msm__portfolios_y2023", "2023-12-31 23:59:59.999999+00"),
        ("msm__portfolios_y2024", "2024-01-01 00:00:00+00"),
        ("msm__portfolios_y2024", "2024-12-31 23:59:59.999999+00"),
        ("msm__portfolios_y2025", "2025-01-01 00:00:00+00"),
    ]
    with transaction(yearly, read_only=True) as connection:
        assert checksum(connection) == before
    epochs = dict(sql(yearly, "SELECT storage, epoch FROM msm__data_node_update"))  # who claimed before must look again
    assert epochs == {"PortfoliosTS": 8, "SignalWeightsTS": 8, "ExternalPricesTS": 7}


def test_years_before_the_first_come_with_an_earlier_calendar(yearly: Engine) -> None:
    value(yearly, "2021-05-03Z")
    factories.store_calendar(yearly, "2021-03-01", "2021-06-30", "EARLIER")
    wanted = [f"{table}_y{year}" for table in OUTPUTS for year in (2021, 2022)]
    assert prepare.check(yearly).pending == tuple(wanted)
    assert prepare.prepare(yearly).pending == tuple(wanted)
    assert sql(yearly, "SELECT tableoid::regclass::text FROM msm__portfolios") == [("msm__portfolios_y2021",)]


def test_a_claim_that_waited_for_the_move_starts_again(yearly: Engine) -> None:
    """A transaction that looked before the move, and would not see the moved rows, must not get as far as writing."""
    drop(yearly, "msm__portfolios_y2024")
    value(yearly, "2024-01-02Z")
    progress(yearly, "PortfoliosTS")
    with rival(yearly) as old:
        old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT count(*) FROM msm__asset").fetchall()  # it has its snapshot, and no lock on the storage
        prepare.prepare(yearly)
        assert old.execute("SELECT count(*) FROM msm__portfolios WHERE time_index = '2024-01-02Z'").fetchone() == (0,)  # the danger
        with pytest.raises(psycopg.errors.SerializationFailure):
            old.execute("SELECT 1 FROM msm__data_node_update WHERE scope = 'p' FOR UPDATE SKIP LOCKED")
        old.rollback()


def test_a_batch_under_way_is_waited_for(yearly: Engine) -> None:
    drop(yearly, "msm__portfolios_y2024")
    progress(yearly, "PortfoliosTS")
    made: list[tuple[str, ...]] = []
    with rival(yearly) as batch:
        batch.execute("SELECT 1 FROM msm__data_node_update WHERE scope = 'p' FOR UPDATE SKIP LOCKED")
        preparing = threading.Thread(target=lambda: made.append(prepare.prepare(yearly).pending))
        preparing.start()
        preparing.join(timeout=0.7)
        assert preparing.is_alive()
        batch.execute("INSERT INTO msm__portfolios VALUES ('p', '2024-01-02Z', 1, 0, 1, '2024-01-02Z')")  # no deadlock
    preparing.join(timeout=20)
    assert made == [("msm__portfolios_y2024",)]
    assert sql(yearly, "SELECT tableoid::regclass::text FROM msm__portfolios") == [("msm__portfolios_y2024",)]


def test_partitions_of_somebody_else_count_for_their_years(yearly: Engine) -> None:
    drop(yearly, "msm__portfolios_y2023", "msm__portfolios_rest")
    sql(yearly, "CREATE TABLE old PARTITION OF msm__portfolios FOR VALUES FROM (MINVALUE) TO ('2023-07-01Z')")
    assert prepare.check(yearly).pending == ("msm__portfolios_rest",)
    drop(yearly, "msm__portfolios_y2025")
    sql(yearly, "CREATE TABLE far PARTITION OF msm__portfolios FOR VALUES FROM ('2050-01-01Z') TO (MAXVALUE)")
    assert prepare.prepare(yearly).pending == ("msm__portfolios_y2025", "msm__portfolios_rest")


# -- what is refused ----------------------------------------------------------------------------------------------------------


@both
def test_tables_with_rows_are_refused_with_a_remedy_and_left_alone(engine: Engine, asked: dict[str, Any]) -> None:
    calendar(engine)
    value(engine, "2024-01-02Z")
    before = factories.relations(engine), factories.versions(engine)
    for attempt in (prepare.check, prepare.lay_out, prepare.ddl):
        with pytest.raises(StorageNotEmpty, match=rf"rows: msm__portfolios\. .*TRUNCATE {', '.join(OUTPUTS)};"):
            attempt(engine, **asked)
    assert (factories.relations(engine), factories.versions(engine)) == before
    assert prepare.check(engine) == CLEAN


@both
def test_a_row_that_comes_while_it_waits_is_seen(engine: Engine, asked: dict[str, Any]) -> None:
    calendar(engine)
    raised: list[Exception] = []

    def convert() -> None:
        try:
            prepare.lay_out(engine, **asked)
        except StorageNotEmpty as error:
            raised.append(error)

    with rival(engine) as batch:
        batch.execute("INSERT INTO msm__signal_weights VALUES ('s', '2024-01-02Z', 'a', 1)")
        converting = threading.Thread(target=convert)
        converting.start()
        converting.join(timeout=0.7)
        assert converting.is_alive()
    converting.join(timeout=20)
    assert len(raised) == 1
    assert partitions(engine) == {}


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        ("CREATE INDEX mine ON msm__portfolios (close)", "msm__portfolios: it has the index mine of somebody's own"),
        ("CREATE VIEW mine AS SELECT close FROM msm__portfolios", "msm__portfolios: it has the view mine of somebody's own"),
        ("CREATE POLICY mine ON msm__portfolios USING (true)", "msm__portfolios: it has the policy mine of somebody's own"),
        ("CREATE TRIGGER mine BEFORE UPDATE ON msm__portfolios FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()",
         "msm__portfolios: it has the trigger mine of somebody's own"),
        ("CREATE TABLE msm__portfolios_y2024 ()", "msm__portfolios_y2024: it is there, but no partition"),
        ("DROP TABLE msm__portfolios; CREATE TABLE msm__portfolios (portfolio_identifier text) PARTITION BY HASH (portfolio_identifier)",
         "msm__portfolios: it is partitioned by HASH (portfolio_identifier), not RANGE (time_index)"),
    ],
)  # fmt: skip
def test_what_stands_in_the_way_is_named_and_nothing_is_made(engine: Engine, statement: str, told: str) -> None:
    calendar(engine)
    sql(engine, statement)
    before = factories.relations(engine)
    with pytest.raises(StorageMismatch, match=re.escape(told)):
        prepare.lay_out(engine, yearly=True)
    assert factories.relations(engine) == before
    assert prepare.lay_out(engine) == ()  # not asked for, it is nobody's business


def test_a_partition_taken_out_to_be_kept_is_not_written_over(yearly: Engine) -> None:
    value(yearly, "2023-05-01Z")
    sql(yearly, "ALTER TABLE msm__portfolios DETACH PARTITION msm__portfolios_y2023")
    with pytest.raises(StorageMismatch, match="msm__portfolios_y2023: it is there, but no partition"):
        prepare.prepare(yearly)
    assert sql(yearly, "SELECT count(*) FROM msm__portfolios_y2023") == [(1,)]


def test_a_static_storage_without_its_key_has_drifted(engine: Engine, yearly: Engine) -> None:
    assert prepare.check(engine).drifted == ()
    sql(engine, "ALTER TABLE msm__portfolios DROP CONSTRAINT pk_msm__portfolios")
    assert prepare.check(engine).drifted == ("msm__portfolios: its primary key is (), not (portfolio_identifier, time_index)",)
