"""Storages spread over partitions by scope: where rows lie, what is made again, and what is refused."""

import re
import threading
from typing import Any

import pytest
from sqlalchemy import Engine

from msm_core.errors import ConfigurationError, StorageMismatch, StorageNotEmpty, StoragePartitioned
from msm_ray import prepare
from tests import factories
from tests.factories import OUTPUTS, rival, run, sql
from tests.msm_ray.test_layout import CLEAN, calendar, digest, drop, fleet, market, partitions, progress, value

scheduled = factories.scheduled

SCOPES = {"msm__signal_weights": "signal_uid", "msm__portfolio_weights": "portfolio_identifier", "msm__portfolios": "portfolio_identifier"}
REMAINDERS = "SELECT 'p' || i, r FROM generate_series(0, 9) i, generate_series(0, 7) r WHERE {} ORDER BY i"


def names(table: str, count: int) -> list[str]:
    return [f"{table}_h{remainder}" for remainder in range(count)]


@pytest.fixture
def spread(engine: Engine) -> Engine:
    """A database whose hot storages are spread over eight partitions; it has no calendar."""
    prepare.lay_out(engine, partitions=8)
    return engine


# -- where rows lie -----------------------------------------------------------------------------------------------------------


def test_rows_of_a_scope_lie_together_where_the_server_says(spread: Engine) -> None:
    calendar(spread)
    market(spread)
    assert run(spread, fleet(), "2024-03-01").exit_code == 0
    digest(spread)
    for table, scope in SCOPES.items():
        rows = f"SELECT DISTINCT {scope}, tableoid::regclass::text FROM {table}"
        says = f"satisfies_hash_partition('{table}'::regclass, 8, substring(t.name FROM '_h(\\d+)$')::int, t.scope)"
        found = sql(
            spread, f"SELECT count(*), count(DISTINCT t.scope), count(DISTINCT t.name), bool_and({says}) FROM ({rows}) t(scope, name)"
        )
        ((pairs, scopes, used, right),) = found
        assert pairs == scopes == (4 if scope == "signal_uid" else 16)
        assert used > 1
        assert right


def test_the_parts_of_a_storage_are_as_those_of_another_with_the_same_scope(spread: Engine) -> None:
    """Weights and values of a portfolio have the same remainder, so one question serves both."""
    asked = [REMAINDERS.format(f"satisfies_hash_partition('{table}'::regclass, 8, r, 'p' || i)") for table in OUTPUTS[1:]]
    weights, values = (sql(spread, query) for query in asked)
    assert weights == values
    assert [portfolio for portfolio, _ in weights] == [f"p{i}" for i in range(10)]


# -- what is made -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 8, 64])
def test_each_storage_gets_as_many_as_asked_for_and_keeps_them(engine: Engine, count: int) -> None:
    wanted = [name for table in OUTPUTS for name in (table, *names(table, count))]
    assert prepare.check(engine) == CLEAN
    assert prepare.check(engine, partitions=count).pending == tuple(wanted)
    assert partitions(engine) == {}
    assert prepare.lay_out(engine, partitions=count) == tuple(wanted)

    bounds = {f"{t}_h{r}": f"FOR VALUES WITH (modulus {count}, remainder {r})" for t in OUTPUTS for r in range(count)}
    assert partitions(engine) == bounds
    keys = sql(engine, "SELECT partrelid::regclass::text, pg_get_partkeydef(partrelid) FROM pg_partitioned_table")
    assert dict(keys) == {table: f"HASH ({scope})" for table, scope in SCOPES.items()}
    assert prepare.lay_out(engine, partitions=count) == prepare.lay_out(engine) == prepare.prepare(engine).pending == ()
    assert prepare.check(engine) == prepare.check(engine, partitions=count) == CLEAN
    assert prepare.ddl(engine) == prepare.ddl(engine, partitions=count) == ""


def test_a_new_calendar_asks_for_nothing(spread: Engine) -> None:
    calendar(spread)
    assert prepare.check(spread) == CLEAN
    assert prepare.prepare(spread).pending == ()


def test_progress_of_what_is_converted_begins_anew(engine: Engine) -> None:
    progress(engine, "PortfoliosTS", epoch=7)
    sql(engine, "UPDATE msm__data_node_update SET watermark = '2024-01-02', row_count = 5")
    prepare.lay_out(engine, partitions=2)
    assert sql(engine, "SELECT watermark, row_count, epoch > 7 FROM msm__data_node_update") == [(None, 0, True)]


def test_a_partition_that_was_dropped_is_pending_and_made_again(spread: Engine) -> None:
    drop(spread, "msm__portfolios_h3", "msm__portfolios_h7", "msm__signal_weights_h0")
    missing = ("msm__signal_weights_h0", "msm__portfolios_h3", "msm__portfolios_h7")
    assert prepare.check(spread) == prepare.check(spread, partitions=8) == prepare.Preparation(missing)
    assert prepare.prepare(spread).pending == missing
    assert prepare.check(spread) == CLEAN
    assert partitions(spread)["msm__portfolios_h7"] == "FOR VALUES WITH (modulus 8, remainder 7)"
    sql(spread, "INSERT INTO msm__portfolios SELECT 'p' || i, '2024-01-02', 1, 0, 1, '2024-01-02' FROM generate_series(1, 99) i")


def test_storages_with_rows_get_what_was_dropped(spread: Engine) -> None:
    value(spread, "2024-01-02Z")
    ((held,),) = sql(spread, "SELECT tableoid::regclass::text FROM msm__portfolios")
    other = next(name for name in names("msm__portfolios", 8) if name != held)
    drop(spread, other)
    printed = prepare.ddl(spread)
    assert prepare.prepare(spread).pending == (other,)
    drop(spread, other)
    with rival(spread) as connection:
        connection.execute(printed)  # type: ignore[arg-type] - the text of this project's own DDL
    assert prepare.check(spread) == CLEAN
    assert sql(spread, "SELECT tableoid::regclass::text FROM msm__portfolios") == [(held,)]


def test_a_batch_under_way_is_waited_for(spread: Engine) -> None:
    drop(spread, "msm__portfolio_weights_h5")
    progress(spread, "PortfolioWeightsTS")
    made: list[tuple[str, ...]] = []
    with rival(spread) as batch:
        batch.execute("SELECT 1 FROM msm__data_node_update WHERE scope = 'p' FOR UPDATE SKIP LOCKED")
        preparing = threading.Thread(target=lambda: made.append(prepare.prepare(spread).pending))
        preparing.start()
        preparing.join(timeout=0.7)
        assert preparing.is_alive()
    preparing.join(timeout=20)
    assert made == [("msm__portfolio_weights_h5",)]


def test_a_storage_that_was_dropped_takes_part_again(spread: Engine) -> None:
    drop(spread, "msm__portfolios")
    assert prepare.prepare(spread).pending == ("msm__portfolios",)  # plain, as the migrations make it
    assert prepare.lay_out(spread, partitions=8) == ("msm__portfolios", *names("msm__portfolios", 8))


def test_partitions_of_somebody_else_count_for_their_remainders(spread: Engine) -> None:
    """Remainder 1 of 4 is remainders 1 and 5 of 8."""
    drop(spread, "msm__portfolios_h1", "msm__portfolios_h5", "msm__portfolios_h6")
    sql(spread, "CREATE TABLE wide PARTITION OF msm__portfolios FOR VALUES WITH (MODULUS 4, REMAINDER 1)")
    assert prepare.prepare(spread).pending == ("msm__portfolios_h6",)
    assert prepare.check(spread, partitions=8) == CLEAN


# -- what is refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "asked", "told"),
    [
        ({"partitions": 8}, {"partitions": 4}, [f"{table}: it has 8 partitions, not 4" for table in OUTPUTS]),
        ({"partitions": 2}, {"partitions": 8}, [f"{table}: it has 2 partitions, not 8" for table in OUTPUTS]),
        ({"partitions": 8}, {"yearly": True}, [f"{t}: it is partitioned by HASH ({SCOPES[t]}), not RANGE (time_index)" for t in OUTPUTS]),
        ({"yearly": True}, {"partitions": 8}, [f"{t}: it is partitioned by RANGE (time_index), not HASH ({SCOPES[t]})" for t in OUTPUTS]),
    ],
)
def test_another_layout_is_refused_with_a_remedy_that_works(
    engine: Engine, made: dict[str, Any], asked: dict[str, Any], told: list[str]
) -> None:
    calendar(engine)
    prepare.lay_out(engine, **made)
    value(engine, "2024-01-02Z")
    before = factories.relations(engine), factories.versions(engine)
    for attempt in (prepare.check, prepare.lay_out, prepare.ddl):
        with pytest.raises(StoragePartitioned, match=re.escape(f"way: {'; '.join(told)}. Leave them so")) as raised:
            attempt(engine, **asked)
    assert (factories.relations(engine), factories.versions(engine)) == before
    assert prepare.check(engine) == CLEAN

    (remedy,) = re.findall(r"\((DROP TABLE .*)\):", str(raised.value))
    sql(engine, remedy)
    prepare.prepare(engine)
    prepare.lay_out(engine, **asked)
    assert prepare.check(engine, **asked) == CLEAN


def test_one_storage_of_another_number_refuses_all(spread: Engine) -> None:
    drop(spread, "msm__signal_weights", "msm__portfolios")
    prepare.prepare(spread)  # plain again, beside the weights
    before = factories.relations(spread)
    with pytest.raises(StoragePartitioned, match=r"way: msm__portfolio_weights: it has 8 partitions, not 4\. Leave"):
        prepare.lay_out(spread, partitions=4)
    assert factories.relations(spread) == before


def test_a_name_that_is_taken_is_named(engine: Engine) -> None:
    sql(engine, "CREATE TABLE msm__portfolios_h3 ()")
    before = factories.relations(engine)
    assert prepare.lay_out(engine) == ()
    with pytest.raises(StorageMismatch, match="msm__portfolios_h3: it is there, but no partition"):
        prepare.lay_out(engine, partitions=4)
    assert factories.relations(engine) == before


def test_a_partition_taken_out_to_be_kept_is_not_written_over(spread: Engine) -> None:
    sql(spread, "ALTER TABLE msm__portfolios DETACH PARTITION msm__portfolios_h3")
    with pytest.raises(StorageMismatch, match="msm__portfolios_h3: it is there, but no partition"):
        prepare.prepare(spread)


def test_rows_of_one_storage_refuse_all(engine: Engine) -> None:
    sql(engine, "INSERT INTO msm__signal_weights VALUES ('s', '2024-01-02Z', 'a', 1)")
    with pytest.raises(StorageNotEmpty, match=r"rows: msm__signal_weights\. "):
        prepare.lay_out(engine, partitions=4)
    assert partitions(engine) == {}


def test_no_partitions_at_all_tell_no_number(spread: Engine) -> None:
    drop(spread, *names("msm__portfolios", 8))
    assert prepare.check(spread) == CLEAN
    assert prepare.lay_out(spread, partitions=8) == tuple(names("msm__portfolios", 8))


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"partitions": 4, "yearly": True}, "--partitions and --partition-by-year exclude each other"),
        ({"partitions": 1}, "--partitions 1: give a number from 2 to 64"),
        ({"partitions": 65}, "--partitions 65: give a number from 2 to 64"),
    ],
)
def test_what_cannot_be_asked_for_is_told(engine: Engine, asked: dict[str, Any], told: str) -> None:
    for attempt in (prepare.check, prepare.lay_out, prepare.ddl):
        with pytest.raises(ConfigurationError, match=told):
            attempt(engine, **asked)
    assert partitions(engine) == {}
